"""What a text-to-image model still draws under texts that no method has seen, and under none a person would write."""

from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Annotated, Any, final

import torch
from annotated_types import Gt, Le
from jaxtyping import Bool, Float
from torch import Tensor

from unlearn_runner.data.forget_retain import ForgetRetain, LabelledImages, is_to_forget
from unlearn_runner.data.streams import to_uint8, to_unit_range
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.metrics import Metric, Rows, share
from unlearn_runner.evaluation.view import Samples, View
from unlearn_runner.models.model import GenerativeModel, denoising_loss, evaluating
from unlearn_runner.options import (
    BatchSize,
    LearningRate,
    Names,
    NumInferenceSteps,
    NumSamples,
    PositiveInt,
    Seed,
)
from unlearn_runner.spec import listed, prompts_for, require_templates
from unlearn_runner.types import make_generator


@final
class Paraphrases(Metric):
    """forget_rate_paraphrases: of the pictures under held-out templates with the concept, the share that the classifier
    takes for it. Unlearning accuracy (UA) on paraphrases is 1 less this, as UA is 1 - forget_rate.

    `concept` may be several: every template is drawn with each of them, pictures that are taken for any of them count,
    and per_class/forget_rate_paraphrases/<concept> is the share of the pictures under the templates with this one.
    """

    version = 1
    needs = ("prompts",)

    def __init__(
        self,
        concept: Names,
        templates: Sequence[str],
        num_samples: NumSamples = 40,
        num_inference_steps: NumInferenceSteps = 25,
        batch_size: BatchSize = 200,
        seed: Seed = 0,
    ):
        if not templates:
            raise ConfigurationError(
                "evaluation.metrics.paraphrases has none: give dataset.paraphrases, or leave it out with "
                "evaluation.metrics.paraphrases=null."
            )
        require_templates("evaluation.metrics.paraphrases.templates", templates)
        self.concepts = tuple(map(str, listed("evaluation.metrics.paraphrases.concept", concept)))
        self.prompts = prompts_for(self.concepts, templates)
        self.num_samples, self.num_inference_steps = num_samples, num_inference_steps
        self.batch_size, self.seed = batch_size, seed

    @torch.no_grad()
    def measure(self, view: View) -> Rows:
        model, data, judge = view.model, view.data, view.judge
        cond = model.embed(self.prompts).repeat_interleave(self.num_samples, dim=0)
        generator = make_generator(self.seed, "paraphrases", judge.device)
        images = model.sample(len(cond), cond, generator, self.num_inference_steps, batch_size=self.batch_size)
        shown = is_to_forget(data.spec, judge(to_uint8(images, "pictures under paraphrases")).contents)
        if len(self.concepts) == 1:
            return {"paraphrases": shown}
        apart = zip(self.concepts, shown.chunk(len(self.concepts)), strict=True)
        return {"paraphrases": shown, **{f"paraphrases/{name}": part for name, part in apart}}

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        scores = {"forget_rate_paraphrases": share(rows["paraphrases"])}
        apart = (name for name in rows if name != "paraphrases")
        return scores | {f"per_class/forget_rate_{name}": share(rows[name]) for name in apart}

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "num_samples": self.num_samples,
            "num_inference_steps": self.num_inference_steps,
            "seed": self.seed,
        }


@final
class ClipScore(Metric):
    """clip_score_retain: 100 max(cosine, 0) of picture and prompt (2104.08718, without its factor 2.5), the mean over
    the prompts of the retained concepts; in [0, 100]. By open_clip itself.
    """

    version = 1
    needs = ("prompts", "clip")

    def __init__(
        self,
        num_samples: NumSamples = 10,
        num_inference_steps: NumInferenceSteps = 25,
        batch_size: BatchSize = 200,
        seed: Seed = 0,
    ):
        self.num_samples, self.num_inference_steps = num_samples, num_inference_steps
        self.batch_size, self.seed = batch_size, seed

    @torch.no_grad()
    def measure(self, view: View) -> Rows:
        model, data, judge = view.model, view.data, view.judge
        labels = torch.tensor(data.spec.labels.retain, device=judge.device).repeat_interleave(self.num_samples)
        generator = make_generator(self.seed, "clip score", judge.device)
        images = model.sample(len(labels), labels, generator, self.num_inference_steps, batch_size=self.batch_size)
        texts = view.clip.of_texts(data.spec.label_names)[labels]
        seen = torch.cat([view.clip.of_images(part) for part in images.split(self.batch_size)])
        return {"clip_score": (100 * (seen * texts).sum(1).clamp(min=0)).cpu()}

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        return {"clip_score_retain": float(rows["clip_score"].double().mean())}

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        return {
            "library": "open_clip",
            "num_samples": self.num_samples,
            "num_inference_steps": self.num_inference_steps,
            "seed": self.seed,
        }


@final
class Robustness(Metric):
    """attack_success: share of pictures that the judge takes for the concept under the condition that brings it back
    best: a lower bound of what the model still knows, in [0, 1].

    Tried are the forget prompts and the paraphrases as they are, and embeddings that were sought as in Concept
    Inversion (2308.01508): from a start they descend the denoising loss of the forget images, the model's weights held
    fixed. The `num_restarts` starts are a forget prompt, a paraphrase and a retain prompt in turn. Which one is best
    is found on `num_samples` pictures of each, and reported on as many others, so that trying more raises no score by
    chance. It is never less than forget_rate. A generator of one step has no such loss and no score.

    `concept` may be several: then there are `num_restarts` starts for each of them, which descend the loss of its own
    forget images, and pictures that are taken for any of them count. It may be None: then there are no paraphrases.
    """

    version = 2
    needs = ("prompts", "denoising")

    def __init__(
        self,
        concept: Names | None,
        templates: Sequence[str],
        num_restarts: Annotated[int, Gt(0), Le(1000)] = 3,
        num_steps: PositiveInt = 60,
        batch_size: BatchSize = 16,
        learning_rate: LearningRate = 0.05,
        num_samples: NumSamples = 40,
        num_inference_steps: NumInferenceSteps = 25,
        seed: Seed = 0,
    ):
        if templates:  # there may be none, but none without the concept
            require_templates("evaluation.metrics.robustness.templates", templates)
        named = () if concept is None else listed("evaluation.metrics.robustness.concept", concept)
        self._concepts = tuple(map(str, named))
        self.paraphrases = prompts_for(self._concepts, templates)
        self.num_restarts, self.num_steps, self.batch_size = num_restarts, num_steps, batch_size
        self.learning_rate, self.num_samples, self.seed = learning_rate, num_samples, seed
        self.num_inference_steps = num_inference_steps

    def measure(self, view: View) -> Rows:
        model, data, judge = view.model, view.data, view.judge
        descent, drawing = (
            make_generator(self.seed, f"robustness {of}", judge.device) for of in ("descent", "drawing")
        )

        with evaluating(model), frozen(model):
            forget, paraphrases, retain = self._conditions(model, data, judge.device)
            tried, labels = [], data.spec.labels
            for number, content in enumerate(data.spec.forget_contents):
                own, images = forget, data.forget
                if len(data.spec.forget_contents) > 1:
                    asked = zip(labels.forget, forget, strict=True)
                    own = [embedding for label, embedding in asked if labels.contents[label] == content]
                    images = images.select(images.contents == content)
                turns = zip_longest(own, paraphrases[number % len(paraphrases)], retain)
                starts = [start for turn in turns for start in turn if start is not None]
                tried += [self._sought(model, images, start, descent) for start in starts[: self.num_restarts]]
            tried += [*forget, *chain.from_iterable(paraphrases)]
            return {"attack": best_shows(view, tried, self.num_samples, self.num_inference_steps, drawing)}

    @torch.no_grad()
    def _conditions(
        self, model: GenerativeModel, data: ForgetRetain, device: torch.device
    ) -> tuple[Sequence[Tensor], list[Sequence[Tensor]], Sequence[Tensor]]:
        """The embeddings, each "1 s d", of the forget prompts, of the paraphrases concept by concept, and of retain
        prompts, evenly chosen.
        """
        labels = data.spec.labels
        retain = torch.tensor(labels.retain)
        retain = retain[torch.linspace(0, len(retain) - 1, min(len(retain), self.num_restarts)).long()]
        return (
            model.embeddings(torch.tensor(labels.forget, device=device)).split(1),
            [part.split(1) for part in model.embed(self.paraphrases).chunk(len(self._concepts))]
            if self.paraphrases
            else [()],
            model.embeddings(retain.to(device)).split(1),
        )

    def _sought(
        self, model: GenerativeModel, images: LabelledImages, start: Float[Tensor, "1 s d"], generator: torch.Generator
    ) -> Float[Tensor, "1 s d"]:
        """An embedding that explains these images better than the one to start at."""
        with torch.inference_mode(False), torch.enable_grad():
            embedding = start.detach().clone().requires_grad_()
            optimizer = torch.optim.Adam([embedding], self.learning_rate)
            for _ in range(self.num_steps):
                cost = loss_under(model, images, self.batch_size, generator)
                (embedding.grad,) = torch.autograd.grad(cost(embedding), [embedding])
                optimizer.step()
        return embedding.detach()

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        return {"attack_success": at_least_drawn(samples, rows["attack"])}

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        return {"attack": "embedding", **{name: part for name, part in vars(self).items() if name != "_concepts"}}


def loss_under(
    model: GenerativeModel, images: LabelledImages, batch_size: int, generator: torch.Generator
) -> Callable[[Float[Tensor, "1 s d"]], Float[Tensor, ""]]:
    """Of an embedding the denoising loss of a batch of these images under it, a mean over the entries of what is
    denoised. Images, timesteps and noise are drawn now.
    """
    device = generator.device
    rows = torch.randint(len(images), (batch_size,), generator=generator, device=device)
    x0 = to_unit_range(images.pixels[rows.cpu()].to(device))
    t = torch.randint(model.num_train_timesteps, (batch_size,), generator=generator, device=device)
    eps = torch.randn((batch_size, *model.sample_shape), generator=generator, device=device)

    def cost(embedding: Float[Tensor, "1 s d"]) -> Float[Tensor, ""]:
        loss = denoising_loss(model, x0, embedding.expand(batch_size, -1, -1), t, eps).mean()
        return loss / eps[0].numel()

    return cost


def best_shows(
    view: View,
    tried: Sequence[Float[Tensor, "1 s d"]],
    num_samples: int,
    num_inference_steps: int,
    generator: torch.Generator,
) -> Bool[Tensor, "n"]:
    """In which pictures under an embedding the judge sees what was to be forgotten: under the one of those `tried`
    that shows it most often, found on `num_samples` pictures of each; these are as many others.
    """

    def shows(embedding: Float[Tensor, "1 s d"]) -> Bool[Tensor, "n"]:
        cond = embedding.expand(num_samples, -1, -1)
        images = view.model.sample(num_samples, cond, generator, num_inference_steps)
        pictures = to_uint8(images, "pictures under an embedding sought for the concept")
        return is_to_forget(view.data.spec, view.judge(pictures).contents)

    return shows(max(tried, key=lambda embedding: int(shows(embedding).sum())))


def at_least_drawn(samples: Samples, shown: Bool[Tensor, "n"]) -> float:
    """The share of pictures under an attack that show the concept; no less than that of the samples, which are an
    attack, too.
    """
    return max(share(shown), share(is_to_forget(samples.spec, samples.forget.samples.contents)))


class frozen:
    """No weight asks for a gradient in here; afterwards those that did do again."""

    def __init__(self, model: GenerativeModel):
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]

    def __enter__(self) -> None:
        for weight in self.weights:
            weight.requires_grad_(False)

    def __exit__(self, *_: Any) -> None:
        for weight in self.weights:
            weight.requires_grad_(True)
