"""The usual judge: a small convolutional network that names what is on a picture and supplies features."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, final

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le, MultipleOf
from jaxtyping import Float, Int64, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unlearn_runner.cache import cached, write_json
from unlearn_runner.data.forget_retain import ForgetRetain
from unlearn_runner.data.streams import Pool, Shuffled, half_mirrored, to_unit_range
from unlearn_runner.errors import ConfigurationError, NonFiniteError
from unlearn_runner.evaluation.features import FeatureExtractor
from unlearn_runner.evaluation.judge import (
    Judge,
    JudgeRecipe,
    Recognizer,
    RecognizingJudge,
    accuracies,
    contents_to_forget,
)
from unlearn_runner.models.model import require_finite
from unlearn_runner.options import BatchSize, LearningRate, PositiveInt, Seed, Width
from unlearn_runner.types import make_generator


@dataclass(frozen=True)
class ClassifierRecipe:
    """How the classifier is trained. It decides what the weights are, so all of it enters the cache key."""

    width: Annotated[int, Gt(0), Le(2048), MultipleOf(8)] = 16
    num_features: Width = 64
    max_steps: PositiveInt = 300
    batch_size: BatchSize = 128
    learning_rate: LearningRate = 2e-3
    max_shift: Annotated[int, Ge(0), Le(1024)] = 1  # pixels of random translation; mirrored where the dataset mirrors
    seed: Seed = 0


@final
@dataclass(frozen=True)
class TrainedClassifier(JudgeRecipe):
    """A classifier of the dataset's contents, trained on its images once and cached; features are its own, or those
    of `extractor` if there is one.
    """

    classifier: ClassifierRecipe
    extractor: FeatureExtractor | None = None

    @property
    def num_features(self) -> int:
        return (self.extractor or self.classifier).num_features

    @property
    def max_steps(self) -> int:
        return self.classifier.max_steps

    def judge(
        self,
        data: ForgetRetain,
        cache_dir: Path,
        device: torch.device,
        show: Callable[[int, dict[str, float]], None] | None = None,
    ) -> Judge:
        return trained_judge(data, self.classifier, cache_dir, device, self.extractor, show)


@final
class Classifier(Recognizer):
    """Three convolutional stages, average pooling, a feature layer and logits over the dataset's contents.

    The features that it returns are divided by `feature_scale`, their root mean square over the training images,
    so that distances between them are of order one whatever the dataset.
    """

    name = ""  # of a classifier that is in no cache
    called = "the classifier"
    mend = "Train it longer (judge.classifier.max_steps) or on more images."
    layer = "features"

    def __init__(self, channels: int, num_contents: int, width: int, num_features: int):
        super().__init__()
        self.num_contents, self.num_features = num_contents, num_features

        def stage(c_in: int, c_out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(c_in, c_out, 3, padding=1), nn.GroupNorm(8, c_out), nn.ReLU(),
                nn.Conv2d(c_out, c_out, 3, padding=1), nn.GroupNorm(8, c_out), nn.ReLU(),
                nn.MaxPool2d(2),
            )  # fmt: skip

        self.stages = nn.Sequential(stage(channels, width), stage(width, 2 * width), stage(2 * width, 4 * width))
        self.features = nn.Sequential(nn.Linear(4 * width * 4, num_features), nn.ReLU())
        self.head = nn.Linear(num_features, num_contents)
        self.register_buffer("feature_scale", torch.ones(()))

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"]]:
        features = self.features(F.adaptive_avg_pool2d(self.stages(to_unit_range(images)), 2).flatten(1))
        return features / self.feature_scale, self.head(features)


def trained_judge(
    data: ForgetRetain,
    recipe: ClassifierRecipe,
    cache_dir: Path,
    device: torch.device,
    extractor: FeatureExtractor | None = None,
    show: Callable[[int, dict[str, float]], None] | None = None,
) -> RecognizingJudge:
    """The classifier for a dataset, trained on its training images once and cached, tested on its held-out ones.

    `show`, if given, is called on the way with a step and its loss, images so far and seconds so far.
    """
    key = {"version": 3, "data": data.fingerprint, "recipe": asdict(recipe)}

    def read(folder: Path) -> RecognizingJudge:
        classifier = _build(data, recipe)
        classifier.load_state_dict(load_file(folder / "classifier.safetensors"))
        require_finite(classifier, "the classifier")
        classifier.name = f"classifiers/{folder.name}"
        return RecognizingJudge(classifier, device, extractor, **json.loads((folder / "report.json").read_text()))

    return read(cached(cache_dir, "classifiers", key, lambda place: _train(data, recipe, place, device, show), read))


def _build(data: ForgetRetain, recipe: ClassifierRecipe) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Classifier(data.spec.image_shape[0], len(data.spec.content_names), recipe.width, recipe.num_features)


def _train(
    data: ForgetRetain,
    recipe: ClassifierRecipe,
    folder: Path,
    device: torch.device,
    show: Callable[[int, dict[str, float]], None] | None,
) -> None:
    started = time.perf_counter()
    generator = make_generator(recipe.seed, "classifier")
    classifier = _build(data, recipe).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=recipe.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.max_steps)
    pool = Pool([data.retain, contents_to_forget(data)], torch.device("cpu"))
    rows = _balanced(pool.contents)
    order = Shuffled(len(rows), generator)
    for step in range(1, recipe.max_steps + 1):
        drawn = pool.take(rows[order.draw(recipe.batch_size)])
        x = _shifted(drawn.pixels, recipe.max_shift, generator).to(device)
        if data.spec.horizontal_flip:
            x = half_mirrored(x, generator)
        loss = F.cross_entropy(classifier(x)[1], drawn.contents.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if show is not None and (step % 10 == 0 or step == recipe.max_steps):
            seconds = time.perf_counter() - started
            show(step, {"loss/classifier": loss.item(), "images": step * recipe.batch_size, "seconds": seconds})

    try:
        require_finite(classifier, "the classifier")
    except NonFiniteError as error:
        raise ConfigurationError(
            f"training the classifier diverged ({error}); judge.classifier.learning_rate must be lower, it is "
            f"{recipe.learning_rate}."
        ) from error
    judge = RecognizingJudge(classifier, device)
    seen = pool.take(rows[order.draw(min(len(rows), 5000))]).pixels
    classifier.feature_scale.copy_(judge(seen).features.square().mean().sqrt())
    save_file(classifier.state_dict(), folder / "classifier.safetensors")
    write_json(folder / "report.json", accuracies(judge, data))


def _balanced(contents: Int64[Tensor, "n"], at_most: int = 20) -> Int64[Tensor, "m"]:
    """Row numbers in which a content rarer than the most frequent one is repeated, up to `at_most` times."""
    counts = contents.bincount().clamp(min=1)
    repeats = (counts.max() / counts).round().clamp(1, at_most).long()
    return torch.arange(len(contents)).repeat_interleave(repeats[contents])


def _shifted(pixels: UInt8[Tensor, "b c h w"], most: int, generator: torch.Generator) -> UInt8[Tensor, "b c h w"]:
    """Each image moved by up to `most` pixels each way, edges repeated."""
    if most == 0:
        return pixels
    b, _, h, w = pixels.shape
    padded = F.pad(pixels.float(), (most,) * 4, mode="replicate").to(torch.uint8)
    dy, dx = torch.randint(2 * most + 1, (2, b), generator=generator)
    rows = torch.arange(h)[None, :] + dy[:, None]
    columns = torch.arange(w)[None, :] + dx[:, None]
    return padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
