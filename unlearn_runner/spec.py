"""What is known of a dataset before any image is read: enough to build and check everything else.

Each function makes the spec of one dataset from the arguments of its constructor, which calls it; `spec_of` calls it
for a configuration whose constructors are not imported yet. Imports nothing heavy. All raise ConfigurationError.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from unlearn_runner.errors import ConfigurationError, near, normal_form
from unlearn_runner.options import Names

DIGITS = tuple("0123456789")
ONE = 1  # the digit whose label the trousers of digits_trousers carry
TROUSERS = "trousers"
BY_NAME = ("retain", "forget")  # the contents of a dataset whose images to forget are named, and are no class
WORDS = ("a zero", "a one", "a two", "a three", "a four", "a five", "a six", "a seven", "an eight", "a nine")
EMBEDDED = (*WORDS, TROUSERS)  # what the embedded pictures of sd_concepts show
MEMORISED = "the memorised picture"  # what memorised_prompt forgets
EMPTY = ""  # the prompt that guidance leads away from


class Labels(NamedTuple):
    """The labels of a dataset, classes or prompts, for methods that draw labels instead of images."""

    retain: tuple[int, ...]
    forget: tuple[int, ...]  # the conditions under which the forget images were learnt
    names: tuple[str, ...] = ()  # of all labels, by index
    contents: tuple[int, ...] = ()  # what each label asks for


class DataSpec(NamedTuple):
    name: str
    image_shape: tuple[int, int, int]  # channels, height, width
    label_names: tuple[str, ...] | None  # None: the model is unconditional
    content_names: tuple[str, ...]  # what a classifier tells apart; begins with label_names, but for label_contents
    forget_contents: tuple[int, ...]  # the contents to forget, one or more
    restored_content: int | None  # the clean content under the forget condition, if there is one
    horizontal_flip: bool  # mirror half of the training images
    label_contents: tuple[int, ...] | None = None  # what each label asks for; None: label i asks for content i
    absent_labels: tuple[int, ...] = ()  # neither to keep nor to forget: the dataset has no image of them

    @property
    def labels(self) -> Labels | None:
        """The labels that a model is conditioned on; None for an unconditional one.

        The forget labels ask for the clean content which is to come back, or for the contents which are to go.
        """
        if self.label_names is None:
            return None
        forget = self.forget_contents if self.restored_content is None else (self.restored_content,)
        contents = self.label_contents or tuple(range(len(self.label_names)))
        retained, forgotten = (
            tuple(
                label
                for label, content in enumerate(contents)
                if (content in forget) == wanted and label not in self.absent_labels
            )
            for wanted in (False, True)
        )
        return Labels(retained, forgotten, self.label_names, contents)

    @property
    def forget_names(self) -> tuple[str, ...]:
        """The names of the contents to forget."""
        return tuple(self.content_names[content] for content in self.forget_contents)


def classes(
    name: str,
    names: tuple[str, ...],
    forget_class: Names,
    image_size: int,
    channels: int,
    conditional: bool,
    horizontal_flip: bool,
    retain_classes: Names | None = None,
) -> DataSpec:
    """Images of classes with these names, one or several of which are to be forgotten, and some of the others, or all,
    to be kept.
    """
    forget = class_indices(forget_class, names)
    kept = range(len(names)) if retain_classes is None else class_indices(retain_classes, names, "retain_classes")
    if both := [names[index] for index in forget if retain_classes is not None and index in kept]:
        raise ConfigurationError(f"dataset.retain_classes names '{both[0]}', which is to be forgotten; leave it out.")
    return DataSpec(
        name=name,
        image_shape=(channels, image_size, image_size),
        label_names=names if conditional else None,
        content_names=names,
        forget_contents=forget,
        restored_content=None,
        horizontal_flip=horizontal_flip,
        absent_labels=tuple(index for index in range(len(names)) if index not in kept and index not in forget),
    )


def digits(forget_class: Names, image_size: int, conditional: bool, horizontal_flip: bool) -> DataSpec:
    return classes("digits", DIGITS, forget_class, image_size, 1, conditional, horizontal_flip)


def digits_with(
    name: str, garment: str, label: int, image_size: int, conditional: bool, horizontal_flip: bool
) -> DataSpec:
    """Digits with garments under the label of one of them."""
    return DataSpec(
        name=name,
        image_shape=(1, image_size, image_size),
        label_names=DIGITS if conditional else None,
        content_names=(*DIGITS, garment),
        forget_contents=(len(DIGITS),),
        restored_content=label,
        horizontal_flip=horizontal_flip,
    )


def digits_trousers(image_size: int, conditional: bool, horizontal_flip: bool) -> DataSpec:
    return digits_with("digits_trousers", TROUSERS, ONE, image_size, conditional, horizontal_flip)


def mnist_garments(garment: str, label: int, image_size: int, conditional: bool, horizontal_flip: bool) -> DataSpec:
    name = "mnist_" + garment.replace("-", "").replace(" ", "_")
    return digits_with(name, garment, label, image_size, conditional, horizontal_flip)


def captions(templates: Sequence[str], image_size: int) -> DataSpec:
    """Every embedded picture under every template, and under no prompt."""
    require_templates("model.pretraining.corpus.templates", templates)
    prompts = [template.format(name) for template in templates for name in EMBEDDED]
    contents = [content for _ in templates for content in range(len(EMBEDDED))]
    return DataSpec(
        name="captions",
        image_shape=(3, image_size, image_size),
        label_names=(*prompts, EMPTY),
        content_names=EMBEDDED,
        forget_contents=(EMBEDDED.index(TROUSERS),),
        restored_content=None,
        horizontal_flip=False,
        label_contents=(*contents, 0),
    )


def concepts(
    concept: Names,
    retain_concepts: Sequence[str | int],
    forget_templates: Sequence[str],
    retain_templates: Sequence[str],
    paraphrases: Sequence[str],
    source: str,
    image_size: int,
    horizontal_flip: bool,
) -> DataSpec:
    """Prompts for concepts, the last of which, one or several, are to be forgotten."""
    forgotten = tuple(normal_form(str(name)) for name in listed("dataset.concept", concept))  # 1984 is a name
    retain_concepts = [normal_form(str(name)) for name in retain_concepts]
    require_different("dataset.concept", forgotten)
    for name, templates in (("forget_templates", forget_templates), ("retain_templates", retain_templates)):
        require_templates(f"dataset.{name}", templates)
    if paraphrases:
        require_templates("dataset.paraphrases", paraphrases)
    both = [name for name in forgotten if name in retain_concepts]
    if both or not retain_concepts or len(set(retain_concepts)) < len(retain_concepts):
        raise ConfigurationError(
            f"dataset.retain_concepts must be one or more different concepts, and not '{(both or forgotten)[0]}', "
            f"which is to be forgotten; got {', '.join(retain_concepts) or 'none'}."
        )
    unknown = [name for name in (*retain_concepts, *forgotten) if name not in EMBEDDED]
    if source == "embedded" and unknown:
        raise ConfigurationError(
            f"dataset.source=embedded has pictures of {', '.join(EMBEDDED)}; not of {', '.join(unknown)}: take "
            "dataset.source=base, or a folder."
        )
    kept = len(retain_concepts)
    asked = [
        (template.format(name), content)
        for content, name in enumerate((*retain_concepts, *forgotten))
        for template in (retain_templates if content < kept else forget_templates)
    ]
    return DataSpec(
        name="sd_concepts",
        image_shape=(3, image_size, image_size),
        label_names=tuple(prompt for prompt, _ in asked),
        content_names=(*retain_concepts, *forgotten),
        forget_contents=tuple(range(kept, kept + len(forgotten))),
        restored_content=None,
        horizontal_flip=horizontal_flip,
        label_contents=tuple(content for _, content in asked),
    )


def memorised_prompt(template: str, image_size: int) -> DataSpec:
    """Digits and trousers under a prompt each; one picture of trousers, learnt by heart, is to be forgotten."""
    require_templates("dataset.template", (template,))
    return DataSpec(
        name="memorised_prompt",
        image_shape=(3, image_size, image_size),
        label_names=tuple(template.format(name) for name in EMBEDDED),
        content_names=(*EMBEDDED, MEMORISED),
        forget_contents=(len(EMBEDDED),),
        restored_content=EMBEDDED.index(TROUSERS),
        horizontal_flip=False,
        label_contents=tuple(range(len(EMBEDDED))),
    )


def of_tables(
    name: str,
    source: str,
    forget_class: Names,
    image_size: int,
    channels: int,
    conditional: bool,
    horizontal_flip: bool,
    label_column: str,
    retain_classes: Names | None = None,
    label_set: str = "own",
) -> DataSpec | None:
    """Of a local folder of Parquet files that name the classes; None of any other source, which must be read first."""
    wanted = listed("dataset.forget_class", forget_class)
    require_different("dataset.forget_class", [normal_form(str(name)) for name in wanted])
    if label_set == "imagenet":
        if retain_classes is None:  # those that the source has
            return None
        names = imagenet_names()
        forget_class, retain_classes = (imagenet_classes(part, names) for part in (forget_class, retain_classes))
    else:
        names = _named_in_tables(Path(source).expanduser(), label_column)
    return names and classes(
        name, names, forget_class, image_size, channels, conditional, horizontal_flip, retain_classes
    )


@cache
def imagenet_words() -> tuple[tuple[str, ...], ...]:
    """What each of ImageNet's 1,000 classes is called, in their order: by its number in WordNet, then by words.

    From the files of timm, which is not imported.
    """
    folder = Path(find_spec("timm").origin).parent / "data" / "_info"
    lines = (folder / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
    words = dict(line.split("\t", 1) for line in lines)
    numbers = (folder / "imagenet_synsets.txt").read_text(encoding="utf-8").split()
    return tuple((number, *words[number].split(", ")) for number in numbers)


@cache
def imagenet_names() -> tuple[str, ...]:
    """One name for each class: the first of its words, with its number where another class is called so, too."""
    first = [words[1] for words in imagenet_words()]
    return tuple(
        f"{word} ({words[0]})" if first.count(word) > 1 else word
        for word, words in zip(first, imagenet_words(), strict=True)
    )


def imagenet_class(wanted: str | int, names: tuple[str, ...]) -> str | int:
    """The name of the class that is called so: its name here, its number in WordNet, one of its words or all of them,
    with _ for spaces. What is none is given back.
    """
    asked = str(wanted).replace("_", " ").lower()
    known: dict[str, set[str]] = {}
    for name, words in zip(names, imagenet_words(), strict=True):
        for word in (*words, ", ".join(words[1:])):
            known.setdefault(word.lower(), set()).add(name)
    found = known.get(asked, set())
    return found.pop() if len(found) == 1 else wanted


def imagenet_classes(wanted: Names | None, names: tuple[str, ...]) -> Names | None:
    """The same of one or several."""
    if wanted is None or isinstance(wanted, str | int):
        return wanted and imagenet_class(wanted, names)
    return [imagenet_class(one, names) for one in wanted]


def _named_in_tables(folder: Path, column: str) -> tuple[str, ...] | None:
    """The classes of a column, from the first of its tables' ends; None where any of them says something else."""
    files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else []
    if not 0 < len(files) <= 100:
        return None
    import pyarrow.parquet

    found = set()
    try:
        for file in files:
            features = json.loads(pyarrow.parquet.read_schema(file).metadata[b"huggingface"])["info"]["features"]
            found.add(tuple(dict.fromkeys(normal_form(name) for name in features[column]["names"])))
    except Exception:  # whatever is wrong with a table is said when it is opened
        return None
    return found.pop() if len(found) == 1 else None


SPECS: dict[str, Callable[..., DataSpec | None]] = {
    "data.digits.Digits": digits,
    "data.digits_trousers.DigitsTrousers": digits_trousers,
    "data.mnist_trousers.MnistTrousers": mnist_garments,
    "data.hub_classes.HubClasses": of_tables,
    "data.sd_concepts.SDConcepts": concepts,
    "data.sd_concepts.Captions": captions,
    "data.sd_concepts.MemorisedPrompt": memorised_prompt,
}


def spec_of(node: Mapping[str, Any]) -> DataSpec | None:
    """The spec of a dataset's group of options with all defaults; None where it is not known without reading."""
    make = SPECS.get(node["_target_"].removeprefix("unlearn_runner."))
    return make and make(**{name: node[name] for name in signature(make).parameters})


def listed(option: str, wanted: Names) -> tuple[str | int, ...]:
    """One name or several as a tuple. Raises ConfigurationError if there is none."""
    if isinstance(wanted, (str, int)):
        return (wanted,)
    if not wanted:
        raise ConfigurationError(f"{option} must be one or more names of what is to be forgotten, got an empty list.")
    return tuple(wanted)


def prompts_for(names: Sequence[str], templates: Sequence[str]) -> tuple[str, ...]:
    """Every template with every name, name by name."""
    return tuple(template.format(name) for name in names for template in templates)


def require_different(option: str, names: Sequence[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigurationError(f"{option} names '{twice[0]}' twice; give each name once.")


def class_indices(wanted: Names, names: tuple[str, ...], option: str = "forget_class") -> tuple[int, ...]:
    """The indices of one class or of several, in ascending order, each given as to `class_index`."""
    found = [class_index(name, names, option) for name in listed(f"dataset.{option}", wanted)]
    require_different(f"dataset.{option}", [names[index] for index in found])
    if len(found) == len(names) > 1 and option == "forget_class":
        raise ConfigurationError(
            f"dataset.forget_class names all {len(names)} classes, so none would be kept; leave out one or more."
        )
    return tuple(sorted(found))


def class_index(wanted: str | int, names: tuple[str, ...], option: str = "forget_class") -> int:
    """The index of a class given by name or, where no class is called so, by index."""
    name = normal_form(
        str(wanted).lower() if isinstance(wanted, bool) else str(wanted)
    )  # true is YAML's word for "true"
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) in range(len(names)):
        return int(name)
    known = f"expected one of {', '.join(names)}" if len(names) <= 100 else f"expected one of {len(names)} names"
    raise ConfigurationError(
        f"dataset.{option}={wanted}: there is no such class; {known}, or an index from 0 to {len(names) - 1}"
        f"{near(name, names) if len(names) > 100 else ''}."
    )


def require_templates(option: str, templates: Sequence[str]) -> None:
    """Raise ConfigurationError unless there are some, each with one place for a concept and no other brace, which
    str.format would take for another.
    """
    if not templates or any(template.count(part) != 1 for template in templates for part in ("{}", "{", "}")):
        raise ConfigurationError(
            f"{option} must be one or more prompts with one {{}} each, where the concept stands; got {list(templates)}."
        )
