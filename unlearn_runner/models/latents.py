"""AutoencoderKL: between images and the latents that a latent model denoises."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.distributed import in_shares
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.diffusion import Codec
from unlearn_runner.models.loading import BASES_ARCHITECTURE, fitting, load_weights, reading
from unlearn_runner.models.model import GenerativeModel, Noising, clipped, passed, squared_error
from unlearn_runner.options import AutoencoderOptions

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def pixels_a_side(vae: "AutoencoderKL") -> int:
    """Of the square of pixels that one place of a latent stands for."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def build_autoencoder(
    image_shape: Sequence[int], options: AutoencoderOptions | None, shift: float | None = None
) -> "AutoencoderKL":
    """A small one with fresh weights; `shift` is what its latents' entries are moved by, if anything."""
    from diffusers import AutoencoderKL

    options = {"block_out_channels": (16, 32), "latent_channels": 4, "norm_num_groups": 8} | (options or {})
    levels = len(options["block_out_channels"])
    return AutoencoderKL(
        in_channels=image_shape[0],
        out_channels=image_shape[0],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        sample_size=max(image_shape[1:]),
        shift_factor=shift,
        **options,
    )


def require_autoencoder(vae: torch.nn.Module) -> None:
    """Raise ConfigurationError unless its latents are read here, and it gives back what it takes."""
    for name in ("latents_mean", "latents_std"):
        if vae.config.get(name) is not None:
            raise ConfigurationError(f"its autoencoder shifts its latents ({name}), which is not read here.")
    if vae.config.in_channels != vae.config.out_channels:
        raise ConfigurationError(
            f"its autoencoder turns {vae.config.in_channels} channels into {vae.config.out_channels}."
        )


@final
class Latents(Codec):
    """An autoencoder's means, less its shift, times its scaling factor, [b, l, i, j] (2112.10752)."""

    exact = False

    def __init__(self, vae: "AutoencoderKL", image_shape: tuple[int, int, int]):
        super().__init__()
        self.vae, self.image_shape = vae, image_shape
        self.vae.requires_grad_(False).eval()

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.vae.config.latent_channels, *(side // pixels_a_side(self.vae) for side in self.image_shape[1:]))

    def encode(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l i j"]:
        if tuple(x0.shape[1:]) == self.sample_shape:
            return x0
        with torch.no_grad():
            means = in_shares(lambda part: self.vae.encode(part).latent_dist.mean, x0.to(self.vae.dtype))
            return (means - self._shift) * self.vae.config.scaling_factor

    def picture(self, x0: Float[Tensor, "b l i j"]) -> Float[Tensor, "b c h w"]:
        with torch.no_grad():
            latents = x0 / self.vae.config.scaling_factor + self._shift
            return clipped(in_shares(lambda part: self.vae.decode(part, return_dict=False)[0], latents))

    @property
    def _shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0

    @property
    def networks(self) -> dict[str, Any]:
        return {"vae": self.vae}

    @property
    def components(self) -> dict[str, Any]:
        return {"vae": self.vae}

    def take(self, folder: Path) -> None:
        from diffusers import AutoencoderKL

        config = AutoencoderKL.load_config(folder / "vae")
        self.vae.register_to_config(
            scaling_factor=config.get("scaling_factor", 0.18215), shift_factor=config.get("shift_factor")
        )

    def adopt(self, vae: "AutoencoderKL") -> None:
        """Take over an autoencoder of the same architecture, with its scaling factor."""
        self.vae.load_state_dict(vae.state_dict())
        self.vae.register_to_config(scaling_factor=vae.config.scaling_factor)


@final
class Autoencoder(GenerativeModel):
    """AutoencoderKL seen as a model of images of its own, so that what trains every base trains it, too.

    Its noisy sample is the unscaled latent z ~ q(z|x). `loss` is the squared error of the picture plus `kl_weight`
    times the one-sample estimate of KL(q(z|x) || N(0, I)), summed over pixels and entries.
    """

    num_train_timesteps = 1
    has_likelihood = False
    num_labels = None

    def __init__(self, vae: "AutoencoderKL", image_shape: tuple[int, int, int], kl_weight: float = 0.01):
        super().__init__()
        self.vae = vae
        self.image_shape = image_shape
        self.kl_weight = kl_weight
        self.network_evaluations = 0
        self.vae.requires_grad_(True)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.vae.config.latent_channels, *(side // pixels_a_side(self.vae) for side in self.image_shape[1:]))

    @property
    def prediction_shape(self) -> tuple[int, int, int]:
        return self.image_shape

    def noising(
        self,
        x0: Float[Tensor, "b c h w"],
        timesteps: Int64[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Noising:
        def encode(part: Tensor) -> tuple[Tensor, Tensor]:
            posterior = self.vae.encode(part).latent_dist
            return posterior.mean, posterior.std

        return Noising(1.0, *passed(self, encode, x0))

    def predict(
        self,
        m: Float[Tensor, "b l i j"],
        timesteps: Shaped[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Float[Tensor, "b c h w"]:
        self.network_evaluations += len(m)
        return passed(self, lambda part: self.vae.decode(part, return_dict=False)[0], m)

    def loss(
        self,
        prediction: Float[Tensor, "b c h w"],
        x0: Float[Tensor, "b c h w"],
        m: Float[Tensor, "b l i j"],
        eps: Float[Tensor, "b l i j"],
        std: Float[Tensor, "b l i j"],
        timesteps: Int64[Tensor, "b"],
    ) -> Float[Tensor, "b"]:
        log_ratio = (m.square() - eps.square()) / 2 - std.log()  # log q(z|x0) - log p(z), entry by entry
        return squared_error(prediction, x0) + self.kl_weight * log_ratio.flatten(1).sum(1)

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
        """The decoder's pictures of standard normal latents."""
        z = torch.randn((n, *self.sample_shape), generator=generator, device=self.vae.device)
        return torch.cat([self.vae.decode(part).sample for part in z.split(batch_size)]).clamp(-1, 1)

    def freeze_for_unlearning(self) -> None:
        self.vae.encoder.requires_grad_(False)

    def save(self, folder: Path) -> None:
        self.vae.save_pretrained(Path(folder) / "vae", safe_serialization=True)

    def fits(self, source: str | Path, option: str = "model.weights") -> Path:
        with reading(option, source, BASES_ARCHITECTURE):
            return fitting({"vae": self.vae}, source, option)

    def load(self, source: str | Path, option: str = "model.weights") -> None:
        load_weights({"vae": self.vae}, self.fits(source, option))

    @torch.no_grad()
    def measure_scale(self, images: Float[Tensor, "n c h w"]) -> None:
        """Make the scaling factor give these images' latents a standard deviation of 1 (2112.10752, appendix G)."""
        spread = torch.cat([self.vae.encode(part).latent_dist.mean for part in images.split(256)]).std()
        self.vae.register_to_config(scaling_factor=1 / float(spread))
