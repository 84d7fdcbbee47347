"""Base models and oracles: trained once by the Trainer, cached under a hash of all that defines them."""

import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from unlearn_runner.cache import cached
from unlearn_runner.data.forget_retain import ForgetRetain
from unlearn_runner.data.streams import BatchStream
from unlearn_runner.errors import ConfigurationError, Interrupted
from unlearn_runner.methods.denoising import Denoising
from unlearn_runner.methods.method import Update
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.training.checkpoint import Checkpoints, open_checkpoint
from unlearn_runner.training.progress import ProgressBar
from unlearn_runner.training.recorder import ProgressRecorder
from unlearn_runner.training.signals import Interrupts
from unlearn_runner.training.trainer import Plan, Trainer, identity_of
from unlearn_runner.types import make_generator

VERSION = 1  # raise it when the same recipe comes to give other weights
TITLES = {"all": "training the base model", "retain": "training the oracle, which never sees the forget set"}


@dataclass(frozen=True)
class Pretraining:
    """The recipe of a model from scratch. `update` is called with the network."""

    update: Callable[[GenerativeModel], Update]
    max_steps: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"model.pretraining.{name} must be positive, got {getattr(self, name)}.")


def pretrained(
    population: str,
    recipe: Pretraining,
    key: dict[str, Any],
    build: Callable[[int], GenerativeModel],
    data: ForgetRetain,
    cache_dir: Path,
    interrupts: Interrupts,
    console: Console,
) -> Path:
    """The folder with the weights of a model trained on "all" images (a base) or "retain" images (an oracle).

    `build` makes a network from a seed; `key` is the configuration of network and recipe. An interrupted
    training leaves a checkpoint in the cache, from which the next call goes on, to the bit.
    """

    def make(folder: Path) -> None:
        network = build(recipe.seed)
        device = next(network.parameters()).device
        method = Denoising(network, recipe.update, make_generator(recipe.seed, "noise", device), population)
        plan = Plan(
            recipe.max_steps,
            recipe.batch_size,
            log_every=10,
            checkpointing_steps=500,
            checkpoints_total_limit=1,
        )
        progress = ProgressBar(TITLES[population], recipe.max_steps, console)
        trainer = Trainer(
            method,
            BatchStream(data, method.reads, recipe.batch_size, recipe.seed, device),
            plan,
            ProgressRecorder(progress),
            Checkpoints(folder / "checkpoints", plan.checkpoints_total_limit),
            interrupts,
            identity_of(method, data.spec),
        )
        if trainer.checkpoints.all():
            trainer.resume(open_checkpoint(folder))
        try:
            with closing(progress):
                while not trainer.done:
                    trainer.step()
        except Interrupted:
            trainer.save()
            raise
        method.model.save(folder / "model")
        shutil.rmtree(folder / "checkpoints")

    kind = {"all": "bases", "retain": "oracles"}[population]
    return (
        cached(cache_dir, kind, {**key, "version": VERSION, "data": data.fingerprint, "population": population}, make)
        / "model"
    )
