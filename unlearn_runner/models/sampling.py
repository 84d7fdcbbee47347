"""From noise to x0 by one of diffusers' samplers."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from unlearn_runner.models.model import DiffusionModel


def sampling_scheduler(config: Mapping[str, Any], sampler: str, num_inference_steps: int, **more: Any) -> Any:
    """The sampler "ddim" (deterministic, eta = 0, 2010.02502) or "ddpm" (ancestral) on the schedule of `config`."""
    from diffusers import DDIMScheduler, DDPMScheduler

    if sampler == "ddpm":
        scheduler = DDPMScheduler.from_config(config, **more)
    else:
        # "trailing" starts at the last timestep, where the noise is that of the first draw.
        scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", **more)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


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
