"""A small convolutional VAE behind the face that methods and evaluation use: its noisy sample is the latent z."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.loading import (
    BASES_ARCHITECTURE,
    check_weights,
    fitting,
    load_weights,
    network_in,
    part_of,
    reading,
)
from unlearn_runner.models.model import (
    GenerativeModel,
    Noising,
    clipped,
    evaluating,
    first_noises,
    labels_in_words,
    passed,
)
from unlearn_runner.options import Channels, Width
from unlearn_runner.rules import model_options
from unlearn_runner.weights import located

SUBFOLDER = "vae"


@final
class VAENetwork(ModelMixin, ConfigMixin):
    """Encoder q(z|x, c) and decoder p(x|z, c), both Gaussian (Kingma and Welling 2014, 1312.6114).

    p(x|z, c) has one learnt standard deviation for all pixels (sigma-VAE, Rybkin et al. 2021, 2006.13202): it weighs
    the reconstruction against the KL, without a beta to tune. z has a standard normal prior, whatever the label c.
    No layer looks at a whole batch, so an image's loss does not depend on its neighbours.
    """

    @register_to_config
    def __init__(
        self,
        image_shape: Sequence[int],
        num_labels: int | None = None,
        latent_size: int = 16,
        hidden_size: int = 256,
        block_out_channels: Sequence[int] = (32, 64),
        norm_num_groups: int = 8,
    ):
        super().__init__()
        channels, height, width = image_shape
        halvings = 2 ** len(block_out_channels)
        self.deepest = (block_out_channels[-1], height // halvings, width // halvings)
        size = math.prod(self.deepest)

        blocks, previous = [], channels
        for wanted in block_out_channels:
            blocks += [nn.Conv2d(previous, wanted, 3, stride=2, padding=1), nn.GroupNorm(norm_num_groups, wanted)]
            blocks += [nn.SiLU()]
            previous = wanted
        self.encoder = nn.ModuleDict(
            {
                "blocks": nn.Sequential(*blocks),
                "hidden": nn.Linear(size, hidden_size),
                "head": nn.Linear(hidden_size, 2 * latent_size),
            }
        )
        blocks = []
        for wanted in [*reversed(block_out_channels[:-1]), block_out_channels[0]]:
            blocks += [nn.Upsample(scale_factor=2), nn.Conv2d(previous, wanted, 3, padding=1)]
            blocks += [nn.GroupNorm(norm_num_groups, wanted), nn.SiLU()]
            previous = wanted
        self.decoder = nn.ModuleDict(
            {
                "hidden": nn.Linear(latent_size, hidden_size),
                "spread": nn.Linear(hidden_size, size),
                "blocks": nn.Sequential(*blocks, nn.Conv2d(previous, channels, 3, padding=1)),
            }
        )
        if num_labels is not None:
            for part in (self.encoder, self.decoder):
                part["label"] = nn.Embedding(num_labels, hidden_size)
        self.log_sigma = nn.Parameter(torch.zeros(()))  # of p(x|z, c)

    def encode(
        self, x0: Float[Tensor, "b c h w"], labels: Int64[Tensor, "b"] | None = None
    ) -> tuple[Float[Tensor, "b latent"], Float[Tensor, "b latent"]]:
        """Mean and standard deviation of q(z|x, c)."""
        mean, log_std = self._hidden(self.encoder, self.encoder["blocks"](x0).flatten(1), labels).chunk(2, dim=1)
        return mean, log_std.exp()

    def decode(
        self, z: Float[Tensor, "b latent"], labels: Int64[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Mean of p(x|z, c), in (-1, 1)."""
        return self.decoder["blocks"](self._hidden(self.decoder, z, labels).view(-1, *self.deepest)).tanh()

    def _hidden(self, part: nn.ModuleDict, features: Tensor, labels: Tensor | None) -> Tensor:
        hidden = part["hidden"](features)
        if labels is not None:
            hidden = hidden + part["label"](labels)
        hidden = nn.functional.silu(hidden)
        return part["head"](hidden) if "head" in part else nn.functional.silu(part["spread"](hidden))


@final
class VAE(GenerativeModel):
    """What a diffusion model calls noising is q(z|x0, c) here, and its only timestep is 0.

    `loss` is minus the evidence lower bound at one z, so that `denoising_loss` trains all three parts of the network.
    Unlearning moves the decoder alone. Conditions are class indices [b], or None.
    """

    num_train_timesteps = 1

    def __init__(self, vae: VAENetwork):
        super().__init__()
        self.vae = vae
        self.network_evaluations = 0  # latents passed forward through the decoder so far

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.vae.config.image_shape)

    @property
    def sample_shape(self) -> tuple[int]:
        return (self.vae.config.latent_size,)

    @property
    def prediction_shape(self) -> tuple[int, int, int]:
        return self.image_shape

    @property
    def num_labels(self) -> int | None:
        return self.vae.config.num_labels

    @property
    def num_features(self) -> int:
        return self.vae.config.latent_size

    @torch.no_grad()
    def features(self, x0: Float[Tensor, "b c h w"], cond: Int64[Tensor, "b"] | None) -> Float[Tensor, "b latent"]:
        """The mean of q(z|x0, c)."""
        return self.vae.encode(x0, cond)[0]

    def noising(
        self,
        x0: Float[Tensor, "b c h w"],
        timesteps: Int64[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Noising:
        """q(z|x0, c)."""
        return Noising(1.0, *passed(self, self.vae.encode, x0, cond))

    def predict(
        self,
        m: Float[Tensor, "b latent"],
        timesteps: Shaped[Tensor, "b"],
        cond: Shaped[Tensor, "b ..."] | None,
    ) -> Float[Tensor, "b c h w"]:
        """The mean image of z."""
        self.network_evaluations += m.shape[0]
        return passed(self, self.vae.decode, m, cond)

    def loss(
        self,
        prediction: Float[Tensor, "b c h w"],
        x0: Float[Tensor, "b c h w"],
        m: Float[Tensor, "b latent"],
        eps: Float[Tensor, "b latent"],
        std: Float[Tensor, "b latent"],
        timesteps: Int64[Tensor, "b"],
    ) -> Float[Tensor, "b"]:
        """log q(z|x0) - log p(z) - log p(x0|z) in nats; its mean over q is minus the evidence lower bound.

        log q and log p(z) are of as many entries each, so their constants cancel.
        """
        log_posterior = -(eps.square() / 2 + std.log()).sum(1)
        log_prior = -(m.square() / 2).sum(1)
        log_sigma = self.vae.log_sigma
        nats = ((x0 - prediction) / log_sigma.exp()).square() / 2 + log_sigma + 0.5 * math.log(2 * math.pi)
        return log_posterior - log_prior + nats.flatten(1).sum(1)

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
        """The decoder's means of z ~ N(0, I), drawn batch by batch. The number of steps and the sampler have no
        meaning for a VAE: there is one pass through the decoder.
        """
        images = []
        with evaluating(self):
            for z, part in first_noises(self, n, cond, generator, batch_size):
                timesteps = torch.zeros(len(z), dtype=torch.int64, device=z.device)
                images.append(clipped(self.predict(z, timesteps, part)))
        return torch.cat(images)

    def freeze_for_unlearning(self) -> None:
        """The encoder, and sigma, which a method could otherwise raise to call all images equally likely."""
        self.vae.encoder.requires_grad_(False)
        self.vae.log_sigma.requires_grad_(False)

    def save(self, folder: Path) -> None:
        self.vae.save_pretrained(Path(folder) / SUBFOLDER, safe_serialization=True)

    def fits(self, source: str | Path, option: str = "model.weights") -> Path:
        with reading(option, source, BASES_ARCHITECTURE):
            return fitting({SUBFOLDER: self.vae}, source, option)

    def load(self, source: str | Path, option: str = "model.weights") -> None:
        load_weights({SUBFOLDER: self.vae}, self.fits(source, option))


def build_vae(
    image_shape: Sequence[int],
    label_names: Sequence[str] | None,
    seed: int,
    weights: str,
    latent_size: Width = 16,
    hidden_size: Width = 256,
    block_out_channels: Channels = (32, 64),
    norm_num_groups: Width = 8,
) -> VAE:
    """A VAE with fresh weights drawn from `seed`.

    Conditional on as many labels as there are `label_names`, unconditional where that is None. Each of
    `block_out_channels` halves the image. Where `weights` is not "auto" but a folder, that decides the architecture,
    and all further arguments are without effect; it is checked here and its weights are read later, by `load`.
    """
    num_labels = None if label_names is None else len(label_names)
    if weights != "auto":
        return _configured_as(weights, image_shape, num_labels)
    sizes = {"latent_size": latent_size, "hidden_size": hidden_size, "norm_num_groups": norm_num_groups}
    model_options.groups_of_channels(weights, block_out_channels, norm_num_groups)
    model_options.sides_that_halve(*image_shape[1:], len(block_out_channels), len(block_out_channels))
    settings = {
        "image_shape": tuple(image_shape),
        "num_labels": num_labels,
        "block_out_channels": tuple(block_out_channels),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # nn.Module's initialisers know no other generator
        return VAE(VAENetwork(**settings, **sizes))


def _configured_as(weights: str, image_shape: Sequence[int], num_labels: int | None) -> VAE:
    """The network that a folder written by `save` describes, without its weights.

    Raises ConfigurationError if it cannot be had, or if it makes other images than the dataset has.
    """
    folder = Path(located(weights, "model.weights"))
    expected = f"'auto', or a folder with a VAE of this runner ({SUBFOLDER}/, as in a run's model/)"
    with reading("model.weights", weights, expected):
        vae = network_in(VAENetwork, part_of(folder, SUBFOLDER))
        check_weights({SUBFOLDER: vae}, folder)
    found, found_labels = tuple(vae.config.image_shape), vae.config.num_labels
    if found != tuple(image_shape) or found_labels != num_labels:
        raise ConfigurationError(
            f"model.weights={weights} makes images of {found} with {labels_in_words(found_labels)}, the dataset has "
            f"{tuple(image_shape)} with {labels_in_words(num_labels)}; choose weights and a dataset that fit."
        )
    return VAE(vae)
