"""A table of finished runs, one row for each method: mean +- half the 95 % interval over seeds. Reads run folders only.

    python scripts/compare.py FOLDER [FOLDER ...] [--grid FILE.png] [--curves FILE.png [--keys KEY ...]]

Runs of one `label` (the method's name, if it was not set) and several seeds are one row. Rows "base" and "oracle" are
the same runs' scores before unlearning and of the model that never saw the forget set.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

COLUMNS = (
    "forget_rate", "restored_rate", "retain_accuracy", "fid_forget", "fid_retain", "kid_forget", "kid_retain",
    "precision_retain", "recall_retain", "is_forget", "is_retain", "ssim_forget", "ssim_retain", "nll_forget",
    "nll_retain", "nll_bound_forget", "nll_bound_retain", "mia_auc", "mia_tpr_at_1pct_fpr", "relearn_steps",
    "deletion_steps", "lasting_deletion_steps", "reached/steps", "reached/seconds", "reached/restored_rate",
    "reached/retain_accuracy", "reached/fid_retain", "reached/kid_retain",
    "mean/lambda/value", "mean/grad_variance/update", "cost/seconds", "cost/network_evaluations",
    "cost/network_evaluations_per_sample", "cost/policy_network_evaluations", "cost/peak_memory_gb",
)  # fmt: skip


def finished_runs(folders: list[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """The finished runs below the folders, of each method and seed the newest, and a line for each other run."""
    newest: dict[tuple[str, int], dict[str, Any]] = {}
    others: list[str] = []
    found = {path for folder in folders for path in folder.glob("**/summary.json")}
    for path in sorted(found, key=lambda path: path.stat().st_mtime):
        try:
            summary = json.loads(path.read_text())
            config = yaml.safe_load((path.parent / "config.yaml").read_text())
            run = {
                "folder": path.parent,
                "method": config.get("label", config["choices"]["method"]),
                "seed": config["seed"],
                **summary,
            }
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            others.append(f"{path.parent}: unreadable ({type(error).__name__}: {error})")
            continue
        if run["status"] == "finished":
            if old := newest.get((run["method"], run["seed"])):
                others.append(f"{old['folder']}: made again later ({old['method']}, seed {old['seed']})")
            newest[run["method"], run["seed"]] = run
        else:
            others.append(f"{path.parent}: {run['status']} ({run['method']}, seed {run['seed']})")
    return list(newest.values()), others


def half_width(values: list[float]) -> float | None:
    """Half the 95 % confidence interval of the mean, Student's t; None for a single value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def rows_of(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Values by row and column: base, oracle, then the methods in alphabetical order.

    Each seed counts once in a row: every method of a seed has the same base and oracle.
    """
    rows: dict[str, dict[str, dict[int, float]]] = {"base": {}, "oracle": {}}
    for run in sorted(runs, key=lambda run: (run["method"], run["seed"])):
        for row, prefix in ((run["method"], "eval"), ("base", "base"), ("oracle", "oracle")):
            for column in COLUMNS:
                key = column if "/" in column else f"{prefix}/{column}"
                if key in run["metrics"] and (prefix == "eval" or "/" not in column):  # costs are the method's
                    rows.setdefault(row, {}).setdefault(column, {})[run["seed"]] = run["metrics"][key]
    return {
        name: {column: list(values.values()) for column, values in row.items()} for name, row in rows.items() if row
    }


def cell(values: list[float], of: int) -> str:
    """The mean, the interval where the values differ at all, and how many of the row's seeds have one if not all."""
    centre, half = mean(values), half_width(values)
    digits = 0 if abs(centre) >= 100 else 1 if abs(centre) >= 10 else 3
    text = f"{centre:.{digits}f}"
    text = text if half is None or half == 0 else f"{text} ± {half:.{digits}f}"
    return text if len(values) == of else f"{text} ({len(values)} of {of})"


def markdown(rows: dict[str, dict[str, list[float]]]) -> str:
    """One line for each metric, one column for each row of `rows`: tables with many metrics stay readable."""
    lines = ["| | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for column in COLUMNS:
        if any(column in row for row in rows.values()):
            cells = [cell(row[column], max(map(len, row.values()))) if column in row else "" for row in rows.values()]
            lines.append(f"| {column} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pictures_of(runs: list[dict[str, Any]], rows: Iterable[str]) -> dict[str, Path]:
    """The sample grids of the lowest seed, by row and in the order of the rows."""
    found: dict[str, Path] = {}
    for run in sorted(runs, key=lambda run: (run["seed"], run["method"])):
        for title, name in (("base", "before"), ("oracle", "oracle"), (run["method"], "after")):
            path = run["folder"] / "samples" / f"{name}.png"
            if path.is_file():
                found.setdefault(title, path)
    return {row: found[row] for row in rows if row in found}


def curves_of(runs: list[dict[str, Any]], keys: tuple[str, ...]) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Values by row, key and step, from metrics.jsonl: steps, or looks on the way, not the final, larger evaluation."""
    curves: dict[str, dict[str, dict[int, list[float]]]] = {}
    for run in sorted(runs, key=lambda run: (run["method"], run["seed"])):
        path = run["folder"] / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        for key in keys:
            found = [(line, {name for name in line if name.startswith("eval/")}) for line in lines if key in line]
            for line, measured in found:
                if measured == found[0][1]:
                    row = curves.setdefault(run["method"], {}).setdefault(key, {})
                    row.setdefault(line["step"], []).append(line[key])
    return curves


def in_bins(points: dict[int, list[float]], most: int = 100) -> list[tuple[float, list[float]]]:
    """Steps in order and each seed's value there; of more than `most` steps the means of neighbours."""
    ordered, size = sorted(points.items()), max(1, math.ceil(len(points) / most))
    bins = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [
        (mean(step for step, _ in part), [mean(seed) for seed in zip(*(values for _, values in part), strict=False)])
        for part in bins
    ]


def draw_curves(curves: dict[str, dict[str, dict[int, list[float]]]], keys: tuple[str, ...], path: Path) -> None:
    """A PNG: each key over the steps, a line for the mean of each row.

    Up to six rows have a band from their lowest to their highest seed; more would hide each other.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(keys) + 1.5, 4.5), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for number, (row, by_key) in enumerate(curves.items()):
            points = in_bins(by_key.get(key, {}))
            steps, values = [step for step, _ in points], [values for _, values in points]
            style = ("-", "--", ":")[number // 10 % 3]  # there are ten colours
            (line,) = axes.plot(steps, [mean(found) for found in values], style, label=row, linewidth=1.5)
            if len(curves) <= 6:
                ends = [[end(found) for found in values] for end in (min, max)]
                axes.fill_between(steps, *ends, alpha=0.12, color=line.get_color())
        axes.set(xlabel="step", ylabel=key)
        if axes.dataLim.ymin >= 0:
            axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))


def side_by_side(pictures: dict[str, Path], columns: int = 6) -> Any:
    """A PIL image: the first columns of each grid under its title."""
    import numpy as np
    from PIL import Image, ImageDraw

    strips = []
    for title, path in pictures.items():
        grid = np.asarray(Image.open(path).convert("RGB"))
        padding = np.ptp(grid.reshape(grid.shape[0], -1, 3), axis=(0, 2)) == 0  # pixel columns of one grey
        cell = int(np.flatnonzero(padding & (np.arange(len(padding)) > 2))[0]) if padding[3:].any() else len(padding)
        strip = Image.new("RGB", (min(columns * cell + 2, len(padding)), grid.shape[0] + 18), "white")
        strip.paste(Image.fromarray(grid), (0, 18))
        ImageDraw.Draw(strip).text((3, 3), title, fill="black")
        strips.append(strip)
    gap = 10
    width = sum(strip.width + gap for strip in strips) - gap
    whole = Image.new("RGB", (width, max(strip.height for strip in strips)), "white")
    x = 0
    for strip in strips:
        whole.paste(strip, (x, 0))
        x += strip.width + gap
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run, or a folder with runs below it")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="also write a picture of everyone's samples")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="also write a picture of forgetting over the steps")
    parser.add_argument(
        "--keys", nargs="+", metavar="KEY", default=["eval/forget_rate", "eval/restored_rate"],
        help="keys of metrics.jsonl to draw there, such as lambda/value (default: forgetting)",
    )  # fmt: skip
    arguments = parser.parse_args()
    folders = arguments.folders
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        sys.exit(f"{', '.join(missing)}: there is no such folder.")
    runs, others = finished_runs(folders)
    if not runs:
        sys.exit("\n".join(["no finished run in there.", *others]))
    settings = {json.dumps(comparable(run), sort_keys=True) for run in runs}
    if len(settings) > 1:
        sys.exit("these runs were not measured alike (data, samples, sampler or metrics differ): give them separately.")
    seeds = sorted({run["seed"] for run in runs})
    rows = rows_of(runs)
    print(markdown(rows))
    print(f"\n{len(runs)} runs, seeds {', '.join(map(str, seeds))}; mean ± half the 95 % interval over seeds.")
    if arguments.grid:
        side_by_side(pictures_of(runs, rows)).save(arguments.grid)
        print(f"Samples of the lowest seed: {arguments.grid}")
    if arguments.curves:
        keys = tuple(arguments.keys)
        if curves := curves_of(runs, keys):
            draw_curves(curves, keys, arguments.curves)
            print(f"{', '.join(keys)} over the steps: {arguments.curves}")
        else:
            print(f"{arguments.curves} is not written: no run has {' or '.join(keys)} on the way in a metrics.jsonl.")
    if others:
        print("Not in the table:", *others, sep="\n  ")


def comparable(run: dict[str, Any]) -> dict[str, Any]:
    """What two runs must have in common to stand in one table: how they were measured."""
    return {key: value for key, value in run["provenance"]["evaluation"].items() if key != "seconds"}


if __name__ == "__main__":
    main()
