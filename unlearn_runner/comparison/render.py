"""Tables as text: for a terminal, Markdown, LaTeX and CSV."""

import csv
import io
import re
from collections.abc import Callable
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unlearn_runner.catalogue import HIGH, LOW
from unlearn_runner.comparison.statistics import Paired
from unlearn_runner.comparison.tables import Cell, Row, number, text, way_of

TitleOf: TypeAlias = Callable[[str], str]  # how a column is called: Table.title_of
ARROWS = {LOW: "↓", HIGH: "↑"}
MEANS = "mean ± half the 95 % interval over seeds"
INTERVALS = (
    f"{MEANS}, by Student's t (for independent, normal scores; 3 seeds: 2.5 standard deviations to each side, 5 seeds: "
    "1.2); [low, high] where it is cut at the bounds of what is measured, and Wilson's by the number of samples for a "
    "share of one run, or the same in all, which leaves other seeds out"
)
WAYS = "↓ less is better, ↑ more is, → nearer to this is"


def arrow(way: str | float | None) -> str:
    """Which way is better: ↓, ↑, → 0.5 or → oracle; "" where no direction is good."""
    return "" if way is None else ARROWS.get(way, f"→ {way}")


def heading(rows: list[Row], column: str, title_of: TitleOf = str) -> str:
    return f"{title_of(column)} {arrow(way_of(rows, column))}".strip()


def terminal_tables(
    rows: list[Row], columns: list[str], cells: list[dict[str, Cell]], width: int, title_of: TitleOf = str
) -> list[Table]:
    """A line for each row. Columns that do not fit beside each other go on in a further table."""
    return beside_each_other(
        ["method", "n"],
        [[row.label, str(len(row.seeds))] for row in rows],
        {heading(rows, column, title_of): [terminal_cell(found.get(column)) for found in cells] for column in columns},
        ["" if row.is_method else "dim" for row in rows],
        width,
    )


def terminal_cell(cell: Cell | None) -> Text:
    if cell is None:
        return Text("")
    return Text(f"★ {text(cell)}", style="bold green") if cell.best else Text(text(cell))


def terminal_tests(
    tests: dict[str, dict[str, Paired]], columns: list[str], width: int, title_of: TitleOf = str
) -> list[Table]:
    """Differences from the baseline with their intervals and corrected p."""
    labels = list(tests)
    shown = {
        title_of(column): [test_cell(tests[label].get(column)) for label in labels]
        for column in columns
        if any(column in by_column for by_column in tests.values())
    }
    return beside_each_other(["method"], [[label] for label in labels], shown, [""] * len(labels), width)


def test_cell(result: Paired | None) -> Text:
    """Difference ± interval, p after correction and the number of pairs; bold below 0.05."""
    if result is None:
        return Text("")
    said = f"{difference(result)}, {p_value(result)}, n={result.n}"
    return Text(said, style="bold") if result.adjusted is not None and result.adjusted < 0.05 else Text(said)


def difference(result: Paired) -> str:
    digits = len(number(result.difference).partition(".")[2])
    said = f"{result.difference:+.{digits}f}"
    return said if result.half_width is None else f"{said} ± {result.half_width:.{digits}f}"


def p_value(result: Paired) -> str:
    if result.adjusted is None:
        return "p unknown"
    return "p<0.001" if result.adjusted < 0.001 else f"p={result.adjusted:.3f}"


def beside_each_other(
    names: list[str], heads: list[list[str]], columns: dict[str, list[Text]], styles: list[str], width: int
) -> list[Table]:
    """Tables no wider than `width`, each with the heads of all rows and as many columns as fit, at least one."""
    head_width = sum(max(len(name), *(len(head[place]) for head in heads), 1) + 3 for place, name in enumerate(names))
    tables, taken = [], width
    for title, cells in columns.items():
        needs = max(len(title), *(cell.cell_len for cell in cells)) + 3
        if taken + needs > width:
            tables.append([])
            taken = head_width + 1
        tables[-1].append(title)
        taken += needs
    drawn = []
    for titles in tables:
        table = Table(header_style="bold", show_edge=True, pad_edge=True)
        for place, name in enumerate(names):
            table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
        for title in titles:
            table.add_column(title, justify="right", no_wrap=True)
        for place, head in enumerate(heads):
            table.add_row(*map(Text, head), *(columns[title][place] for title in titles), style=styles[place])
        drawn.append(table)
    return drawn


class Plain(Console):
    """A console for names of others: no markup, no emoji; raises BrokenPipeError when nobody reads on."""

    def __init__(self, **more: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **more)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def terminal() -> Console:
    """As wide as the terminal; into a file or a pipe as wide as it needs."""
    console = Plain(soft_wrap=False)
    return console if console.is_terminal else Plain(width=10_000)


def markdown(
    rows: list[Row], columns: list[str], cells: list[dict[str, Cell]], title_of: TitleOf = str, means: bool = False
) -> str:
    """The longer of metrics and rows goes down the page: tables with many of either stay readable. `means` alone: the
    rows.
    """
    across, down = [markdown_escaped(row.label) for row in rows], [markdown_escaped(title_of(key)) for key in columns]
    said = [[markdown_cell(found.get(column), means) for found in cells] for column in columns]
    if means or len(rows) > len(columns):
        across, down, said = down, across, [list(line) for line in zip(*said, strict=True)]
    lines = [f"| {' | '.join([name, *line])} |" for name, line in zip(down, said, strict=True)]
    return "\n".join([f"| | {' | '.join(across)} |", "|---" * (len(across) + 1) + "|", *lines])


def markdown_escaped(said: str) -> str:
    """Text that stays text in a cell: no markup, no HTML, no link, no mention, no end of the cell."""
    said = " ".join(said.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    said = re.sub(r"([\\`*|\[\]$~@])|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])", lambda found: f"\\{found[0]}", said)
    return said.replace("://", "\\://").replace("www.", "www\\.")


def markdown_cell(cell: Cell | None, means: bool = False) -> str:
    said = "" if cell is None else number(cell.mean) if means else text(cell)
    return f"**{said}**" if cell is not None and cell.best else said


def latex(
    rows: list[Row], columns: list[str], cells: list[dict[str, Cell]], caption: str, title_of: TitleOf = str
) -> str:
    """A table for the package booktabs, one line for each row of `rows`."""
    head = " & ".join(
        ["method", "$n$", *(f"{escaped(title_of(column))}{latex_arrow(way_of(rows, column))}" for column in columns)]
    )
    lines = []
    for place, (row, found) in enumerate(zip(rows, cells, strict=True)):
        if place and row.is_method and not rows[place - 1].is_method:
            lines.append(r"\midrule")
        said = [escaped(row.label), str(len(row.seeds)), *(latex_cell(found.get(column)) for column in columns)]
        lines.append(" & ".join(said) + r" \\")
    return "\n".join(
        [
            r"\begin{table}", r"\centering", rf"\caption{{{escaped(caption)}}}",
            rf"\begin{{tabular}}{{lr{'r' * len(columns)}}}", r"\toprule", head + r" \\", r"\midrule", *lines,
            r"\bottomrule", r"\end{tabular}", r"\end{table}",
        ]
    )  # fmt: skip


def latex_arrow(way: str | float | None) -> str:
    return {LOW: r" $\downarrow$", HIGH: r" $\uparrow$", None: ""}.get(way, rf" $\to$ {way}")


def latex_cell(cell: Cell | None) -> str:
    if cell is None:
        return "--"
    mean, _, seeds = text(cell).partition(" (")
    said = "$" + mean.replace("±", r"\pm") + "$"
    return (rf"\boldmath{said}" if cell.best else said) + (f" ({seeds}" if seeds else "")


def escaped(said: str) -> str:
    """Text with LaTeX's own characters made harmless."""
    said = " ".join(said.split())
    special = {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
        "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    }  # fmt: skip
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in said)


def csv_text(tables: list[tuple[str, list[Row], list[str], list[dict[str, Cell]]]]) -> str:
    """One line for each table, row and metric: what a data frame reads. Empty where there is none: the interval,
    the standard deviation of several oracles, z.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["table", "row", "metric", "better", "mean", "ci95_low", "ci95_high", "n", "of", "best", "std", "z"]
    )
    for title, rows, columns, cells in tables:
        for row, found in zip(rows, cells, strict=True):
            for column in columns:
                if cell := found.get(column):
                    ends, way = cell.interval or ("", ""), way_of(rows, column)
                    direction = "" if way is None else way
                    further = ("" if value is None else value for value in (cell.std, cell.z))
                    writer.writerow(
                        [*map(no_formula, (title, row.label, column)), direction, cell.mean, *ends, cell.n, cell.of,
                         int(cell.best), *further]
                    )  # fmt: skip
    return out.getvalue()


def no_formula(said: str) -> str:
    """Text that a spreadsheet shows instead of running it: after a quote if it begins like a formula."""
    try:
        float(said)  # a name that is a number stays one
    except ValueError:
        return f"'{said}" if said.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")) else said
    return said
