"""A ledger: deletion requests to one model, one after the other, in a folder of their own. Loads no torch.

<folder>/requests.yaml      what is asked, in the order in which it is done; grows at its end
<folder>/base/              the model before all of them, where a run trained it
<folder>/01-<id>/           the run of the first request, which begins with the base; the next begins with its model/
<folder>/01-<id>/measured/  the model after it, measured by every request until then, beside the base
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from unlearn_runner.errors import ConfigurationError, first_line, near
from unlearn_runner.schema import YAML_LOADER, bounded_text, bounded_yaml

REQUESTS, BASE, MEASURED, LEDGER = "requests.yaml", "base", "measured", "ledger.json"
GONE = ("copy_rate", "forget_rate")  # what is left of a request: the first of these that was measured
KEPT = ("retain_accuracy", "fid_retain")  # and what else the model still can
BACK = ("relearn_steps", "relearn_reached")
OF_A_REQUEST = ("id", "overrides", "text", "received")


class LedgerRequest(NamedTuple):
    """One request as requests.yaml has it."""

    id: str
    overrides: tuple[str, ...]  # of train.py
    text: str | None = None  # in its own words
    received: str | None = None


class Requests(NamedTuple):
    """A whole requests.yaml."""

    base: str  # folder or hub id, or "auto": the first request's run trains it
    overrides: tuple[str, ...]  # of every request
    requests: tuple[LedgerRequest, ...]


def read_requests(folder: Path) -> Requests:
    """Raises ConfigurationError with one sentence for what is no list of requests."""
    file = folder / REQUESTS
    try:
        said = yaml.load(bounded_yaml(file), Loader=YAML_LOADER)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{file}: expected a file of requests; {first_line(error)}.") from error
    _require_keys(said, ("base", "overrides", "requests"), str(file))
    rows = said.get("requests")
    if not isinstance(rows, list) or not rows:
        raise ConfigurationError(f"{file}: expected a list `requests` with one or more of them.")
    found = []
    for number, row in enumerate(rows, 1):
        where = f"{file}: request {number}"
        _require_keys(row, OF_A_REQUEST, where)
        name = str(row.get("id", ""))
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise ConfigurationError(f"{where} needs an id of letters, digits, - and _, which names its folder.")
        if name in [request.id for request in found]:
            raise ConfigurationError(f"{where} has the id '{name}', as one before it; give each its own.")
        texts = (None if row.get(key) is None else str(row[key]) for key in ("text", "received"))
        found.append(LedgerRequest(name, _overrides(row, where), *texts))
    return Requests(str(said.get("base", "auto")), _overrides(said, str(file)), tuple(found))


def _require_keys(said: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(said, dict):
        raise ConfigurationError(f"{where}: expected {', '.join(known)}, got {type(said).__name__}.")
    if unknown := [str(key) for key in said if key not in known]:
        raise ConfigurationError(f"{where}: there is no '{unknown[0]}'{near(unknown[0], known)}; {', '.join(known)}.")


def _overrides(said: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given = said.get("overrides", [])
    if not isinstance(given, list) or not all(isinstance(one, str) and "=" in one for one in given):
        raise ConfigurationError(f"{where}: overrides must be a list of texts like method=siss, got {given}.")
    return tuple(given)


def folder_of(folder: Path, number: int, request: LedgerRequest) -> Path:
    """Where the run of the request with this number, from 1, lies."""
    return folder / f"{number:02}-{request.id}"


def finished(run: Path) -> dict[str, Any] | None:
    """The summary of a run that has finished; None of any other."""
    try:
        summary = json.loads(bounded_text(run / "summary.json"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.get("status") == "finished" else None


def ledger_of(folder: Path) -> dict[str, Any]:
    """What was measured after each request that is done: of all requests until then how much is still there, and what
    else the model can.

    `requests`: their ids, texts and the digests of the model before and after, from which the lineage can be checked.
    `after`: for each request a list, of which entry j is what the j-th request's measurement says. `kept`: of its own.
    """
    asked = read_requests(folder)
    done = []
    for number, request in enumerate(asked.requests, 1):
        run = folder_of(folder, number, request)
        summary = finished(run)
        if summary is None:
            break
        identity = summary.get("identity", {})
        measured = [finished(place) for place in measurements_of(folder, asked, number)]
        scores = [part["metrics"] for part in measured if part is not None]
        if len(scores) < number:
            break
        done.append(
            {
                **request._asdict(),
                "folder": str(run),
                "base": identity.get("base"),
                "result": identity.get("result"),
                "forgotten": [_first(score, "eval", GONE) for score in scores],
                "before": [_first(score, "base", GONE) for score in scores],
                "back": [{key: score[f"eval/{key}"] for key in BACK if f"eval/{key}" in score} for score in scores],
                "kept": {key: score for key in KEPT if (score := scores[-1].get(f"eval/{key}")) is not None},
                "kept_by_base": {key: score for key in KEPT if (score := scores[-1].get(f"base/{key}")) is not None},
            }
        )
    broken = [later["id"] for before, later in pairwise(done) if before["result"] != later["base"]]
    return {"base": asked.base, "requests": done, "broken": broken}


def measurements_of(folder: Path, asked: Requests, number: int) -> Iterator[Path]:
    """Where the model after a request is measured by each request until then."""
    after = folder_of(folder, number, asked.requests[number - 1])
    for earlier, request in enumerate(asked.requests[:number], 1):
        yield folder_of(after / MEASURED, earlier, request)


def _first(scores: Mapping[str, float], prefix: str, names: Sequence[str]) -> dict[str, float]:
    return next(({name: scores[key]} for name in names if (key := f"{prefix}/{name}") in scores), {})


def table_of(ledger: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text, the head first: after each request the rate of each until then, and what is kept."""
    ids = [request["id"] for request in ledger["requests"]]
    kept = [key for key in KEPT if any(key in request["kept"] for request in ledger["requests"])]
    rows = [["after", *ids, *kept]]
    if ledger["requests"]:
        first = ledger["requests"]
        before = [_shown(request["before"][-1]) for request in first]
        rows.append(["before", *before, *(_number(first[0]["kept_by_base"].get(key)) for key in kept)])
    for request in ledger["requests"]:
        rates = [_shown(rate) for rate in request["forgotten"]]
        rates += [""] * (len(ids) - len(rates))
        rows.append([request["id"], *rates, *(_number(request["kept"].get(key)) for key in kept)])
    return rows


def _shown(rate: Mapping[str, float]) -> str:
    return next((_number(value) for value in rate.values()), "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def draw(ledger: Mapping[str, Any], path: Path) -> None:
    """A PNG: how much of each request is there after each, and beside it what the model still can."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    requests = ledger["requests"]
    ids = [request["id"] for request in requests]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, request in enumerate(requests):
        rates = [_value(request["before"][-1]), *(_value(later["forgotten"][place]) for later in requests[place:])]
        left.plot([place, *range(place + 1, len(ids) + 1)], rates, "o-", label=request["id"])
    left.set(ylabel="rate of what was forgotten", ylim=(-0.02, 1.02))
    for key in KEPT[:1]:
        kept = [request["kept"].get(key) for request in requests]
        base = [request["kept_by_base"].get(key) for request in requests]
        right.plot(range(1, len(ids) + 1), kept, "o-", label=f"{key}, after")
        right.plot(range(1, len(ids) + 1), base, "k--", label=f"{key}, of the model before all requests")
    right.set(ylim=(0, 1.02))
    for axes in (left, right):
        axes.set_xticks(range(len(ids) + 1), ["before", *ids], rotation=20)
        axes.set_xlabel("after the request")
        axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))


def _value(rate: Mapping[str, float]) -> float | None:
    return next(iter(rate.values()), None)
