"""The run folder's files and their versions."""

import json

from unlearn_runner.comparison.runs import read_run
from unlearn_runner.schema import METRICS_VERSION, SUMMARY_VERSION
from unlearn_runner.training.run_folder import RunFolder

CONFIG = {"choices": {"method": "siss", "dataset": "digits", "model": "tiny"}, "seed": 3, "label": "mine"}


def test_the_first_line_has_the_version_once_also_in_a_resumed_run(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    folder.append(1, {"loss/retain": 0.5})
    kept = folder.position()
    folder.append(2, {"loss/retain": 0.25})
    folder.close()
    resumed = RunFolder(tmp_path, CONFIG)
    resumed.truncate(kept)
    resumed.append(2, {"loss/retain": 0.125})
    resumed.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 0, "version": METRICS_VERSION},
        {"step": 1, "loss/retain": 0.5},
        {"step": 2, "loss/retain": 0.125},
    ]


def test_what_is_written_can_be_compared(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    folder.write_summary("finished", {"eval/forget_rate": 0.5}, provenance={"evaluation": {"sampler": "ddim"}})
    folder.close()
    run, dropped = read_run(tmp_path)
    assert (run.label, run.method, run.seed, run.version) == ("mine", "siss", 3, SUMMARY_VERSION)
    assert run.metrics == {"eval/forget_rate": 0.5}
    assert run.facts["evaluation.sampler"] == "ddim"
    assert dropped == []
