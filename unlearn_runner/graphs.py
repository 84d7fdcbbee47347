"""Passes forward and back as CUDA graphs: what a small network's many kernels cost to launch is paid once a shape.

A pass is recorded when a shape is first seen and replayed from then on: the same kernels on the same numbers. The way
back is recorded with its activations kept, so that it can be replayed for one gradient after another, as SISS asks.
"""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unlearn_runner.gradients import as_vector, gradients, in_parts

Rows = tuple[Tensor | None, ...]
MOST_RECORDINGS = 8  # of one network: each keeps its activations; further shapes are passed kernel by kernel


@final
class GraphedPasses:
    """Passes of one network; a copy of the network begins with none recorded."""

    def __init__(self) -> None:
        self.recordings: dict[Any, Recording] = {}
        self.weights: list[nn.Parameter] = []

    def __call__(self, model: nn.Module, part: Callable[..., Any], compute: Callable[..., Any], rows: Rows) -> Any:
        """`compute(*rows)`, which passes rows through a `part` of the model: a bound method of it or of a module in it.

        Records only where gradients are wanted, on a GPU.
        """
        first = next(row for row in rows if row is not None)
        if not (first.is_cuda and torch.is_grad_enabled() and hasattr(part, "__self__")):
            return compute(*rows)
        self.weights = self.weights or list(model.parameters())
        trained = tuple(weight.requires_grad for weight in self.weights)
        shapes = tuple(None if row is None else (row.shape, row.dtype, row.requires_grad) for row in rows)
        key = (part.__qualname__, id(part.__self__), model.training, self.weights[0].data_ptr(), trained, shapes)
        recording = self.recordings.get(key)
        if recording is None:
            if len(self.recordings) == MOST_RECORDINGS:
                return compute(*rows)
            recording = self.recordings[key] = Recording(compute, rows, [w for w in self.weights if w.requires_grad])
        found = _Replay.apply(recording, len(rows), *rows, *recording.weights)
        return found if recording.several else found[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphedPasses":
        return GraphedPasses()


@final
class Recording:
    """`compute` of rows of one shape, forward and back."""

    def __init__(self, compute: Callable[..., Any], rows: Rows, weights: list[nn.Parameter]):
        self.weights = weights
        self.rows = [None if row is None else row.detach().clone().requires_grad_(row.requires_grad) for row in rows]
        self.wanted = [row for row in self.rows if row is not None and row.requires_grad] + list(weights)
        self.replays = 0  # forward: whose activations are in memory

        def forward() -> tuple[Tensor, ...]:
            found = compute(*self.rows)
            self.several = isinstance(found, tuple)
            return found if self.several else (found,)

        def back(outputs: tuple[Tensor, ...], slopes: list[Tensor]) -> tuple[Tensor | None, ...]:
            return gradients(outputs, self.wanted, slopes, retain_graph=True, allow_unused=True)

        if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # weights' grad is not written here
        randomness = torch.cuda.get_rng_state()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # libraries choose their kernels and take their workspace
            for _ in range(2):
                outputs = forward()
                self.slopes = [torch.zeros_like(output) for output in outputs]
                back(outputs, self.slopes)
            del outputs
        torch.cuda.current_stream().wait_stream(beside)
        torch.cuda.set_rng_state(randomness)

        self.graph_forward, self.graph_back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph_forward):
            self.outputs = forward()  # held, and with them all activations
        with torch.cuda.graph(self.graph_back):
            found = back(self.outputs, self.slopes)
            self.used = [part is not None for part in found]
            self.present = [wanted for wanted, used in zip(self.wanted, self.used, strict=True) if used]
            self.gradients = as_vector([part for part in found if part is not None], self.present)

    def forward(self, rows: Rows) -> int:
        """The number of the replay that left its outputs."""
        for place, row in zip(self.rows, rows, strict=True):
            if place is not None:
                place.detach().copy_(row)
        self.graph_forward.replay()
        self.replays += 1
        return self.replays

    def back(self, slopes: tuple[Tensor, ...]) -> list[Tensor | None]:
        """The gradients over rows and weights that have one, for the rows of the last replay forward."""
        for place, slope in zip(self.slopes, slopes, strict=True):
            place.copy_(slope)
        self.graph_back.replay()
        # One copy of all: autograd may still hold these when the next replay overwrites what was recorded.
        parts = iter(in_parts(self.gradients.clone(), self.present))
        return [next(parts) if used else None for used in self.used]


class _Replay(torch.autograd.Function):
    """A recording as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, count: int, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        ctx.recording, ctx.count = recording, count
        ctx.number = recording.forward(inputs[:count])
        ctx.save_for_backward(*inputs)  # weights too: autograd then refuses to go back through ones that have moved
        return tuple(output.detach().clone() for output in recording.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        recording, rows = ctx.recording, ctx.saved_tensors[: ctx.count]
        if recording.replays != ctx.number:  # another batch went forward meanwhile
            ctx.number = recording.forward(rows)
        found = iter(recording.back(slopes))
        over_rows = [next(found) if place is not None and place.requires_grad else None for place in recording.rows]
        return None, None, *over_rows, *found
