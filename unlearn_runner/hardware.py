"""The machine a run computes on."""

import ctypes
import os
import platform
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le
from torch import nn

from unlearn_runner.distributed import started_outside
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.graphs import GraphedPasses
from unlearn_runner.options import BatchSize
from unlearn_runner.types import Passes

LARGEST_REPLAYED = 200_000_000  # weights
KERNELS_KEPT = "8192"  # by oneDNN, which compiles for every shape anew: up to 190 for each size of SISS's parts
PRECISIONS = {"no": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Hardware:
    """What to compute on, and how.

    Args:
        accelerator: "auto" (a GPU if there is one), "cpu" or "cuda".
        num_processes: on this machine, each with a GPU of its own or a share of the CPU; None: one for each GPU. They
            share the work of `trainer.batch_size` images a step and come to the weights that one process comes to, up
            to rounding.
        threads: CPU threads of torch in each process; None: one for each core that it may use.
        mixed_precision: "no", or "bf16" for networks' matrix products and convolutions (autocast; weights, losses and
            gradients' arithmetic stay float32); None: bf16 on a GPU that has it.
        gradient_accumulation_steps: parts in which a batch passes through the network. A part's activations are
            computed again in the backward pass, so that memory is that of one; the result is the whole batch's.
        compile: the UNet by torch.compile.
        cuda_graphs: replay training's passes as CUDA graphs, which spares a small network's many kernels their
            launches; the same bits. None: for one process on a GPU and networks of up to 200M weights, which larger
            ones keep busy anyway while they need the memory that recorded activations hold.
        channels_last: memory format of the network's weights; faster where convolutions dominate. None: on a GPU.
        deterministic: same configuration, seed and machine give the same weights to the bit. On a GPU this asks
            torch for deterministic kernels; on the CPU they are so anyway.
    """

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Gt(0), Le(1024)] | None = None
    channels_last: bool | None = False
    deterministic: bool = True
    num_processes: Annotated[int, Gt(0), Le(256)] | None = 1
    mixed_precision: Literal["no", "bf16"] | None = "no"
    gradient_accumulation_steps: BatchSize = 1
    compile: bool = False
    cuda_graphs: bool | None = False

    def __post_init__(self) -> None:
        gpus = torch.cuda.device_count()
        if self.accelerator == "cuda" and not torch.cuda.is_available():
            raise ConfigurationError("hardware: a GPU was asked for, torch finds none here; take hardware=cpu or auto.")
        if self.cuda_graphs and self.device.type != "cuda":
            raise ConfigurationError("hardware.cuda_graphs must be false or null, got true: there is no GPU to use.")
        if self.device.type == "cuda" and self.processes > gpus:
            raise ConfigurationError(
                f"hardware.num_processes={self.processes} needs as many GPUs, torch finds {gpus} here; ask for "
                f"{gpus}, or take hardware=cpu."
            )
        if started_outside() not in (None, self.processes):
            raise ConfigurationError(
                f"hardware.num_processes is {self.processes}, but {started_outside()} were started (WORLD_SIZE); give "
                f"hardware.num_processes={started_outside()}."
            )
        if self.mixed_precision == "bf16" and self.device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ConfigurationError(
                f"hardware.mixed_precision=bf16: {torch.cuda.get_device_name()} does not have it; take no."
            )

    @property
    def device(self) -> torch.device:
        use_cuda = self.accelerator == "cuda" or (self.accelerator == "auto" and torch.cuda.is_available())
        return torch.device("cuda" if use_cuda else "cpu")

    @property
    def processes(self) -> int:
        return self.num_processes or max(1, torch.cuda.device_count())

    @property
    def passes(self) -> Passes:
        """How networks compute."""
        precision = PRECISIONS.get(self.mixed_precision)
        if self.mixed_precision is None and self.device.type == "cuda" and torch.cuda.is_bf16_supported():
            precision = torch.bfloat16
        return Passes(precision, self.gradient_accumulation_steps)

    @property
    def beyond_rounding(self) -> dict[str, str]:
        """What the weights that are trained on it depend on by more than float32's rounding."""
        precision = self.passes.precision
        return {} if precision is None else {"precision": str(precision).removeprefix("torch.")}

    def apply(self) -> None:
        """Set what is global to the process."""
        if self.threads is not None or self.processes > 1:
            torch.set_num_threads(self.threads or max(1, cores() // self.processes))
        torch.use_deterministic_algorithms(self.deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over every new tensor
        torch.backends.cudnn.benchmark = not self.deterministic
        if self.device.type == "cpu":
            _keep_freed_memory()
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS_KEPT)  # read at the first convolution
        else:
            if self.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
            torch.set_float32_matmul_precision("high")  # TF32

    def place(self, module: nn.Module) -> nn.Module:
        """On the device, in the memory format asked for."""
        channels_last = self.device.type == "cuda" if self.channels_last is None else self.channels_last
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return module.to(device=self.device, memory_format=memory_format)

    def prepare(self, network: nn.Module) -> nn.Module:
        """A generative model, placed, that computes as asked for.

        Raises ConfigurationError if it is to be compiled and has no UNet.
        """
        graphs = GraphedPasses() if self._replays(network) else None
        network.passes = self.passes._replace(graphs=graphs)
        if self.compile:
            if not hasattr(network, "backbone"):
                raise ConfigurationError("hardware.compile must be false, got true: this model has no UNet.")
            torch._functorch.config.donated_buffer = False  # SISS goes back through one graph twice
            network.backbone.network.compile()
        return self.place(network)

    def _replays(self, network: nn.Module) -> bool:
        if self.cuda_graphs is not None:
            return self.cuda_graphs
        size = sum(weight.numel() for weight in network.parameters())
        return self.device.type == "cuda" and self.processes == 1 and size <= LARGEST_REPLAYED


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _keep_freed_memory() -> None:
    """Let the C library keep what tensors free, for the next step, instead of giving it back and faulting it in again.

    The same bits; steps of ddpm_small were 1.12 to 1.23 times as fast on two cores. Nothing without glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_max, 0)
