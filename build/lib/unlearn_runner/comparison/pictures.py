"""Sample grids side by side, as a PNG or inside a page, and curves as a PNG."""

import base64
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from unlearn_runner.comparison.comparison import Table
from unlearn_runner.comparison.curves import Curve
from unlearn_runner.comparison.runs import Run
from unlearn_runner.errors import first_line

PICTURES = 6_000_000  # bytes of all samples of a page
COLUMNS = 8  # of a grid, on a page
WIDEST = 480  # pixels of these columns
ROWS = 2  # at most, of those drawn under the forget conditions
HIGHEST = 6000  # pixels
LONGEST = 40  # letters of a row's title


def pictures_of(runs: list[Run], rows: list[str]) -> dict[str, Path]:
    """The sample grids of the lowest seed that has one, by row and in the order of the rows."""
    found: dict[str, Path] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.label)):
        for title, name in (("base", "before"), ("oracle", "oracle"), (run.label, "after")):
            path = run.folder / "samples" / f"{name}.png"
            if path.is_file():
                found.setdefault(title, path)
    return {row: found[row] for row in rows if row in found}


def cell_size(grid: np.ndarray) -> int:
    """Pixels from one picture of a grid to the next: up to the second column of pixels that is one grey."""
    padding = np.ptp(grid.reshape(grid.shape[0], -1, 3), axis=(0, 2)) == 0
    return int(np.flatnonzero(padding & (np.arange(len(padding)) > 2))[0]) if padding[3:].any() else len(padding)


def first_columns(path: Path, columns: int, rows: list[int] | None = None) -> Image.Image:
    """The left part of a grid; only of the `rows` with these numbers, as far as they are there, if some are given.

    Raises whatever PIL raises for what is no whole PNG, or for one of more pixels than it thinks a picture has: that is
    known from its first bytes, before memory is spent on them; ValueError if none of the rows is there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=["PNG"]) as picture:
            grid = np.asarray(picture.convert("RGB"))
    size = cell_size(grid)
    left = grid[:, : columns * size + 2]
    if rows is None:
        return Image.fromarray(left)
    there = [left[row * size : (row + 1) * size + 2] for row in rows if (row + 1) * size <= len(grid)]  # all square
    return Image.fromarray(np.concatenate(there))


def beside_rows(grid: Image.Image, titles: Sequence[str]) -> Image.Image:
    """A grid of square pictures with a title to the right of each row, so that its columns stay where they are."""
    grid = grid.convert("RGB")
    strip = titles_of_rows(titles, (grid.height - 2) // len(titles))
    whole = Image.new("RGB", (grid.width + strip.width, grid.height), "white")
    whole.paste(grid, (0, 0))
    whole.paste(strip, (grid.width, 0))
    return whole


def titles_of_rows(titles: Sequence[str], height: int) -> Image.Image:
    """Titles below each other, each in the middle of `height` pixels, after a grid's first line of padding."""
    texts = [title if len(title) <= LONGEST else f"{title[: LONGEST - 3]}..." for title in titles]
    size = max(8, min(16, height - 4))
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = max(round(ruler.textlength(text, font_size=size)) for text in texts) + 12
    strip = Image.new("RGB", (width, 2 + height * len(texts)), "white")
    for row, text in enumerate(texts):
        ImageDraw.Draw(strip).text((6, 2 + (row + 0.5) * height), text, fill="black", anchor="lm", font_size=size)
    return strip


def side_by_side(
    pictures: dict[str, Path], columns: int = 6, titles: Sequence[str] = ()
) -> tuple[Image.Image | None, list[str]]:
    """The first columns of each grid under its title, None if there is none; a sentence for each that is left out.

    `titles`: of the rows, which stand beside the first grid, if it has as many rows.
    """
    strips, remarks = [], []
    for title, path in pictures.items():
        try:
            grid = first_columns(path, columns)
        except Exception as error:  # what PIL raises for a damaged or an immense picture
            remarks.append(f"{path} is left out: {first_line(error)}.")
            continue
        size = cell_size(np.asarray(grid))
        if titles and not strips and grid.height == 2 + size * len(titles) <= HIGHEST:
            named = titles_of_rows(titles, size)
            strips.append(Image.new("RGB", (named.width, named.height + 18), "white"))
            strips[0].paste(named, (0, 18))
        grid.thumbnail((HIGHEST, HIGHEST))  # smaller ones stay as they are
        strip = Image.new("RGB", (grid.width, grid.height + 18), "white")
        strip.paste(grid, (0, 18))
        ImageDraw.Draw(strip).text((3, 3), title, fill="black")
        strips.append(strip)
    if not strips:
        return None, remarks
    gap = 10
    width = sum(strip.width + gap for strip in strips) - gap
    whole = Image.new("RGB", (width, max(strip.height for strip in strips)), "white")
    x = 0
    for strip in strips:
        whole.paste(strip, (x, 0))
        x += strip.width + gap
    return whole, remarks


def as_data_uri(path: Path, columns: int, widest: int, rows: list[int] | None = None) -> str:
    """The first columns of a grid, or of some of its rows, inside a page: a PNG of at most `widest` pixels, grey if it
    has no colour.
    """
    picture = first_columns(path, columns, rows)
    scale = min(widest / picture.width, HIGHEST / picture.height)
    if scale < 1:
        size = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize(tuple(size), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    if (pixels == pixels[..., :1]).all():
        picture = picture.convert("L")
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def samples_of(table: Table, most_bytes: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Grids of base, oracle and methods of one seed where it has them, each with the strip of it that was drawn under
    the forget conditions, where the runs tell which that is; and the labels for which there was no room.

    One seed, because the seeds may have bases of their own; the noise is that of evaluation.seed, the same for all.
    """
    with_samples: dict[int, list[Run]] = {}
    for run in table.runs:
        if (run.folder / "samples" / "after.png").is_file():
            with_samples.setdefault(run.seed, []).append(run)
    if not with_samples:
        return [], []
    seed = max(sorted(with_samples), key=lambda seed: len(with_samples[seed]))
    at_seed = {run.label: run for run in with_samples[seed]}
    others = {run.label: run for runs in with_samples.values() for run in runs}
    wanted: list[tuple[str, str, Run]] = []
    for title, name in (("before", "before"), ("oracle", "oracle")):
        there = [run for run in at_seed.values() if (run.folder / "samples" / f"{name}.png").is_file()]
        wanted += [(title, name, run) for run in there][:1]
    for row in table.rows:
        if row.is_method and (run := at_seed.get(row.label) or others.get(row.label)):
            wanted.append((row.label, "after", run))
    samples, left_out, spent = [], [], 0
    for title, name, run in wanted:
        path, rows = run.folder / "samples" / f"{name}.png", (run.forget_rows or [])[:ROWS]
        try:
            uri = as_data_uri(path, COLUMNS, WIDEST) if spent < most_bytes else ""
            strip = as_data_uri(path, COLUMNS, WIDEST, rows) if uri and rows else ""
        except Exception:  # a damaged or immense picture; the others are still worth looking at
            uri = ""
        if uri:
            spent += len(uri) + len(strip)
            samples.append(
                {"title": title, "seed": run.seed, "uri": uri, "strip": strip, "is_method": name == "after",
                 "same_base": run.seed == seed}
            )  # fmt: skip
        else:
            left_out.append(title)
    return samples, left_out


def no_formula(said: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return said.replace("$", r"\$")


def draw_curves(curves: dict[str, dict[str, Curve]], keys: list[str], path: Path) -> None:
    """A PNG: each key over the steps, a line for the mean of each row.

    Up to six rows have a band from their lowest to their highest seed; more would hide each other.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(keys) + 1.5, 4.5), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for number, (row, by_key) in enumerate(curves.items()):
            curve = by_key.get(key, Curve([], [], [], []))
            style = ("-", "--", ":")[number // 10 % 3]  # there are ten colours
            (line,) = axes.plot(curve.steps, curve.mean, style, label=no_formula(row), linewidth=1.5)
            if len(curves) <= 6:
                axes.fill_between(curve.steps, curve.low, curve.high, alpha=0.12, color=line.get_color())
        axes.set(xlabel="step", ylabel=no_formula(key))
        if axes.dataLim.ymin >= 0:
            axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))
