"""What is read of run folders, and what is said of those that cannot be read."""

import json

import pytest
from run_folders import changed, make_run

from unlearn_runner.comparison.packs import pack, runs_in, unpacked, with_packs
from unlearn_runner.comparison.runs import read_runs
from unlearn_runner.errors import ConfigurationError


def test_runs_are_read_wherever_they_lie_and_once(tmp_path):
    make_run(tmp_path / "a" / "b", "siss", 0, {"eval/forget_rate": 0.5, "cost/images": 7})
    make_run(tmp_path / "c", "siss", 1, {"eval/forget_rate": 0.5})
    found = read_runs([tmp_path, tmp_path / "a", tmp_path / "c" / "siss_1_finished"])
    assert sorted((run.label, run.seed) for run in found.runs) == [("siss", 0), ("siss", 1)]
    first = next(run for run in found.runs if run.seed == 0)
    assert first.metrics == {"eval/forget_rate": 0.5, "cost/images": 7.0}
    assert found.apart == found.remarks == []


def test_seconds_and_seeds_are_no_facts(tmp_path):
    make_run(tmp_path, "siss", 0, {}, config={"model": {"pretraining": {"seed": 0, "lr": 1}, "network": {"width": 8}}})
    make_run(
        tmp_path, "siss", 1, {}, provenance=changed(seconds={"sampling": 9.0}),
        config={"model": {"pretraining": {"seed": 1, "lr": 1}, "network": {"width": 8, "weights": "x"}}},
    )  # fmt: skip
    a, b = read_runs([tmp_path]).runs
    assert a.facts == b.facts
    assert a.facts["model.width"] == 8


def test_a_clip_that_each_seed_trains_is_its_recipe(tmp_path):
    """One that was read from elsewhere is its weights."""
    for seed, clip in enumerate([{"training": {"seed": 0, "steps": 5}}, {"training": {"seed": 1, "steps": 5}}]):
        parts = {"model": {"pretraining": {"autoencoder": {"seed": seed}}}, "clip": clip}
        make_run(tmp_path / "a", "siss", seed, {}, provenance=changed(clip_digest=f"{seed}"), config=parts)
        make_run(tmp_path / "b", "siss", seed, {}, provenance=changed(clip_digest=f"{seed}"), config={"clip": {}})
    make_run(
        tmp_path / "a", "ddpo", 0, {}, provenance=changed(clip_digest="0"),
        config=parts | {"clip": {"training": {"seed": 0, "steps": 6}}},
    )  # fmt: skip
    longer, *same = sorted(read_runs([tmp_path / "a"]).runs, key=lambda run: run.label)
    assert same[0].facts == same[1].facts
    assert longer.facts != same[0].facts
    assert longer.facts["clip.training.steps"] == 6
    a, b = read_runs([tmp_path / "b"]).runs
    assert a.facts != b.facts


def test_the_oracle_as_a_method_has_the_budget_of_the_others(tmp_path):
    budget = {"max_steps": 10, "batch_size": 4}
    make_run(tmp_path, "siss", 0, {}, config={"budget": budget})
    make_run(
        tmp_path, "retrain", 0, {},
        config={"budget": budget, "trainer": {"max_steps": 999, "batch_size": 64, "init": "scratch"}},
    )  # fmt: skip
    a, b = read_runs([tmp_path]).runs
    assert a.facts == b.facts


@pytest.mark.parametrize("status", ["diverged", "interrupted", "running", "failed"])
def test_unfinished_runs_stand_apart(tmp_path, status):
    folder = make_run(tmp_path, "siss", 3, {}, status=status)
    content = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(content | {"error": "NonFiniteError: step 7\nmore"}))
    found = read_runs([tmp_path])
    assert not found.runs
    assert found.apart[0].why == f"{status} (siss, seed 3): NonFiniteError: step 7"


def damage_half(folder):
    text = (folder / "summary.json").read_text()
    (folder / "summary.json").write_text(text[: len(text) // 2])


def damage_gone(folder):
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").write_text("")


def damage_config(folder):
    (folder / "config.yaml").write_text("a: [")


def damage_list(folder):
    (folder / "summary.json").write_text("[1, 2]")


def damage_keys(folder):
    (folder / "summary.json").write_text('{"status": "finished", "metrics": {}}')


@pytest.mark.parametrize(
    "damage, said",
    [
        (damage_half, "half-written"),
        (damage_gone, "no summary.json"),
        (damage_config, "config.yaml is unreadable"),
        (damage_list, "not as expected"),
        (damage_keys, "has no 'provenance'"),
    ],
)
def test_a_damaged_run_gets_a_sentence_and_the_rest_is_read(tmp_path, damage, said):
    make_run(tmp_path, "siss", 0, {"eval/forget_rate": 0.5})
    damage(make_run(tmp_path, "siss", 1, {"eval/forget_rate": 0.5}))
    found = read_runs([tmp_path])
    assert [run.seed for run in found.runs] == [0]
    (apart,) = found.apart
    assert said in apart.why
    assert "\n" not in apart.why


def test_scores_that_are_no_numbers_are_left_out_and_named(tmp_path):
    make_run(tmp_path, "siss", 0, {"eval/forget_rate": 0.5, "eval/fid_retain": float("nan"), "eval/is_retain": None})
    found = read_runs([tmp_path])
    assert found.runs[0].metrics == {"eval/forget_rate": 0.5}
    assert "eval/fid_retain, eval/is_retain" in found.remarks[0]


def test_a_folder_without_runs_is_named(tmp_path):
    make_run(tmp_path / "a", "siss", 0, {})
    (tmp_path / "b").mkdir()
    (remark,) = read_runs([tmp_path / "a", tmp_path / "b"]).remarks
    assert str(tmp_path / "b") in remark
    assert "no run" in remark


def test_mixed_and_newer_versions_are_said(tmp_path):
    for seed, version in enumerate((1, 2, 2)):
        make_run(tmp_path, "siss", seed, {}, version=version)
    found = read_runs([tmp_path])
    assert len(found.runs) == 3
    assert "1 of version 1, 2 of version 2" in found.remarks[0]
    make_run(tmp_path, "siss", 9, {}, version=77)
    (remark,) = read_runs([tmp_path]).remarks
    assert "version 77" in remark


def test_a_summary_without_a_version_is_the_first(tmp_path):
    folder = make_run(tmp_path, "siss", 0, {})
    content = json.loads((folder / "summary.json").read_text())
    del content["version"]
    (folder / "summary.json").write_text(json.dumps(content))
    assert read_runs([tmp_path]).runs[0].version == 1


def test_a_pack_holds_what_its_runs_say(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARN_RUNNER_CACHE", str(tmp_path / "cache"))
    lines = [{"step": 1, "lambda/value": 0.3}]
    for seed in (0, 1):
        make_run(tmp_path / "a", "siss", seed, {"eval/forget_rate": 0.5 * seed}, lines=lines)
    make_run(tmp_path / "b", "siss", 1, {"eval/forget_rate": 0.7}, config={"label": "other"})
    found = read_runs([tmp_path / "a", tmp_path / "b"]).runs
    pack(found, tmp_path / "packs.parquet")
    again = read_runs(with_packs([tmp_path / "packs.parquet"])).runs
    assert sorted((run.label, run.seed, run.metrics["eval/forget_rate"]) for run in again) == [
        ("other", 1, 0.7), ("siss", 0, 0.0), ("siss", 1, 0.5),
    ]  # fmt: skip
    assert len({run.folder.name for run in again}) == 3, "two of one name"
    first = next(run for run in again if run.seed == 0)
    assert [json.loads(line) for line in (first.folder / "metrics.jsonl").read_text().splitlines()][-1] == lines[-1]
    assert {run.facts == first.facts for run in again if run.label == "siss"} == {True}
    assert unpacked(tmp_path / "packs.parquet").parents[2] == tmp_path / "cache"
    assert with_packs([tmp_path])[0].is_relative_to(tmp_path / "cache"), "in a folder of packs"
    pack(found, tmp_path / "short.parquet", logs=False)
    assert all("metrics.jsonl" not in texts for _, texts in runs_in(tmp_path / "short.parquet"))


def test_what_is_no_pack_is_refused(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv("UNLEARN_RUNNER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.parquet").write_text("nothing")
    others = {"other": {"a": ["b"]}, "outside": {"run": ["../x"], "config": ["a"], "summary": ["b"], "log": [None]}}
    for name, columns in others.items():
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    for name, sentence in (
        ("text", "expected a file of runs"), ("other", "expected a file of runs"), ("outside", "has the name '../x'"),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match=sentence):
            unpacked(tmp_path / f"{name}.parquet")
    assert not list((tmp_path / "cache").glob("packs/*/*"))
