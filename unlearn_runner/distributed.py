"""Several processes at work on one run: the only file that knows of them.

All of them do the same. Each draws the whole batch with the same generators and comes to the same losses, metrics and
decisions; only the networks' passes, which are what costs time, are shared: `in_shares` passes a process's own rows and
gives every process all outputs, with their gradients. So a method is written as for one process, and what is left to
do is to average the gradients over weights (`averaged`), before any norm or product is taken of them. One process does
nothing of all this: its bits are what they would be without this file.

The first process alone writes. What only it can know, it tells the others (`from_first`).
"""

import importlib.util
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unlearn_runner.errors import KNOWN, Interrupted, known_cause

T = TypeVar("T")
# A process may wait for another job that makes a base. One that dies ends all by its launcher, not by this.
PATIENCE = timedelta(days=7)
INTERRUPTED = 130  # exit code
SECONDS_TO_SAVE = 120  # between a signal and the end of a process that has not ended by itself


_alone = False  # for as long as the first process does something while the others wait
_agreement: Any = None  # the group of those that wait for each other, perhaps for long


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def is_first() -> bool:
    return rank() == 0


def started_outside() -> int | None:
    """How many processes torchrun, or whoever speaks its language, has started; None if nobody has."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else None


# 1. Sharing the work


class _OwnRows(torch.autograd.Function):
    """This process's share of rows that all have; backwards: everybody's gradients, so that all have all of them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: int) -> Tensor:
        ctx.total = len(rows)
        start = rank() * count
        if start + count <= len(rows):
            return rows[start : start + count].clone()
        return rows[torch.arange(start, start + count, device=rows.device).clamp(max=len(rows) - 1)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gathered(gradient)[: ctx.total] / world_size(), None


class _AllRows(torch.autograd.Function):
    """Everybody's rows; backwards: the own share, times the number of processes, over which gradients are averaged."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, total: int) -> Tensor:
        ctx.count = len(rows)
        return _gathered(rows)[:total]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient[rank() * ctx.count : (rank() + 1) * ctx.count] * world_size()
        missing = ctx.count - len(own)  # rows that stand in where the batch does not divide
        return torch.cat([own, own.new_zeros((missing, *own.shape[1:]))]) if missing else own, None


def in_shares(function: Callable[..., Any], *rows: Tensor | None) -> Any:
    """`function(*rows)`, a tensor or a tuple of them with a row for each row, computed by all processes together.

    Exact but for rounding, gradients over rows and weights included, if a row's output depends on that row alone. All
    processes must come here with the same rows. Where they do not divide, the last row stands in for those missing.
    """
    total, processes = next(len(part) for part in rows if part is not None), world_size()
    if processes == 1 or total == 0:
        return function(*rows)
    count = -(-total // processes)
    with _own_randomness():
        found = function(*(None if part is None else _OwnRows.apply(part, count) for part in rows))
    if isinstance(found, tuple):
        return tuple(_AllRows.apply(part, total) for part in found)
    return _AllRows.apply(found, total)


def averaged(gradient: Tensor) -> Tensor:
    """The mean over processes, the same to the bit in all of them."""
    if world_size() > 1:
        dist.all_reduce(gradient)
        gradient /= world_size()
    return gradient


def _gathered(rows: Tensor) -> Tensor:
    found = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
    dist.all_gather(list(found.chunk(world_size())), rows.contiguous())
    return found


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Dropout draws from the global generator: here another one in each process, outside the same one in all."""
    if not torch.is_grad_enabled():
        yield
        return
    seed = int(torch.randint(2**62, ()))
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + rank())
        yield


# 2. Agreeing


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns, or raises, in the first process, which shares no work meanwhile; the others wait."""
    global _alone
    if world_size() == 1:
        return make()
    found: list[Any] = [None, None]
    if is_first():
        _alone = True
        try:
            found[0] = make()
        except Exception as error:
            found[1] = error
        finally:
            _alone = False
    dist.broadcast_object_list(found, src=0, group=_agreement, device=torch.device("cpu"))
    if found[1] is not None:
        raise found[1]
    return found[0]


def any_of(value: int | None) -> int | None:
    """A value that some process has, if one has: the largest."""
    if world_size() == 1:
        return value
    found = torch.tensor(-1 if value is None else value)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_agreement)
    return None if found < 0 else int(found)


@contextmanager
def own_copy(folder: Path) -> Iterator[Path]:
    """The folder itself in the first process, a copy that is thrown away in the others: all can write alike."""
    if is_first():
        any_of(None)
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / folder.name
        shutil.copytree(folder, copy)
        any_of(None)  # only now may the first one change it
        yield copy


# 3. Starting and ending


@contextmanager
def joined() -> Iterator[None]:
    """Within, the processes that were started together know each other. Nothing where there is one."""
    if started_outside() is None or dist.is_initialized():
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    global _agreement
    _agreement = dist.new_group(backend="gloo", timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # not after a failure: the others would be the first to fail, for want of this one


def launch(script: str, function: str, arguments: tuple[Any, ...], processes: int) -> Any:
    """Call a function of a script in so many new processes of this machine; returns what it returns in the first.

    Raises what the first one to fail has raised, if it is one of the runner's own errors; else RuntimeError with its
    traceback. All others are ended then. A signal is passed on, once.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what they report is raised below
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=os.urandom(8).hex(),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    main = threading.current_thread() is threading.main_thread()
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")  # Windows has the first two
    numbers = [getattr(signal, name) for name in names if main and hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}  # elastic_launch leaves its own
    method = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)  # children receive it, and know nothing of joblib's "loky"
    try:
        return elastic_launch(config, work)(script, function, arguments)[0]
    except ChildFailedError as error:
        raise _cause(error) from None
    except SignalException as error:
        raise Interrupted(f"{error.sigval.name} received") from None
    finally:
        multiprocessing.set_start_method(method, force=True)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def work(script: str, function: str, arguments: tuple[Any, ...]) -> Any:
    """What each of the new processes does."""
    os.setpgrp()  # Ctrl-C reaches the launcher alone, which passes it on
    spec = importlib.util.spec_from_file_location("launched", script)
    module = sys.modules["launched"] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    with joined():
        try:
            return getattr(module, function)(*arguments)
        except Interrupted:
            raise SystemExit(INTERRUPTED) from None
        except Exception as error:
            if (known := known_cause(error)) is not None:
                raise known from None
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                time.sleep(3)  # another one was lost: the launcher shall find that one first
            raise


def _cause(error: Any) -> Exception | KeyboardInterrupt:
    """The exception of the process that failed first, from what it has left of it."""
    number, failure = error.get_first_failure()
    if failure.exitcode == INTERRUPTED:
        return Interrupted(f"process {number} was interrupted")
    message = failure.error_file_data.get("message", {}) if isinstance(failure.error_file_data, dict) else {}
    if not isinstance(message, dict):
        return RuntimeError(f"process {number} ended with {failure.message}")
    kind, _, sentence = message.get("message", "").partition(": ")
    known = next((error for error in KNOWN if error.__name__ == kind), None)
    if known is not None:
        return known(sentence)
    return RuntimeError(
        f"process {number} failed:\n{message.get('extraInfo', {}).get('py_callstack', failure.message)}"
    )
