"""From Python: what `python train.py` does, with a pipeline and pictures in the place of options.

    import unlearn_runner as ur
    result = ur.forget(pipe, concept="Van Gogh", keep=["Monet", "Picasso"], method="esd", steps=100)
    result.pipeline("a painting by Van Gogh").images

Everything goes through the same configuration, checks and code as a command; `overrides` are those of the command line.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.override_parser.types import Quote, QuotedString

from unlearn_runner.errors import KNOWN, ConfigurationError, first_line
from unlearn_runner.trust import literal

if TYPE_CHECKING:
    import pandas

AUTO = "auto"  # as model.weights has it: a small model of pixels that is trained on the pictures first
PIXELS = "DDPMPipeline"
FLUX_SIZE = 1024  # pixels a side; its pipeline's folder does not say


class Result(NamedTuple):
    """What came of a run."""

    pipeline: Any  # of the class, precision and device of the one that was given; None of a measurement
    scores: dict[str, float]  # of the base (base/...) and of the result (eval/...): docs/metrics.md
    folder: Path | None  # of the run, if one was asked for


def forget(
    pipe: Any,
    *,
    keep: Any,
    concept: str | Sequence[str] | None = None,
    images: Any = None,
    method: str = "posterior",
    steps: int | None = None,
    overrides: Sequence[str] = (),
    folder: str | Path | None = None,
) -> Result:
    """Make a pipeline forget a concept, or some images, and measure it. The pipeline that is given stays as it is.

    Args:
        pipe: a pipeline of diffusers' (Stable Diffusion, XL, 3, FLUX, or a DDPM), its folder, or a hub id; "auto": a
            small DDPM, trained first on all the pictures, to try things with.
        concept: one or several, as they stand in a prompt. Then `keep` are concepts, too; the base draws the pictures
            that are learnt from.
        images: to forget: a folder, or pictures: paths, PIL images, arrays or tensors ([c, h, w] or [h, w]; uint8, or
            floats in [0, 1]). Then `keep` are such, too. For a text-to-image model each is a pair of picture and
            caption.
        method: a choice of conf/method.
        steps: optimizer steps; None: as the method has it.
        overrides: as on the command line of train.py, and they win: ["method.rho=0.1", "judge=clip"].
        folder: keep the run's folder here; it must not be there yet.

    Raises ConfigurationError with one sentence for what cannot work, before anything is trained.
    """
    if (concept is None) == (images is None):
        raise ConfigurationError("forget: give either concept=... or images=...")
    overrides = _listed(overrides)
    _require_new(folder)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        source = _on_disk(pipe, scratch)
        words = [f"method={method}", *_of_model(source, overrides)]
        words += _of_images(images, keep, source, scratch) if concept is None else of_concepts(concept, keep)
        words += [] if steps is None else [f"trainer.max_steps={steps}"]
        ran = _run([*words, *overrides], scratch / "run" if folder is None else Path(folder))
        return Result(_loaded(ran / "model", pipe), _scores(ran), None if folder is None else ran)


def measure(
    pipe: Any,
    *,
    base: Any,
    concept: str | Sequence[str],
    keep: Sequence[str],
    overrides: Sequence[str] = (),
    folder: str | Path | None = None,
) -> Result:
    """Measure what another tool unlearned, by samples and probes (`evaluation=probes`), beside the base that it was
    made from. `pipe` may also be a part of the base: a network's folder, a file with some weights, LoRA
    (docs/models.md).
    """
    overrides = _listed(overrides)
    _require_new(folder)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        source = _on_disk(base, scratch / "base")
        words = ["method=given", option("method.weights", _on_disk(pipe, scratch / "given"))]
        words += [*_of_model(source, overrides), *of_concepts(concept, keep), "evaluation=probes"]
        ran = _run([*words, *overrides], scratch / "run" if folder is None else Path(folder))
        return Result(None, _scores(ran), None if folder is None else ran)


def compare(runs: Any, metrics: Sequence[str] = ()) -> "pandas.DataFrame":
    """A row for each label of some runs, means over seeds of the metrics that `scripts/compare.py` shows, or of these.
    `runs` is one or several: folders, also with runs in them, or results of `forget` and `measure` that have one.
    """
    import pandas

    from unlearn_runner.comparison.comparison import Wanted
    from unlearn_runner.comparison.comparison import compare as tables_of
    from unlearn_runner.comparison.packs import with_packs
    from unlearn_runner.comparison.runs import read_runs
    from unlearn_runner.comparison.statistics import TESTS

    folders = [run.folder if isinstance(run, Result) else Path(run) for run in _listed(runs)]
    if not folders:
        raise ConfigurationError("compare: give one or more runs.")
    if None in folders:
        raise ConfigurationError("compare: a result without a folder; give forget(..., folder=...) one to be kept.")
    found = read_runs(with_packs(folders))
    if not found.runs:
        why = "; ".join([f"{part.folder}: {part.why}" for part in found.apart] + found.remarks)
        raise ConfigurationError(f"compare: there is no finished run ({why}).")
    wanted = Wanted(list(metrics), short=not metrics, sort=None, baseline=None, test=next(iter(TESTS)))
    comparison = tables_of(found, wanted)
    if len(comparison.tables) > 1:
        titles = "; ".join(table.title for table in comparison.tables)
        raise ConfigurationError(f"compare: these runs were not measured alike ({titles}); compare them apart.")
    (table,) = comparison.tables
    rows = {
        row.label: {column: cells[column].mean for column in table.columns if column in cells}
        for row, cells in zip(table.rows, table.cells, strict=True)
    }
    return pandas.DataFrame.from_dict(rows, orient="index", columns=table.columns)


def report(run: Any, *, number: str | None = None, text: str | None = None, received: str | None = None) -> Path:
    """The page on a deletion request, of a run's folder or of a result that has one: what was asked (a number and the
    request's own words), done and measured, and what still holds the data. Returns its place, the run's report.html.
    """
    from unlearn_runner.comparison.request_report import RequestDescription, write_report

    folder = run.folder if isinstance(run, Result) else Path(run)
    if folder is None:
        raise ConfigurationError("report: a result without a folder; give forget(..., folder=...) one to be kept.")
    return write_report(folder, RequestDescription(number, text, received))


# 1. From what is given to overrides


def _on_disk(pipe: Any, scratch: Path) -> str:
    """The folder or name of a pipeline; of one in memory, a folder that it is written to."""
    if isinstance(pipe, str | Path):
        return str(pipe)
    if not hasattr(pipe, "save_pretrained"):
        kind = type(pipe).__name__
        raise ConfigurationError(f"expected a pipeline of diffusers', its folder or a hub id, got a {kind}.")
    folder = scratch / "pipeline"
    pipe.save_pretrained(folder, safe_serialization=True)
    return str(folder)


def _of_model(source: str, overrides: Sequence[str]) -> list[str]:
    if source == AUTO:
        return ["model=ddpm_tiny"]
    given = dict(part.split("=", 1) for part in overrides if "=" in part)
    kind, size = kind_of(source, given)
    return [f"model={kind}", option("model.weights", source), f"dataset.image_size={size}"]


def of_concepts(concept: str | Sequence[str], keep: str | Sequence[str]) -> list[str]:
    """Concepts whose pictures the base draws."""
    asked = {"dataset.concept": concept, "dataset.retain_concepts": keep}
    lists = (options(key, [names] if isinstance(names, str) else names) for key, names in asked.items())
    return ["dataset=sd_concepts", "dataset.source=base", *lists]


def _of_images(images: Any, keep: Any, source: str, scratch: Path) -> list[str]:
    """A request; pictures in memory are written to files."""
    folders, captioned = {}, set()
    for name, given in (("images", images), ("keep", keep)):
        if isinstance(given, str | Path):
            folders[name] = str(given)
            continue
        if not isinstance(given, Sequence) or not len(given):
            kind = "an empty list" if isinstance(given, Sequence) else f"a {type(given).__name__}"
            raise ConfigurationError(f"{name} must be a folder or a list of pictures, got {kind}.")
        folder = scratch / "pictures" / name
        folder.mkdir(parents=True)
        for number, one in enumerate(given):
            picture, caption = one if isinstance(one, tuple | list) and len(one) == 2 else (one, None)
            captioned.add(caption is not None)
            file = _written(picture, folder / f"{number:06}", f"{name}[{number}]")
            if caption is not None:
                file.with_suffix(".txt").write_text(str(caption), encoding="utf-8")
        folders[name] = str(folder)
    if len(captioned) > 1:
        raise ConfigurationError("some pictures have a caption and some none; give (picture, caption) of each.")
    words = [option("dataset.source", folders["keep"]), option("dataset.forget", folders["images"])]
    words += ["dataset.captions=txt"] if captioned == {True} else []
    unet = Path(source) / "unet" / "config.json"
    grey = unet.is_file() and not (Path(source) / "vae").is_dir() and json.loads(unet.read_text())["in_channels"] == 1
    return ["dataset=request", f"dataset.mode={'L' if grey else 'RGB'}", *words, "evaluation=instances"]


def _written(picture: Any, stem: Path, name: str) -> Path:
    """A picture as a file: one that is a file already as it is, all others as a PNG.

    Raises ConfigurationError, which calls it by its name, if it is none.
    """
    from PIL import Image

    try:
        if isinstance(picture, str | Path):
            file = stem.with_suffix(Path(picture).suffix)
            shutil.copy(picture, file)
            return file
        if not isinstance(picture, Image.Image):
            picture = Image.fromarray(_as_bytes(picture))
        if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            picture = picture.convert("RGB")
        picture.save(stem.with_suffix(".png"))
        return stem.with_suffix(".png")
    except Exception as error:
        raise ConfigurationError(f"{name} is no picture ({first_line(error).rstrip('.')}).") from error


def _as_bytes(picture: Any) -> Any:
    """An array or tensor, [h, w], [c, h, w] or [h, w, c] of 1 or 3 channels, as PIL takes it."""
    import numpy as np

    if hasattr(picture, "detach"):  # a tensor
        picture = picture.detach().cpu()
        picture = picture.float() if picture.is_floating_point() else picture
    array = np.asarray(picture)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise ValueError(f"expected [h, w], [c, h, w] or [h, w, c] of 1 or 3 channels, got the shape {array.shape}")
    if array.dtype == bool:
        array = array * np.uint8(255)
    if array.dtype.kind not in "uif":
        raise ValueError(f"expected numbers, got {array.dtype}")
    most = 1 if array.dtype.kind == "f" else 255
    if not (array.min() >= 0 and array.max() <= most):
        raise ValueError(f"its values must lie in [0, {most}], got {array.min()} to {array.max()}")
    scale = 255 if array.dtype.kind == "f" else 1
    levels = np.rint(array * scale).astype(np.uint8)
    return levels[..., 0] if levels.ndim == 3 and levels.shape[2] == 1 else levels


def _listed(given: Any) -> list[Any]:
    """One or several as a list."""
    return [given] if isinstance(given, str | Path | Result) else list(given)


def _require_new(folder: str | Path | None) -> None:
    """Raise ConfigurationError if a folder for a run holds something."""
    if folder is not None and Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise ConfigurationError(f"folder={folder} is there already; give a new one for the run.")


def option(key: str, value: str) -> str:
    """`key=value` for Hydra, which reads exactly this text, whatever is in it."""
    return f"{key}={_quoted(value)}"


def options(key: str, values: Sequence[str]) -> str:
    """The same of a list of texts."""
    return f"{key}=[{','.join(map(_quoted, values))}]"


def _quoted(value: str) -> str:
    return QuotedString(literal(str(value)), Quote.single).with_quotes()


def kind_of(source: str, given: Mapping[str, str]) -> tuple[str, int]:
    """The choice of the group `model` for a pipeline, and pixels a side of what it draws; of a hub id, by
    the overrides `given`.

    Raises ConfigurationError if it is none that is known.
    """
    from unlearn_runner.models.pipelines import MODELS

    known = {name: choice for name, choice in MODELS.items() if choice != "dit"} | {PIXELS: "ddpm_tiny"}
    index = Path(source).expanduser() / "model_index.json"
    if not index.is_file():
        if not {"model", "dataset.image_size"} <= given.keys():
            raise ConfigurationError(
                f"{source}: there is no such folder with a model_index.json; of a hub id say what it is with "
                f"model=<{', '.join(known.values())}> and dataset.image_size=<pixels>."
            )
        if not given["dataset.image_size"].isdecimal():
            raise ConfigurationError(f"dataset.image_size must be a whole number, got '{given['dataset.image_size']}'.")
        return given["model"], int(given["dataset.image_size"])
    try:
        kind = json.loads(index.read_text()).get("_class_name")
        size = size_of(index.parent)
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise ConfigurationError(f"{source}: this is no whole pipeline ({first_line(error)}).") from error
    if kind not in known:
        raise ConfigurationError(f"{source}: expected a pipeline ({', '.join(known)}), got a {kind}.")
    return known[kind], size


def size_of(folder: Path) -> int:
    """Pixels a side that a pipeline draws if nobody says otherwise."""
    parts = [file for part in ("unet", "transformer") if (file := folder / part / "config.json").is_file()]
    if not parts:
        raise LookupError("there is neither unet/ nor transformer/ in it")
    network = parts[0]
    side = json.loads(network.read_text()).get("sample_size")
    if side is None:
        return FLUX_SIZE
    vae = folder / "vae" / "config.json"
    halvings = len(json.loads(vae.read_text())["block_out_channels"]) - 1 if vae.is_file() else 0
    return (side if isinstance(side, int) else side[0]) * 2**halvings


# 2. A run, and what it left


def _run(overrides: Sequence[str], folder: Path) -> Path:
    """One run like a command's, in this process; returns its folder."""
    from unlearn_runner import assembly
    from unlearn_runner.cli import composed, sentence_of

    try:
        cfg = composed(["logger=jsonl", *overrides])
        folder.mkdir(parents=True, exist_ok=True)
        return assembly.unlearn(cfg, folder)
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None or isinstance(error, KNOWN):
            raise
        raise ConfigurationError(sentence) from error


def _scores(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["metrics"]


def _loaded(model: Path, like: Any) -> Any:
    """The pipeline in a run's model/, in the class, precision and place of the one that was given."""
    import diffusers

    from unlearn_runner.models.one_step import OneStepPipeline

    kind = json.loads((model / "model_index.json").read_text())["_class_name"]
    loader = OneStepPipeline if kind == OneStepPipeline.__name__ else getattr(diffusers, kind)
    if isinstance(like, str | Path):
        return loader.from_pretrained(model)
    found = loader.from_pretrained(model, torch_dtype=like.dtype)
    return found.to(like.device)
