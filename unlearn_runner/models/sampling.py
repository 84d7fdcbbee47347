"""From noise to x0 on a model's path: by diffusers' samplers, or by the path's own step."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.models.model import Condition, DiffusionModel
from unlearn_runner.models.path import Gaussian, Path


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


class Stepped(NamedTuple):
    """What a step leaves, under diffusers' name."""

    prev_sample: Float[Tensor, "b c h w"]


@final
class PathSampler:
    """The path's own step with the face of diffusers' schedulers, for paths on which theirs cannot go.

    "ddim": eta 0, on a flow Euler's steps on dx/dt = v; "ddim_clipped": x0_pred is cut to [-1, 1] at every step;
    "ddpm": eta 1.
    """

    def __init__(self, path: Path, sampler: str, num_inference_steps: int):
        self.path, self.clips, self.eta = path, sampler == "ddim_clipped", float(sampler == "ddpm")
        self.times = path.times(num_inference_steps)
        self.after = dict(zip(self.times.tolist(), self.times.tolist()[1:], strict=False))

    @property
    def timesteps(self) -> Int64[Tensor, "steps"]:
        return self.times[:-1]

    def step(
        self,
        prediction: Float[Tensor, "b c h w"],
        t: Int64[Tensor, ""],
        x_t: Float[Tensor, "b c h w"],
        generator: torch.Generator,
    ) -> Stepped:
        now, then = (x_t.new_full((len(x_t),), time, dtype=torch.int64) for time in (int(t), self.after[int(t)]))
        after = self.path.step(x_t, prediction, now, then, self.eta, self.clips)
        if self.eta == 0:
            return Stepped(after.mean)
        return Stepped(after.sample(torch.randn(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)))


def sampler_of(path: Path, config: Mapping[str, Any], sampler: str, num_inference_steps: int, **more: Any) -> Any:
    """A sampler on a path: diffusers', made of `config` and `more`, where the path preserves the variance."""
    if path.schedule.variance_preserving:
        return sampling_scheduler(config, sampler, num_inference_steps, **more)
    return PathSampler(path, sampler, num_inference_steps)


def denoise(
    model: DiffusionModel,
    scheduler: Any,
    x: Float[Tensor, "b c h w"],
    cond: Shaped[Tensor, "b ..."] | Condition | None,
    generator: torch.Generator,
) -> Float[Tensor, "b c h w"]:
    """The x0 that the sampler makes of the noise x."""
    for t in scheduler.timesteps:
        prediction = model.guided(x, t.to(x.device).expand(len(x)), cond)
        x = scheduler.step(prediction, t, x, generator=generator).prev_sample
    return x


def walk(
    model: DiffusionModel,
    x: Float[Tensor, "b l i j"],
    times: Int64[Tensor, "times"],
    cond: Shaped[Tensor, "b ..."] | Condition | None,
    generator: torch.Generator,
    noise: float = 1.0,
    pull: Callable[[Tensor, Tensor], Tensor] | None = None,
    hold: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Float[Tensor, "b l i j"]:
    """The x0 that the path's ancestral steps (eta 1) make of x at the first of `times`: with ways to step in that
    samplers have not. Over pixels the guess of x0 is cut to [-1, 1].

    `noise`: the fresh noise of each step times this. `pull(x_t, t)`: the gradient of a log-density at x_t, which each
    step follows as classifier guidance does (2105.05233, algorithm 1). `hold(x, t)`: what takes the place of x after
    a step to t, which is -1 at the end.
    """
    clips = model.sample_shape == model.image_shape
    for now, then in pairwise(times.tolist()):
        t, t_next = (torch.full((len(x),), time, device=x.device) for time in (now, then))
        mean, std = model.path.step(x, model.guided(x, t, cond), t, t_next, eta=1.0, clips=clips)
        if pull is not None:
            mean = mean + std.square() * pull(x, t)
        fresh = torch.randn(x.shape, generator=generator, device=x.device)
        x = Gaussian(mean, noise * std).sample(fresh)
        if hold is not None:
            x = hold(x, t_next)
    return x
