"""A network that says of a noisy picture how good what becomes of it will be."""

import copy
import math
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unlearn_runner.models.clip import Clip


@final
class Critic(nn.Module):
    """V(x_t, t, c) in (0, 1): the terminal reward that x_t, a latent or pixels, leads to under a prompt.

    CLIP's image tower, trained along, sees three mixtures of x_t's channels at its own size. Its embedding, CLIP's of
    the prompt, their product and sines of the noise level go through two layers; the logistic function at the end keeps
    the value where rewards can lie.
    """

    def __init__(self, clip: Clip, num_channels: int, hidden_size: int = 64, num_frequencies: int = 8):
        super().__init__()
        self.size = clip.size
        self.mixture = nn.Conv2d(num_channels, 3, 1)
        self.tower = copy.deepcopy(clip.visual).requires_grad_(True)
        frequencies = math.pi * 2.0 ** torch.arange(num_frequencies)
        self.register_buffer("frequencies", frequencies / 2, persistent=False)
        d = clip.num_features
        self.head = nn.Sequential(
            nn.Linear(3 * d + 2 * num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, 1)
        )

    def forward(
        self, x: Float[Tensor, "b c h w"], level: Float[Tensor, "b"], texts: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b"]:
        """`level` is t / T in [0, 1); `texts` are CLIP's embeddings of the prompts, of length 1."""
        seen = self.mixture(x)
        if tuple(seen.shape[-2:]) != self.size:
            seen = F.interpolate(seen, self.size, mode="bilinear")
        picture = F.normalize(self.tower(seen), dim=1)
        angles = level[:, None] * self.frequencies
        scale = texts.shape[1] ** 0.5  # entries of order one
        inputs = torch.cat(
            [picture * scale, texts * scale, picture * texts * scale**2, angles.sin(), angles.cos()], dim=1
        )
        return torch.sigmoid(self.head(inputs).squeeze(1))
