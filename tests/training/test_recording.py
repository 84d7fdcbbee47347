"""Signals, progress lines, dashboards: what a person sees of a run."""

import io
import json
import math
import os
import shlex
import signal
import sys
import time

import pytest
import torch
from rich.console import Console

from unlearn_runner.errors import ConfigurationError, Interrupted
from unlearn_runner.evaluation.evaluator import Evaluation
from unlearn_runner.training.checkpoint import open_checkpoint
from unlearn_runner.training.clock import Clock, Listener
from unlearn_runner.training.loggers import Logger, SafeLogger, WandbLogger
from unlearn_runner.training.progress import ProgressBar, comparison_table
from unlearn_runner.training.record import Oracle, Record
from unlearn_runner.training.recorder import rubble_in
from unlearn_runner.training.run_folder import RunFolder
from unlearn_runner.training.signals import Interrupts


def test_signal_waits_for_the_shield():
    done = []
    with pytest.raises(Interrupted, match="SIGTERM"), Interrupts() as interrupts, interrupts.shield():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("the step is finished")
    assert done
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signal_outside_a_shield_raises_at_once():
    with pytest.raises(Interrupted), Interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")


@pytest.fixture
def clock(monkeypatch):
    """The time that signals are distinguished by: `clock[0] += 3`. Also where nohup started the tests."""
    now = [100.0]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    monkeypatch.setattr("unlearn_runner.training.signals.time.monotonic", lambda: now[0])
    yield now
    signal.signal(signal.SIGHUP, before)


def test_second_signal_does_not_wait(clock):
    with pytest.raises(KeyboardInterrupt) as raised, Interrupts() as interrupts, interrupts.shield():
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 3
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")
    assert not isinstance(raised.value, Interrupted), "the state may be torn: nothing is saved"


def test_signals_within_two_seconds_are_one(clock):
    done = []
    with pytest.raises(Interrupted, match="SIGHUP"), Interrupts() as interrupts, interrupts.shield():
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            clock[0] += 0.9
        done.append("the step is finished")
    assert done


def test_a_protected_function_is_finished_whatever_comes(clock):
    done = []

    def close():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            clock[0] += 3
        done.append(len([os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]))  # also in what it calls

    with Interrupts() as interrupts:
        interrupts.protect(close)
        close()
        assert (done, interrupts.received) == ([2], signal.SIGTERM)
        interrupts.protect()
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def values(step, seconds, **more):
    return {"seconds": seconds, "images": 64.0 * step, "loss/retain": 0.5 / step, **more}


def test_plain_lines_without_a_terminal():
    out = io.StringIO()
    bar = ProgressBar("unlearning", 10, Console(file=out, width=200))
    bar.forget_rate = 0.25
    for step in range(1, 11):
        bar.update(step, values(step, seconds=step * 0.5))
    lines = out.getvalue().splitlines()
    assert 2 <= len(lines) <= 3, "one line now and then, not one a step"
    assert "step 10/10" in lines[-1]
    assert "forget_rate 0.25" in lines[-1]
    assert "128 images/s" in lines[-1]


def test_a_bar_on_a_terminal():
    out = io.StringIO()
    bar = ProgressBar("unlearning", 4, Console(file=out, force_terminal=True, width=120))
    for step in range(1, 5):
        bar.update(step, values(step, seconds=float(step)))
    assert "4/4" in out.getvalue()
    assert "loss/retain" in out.getvalue()


def test_table_of_changes():
    out = io.StringIO()
    titles = {"forget_rate": "forget_rate", "kid": "kid (own features)"}
    before, after, floor = {"forget_rate": 0.5}, {"forget_rate": 0.1, "kid": 2.0}, {"kid": 0.125}
    Console(file=out, width=100).print(comparison_table(before, after, titles, {}, {}, {}, floor))
    rows = [line.split("│") for line in out.getvalue().splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["forget_rate", "0.500", "0.100", "-0.400", ""],
        ["kid (own features)", "", "2.000", "", "0.125"],
    ]


def test_wandb_makes_one_run_for_each_start(tmp_path):
    """wandb.init without finish returns the first run again: the hazard of a multirun in one process."""
    import wandb

    logger = WandbLogger("test", mode="offline")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        logger.start(tmp_path / name, {"name": name})
        logger.log(1, {"loss/retain": 1.0})
        logger.finish({"eval/forget_rate": 0.0}, failed=name == "a")
        assert wandb.run is None
        assert list((tmp_path / name).glob("wandb/offline-run-*/run-*.wandb"))
    ids = {(tmp_path / name / "wandb" / "run_id").read_text() for name in ("a", "b")}
    assert len(ids) == 2
    logger.start(tmp_path / "a", {})
    assert logger.run.id == (tmp_path / "a" / "wandb" / "run_id").read_text(), "a resumed run is the same run"
    logger.finish({}, failed=False)


def test_wandb_refuses_an_unknown_mode_and_a_project_it_cannot_have():
    with pytest.raises(ConfigurationError, match="online, offline, disabled or shared, got 'on'"):
        WandbLogger("test", mode="on")
    for project in ("team/project", "p" * 129):
        with pytest.raises(ConfigurationError, match="at most 128 letters and none of"):
            WandbLogger(project)


def test_wandb_takes_names_as_people_have_them():
    logger = WandbLogger(123, "dryrun", 1984, 7, 1.5, [None, "", "a" * 70, "a" * 64, 12], 3)
    assert logger.mode == "offline"
    assert logger.settings == {
        "project": "123", "entity": "1984", "group": "7", "job_type": "1.5", "name": "3", "tags": ["a" * 64, "12"],
    }  # fmt: skip
    empty = WandbLogger("", "", "", "", "", " a ,, b,a")
    assert (empty.settings["project"], empty.settings["entity"], empty.mode) == ("unlearn_runner", None, "offline")
    assert empty.settings["tags"] == ["a", "b"]


def test_what_wandb_says_of_a_run_comes_from_the_environment_and_the_command_line_before_it(composed, monkeypatch):
    found = composed("logger=wandb", "method=siss", "dataset=digits")["logger"]
    assert (found["project"], found["entity"], found["tags"]) == ("unlearn_runner", None, "digits,siss")
    assert (found["group"], found["job_type"], found["name"]) == ("digits-siss", "siss", None)
    for name in ("PROJECT", "ENTITY", "RUN_GROUP", "JOB_TYPE", "NAME", "TAGS"):
        monkeypatch.setenv(f"WANDB_{name}", f"{name.lower()}-there")
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    found = composed("logger=wandb", "logger.group=mine", "logger.tags=[x,y]")["logger"]
    assert found["project"] == "project-there"
    assert found["entity"] == "entity-there"
    assert (found["group"], found["tags"]) == ("mine", ["x", "y"])
    assert (found["job_type"], found["name"], found["mode"]) == ("job_type-there", "name-there", "dryrun")
    from hydra.utils import instantiate

    assert instantiate(found, _convert_="all").mode == "offline"


def online(monkeypatch, server):
    for name, value in {"BASE_URL": server, "API_KEY": "0" * 40, "INIT_TIMEOUT": "3"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)


def assert_logged_offline(folder, said):
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    until = time.monotonic() + 10
    while file.stat().st_size < 500 and time.monotonic() < until:  # wandb's service writes it a moment after finish
        time.sleep(0.05)
    assert file.stat().st_size > 500
    (line,) = [line for line in said.splitlines() if line.startswith("Weights & Biases cannot be reached (")]
    assert f"the run is logged offline, upload it later with `wandb sync {shlex.quote(str(folder / 'wandb'))}" in line


def test_wandb_without_its_server_goes_on_offline(tmp_path, monkeypatch, capfd):
    import wandb

    folder, init, asked = tmp_path / "a run", wandb.init, []

    def without_network(**settings):
        asked.append(settings["mode"])
        if settings["mode"] == "online":
            raise wandb.errors.CommError("Run initialization has timed out\nConsider")
        return init(**settings)

    folder.mkdir()
    monkeypatch.setattr(wandb, "init", without_network)
    logger = WandbLogger("test", mode="online")
    logger.start(folder, {"seed": 0})
    logger.log(1, {"loss/retain": 1.0})
    logger.finish({"eval/forget_rate": 0.0}, failed=False)
    assert asked == ["online", "offline"]
    assert_logged_offline(folder, capfd.readouterr().err)


@pytest.mark.slow
def test_wandb_with_a_closed_port_goes_on_offline(tmp_path, monkeypatch, capfd):
    online(monkeypatch, "http://127.0.0.1:9")
    logger = WandbLogger("test", mode="online")
    logger.start(tmp_path, {"seed": 0})
    logger.log(1, {"loss/retain": 1.0})
    logger.finish({"eval/forget_rate": 0.0}, failed=False)
    assert_logged_offline(tmp_path, capfd.readouterr().err)


CALLS = ("start", "log", "image", "table", "finish")


class Failing(Logger):
    """Raises at one of its calls."""

    def __init__(self, at):
        self.at = at
        self.called = []

    def _call(self, name):
        self.called.append(name)
        if name == self.at:
            raise RuntimeError("[/no]\nmarkup")

    def start(self, folder, config):
        self._call("start")

    def log(self, step, values):
        self._call("log")

    def image(self, step, key, path):
        self._call("image")

    def table(self, key, columns, rows):
        self._call("table")

    def finish(self, summary, failed):
        self._call("finish")


@pytest.mark.parametrize("at", CALLS)
def test_a_logger_that_fails_is_said_once_and_ends_nothing(at, tmp_path):
    logger, said = Failing(at), []
    safe = SafeLogger(logger, said.append)
    for _ in range(2):
        safe.start(tmp_path, {})
        safe.log(1, {})
        safe.image(1, "key", tmp_path)
        safe.table("key", [], [])
    safe.finish({}, failed=False)
    assert said == ["Failing failed ([/no]); the run goes on without it, its folder has everything."]
    assert logger.called.count(at) <= 2
    assert logger.called[-1] == "finish", "what it got before is closed"


def recorded(path, logger=None, folder=None, interrupts=None, out=None):
    """A record of a run of one step."""
    console = Console(file=out or io.StringIO(), width=200)
    return Record(path, folder, logger, {"seed": 0}, 1, False, console, interrupts or Interrupts())


def test_scores_of_several_oracles_and_what_is_left_of_one_that_has_none(tmp_path):
    """A score that one oracle has as no finite number, or not at all, has no mean and no spread; its own are kept."""
    (tmp_path / "run").mkdir()
    out, folder = io.StringIO(), RunFolder(tmp_path / "run", {"seed": 0})
    scores = (
        {"fid_retain": 1.0, "kid_retain": 0.5, "forget_rate": 0.25, "nll_retain": 2.0},
        {"fid_retain": 3.0, "kid_retain": math.nan, "forget_rate": 0.25},
    )
    with recorded(tmp_path / "run", None, folder, out=out) as record:
        record.score(1, {"eval/fid_retain": 5.0, "eval/kid_retain": 0.5, "eval/forget_rate": 0.5})
        record.oracles(
            1,
            [
                Oracle({"seed": seed, "digest": f"d{seed}"}, each, {"fid_retain": [0.0, 1.0]})
                for seed, each in enumerate(scores)
            ],
        )
        record.report(1)
    content = json.loads((tmp_path / "run" / "summary.json").read_text())
    metrics = content["metrics"]
    assert (metrics["oracle/fid_retain"], metrics["oracle_std/fid_retain"]) == (2.0, pytest.approx(2**0.5))
    assert (metrics["oracle_gap/fid_retain"], metrics["gap_z/fid_retain"]) == (3.0, pytest.approx(3 / 2**0.5))
    assert (metrics["oracle/forget_rate"], metrics["oracle_std/forget_rate"]) == (0.25, 0.0)
    assert not {"gap_z/forget_rate", "oracle/nll_retain", "oracle/kid_retain", "oracle_std/kid_retain"} & set(metrics)
    assert content["not_finite"] == ["oracle/kid_retain"]
    assert content["oracles"] == [
        {"seed": 0, "digest": "d0", "metrics": scores[0], "intervals": {"fid_retain": [0.0, 1.0]}},
        {
            "seed": 1,
            "digest": "d1",
            "metrics": {"fid_retain": 3.0, "forget_rate": 0.25},
            "intervals": {"fid_retain": [0.0, 1.0]},
        },
    ]
    assert "oracle/fid_retain" not in content.get("intervals", {}), "an interval of one is none of their mean"
    assert "2.000 ± 1.414" in out.getvalue()


def test_a_run_does_not_depend_on_its_dashboard(tmp_path):
    """Its summary and its lines are whole, whatever the logger raises."""
    out = io.StringIO()
    for at in CALLS:
        (tmp_path / at).mkdir()
        folder = RunFolder(tmp_path / at, {"seed": 0})
        with recorded(tmp_path / at, Failing(at), folder, out=out) as record:
            record.line(1, {"loss/retain": 1.0})
            (logger,) = record.loggers
            logger.image(1, "samples/lambda", tmp_path)
            logger.table("results", [], [])
        assert json.loads((tmp_path / at / "summary.json").read_text())["status"] == "finished"
        assert '"loss/retain": 1.0' in (tmp_path / at / "metrics.jsonl").read_text()
    assert out.getvalue().count("Failing failed ([/no])") == len(CALLS)


def test_peak_memory_where_nothing_counts_it(monkeypatch):
    from unlearn_runner.training.provenance import peak_memory_gb

    assert torch.cuda.is_available() or 0.05 < peak_memory_gb() < 500
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_memory_gb() is None


def test_a_look_that_is_interrupted_leaves_no_line(composed, digits, tmp_path):
    """Wherever in it the signal comes: it is taken again when the run goes on."""
    from trainers import build_trainer

    class Interrupting:
        lines = 0

        def state_dict(self):
            return {"lines": self.lines}

        def load_state_dict(self, state_dict):
            self.lines = state_dict["lines"]

        def evaluate(self, clock, model):
            self.lines += 1
            if not looks:
                looks.append(clock.step)
                raise Interrupted("SIGTERM received")

    looks = []
    recorder = Interrupting()
    listeners = {"recorder": Listener(evaluate=recorder.evaluate, state=recorder)}
    trainer = build_trainer(composed("method=siss"), digits, tmp_path, listeners=listeners)
    trainer.step()
    with pytest.raises(Interrupted):
        trainer.step()
    assert (recorder.lines, trainer.state_dict()["evaluated_at"]) == (0, 0)
    trainer._evaluate_or_finish()
    assert (recorder.lines, trainer._evaluated_at) == (1, 2)


def test_listeners_are_told_in_order_and_how_far_it_is(composed, digits, tmp_path):
    from trainers import build_trainer

    told = []

    def heard(event):
        return lambda clock, what: told.append((event, clock.step, clock.run_step, clock.images))

    listener = Listener(*(heard(event) for event in ("stepped", "logged", "noted", "evaluate", "finish")))
    cfg = composed("method=siss", "trainer.max_steps=3", "trainer.batch_size=8", "trainer.evaluate_every=2")
    trainer = build_trainer(cfg, digits, tmp_path, listeners={"test": listener})
    trainer.step()
    trainer.reset()
    trainer.note({"agent/return": 1.0})
    while not trainer.done:
        trainer.step()
    assert told == [
        ("stepped", 1, 1, 16), ("logged", 1, 1, 16), ("noted", 1, 0, 16),
        ("stepped", 2, 1, 32), ("logged", 2, 1, 32),
        ("stepped", 3, 2, 48), ("logged", 3, 2, 48), ("evaluate", 3, 2, 48),
        ("stepped", 4, 3, 64), ("logged", 4, 3, 64), ("finish", 4, 3, 64),
    ]  # fmt: skip
    with pytest.raises(TypeError, match="evaluated"):
        Listener(evaluated=print)


def test_a_clock_comes_back_whole():
    clock, again = Clock(4, 1, 64, 0.5, 128, False, {"seconds": 0.25, "images": 48, "network_evaluations": 96}), Clock()
    again.load_state_dict(clock.state_dict())
    assert again == clock and again.rehearsed is not clock.rehearsed
    assert clock.costs() == {
        "cost/seconds": 0.5, "cost/images": 64, "cost/network_evaluations": 128, "cost/policy_seconds": 0.25,
        "cost/policy_images": 48, "cost/policy_network_evaluations": 96,
    }  # fmt: skip


def test_a_process_that_only_helps_writes_nothing(tmp_path, tiny_network):
    with recorded(tmp_path) as record:
        assert record.score(1, {"eval/forget_rate": 0.5}) == {"eval/forget_rate": 0.5}
        record.model(tiny_network())
        record.averages(1, since=0)
        record.truncate(record.position())
        record.report(1)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_cannot_be_written_at_the_end_is_said(tmp_path):
    out = io.StringIO()

    def save():
        os.kill(os.getpid(), signal.SIGTERM)  # does not tear it
        raise OSError("no space")

    folder = RunFolder(tmp_path, {"seed": 0})
    with (
        pytest.raises(Interrupted, match="first"),
        Interrupts() as interrupts,
        recorded(tmp_path, folder=folder, interrupts=interrupts, out=out) as record,
    ):
        try:
            raise Interrupted("first")
        except Interrupted:
            record.attempt(save)
            raise
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "interrupted"
    assert "the record is not whole: no space" in out.getvalue()


def test_the_last_evaluation_is_the_one_that_counts(tmp_path):
    """Nothing of a look on the way stays: no score that the end has not, and no fault that it has not either."""

    def found(scores, not_finite=()):
        grid = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
        return Evaluation(scores, list(not_finite), {key: [0.0, 1.0] for key in scores}, {}, 1.0, grid, 1, {})

    with recorded(tmp_path, folder=RunFolder(tmp_path, {"seed": 0})) as record:
        record.evaluation(0, "base", found({"forget_rate": 0.5}), "before")
        record.evaluation(1, "eval", found({"forget_rate": 0.25, "mia_auc": 0.6}, ["retain_accuracy"]), "step_000001")
        record.evaluation(2, "eval", found({"forget_rate": 0.0, "retain_accuracy": 1.0}), "after")
        record.report(2)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "finished"
    scores = {key: value for key, value in summary["metrics"].items() if not key.startswith("cost/")}
    assert scores == {"base/forget_rate": 0.5, "eval/forget_rate": 0.0, "eval/retain_accuracy": 1.0}
    assert summary["intervals"].keys() == scores.keys()


def test_a_checkpoint_before_the_first_step_asks_for_no_look(composed, digits, tmp_path):
    """Such is the one at the end of an agent's rehearsals."""
    from trainers import build_trainer

    looks = []
    listeners = {"r": Listener(evaluate=lambda clock, model: looks.append(clock.run_step))}

    def build():
        cfg = composed("method=siss", "trainer.evaluate_every=2", "trainer.checkpointing_steps=null")
        return build_trainer(cfg, digits, tmp_path, listeners=listeners)

    trainer = build()
    for _ in range(2):
        trainer.step()
    trainer.reset()
    trainer.save()
    resumed = build()
    resumed.resume(open_checkpoint(tmp_path))
    assert (looks, resumed.clock.run_step) == ([2], 0)


def test_a_resumed_step_is_not_written_again(composed, digits, tmp_path):
    """What is recorded after a checkpoint, such as the last evaluation, is made again from it, and once."""
    from trainers import build_trainer

    first = build_trainer(composed("method=siss"), digits, tmp_path)
    first.step()
    written = first.save()
    before = (written / "state.pt").stat().st_ino
    for folder, again in ((tmp_path, True), (tmp_path / "longer", False)):
        resumed = build_trainer(composed("method=siss"), digits, folder)
        resumed.resume(open_checkpoint(tmp_path))
        saved = resumed.save()
        assert (saved.resolve() == written.resolve()) == again
        assert (saved / "state.pt").is_file()
    assert (written / "state.pt").stat().st_ino == before


@pytest.mark.parametrize(
    ("nothing", "usual", "said"), [(1.0, 0.2, True), (0.3, 0.15, False), (0.3, 0.05, True), (0.0, 0.0, False)]
)
def test_rubble_is_said(nothing, usual, said):
    """Not of what the base draws anyhow."""
    sentence = rubble_in({"nothing_rate": nothing}, {"outliers_retain": usual})
    assert (sentence is not None) == said
    assert rubble_in({}, {}) is None, "not measured"
    without = rubble_in({"nothing_rate": nothing}, {"nothing_rate": usual})
    assert without == sentence, "metrics.outliers=null"


def test_a_base_that_draws_rubble_hides_it():
    """Black squares are no more than 0.2 beyond what such a base draws."""
    sentence = rubble_in({"nothing_rate": 1.0}, {"outliers_retain": 0.85})
    assert "85% of what the base draws" in sentence
    assert rubble_in({}, {"outliers_retain": 0.85}) is None, "not measured"
