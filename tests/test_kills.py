"""Runs that are killed, anywhere and again and again, and begun again by their own command end with the same bits.

`python tests/test_kills.py --random 60 --planted 40` makes as many of each kind; a debug run takes a second or two, for
its process is forked from one that has imported everything.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

METHODS = {
    "adaptive_siss": (),
    "sfd": (),
    "rl_lambda": ("method.update_every=6", "method.agent.batch_size=3"),
}
SETTINGS = (
    "debug=default", "logger=jsonl", "hardware.threads=1", "trainer.max_steps=12", "trainer.checkpointing_steps=3",
    "evaluation.every=4", "model.pretraining.max_steps=12",
)  # fmt: skip
AGAIN = ("resume_from_checkpoint=latest", "skip_finished=true")  # a signal may come when the run has just finished
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
POINTS = ("os.replace", "shutil.rmtree", "torch.save", "append", "close")


def command(place: Path, method: str, *more: str, harm: Callable[[], None] | None = None) -> int:
    """Start the command in a process of its own, forked from this one; returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(
            UNLEARN_RUNNER_OUTPUTS=str(place / "outputs"), UNLEARN_RUNNER_CACHE=str(place / "cache"),
            HYDRA_MAIN_MODULE="__main__", HYDRA_FULL_ERROR="0",
        )  # fmt: skip
        with open(place / "said", "a") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        sys.argv = [str(ROOT / "train.py"), *SETTINGS, f"method={method}", *METHODS[method], *more]
        os.chdir(place)
        if harm is not None:
            harm()
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(child: int) -> int:
    """The exit code; less than 0 after a signal that was not handled."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole(place: Path, method: str) -> tuple[dict, dict[str, bytes], list[dict], float]:
    """What one run that nobody kills leaves, the calls it makes at each kind of point, and its seconds."""
    counts = place / "counts"
    place.mkdir(parents=True)
    started = time.monotonic()
    assert ended(command(place, method, harm=lambda: count_calls(counts))) == 0, (place / "said").read_text()
    seconds = time.monotonic() - started
    return json.loads(counts.read_text()), *left_by(place), seconds


def left_by(place: Path) -> tuple[dict[str, bytes], list[dict]]:
    """The weights and the log, but for the seconds, of the one run that has finished; the others have left nothing."""
    runs = {
        path.parent: json.loads(path.read_text())["status"] for path in (place / "outputs").glob("*/*/*/summary.json")
    }
    (run,) = (folder for folder, status in runs.items() if status == "finished")
    for folder in (folder for folder, status in runs.items() if status != "finished"):
        assert not any((folder / "checkpoints").glob("step_*")), f"{folder} would have been gone on with"
    rubble = [path for path in run.rglob(".*.tmp")]
    assert not rubble, rubble
    weights = {path.name: path.read_bytes() for path in sorted((run / "model").rglob("*.safetensors"))}
    assert weights
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return weights, [{key: line[key] for key in line if key.split("/")[-1] != "seconds"} for line in lines]


def hooks() -> dict[str, tuple[Any, str]]:
    """What is called where something on the disk changes, or a run ends."""
    import torch

    from unlearn_runner.training.record import Record
    from unlearn_runner.training.run_folder import RunFolder

    return {
        "os.replace": (os, "replace"),
        "shutil.rmtree": (shutil, "rmtree"),
        "torch.save": (torch, "save"),
        "append": (RunFolder, "append"),
        "close": (Record, "__exit__"),
    }


def count_calls(counts: Path) -> None:
    """Count the calls at each kind of point of this process, into a file."""
    found = Counter({name: 0 for name in POINTS})

    def counted(name: str, original: Callable) -> Callable:
        def call(*arguments, **named):
            found[name] += 1
            counts.write_text(json.dumps(found))
            return original(*arguments, **named)

        return call

    for name, (owner, attribute) in hooks().items():
        if name != "close":  # its code is what signals know it by
            setattr(owner, attribute, counted(name, getattr(owner, attribute)))
    found["close"] = 1


def plant(name: str, number: int, which: int, after: bool) -> None:
    """Let this process get a signal at the `number`-th call of its kind: before it, or in its middle or after it."""
    owner, attribute = hooks()[name]
    if name == "close":  # at its first step
        from unlearn_runner.training.record import ProgressBar as owner

        attribute = "close"
    original, calls = getattr(owner, attribute), [0]

    def dying(*arguments, **named):
        if name == "close" and sys._getframe(2).f_code.co_name != "__exit__":
            return original(*arguments, **named)
        calls[0] += 1
        if calls[0] != number:
            return original(*arguments, **named)
        if after and name == "append" and which == signal.SIGKILL:  # half a line
            folder = arguments[0]
            folder._lines.write('{"step": 3, "loss')
            folder._lines.flush()
        elif after and name == "torch.save" and which == signal.SIGKILL:  # half a file
            Path(arguments[1]).write_bytes(b"PK" + bytes(1000))
        elif after and name == "shutil.rmtree" and which == signal.SIGKILL:  # some of its files
            for path in list(Path(arguments[0]).rglob("*"))[:1]:
                path.unlink() if path.is_file() else None
        elif after:
            result = original(*arguments, **named)
            os.kill(os.getpid(), which)
            return result
        os.kill(os.getpid(), which)
        return original(*arguments, **named)

    setattr(owner, attribute, dying)


def trial(
    place: Path, method: str, warm: Path | None, harms: list[tuple[float | None, tuple | None, int]], says: list[str]
) -> tuple[dict[str, bytes], list[dict]]:
    """Harm a run and its continuations, one after the other, then let it finish."""
    place.mkdir(parents=True)
    if warm is not None:
        shutil.copytree(warm, place / "cache")
    for delay, point, which in harms:
        child = command(place, method, *AGAIN, harm=point and (lambda point=point: plant(*point)))
        if delay is not None:
            time.sleep(delay)
            os.kill(child, which)  # not waited for yet: the id is its own, also when it has ended
        code = ended(child)
        says.append(f"{signal.Signals(which).name} {point or f'after {delay:.2f} s'}: {code}")
        if code == 0:  # it was over before the harm
            break
        assert code in (-which, 130), (place / "said").read_text()
    assert ended(command(place, method, *AGAIN)) == 0, (place / "said").read_text()
    return left_by(place)


def kills(folder: Path, randoms: int, planted: int, seed: int, methods: tuple[str, ...] = tuple(METHODS)) -> Counter:
    """So many trials of each kind. Raises AssertionError where one does not end as the run that nobody harmed."""
    import_everything()
    rng, outcomes = random.Random(seed), Counter()
    wholes = {method: whole(folder / f"whole_{method}", method) for method in methods}
    for number in range(4 * (randoms + planted)):  # some harms come too late, or where a warm cache spares the call
        kind = "random" if outcomes["random"] < randoms else "planted"
        if kind == "planted" and outcomes["planted"] >= planted:
            return outcomes
        method, which = rng.choice(methods), rng.choice(SIGNALS)
        counts, weights, lines, seconds = wholes[method]
        warm = rng.choice([None, folder / f"whole_{method}" / "cache"])
        if kind == "random":
            harms = [(rng.uniform(0.02, 1) * seconds, None, which)]
            while rng.random() < 0.4:
                harms.append((rng.uniform(0.02, 1) * seconds, None, rng.choice(SIGNALS)))
        else:
            name = rng.choice([name for name in POINTS if counts[name]])
            harms = [(None, (name, rng.randint(1, counts[name]), which, rng.random() < 0.5), which)]
        says: list[str] = []
        try:
            found = trial(folder / str(number), method, warm, harms, says)
            assert found[0] == weights, "other weights"
            assert found[1] == lines, "another log"
        except (AssertionError, ValueError) as error:
            raise AssertionError(f"trial {number} of {method} in {folder / str(number)}, {says}: {error}") from error
        done = len([said for said in says if not said.endswith(": 0")])
        outcomes[kind] += min(done, 1)
        outcomes["kills"] += done
        print(f"{number}: {method}, {'cold' if warm is None else 'warm'} cache: {'; '.join(says)}", flush=True)
        shutil.rmtree(folder / str(number))
    raise AssertionError(f"too few harms came in time: {outcomes}")


def import_everything() -> None:
    """What a run imports, so that its forked process need not. Nothing is computed here: threads do not survive."""
    import diffusers.optimization  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torchmetrics.image.fid  # noqa: F401
    from diffusers import DDPMPipeline, UNet2DModel  # noqa: F401

    import unlearn_runner.assembly
    import unlearn_runner.cli
    import unlearn_runner.data.digits_trousers
    import unlearn_runner.drivers.sb3
    import unlearn_runner.evaluation.metrics
    import unlearn_runner.methods.distillation.sfd
    import unlearn_runner.methods.siss.siss
    import unlearn_runner.training.recorder  # noqa: F401


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path):
    """In a process of its own: pytest's has threads, which a fork would lose."""
    import subprocess

    done = subprocess.run(
        [sys.executable, __file__, "--random", "6", "--planted", "6", "--folder", str(tmp_path / "kills")],
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=10, help="kills at random times")
    parser.add_argument("--planted", type=int, default=10, help="kills at chosen calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--folder", type=Path, default=None, help="where the runs are made; by default a temporary one")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    place = arguments.folder or Path(tempfile.mkdtemp())
    started = time.monotonic()
    outcomes = kills(place, arguments.random, arguments.planted, arguments.seed, tuple(arguments.methods))
    print(f"all to the same bits: {dict(outcomes)}, in {time.monotonic() - started:.0f} s")
