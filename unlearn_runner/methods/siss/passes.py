"""SISS's samples through the network: which of them together, and back for which of the two terms."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def shared_passes(
    w_retain: Float[Tensor, "b"], w_forget: Float[Tensor, "b"], call: float = 4.0
) -> list[tuple[Bool[Tensor, "b"], tuple[int, ...]]]:
    """The cheapest way to pass a batch: which rows together, and back for which of the terms 0, 1 (retain, forget).

    A pass forward and back costs 3 units a row, a second pass back over the same graph 2, and each of these passes
    what `call` units cost besides. A row whose weight in a term is below rounding needs no pass back for it, which is
    exact to rounding. Rows with weight in both terms go together with two passes back, or once with each of the others.

    Numbers of rows are multiples of an eighth of the batch, for which some rows pass that need not: a CPU compiles
    kernels for each number, and those of every number that chance makes would fill its memory. The most rows first:
    what they leave of it is room enough for the others.
    """
    negligible, unit = torch.finfo(w_retain.dtype).eps / 16, max(1, len(w_retain) // 8)
    in_retain, in_forget = w_retain > negligible, w_forget > negligible

    def first(rows: Bool[Tensor, "b"], n: Int64[Tensor, ""]) -> Bool[Tensor, "b"]:
        return rows & (rows.cumsum(0) <= n)

    def some(rows: Bool[Tensor, "b"]) -> Bool[Tensor, "b"]:
        """As many of these as make whole units."""
        return first(rows, rows.sum() // unit * unit)

    def filled(rows: Bool[Tensor, "b"]) -> Bool[Tensor, "b"]:
        """These, and as many others as make whole units."""
        return rows | first(~rows, -rows.sum() % unit)

    only_retain, only_forget = some(in_retain & ~in_forget), some(in_forget & ~in_retain)
    rest = (in_retain | in_forget) & ~only_retain & ~only_forget
    ways = [
        [(torch.ones_like(rest), (0, 1))],
        [(filled(in_retain), (0,)), (filled(in_forget), (1,))],
        [(only_retain, (0,)), (only_forget, (1,)), (rest, (0, 1))],
    ]
    sums = iter(torch.stack([rows.sum() for way in ways for rows, _ in way]).tolist())  # from the device at once
    counts = [[next(sums) for _ in way] for way in ways]

    def cost(way: int) -> float:
        passes = ((count, len(terms)) for count, (_, terms) in zip(counts[way], ways[way], strict=True) if count)
        return sum(count * (1 + 2 * backward) + call * (1 + backward) for count, backward in passes)

    best = min(range(len(ways)), key=cost)
    parts = sorted(zip(counts[best], ways[best], strict=True), key=lambda part: -part[0])
    return [part for count, part in parts if count]


class LossesAndSlopes(NamedTuple):
    """What the two terms of one batch make of the network's prediction; all detached."""

    losses_retain: Float[Tensor, "b"]  # w_x l_x, summed over pixels
    losses_forget: Float[Tensor, "b"]
    slopes_retain: Float[Tensor, "b c h w"]  # gradient of w_x l_x over the network's prediction
    slopes_forget: Float[Tensor, "b c h w"]


def effective_sample_size(weights: Float[Tensor, "b"]) -> Float[Tensor, ""]:
    """(sum w)^2 / (b sum w^2): the share of the batch that the weights leave in effect, 0 if none has any."""
    tiny = torch.finfo(weights.dtype).tiny
    return weights.sum().square() / (len(weights) * weights.square().sum() + tiny)
