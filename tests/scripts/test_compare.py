"""The command, on run folders made by hand."""

import csv
import io
import os
import re
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from many_runs import make_runs
from run_folders import changed, make_run, save_grid


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "compare.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def table_of(done):
    """The terminal's lines by their first cell, as lists of cells."""
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    return {line[0]: line[1:] for line in lines}


@pytest.fixture
def two_methods(tmp_path):
    for seed, rate in enumerate((0.1, 0.2, 0.3)):
        shared = {"base/forget_rate": 0.5, "oracle/forget_rate": 0.0, "cost/seconds": 120.0 + seed}
        once = {"eval/deletion_steps": 50.0} if seed == 2 else {}
        make_run(tmp_path, "siss", seed, shared | {"eval/forget_rate": rate} | once)
        make_run(tmp_path, "neg_grad", seed, shared | {"eval/forget_rate": 0.0, "eval/mia_auc": 0.25})
    return tmp_path


def test_table_of_means_and_intervals(two_methods):
    make_run(two_methods, "siss", 3, {"eval/forget_rate": 99.0}, status="diverged")
    done = command(two_methods)
    table = table_of(done)
    # Student's t with two degrees of freedom: 4.303 * 0.1 / sqrt(3)
    assert table["siss"][:2] == ["3", "0.200 [0.000, 0.448]"], "a share is not below 0"
    assert table["neg_grad"][:2] == ["3", "★ 0.000 [0.000, 0.037]"], "Wilson's, of 100 samples"
    assert list(table) == ["base", "oracle", "neg_grad", "siss"]
    assert "diverged (siss, seed 3)" in done.stdout
    assert "Not in a table, and in no average" in done.stdout
    said = (
        "forgets best: neg_grad (forget_rate, nearest to the oracle's 0.000); not distinguished by these seeds: siss."
    )
    assert said in done.stdout
    assert "Holm's correction over all pairs of methods" in done.stdout
    assert "by Student's t (for independent, normal scores; 3 seeds: 2.5 standard deviations" in done.stdout
    assert said in command(two_methods, "--metrics", "cost/seconds", "--sort", "label").stdout
    assert "★" not in command(two_methods, "--no-marks").stdout
    signs = command(two_methods, "--test", "permutation").stdout
    assert "permutation test (signs of the differences flipped: before correction p is at least 0.25 with 3" in signs


def test_a_narrow_terminal_gets_tables_below_each_other(two_methods):
    wide, narrow = (command(two_methods, FORCE_COLOR="1", COLUMNS=width) for width in ("200", "60"))
    assert wide.stdout.count("neg_grad ") < narrow.stdout.count("neg_grad ")


def test_markdown(two_methods):
    done = command(two_methods, "--markdown", "--sort", "label")
    assert done.returncode == 0, done.stderr
    *lines, legend = [line for line in done.stdout.splitlines() if line]
    assert legend.startswith("mean ± half the 95 % interval over seeds, by Student's t")
    assert legend.endswith("; **bold**: best.")
    assert "best" not in command(two_methods, "--markdown", "--no-marks").stdout
    table = {line.split("|")[1].strip(): line for line in lines}
    assert table[""] == "| | base | oracle | neg_grad | siss |"
    assert table["forget_rate"] == (
        "| forget_rate | 0.500 ± 0.096 | 0.000 [0.000, 0.037] | **0.000 [0.000, 0.037]** | 0.200 [0.000, 0.448] |"
    )
    assert table["mia_auc"] == "| mia_auc |  |  | 0.250 |  |"
    assert table["deletion_steps"] == "| deletion_steps |  |  |  | 50.0 (1 of 3) |"
    assert table["cost/seconds"].startswith("| cost/seconds |  |  | 121 ± 2 |")
    few = command(two_methods, "--markdown", "--sort", "label", "--metrics", "forget_rate", "cost/seconds").stdout
    assert few.splitlines()[:2] == ["| | forget_rate | cost/seconds |", "|---|---|---|"]
    assert [line.split("|")[1].strip() for line in few.splitlines()[2:6]] == ["base", "oracle", "neg_grad", "siss"]
    assert few.splitlines()[4].startswith("| neg_grad | **0.000 [0.000, 0.037]** | 121 ± 2 |")


def test_csv_goes_into_a_data_frame(two_methods):
    rows = list(csv.DictReader(io.StringIO(command(two_methods, "--csv").stdout)))
    (row,) = [row for row in rows if (row["row"], row["metric"]) == ("siss", "forget_rate")]
    assert float(row["mean"]) == pytest.approx(0.2)
    assert float(row["ci95_high"]) == pytest.approx(0.2 + 0.2484, abs=1e-4)
    assert float(row["ci95_low"]) == 0.0
    assert (row["n"], row["of"], row["best"], row["better"]) == ("3", "3", "0", "oracle")


def test_latex_escapes_names(two_methods):
    said = command(two_methods, "--latex", "--metrics", "forget_rate").stdout
    assert r"neg\_grad & 3 & \boldmath$0.000 [0.000, 0.037]$ \\" in said
    assert r"siss & 3 & $0.200 [0.000, 0.448]$ \\" in said
    assert r"method & $n$ & forget\_rate $\to$ oracle \\" in said
    said = command(two_methods, "--latex", "--metrics", "cost/seconds").stdout
    assert r"siss & 3 & $121 \pm 2$ \\" in said
    assert r"method & $n$ & cost/seconds $\downarrow$ \\" in said
    assert said.count("{") == said.count("}")


def test_several_oracles_have_their_spread_and_methods_z_in_every_form(tmp_path):
    named = [{"digest": digest, "metrics": {"fid_retain": 1.0 + 0.1 * place}} for place, digest in enumerate("abc")]
    for seed in (0, 1):
        metrics = {"eval/fid_retain": 1.4 + 0.2 * seed, "oracle/fid_retain": 1.1}
        make_run(tmp_path, "siss", seed, metrics, oracles=named)
    table = table_of(command(tmp_path))
    assert table["oracle"] == ["3", "1.100 ± 0.100"]
    assert table["siss"] == ["2", "1.500 ± 1.271, z=+4.0"]
    said = "oracle: mean ± standard deviation of 3 models that never saw the forget set"
    for form, cell in (
        ((), "z=+4.0"),
        (("--markdown",), "| oracle | 1.100 ± 0.100 |\n| siss | 1.500 ± 1.271, z=+4.0 |"),
        (("--latex",), r"siss & 2 & $1.500 \pm 1.271, z=+4.0$ \\"),
    ):
        shown = command(tmp_path, *form).stdout
        assert cell in shown
        assert ("standard deviation of 3 models" if form else said) in shown
        assert "one more oracle would lie within" in shown
    rows = {row["row"]: row for row in csv.DictReader(io.StringIO(command(tmp_path, "--csv").stdout))}
    assert float(rows["oracle"]["std"]) == pytest.approx(0.1)
    assert float(rows["siss"]["z"]) == pytest.approx(4.0)
    assert (rows["oracle"]["z"], rows["siss"]["std"]) == ("", "")


def test_a_baseline_is_tested_and_the_correction_named(two_methods):
    done = command(two_methods, "--baseline", "siss", "--metrics", "forget_rate")
    assert "paired t test" in done.stdout
    assert "Holm" in done.stdout
    assert "-0.200 ± 0.248, p=0.074, n=3" in done.stdout
    assert "p=0.250, n=3" in command(two_methods, "--baseline", "siss", "--test", "permutation").stdout


def test_who_is_not_called_the_best_is_said(tmp_path):
    for seed in (0, 1):
        base = {"base/retain_accuracy": 0.95}
        make_run(tmp_path, "all", seed, base | {"eval/forget_rate": 0.0, "eval/retain_accuracy": 0.1 + 0.01 * seed})
        for method, rate in (("good", 0.1), ("fair", 0.2)):
            scores = {"eval/forget_rate": rate + 0.01 * seed, "eval/retain_accuracy": 0.9}
            make_run(tmp_path, method, seed, base | scores)
    done = command(tmp_path)
    assert "forgets best: good (forget_rate)" in done.stdout
    assert "nor is who has less than 0.9 of the base's retain_accuracy (--floor)" in done.stdout
    said = "first, but not called the best: all by forget_rate (retain_accuracy 0.105, below 0.855)."
    assert said in done.stdout
    anyone = command(tmp_path, "--floor", "0").stdout
    assert "forgets best: all (forget_rate)" in anyone
    assert "not called the best" not in anyone
    assert "--floor" not in anyone


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--hmtl", "x.html"], "no option '--hmtl'; near it: --html"),
        (["--sort", "forget_rat"], "no run has a metric 'forget_rat'; near it: forget_rate"),
        (["--metrics", "eval/mia"], "near it: mia_auc"),
        (["--baseline", "sis"], "near it: siss"),
        (["--test", "wilcoxon"], "invalid choice: 'wilcoxon'"),
        (["--floor", "90"], "--floor: expected a share from 0 to 1, got 90"),
        (["--floor", "low"], "--floor: expected a share from 0 to 1, got low"),
        (["--html", "nowhere/report.html"], "there is no folder nowhere"),
    ],
)
def test_mistakes_get_one_sentence(two_methods, arguments, said):
    done = command(two_methods, *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("what", ["nothing", "half", "missing"])
def test_bad_folders_get_one_sentence(tmp_path, what):
    if what == "half":
        (make_run(tmp_path, "siss", 0, {}) / "summary.json").write_text('{"status": "fin')
    done = command(tmp_path / "nowhere" if what == "missing" else tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert ("no such folder" if what == "missing" else "no finished run") in done.stderr


def test_runs_measured_differently_stand_in_tables_of_their_own(tmp_path):
    make_run(tmp_path, "siss", 0, {"eval/forget_rate": 0.1})
    make_run(tmp_path, "neg_grad", 0, {"eval/forget_rate": 0.1}, provenance=changed(sampler="ddpm"))
    done = command(tmp_path)
    assert "Table 1: sampler ddpm" in done.stdout
    assert "Table 2: sampler ddim" in done.stdout
    assert "not measured alike" in done.stdout


def test_a_run_that_was_made_again_counts_once(tmp_path):
    old = make_run(tmp_path / "a", "siss", 0, {"eval/forget_rate": 0.9})
    make_run(tmp_path / "b", "siss", 0, {"eval/forget_rate": 0.1})
    os.utime(old / "summary.json", (0, 0))
    done = command(tmp_path)
    assert table_of(done)["siss"] == ["1", "0.100 [0.055, 0.174]"]
    assert "made again later (siss, seed 0)" in done.stdout


def test_samples_side_by_side(tmp_path):
    from PIL import Image

    shades = {
        ("neg_grad", 1, "after"): 40,
        ("siss", 0, "before"): 80,
        ("siss", 0, "after"): 120,
        ("siss", 1, "after"): 9,
    }
    for (method, seed, name), shade in shades.items():
        folder = tmp_path / f"{method}_{seed}_finished"
        if not folder.exists():
            make_run(tmp_path, method, seed, {"base/forget_rate": 0.5, "eval/forget_rate": 0.0})
        save_grid(folder, name, shade)
    done = command(tmp_path, "--grid", tmp_path / "grid.png")
    assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    cell, title, columns = 50, 18, 6  # three rows of cells; base, neg_grad and siss of the lowest seed that has one
    assert picture.shape == (title + 3 * cell + 2, 3 * (columns * cell + 2) + 2 * 10, 3)
    for strip, shade in enumerate((80, 40, 120)):
        left = strip * (columns * cell + 2 + 10)
        assert (picture[title + 2 : title + cell, left + 2 : left + cell] == shade).all()

    folder = make_run(
        tmp_path, "sfd", 0, {"eval/forget_rate": 0.0}, provenance=changed(row_titles=["a", "b", "c (forget)"])
    )
    save_grid(folder, "after", 200)
    assert command(tmp_path, "--grid", tmp_path / "titled.png").returncode == 0
    titled = np.asarray(Image.open(tmp_path / "titled.png"))
    width = titled.shape[1] - picture.shape[1] - (columns * cell + 2 + 10)  # of the titles, with the gap after them
    assert width > 10
    for row in range(3):
        strip = titled[title + 2 + row * cell : title + 2 + (row + 1) * cell, : width - 10]
        assert (strip.min(), strip.max()) == (0, 255), "a title beside each row, black on white"
    assert (titled[title + 2 : title + cell, width + 2 : width + cell] == 80).all(), "the base follows"


def test_curves_are_drawn_over_steps(tmp_path):
    from PIL import Image

    looks = [{"step": step, "eval/forget_rate": 0.5 / step, "seconds": 1.0} for step in (1, 2)]
    looks.insert(0, {"step": 0, "base/forget_rate": 0.9})
    for label in ("siss_0.1", "siss_0.5"):
        make_run(tmp_path / label, "siss", 0, {"eval/forget_rate": 0.1}, lines=looks, config={"label": label})
    done = command(tmp_path, "--curves", tmp_path / "curves.png")
    assert done.returncode == 0, done.stderr
    assert set(table_of(done)) == {"siss_0.1", "siss_0.5"}
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 5
    missing = command(tmp_path, "--curves", tmp_path / "none.png", "--keys", "lambda/value")
    assert "no run has lambda/value on the way" in missing.stdout
    assert not (tmp_path / "none.png").exists()


PACKS = sorted((ROOT / "docs" / "runs").iterdir())


def options_in(page: str, name: str) -> list[str]:
    """Those of the command that a page says a table of these runs is made by."""
    said = re.search(rf"compare\.py docs/runs/{re.escape(name)}\.parquet (.*?)\n\n", page, re.DOTALL)[1]
    return said.replace("\\\n", "").split()


@pytest.mark.parametrize("file", PACKS, ids=lambda file: file.stem)
def test_tables_in_the_docs_are_those_of_the_published_runs(file):
    page = (ROOT / "docs" / "tables" / f"{file.stem}.md").read_text()
    done = command(file, *options_in(page, file.stem))
    assert done.returncode == 0, done.stderr
    assert "Not in a table" not in done.stderr
    assert page.endswith("\n\n" + done.stdout.strip() + "\n")
    results = (ROOT / "docs" / "results.md").read_text()
    assert f"(tables/{file.stem}.md)" in results
    if not file.stem.endswith("_before"):
        small = command(file, *options_in(results, "<experiment>"))
        section = results.split(f"### {file.stem}\n", 1)[1].split("\n#", 1)[0]
        assert small.stdout.strip() in section


def test_results_are_read_in_one_sitting():
    assert len((ROOT / "docs" / "results.md").read_text().splitlines()) <= 200


@pytest.mark.slow
def test_500_runs_of_2000_steps_in_5_and_30_seconds(tmp_path):
    """Processor seconds, which other jobs on the machine do not change."""
    make_runs(tmp_path / "runs", labels=100, seeds=5, steps=2000)
    spent = []
    for more in ([], ["--html", tmp_path / "report.html"]):
        before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = command(tmp_path / "runs", *more)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        print(
            f"{spent[-1]:.1f} processor seconds, {time.perf_counter() - clock:.1f} s, {after.ru_maxrss / 2**20:.2f} GiB"
        )
    assert spent[0] <= 5
    assert spent[1] <= 30
    assert (tmp_path / "report.html").stat().st_size <= 20e6
    assert after.ru_maxrss <= 2**20  # KiB
