"""What tests have several processes do: functions for `unlearn_runner.distributed.launch`, which imports this file."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def train(jobs: dict[str, dict], folder: Path) -> None:
    """Train each configuration to its end with its driver, and leave the weights that each process has.

    Steps are in double precision, for Adam makes steps of full length out of the rounding errors of gradients that are
    zero; Stable-Baselines3 around them knows single precision only.
    """
    from trainers import build_trainer, make

    from unlearn_runner.distributed import rank
    from unlearn_runner.types import Batch

    torch.set_num_threads(1)
    loaded = {}
    for name, cfg in jobs.items():
        dataset = str(cfg["dataset"])
        if dataset not in loaded:
            loaded[dataset] = make(cfg["dataset"]).load()
        with in_double():
            trainer, driver = build_trainer(cfg, loaded[dataset], folder / name), make(cfg["driver"])
            start = copy.deepcopy(dict(trainer.method.model.named_parameters()))
        draw, step = trainer.stream.next, trainer.method.step
        trainer.stream.next = lambda draw=draw: Batch(*map(doubled, draw()))
        trainer.method.step = in_double()(step)
        driver.total_steps(trainer.method, trainer.plan)
        driver.prepare(trainer)()
        torch.save((start, dict(trainer.method.model.named_parameters())), folder / f"{name}.{rank()}.pt")


@contextmanager
def in_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def doubled(part: Any) -> Any:
    return part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part


def train_and_resume(jobs: dict[str, dict], resumed: dict[str, dict], folder: Path) -> None:
    train(jobs, folder)
    resume(resumed, folder)


def resume(jobs: dict[str, dict], folder: Path) -> None:
    """Train each configuration twice, once with an interruption: the same to the bit."""
    from conftest import assert_same_bits
    from trainers import build_trainer, flat_state, make

    from unlearn_runner.distributed import any_of
    from unlearn_runner.training.checkpoint import open_checkpoint

    torch.set_num_threads(1)
    folder = folder / "resumed"
    for name, cfg in jobs.items():
        data = make(cfg["dataset"]).load()
        torch.manual_seed(0)
        whole = build_trainer(cfg, data, folder / name)
        while whole.clock.run_step < 2:
            whole.step()
        whole.save()
        any_of(None)  # all wait for the first to write
        resumed = build_trainer(cfg, data, folder / name)
        resumed.resume(open_checkpoint(folder / name))
        whole.step()
        after = flat_state(whole)
        torch.set_rng_state(open_checkpoint(folder / name).state["rng"]["cpu"])
        resumed.step()
        assert_same_bits(flat_state(resumed), after)


def share_drop_and_cache(folder: Path) -> None:
    for rows in (6, 5, 1):
        share(rows, folder)
    drop(folder)
    make_once(folder)


def share(rows: int, folder: Path) -> None:
    """Outputs and gradients, over inputs and weights, of passes in shares."""
    from unlearn_runner.distributed import averaged, in_shares, rank

    x, outside, weight = (part.requires_grad_() for part in numbers(rows))

    def layer(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return (x @ weight).sin() * scale, x.square().sum(1)

    found, squares = in_shares(layer, x, outside)
    again = in_shares(lambda y: y @ weight, torch.cat([found, found]).cos())
    loss = (again * torch.arange(2.0 * rows)[:, None]).sum() + (squares * outside[:, 0]).sum() + weight.square().sum()
    over_x, over_outside, over_weight = torch.autograd.grad(loss, [x, outside, weight])
    torch.save([found, squares, loss, over_x, over_outside, averaged(over_weight)], folder / f"{rows}.{rank()}.pt")


def numbers(rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((rows, 3), (rows, 1), (3, 3))]


def lose_one(how: str, which: int) -> None:
    """One process fails while the others count on it."""
    from unlearn_runner.distributed import in_shares, rank
    from unlearn_runner.errors import ConfigurationError

    if rank() == which:
        if how == "kill":
            os.kill(os.getpid(), 9)
        raise {"defect": ZeroDivisionError("in one process"), "mistake": ConfigurationError("expected a, got b.")}[how]
    while True:
        in_shares(torch.sin, torch.ones(4))


def drop(folder: Path) -> None:
    """What dropout does to equal rows of different processes, and what it leaves of the global generator."""
    from unlearn_runner.distributed import in_shares, rank

    torch.manual_seed(0)
    kept = in_shares(torch.nn.Dropout(0.5), torch.ones((2, 64), requires_grad=True))
    torch.save([kept.detach(), torch.rand(1)], folder / f"drop.{rank()}.pt")


def make_once(root: Path) -> None:
    """A cache entry that the first makes alone, and one that all make together."""
    from unlearn_runner.cache import cached
    from unlearn_runner.distributed import from_first, in_shares, rank, world_size

    def alone(folder: Path) -> None:
        (folder / "made").write_text(f"{rank()} of {world_size()}: {in_shares(torch.sin, torch.zeros(3)).tolist()}")

    def together(folder: Path) -> None:
        in_shares(torch.sin, torch.zeros(3))
        (folder / "made").write_text(f"{rank()} of {world_size()}")

    first = cached(root, "alone", {}, alone)
    second = cached(root, "together", {}, together, together=True)
    assert (first / "made").read_text() == "0 of 1: [0.0, 0.0, 0.0]"
    assert (second / "made").read_text() == "0 of 2"
    assert from_first(lambda: rank() + 7) == 7
