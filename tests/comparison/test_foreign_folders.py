"""Run folders of others: nothing in them runs, breaks a table, eats memory or ends the comparison in a traceback."""

import csv
import io
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import zlib
from datetime import date

import pytest
import yaml
from conftest import ROOT
from run_folders import PROVENANCE, make_run, save_grid

from unlearn_runner.comparison.comparison import Wanted, compare
from unlearn_runner.comparison.curves import curves_by_label, read_lines
from unlearn_runner.comparison.pictures import pictures_of, samples_of, side_by_side
from unlearn_runner.comparison.render import csv_text, escaped, latex, markdown, markdown_escaped, no_formula
from unlearn_runner.comparison.report import command_of, report
from unlearn_runner.comparison.runs import read_runs

WANTED = Wanted([], False, None, None, "t")
EVIL = ["=HYPERLINK(\"x\")", "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "a|b`c`\n<script>", "[x](http://y)",
        "$\\input{/etc/passwd}$", "[/bold] :smile:", "\x1b[31mred\x1b[0m", "é" * 300, "-0.5"]  # fmt: skip


def rendered(folder):
    """The first table of a folder as Markdown, LaTeX and lines of CSV."""
    (table, *_) = compare(read_runs([folder]), WANTED).tables
    rest = (table.rows, table.columns, table.cells)
    lines = list(csv.DictReader(io.StringIO(csv_text([(table.title, *rest)]))))
    return markdown(*rest), latex(*rest, "caption"), lines


@pytest.mark.parametrize("label", EVIL)
def test_names_of_others_stay_text(tmp_path, label):
    make_run(tmp_path, "siss", 0, {"eval/forget_rate": -0.5}, config={"label": label})
    cells, tex, (line, *_) = rendered(tmp_path)
    assert not line["row"].startswith(("=", "+", "@", "\t", "\r"))
    assert float(line["mean"]) == -0.5, "numbers stay numbers"
    assert line["row"].startswith("-") == (label == "-0.5")
    head, rule, *rows = cells.splitlines()
    assert len(re.findall(r"(?<!\\)\|", head)) == len(re.findall(r"(?<!\\)\|", rule)) == 3
    assert len(rows) == 1
    assert "<" not in head
    assert "\x1b" not in cells + tex
    assert r"\input" not in tex
    page, _ = report(compare(read_runs([tmp_path]), WANTED), WANTED)
    assert "<script>\n" not in page.replace(page[page.rindex("<script") :], "")


@pytest.mark.parametrize(
    "said, wanted",
    [("=1", "'=1"), ("-0.5", "-0.5"), ("+1e3", "+1e3"), ("-x", "'-x"), ("siss", "siss"), ("", ""), ("@a", "'@a")],
)
def test_a_spreadsheet_runs_nothing(said, wanted):
    assert no_formula(said) == wanted


@pytest.mark.parametrize(
    "said, wanted",
    [
        ("neg_grad", "neg_grad"),
        ("_a_ *b* ~c~", r"\_a\_ \*b\* \~c\~"),
        ("a|b", r"a\|b"),
        ("a\nb", "a b"),
        ("`<b>&`", r"\`&lt;b&gt;&amp;\`"),
        ("[a](http://b) www.c.d @e", r"\[a\](http\://b) www\.c.d \@e"),
        ("a\\|b", r"a\\\|b"),
    ],
)
def test_markdown_is_escaped(said, wanted):
    assert markdown_escaped(said) == wanted


def test_latex_is_escaped():
    assert escaped("a<b>|c\n\\d%") == r"a\textless{}b\textgreater{}\textbar{}c \textbackslash{}d\%"


LAUGHS = "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]"] + [
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)])  # fmt: skip


def config_of(text):
    return lambda folder: (folder / "config.yaml").write_text(text)


def summary_of(text):
    return lambda folder: (folder / "summary.json").write_text(text)


def fifo(name):
    def make(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


def with_config(**more):
    def change(folder):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(config | more))

    return change


HARM = {
    "billion laughs": (config_of(LAUGHS), "its aliases stand for more than 100000 values"),
    "an alias of itself": (config_of("a: &a [*a]"), "its aliases stand for"),
    "deep yaml": (config_of("[" * 100_000), "config.yaml is unreadable"),
    "huge yaml": (config_of("a: " + "x" * 2_000_001), "has 2000004 bytes, more than 2000000"),
    "python in yaml": (config_of("!!python/object/apply:os.system ['true']"), "config.yaml is unreadable"),
    "a list": (config_of("[1]"), "is not as expected"),
    "an impossible date": (config_of("seed: 2026-99-99"), "config.yaml is unreadable"),
    "no text": (lambda folder: (folder / "config.yaml").write_bytes(b"\xff\xfe\x00"), "config.yaml is unreadable"),
    "a pipe": (fifo("summary.json"), "it is no regular file"),
    "a pipe for yaml": (fifo("config.yaml"), "it is no regular file"),
    "deep json": (summary_of("[" * 100_000), "summary.json is unreadable"),
    "null": (summary_of("null"), "is not as expected"),
    "half a seed": (with_config(seed=1.5), "seed 1.5 is no whole number"),
    "a seed of text": (with_config(seed="x"), "seed x is no whole number"),
    "a method of text": (with_config(method="x"), "is not as expected"),
    "choices of text": (with_config(choices="x"), "is not as expected"),
    "a trainer of text": (with_config(trainer="x"), "is not as expected"),
    "a status that is none": (summary_of('{"status": ["\\u001b[1m", {}]}'), "\\x1b[1m"),
    "metrics of text": (summary_of('{"status": "finished", "metrics": "x", "provenance": {}}'), "is not as expected"),
    "evaluation of text": (
        summary_of('{"status": "finished", "metrics": {}, "provenance": {"evaluation": "x"}}'), "is not as expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_a_folder_that_is_no_run_gets_one_line(tmp_path, harm):
    make_run(tmp_path, "siss", 0, {"eval/forget_rate": 0.5})
    damage, said = HARM[harm]
    damage(make_run(tmp_path, "siss", 1, {"eval/forget_rate": 0.5}))
    found = read_runs([tmp_path])
    assert [run.seed for run in found.runs] == [0]
    (apart,) = found.apart
    assert said in apart.why
    assert apart.why.isprintable()


def test_aliases_of_an_honest_configuration_are_read(tmp_path):
    folder = make_run(tmp_path, "siss", 0, {"eval/forget_rate": 0.5})
    with open(folder / "config.yaml", "a") as file:
        file.write("one: &one {a: [1, 2]}\ntwo: *one\nthree: {<<: *one}\n")
    assert len(read_runs([tmp_path]).runs) == 1


def test_odd_values_are_compared_and_hashed(tmp_path):
    odd = {"set": {1, 2}, "nan": float("nan"), "list": [1], "day": date(2026, 1, 1)}
    for seed in (0, 1):
        metrics = {"eval/forget_rate": 10**400, "\x1b[1modd\nkey": 1.0, "eval/fid_retain": 1e308}
        make_run(tmp_path, "siss", seed, metrics, config={"model": {"network": odd, "pretraining": odd}, "method": odd})
    found = read_runs([tmp_path])
    assert [run.metrics for run in found.runs] == [{"odd key": 1.0}] * 2
    assert "eval/forget_rate, eval/fid_retain" in found.remarks[0]
    assert len(compare(found, WANTED).tables) == 1


def test_lines_of_others_are_numbers_or_skipped(tmp_path):
    lines = ['{"step": 1, "a": 1.0}', '{"step": [1], "a": [2]}', '{"step": 2, "a": 1' + "0" * 400 + "}",
             '{"step": 3, "a": NaN}', '{"step": null, "a": 1}', "[" * 100_000, '{"": 1, "step": 4}',
             '{"step": 5, "a": {}}', '{"step": 6, "a": 2.0}']  # fmt: skip
    folder = make_run(tmp_path, "siss", 0, {})
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    read = read_lines(folder / "metrics.jsonl")
    assert read.series["a"][0].tolist() == [1.0, 6.0]
    assert read.corrupt == 5
    with open(folder / "metrics.jsonl", "wb") as file:
        file.truncate(1_000_000_001)  # takes no room
    _, (remark,) = curves_by_label(read_runs([tmp_path]).runs, 100)
    assert "is not read: it has more than 1000000000 bytes" in remark


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width, height):
    """A PNG of zeros that is small as a file."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer, rows = zlib.compressobj(9), []
    for _ in range(height):
        rows.append(packer.compress(bytes(width + 1)))
    body = b"".join(rows) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


PICTURES = {
    "200 megapixels": lambda path: path.write_bytes(png_of(20_000, 10_000)),
    "100 megapixels": lambda path: path.write_bytes(png_of(10_000, 10_000)),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "no picture": lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"),
    "garbled": lambda path: path.write_bytes(path.read_bytes()[:40] + os.urandom(400)),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("harm", PICTURES)
def test_pictures_that_cannot_be_shown_are_left_out(tmp_path, harm):
    for method in ("siss", "neg_grad"):
        save_grid(make_run(tmp_path, method, 0, {"eval/forget_rate": 0.5}), "after", 80)
    PICTURES[harm](tmp_path / "siss_0_finished" / "samples" / "after.png")
    (table,) = compare(read_runs([tmp_path]), WANTED).tables
    samples, left_out = samples_of(table, 10**6)
    assert [sample["title"] for sample in samples] == ["neg_grad"]
    assert left_out == ["siss"]
    pictures = pictures_of(table.runs, [row.label for row in table.rows])
    whole, (remark,) = side_by_side(pictures)
    assert whole.size == side_by_side({"neg_grad": pictures["neg_grad"]})[0].size
    assert "siss_0_finished" in remark
    assert side_by_side({"siss": pictures["siss"]})[0] is None


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, 1)])
def test_pictures_of_odd_shapes_are_made_small(tmp_path, size):
    folder = make_run(tmp_path, "siss", 0, {"eval/forget_rate": 0.5})
    save_grid(folder, "after", 80)
    (folder / "samples" / "after.png").write_bytes(png_of(*size))
    (table,) = compare(read_runs([tmp_path]), WANTED).tables
    samples, left_out = samples_of(table, 10**6)
    assert not left_out
    assert len(samples[0]["uri"]) < 10_000


@pytest.mark.parametrize("name", ["a b", "a'b", "$(touch x)", "--help", "a;b", "é"])
def test_the_command_that_makes_a_run_again_is_quoted(tmp_path, name):
    words = shlex.split(command_of(tmp_path / name))
    assert words == ["python", "train.py", "--config-path", str(tmp_path / name), "--config-name", "config"]
    inside = shlex.split(command_of(ROOT / name))
    assert inside[3] == (f"./{name}" if name.startswith("-") else name)


def script(*arguments, name="compare", **more):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **more)  # fmt: skip


@pytest.mark.parametrize("form", [(), ("--csv",)])
def test_head_ends_it_quietly_and_files_are_written(tmp_path, form):
    for number in range(40):
        folder = make_run(tmp_path / str(number), "siss", 0, {f"eval/{key}": 0.5 for key in ("forget_rate", "mia_auc")})
        with_config(label=f"label {number} " + "x" * 20_000)(folder)  # more than any pipe holds
    done = script(tmp_path, *form, "--html", tmp_path / "page.html")
    assert done.stdout.readline()
    done.stdout.close()
    assert (done.stderr.read() if not form else "Traceback" not in done.stderr.read()) in ("", True)
    assert done.wait() == 141
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_names_that_look_like_markup_are_printed_as_they_are(tmp_path):
    label, dataset = "[/b] :smile: [red]x", "[/nothing]"
    for seed, sampler in enumerate(("ddim", "[/ddpm]")):
        make_run(tmp_path, "siss", seed, {"eval/forget_rate": 0.5},
                 config={"label": label, "choices": {"method": "siss", "dataset": dataset, "model": "m"}},
                 provenance={"evaluation": PROVENANCE["evaluation"] | {"sampler": sampler}})  # fmt: skip
    done = script(tmp_path, "--baseline", label, "--curves", tmp_path / "c.png")
    out, error = done.communicate()
    assert done.returncode == 0, error
    assert label in out
    assert "sampler [/ddpm]" in out


@pytest.mark.parametrize(
    "name, arguments, said",
    [
        ("wandb_dashboard", ["--projekt", "x"], "there is no option '--projekt'; near it: --project"),
        ("bench", ["--round", "3"], "there is no option '--round'; near it: --rounds"),
        ("bench", ["--conditional", "maybe"], "must be true or false, got 'maybe'"),
        ("bench", ["--hardware", "tpu"], "invalid choice: 'tpu'"),
        ("bench", ["--json", "nowhere/x.json"], "there is no folder nowhere"),
        ("scaling", ["--steps", "x"], "invalid int value: 'x'"),
        ("scaling", ["--markdown", "."], "cannot be written: it is a folder"),
        ("compare", [ROOT / "train.py"], "train.py is a file; give the folder of a run"),
        ("compare", [ROOT / "docs" / "runs", "--pack", "runs.json"], "a file of runs is called *.parquet"),
        ("compare", [], "the following arguments are required: FOLDER"),
        ("compare", [ROOT / "docs" / "runs" / "digits_trousers.parquet", "--html", ROOT], "it is a folder"),
    ],
)
def test_mistakes_get_one_sentence_from_every_script(name, arguments, said):
    done = script(*arguments, name=name)
    _, error = done.communicate()
    assert done.returncode == 1
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_a_summary_may_hold_a_lone_surrogate(tmp_path):
    folder = make_run(tmp_path, "siss", 0, {"eval/forget_rate": 0.5})
    content = json.loads((folder / "summary.json").read_text()) | {"status": "\ud800"}
    (folder / "summary.json").write_text(json.dumps(content))
    (apart,) = read_runs([tmp_path]).apart
    apart.why.encode()
