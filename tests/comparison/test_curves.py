"""Curves out of metrics.jsonl."""

import json

import numpy as np
import pytest
from run_folders import make_run

from unlearn_runner.comparison.curves import curve_of, curves_by_label, read_lines
from unlearn_runner.comparison.runs import read_runs


def points(*pairs):
    steps, values = zip(*pairs, strict=True)
    return np.array(steps, dtype=float), np.array(values, dtype=float)


LINES = [
    {"step": 0, "version": 2}, {"step": 0, "base/forget_rate": 0.5, "base/fid_retain": 1.0},
    {"step": 1, "lambda/value": 0.5, "loss/retain": 1.0}, {"step": 1, "eval/forget_rate": 0.4, "eval/fid_retain": 1.5},
    {"step": 2, "lambda/value": 0.4}, {"step": 2, "eval/forget_rate": 0.3, "eval/fid_retain": 1.7},
    {"step": 2, "eval/forget_rate": 0.1, "eval/fid_retain": 1.2, "eval/kid_retain": 2.0},
]  # fmt: skip


def test_curves_of_shares_go_from_the_base_to_the_final_evaluation(tmp_path):
    """All of them are of the same mean, whatever the number of samples; a FID of other samples is no look."""
    make_run(tmp_path, "siss", 0, {}, lines=LINES)
    keys = {"eval/forget_rate", "eval/fid_retain", "lambda/value"}
    curves, remarks = curves_by_label(read_runs([tmp_path]).runs, 100, keys)
    found = {key: (curve.steps, curve.mean) for key, curve in curves["siss"].items()}
    assert found == {
        "eval/forget_rate": ([0.0, 1.0, 2.0], [0.5, 0.4, 0.1]),
        "eval/fid_retain": ([1.0, 2.0], [1.5, 1.7]),
        "lambda/value": ([1.0, 2.0], [0.5, 0.4]),
    }
    assert remarks == []


def test_corrupt_lines_are_skipped_and_counted(tmp_path):
    good = [json.dumps({"step": step, "loss/retain": float(step)}) for step in range(1, 6)]
    bad = ['{"step": 3, "loss/re', "[1, 2]", '"text"', '{"loss/retain": 1.0}', '{"step": 4, "loss/retain": "high"}']
    folder = make_run(tmp_path, "siss", 0, {})
    (folder / "metrics.jsonl").write_bytes("\n".join(good + bad).encode() + b"\n\xff\xfe{\n\n")
    read = read_lines(folder / "metrics.jsonl")
    assert read.corrupt == 6
    assert read.series["loss/retain"][1].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    _, (remark,) = curves_by_label(read_runs([tmp_path]).runs, 100)
    assert "6 corrupt lines are skipped" in remark


def test_values_that_are_not_finite_are_no_points(tmp_path):
    folder = make_run(tmp_path, "siss", 0, {}, lines=[{"step": 1, "a": 1.0}, {"step": 2, "a": float("inf")}])
    assert read_lines(folder / "metrics.jsonl").series["a"][0].tolist() == [1.0]


def test_no_file_has_no_curves(tmp_path):
    assert read_lines(tmp_path / "metrics.jsonl").series == {}


def test_seeds_are_averaged_where_they_have_a_step():
    curve = curve_of([points((1, 0.5), (2, 0.25)), points((1, 0.7), (2, 0.75), (3, 9.0))], most=100)
    assert curve.steps == [1, 2, 3]
    assert curve.mean == pytest.approx([0.6, 0.5, 9.0])
    assert (curve.low, curve.high) == ([0.5, 0.25, 9.0], [0.7, 0.75, 9.0])


def test_many_steps_are_drawn_as_means_of_neighbours():
    seeds = [points(*((step, float(step)) for step in (3, 1, 2, 5, 4))), points(*((n, 10.0 * n) for n in range(1, 6)))]
    whole = curve_of(seeds, most=5)
    assert (whole.steps, whole.low) == ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    thinned = curve_of(seeds, most=3)
    assert thinned.steps == [1.5, 3.5, 5]
    assert (thinned.low, thinned.high) == ([1.5, 3.5, 5], [15, 35, 50])
    assert thinned.mean == [8.25, 19.25, 27.5]
