"""The table of runs, from run folders made by hand."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT

from unlearn_runner.training.run_folder import RunFolder

sys.path.insert(0, str(ROOT / "scripts"))
import compare

PROVENANCE = {"evaluation": {"sampler": "ddim", "seconds": {"sampling": 1.0}}}


def make_run(root, method, seed, metrics, status="finished", provenance=PROVENANCE):
    folder = root / f"{method}_{seed}_{status}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"choices": {"method": method}, "seed": seed}))
    content = {"status": status, "metrics": metrics, "provenance": provenance}
    (folder / "summary.json").write_text(json.dumps(content))
    return folder


def command(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "compare.py"), *map(str, arguments)], capture_output=True, text=True
    )


def test_table_of_means_and_intervals(tmp_path):
    for seed, rate in enumerate((0.1, 0.2, 0.3)):
        shared = {"base/forget_rate": 0.5, "oracle/forget_rate": 0.0, "cost/seconds": 120.0 + seed}
        once = {"eval/deletion_steps": 50.0} if seed == 2 else {}
        make_run(tmp_path, "siss", seed, shared | {"eval/forget_rate": rate} | once)
        make_run(tmp_path, "neg_grad", seed, shared | {"eval/forget_rate": 0.0, "eval/mia_auc": 0.25})
    make_run(tmp_path, "siss", 3, {}, status="diverged")
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    table = {line.split("|")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("|")}
    assert table[""] == "| | base | oracle | neg_grad | siss |"
    # Student's t with two degrees of freedom: 4.303 * 0.1 / sqrt(3)
    assert table["forget_rate"] == "| forget_rate | 0.500 | 0.000 | 0.000 | 0.200 ± 0.248 |"
    assert table["mia_auc"] == "| mia_auc |  |  | 0.250 |  |"
    assert table["deletion_steps"] == "| deletion_steps |  |  |  | 50.0 (1 of 3) |"
    assert table["cost/seconds"].startswith("| cost/seconds |  |  | 121 ± 2 |")
    assert "diverged (siss, seed 3)" in done.stdout


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
        config = {"choices": {"method": method}, "seed": seed}
        RunFolder(folder, config).save_grid(name, torch.full((30, 1, 48, 48), shade, dtype=torch.uint8), 10)
    done = command(tmp_path, "--grid", tmp_path / "grid.png")
    assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    cell, title, columns = 50, 18, 6  # three rows of cells; base, neg_grad and siss of the lowest seed that has one
    assert picture.shape == (title + 3 * cell + 2, 3 * (columns * cell + 2) + 2 * 10, 3)
    for strip, shade in enumerate((80, 40, 120)):
        left = strip * (columns * cell + 2 + 10)
        assert (picture[title + 2 : title + cell, left + 2 : left + cell] == shade).all()


def test_runs_are_told_apart_by_their_labels_and_drawn_over_steps(tmp_path):
    from PIL import Image

    for label in ("siss_0.1", "siss_0.5"):
        for seed in (0, 1):
            folder = make_run(tmp_path / label, "siss", seed, {"eval/forget_rate": 0.1, "reached/steps": 40.0})
            config = yaml.safe_load((folder / "config.yaml").read_text())
            (folder / "config.yaml").write_text(yaml.safe_dump({**config, "label": label}))
            looks = [{"step": step, "eval/forget_rate": 0.5 / step, "seconds": 1.0} for step in (1, 2)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    done = command(tmp_path, "--curves", tmp_path / "curves.png")
    assert done.returncode == 0, done.stderr
    assert "| | siss_0.1 | siss_0.5 |" in done.stdout
    assert "| reached/steps | 40.0 | 40.0 |" in done.stdout
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 5
    runs, _ = compare.finished_runs([tmp_path])
    curves = compare.curves_of(runs, ("eval/forget_rate",))
    assert curves["siss_0.1"]["eval/forget_rate"] == {1: [0.5, 0.5], 2: [0.25, 0.25]}
    missing = command(tmp_path, "--curves", tmp_path / "none.png", "--keys", "lambda/value")
    assert "no run has lambda/value on the way" in missing.stdout
    assert not (tmp_path / "none.png").exists()


def test_the_final_evaluation_is_no_look_and_steps_are(tmp_path):
    folder = make_run(tmp_path, "siss", 0, {"eval/forget_rate": 0.1})
    lines = [
        {"step": 1, "lambda/value": 0.5, "loss/retain": 1.0}, {"step": 2, "lambda/value": 0.4},
        {"step": 2, "eval/forget_rate": 0.3}, {"step": 2, "eval/forget_rate": 0.1, "eval/fid_retain": 2.0},
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs, _ = compare.finished_runs([tmp_path])
    curves = compare.curves_of(runs, ("eval/forget_rate", "lambda/value"))["siss"]
    assert curves == {"eval/forget_rate": {2: [0.3]}, "lambda/value": {1: [0.5], 2: [0.4]}}


def test_many_steps_are_drawn_as_means_of_neighbours():
    points = {step: [step, 10.0 * step] for step in (3, 1, 2, 5, 4)}
    assert compare.in_bins(points, most=5) == [(step, [step, 10.0 * step]) for step in range(1, 6)]
    assert compare.in_bins(points, most=3) == [(1.5, [1.5, 15.0]), (3.5, [3.5, 35.0]), (5, [5, 50.0])]


def test_a_run_that_was_made_again_counts_once(tmp_path):
    old = make_run(tmp_path / "a", "siss", 0, {"eval/forget_rate": 0.9})
    make_run(tmp_path / "b", "siss", 0, {"eval/forget_rate": 0.1})
    os.utime(old / "summary.json", (0, 0))
    done = command(tmp_path)
    assert "| forget_rate | 0.100 |" in done.stdout
    assert "made again later (siss, seed 0)" in done.stdout


def test_runs_measured_differently_are_not_compared(tmp_path):
    make_run(tmp_path, "siss", 0, {"eval/forget_rate": 0.1})
    other = {"evaluation": {"sampler": "ddpm", "seconds": {}}}
    make_run(tmp_path, "neg_grad", 0, {"eval/forget_rate": 0.1}, provenance=other)
    done = command(tmp_path)
    assert done.returncode == 1
    assert "not measured alike" in done.stderr


@pytest.mark.parametrize("what", ["nothing", "half", "missing"])
def test_bad_folders_get_one_sentence(tmp_path, what):
    if what == "half":
        (make_run(tmp_path, "siss", 0, {}) / "summary.json").write_text('{"status": "fin')
    done = command(tmp_path / "nowhere" if what == "missing" else tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert ("no such folder" if what == "missing" else "no finished run") in done.stderr


def test_one_value_has_no_interval():
    assert compare.half_width([1.0]) is None
    assert compare.cell([0.1234], 1) == "0.123"
    assert compare.cell([12.34, 12.34], 2) == "12.3"


@pytest.mark.parametrize("folder", sorted((ROOT / "docs" / "runs").iterdir()), ids=lambda folder: folder.name)
def test_tables_in_the_docs_are_those_of_the_published_runs(folder):
    runs, others = compare.finished_runs([folder])
    assert not others
    text = (ROOT / "docs" / "results.md").read_text()
    section = text.split(f"### {folder.name}\n", 1)[1].split("\n#", 1)[0]
    assert compare.markdown(compare.rows_of(runs)) in section
