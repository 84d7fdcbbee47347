"""Types of options, with their ranges: what a constructor's annotations say about a value of the configuration.

`unlearn_runner.validation` checks a whole configuration against the annotations of all constructors it names, before
any of them is imported. Imports nothing heavy. For an option of one constructor alone write `Literal[...]` or
`Annotated` there.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypedDict

from annotated_types import Ge, Gt, Le, Lt, MinLen, Predicate

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
Seeds: TypeAlias = Annotated[Sequence[Seed], MinLen(1)]
BatchSize: TypeAlias = Annotated[int, Gt(0), Le(2**20)]
NumSamples: TypeAlias = Annotated[int, Gt(0), Le(10_000_000)]
NumInferenceSteps: TypeAlias = Annotated[int, Gt(0), Le(100_000)]
Contamination: TypeAlias = Annotated[float, Gt(0), Le(0.99)]  # at 0.99 there are 99 strangers for each clean image
ImageSize: TypeAlias = Annotated[int, Ge(8), Le(4096)]  # pixels a side
Width: TypeAlias = Annotated[int, Gt(0), Le(2**14)]  # channels or features of a layer
Channels: TypeAlias = Annotated[Sequence[Width], MinLen(1)]  # of a network's levels
Trainable: TypeAlias = Literal["full", "cross_attention", "cross_attention_kv", "not_cross_attention", "lora"]
# of a network, what leaves its base as it is
TUNING = ("trainable", "lora_rank", "gradient_checkpointing", "frozen_dtype", "texts_on_cpu")
FrozenType: TypeAlias = Literal["float32", "bfloat16"]  # of weights that stay as they are
GuidanceScale: TypeAlias = Annotated[float, Ge(1), Le(1000)]  # 1 is none
NumTokens: TypeAlias = Annotated[int, Ge(3), Le(1024)]  # of a text, its start and end among them
PredictionType: TypeAlias = Literal["epsilon", "v_prediction", "flow"]
Sampler: TypeAlias = Literal["ddim", "ddim_clipped", "ddpm"]
Features: TypeAlias = Literal["classifier", "inception", "efficientnet", "open_clip", "dinov2"]
References: TypeAlias = Literal["auto", "training", "held_out"]
Bootstrap: TypeAlias = Annotated[int, Ge(20), Le(100_000)]  # resamplings
Depth: TypeAlias = Annotated[int, Gt(0), Le(256)]  # layers or heads
Names: TypeAlias = str | int | Sequence[str | int]  # one or several; a name may look like a number


class AutoencoderOptions(TypedDict, total=False):
    """Of diffusers' AutoencoderKL."""

    block_out_channels: Channels
    latent_channels: Width
    norm_num_groups: Width


def _automatic(value: str) -> bool:
    """that is auto, or auto_<its first value>"""
    first = value.removeprefix("auto_")
    return value == "auto" or (first != value and first.replace(".", "", 1).isdecimal() and float(first) > 0)


class NetArch(TypedDict, total=False):
    """Layers of Stable-Baselines3's actor and of its critic."""

    pi: Sequence[Width]
    vf: Sequence[Width]
    qf: Sequence[Width]


class PolicyOptions(TypedDict, total=False):
    """Of Stable-Baselines3's MlpPolicy, as far as plain values can give them."""

    net_arch: Sequence[Width] | NetArch
    log_std_init: float
    ortho_init: bool
    full_std: bool
    use_expln: bool
    clip_mean: PositiveFloat
    n_critics: PositiveInt
    share_features_extractor: bool
    optimizer_kwargs: Mapping[str, Any]


# What the constructors of other libraries take, by library and option, where their annotations say more than can work.
# Of a union those arms count that are the annotation's, too: `eps` is a number to AdamW and a pair to Adafactor.
FOREIGN: dict[str, dict[str, Any]] = {  # the first that a _target_ begins with
    "torch.optim.lr_scheduler.": {
        "gamma": NonNegativeFloat,
        "step_size": PositiveInt,
        "milestones": Sequence[NonNegativeInt],
        "total_iters": NonNegativeInt,
        "power": PositiveFloat,
        "T_max": PositiveInt,
        "T_0": PositiveInt,
        "T_mult": PositiveInt,
        "eta_min": NonNegativeFloat,
        "base_lr": NonNegativeFloat | Sequence[NonNegativeFloat],
        "max_lr": LearningRate | Sequence[LearningRate],
        "step_size_up": PositiveInt,
        "step_size_down": NonNegativeInt | None,
        "base_momentum": Decay | Sequence[Decay],
        "max_momentum": Decay | Sequence[Decay],
        "total_steps": PositiveInt | None,
        "epochs": PositiveInt | None,
        "steps_per_epoch": PositiveInt | None,
        "pct_start": UnitInterval,
        "div_factor": PositiveFloat,
        "final_div_factor": PositiveFloat,
        "last_epoch": Literal[-1],  # a resumed run takes the schedule's state from its checkpoint
    },
    "torch.optim.": {
        "lr": LearningRate,
        "betas": tuple[Decay, Decay],
        "eps": PositiveFloat | tuple[PositiveFloat | None, PositiveFloat],
        "weight_decay": NonNegativeFloat,
        "momentum": Decay,
        "differentiable": Literal[False],  # a step changes the weights in place
    },
    "diffusers.optimization.": {
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
        "num_cycles": PositiveInt | PositiveFloat,  # whole restarts, or periods of the cosine
        "power": PositiveFloat,
        "lr_end": NonNegativeFloat,
        "f_min": NonNegativeFloat,
        "f_max": PositiveFloat,
        "last_epoch": Literal[-1],
    },
    "stable_baselines3.": {
        "policy": Literal["MlpPolicy"],
        "learning_rate": LearningRate,
        "batch_size": BatchSize,
        "n_steps": PositiveInt,
        "n_epochs": PositiveInt,
        "gamma": UnitInterval,
        "gae_lambda": UnitInterval,
        "clip_range": PositiveFloat,
        "clip_range_vf": PositiveFloat | None,
        "ent_coef": NonNegativeFloat | Annotated[str, Predicate(_automatic)],
        "vf_coef": NonNegativeFloat,
        "max_grad_norm": PositiveFloat,
        "target_kl": PositiveFloat | None,
        "tau": Annotated[float, Gt(0), Le(1)],
        "buffer_size": Annotated[int, Gt(0), Le(10_000_000)],
        "learning_starts": NonNegativeInt,
        "train_freq": PositiveInt,  # steps; rollouts of episodes (SB3: a pair) are not the runner's
        "gradient_steps": PositiveInt | Literal[-1],
        "target_update_interval": PositiveInt,
        "target_entropy": float | Literal["auto"],
        "stats_window_size": PositiveInt,
        "policy_kwargs": PolicyOptions | None,
    },
}

_DERIVED = "it is what others derive from, and does nothing itself"
_OF_OTHERS = "it is made of other schedules, which have an optimizer already; a configuration has none to give them"
CANNOT_STEP = {  # the runner's step: one dense gradient, and then the schedule's step, without arguments
    "torch.optim.Optimizer": _DERIVED,
    "torch.optim.LBFGS": "it computes the loss several times in a step; here a step has one gradient",
    "torch.optim.SparseAdam": "it takes sparse gradients only; here they are dense",
    "torch.optim.lr_scheduler.LRScheduler": _DERIVED,
    "torch.optim.lr_scheduler.ReduceLROnPlateau": "it asks for a score at every step; here there is none",
    "torch.optim.lr_scheduler.ChainedScheduler": _OF_OTHERS,
    "torch.optim.lr_scheduler.SequentialLR": _OF_OTHERS,
}
