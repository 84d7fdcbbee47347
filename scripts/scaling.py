"""What a step costs as batch, pictures, processes and jobs grow, and a model of three numbers that predicts it.

    python scripts/scaling.py                                    # minutes; nothing else may run
    python scripts/scaling.py --method adaptive_siss --rounds 5 --markdown scaling.md

Two sizes of batch settle the model: `fixed` seconds a step, and the `speed` of passes, whose operations are counted.
The third number, what gradients cost to exchange, is timed by itself. All other cases are predictions. Every process
has one thread.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench import (
    NETWORKS,
    SUBJECTS,
    add_files,
    hand_over,
    make_subject,
    processor,
    require_sensible,
)

ROOT = Path(__file__).parents[1]


class Case(NamedTuple):
    """What is timed: steps of `batch_size` pairs of square pictures."""

    batch_size: int = 64
    image_size: int = 28
    processes: int = 1  # that share a step
    jobs: int = 1  # at the same time

    @property
    def alone(self) -> "Case":
        """The same step in one process of one job, whose operations it has."""
        return self._replace(processes=1, jobs=1)


class Cost(NamedTuple):
    """What is known of a case without timing it."""

    operations: float  # of a step's passes, forward and back
    exchanged: float  # bytes of gradients in which processes have to agree


class Model(NamedTuple):
    """Seconds of a step."""

    fixed: float  # of a step, whatever its size
    speed: float  # operations a second, of one core
    exchange: float  # seconds a byte
    cores: int

    def seconds(self, case: Case, cost: Cost) -> float:
        shared = cost.operations / self.speed / case.processes
        shown = self.exchange * cost.exchanged if case.processes > 1 else 0.0
        crowd = max(1.0, case.processes * case.jobs / self.cores)
        return crowd * (self.fixed + shared) + shown


SETTLING = (Case(batch_size=8), Case(batch_size=64))
PREDICTED = (
    Case(batch_size=16), Case(batch_size=32), Case(batch_size=128),
    Case(image_size=16), Case(image_size=20), Case(image_size=40),
    Case(processes=2), Case(batch_size=16, processes=2), Case(image_size=40, processes=2),
    Case(jobs=2), Case(jobs=4),
)  # fmt: skip


def settled(small: tuple[float, Cost], large: tuple[float, Cost], exchange: float, cores: int) -> Model:
    """The model that two timed cases of one process decide, each with its seconds a step."""
    speed = (large[1].operations - small[1].operations) / (large[0] - small[0])
    return Model(small[0] - small[1].operations / speed, speed, exchange, cores)


def cost_of(method: str, network: str, case: Case) -> Cost:
    """Counted, with torch's FlopCounterMode, in one step that is not timed."""
    from torch.utils.flop_counter import FlopCounterMode

    with tempfile.TemporaryDirectory() as folder:
        subject = subject_of(method, network, case.alone, Path(folder))
        subject.run(1)
        with FlopCounterMode(display=False) as counter:
            subject.run(1)
    weights = sum(weight.numel() for weight in subject.networks[0].parameters())
    gradients = 1 if method in ("naive_deletion", "neg_grad") else 2
    return Cost(counter.get_total_flops(), 4.0 * weights * gradients)


def subject_of(method: str, network: str, case: Case, folder: Path):
    arguments = argparse.Namespace(
        conditional=True, hardware="cpu", network=network, batch_size=case.batch_size, image_size=case.image_size
    )
    return make_subject(method, arguments, folder, "hardware.threads=1", f"hardware.num_processes={case.processes}")


def timed(method: str, network: str, case: Case, steps: int, meeting: Path, number: int) -> list[float]:
    """Seconds of steps that all jobs of a case begin together."""
    with tempfile.TemporaryDirectory() as folder:
        subject = subject_of(method, network, case, Path(folder))
        subject.run(2)
        (meeting / str(number)).touch()
        while len(list(meeting.iterdir())) < case.jobs:
            time.sleep(0.01)
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            subject.run(1)
            seconds.append(time.perf_counter() - started)
    return seconds


def exchange(numbers: int, times: int) -> float:
    """Seconds a byte to add up float32 gradients of two processes; called in both."""
    import torch
    from torch import distributed as dist

    gradient, seconds = torch.ones(numbers), []
    for _ in range(times + 1):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(gradient)
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:]) / (4 * numbers)


def in_processes(function: str, arguments: tuple, processes: int):
    from unlearn_runner.distributed import launch

    return launch(__file__, function, arguments, processes)


def measure(arguments: argparse.Namespace, case: Case) -> float:
    """Median seconds of a step: of each job, and over jobs."""
    with tempfile.TemporaryDirectory() as meeting:
        command = [sys.executable, __file__, "--job", json.dumps(case), "--meeting", meeting, "--method",
                   arguments.method, "--network", arguments.network, "--steps", str(arguments.steps)]  # fmt: skip
        jobs = [
            subprocess.Popen([*command, "--number", str(number)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
            for number in range(case.jobs)
        ]
        said = [job.communicate()[0] for job in jobs]
        if any(job.returncode for job in jobs):
            sys.exit(f"{case} failed; its error is above.")
    return median(median(json.loads(text.splitlines()[-1])) for text in said)


def markdown(found: dict) -> str:
    """The table, and the model above it."""
    model = Model(**found["model"])
    lines = [
        f"{found['method']}, {found['network']} network, one thread a process, {found['rounds']} rounds of "
        f"{found['steps']} steps. Model: {1000 * model.fixed:.0f} ms a step, {model.speed / 1e9:.1f} GFLOP/s, "
        f"{1e-6 / model.exchange:.0f} MB/s between processes, {model.cores} cores.",
        "",
        "| batch | pictures | processes | jobs | GFLOP a step | ms a step | predicted | off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["cases"]:
        case, off = Case(*row["case"]), row["predicted"] / row["seconds"] - 1
        shown = "settles the model |" if case in SETTLING else f"{1000 * row['predicted']:.0f} | {100 * off:+.0f} %"
        lines.append(
            f"| {case.batch_size} | {case.image_size}x{case.image_size} | {case.processes} | {case.jobs} | "
            f"{row['operations'] / 1e9:.1f} | {1000 * row['seconds']:.0f} | {shown} |"
        )
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    from unlearn_runner.comparison.choices import Parser

    parser = Parser(__doc__)
    add = parser.add_argument
    methods = [name for name in SUBJECTS if not name.startswith("rl_")]  # those take a roll-out at a time
    add("--method", choices=methods, default="siss", metavar="NAME", help=f"of {', '.join(methods)}")
    add("--network", choices=NETWORKS, default="small", help="the paper's UNet, or one of 1.1M weights")
    add("--rounds", type=int, default=3, help="each case is timed once in each")
    add("--steps", type=int, default=5, help="of a case in a round")
    add_files(parser)
    for hidden, kind in (("--job", str), ("--meeting", Path), ("--number", int)):
        add(hidden, type=kind, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    arguments = parser().parse_args()
    if arguments.job:
        case = Case(*json.loads(arguments.job))
        task = (arguments.method, arguments.network, case, arguments.steps, arguments.meeting, arguments.number)
        print(json.dumps(in_processes("timed", task, case.processes) if case.processes > 1 else timed(*task)))
        return
    require_sensible(arguments, "rounds", "steps")
    from unlearn_runner.hardware import cores

    cases = (*SETTLING, *PREDICTED)
    counted = {case: cost_of(arguments.method, arguments.network, case) for case in {case.alone for case in cases}}
    costs = {case: counted[case.alone] for case in cases}
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    for round in range(arguments.rounds):
        for case in cases[round % len(cases) :] + cases[: round % len(cases)]:
            seconds[case].append(measure(arguments, case))
            print(f"round {round + 1}: {case}: {1000 * seconds[case][-1]:.0f} ms a step", file=sys.stderr)
    middle = {case: median(seconds[case]) for case in cases}
    byte = in_processes("exchange", (int(costs[cases[0]].exchanged / 4), 20), 2)
    model = settled(*((middle[case], costs[case]) for case in SETTLING), byte, cores())
    found = {
        "processor": processor(),
        **{name: getattr(arguments, name) for name in ("method", "network", "rounds", "steps")},
        "model": model._asdict(),
        "cases": [
            {"case": case, "seconds": middle[case], "rounds": seconds[case], "operations": costs[case].operations,
             "predicted": model.seconds(case, costs[case])}
            for case in cases
        ],
    }  # fmt: skip
    hand_over(found, markdown(found), arguments)


if __name__ == "__main__":
    main()
