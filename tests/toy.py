"""Diffusion models and flows of Gaussians, whose scores are known: class c is N(mean_c, std_c^2) in each pixel."""

from types import SimpleNamespace

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from unlearn_runner.models.ddpm import ddpm
from unlearn_runner.models.diffusion import Diffusion


class GaussianUNet(nn.Module):
    """eps_theta of these Gaussians, exact for the means and standard deviations that are its weights."""

    def __init__(self, means, stds, side, alphas_cumprod):
        super().__init__()
        self.means = nn.Parameter(torch.as_tensor(means))
        self.log_stds = nn.Parameter(torch.as_tensor(stds).log())
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        self.config = SimpleNamespace(sample_size=side, in_channels=1, num_class_embeds=len(means))

    def forward(self, x_t, timesteps, class_labels=None, return_dict=True):
        abar = self.alphas_cumprod[timesteps][:, None, None, None]
        mean, std = (part[class_labels][:, None, None, None] for part in (self.means, self.log_stds.exp()))
        return ((1 - abar).sqrt() * (x_t - abar.sqrt() * mean) / (abar * std**2 + 1 - abar),)


class GaussianFlow(nn.Module):
    """The velocity of these Gaussians; it is told t T."""

    def __init__(self, means, stds, side):
        super().__init__()
        self.means = nn.Parameter(torch.as_tensor(means))
        self.log_stds = nn.Parameter(torch.as_tensor(stds).log())
        self.config = SimpleNamespace(sample_size=side, in_channels=1, num_class_embeds=len(means))

    def forward(self, x_t, told, class_labels=None, return_dict=True):
        t = (told / 1000)[:, None, None, None]
        mean, std = (part[class_labels][:, None, None, None] for part in (self.means, self.log_stds.exp()))
        share = (x_t - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
        return (t * share - mean - (1 - t) * std**2 * share,)


def gaussian_flow(means, stds, side=2) -> Diffusion:
    return ddpm(GaussianFlow(means, stds, side), FlowMatchEulerDiscreteScheduler(1000))


def gaussian_model(means, stds, side=2) -> Diffusion:
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02)
    alphas_cumprod = scheduler.alphas_cumprod.to(torch.get_default_dtype())
    model = ddpm(GaussianUNet(means, stds, side, alphas_cumprod), scheduler)
    model.path.schedule.alphas_cumprod = alphas_cumprod
    return model


def drawn_gaussian(model, label: int) -> tuple[float, float]:
    """Mean and standard deviation over all pixels of what a model draws under a label."""
    images = model.predict(
        torch.randn((20_000, *model.sample_shape), generator=torch.Generator().manual_seed(0)),
        torch.zeros(20_000, dtype=torch.int64),
        torch.full((20_000,), label),
    )
    return images.mean().item(), images.std().item()
