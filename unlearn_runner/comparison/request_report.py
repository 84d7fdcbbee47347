"""The report on a deletion request: what was asked, what was done, what was measured and what still holds the data.

Of one run's folder. Loads no torch.
"""

import base64
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, StrictUndefined

from unlearn_runner import catalogue
from unlearn_runner.comparison.ledger import draw, table_of
from unlearn_runner.comparison.statistics import wilson
from unlearn_runner.errors import ConfigurationError, plain
from unlearn_runner.schema import YAML_LOADER, bounded_text, bounded_yaml, file_digest

SHOWN = (  # scores, in this order
    *("forget_rate", "forget_rate_paraphrases", "attack_success", "attack_tokens", "attack_vector"),
    *("copy_rate", "closer_to_forget", "mia_auc", "nll_forget"),
    *("probe_noise", "probe_completion", "probe_inpainting", "probe_guidance", "relearn_steps"),
    *("restored_rate", "nothing_rate", "precision_forget", "retain_accuracy", "fid_retain"),
)
OF_SAMPLES = ("forget_rate", "restored_rate", "nothing_rate", "copy_rate", "closer_to_forget", "precision_forget")
ABOUT = {  # where the catalogue's sentence refers to another key's
    "fid_retain": "Fréchet distance between features of samples under the other labels and of real images with them",
    "closer_to_forget": "share of samples under the forget condition that is nearer to an image to forget than to as "
    "many that no model has seen: 0.5 where it knows neither",
    "restored_rate": "share of samples under the forget condition that shows what is to be drawn there instead",
    "nothing_rate": "share of samples under the forget condition that is like no real image of anything",
}
CACHED = {
    "images": "decoded images",
    "hub_images": "its images as files",
    "bases": "a base trained on it",
    "oracles": "a model trained without it",
}
LARGEST_PICTURE = 800_000  # bytes of one grid in the page
MOST_FILES = 200  # named in the page; data.jsonl has all


class Trace(NamedTuple):
    """A place that still holds what was to be forgotten, or was made of it."""

    place: Path
    what: str
    size: int  # bytes


class RequestDescription(NamedTuple):
    """What only a person knows of a request."""

    number: str | None = None
    text: str | None = None
    received: str | None = None


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """A finished run's summary, configuration and files. Raises ConfigurationError if there is none."""
    try:
        summary = json.loads(bounded_text(folder / "summary.json"))
        config = yaml.load(bounded_yaml(folder / "config.yaml"), Loader=YAML_LOADER)
        status = summary["status"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{folder}: expected the folder of a run; {plain(str(error))}.") from error
    if status != "finished":
        raise ConfigurationError(
            f"{folder}: this run is {plain(str(status))}; there is a report of finished ones only."
        )
    inventory = folder / "data.jsonl"
    lines = inventory.read_text(encoding="utf-8").splitlines() if inventory.is_file() else []
    return summary, config, [json.loads(line) for line in lines]


def report(folder: Path, asked: RequestDescription = RequestDescription()) -> dict[str, Any]:  # noqa: B008 - immutable
    """All that the page says, as JSON has it."""
    summary, config, rows = read(folder)
    metrics, provenance = summary["metrics"], summary["provenance"]
    identity = dict.fromkeys(("base", "result", "started", "finished")) | summary.get(
        "identity", {}
    )  # older runs: none
    return {
        "request": asked._asdict(),
        "run": str(folder.resolve()),
        "identity": identity,
        "method": {
            "name": config["choices"]["method"],
            "settings": {key: value for key, value in config["method"].items() if not isinstance(value, dict | list)},
            "steps": config["trainer"]["max_steps"],
            "seconds": metrics.get("cost/seconds"),
        },
        "model": "trained by the run" if config["model"]["weights"] == "auto" else config["model"]["weights"],
        "dataset": config["dataset"].get("source") or config["choices"]["dataset"],
        "files": {
            "counts": dict(Counter(row["fate"] for row in rows)),
            "forget": [row for row in rows if row["fate"] == "forget"],
            "doubtful": [row for row in rows if row["fate"] == "retain" and row["why"]],
            "not read": [row for row in rows if row["fate"] == "not read"],
        },
        "scores": list(scores_of(summary)),
        "has_oracle": any(key.startswith("oracle/") for key in metrics),
        "environment": provenance.get("environment", {}),
        "traces": [trace._asdict() | {"place": str(trace.place)} for trace in traces_of(folder, summary, config)],
    }


def scores_of(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each with what it was before, its interval, and what it shows in words."""
    metrics, intervals = summary["metrics"], summary.get("intervals", {})
    counts = summary["provenance"]["evaluation"].get("num_samples", {})
    n = counts.get("forget", counts.get("all"))
    about = {entry.key: entry.sentence for entry in catalogue.ENTRIES}
    for key in SHOWN:
        after = metrics.get(f"eval/{key}")
        if after is None:
            continue
        interval = intervals.get(f"eval/{key}")
        if interval is None and key in OF_SAMPLES and n:
            interval = list(wilson(after, n))
        yield {
            "key": key,
            "before": metrics.get(f"base/{key}"),
            "after": after,
            "interval": interval,
            "oracle": metrics.get(f"oracle/{key}"),
            "real": metrics.get(f"floor/{key}"),
            "about": ABOUT.get(key) or next((text for name, text in about.items() if fnmatchcase(key, name)), ""),
            "in_words": in_words(after, n, interval) if key in OF_SAMPLES and n else None,
        }


def in_words(share: float, n: int, interval: list[float] | None) -> str:
    """A share of samples as a sentence: "0 of 1,000 samples; at most 0.4 % with 95 % confidence"."""
    count = round(share * n)
    low, high = interval or wilson(share, n)
    bound = f"at most {high:.1%}" if count == 0 else f"between {low:.1%} and {high:.1%}"
    return f"{count:,} of {n:,} samples; {bound} with 95 % confidence"


def traces_of(folder: Path, summary: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Trace]:
    """What still holds the data: checkpoints and dashboards of the run, and what the cache has that was made of it."""
    logged = "what Weights & Biases has logged, with pictures"
    for name, what in (("checkpoints", "checkpoints of the run"), ("wandb", logged)):
        if (folder / name).is_dir():
            yield Trace(folder / name, what, _size(folder / name))
    base = Path(str(config["model"]["weights"])).expanduser()
    if config["model"]["weights"] != "auto" and base.exists():
        yield Trace(base, "the model before unlearning, which knows all of it", _size(base))
    fingerprint = summary["provenance"]["evaluation"].get("data", {}).get("fingerprint")
    given = (config["dataset"].get(name) for name in ("source", "forget_dir", "never_seen"))
    given = [place for place in given if isinstance(place, str)]
    sources = [*given, *(str(Path(place).expanduser().resolve()) for place in given)]
    keys = sorted(Path(str(config["paths"]["cache"])).expanduser().glob("*/*/key.json"))
    for key in sorted(keys, key=lambda key: key.parent.parent.name != "hub_images"):  # images are decoded from there
        try:
            text = bounded_text(key)
        except (OSError, ValueError):
            continue
        kind = key.parent.parent.name
        of_files = kind == "images" and any(f'"{source}/' in text for source in sources)
        if kind == "hub_images" and json.loads(text).get("source") in sources:
            of_files = True
            sources.append(str(key.parent.resolve()))
        if of_files or (fingerprint and f'"{fingerprint}"' in text):
            what = CACHED.get(kind, f"{kind.replace('_', ' ')} made of it")
            yield Trace(key.parent, f"in the cache: {what}", _size(key.parent))


def _size(place: Path) -> int:
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


def page(folder: Path, content: Mapping[str, Any]) -> str:
    """One HTML page that needs nothing else."""
    pictures = {}
    for title, name in (("before", "before"), ("after", "after"), ("a model that never saw it", "oracle")):
        file = folder / "samples" / f"{name}.png"
        if file.is_file() and file.stat().st_size <= LARGEST_PICTURE:
            pictures[title] = _inline(file)
    return _rendered("request", **content, pictures=pictures, most=MOST_FILES)


def write_report(run: Path, asked: RequestDescription) -> Path:
    """report.json, report.html and MANIFEST.sha256, into the folder of a finished run; returns the page's place."""
    content = report(run, asked)
    (run / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    (run / "report.html").write_text(page(run, content), encoding="utf-8")
    (run / "MANIFEST.sha256").write_text(manifest(run), encoding="utf-8")
    return run / "report.html"


def ledger_page(folder: Path, ledger: Mapping[str, Any]) -> str:
    """The page over all requests of a ledger, with links to theirs."""
    picture = folder / "ledger.png"
    draw(ledger, picture)
    requests = [request | {"page": f"{Path(request['folder']).name}/report.html"} for request in ledger["requests"]]
    return _rendered("ledger", **{**ledger, "requests": requests}, table=table_of(ledger), picture=_inline(picture))


def _inline(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def _rendered(name: str, **content: Any) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "size": size_in_words, "prose": prose}
    template = (Path(__file__).parent / "page" / f"{name}.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(**content)


def number(value: Any) -> str:
    return "" if value is None else f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def size_in_words(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def prose(text: str) -> str:
    """The catalogue's Markdown without its marks: of a link its words."""
    text = re.sub(r"\[([^][]*)\]\([^)]*\)", r"\1", text).replace("`", "").replace("**", "")
    return text[:1].upper() + text[1:]


def manifest(folder: Path) -> str:
    """SHA-256 of the files of a run, as `sha256sum -c` reads it; of no checkpoint, dashboard or report."""
    lines = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        apart = name.parts[0] in ("checkpoints", "wandb") or name.name.startswith((".", "report.", "MANIFEST"))
        if file.is_file() and not apart:
            lines.append(f"{file_digest(file)}  {name.as_posix()}\n")
    return "".join(lines)
