"""The model card of an unlearned model: what it forgot and how, what was measured, and what that cannot show."""

import json
from collections.abc import Mapping
from inspect import cleandoc
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from jinja2 import Environment, StrictUndefined

from unlearn_runner import __version__
from unlearn_runner.comparison.request_report import number, read, scores_of


def model_card(folder: Path) -> str:
    """The card of the model of a finished run, as Markdown with the hub's metadata."""
    summary, config, _ = read(folder)
    weights, method = config["model"]["weights"], config["choices"]["method"]
    on_hub = weights != "auto" and weights.count("/") == 1 and not Path(weights).expanduser().exists()
    identity = summary.get("identity", {})
    steps = config["trainer"]["max_steps"]
    counts = summary["provenance"]["evaluation"].get("num_samples", {})
    index = folder / "model" / "model_index.json"
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["number"] = number
    template = (Path(__file__).parent / "page" / "model_card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        base_model=weights if on_hub else None,
        start="A base that the run trained itself" if weights == "auto" else f"`{weights}`" if on_hub else "A base",
        method=method,
        about=_said_of(config["method"]),
        forgotten=forgotten_by(config["dataset"]),
        version=__version__,
        loading=json.loads(index.read_text()).get("_class_name") if index.is_file() else None,
        samples=f"Of {counts['forget']:,} samples under the forget condition." if "forget" in counts else "Of samples.",
        scores=list(scores_of(summary)),
        has_oracle=any(key.startswith("oracle/") for key in summary["metrics"]),
        steps=f"{steps} step{'s' * (steps != 1)}",
        seed=config["seed"],
        config_hash=summary["config_hash"],
        base_digest=identity.get("base"),
        result_digest=identity.get("result"),
    )


def forgotten_by(dataset: Mapping[str, Any]) -> str:
    """What a dataset's options say is to be forgotten, in words that tell no stranger a person's files."""
    name = dataset["_target_"].rpartition(".")[2]
    for option, words in (("concept", "the concept {}"), ("forget_class", "the class {}"), ("garment", "{}")):
        if (asked := dataset.get(option)) is not None:
            several = [str(one) for one in (asked if isinstance(asked, list) else [asked])]
            return words.format(" and ".join(f'"{one}"' for one in several))
    return "trousers" if name == "DigitsTrousers" else "images that its owner named"


def _said_of(method: Mapping[str, Any]) -> str:
    """The first paragraph of what a method's class says of itself."""
    said = cleandoc(get_object(method["_target_"]).__doc__ or "").split("\n\n")[0]
    return " ".join(said.split()) or method["_target_"]
