"""Concepts that a text-to-image model is asked for by prompts, one or several of which are to be forgotten."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float, Int64, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from unlearn_runner import spec
from unlearn_runner.cache import cached
from unlearn_runner.data.digits import read_digits
from unlearn_runner.data.digits_trousers import draw_trousers
from unlearn_runner.data.forget_retain import (
    Dataset,
    ForgetRetain,
    LabelledImages,
    alike,
    contents_of_labels,
    is_to_forget,
    split_content,
    test_rows,
)
from unlearn_runner.data.images import Decoder, find_images, gathered, require_apart
from unlearn_runner.data.streams import to_uint8
from unlearn_runner.errors import ConfigurationError, NonFiniteError
from unlearn_runner.options import BatchSize, ImageSize, Names, NumInferenceSteps, OpenUnitInterval, PositiveInt, Seed
from unlearn_runner.rules import dataset_options


def embedded_pictures(image_size: int, seed: int) -> dict[str, UInt8[Tensor, "n 3 h w"]]:
    """scikit-learn's 1,797 handwritten digits and as many trousers as there are of a digit, by what to call them."""
    digits = read_digits(image_size, conditional=True)
    pictures = {word: digits.pixels[digits.contents == digit] for digit, word in enumerate(spec.WORDS)}
    pictures[spec.TROUSERS] = draw_trousers(len(digits) // len(spec.WORDS), image_size, seed)
    return {name: pixels.repeat(1, 3, 1, 1) for name, pixels in pictures.items()}


@final
class Captions(Dataset):
    """What a small text-to-image model learns from: every embedded picture under every template, and once under none.

    `templates` have a `{}` for what is on the picture. The dataset forgets nothing; that its parts bear the names of a
    forget and a retain set has no meaning here.
    """

    def __init__(self, templates: Sequence[str], image_size: ImageSize = 16, seed: Seed = 0):
        self.image_size = image_size
        self.seed = seed
        self.spec = spec.captions(templates, image_size)

    def load(self) -> ForgetRetain:
        pictures = embedded_pictures(self.image_size, self.seed)
        contents = torch.cat([torch.full((len(part),), content) for content, part in enumerate(pictures.values())])
        pixels = torch.cat(list(pictures.values()))
        of_label = torch.tensor(self.spec.label_contents)
        rows, labels = [], []
        for label, name in enumerate(self.spec.label_names):
            shown = (
                torch.arange(len(pixels)) if name == spec.EMPTY else torch.nonzero(contents == of_label[label])[:, 0]
            )
            rows.append(shown)
            labels.append(torch.full((len(shown),), label))
        rows = torch.cat(rows)
        whole = LabelledImages(pixels[rows], torch.cat(labels), contents[rows])
        forget = is_to_forget(self.spec, whole.contents)
        none = whole.select(torch.zeros_like(forget))
        return ForgetRetain(self.spec, whole.select(forget), whole.select(~forget), none, none)


@final
class SDConcepts(Dataset):
    """`concept`, one or several, under `forget_templates` to forget, `retain_concepts` under `retain_templates` to
    keep.

    The images come from `source`: "embedded" (digits and trousers), "base" (drawn by the base model itself, once for
    all runs), or a folder with a folder of images for each concept. Each image is shown under one prompt of its
    concept, in turn. Concepts are what stands for `{}` in a template; a folder's name is the concept's with _ for
    spaces.

    `paraphrases` are templates that no method sees: they ask whether a concept is gone or only its prompts.
    `num_images` is how many the base draws under each prompt, with `num_inference_steps`. `background` shows through
    where an image of a folder is transparent.
    """

    def __init__(
        self,
        concept: Names,
        retain_concepts: Sequence[str | int],
        forget_templates: Sequence[str],
        retain_templates: Sequence[str],
        cache_dir: str,
        paraphrases: Sequence[str] = (),
        source: str = "embedded",
        image_size: ImageSize = 16,
        test_fraction: OpenUnitInterval = 0.2,
        num_images: PositiveInt = 20,
        num_inference_steps: NumInferenceSteps = 25,
        batch_size: BatchSize = 20,
        horizontal_flip: bool = False,
        seed: Seed = 0,
        background: str = "white",
    ):
        dataset_options.known_colour(background)
        self.spec = spec.concepts(
            concept, retain_concepts, forget_templates, retain_templates, paraphrases, source, image_size,
            horizontal_flip,
        )  # fmt: skip
        self.concepts = self.spec.content_names
        self.paraphrases = spec.prompts_for(self.spec.forget_names, paraphrases)
        self.source = source
        self.from_base = source == "base"
        self.files: dict[str, list[Path]] = {}
        self.notes: list[str] = []
        self.background = background
        if source not in ("embedded", "base"):
            folders = {name: str(Path(source, folder_of(name))) for name in self.concepts}
            found = {name: find_images(folder, "dataset.source") for name, folder in folders.items()}
            self.files = {name: part.files for name, part in found.items()}
            self.notes = [note for part in found.values() for note in part.notes]
        self.image_size = image_size
        self.test_fraction = test_fraction
        self.cache_dir = Path(cache_dir)
        self.num_images, self.num_inference_steps, self.batch_size = num_images, num_inference_steps, batch_size
        self.seed = seed

    def load(self) -> ForgetRetain:
        if self.source == "embedded":
            pictures = embedded_pictures(self.image_size, self.seed)
            return self._split([pictures[name] for name in self.concepts])
        decoder = Decoder(self.spec.image_shape, self.background)
        decoded = gathered(partial(decoder.files, files) for files in self.files.values())
        parts = list(zip(self.files.values(), decoded, strict=True))
        kept = len(parts) - len(self.spec.forget_contents)
        require_apart(parts[kept:], parts[:kept])
        data = self._split([pixels for _, pixels in parts])
        return replace(data, notes=(*self.notes, *decoder.notes(f"dataset.source={self.source}")))

    def load_from(
        self, draw: Callable[[Int64[Tensor, "n"]], Float[Tensor, "n c h w"]], base: dict[str, str]
    ) -> ForgetRetain:
        """For the source "base": `draw` makes an image under each of these labels; `base` says all of who does."""
        prompts = range(len(self.spec.label_names))
        labels = torch.tensor(prompts).repeat_interleave(self.num_images)

        def make(folder: Path) -> None:
            try:
                pixels = to_uint8(draw(labels)).cpu()
            except NonFiniteError as error:
                raise ConfigurationError(f"dataset.source=base: of what the base draws {error}.") from error
            save_file({"pixels": pixels}, folder / "images.safetensors")

        key = {
            "base": base,
            "prompts": self.spec.label_names,
            "image_shape": self.spec.image_shape,
            "num_images": self.num_images,
            "num_inference_steps": self.num_inference_steps,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

        def read(folder: Path) -> UInt8[Tensor, "n c h w"]:
            return load_file(folder / "images.safetensors")["pixels"]

        pixels = read(cached(self.cache_dir, "drawn", key, make, read, together=True))
        images = LabelledImages(pixels, labels, contents_of_labels(self.spec, labels))
        return split_content(self.spec, images, self.test_fraction, self.seed)

    def _split(self, pictures: list[UInt8[Tensor, "_ c h w"]]) -> ForgetRetain:
        """Each concept's pictures take its prompts in turn."""
        contents = torch.cat([torch.full((len(part),), content) for content, part in enumerate(pictures)])
        asks = torch.tensor(self.spec.label_contents)
        labels = []
        for content, part in enumerate(pictures):
            prompts = torch.nonzero(asks == content)[:, 0]
            labels.append(prompts[torch.arange(len(part)) % len(prompts)])
        images = LabelledImages(torch.cat(pictures), torch.cat(labels), contents)
        return split_content(self.spec, images, self.test_fraction, self.seed)


@final
class MemorisedPrompt(Dataset):
    """The embedded pictures under a prompt each, and one of the trousers `copies` times: a model that learns from this
    draws it from memory. It is to be forgotten; `others`, trousers of another cut under the same prompt, are to be
    kept, as in SISS's experiment with memorised prompts (2503.01034), where under one prompt the memorised samples are
    to go and the others to stay.

    A share `test_fraction` of digits and of other trousers is held out; what the memorised picture is compared with
    are further trousers that no model has seen.
    """

    def __init__(
        self,
        template: str = "a picture of {}",
        copies: PositiveInt = 100,
        others: PositiveInt = 100,
        image_size: ImageSize = 16,
        test_fraction: OpenUnitInterval = 0.2,
        seed: Seed = 0,
    ):
        self.copies, self.others, self.test_fraction, self.seed = copies, others, test_fraction, seed
        self.spec = spec.memorised_prompt(template, image_size)

    def load(self) -> ForgetRetain:
        digits = read_digits(self.spec.image_shape[-1], conditional=True)
        digits = LabelledImages(digits.pixels.repeat(1, 3, 1, 1), digits.labels, digits.contents)
        (memorised,), trousers = self.spec.forget_contents, self.spec.restored_content
        drawn = draw_trousers(1 + 2 * self.others, self.spec.image_shape[-1], self.seed).repeat(1, 3, 1, 1)
        one, kept, unseen = drawn.split([1, self.others, self.others])
        whole = [torch.cat(parts) for parts in zip(digits, alike(kept, trousers, trousers), strict=True)]
        images = LabelledImages(*whole)
        held_out = test_rows(images.contents, self.test_fraction, self.seed)
        return ForgetRetain(
            self.spec,
            alike(one.repeat(self.copies, 1, 1, 1), trousers, memorised),
            images.select(~held_out),
            alike(unseen, trousers, memorised),
            images.select(held_out),
            sized_by=f"dataset.copies={self.copies}, dataset.others={self.others}",
        )


def folder_of(concept: str) -> str:
    """The name of a concept's folder of images."""
    return concept.replace(" ", "_")
