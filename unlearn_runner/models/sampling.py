"""From noise to x0 by one of diffusers' samplers."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.models.model import DiffusionModel


def sampling_scheduler(config: Mapping[str, Any], sampler: str, num_inference_steps: int, **more: Any) -> Any:
    """The sampler "ddim" (deterministic, eta = 0, 2010.02502) or "ddpm" (ancestral) on the schedule of `config`.

    Where x0 is clipped, diffusers' DDIM goes on with the eps of the unclipped one; "ddim_clipped" takes the eps that
    leads from x_t to the clipped x0. Over a few hundred steps the difference adds up (docs/metrics.md).
    """
    from diffusers import DDIMScheduler, DDPMScheduler

    if sampler == "ddpm":
        scheduler = DDPMScheduler.from_config(config, **more)
    else:
        # "trailing" starts at the last timestep, where the noise is that of the first draw.
        scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", **more)
        if sampler == "ddim_clipped":
            scheduler.step = partial(scheduler.step, use_clipped_model_output=True)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def ladder(num_train_timesteps: int, num_inference_steps: int) -> Int64[Tensor, "times"]:
    """Timesteps from the noisiest down, evenly spaced, and -1 after the last ("trailing", 2305.08891)."""
    share = torch.arange(num_inference_steps, -1, -1, dtype=torch.float64) / num_inference_steps
    return (share * num_train_timesteps).round().long() - 1


def ddim_step(
    model: DiffusionModel,
    x_t: Float[Tensor, "b c h w"],
    t: Int64[Tensor, "b"],
    t_next: Int64[Tensor, "b"],
    cond: Shaped[Tensor, "b ..."] | None,
    eta: float,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b 1 1 1"]]:
    """Mean and standard deviation of what follows x_t at t_next (2010.02502, equations 12, 16), by the guided answer.

    Where t_next is -1 the picture is done: the mean is x0_pred and the standard deviation 0.
    """
    gamma, sigma = model.gamma_sigma(t)
    last = (t_next < 0)[:, None, None, None]
    gamma_next, sigma_next = model.gamma_sigma(t_next.clamp(min=0))
    gamma_next, sigma_next = torch.where(last, 1.0, gamma_next), torch.where(last, 0.0, sigma_next)
    answer = model.guided(x_t, t, cond)
    x0_pred, eps_pred = (part(answer, x_t, gamma, sigma) for part in (model.x0_of, model.noise_of))
    std = eta * sigma_next / sigma * (1 - (gamma / gamma_next).square()).sqrt()
    mean = gamma_next * x0_pred + (sigma_next.square() - std.square()).clamp(min=0).sqrt() * eps_pred
    return mean, std


def denoise(
    model: DiffusionModel,
    scheduler: Any,
    x: Float[Tensor, "b c h w"],
    cond: Shaped[Tensor, "b ..."] | None,
    generator: torch.Generator,
) -> Float[Tensor, "b c h w"]:
    """The x0 that the sampler makes of the noise x."""
    for t in scheduler.timesteps:
        answer = model.guided(x, t.to(x.device).expand(len(x)), cond)
        x = scheduler.step(answer, t, x, generator=generator).prev_sample
    return x
