"""Trainers of debug configurations, and all that they learn, for tests to compare."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unlearn_runner.assembly import build_method, build_network, make
from unlearn_runner.data.streams import BatchStream
from unlearn_runner.training.checkpoint import Checkpoints
from unlearn_runner.training.clock import Listener
from unlearn_runner.training.progress import ProgressBar
from unlearn_runner.training.signals import Interrupts
from unlearn_runner.training.trainer import Trainer, identity_of, planned
from unlearn_runner.types import make_generator

CPU = torch.device("cpu")


def build_trainer(
    cfg: dict,
    data,
    folder: Path,
    resettable: bool = True,
    listeners: Mapping[str, Listener] | None = None,
    base: Path | None = None,
) -> Trainer:
    """`base` is a folder of weights that the network is given, as train.py does it, when the method is built."""
    spec = data.spec
    network = build_network(cfg, spec, 0)
    plan = make(cfg["trainer"])
    if plan.init == "base":
        network.freeze_for_unlearning()
    method = build_method(cfg, network, spec, make_generator(0, "method"), make(cfg["clip"]["network"]))
    plan = planned(plan, method)
    if base is not None:
        network.load(base)
    return Trainer(
        method,
        BatchStream(data, method.reads, plan.batch_size, 0, CPU, network.encode),
        plan,
        listeners or {"progress": Listener(logged=ProgressBar("test", plan.max_steps, Console(quiet=True)).logged)},
        Checkpoints(folder / "checkpoints", plan.checkpoints_total_limit),
        Interrupts(),
        identity_of(method, spec),
        resettable=resettable,
    )


def build_driven(
    cfg: dict, data, folder: Path, listeners: Mapping[str, Listener] | None = None
) -> tuple[Trainer, Callable[[], Any]]:
    """A trainer and its driver's loop, ready to run."""
    driver = make(cfg["driver"])
    trainer = build_trainer(cfg, data, folder, listeners=listeners)
    driver.total_steps(trainer.method, trainer.plan)
    return trainer, driver.prepare(trainer)


def flat_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All tensors and numbers of a trainer's learner, by path."""
    return flat(trainer._learner_state())


def flat(state) -> dict[str, torch.Tensor]:
    """All tensors and numbers of a state, by path."""

    def walk(value, path):
        if isinstance(value, torch.Tensor):
            yield path, value
        elif isinstance(value, dict):
            for key, part in value.items():
                yield from walk(part, f"{path}/{key}")
        elif isinstance(value, (list, tuple)):
            for key, part in enumerate(value):
                yield from walk(part, f"{path}/{key}")
        elif isinstance(value, (int, float)):
            yield path, torch.tensor(float(value), dtype=torch.float64)

    return dict(walk(copy.deepcopy(state), ""))
