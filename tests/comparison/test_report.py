"""The page as text: what is in it, and that it needs nothing else."""

import base64
import io
import json
import re
import shlex

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from run_folders import changed, make_run, save_grid

from unlearn_runner.comparison.comparison import Wanted, compare
from unlearn_runner.comparison.curves import Curve, curves_by_label
from unlearn_runner.comparison.pictures import samples_of
from unlearn_runner.comparison.plots import curve_keys, plotted, series_of, short
from unlearn_runner.comparison.report import command_of, report
from unlearn_runner.comparison.runs import read_runs

USUAL = Wanted(metrics=[], short=False, sort=None, baseline=None, test="t")


def compared(folder, **wanted):
    return compare(read_runs([folder]), USUAL._replace(**wanted))


def page_of(folder, **wanted):
    page, _ = report(compared(folder, **wanted), USUAL._replace(**wanted))
    return page


@pytest.fixture
def runs(tmp_path):
    for method, rate in (("siss", 0.1), ("neg_grad", 0.3)):
        for seed in (0, 1):
            metrics = {
                "eval/forget_rate": rate + 0.02 * seed,
                "eval/retain_accuracy": 0.9,
                "eval/is_retain": 8.0,
                "cost/seconds": 60.0,
            }
            lines = [
                {
                    "step": step,
                    "seconds": 0.5 * step,
                    "images": 8.0 * step,
                    "lambda/value": rate,
                    "loss/retain": 1 / step,
                }
                for step in range(1, 31)
            ]
            looks = [{"step": step, "eval/forget_rate": rate / step} for step in (10, 20, 30)]
            folder = make_run(tmp_path, method, seed, metrics, lines=lines + looks)
            save_grid(folder, "before", 40)
            save_grid(folder, "after", 90 if method == "siss" else 200)
    return tmp_path


def test_the_page_stands_alone(runs):
    page = page_of(runs, baseline="siss")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:)""", page)
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", page)
    addresses = set(re.findall(r"https?://[^\s\"']+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "a name of SVG, which nothing loads"


def test_labels_cannot_break_out_of_the_page(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    make_run(tmp_path, "siss", 0, {"eval/forget_rate": 0.1, "eval/retain_accuracy": 0.9}, config={"label": evil})
    page = page_of(tmp_path)
    assert evil not in page
    assert "<img src=x" not in page
    (data,) = re.findall(r'class="data">(.*?)</script>', page)
    assert json.loads(data)["methods"][0]["label"] == evil


def test_every_table_and_every_run_apart_is_there(runs):
    make_run(runs, "other", 0, {"eval/forget_rate": 0.5}, provenance=changed(sampler="ddpm"))
    make_run(runs, "siss", 9, {}, status="diverged")
    page = page_of(runs)
    assert page.count("<article") == 2
    assert "diverged (siss, seed 9)" in page
    assert "not measured alike" in page


def test_metrics_that_were_named_are_shown_first_and_the_others_are_there(runs):
    wanted = {"metrics": ["is_retain"], "whole": True}
    assert compared(runs, **wanted).tables[0].columns[0] == "is_retain"
    heads = re.findall(r'<th scope="col" aria-sort="none" data-better.*?class="(.*?)"', page_of(runs, **wanted))
    assert heads == ["number", "number detail", "number detail", "number detail"]
    assert json.loads(re.findall(r'class="data">(.*?)</script>', page_of(runs, **wanted))[0])["tradeoffs"]


def test_the_samples_are_those_of_one_seed(runs):
    table = compared(runs).tables[0]
    samples, left_out = samples_of(table, 10**6)
    assert [(sample["title"], sample["seed"]) for sample in samples] == [("before", 0), ("siss", 0), ("neg_grad", 0)]
    assert not left_out
    samples, left_out = samples_of(table, 1)
    assert ([sample["title"] for sample in samples], left_out) == (["before"], ["siss", "neg_grad"])
    (runs / "siss_0_finished" / "samples" / "after.png").write_bytes(b"half a picture")
    assert samples_of(table, 10**6)[1] == ["siss"]


def strips(page):
    """Sources of the strips in the cards, and of those in the section of them."""
    cards, drawn = (
        re.search(r'<ul class="cards">(.*?)</ul>', page, re.S),
        re.search(r'<ul class="drawn">(.*?)</ul>', page, re.S),
    )
    return [re.findall(r'<img class="strip" src="(.*?)"', found[1]) if found else [] for found in (cards, drawn)]


def pixels_of(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("L"))


def test_what_is_drawn_under_the_forget_condition_is_shown(tmp_path):
    """In the card of the best, and of everyone: the rows of the grid that the run names."""
    for method, rate, shade in (("siss", 0.1, 90), ("neg_grad", 0.3, 200)):
        for seed in (0, 1):
            scores = {"eval/forget_rate": rate + 0.01 * seed, "base/forget_rate": 0.5}
            folder = make_run(tmp_path, method, seed, scores, provenance=changed(forget_rows=[1]))
            for name, of_name in (("before", 40), ("after", shade)):
                save_grid(folder, name, [10, of_name, 250])
    page = page_of(tmp_path)
    cards, drawn = strips(page)
    assert [int(np.median(pixels_of(uri))) for uri in drawn] == [40, 90, 200], "before, then the methods in order"
    assert pixels_of(drawn[0]).shape == (52, 402)
    assert cards == [drawn[1]]
    assert re.findall(r"</strong> (forget_rate .*?)</figcaption>", page) == [
        "forget_rate 0.500", "forget_rate 0.105", "forget_rate 0.305",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "rows, has_pictures, said",
    [
        (None, True, "do not tell which of their pictures were drawn under the forget condition"),
        ("1", True, "do not tell which of their pictures were drawn under the forget condition"),
        ([1], False, "have no pictures (samples/after.png), so what is drawn instead cannot be seen"),
    ],
)
def test_why_nothing_of_it_is_shown_is_said(tmp_path, rows, has_pictures, said):
    folder = make_run(tmp_path, "siss", 0, {"eval/forget_rate": 0.1}, provenance=changed(forget_rows=rows))
    if has_pictures:
        save_grid(folder, "after", 90)
    page = page_of(tmp_path)
    assert said in page
    assert strips(page) == [[], []]


def test_rows_that_are_not_in_the_picture_are_left_out(tmp_path):
    """A pool of few samples has fewer rows than a run may name."""
    folder = make_run(tmp_path, "siss", 0, {"eval/forget_rate": 0.1}, provenance=changed(forget_rows=[2, 3]))
    save_grid(folder, "after", [10, 20, 30])
    (sample,), left_out = samples_of(compared(tmp_path).tables[0], 10**6)
    assert np.median(pixels_of(sample["strip"])) == 30
    assert left_out == []


def test_what_is_plotted(runs):
    table = compared(runs).tables[0]
    data = plotted(table, curves_by_label(table.runs, 5)[0])
    assert [method["label"] for method in data["methods"]] == ["siss", "neg_grad"]
    assert data["methods"][0]["cells"]["forget_rate"] == [0.11, 0, pytest.approx(0.11 + 12.706 * 0.01, rel=1e-3)]
    assert data["keys"] == ["eval/forget_rate", "loss/retain", "lambda/value"]
    curves = data["curves"][0]
    axis, mean = curves["series"]["loss/retain"]
    assert curves["axes"][axis]["steps"] == [3.5, 9.5, 15.5, 21.5, 27.5]
    assert curves["axes"][axis]["seconds"] == [1.75, 4.75, 7.75, 10.75, 13.75]
    assert mean == pytest.approx([np.mean(1 / np.arange(6 * n + 1, 6 * n + 7)) for n in range(5)], rel=1e-3)
    assert data["tradeoffs"][0]["front"] == [0]
    assert data["tradeoffs"][0]["worst"] == [1, 0]


def test_several_oracles_have_their_spread_and_methods_z(tmp_path):
    named = [{"digest": name, "metrics": {"retain_accuracy": 0.8 + 0.05 * place}} for place, name in enumerate("abc")]
    metrics = {"eval/retain_accuracy": 0.7, "oracle/retain_accuracy": 0.85}
    make_run(tmp_path, "siss", 0, metrics, oracles=named)
    page = page_of(tmp_path)
    (oracle,), (siss,) = (re.findall(rf'data-value="{label}">.*?</tr>', page, re.S) for label in ("oracle", "siss"))
    assert "0.850<br><small>± 0.050</small>" in oracle
    assert "<small>z=" not in oracle
    assert "<br><small>z=-3.0</small>" in siss
    assert "Oracle: mean ± standard deviation of 3 models" in page


def test_forgetting_is_plotted_as_the_distance_from_the_oracle(tmp_path):
    for method, rate in (("less", 0.0), ("near", 0.3)):
        scores = {"eval/forget_rate": rate, "oracle/forget_rate": 0.25, "eval/retain_accuracy": 0.9}
        make_run(tmp_path, method, 0, scores | {"base/forget_rate": 1.0})
    table = compared(tmp_path).tables[0]
    data = plotted(table, {})
    found = {each["label"]: each["cells"]["forget_rate"] for each in [*data["references"], *data["methods"]]}
    assert found == {"base": [0.75], "oracle": [0], "near": [0.05], "less": [0.25]}
    assert data["names"] == {"forget_rate": "forget_rate, distance to the oracle's"}
    assert data["better"]["forget_rate"] == "low"
    page = page_of(tmp_path)
    assert 'data-better="oracle"' in page


def test_curves_over_seconds_begin_at_none():
    clock = Curve([5.0, 10.0], [50.0, 100.0], [50.0, 100.0], [50.0, 100.0])
    curve = Curve([0.0, 5.0, 10.0], [1.0, 0.5, 0.1], [1.0, 0.5, 0.1], [1.0, 0.5, 0.1])
    (axis,) = series_of({"seconds": clock, "eval/forget_rate": curve}, ["eval/forget_rate"])["axes"]
    assert axis == {"steps": [0, 5, 10], "seconds": [0, 50, 100]}


def test_a_band_is_kept_only_where_seeds_differ():
    curve = Curve([1.0, 2.0], [0.5, 0.6], [0.4, 0.6], [0.6, 0.6])
    alone = Curve([1.0, 2.0], [0.5, 0.6], [0.5, 0.6], [0.5, 0.6])
    series = series_of({"a": curve, "b": alone}, ["a", "b"])["series"]
    assert len(series["a"]) == 4
    assert len(series["b"]) == 2


def test_details_and_other_models_are_no_curves():
    curve = Curve([1.0, 2.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0])
    names = (
        "weights/ess_retain",
        "eval/forget_rate",
        "eval/per_class/fid/1",
        "base/fid_retain",
        "seconds",
        "lambda/at/0.5",
    )
    assert curve_keys({"siss": dict.fromkeys(names, curve)}) == ["eval/forget_rate", "weights/ess_retain"]


def test_numbers_are_short():
    assert [short(value) for value in (0.123456, 123456.7, 2.0, None)] == [0.1235, 123500, 2, None]


def test_the_command_makes_the_run_again(tmp_path):
    here = command_of(ROOT / "outputs" / "siss_0")
    assert here == "python train.py --config-path outputs/siss_0 --config-name config"
    odd = tmp_path / "it's a run"
    assert shlex.split(command_of(odd))[3] == str(odd)
