"""A generator that turns noise into an image by one pass through a diffusion model's network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.ddpm import ddpm
from unlearn_runner.models.dit import dit
from unlearn_runner.models.flux import ClipAndT5
from unlearn_runner.models.latents import pixels_a_side
from unlearn_runner.models.loading import BASES_ARCHITECTURE, reading
from unlearn_runner.models.model import (
    DiffusionModel,
    GenerativeModel,
    Noising,
    evaluating,
    first_noises,
    pipeline_name,
    predict_x0,
    squared_error,
)
from unlearn_runner.models.prompted import Parts, text_to_image
from unlearn_runner.models.stable_diffusion_3 import ClipPairAndT5
from unlearn_runner.models.texts import ClipPair, ClipTexts, Texts
from unlearn_runner.weights import fetched, located

FLUX_SIZE = 128  # of its latents, where nothing else says how large a picture is, as its pipeline has it
TEXT_PARTS = [f"{part}{number}" for number in ("", "_2", "_3") for part in ("text_encoder", "tokenizer")]


def reader_of(model: GenerativeModel, source: str | Path, option: str) -> GenerativeModel:
    """What can `load` a folder or hub id of the model's architecture: the model, or a one-step generator of its network
    if there is one in it. By headers alone: no weight is read.

    Raises ConfigurationError, naming the option to change, if there are no such weights, or another architecture's.
    """
    place = located(str(source), option)
    with reading(option, source, BASES_ARCHITECTURE):
        folder = fetched(place, weights=False)
        if pipeline_name(folder) == OneStepPipeline.__name__:
            model = OneStep(model, OneStepPipeline.load_config(folder)["timestep"])
    model.fits(place, option)
    return model


@final
class OneStepPipeline(DiffusionPipeline):
    """What a run that distils leaves in model/. One network evaluation an image:

        pipeline = OneStepPipeline.from_pretrained("<run>/model")
        images = pipeline([1, 1, 7, 7], generator=torch.Generator().manual_seed(0))  # [4, c, h, w]
        images = pipeline(["a picture of a seven"])  # of a text-to-image model

    The parts are diffusers' and load alone, too. `timestep`: the noise level that the network receives.
    """

    _optional_components: ClassVar = ["unet", "transformer", "vae", *TEXT_PARTS]

    def __init__(
        self,
        scheduler: Any,
        unet: nn.Module | None = None,
        transformer: nn.Module | None = None,
        vae: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        text_encoder_2: nn.Module | None = None,
        tokenizer_2: Any = None,
        text_encoder_3: nn.Module | None = None,
        tokenizer_3: Any = None,
        timestep: int = 0,
    ):
        super().__init__()
        self.register_modules(unet=unet, transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_modules(text_encoder=text_encoder, text_encoder_2=text_encoder_2, text_encoder_3=text_encoder_3)
        self.register_modules(tokenizer=tokenizer, tokenizer_2=tokenizer_2, tokenizer_3=tokenizer_3)
        self.register_to_config(timestep=timestep)

    def __call__(
        self, asked: Int64[Tensor, "b"] | Sequence[int] | Sequence[str], generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c h w"]:
        """An image in [-1, 1] for each label, or for each prompt."""
        if generator is None:
            generator = torch.Generator(self.device).manual_seed(torch.seed())
        if self.vae is None:
            network, cond = ddpm(self.unet, self.scheduler), torch.as_tensor(asked, device=self.device)
        elif type(self.transformer).__name__ == "DiTTransformer2DModel":
            network = dit(self.transformer, self.vae, self.scheduler)
            cond = torch.as_tensor(asked, device=self.device)
        else:
            network = self.unet if self.transformer is None else self.transformer
            side = network.config.get("sample_size", FLUX_SIZE) * pixels_a_side(self.vae)
            parts = Parts(self.vae, self._texts(side), network, self.scheduler)
            network = text_to_image(parts, (self.vae.config.in_channels, side, side), tuple(asked))
            cond = torch.arange(len(asked), device=self.device)
        model = OneStep(network.to(self.device), self.config.timestep)
        return model.sample(len(cond), cond, generator, num_inference_steps=1, batch_size=len(cond))

    def _texts(self, side: int) -> Texts:
        tokenizers = [self.tokenizer, self.tokenizer_2, self.tokenizer_3]
        encoders = [self.text_encoder, self.text_encoder_2, self.text_encoder_3]
        if type(self.transformer).__name__ == "FluxTransformer2DModel":
            guidance = 3.5 if self.transformer.config.guidance_embeds else None
            return ClipAndT5(tokenizers[:2], encoders[:2], guidance)
        if self.transformer is not None:
            there = [part for part in encoders if part is not None]
            return ClipPairAndT5(tokenizers[: len(there)], there, self.transformer.config.joint_attention_dim)
        if self.text_encoder_2 is None:
            return ClipTexts(self.tokenizer, self.text_encoder)
        pairs = (self.tokenizer, self.text_encoder, self.tokenizer_2, self.text_encoder_2)
        return ClipPair(*pairs, size=(side, side))


@final
class OneStep(GenerativeModel):
    """G(z, c): what a diffusion model's network takes for x0 if it is shown pure noise z as x_t at one fixed timestep.

    z is made as large as x_t is there. Its noisy sample m is z, which knows nothing of any image, so it has no
    likelihood: metrics that ask for one leave it out. Conditions are those of the network; there is no guidance, what
    was distilled may have had one.
    """

    num_train_timesteps = 1
    has_likelihood = has_training_loss = False

    def __init__(self, network: DiffusionModel, timestep: int):
        super().__init__()
        if timestep not in range(network.num_train_timesteps):
            raise ConfigurationError(
                f"the generator's timestep must lie in 0..{network.num_train_timesteps - 1}, got {timestep}."
            )
        self.network = network
        self.timestep = timestep

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.network.image_shape

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.network.sample_shape

    @property
    def prediction_shape(self) -> tuple[int, int, int]:
        return self.network.prediction_shape

    @property
    def num_labels(self) -> int | None:
        return self.network.num_labels

    @property
    def prompts(self) -> tuple[str, ...] | None:
        return self.network.prompts

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "n s d"]:
        """Conditions for any texts, if the network has `prompts`."""
        return self.network.embed(prompts)

    def embeddings(self, cond: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b s d"]:
        """Of conditions, if the network has `prompts`."""
        return self.network.embeddings(cond)

    @property
    def network_evaluations(self) -> int:
        return self.network.network_evaluations

    def noising(
        self,
        x0: Float[Tensor, "b c h w"],
        timesteps: Int64[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Noising:
        """N(0, I), whatever the image."""
        return Noising(0.0, x0, x0.new_ones((len(x0), 1, 1, 1)))

    def predict(
        self,
        m: Float[Tensor, "b c h w"],
        timesteps: Shaped[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Float[Tensor, "b c h w"]:
        """The x0 of noise m, an image or a latent; not cut to [-1, 1]."""
        timesteps = torch.full((len(m),), self.timestep, device=m.device)
        return predict_x0(self.network, m * self.network.path.schedule.magnitude(timesteps), timesteps, cond)

    def loss(
        self,
        prediction: Float[Tensor, "b c h w"],
        x0: Float[Tensor, "b c h w"],
        m: Float[Tensor, "b c h w"],
        eps: Float[Tensor, "b c h w"],
        std: Float[Tensor, "b 1 1 1"],
        timesteps: Int64[Tensor, "b"],
    ) -> Float[Tensor, "b"]:
        """||prediction - x0||^2. No bound on a likelihood: which noise an image belongs to is not known."""
        return squared_error(prediction, self.network.noising(x0, timesteps, None).center)

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
        """One pass through the network an image. The number of steps and the sampler have no meaning here."""
        images = []
        with evaluating(self):
            for z, part in first_noises(self, n, cond, generator, batch_size):
                timesteps = torch.zeros(len(z), dtype=torch.int64, device=z.device)
                images.append(self.network.picture(self.predict(z, timesteps, part)))
        return torch.cat(images).contiguous()

    def freeze_for_unlearning(self) -> None:
        """Nothing to freeze: its noise is not learnt."""

    def save(self, folder: Path) -> None:
        """A folder for `OneStepPipeline.from_pretrained`; its parts are those of the network's own pipeline."""
        OneStepPipeline(**self.network.components, timestep=self.timestep).save_pretrained(
            folder, safe_serialization=True
        )

    def fits(self, source: str | Path, option: str = "model.weights") -> Path:
        return self.network.fits(source, option)

    def load(self, source: str | Path, option: str = "model.weights") -> None:
        folder = self.fits(source, option)
        self.network.load(folder, option)
        self.timestep = OneStepPipeline.load_config(folder)["timestep"]
