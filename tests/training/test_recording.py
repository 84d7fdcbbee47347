"""Signals, progress lines, dashboards: what a person sees of a run."""

import io
import os
import signal

import pytest
from rich.console import Console

from unlearn_runner.errors import ConfigurationError, Interrupted
from unlearn_runner.training.loggers import WandbLogger
from unlearn_runner.training.progress import ProgressBar, comparison_table
from unlearn_runner.training.signals import Interrupts
from unlearn_runner.training.trainer import Plan


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
    """The time that signals are told apart by: `clock[0] += 3`."""
    now = [100.0]
    monkeypatch.setattr("unlearn_runner.training.signals.time.monotonic", lambda: now[0])
    return now


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
        interrupts.protect(None)
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
    Console(file=out, width=80).print(
        comparison_table({"forget_rate": 0.5}, {"forget_rate": 0.1, "kid": 2.0}, ["forget_rate", "kid"])
    )
    assert "-0.400" in out.getvalue()
    assert "2.000" in out.getvalue()


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


def test_wandb_refuses_an_unknown_mode():
    with pytest.raises(ConfigurationError, match="online, offline or disabled"):
        WandbLogger("test", mode="on")


@pytest.mark.parametrize(
    "settings",
    [{"max_steps": 0}, {"max_steps": -5}, {"batch_size": 0}, {"log_every": 0}, {"checkpointing_steps": 0},
     {"evaluate_every": -1}, {"init": "middle"}],
)  # fmt: skip
def test_plan_refuses(settings):
    with pytest.raises(ConfigurationError, match=r"trainer\."):
        Plan(**({"max_steps": 1, "batch_size": 1} | settings))
