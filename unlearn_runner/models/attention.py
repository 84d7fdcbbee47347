"""Self-attention of small UNets on a CPU, faster on the way back than torch's own.

torch's kernel for the CPU recomputes softmax block by block, for long sequences and wide heads. A UNet of 28x28 pixels
has 49 to 784 positions and, in diffusers, heads of 8 channels: whole matrices of weights, with the channels before the
positions, in which matrix products of this shape are twice as fast, need 0.5 to 0.6 times torch's time forward and
back (docs/benchmarks.md).

# Notation (variable -> Attention Is All You Need, 1706.03762, equation 1; transposed)
# query -> Q^T / sqrt(d_k);  key, value -> K^T, V^T;  weights -> softmax(Q K^T / sqrt(d_k));  answer -> (weights V)^T
"""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

KEPT = 2**24  # bytes: larger matrices of weights are computed again on the way back


class ChannelsFirstAttention(torch.autograd.Function):
    """softmax(query^T key) applied to value, with `b` heads of `d` channels, `q` and `k` positions."""

    @staticmethod
    def forward(
        ctx: Any, query: Float[Tensor, "b d q"], key: Float[Tensor, "b d k"], value: Float[Tensor, "b d k"]
    ) -> Float[Tensor, "b d q"]:
        weights = _weights(query, key)
        answer = torch.bmm(value, weights.transpose(1, 2))
        kept = weights if weights.nbytes <= KEPT else None
        ctx.save_for_backward(query, key, value, answer, kept)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Float[Tensor, "b d q"]) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, answer, weights = ctx.saved_tensors
        if weights is None:
            weights = _weights(query, key)
        over_value = torch.bmm(slope, weights)
        # The slope over the products Q K^T: weights (over_weights - their mean under weights).
        over_weights = torch.bmm(slope.transpose(1, 2), value)
        mean = (slope * answer).sum(1).unsqueeze(2)
        over_products = over_weights.sub_(mean).mul_(weights)
        return torch.bmm(key, over_products.transpose(1, 2)), torch.bmm(query, over_products), over_value


def _weights(query: Float[Tensor, "b d q"], key: Float[Tensor, "b d k"]) -> Float[Tensor, "b q k"]:
    return torch.bmm(query.transpose(1, 2), key).softmax(-1)


class ChannelsFirstProcessor(AttnProcessor2_0):
    """diffusers' attention, but where float32 passes on a CPU are to be followed back: those by ChannelsFirstAttention.

    Equal up to rounding. Passes of sampling stay diffusers' own to the bit.
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
        ours = torch.is_grad_enabled() and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if not ours or attn.group_norm is None or not attn.residual_connection:
            return super().__call__(attn, x, encoder_hidden_states, attention_mask, temb)
        b, c, h, w = x.shape
        positions = attn.group_norm(x.view(b, c, h * w)).transpose(1, 2)
        query, key, value = (
            layer(positions).transpose(1, 2).reshape(b * attn.heads, -1, h * w)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        answer = ChannelsFirstAttention.apply(query * attn.scale, key, value).view(b, -1, h * w)
        for layer in attn.to_out:  # projection, dropout
            answer = layer(answer.transpose(1, 2)).transpose(1, 2)
        return (answer.reshape(b, c, h, w) + x) / attn.rescale_output_factor


def attend(unet: nn.Module, processor: AttnProcessor2_0) -> None:
    """Let this processor compute all attention of a UNet."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(processor)
