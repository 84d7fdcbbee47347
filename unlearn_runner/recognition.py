"""Which texts, outputs or body parts stand for which content of a dataset, where a judge is not trained on its images.

Functions of plain values. The recipes of judges call them when they are built for a dataset; `check` calls them for a
configuration of which nothing is built yet. Imports nothing heavy. All raise ConfigurationError, and name the options
below `path`.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from unlearn_runner.errors import ConfigurationError, near, normal_form
from unlearn_runner.spec import DataSpec, require_templates

PATH = "judge.recognizer"  # where a recognizer's options are, unless another one holds it
RUNS = "torch.jit.load"  # what would run the program in a file


def _same_contents(option: str, given: Sequence[str], names: Sequence[str], all_of_them: bool) -> None:
    for name in given:
        if name not in names:
            raise ConfigurationError(
                f"{option}.{name}: the dataset has no such content{near(name, names)}; it has {', '.join(names)}."
            )
    missing = [name for name in names if name not in given] if all_of_them else []
    if missing:
        raise ConfigurationError(
            f"{option} must say of every content of the dataset which outputs are its; missing: {', '.join(missing)}."
        )


def texts_of_contents(
    names: Sequence[str],
    templates: Sequence[str],
    prompts: Mapping[str, str | Sequence[str]] | None,
    nothing: Sequence[str],
    path: str = PATH,
) -> list[list[str]]:
    """The texts of each content, by `prompts` or else by all `templates`; then each text of `nothing` by itself."""
    require_templates(f"{path}.templates", templates)
    own = {normal_form(name): [text] if isinstance(text, str) else list(text) for name, text in (prompts or {}).items()}
    _same_contents(f"{path}.prompts", list(own), names, all_of_them=False)
    found = [own.get(name) or [template.format(name) for template in templates] for name in names]
    found += [[text] for text in nothing]
    owner: dict[str, int] = {}
    for index, texts in enumerate(found):
        for text in texts:
            if not text.strip():
                raise ConfigurationError(f"{path}: a text that says what a picture shows must not be empty.")
            if owner.setdefault(text, index) != index:
                raise ConfigurationError(
                    f"{path}: '{text}' would stand for two things, which could not be distinguished; give them "
                    f"different {path}.prompts or {path}.nothing."
                )
    return found


def outputs_of_contents(
    names: Sequence[str],
    outputs: Mapping[str, int | Sequence[int]] | None,
    nothing: Sequence[int] | Literal["rest"],
    path: str = PATH,
    count: int | None = None,
) -> list[list[int]]:
    """The outputs of a network that are each content's, by number from 0; then, if there are some, those of none.

    `count` is how many outputs the network has; None: not known yet. Without `outputs` number i is content i's.
    """
    own = {normal_form(name): [rows] if isinstance(rows, int) else list(rows) for name, rows in (outputs or {}).items()}
    if own:
        _same_contents(f"{path}.outputs", list(own), names, all_of_them=True)
    elif count is not None and count != len(names):
        raise ConfigurationError(
            f"{path}.outputs must say which of the network's {count} outputs are which content's, as the dataset has "
            f"{len(names)}: {', '.join(names)}."
        )
    found = [own[name] for name in names] if own else [[index] for index in range(len(names))]
    taken = [row for rows in found for row in rows]
    none = [row for row in range(count or 0) if row not in taken] if nothing == "rest" else list(nothing)
    for name, rows in zip(names, found, strict=True):
        if not rows:
            raise ConfigurationError(f"{path}.outputs.{name} must be one or more numbers of outputs, got [].")
    for row in (every := [*taken, *none]):
        if count is not None and row >= count:
            raise ConfigurationError(f"{path}: the network has outputs 0 to {count - 1}, and none with number {row}.")
        if every.count(row) > 1:
            raise ConfigurationError(f"{path}: output {row} is given twice, in {path}.outputs or {path}.nothing.")
    return found + ([none] if none else [])


def file_of_network(file: str, image_size: int | None, path: str = PATH) -> Path:
    """The file or folder; it must be there, and one that says nothing of its images' size needs that option."""
    place = Path(file).expanduser()
    if place.is_dir():
        missing = [name for name in ("config.json", "model.safetensors") if not (place / name).is_file()]
        if missing and not (place / "model.safetensors.index.json").is_file():
            raise ConfigurationError(
                f"{path}.file={file} must be a TorchScript file, or a folder with config.json and model.safetensors of "
                f"an image classifier in transformers' format; it has no {' and no '.join(missing)}."
            )
    elif not place.is_file():
        raise ConfigurationError(f"{path}.file={file}: there is no such file or folder.")
    elif place.suffix == ".safetensors":
        raise ConfigurationError(
            f"{path}.file={file} holds weights alone; give the folder, with the config.json that says whose they are."
        )
    elif image_size is None:
        raise ConfigurationError(
            f"{path}.image_size is missing: TorchScript does not say at how many pixels a side it sees images."
        )
    return place


def require_trust(file: str, allow: Sequence[str], path: str = PATH) -> None:
    """TorchScript is a program, which runs with the user's rights."""
    if Path(file).expanduser().is_file() and not RUNS.startswith(tuple(allow)):
        raise ConfigurationError(
            f"{path}.file={file} is a program to torch, which can read and write files; if you trust it, say so on the "
            "command line: ++security.allow=[torch.jit.], or give a folder with config.json and model.safetensors."
        )


def require_one_to_forget(spec: DataSpec) -> None:
    """NudeNet knows one content."""
    if len(spec.forget_contents) > 1:
        raise ConfigurationError(
            f"judge=nudenet knows one content to forget, and the dataset has {len(spec.forget_contents)}: "
            f"{', '.join(spec.forget_names)}; forget one of them in a run, or take another judge."
        )


def require_two_contents(names: Sequence[str], forget: int, others: bool, path: str = PATH) -> None:
    """What else there is than the content that NudeNet knows must be one, or be distinguished by `others`."""
    if not others and len(names) != 2:
        kept = [name for content, name in enumerate(names) if content != forget]
        raise ConfigurationError(
            f"judge=nudenet tells '{names[forget]}' from all else, and not {', '.join(kept)} from each other; say who "
            f"does with judge/recognizer@{path}.others=clip, or take a dataset that keeps one content."
        )


def require_nudenet() -> None:
    if any(find_spec(package) is None for package in ("nudenet", "onnxruntime", "cv2")):
        raise ConfigurationError("judge=nudenet needs the package nudenet: pip install 'unlearn_runner[nudenet]'.")


def check(path: str, node: Mapping[str, Any], spec: DataSpec | None, allow: Sequence[str]) -> None:
    """One recognizer of a configuration, by all that is known of it; `spec` is None where the dataset must be read."""
    kind = node["_target_"].removeprefix("unlearn_runner.evaluation.")
    names = None if spec is None else spec.content_names
    if kind == "zero_shot.ZeroShotClip":
        require_templates(f"{path}.templates", node["templates"])
        if names is not None:
            texts_of_contents(names, node["templates"], node["prompts"], node["nothing"], path)
    elif kind == "from_file.NetworkFile":
        require_trust(node["file"], allow, path)
        file_of_network(node["file"], node["image_size"], path)
        if names is not None:
            outputs_of_contents(names, node["outputs"], node["nothing"], path)
    elif kind == "body_parts.NudeNet":
        require_nudenet()
        if spec is not None:
            require_one_to_forget(spec)
            require_two_contents(names, spec.forget_contents[0], node["others"] is not None, path)
