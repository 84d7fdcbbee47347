"""Base models and oracles: trained once by the Trainer, cached under a hash of all that defines them.

A latent model's autoencoder comes first, in a cache entry of its own.
"""

import copy
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unlearn_runner.cache import cached, set_aside, sweep
from unlearn_runner.data.forget_retain import Dataset, ForgetRetain
from unlearn_runner.data.streams import BatchStream, to_unit_range
from unlearn_runner.distributed import is_first
from unlearn_runner.errors import ConfigurationError, Interrupted, NonFiniteError
from unlearn_runner.methods.denoising import Denoising
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.models.latents import Autoencoder
from unlearn_runner.models.model import GenerativeModel, require_finite
from unlearn_runner.options import TUNING, BatchSize, PositiveInt, Seed
from unlearn_runner.spec import DataSpec
from unlearn_runner.training.checkpoint import Checkpoint, Checkpoints, open_checkpoint
from unlearn_runner.training.clock import Listener
from unlearn_runner.training.progress import ProgressBar
from unlearn_runner.training.signals import Interrupts
from unlearn_runner.training.trainer import Plan, Trainer, identity_of
from unlearn_runner.types import make_generator

VERSION = 1  # raise it when the same recipe comes to give other weights
CHECKPOINTS = "checkpoints"  # of a training that was interrupted, in its cache entry to be
AFTER_THE_BASE = (*TUNING, "guidance_scale")  # leave its weights as they are
TITLES = {
    "all": "training the base model",
    "retain": "training the oracle of seed {seed}, which never sees the forget set",
}


@dataclass(frozen=True)
class Pretraining:
    """The recipe of a model from scratch.

    Args:
        update: called with the network.
        corpus: what the base learns from, where that is not the run's dataset.
        autoencoder: the recipe of a latent model's autoencoder, which then stays as it is.
    """

    update: Callable[[GenerativeModel], Update]
    max_steps: PositiveInt
    batch_size: BatchSize
    seed: Seed = 0
    corpus: Dataset | None = None
    autoencoder: "Pretraining | None" = None


def pretrained(
    population: str,
    recipe: Pretraining,
    key: dict[str, Any],
    build: Callable[[int, DataSpec], GenerativeModel],
    data: ForgetRetain | None,
    cache_dir: Path,
    interrupts: Interrupts,
    console: Console,
) -> Path:
    """The folder with the weights of a model trained on "all" images (a base) or "retain" images (an oracle).

    `build` makes a network from a seed for a dataset; `key` is the configuration of network and recipe. `data` is
    without effect where the recipe has a corpus. An interrupted training leaves a checkpoint in the cache, from which
    the next call goes on, to the bit.
    """
    if recipe.corpus is not None:
        data = recipe.corpus.load()
    learn = _Learning(data, interrupts, console)

    def make(folder: Path) -> None:
        network = build(recipe.seed, data.spec)
        if recipe.autoencoder is not None:
            parts = {name: key[group][name] for group, name in (("network", "vae"), ("pretraining", "autoencoder"))}
            network.codec.adopt(_pretrained_autoencoder(recipe.autoencoder, parts, network, learn, cache_dir))
        title = TITLES[population].format(seed=recipe.seed)
        learn(network, recipe, population, folder, title, lambda model: model.save(folder / "model"))

    kind = {"all": "bases", "retain": "oracles"}[population]
    learnt = {name: value for name, value in key["network"].items() if name not in AFTER_THE_BASE}
    key = {**key, "network": learnt, "version": VERSION, "data": data.fingerprint, "population": population}

    def read(folder: Path) -> None:
        network = build(recipe.seed, data.spec)
        network.load(folder / "model")
        require_finite(network, "the model")

    return cached(cache_dir, kind, key, make, read, together=True, continues=CHECKPOINTS) / "model"


def _pretrained_autoencoder(
    recipe: Pretraining, key: dict[str, Any], network: GenerativeModel, learn: "_Learning", cache_dir: Path
) -> Any:
    """An AutoencoderKL like the network's, trained on all images of the corpus."""

    def make(folder: Path) -> None:
        # the network's own was built from the same seed, whatever the rest of it is
        autoencoder = Autoencoder(copy.deepcopy(network.codec.vae), network.image_shape)
        images = learn.data.retain.pixels
        chosen = torch.randperm(len(images), generator=make_generator(recipe.seed, "scale"))[:2048]

        def keep(trained: GenerativeModel) -> None:
            trained.measure_scale(to_unit_range(images[chosen].to(trained.vae.device)))
            trained.save(folder / "model")

        learn(autoencoder, recipe, "all", folder, "training the autoencoder", keep)

    key = {**key, "version": VERSION, "data": learn.data.fingerprint}

    def read(folder: Path) -> Any:
        return network.codec.vae.from_pretrained(folder / "model", subfolder="vae", use_safetensors=True)

    return read(cached(cache_dir, "autoencoders", key, make, read, together=True, continues=CHECKPOINTS))


class _Learning:
    """The denoising loss on one dataset, by the Trainer."""

    def __init__(self, data: ForgetRetain, interrupts: Interrupts, console: Console):
        self.data, self.interrupts, self.console = data, interrupts, console

    def __call__(
        self,
        network: GenerativeModel,
        recipe: Pretraining,
        population: str,
        folder: Path,
        title: str,
        keep: Callable[[GenerativeModel], None],
    ) -> None:
        """Train the network and hand it to `keep`; until then checkpoints lie in `folder`."""
        device = next(network.parameters()).device
        method = Denoising(Setting(network, make_generator(recipe.seed, "noise", device)), recipe.update, population)
        plan = Plan(
            recipe.max_steps,
            recipe.batch_size,
            log_every=10,
            checkpointing_steps=500,
            checkpoints_total_limit=1,
        )
        progress = ProgressBar(title, recipe.max_steps, self.console)
        trainer = Trainer(
            method,
            BatchStream(self.data, method.reads, recipe.batch_size, recipe.seed, device, network.encode),
            plan,
            {"progress": Listener(logged=progress.logged)},
            Checkpoints(folder / CHECKPOINTS, plan.checkpoints_total_limit),
            self.interrupts,
            identity_of(method, self.data.spec),
        )
        if (begun := _begun(trainer, folder, title)) is not None:
            trainer.resume(begun)
        try:
            with closing(progress):
                while not trainer.done:
                    trainer.step()
            require_finite(method.model, "the model")
        except Interrupted:
            trainer.save()
            raise
        except NonFiniteError as error:
            raise ConfigurationError(
                f"{title} diverged ({error}): its recipe, model.pretraining, must be another, e.g. a lower learning "
                "rate or a model.pretraining.update.max_grad_norm."
            ) from error
        keep(method.model)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # there are some in the first process only


def _begun(trainer: Trainer, folder: Path, title: str) -> Checkpoint | None:
    """The checkpoint in `folder` of this training, if there is one. One that cannot be used is set aside."""
    sweep(folder)
    if not trainer.checkpoints.all():
        return None
    try:
        checkpoint = open_checkpoint(folder)
        checkpoint.require(trainer.identity)
    except Exception:  # whatever a damaged file makes torch raise
        aside = set_aside(trainer.checkpoints.folder, name=folder)
        if is_first():
            print(
                f"the cache holds a part of {title}, which was interrupted, and it is damaged: set aside as {aside}, "
                "the training begins anew",
                flush=True,
            )
        return None
    return checkpoint
