"""Probability paths: how an image becomes noise, what a network may predict on the way, and the step back.

A `Path` is made of a schedule, which says how much of the image and of noise there is in x_t = scale x0 + std eps, and
of a prediction, which says what the network predicts. Everything else of the runner asks the path.

# Notation (variable -> papers)
# scale, std -> gamma_t, sigma_t of a variance-preserving diffusion (2006.11239); 1 - t, t of a flow (2210.02747)
# ratio, added -> x_t = ratio x_s + sqrt(added) eps, what noise is added from s to t
# prediction -> eps_theta, v_theta (2202.00512, section 4), or the velocity u_theta = eps - x0 of a flow
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.rules import method_options

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

Images = Float[Tensor, "b c h w"]
Along = Float[Tensor, "#b 1 1 1"]  # a number for each image


class Amplitudes(NamedTuple):
    """x_t = scale x0 + std eps."""

    scale: Along
    std: Along


class Gaussian(NamedTuple):
    """N(mean, std^2), independent over the entries of an image; where std is 0, the mean alone."""

    mean: Images
    std: Along

    def sample(self, noise: Images) -> Images:
        """The x that standard normal `noise` makes."""
        return torch.where(self.std == 0, self.mean, self.mean + self.std * noise)

    def log_prob(self, x: Images) -> Float[Tensor, "b"]:
        """The log-density of x, summed over its entries; 0 where there is none, for std is 0."""
        certain = self.std == 0
        std = torch.where(certain, 1.0, self.std)
        density = -((x - self.mean) / std).square() / 2 - std.log() - 0.5 * math.log(2 * math.pi)
        return torch.where(certain, 0.0, density).flatten(1).sum(1)


# 1. What the network predicts


class Prediction(ABC):
    """What a network predicts at x_t, and what that says of the noise and of the image."""

    @abstractmethod
    def wanted(self, x0: Images, eps: Images, at: Amplitudes) -> Images:
        """What it should predict."""

    @abstractmethod
    def noise(self, prediction: Images, x_t: Images, at: Amplitudes) -> Images:
        """eps_pred."""

    @abstractmethod
    def image(self, prediction: Images, x_t: Images, at: Amplitudes) -> Images:
        """x0_pred; not cut to [-1, 1]."""


@final
class Epsilon(Prediction):
    """The noise (2006.11239). It says nothing of the image where x_t is pure noise."""

    def wanted(self, x0: Images, eps: Images, at: Amplitudes) -> Images:
        return eps

    def noise(self, prediction: Images, x_t: Images, at: Amplitudes) -> Images:
        return prediction

    def image(self, prediction: Images, x_t: Images, at: Amplitudes) -> Images:
        return (x_t - at.std * prediction) / at.scale


@final
class V(Prediction):
    """scale eps - std x0 of a variance-preserving schedule (Salimans and Ho 2022, 2202.00512)."""

    def wanted(self, x0: Images, eps: Images, at: Amplitudes) -> Images:
        return at.scale * eps - at.std * x0

    def noise(self, prediction: Images, x_t: Images, at: Amplitudes) -> Images:
        return at.scale * prediction + at.std * x_t

    def image(self, prediction: Images, x_t: Images, at: Amplitudes) -> Images:
        return at.scale * x_t - at.std * prediction


@final
class Velocity(Prediction):
    """eps - x0, the velocity dx/dt of a straight path (2210.02747)."""

    def wanted(self, x0: Images, eps: Images, at: Amplitudes) -> Images:
        return eps - x0

    def noise(self, prediction: Images, x_t: Images, at: Amplitudes) -> Images:
        return x_t + at.scale * prediction

    def image(self, prediction: Images, x_t: Images, at: Amplitudes) -> Images:
        return x_t - at.std * prediction


PREDICTIONS: dict[str, Prediction] = {"epsilon": Epsilon(), "v_prediction": V(), "flow": Velocity()}


# 2. How much noise there is


class Levels(NamedTuple):
    """A schedule in double precision, at every timestep at which there is some of x0 in x_t.

    With zero terminal SNR, and on a flow, there is none at the last, which is standard normal as the prior is.
    """

    scales: np.ndarray  # [t]
    stds: np.ndarray  # [t]
    added: np.ndarray  # [t - 1]: the variance of the noise that is added from each timestep to the next


class Drift(NamedTuple):
    """dx/du of the probability-flow ODE. Its divergence is gain div(learned) + known, the latter for each entry."""

    velocity: Images  # detached
    learned: Images  # with its graph
    gain: float
    known: float


class ProbabilityFlow(ABC):
    """The ODE with the marginals of the path (Song et al. 2021, 2011.13456, equation 13), in the schedule's own time u.

    From `start`, the first timestep, where x = scale x0, to `end`, where x is standard normal.
    """

    start: float
    end: float
    scale: float

    @abstractmethod
    def timestep(self, u: float) -> float:
        """Where the network is asked; between two timesteps of the schedule."""

    @abstractmethod
    def drift(self, prediction: Images, x: Images, u: float) -> Drift: ...


class Schedule(nn.Module, ABC):
    """scale_t and std_t for timesteps 0..T-1, the noise growing; timestep -1 is the image itself."""

    variance_preserving: bool  # scale^2 + std^2 = 1, which diffusers' DDIM and DDPM ask for
    predictions: tuple[str, ...]  # what a network may predict on it

    @property
    @abstractmethod
    def num_train_timesteps(self) -> int: ...

    @abstractmethod
    def amplitudes(self, timesteps: Int64[Tensor, "b"]) -> Amplitudes: ...

    @abstractmethod
    def added(self, ratio: Tensor, std: Tensor, std_before: Tensor) -> Tensor:
        """The variance of x_t given x_s, where scale_t = ratio scale_s."""

    @abstractmethod
    def network_time(self, timesteps: Shaped[Tensor, "b"]) -> Shaped[Tensor, "b"]:
        """What the network receives for timesteps, which may lie between two."""

    @abstractmethod
    def magnitude(self, timesteps: Int64[Tensor, "b"]) -> Along | float:
        """The standard deviation of x_t's entries if those of images have 1."""

    @abstractmethod
    def levels(self) -> Levels: ...

    @abstractmethod
    def probability_flow(self, prediction: Prediction) -> ProbabilityFlow: ...


@final
class VariancePreserving(Schedule):
    """scale = sqrt(abar_t), std = sqrt(1 - abar_t) (DDPM, 2006.11239); abar may be 0 at the end (2305.08891)."""

    variance_preserving = True
    predictions = ("epsilon", "v_prediction")

    def __init__(self, alphas_cumprod: Float[Tensor, "T"]):
        super().__init__()
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def amplitudes(self, timesteps: Int64[Tensor, "b"]) -> Amplitudes:
        timesteps = timesteps.to(self.alphas_cumprod.device)
        abar = torch.where(timesteps < 0, 1.0, self.alphas_cumprod[timesteps])[:, None, None, None]
        return Amplitudes(abar.sqrt(), (1 - abar).sqrt())

    def added(self, ratio: Tensor, std: Tensor, std_before: Tensor) -> Tensor:
        return 1 - ratio.square()

    def network_time(self, timesteps: Shaped[Tensor, "b"]) -> Shaped[Tensor, "b"]:
        return timesteps

    def magnitude(self, timesteps: Int64[Tensor, "b"]) -> float:
        return 1.0

    def levels(self) -> Levels:
        every = torch.arange(self.num_train_timesteps, device=self.alphas_cumprod.device)
        scales = self.amplitudes(every).scale.double().cpu().numpy().ravel()
        scales = scales[scales > 0]
        return Levels(scales, np.sqrt(1 - scales**2), 1 - (scales[1:] / scales[:-1]) ** 2)

    def probability_flow(self, prediction: Prediction) -> "VariancePreservingFlow":
        return VariancePreservingFlow(self.levels(), prediction.noise)


@final
class VariancePreservingFlow(ProbabilityFlow):
    """In u = log(std / scale): dx/du = std (eps_theta - std x). Between timesteps, t is linear in u."""

    def __init__(self, levels: Levels, noise: Callable[[Images, Images, Amplitudes], Images]):
        self.log_ratios = np.log(levels.stds / levels.scales)
        self.start, self.end, self.scale = self.log_ratios[0], self.log_ratios[-1], levels.scales[0]
        self.noise = noise

    def timestep(self, u: float) -> float:
        return float(np.interp(u, self.log_ratios, np.arange(len(self.log_ratios))))

    def drift(self, prediction: Images, x: Images, u: float) -> Drift:
        scale, std = 1 / math.sqrt(1 + math.exp(2 * u)), 1 / math.sqrt(1 + math.exp(-2 * u))
        eps = self.noise(prediction, x, Amplitudes(*(x.new_full((1, 1, 1, 1), part) for part in (scale, std))))
        return Drift(std * (eps.detach() - std * x.detach()), eps, std, -(std**2))


def shifted(s: Any, shift: float) -> Any:
    """shift s / (1 + (shift - 1) s), from [0, 1] to [0, 1]; 1 / shift leads back."""
    return s if shift == 1 else shift * s / (1 + (shift - 1) * s)


@final
class Straight(Schedule):
    """scale = 1 - t, std = t (flow matching, 2210.02747; rectified flow, 2209.03003), at T timesteps.

    They are even in s = (timestep + 1) / T, and t = shift s / (1 + (shift - 1) s): above 1 `shift` draws and trains at
    more noise (2403.03206, section 5.3.2, alpha). The last timestep is pure noise. The network receives t T, as
    diffusers' FlowMatchEulerDiscreteScheduler tells it.
    """

    variance_preserving = False
    predictions = ("flow",)

    def __init__(self, num_train_timesteps: int, shift: float = 1.0):
        super().__init__()
        self.count = num_train_timesteps
        self.shift = shift

    @property
    def num_train_timesteps(self) -> int:
        return self.count

    def amplitudes(self, timesteps: Shaped[Tensor, "b"]) -> Amplitudes:
        std = shifted((timesteps + 1) / self.count, self.shift)[:, None, None, None]
        return Amplitudes(1 - std, std)

    def added(self, ratio: Tensor, std: Tensor, std_before: Tensor) -> Tensor:
        return std.square() - (ratio * std_before).square()

    def network_time(self, timesteps: Shaped[Tensor, "b"]) -> Shaped[Tensor, "b"]:
        if self.shift == 1:
            return timesteps + 1
        return shifted((timesteps + 1) / self.count, self.shift) * self.count

    def magnitude(self, timesteps: Int64[Tensor, "b"]) -> Along:
        scale, std = self.amplitudes(timesteps)
        return (scale.square() + std.square()).sqrt()

    def levels(self) -> Levels:
        stds = shifted(np.arange(1, self.count) / self.count, self.shift)
        scales = 1 - stds
        return Levels(scales, stds, stds[1:] ** 2 - (scales[1:] / scales[:-1] * stds[:-1]) ** 2)

    def probability_flow(self, prediction: Prediction) -> "StraightFlow":
        return StraightFlow(self.count, self.shift)

    def extra_repr(self) -> str:
        return f"num_train_timesteps={self.count}" + (f", shift={self.shift}" if self.shift != 1 else "")


@final
class StraightFlow(ProbabilityFlow):
    """In u = t: dx/dt is the network's prediction."""

    end = 1.0

    def __init__(self, num_train_timesteps: int, shift: float = 1.0):
        self.count, self.shift = num_train_timesteps, shift
        self.start = shifted(1 / num_train_timesteps, shift)
        self.scale = 1 - self.start

    def timestep(self, u: float) -> float:
        return shifted(u, 1 / self.shift) * self.count - 1

    def drift(self, prediction: Images, x: Images, u: float) -> Drift:
        return Drift(prediction.detach(), prediction, 1.0, 0.0)


# 3. Both together


@final
class Path(nn.Module):
    """x_t = scale_t x0 + std_t eps for timesteps t in 0..T-1 (-1 is x0 itself), and a network that predicts on it.

    Nothing divides by a scale where it may be 0.

    Raises ConfigurationError if the network's prediction says nothing on this schedule.
    """

    def __init__(self, schedule: Schedule, prediction_type: str):
        super().__init__()
        if prediction_type not in schedule.predictions:
            known = ", ".join(schedule.predictions)
            raise ConfigurationError(f"the model's prediction_type must be one of {known}, got '{prediction_type}'.")
        every = torch.arange(schedule.num_train_timesteps)
        if prediction_type == "epsilon" and not bool((schedule.amplitudes(every).scale > 0).all()):
            raise ConfigurationError(
                "on a schedule with zero terminal SNR (rescale_betas_zero_snr) the model's prediction_type must be "
                "v_prediction, got 'epsilon', which tells nothing of the image where there is only noise."
            )
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.prediction = PREDICTIONS[prediction_type]

    @property
    def num_train_timesteps(self) -> int:
        return self.schedule.num_train_timesteps

    def amplitudes(self, timesteps: Int64[Tensor, "b"]) -> Amplitudes:
        """Of the image and of the noise in x_t."""
        return self.schedule.amplitudes(timesteps)

    def wanted(self, x0: Images, eps: Images, timesteps: Int64[Tensor, "b"]) -> Images:
        """What the network should predict at the x_t made of x0 and eps."""
        return self.prediction.wanted(x0, eps, self.amplitudes(timesteps))

    @property
    def wants_the_image(self) -> bool:
        """Whether `wanted` depends on x0."""
        return self.prediction_type != "epsilon"

    def noise_of(self, prediction: Images, x_t: Images, timesteps: Int64[Tensor, "b"]) -> Images:
        """eps_pred from the network's prediction, whatever it predicts."""
        return self.prediction.noise(prediction, x_t, self.amplitudes(timesteps))

    def x0_of(self, prediction: Images, x_t: Images, timesteps: Int64[Tensor, "b"]) -> Images:
        """x0_pred from the network's prediction; not cut to [-1, 1]."""
        return self.prediction.image(prediction, x_t, self.amplitudes(timesteps))

    def transition(self, earlier: Int64[Tensor, "b"], later: Int64[Tensor, "b"]) -> tuple[Along, Along]:
        """ratio and added of q(x_later | x_earlier) = N(ratio x_earlier, added), there being more noise in x_later."""
        (scale_before, std_before), (scale, std) = self.amplitudes(earlier), self.amplitudes(later)
        ratio = scale / scale_before.clamp(min=torch.finfo(scale_before.dtype).tiny)
        return ratio, self.schedule.added(ratio, std, std_before)

    def times(self, num_inference_steps: int) -> Int64[Tensor, "times"]:
        """Timesteps from the noisiest down, evenly spaced, and -1 after the last ("trailing", 2305.08891)."""
        return ladder(self.num_train_timesteps, num_inference_steps)

    def step(
        self,
        x_t: Images,
        prediction: Images,
        t: Int64[Tensor, "b"],
        t_next: Int64[Tensor, "b"],
        eta: float,
        clips: bool = False,
    ) -> Gaussian:
        """What follows x_t at the less noisy t_next, by the network's prediction (DDIM, 2010.02502, equations 12, 16).

        eta 0 is deterministic: DDIM, and on a flow Euler's step on dx/dt = v. eta 1 draws from the posterior
        q(x_next | x_t, x0_pred): DDPM; with small steps on a flow it is the SDE of Flow-GRPO (2505.05470) with
        a = sqrt(2) eta, finite also at t = 1. All have the path's marginals. Where t_next is -1 the picture is done:
        the mean is x0_pred and std 0. `clips`: x0_pred is cut to [-1, 1], and eps_pred leads from there to x_t.
        """
        here = self.amplitudes(t)
        scale_next, std_next = self.amplitudes(t_next)
        _, added = self.transition(t_next, t)
        x0_pred, eps_pred = self.prediction.image(prediction, x_t, here), self.prediction.noise(prediction, x_t, here)
        if clips:
            x0_pred = x0_pred.clamp(-1, 1)
            eps_pred = (x_t - here.scale * x0_pred) / here.std
        fresh = eta * std_next / here.std * added.sqrt()
        mean = scale_next * x0_pred + (std_next.square() - fresh.square()).clamp(min=0).sqrt() * eps_pred
        return Gaussian(mean, fresh)

    def timestep_with_ratio(self, ratio: float, name: str) -> int:
        """The timestep whose std_t / scale_t is nearest to `ratio`: the same noise on every schedule.

        Raises ConfigurationError, which calls the ratio `name`, if the schedule has nothing like it.
        """
        scale, std = (part.flatten() for part in self.amplitudes(torch.arange(self.num_train_timesteps)))
        ratios = (std / scale)[scale > 0]
        method_options.noise_of_schedule(ratio, float(ratios[0]), float(ratios[-1]), name)
        return int((ratios.log() - math.log(ratio)).abs().argmin())

    def probability_flow(self) -> ProbabilityFlow:
        """Its ODE, for likelihoods."""
        return self.schedule.probability_flow(self.prediction)

    def extra_repr(self) -> str:
        return f"prediction_type={self.prediction_type}"


def ladder(num_train_timesteps: int, num_inference_steps: int) -> Int64[Tensor, "times"]:
    """Timesteps from the noisiest down, evenly spaced, and -1 after the last ("trailing", 2305.08891)."""
    share = torch.arange(num_inference_steps, -1, -1, dtype=torch.float64) / num_inference_steps
    return (share * num_train_timesteps).round().long() - 1


def path_of(scheduler: "SchedulerMixin", places: int | None = None) -> Path:
    """The path that a scheduler of diffusers' describes in training, whatever sampler it is.

    `places`: in how many the network sees a picture, on which a flow's shift may depend (FLUX: `use_dynamic_shifting`).
    Raises ConfigurationError if what it predicts says nothing on its schedule, or if it asks for places and there are
    none.
    """
    if is_flow(scheduler):
        return Path(Straight(scheduler.config.num_train_timesteps, shift_of(scheduler.config, places)), "flow")
    return Path(VariancePreserving(training_schedule(scheduler)), scheduler.config.prediction_type)


def shift_of(config: Mapping[str, Any], places: int | None) -> float:
    """Of a flow's scheduler: constant; or a line over the number of places, or its exponential."""
    if not config["use_dynamic_shifting"]:
        return float(config["shift"])
    if places is None:
        raise ConfigurationError(
            "the scheduler's shift depends on the picture's size (use_dynamic_shifting), as this network's cannot."
        )
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    share = (places - low) / (high - low)
    along = config["base_shift"] + share * (config["max_shift"] - config["base_shift"])
    return math.exp(along) if config["time_shift_type"] == "exponential" else along


def is_flow(scheduler: "SchedulerMixin") -> bool:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def training_schedule(scheduler: "SchedulerMixin") -> Float[Tensor, "T"]:
    """alphas_cumprod of the schedule in training, whatever sampler the pipeline has."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(scheduler.config).alphas_cumprod
