"""Self-attention of small UNets on a CPU, faster in the backward pass than torch's own.

torch's kernel for the CPU goes block by block, for long sequences and wide heads, and computes its weights again in
the backward pass. A UNet of 28x28 pixels has 49 to 784 positions and, in diffusers, heads of 8 channels: there whole
matrices of weights are faster, with channels before positions, in which matrix products of this shape take half the
time. Measured in docs/benchmarks.md.

# Notation (variable -> Attention Is All You Need, 1706.03762, equation 1; transposed)
# query -> Q^T / sqrt(d_k);  key, value -> K^T, V^T;  weights -> softmax(Q K^T / sqrt(d_k));  output -> (weights V)^T
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

AT_ONCE = 2**23  # bytes of weights: heads are attended to in parts of this size, which leave memory free


class ChannelsFirstAttention(torch.autograd.Function):
    """softmax(query^T key) applied to value, with `b` heads of `d` channels, `q` and `k` positions.

    The weights are computed again in the backward pass: kept, they would be most of a small network's memory.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Float[Tensor, "b d q"], key: Float[Tensor, "b d k"], value: Float[Tensor, "b d k"]
    ) -> Float[Tensor, "b d q"]:
        output = torch.empty_like(query)
        for q, k, v, part in _parts(query, key, value, output):
            torch.bmm(v, _weights(q, k).transpose(1, 2), out=part)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Float[Tensor, "b d q"]) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, output = ctx.saved_tensors
        over = tuple(map(torch.empty_like, (query, key, value)))
        mean = (slope * output).sum(1).unsqueeze(2)  # of the slope over the weights, under the weights
        for q, k, v, part, average, over_q, over_k, over_v in _parts(query, key, value, slope, mean, *over):
            weights = _weights(q, k)
            over_products = torch.bmm(part.transpose(1, 2), v).sub_(average).mul_(weights)
            torch.bmm(k, over_products.transpose(1, 2), out=over_q)
            torch.bmm(q, over_products, out=over_k)
            torch.bmm(part, weights, out=over_v)
        return over


def _weights(query: Float[Tensor, "b d q"], key: Float[Tensor, "b d k"]) -> Float[Tensor, "b q k"]:
    return torch.bmm(query.transpose(1, 2), key).softmax(-1)


def _parts(query: Tensor, key: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """All of these by parts of the heads."""
    heads = max(1, AT_ONCE // (query.shape[2] * key.shape[2] * query.element_size()))
    return zip(*(tensor.split(heads) for tensor in (query, key, *more)), strict=True)


class ChannelsFirstProcessor(AttnProcessor2_0):
    """diffusers' attention, but ChannelsFirstAttention's in float32 on a CPU; equal up to rounding.

    Also where nothing is followed back, which it speeds up little: policy gradients compare a sampler's passes with
    passes of training, and need the same bits of both.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "b c h w"],
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: Float[Tensor, "b e"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        x = hidden_states
        ours = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if not ours or attn.group_norm is None or not attn.residual_connection:
            return super().__call__(attn, x, encoder_hidden_states, attention_mask, temb)
        b, c, h, w = x.shape
        positions = attn.group_norm(x.view(b, c, h * w)).transpose(1, 2)
        query, key, value = (
            layer(positions).transpose(1, 2).reshape(b * attn.heads, -1, h * w)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        output = ChannelsFirstAttention.apply(query * attn.scale, key, value).view(b, -1, h * w)
        for layer in attn.to_out:  # projection, dropout
            output = layer(output.transpose(1, 2)).transpose(1, 2)
        return (output.reshape(b, c, h, w) + x) / attn.rescale_output_factor


def attend(unet: nn.Module, processor: AttnProcessor2_0) -> None:
    """Let this processor compute all attention of a UNet."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(processor)
