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

from unlearn_runner import rules
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.loading import (
    BASES_ARCHITECTURE,
    check_weights,
    fitting,
    load_weights,
    network_in,
    part_of,
    reading,
    reading_part,
    require_channels,
    scheduler_in,
)
from unlearn_runner.models.model import (
    DiffusionModel,
    Noising,
    clipped,
    evaluating,
    first_noises,
    labels_in_words,
    passed,
    pipeline_name,
    squared_error,
)
from unlearn_runner.models.path import path_of
from unlearn_runner.models.sampling import denoise, sampler_of
from unlearn_runner.options import Channels, Decay, Depth, OpenUnitInterval, PredictionType, Width
from unlearn_runner.weights import fetched, located

if TYPE_CHECKING:
    from diffusers import UNet2DModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


@final
class DDPM(DiffusionModel):
    """Denoising diffusion over pixels (Ho et al. 2020, 2006.11239), or a flow over them, class-conditional or not.

    Its scheduler says on which path, and what the network predicts. Conditions are class indices [b], or None.
    """

    def __init__(self, unet: "UNet2DModel", scheduler: "SchedulerMixin"):
        super().__init__()
        from unlearn_runner.models.attention import ChannelsFirstProcessor, attend

        attend(unet, ChannelsFirstProcessor())
        self.unet = unet
        self.network_evaluations = 0  # images passed forward through the network so far
        self._take_schedule(scheduler)

    def _take_schedule(self, scheduler: "SchedulerMixin") -> None:
        self.path = path_of(scheduler).to(next(self.unet.parameters()).device)
        self.scheduler = scheduler

    @property
    def image_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.image_shape

    @property
    def answer_shape(self) -> tuple[int, int, int]:
        return self.image_shape

    @property
    def num_labels(self) -> int | None:
        return self.unet.config.num_class_embeds

    @property
    def num_train_timesteps(self) -> int:
        return self.path.num_train_timesteps

    def noising(
        self,
        x0: Float[Tensor, "b c h w"],
        timesteps: Int64[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Noising:
        scale, std = self.path.amplitudes(timesteps)
        return Noising(scale, x0, std)

    def predict(
        self,
        m: Float[Tensor, "b c h w"],
        timesteps: Shaped[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Float[Tensor, "b c h w"]:
        self.network_evaluations += m.shape[0]
        return passed(self, self._answer, m, timesteps, cond)

    def _answer(self, m: Tensor, timesteps: Tensor, cond: Tensor | None) -> Tensor:
        return self.unet(m, self.path.schedule.network_time(timesteps), class_labels=cond, return_dict=False)[0]

    def loss(
        self,
        answer: Float[Tensor, "b c h w"],
        x0: Float[Tensor, "b c h w"],
        m: Float[Tensor, "b c h w"],
        eps: Float[Tensor, "b c h w"],
        std: Float[Tensor, "b 1 1 1"],
        timesteps: Int64[Tensor, "b"],
    ) -> Float[Tensor, "b"]:
        """The squared error of what the network predicts."""
        return squared_error(answer, self.path.wanted(x0, eps, timesteps))

    def freeze_for_unlearning(self) -> None:
        """Nothing to freeze: the noise of a diffusion model is not learnt."""

    def guided(
        self,
        x_t: Float[Tensor, "b c h w"],
        timesteps: Shaped[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Float[Tensor, "b c h w"]:
        """Without guidance: this network knows no null condition."""
        return self.predict(x_t, timesteps, cond)

    def picture(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return clipped(x0)

    @torch.inference_mode()
    def sample(
        self,
        n: int,
        cond: Shaped[Tensor, "{n} ..."] | None,
        generator: torch.Generator,
        num_inference_steps: int,
        sampler: str = "ddim",
        batch_size: int = 256,
    ) -> Float[Tensor, "{n} c h w"]:
        """The samplers "ddim" and "ddim_clipped" are deterministic given the first noise; "ddpm" is ancestral, and the
        same as diffusers' DDPMPipeline with this generator (on a CPU up to rounding). On a flow they are those of
        `PathSampler`. Noise is drawn batch by batch.
        """
        scheduler = sampler_of(self.path, self.scheduler.config, sampler, num_inference_steps)
        images = []
        with evaluating(self):
            for x, part in first_noises(self, n, cond, generator, batch_size):
                images.append(self.picture(denoise(self, scheduler, x, part, generator)))
        return torch.cat(images)

    @property
    def components(self) -> dict[str, Any]:
        return {"unet": self.unet, "scheduler": self.scheduler}

    def save(self, folder: Path) -> None:
        from diffusers import DDPMPipeline

        DDPMPipeline(**self.components).save_pretrained(folder, safe_serialization=True)

    def fits(self, source: str | Path, option: str = "model.weights") -> Path:
        with reading(option, source, BASES_ARCHITECTURE):
            folder = fitting({"unet": self.unet}, source, option)
            with reading_part("scheduler"):
                path_of(scheduler_in(folder, flows=True))
        return folder

    def load(self, source: str | Path, option: str = "model.weights") -> None:
        folder = self.fits(source, option)
        load_weights({"unet": self.unet}, folder)
        self._take_schedule(scheduler_in(folder, flows=True))


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
) -> DDPM:
    """A DDPM with fresh weights drawn from `seed`.

    With `prediction_type` "flow" it is a flow on straight paths (2210.02747), which knows no betas; else a diffusion.
    Conditional on as many labels as there are `label_names`, unconditional where that is None. `attention` says which
    resolutions have self-attention. Where `weights` is not "auto" but a folder or hub id, that decides the architecture
    and the schedule, and all further arguments are without effect; it is checked here and its weights are read later,
    by `load`.
    """
    num_labels = None if label_names is None else len(label_names)
    if weights != "auto":
        return _configured_as(weights, image_shape, num_labels)
    rules.levels_of_attention(weights, attention, block_out_channels)
    rules.groups_of_channels(weights, block_out_channels, norm_num_groups)
    rules.heads_of_channels(weights, block_out_channels, attention, attention_head_dim)
    rules.range_of_betas(weights, beta_start, beta_end, beta_schedule)
    rules.sides_that_halve(*image_shape[1:], len(block_out_channels) - 1, len(block_out_channels))
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
    return DDPM(unet, scheduler)


def _configured_as(weights: str, image_shape: Sequence[int], num_labels: int | None) -> DDPM:
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
        network, num_labels_there = DDPM(unet, scheduler_in(folder, flows=True)), unet.config.num_class_embeds
        if isinstance(source, Path):
            check_weights({"unet": unet}, folder)
    if network.image_shape != tuple(image_shape) or num_labels_there != num_labels:
        raise ConfigurationError(
            f"model.weights={weights} makes images of {network.image_shape} with {labels_in_words(num_labels_there)}, "
            f"the dataset has {tuple(image_shape)} with {labels_in_words(num_labels)}; choose weights and a dataset "
            "that fit each other."
        )
    return network
