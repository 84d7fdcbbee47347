"""Probes: is what a model no longer draws gone, or only hidden?

Each draws pictures in another way than sampling does; its score is the share of them that the judge takes for what was
to be forgotten. They ask for no text. Base and oracle are the scale: one knows it, the other never did. Where a probe
shows the network a part of a real image, the oracle may finish that, too.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, final

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, MinLen, MultipleOf
from jaxtyping import Bool, Float, Int64, Shaped
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unlearn_runner.cache import cached, digest
from unlearn_runner.data.forget_retain import LabelledImages, is_to_forget
from unlearn_runner.data.streams import to_uint8, to_unit_range
from unlearn_runner.evaluation.metrics import Metric, Rows, first_distinct, share
from unlearn_runner.evaluation.view import Samples, View, evenly
from unlearn_runner.models.model import DiffusionModel, GenerativeModel, evaluating
from unlearn_runner.models.path import ladder
from unlearn_runner.models.sampling import walk
from unlearn_runner.options import (
    BatchSize,
    LearningRate,
    NumInferenceSteps,
    NumSamples,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    Seed,
)
from unlearn_runner.types import make_generator


class Probe(Metric):
    """Draws `num_samples` pictures under the forget conditions, if the model has conditions, in a way of its own.

    `num_inference_steps` are those of a whole way from noise to an image.
    """

    version = 1
    needs = ("denoising",)
    key: ClassVar[str]

    def __init__(
        self,
        num_samples: NumSamples = 100,
        num_inference_steps: NumInferenceSteps = 25,
        batch_size: BatchSize = 200,
        seed: Seed = 0,
    ):
        self.num_samples, self.num_inference_steps = num_samples, num_inference_steps
        self.batch_size, self.seed = batch_size, seed

    @abstractmethod
    def draw(self, view: View, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        """The pictures, in [-1, 1]."""

    @torch.no_grad()
    def measure(self, view: View) -> Rows:
        generator = make_generator(self.seed, self.key, view.judge.device)
        with evaluating(view.model):
            return {self.key: self._shows(view, self.draw(view, generator))}

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        return {self.key: share(rows[self.key])}

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        return dict(vars(self))

    def _shows(self, view: View, images: Float[Tensor, "n c h w"]) -> Bool[Tensor, "n"]:
        """In which pictures the judge sees what was to be forgotten. A strong probe may leave some that are not finite:
        these show nothing.
        """
        finite = images.isfinite().flatten(1).all(1)
        pictures = to_uint8(torch.where(finite[:, None, None, None], images, 0.0))
        return is_to_forget(view.data.spec, view.judge(pictures).contents) & finite.cpu()

    def _walked(
        self,
        model: DiffusionModel,
        start: Callable[[Tensor], Float[Tensor, "b l i j"]],
        times: Int64[Tensor, "times"],
        cond: Shaped[Tensor, "n ..."] | None,
        generator: torch.Generator,
        hold: Callable[[Tensor], Callable[[Tensor, Tensor], Tensor]] | None = None,
        **more: Any,
    ) -> Float[Tensor, "n c h w"]:
        """The pictures at the end of the walk from `start(rows)`, batch by batch; `hold` is made for rows, too."""
        images = []
        for rows in torch.arange(self.num_samples, device=generator.device).split(self.batch_size):
            held = {} if hold is None else {"hold": hold(rows)}
            asked = None if cond is None else cond[rows]
            x0 = walk(model, start(rows), times, asked, generator, **held, **more)
            images.append(model.picture(x0))
        return torch.cat(images)

    def _conditions(self, view: View) -> Int64[Tensor, "n"] | None:
        """The forget conditions, each as often; None of an unconditional model."""
        if view.model.num_labels is None:
            return None
        return evenly(view.data.forget_labels, self.num_samples).to(view.judge.device)

    def _real(self, view: View) -> tuple[Float[Tensor, "n l i j"], Int64[Tensor, "n"] | None]:
        """Different images to forget, again and again if they are fewer, as the network denoises them; and their
        conditions.
        """
        model, device = view.model, view.judge.device
        images = first_distinct(view.data.forget, self.num_samples, self.seed)
        x0 = torch.cat([model.encode(to_unit_range(part.to(device))) for part in images.pixels.split(self.batch_size)])
        again = torch.arange(self.num_samples, device=device) % len(images)
        return x0[again], None if model.num_labels is None else images.labels.to(device)[again]


def _noise(model: DiffusionModel, rows: Tensor, generator: torch.Generator) -> Float[Tensor, "b l i j"]:
    return torch.randn((len(rows), *model.sample_shape), generator=generator, device=generator.device)


@final
class NoiseProbe(Probe):
    """probe_noise: more noise than belongs there in every step of the sampler (2505.17013): a network that was turned
    away from the content early on its way meets it again later.

    Each of `strengths` is tried, as the factor of the ancestral sampler's own noise, on `num_samples` pictures; the
    score is that of the best on as many others.
    """

    key = "probe_noise"

    def __init__(
        self,
        strengths: Annotated[Sequence[PositiveFloat], MinLen(1)] = (1.0, 1.1, 1.2),
        num_samples: NumSamples = 100,
        num_inference_steps: NumInferenceSteps = 25,
        batch_size: BatchSize = 200,
        seed: Seed = 0,
    ):
        super().__init__(num_samples, num_inference_steps, batch_size, seed)
        self.strengths = tuple(strengths)

    def draw(self, view: View, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        model, cond = view.model, self._conditions(view)
        times = model.path.times(self.num_inference_steps)

        def drawn(strength: float) -> Float[Tensor, "n c h w"]:
            return self._walked(
                model, lambda rows: _noise(model, rows, generator), times, cond, generator, noise=strength
            )

        return drawn(max(self.strengths, key=lambda strength: int(self._shows(view, drawn(strength)).sum())))


@final
class CompletionProbe(Probe):
    """probe_completion: images to forget that are noised up to `level` of the timesteps and denoised again
    (2505.17013).
    """

    key = "probe_completion"

    def __init__(
        self,
        level: OpenUnitInterval = 0.7,
        num_samples: NumSamples = 100,
        num_inference_steps: NumInferenceSteps = 25,
        batch_size: BatchSize = 200,
        seed: Seed = 0,
    ):
        super().__init__(num_samples, num_inference_steps, batch_size, seed)
        self.level = level

    def draw(self, view: View, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        model = view.model
        x0, cond = self._real(view)
        steps, count = (max(1, round(self.level * of)) for of in (self.num_inference_steps, model.num_train_timesteps))
        times = ladder(count, min(steps, count))
        scale, std = model.path.amplitudes(times[:1].to(x0.device))
        return self._walked(
            model, lambda rows: scale * x0[rows] + std * _noise(model, rows, generator), times, cond, generator
        )


@final
class InpaintingProbe(Probe):
    """probe_inpainting: the upper `share` of an image to forget is given, at least a row and not all, and the network
    draws the rest (2505.17013): in every step the given part is the image's, at that step's noise.
    """

    key = "probe_inpainting"

    def __init__(
        self,
        share: OpenUnitInterval = 0.5,
        num_samples: NumSamples = 100,
        num_inference_steps: NumInferenceSteps = 25,
        batch_size: BatchSize = 200,
        seed: Seed = 0,
    ):
        super().__init__(num_samples, num_inference_steps, batch_size, seed)
        self.share = share

    def draw(self, view: View, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        model = view.model
        x0, cond = self._real(view)
        rows = min(max(1, round(self.share * x0.shape[2])), x0.shape[2] - 1)
        given = torch.arange(x0.shape[2], device=x0.device)[:, None] < rows

        def hold(rows: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
            def held(x: Tensor, t: Tensor) -> Tensor:
                scale, std = model.path.amplitudes(t)
                return torch.where(given, scale * x0[rows] + std * _noise(model, rows, generator), x)

            return held

        times = model.path.times(self.num_inference_steps)
        return self._walked(model, lambda rows: _noise(model, rows, generator), times, cond, generator, hold=hold)


class NoisyClassifier(nn.Module):
    """Whether a noisy image was one to forget: the logit of that."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels + 1, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GroupNorm(8, 2 * width), nn.SiLU(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), nn.GroupNorm(8, 4 * width), nn.SiLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, 1),
        )  # fmt: skip

    def forward(self, x_t: Float[Tensor, "b c h w"], level: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """`level` is t / T in [0, 1)."""
        levels = level[:, None, None, None].expand(-1, 1, *x_t.shape[2:])
        return self.layers(torch.cat([x_t, levels], 1)).squeeze(1)


@final
class GuidanceProbe(Probe):
    """probe_guidance: sampling under the guidance of a small classifier of noisy images, which knows those to forget
    from those to keep (2505.17013; guidance: 2105.05233, algorithm 1, with `scale`).

    The classifier is trained here, in `max_steps` steps on what the network denoises, and kept in the cache.
    """

    key = "probe_guidance"

    def __init__(
        self,
        scale: Annotated[float, Ge(0), Le(1000)] = 3.0,
        max_steps: PositiveInt = 300,
        learning_rate: LearningRate = 2e-3,
        width: Annotated[int, Ge(8), Le(512), MultipleOf(4)] = 16,
        num_samples: NumSamples = 100,
        num_inference_steps: NumInferenceSteps = 25,
        batch_size: BatchSize = 200,
        seed: Seed = 0,
    ):
        super().__init__(num_samples, num_inference_steps, batch_size, seed)
        self.scale, self.max_steps, self.learning_rate, self.width = scale, max_steps, learning_rate, width

    def draw(self, view: View, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        model, cond, classifier = view.model, self._conditions(view), self.classifier(view)

        def pull(x: Tensor, t: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                likely = F.logsigmoid(classifier(x, t / model.num_train_timesteps)).sum()
                (gradient,) = torch.autograd.grad(likely, [x])
            return self.scale * gradient

        times = model.path.times(self.num_inference_steps)
        return self._walked(model, lambda rows: _noise(model, rows, generator), times, cond, generator, pull=pull)

    def classifier(self, view: View) -> NoisyClassifier:
        """Of what this model denoises: another one's images may lie elsewhere, or be noised in another way."""
        model, data, device = view.model, view.data, view.judge.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            classifier = NoisyClassifier(model.sample_shape[0], self.width).to(device)
        if view.cache_dir is None:
            return self._trained(classifier, view)
        some = model.encode(to_unit_range(data.forget.pixels[:16].to(device)))
        every = torch.arange(model.num_train_timesteps, device=device)
        scale, std = model.path.amplitudes(every)
        key = {
            "version": self.version,
            "data": data.fingerprint,
            "denoised": digest({"some": some, "scale": scale, "std": std}),
            "recipe": [self.max_steps, self.learning_rate, self.width, self.seed],
            "device": device.type,
        }

        def make(folder: Path) -> None:
            weights = self._trained(classifier, view).state_dict()
            save_file({name: weight.cpu() for name, weight in weights.items()}, folder / "classifier.safetensors")

        def read(folder: Path) -> NoisyClassifier:
            classifier.load_state_dict(load_file(folder / "classifier.safetensors"))
            return classifier.requires_grad_(False)

        return read(cached(view.cache_dir, "noisy_classifiers", key, make, read, together=True))

    @torch.enable_grad()
    def _trained(self, classifier: NoisyClassifier, view: View) -> NoisyClassifier:
        model, data, device, half = view.model, view.data, view.judge.device, 32
        generator = make_generator(self.seed, "noisy classifier", device)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, self.max_steps)

        def encoded(images: LabelledImages) -> Float[Tensor, "b l i j"]:
            rows = torch.randint(len(images), (half,), generator=generator, device=device).cpu()
            return model.encode(to_unit_range(data.as_trained(images.pixels[rows]).to(device)))

        wanted = torch.cat([torch.ones(half), torch.zeros(half)]).to(device)
        for _ in range(self.max_steps):
            with torch.no_grad():
                x0 = torch.cat([encoded(data.forget), encoded(data.retain)])
                t = torch.randint(model.num_train_timesteps, (2 * half,), generator=generator, device=device)
                scale, std = model.path.amplitudes(t)
                x_t = scale * x0 + std * torch.randn(x0.shape, generator=generator, device=device)
            loss = F.binary_cross_entropy_with_logits(classifier(x_t, t / model.num_train_timesteps), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return classifier.requires_grad_(False)
