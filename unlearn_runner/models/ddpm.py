"""A diffusion or flow model of pixels: diffusers' UNet2DModel and schedulers behind the face that methods and
evaluation use.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import torch
from annotated_types import Ge, Le
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.diffusion import Backbone, Diffusion, Pixels
from unlearn_runner.models.loading import (
    check_weights,
    network_in,
    part_of,
    reading,
    require_channels,
    scheduler_in,
)
from unlearn_runner.models.model import Condition, labels_in_words, pipeline_name
from unlearn_runner.options import Channels, Decay, Depth, OpenUnitInterval, PredictionType, Width
from unlearn_runner.rules import model_options
from unlearn_runner.weights import fetched, located

if TYPE_CHECKING:
    from diffusers import UNet2DModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


@final
class ClassUNet(Backbone):
    """UNet2DModel, class-conditional or not. Conditions are class indices [b], or None; it knows no null condition."""

    flows = True

    def __init__(self, unet: "UNet2DModel"):
        super().__init__()
        from unlearn_runner.models.attention import ChannelsFirstProcessor, attend

        attend(unet, ChannelsFirstProcessor())
        self.unet = unet

    @property
    def network(self) -> "UNet2DModel":
        return self.unet

    @property
    def num_labels(self) -> int | None:
        return self.unet.config.num_class_embeds

    def conditions(self, cond: Int64[Tensor, "b"] | None) -> Condition:
        return Condition(label=cond)

    def empty(self, count: int) -> None:
        return None

    def forward(
        self, x_t: Float[Tensor, "b c h w"], time: Shaped[Tensor, "b"], condition: Condition
    ) -> Float[Tensor, "b c h w"]:
        return self.unet(x_t, time, class_labels=condition.label, return_dict=False)[0]

    def freeze_for_unlearning(self) -> None:
        """Nothing to freeze."""

    @property
    def networks(self) -> dict[str, Any]:
        return {"unet": self.unet}

    @property
    def components(self) -> dict[str, Any]:
        return {"unet": self.unet}

    def save(self, components: dict[str, Any], folder: Path) -> None:
        from diffusers import DDPMPipeline

        DDPMPipeline(**components).save_pretrained(folder, safe_serialization=True)


def ddpm(unet: "UNet2DModel", scheduler: "SchedulerMixin") -> Diffusion:
    """Denoising diffusion over pixels (Ho et al. 2020, 2006.11239), or a flow over them.

    The scheduler says on which path, and what the network predicts.
    """
    size = unet.config.sample_size
    shape = (unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
    return Diffusion(ClassUNet(unet), Pixels(shape), scheduler)


def build_ddpm(
    image_shape: Sequence[int],
    label_names: Sequence[str] | None,
    seed: int,
    weights: str,
    block_out_channels: Channels,
    attention: Sequence[bool],
    layers_per_block: Depth = 1,
    norm_num_groups: Width = 16,
    attention_head_dim: Width = 8,
    dropout: Decay = 0.0,
    prediction_type: PredictionType = "epsilon",
    num_train_timesteps: Annotated[int, Ge(2), Le(100_000)] = 1000,
    beta_start: OpenUnitInterval = 1e-4,
    beta_end: OpenUnitInterval = 0.02,
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear",
) -> Diffusion:
    """A DDPM with fresh weights drawn from `seed`.

    With `prediction_type` "flow" it is a flow on straight paths (2210.02747), which knows no betas; else a diffusion.
    Conditional on as many labels as there are `label_names`, unconditional where that is None. `attention` says which
    resolutions have self-attention. Where `weights` is not "auto" but a folder or hub id, that decides the architecture
    and the schedule, and all further arguments are without effect; it is checked here and its weights are read later,
    by `load`.
    """
    num_labels = None if label_names is None else len(label_names)
    if weights != "auto":
        network = _configured_as(weights, image_shape, num_labels)
        model_options.prediction_of_weights(weights, prediction_type, network.path.prediction_type)
        return network
    model_options.timesteps_of_flow(weights, prediction_type, num_train_timesteps)
    model_options.levels_of_attention(weights, attention, block_out_channels)
    model_options.groups_of_channels(weights, block_out_channels, norm_num_groups)
    model_options.heads_of_channels(weights, block_out_channels, attention, attention_head_dim)
    model_options.range_of_betas(weights, beta_start, beta_end, beta_schedule)
    model_options.sides_that_halve(*image_shape[1:], len(block_out_channels) - 1, len(block_out_channels))
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

    if prediction_type == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps)
    else:
        scheduler = DDPMScheduler(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            prediction_type=prediction_type,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # nn.Module's initialisers know no other generator
        unet = UNet2DModel(
            sample_size=image_shape[1] if image_shape[1] == image_shape[2] else list(image_shape[1:]),
            in_channels=image_shape[0],
            out_channels=image_shape[0],
            block_out_channels=tuple(block_out_channels),
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            attention_head_dim=attention_head_dim,
            dropout=dropout,
            num_class_embeds=num_labels,
        )
    return ddpm(unet, scheduler)


def _configured_as(weights: str, image_shape: Sequence[int], num_labels: int | None) -> Diffusion:
    """The network and scheduler that a folder or hub id in diffusers' layout describes, without its weights.

    Raises ConfigurationError if it cannot be had, or if it makes other images than the dataset has.
    """
    source = located(weights, "model.weights")
    from diffusers import UNet2DModel

    expected = (
        "'auto', a folder with a diffusers DDPM (unet/ and scheduler/), or a hub id that can be reached, or download "
        "it elsewhere and give the folder"
    )
    with reading("model.weights", weights, expected):
        folder = fetched(source, weights=False)
        if pipeline_name(folder) == "OneStepPipeline":
            raise ConfigurationError("got a one-step generator, give the model that it was distilled from.")
        unet = network_in(UNet2DModel, part_of(folder, "unet"))
        require_channels(unet, unet.config.in_channels)
        network, num_labels_there = ddpm(unet, scheduler_in(folder, flows=True)), unet.config.num_class_embeds
        if isinstance(source, Path):
            check_weights({"unet": unet}, folder)
    if network.image_shape != tuple(image_shape) or num_labels_there != num_labels:
        raise ConfigurationError(
            f"model.weights={weights} makes images of {network.image_shape} with {labels_in_words(num_labels_there)}, "
            f"the dataset has {tuple(image_shape)} with {labels_in_words(num_labels)}; choose weights and a dataset "
            "that fit each other."
        )
    return network
