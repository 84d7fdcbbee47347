"""Checkpoints are whole or refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from trainers import build_trainer

from unlearn_runner.cache import atomic, cached, fingerprint
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.schema import file_digest
from unlearn_runner.training.checkpoint import (
    Checkpoints,
    differences,
    for_a_person,
    newest_whole,
    open_checkpoint,
    put_aside,
)

STATE = {"weights": {"a": torch.arange(1000.0)}, "counters": {"step": 3, "seconds": 0.5}}
IDENTITY = {"method": "SISS", "model": "abc"}


def test_round_trip_and_limit(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", total_limit=2)
    for step in (1, 2, 10, 9):
        checkpoints.save(step, STATE, IDENTITY)
    assert [path.name for path in checkpoints.all()] == ["step_000009", "step_000010"]
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.step == 10
    assert checkpoint.run_folder == tmp_path
    assert torch.equal(checkpoint.state["weights"]["a"], STATE["weights"]["a"])
    assert open_checkpoint(tmp_path / "checkpoints" / "step_000009").step == 9
    checkpoint.require(IDENTITY)
    with pytest.raises(ConfigurationError, match="of another method"):
        checkpoint.require({**IDENTITY, "method": "NegGrad"})


def test_overwriting_leaves_no_rubble(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, STATE, IDENTITY)
    path = checkpoints.save(1, {"weights": {}}, IDENTITY)
    assert open_checkpoint(path).state == {"weights": {}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_000001"]


def flipped(content: bytes) -> bytes:
    """One bit of a weight is another."""
    at = content.index(torch.arange(1000.0).numpy().tobytes()) + 2000
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


HARMS = [
    "cut off", "no state", "no manifest", "garbled manifest", "a list as manifest", "same length, garbled",
    "a flipped bit",
]  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_checkpoints_are_refused(tmp_path, harm):
    path = Checkpoints(tmp_path).save(1, STATE, IDENTITY)
    state, manifest = path / "state.pt", path / "manifest.json"
    content = state.read_bytes()
    {
        "cut off": lambda: state.write_bytes(content[:-100]),
        "no state": state.unlink,
        "no manifest": manifest.unlink,
        "garbled manifest": lambda: manifest.write_text("{"),
        "a list as manifest": lambda: manifest.write_text("[1]"),
        "same length, garbled": lambda: state.write_bytes(b"x" * len(content)),
        "a flipped bit": lambda: state.write_bytes(flipped(content)),
    }[harm]()
    with pytest.raises(ConfigurationError, match=r"damaged|found no checkpoint"):
        open_checkpoint(path)


def test_pickles_are_not_executed(tmp_path):
    class Malice:
        def __reduce__(self):
            return (print, ("executed",))

    path = Checkpoints(tmp_path).save(1, {"weights": {}}, IDENTITY)
    torch.save({"weights": Malice()}, path / "state.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.pt"] = (path / "state.pt").stat().st_size
    manifest["digests"]["state.pt"] = file_digest(path / "state.pt")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigurationError, match="damaged") as refused:
        open_checkpoint(path)
    assert "weights_only" not in str(refused.value), "torch's advice is not passed on"


def test_an_older_whole_one_takes_the_place_of_a_damaged_one(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        checkpoints.save(step, STATE, IDENTITY)
    for step in (2, 3):
        (checkpoints.folder / f"step_{step:06d}" / "state.pt").write_bytes(b"")
    found, faults = newest_whole(tmp_path)
    assert found == checkpoints.folder / "step_000001"
    assert [folder.name for folder in faults] == ["step_000003", "step_000002"]
    put_aside(faults)
    assert checkpoints.all() == [found]
    assert "step_000003 is damaged (state.pt has 0 bytes instead of" in capsys.readouterr().out
    assert (checkpoints.folder / "step_000003.damaged-1" / "manifest.json").is_file(), "nothing is deleted"


@pytest.mark.parametrize("version", [1, 2])
def test_one_of_another_version_is_named(tmp_path, version):
    path = Checkpoints(tmp_path / "checkpoints").save(1, STATE, IDENTITY)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": version}))
    sentence = f"it is of version {version}, and this unlearn_runner reads version 3"
    with pytest.raises(ConfigurationError, match=sentence):
        open_checkpoint(path)
    with pytest.raises(ConfigurationError, match=sentence):
        newest_whole(tmp_path)
    assert path.is_dir(), "an old version is no damage"


def test_a_part_that_one_of_two_runs_has_differs_once():
    there = {"clip.network": None, "clip.training": None}
    here = {"clip.network._target_": "a.small_clip", "clip.network.seed": 0, "clip.training._target_": "a.ClipTraining"}
    assert for_a_person(differences(there, here)) == [
        ("clip.network", "none", "small_clip"), ("clip.training", "none", "ClipTraining"),
    ]  # fmt: skip


def test_what_differs_is_said_once_and_by_its_name(tmp_path):
    there = {
        "method._target_": "a.SISS",
        "method.lambd": 0.5,
        "model.weights": "a",
        "model.network.weights": "a",
        "seed": 0,
    }
    here = {"method._target_": "a.NegGrad", "model.weights": "b", "model.network.weights": "b", "seed": 1, "new": [1]}
    checkpoint = open_checkpoint(Checkpoints(tmp_path).save(1, STATE, there))
    checkpoint.require(there)
    with pytest.raises(ConfigurationError) as refused:
        checkpoint.require(here)
    assert str(refused.value).split(": it is ")[1].split("; start it")[0] == (
        "of another new (none) than this run's ([1]); of another seed (0) than this run's (1); of another method "
        "(SISS) than this run's (NegGrad); of another model.weights (a) than this run's (b)"
    )


def test_cache_makes_once_and_only_whole_folders(tmp_path):
    calls = []

    def make(folder):
        calls.append(folder)
        (folder / "x").write_text("1")
        if len(calls) == 1:
            raise RuntimeError("power cut")

    key = {"b": 1, "a": [1, 2]}
    with pytest.raises(RuntimeError):
        cached(tmp_path, "kind", key, make)
    first = cached(tmp_path, "kind", key, make)
    assert cached(tmp_path, "kind", dict(reversed(key.items())), make) == first
    assert len(calls) == 2
    assert json.loads((first / "key.json").read_text()) == key
    assert cached(tmp_path, "kind", {"a": 1}, make) != first


def test_fingerprint_ignores_order_only():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_atomic_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(OSError, match="no space"), atomic(path) as temporary:
        temporary.write_text("half")
        raise OSError("no space")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_method_gets_its_state_on_its_networks_device(composed, digits, tmp_path):
    """A checkpoint is read to the CPU; the device "meta", on which nothing is computed, stands for a GPU here."""
    trainer = build_trainer(composed(), digits, tmp_path)
    tensor, taken = torch.zeros(2), {}
    part = SimpleNamespace(load_state_dict=taken.update)
    trainer.method = SimpleNamespace(networks=(torch.nn.Linear(1, 1, device="meta"),), stateful=lambda: {"part": part})
    optimizer = {"state": {0: {"step": tensor}}, "param_groups": []}
    state = {"keep": tensor, "kept": [(1, (tensor, None))], "optimizer": optimizer, "steps": 3}
    trainer._load_learner_state({**trainer._initial, "method": {"part": state}})
    assert taken["keep"].is_meta
    number, (rollouts, nothing) = taken["kept"][0]
    assert rollouts.is_meta
    assert (number, nothing, taken["steps"]) == (1, None, 3)
    assert taken["optimizer"] is optimizer, "an optimizer finds the place itself"
