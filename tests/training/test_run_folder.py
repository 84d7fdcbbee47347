"""The run folder's files and their versions."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from unlearn_runner import owner
from unlearn_runner.comparison.runs import read_run
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.schema import METRICS_VERSION, SUMMARY_VERSION
from unlearn_runner.training.checkpoint import Checkpoints
from unlearn_runner.training.run_folder import (
    NOT_IDENTITY,
    PARENT,
    RunFolder,
    checkpoint_to_resume,
    config_hash,
    continued,
    finished,
    flat,
    identity_of_run,
    is_longer,
    position_in,
    require_log,
    unfinished,
)

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


# What may differ between two runs of one identity, each with another value than that of a debug run.
FREE = {
    "resume_from_checkpoint": "latest", "skip_finished": True, "objective": "eval/forget_rate", "name": "x",
    "label": "x", "choices.dataset": "x", "choices.model": "x", "choices.method": "x", "choices.experiment": "x",
    "budget.max_steps": 3, "budget.batch_size": 3, "budget.learning_rate": 3.0, "paths.outputs": "x",
    "paths.cache": "x", "logger": "x", "trainer.log_every": 7, "trainer.checkpointing_steps": 7,
    "trainer.checkpoints_total_limit": 7, "trainer.keep_checkpoints": True, "hardware._target_": "x",
    "hardware.accelerator": "cpu", "hardware.num_processes": 2, "hardware.threads": 3, "hardware.compile": True,
    "hardware.gradient_accumulation_steps": 2, "hardware.cuda_graphs": False, "hardware.channels_last": True,
    "hardware.deterministic": False, "security.allow": ["x."],
}  # fmt: skip


def put(config: dict, name: str, value) -> dict:
    """A copy with another value of one option."""
    head, _, rest = name.partition(".")
    return {**config, head: put(config[head], rest, value) if rest else value}


def test_every_option_decides_the_result_or_is_said_not_to(composed):
    config = composed("hardware=cpu", "method=adaptive_siss")
    known = config_hash(config)
    decide = []
    for name, value in flat(config):
        if name in FREE:
            assert config_hash(put(config, name, FREE[name])) == known, name
        else:
            other = "bf16" if name == "hardware.mixed_precision" else [value, "another"]
            assert config_hash(put(config, name, other)) != known, name
            decide.append(name)
    assert {"seed", "method.lambd._target_", "trainer.batch_size", "trainer.max_steps", "trainer.init",
            "hardware.mixed_precision", "method.update.optimizer.lr", "dataset.seed", "evaluation.num_samples",
            "trainer.evaluate_every"} <= set(decide)  # fmt: skip
    assert all(any(name.startswith(part) for name in FREE) for part in NOT_IDENTITY)
    here, there = (put(config, "dataset.cache_dir", place) for place in ("here", "there"))
    assert config_hash(here) == config_hash(there)


def test_weights_count_by_their_bytes(tmp_path):
    def config(folder):
        return {"model": {"weights": str(folder)}}

    for name in ("a", "b"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"1")
    assert config_hash(config(tmp_path / "a")) == config_hash(config(tmp_path / "b"))
    (tmp_path / "b" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"2")
    assert config_hash(config(tmp_path / "a")) != config_hash(config(tmp_path / "b"))
    for content in (b"1", b"2"):  # a policy is a file of another name
        (tmp_path / content.decode() / "policy").mkdir(parents=True)
        (tmp_path / content.decode() / "policy" / "policy.safetensors").write_bytes(content)
    of = [identity_of_run({"method": {"policy": str(tmp_path / name)}})["method.policy"] for name in "12"]
    assert of[0] != of[1]
    assert str(tmp_path) not in "".join(of)


def test_longer_is_more_steps_and_nothing_else():
    names = ("trainer.max_steps", "method.update.lr_schedule.num_training_steps")
    short, long = ({"seed": 0, **dict.fromkeys(names, steps)} for steps in (4, 8))
    assert is_longer(short, long)
    assert not is_longer(long, short)
    assert not is_longer(short, short)
    assert not is_longer(short, long | {"seed": 1})
    assert not is_longer(short, long | {"model.pretraining.max_steps": 8})
    assert not is_longer(short | {"method.max_steps": 4}, long | {"method.max_steps": 8}), "stages would move"
    assert not is_longer(short, long | {"method.update.lr_schedule.num_training_steps": 9})


def interrupted(path, config=CONFIG, step=3, status="interrupted"):
    """A run folder with a checkpoint."""
    folder = RunFolder(path, config)
    folder.append(1, {"loss/retain": 0.5})
    state = {"listeners": {"recorder": {"position": folder.position()}}}
    checkpoint = Checkpoints(folder.checkpoints).save(step, state, identity_of_run(config))
    folder.append(4, {"loss/retain": 0.25})
    folder.write_summary(status, {})
    folder.close()
    return checkpoint


def test_a_run_is_gone_on_with_by_itself_alone(tmp_path):
    place = interrupted(tmp_path / "run")
    identity = identity_of_run(CONFIG)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for wanted in ("latest", str(tmp_path / "run"), str(place)):
        assert checkpoint_to_resume(wanted, tmp_path, identity).folder == place
    with pytest.raises(ConfigurationError, match=r"of another seed \(3\) than this run's \(4\)"):
        checkpoint_to_resume(str(place), tmp_path, identity_of_run(CONFIG | {"seed": 4}))
    assert checkpoint_to_resume("latest", tmp_path, identity_of_run(CONFIG | {"seed": 4})) is None
    RunFolder(tmp_path / "other", CONFIG | {"seed": 5}).close()
    with pytest.raises(ConfigurationError, match="found no checkpoint there"):
        checkpoint_to_resume(str(tmp_path / "other"), tmp_path, identity)
    assert before == {path: path.read_bytes() for path in before}, "nothing was touched"
    assert checkpoint_to_resume(None, tmp_path, identity) is None

    interrupted(tmp_path / "done", status="finished")
    with pytest.raises(ConfigurationError, match="has finished, nothing is left to do"):
        checkpoint_to_resume(str(tmp_path / "done"), tmp_path, identity)


def test_images_under_the_same_names_may_be_others(tmp_path):
    checkpoint = checkpoint_to_resume(str(interrupted(tmp_path / "run")), tmp_path, identity_of_run(CONFIG))
    known = checkpoint._replace(identity=checkpoint.identity | {"dataset.fingerprint": "a"})
    continued(identity_of_run(CONFIG) | {"dataset.fingerprint": "a"}, known)
    with pytest.raises(ConfigurationError, match=r"another dataset\.fingerprint \(a\)"):
        continued(identity_of_run(CONFIG) | {"dataset.fingerprint": "b"}, known)


def test_what_others_call_summary_json_is_skipped(tmp_path):
    for number, content in enumerate(["[1, 2]", '"a"', "3", "null", "{", "", '{"status": []}', "[" * 100_000]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "summary.json").write_text(content)
    identity = identity_of_run(CONFIG)
    assert unfinished(tmp_path, identity) is None
    assert finished([tmp_path], CONFIG) is None
    interrupted(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text('{"stat')  # its checkpoint knows whose it is
    assert unfinished(tmp_path, identity) == tmp_path / "run"


@pytest.mark.parametrize(
    "harm, sentence",
    [
        (lambda log: log[:-60], r"it has \d+ bytes, of which \d+ were there"),
        (lambda log: b"", "it has 0 bytes"),
        (lambda log: b"\0" * len(log), "its last line is not whole"),
        (lambda log: log.replace(b'{"step": 1,', b'["step", 1,'), "line 2 is no JSON object with a step"),
        (lambda log: log.replace(b"step", b"stop"), "line 1 is no JSON object with a step"),
    ],
)
def test_a_damaged_log_is_found_when_the_run_is_opened(tmp_path, harm, sentence):
    place = interrupted(tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_bytes(harm(log.read_bytes()))
    for wanted in (str(place), "latest"):
        with pytest.raises(ConfigurationError, match=rf"metrics\.jsonl is damaged before the checkpoint \({sentence}"):
            checkpoint_to_resume(wanted, tmp_path, identity_of_run(CONFIG))


def test_what_was_written_after_the_checkpoint_may_be_garbage(tmp_path):
    interrupted(tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"step": 5, "lo\xff\0')
    checkpoint = checkpoint_to_resume("latest", tmp_path, identity_of_run(CONFIG))
    position = position_in(checkpoint)
    require_log(log, position)
    assert whole[:position].endswith(b"0.5}\n")


def test_a_longer_run_has_a_folder_of_its_own_and_names_its_parent(tmp_path):
    from unlearn_runner.training.run_folder import open_run_folder

    short, long = (CONFIG | {"trainer": {"max_steps": steps}} for steps in (4, 8))
    place = interrupted(tmp_path / "short", short, status="finished")
    before = {path: path.read_bytes() for path in (tmp_path / "short").rglob("*") if path.is_file()}
    with pytest.raises(ConfigurationError, match=r"trainer\.max_steps must be 4, as it is there, got 8"):
        checkpoint_to_resume(str(place), tmp_path, identity_of_run(long), extendable=False)
    checkpoint = checkpoint_to_resume(str(place), tmp_path, identity_of_run(long))
    identity = continued(identity_of_run(long), checkpoint)
    _, folder = open_run_folder(tmp_path / "long", checkpoint, long, identity)
    Checkpoints(folder.checkpoints).save(6, {"listeners": {"recorder": {"position": folder.position()}}}, identity)
    folder.write_summary("interrupted", {})
    folder.close()
    assert folder.path == tmp_path / "long"
    assert [line["step"] for line in folder.lines()] == [0, 1], "the parent's log until the checkpoint"
    content = json.loads((folder.path / "summary.json").read_text())
    assert content["parent"] == identity[PARENT]
    assert (content["parent"]["checkpoint"], content["parent"]["step"]) == (str(place), 3)
    assert f"resume_from_checkpoint: {place}" in (folder.path / "config.yaml").read_text(), "it can be made again"
    assert content["config_hash"] != config_hash(long), "8 steps in one go are another run"
    assert before == {path: path.read_bytes() for path in before}

    again = checkpoint_to_resume(str(folder.path), tmp_path, identity_of_run(long))
    _, resumed = open_run_folder(tmp_path / "unused", again, long, continued(identity_of_run(long), again))
    resumed.close()
    assert resumed.path == folder.path, "itself, when it is interrupted, goes on in its folder"
    assert resumed.config_hash == folder.config_hash


def test_a_folder_has_one_owner_as_long_as_that_lives(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from unlearn_runner.owner import Ownership
owned = Ownership(Path({str(tmp_path / "run")!r}))
print(flush=True)
sys.stdin.read()
"""
    interrupted(tmp_path / "run")
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    run = tmp_path / "run"
    assert owner.owner_of(run)["pid"] == other.pid
    before = (run / "config.yaml").stat().st_mtime_ns
    for attempt in (
        lambda: RunFolder(run, CONFIG),
        lambda: checkpoint_to_resume("latest", tmp_path, identity_of_run(CONFIG)),
        lambda: checkpoint_to_resume(str(run), tmp_path, identity_of_run(CONFIG)),
    ):
        with pytest.raises(ConfigurationError, match=rf"belongs to process {other.pid} on .*, which is still running"):
            attempt()
    assert (run / "config.yaml").stat().st_mtime_ns == before
    other.send_signal(signal.SIGKILL)
    time.sleep(0.3)
    assert owner.owner_of(run) is None, "dead, though nobody has asked after it yet"
    other.wait()
    assert checkpoint_to_resume("latest", tmp_path, identity_of_run(CONFIG)).run_folder == run
    for rubble in (".config.yaml.1.tmp", "checkpoints/.step_000001.1.tmp/state.pt", ".model.1.tmp/unet/x"):
        (run / rubble).parent.mkdir(parents=True, exist_ok=True)
        (run / rubble).write_text("")
    folder = RunFolder(run, CONFIG)
    assert not list(run.rglob(".*.tmp")), "the next owner sweeps"
    with pytest.raises(ConfigurationError, match=f"belongs to process {os.getpid()}"):
        RunFolder(run, CONFIG)
    folder.close()
    assert owner.owner_of(run) is None


def test_an_owner_elsewhere_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT", 0.05)
    owned = owner.Ownership(tmp_path)
    claim = tmp_path / owner.CLAIM
    theirs = json.loads(claim.read_text())
    os.utime(claim, (0, 0))
    time.sleep(0.4)
    assert claim.stat().st_mtime > 0
    owned.release()

    claim.write_text(json.dumps(theirs | {"machine": "another", "host": "node7"}))
    monkeypatch.setattr(owner, "SILENCE", 0.5)
    sign = threading.Timer(0.2, os.utime, [claim])
    sign.start()
    with pytest.raises(ConfigurationError, match=rf"on node7, .* if you know that it is gone, delete {claim}"):
        owner.Ownership(tmp_path)
    taken = owner.Ownership(tmp_path)  # after half a second without another
    claim.write_text(json.dumps(theirs | {"machine": "another"}))  # it was only asleep, and has taken it back
    time.sleep(0.4)
    with pytest.raises(ConfigurationError, match="was taken over by another process"):
        taken.require()
    taken.release()
    assert json.loads(claim.read_text())["machine"] == "another"


def test_a_process_id_that_another_process_has_by_now_is_no_owner(tmp_path):
    (tmp_path / owner.CLAIM).write_text(json.dumps(owner.myself() | {"started": 1.0}))
    assert owner.owner_of(tmp_path) is None
    for content in ("", "{}", "[]", '{"pid": 1}', "{"):
        (tmp_path / owner.CLAIM).write_text(content)
        assert owner.owner_of(tmp_path) is None
