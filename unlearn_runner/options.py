"""Types of options, with their ranges: what a constructor's annotations say about a value of the configuration.

`unlearn_runner.validation` checks a whole configuration against the annotations of all constructors it names, before
any of them is imported. Imports nothing heavy. For an option of one constructor alone write `Literal[...]` or
`Annotated` there.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypedDict

from annotated_types import Ge, Gt, Le, Lt, MinLen

LARGEST = 2**31 - 1

PositiveInt: TypeAlias = Annotated[int, Gt(0), Le(LARGEST)]
NonNegativeInt: TypeAlias = Annotated[int, Ge(0), Le(LARGEST)]
PositiveFloat: TypeAlias = Annotated[float, Gt(0)]  # finite, as every float of the configuration
LearningRate: TypeAlias = Annotated[float, Gt(0), Le(1e37)]  # above, float32 overflows
NonNegativeFloat: TypeAlias = Annotated[float, Ge(0)]
UnitInterval: TypeAlias = Annotated[float, Ge(0), Le(1)]  # [0, 1]
OpenUnitInterval: TypeAlias = Annotated[float, Gt(0), Lt(1)]  # (0, 1)
Decay: TypeAlias = Annotated[float, Ge(0), Lt(1)]  # of a moving average: [0, 1)
Seed: TypeAlias = Annotated[int, Ge(0), Lt(2**32)]  # what numpy and Stable-Baselines3 take
BatchSize: TypeAlias = Annotated[int, Gt(0), Le(2**20)]
NumSamples: TypeAlias = Annotated[int, Gt(0), Le(10_000_000)]
NumInferenceSteps: TypeAlias = Annotated[int, Gt(0), Le(100_000)]
Contamination: TypeAlias = Annotated[float, Gt(0), Le(0.99)]  # at 0.99 there are 99 strangers for each clean image
ImageSize: TypeAlias = Annotated[int, Ge(8), Le(4096)]  # pixels a side
Width: TypeAlias = Annotated[int, Gt(0), Le(2**14)]  # channels or features of a layer
Channels: TypeAlias = Annotated[Sequence[Width], MinLen(1)]  # of a network's levels
PredictionType: TypeAlias = Literal["epsilon", "v_prediction"]
Sampler: TypeAlias = Literal["ddim", "ddim_clipped", "ddpm"]
Bootstrap: TypeAlias = Annotated[int, Ge(20), Le(100_000)]  # resamplings
Depth: TypeAlias = Annotated[int, Gt(0), Le(256)]  # layers or heads


class AutoencoderOptions(TypedDict, total=False):
    """Of diffusers' AutoencoderKL."""

    block_out_channels: Channels
    latent_channels: Width
    norm_num_groups: Width


# What the constructors of other libraries (torch.optim, diffusers.optimization, stable_baselines3) take, where they say
# less than they accept.
FOREIGN: dict[str, Any] = {
    "lr": LearningRate,
    "betas": tuple[Decay, Decay],
    "eps": PositiveFloat,
    "weight_decay": NonNegativeFloat,
    "momentum": Decay,
    "name": Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "piecewise_constant",
    ],
    "num_warmup_steps": NonNegativeInt | None,
    "num_training_steps": PositiveInt | None,
    "num_cycles": PositiveInt,
    "power": PositiveFloat,
    "policy": Literal["MlpPolicy"],
    "learning_rate": LearningRate,
    "batch_size": BatchSize,
    "n_steps": PositiveInt,
    "n_epochs": PositiveInt,
    "gamma": UnitInterval,
    "gae_lambda": UnitInterval,
    "clip_range": PositiveFloat,
    "ent_coef": NonNegativeFloat | Literal["auto"],
    "vf_coef": NonNegativeFloat,
    "max_grad_norm": PositiveFloat,
    "tau": Annotated[float, Gt(0), Le(1)],
    "buffer_size": Annotated[int, Gt(0), Le(10_000_000)],
    "learning_starts": NonNegativeInt,
    "train_freq": PositiveInt,
    "gradient_steps": PositiveInt | Literal[-1],
    "policy_kwargs": Mapping[str, Channels] | None,
}
