"""Which method forgets best, keeps most and costs least, and whether the difference is real. Reads run folders only.

    python scripts/compare.py FOLDER [FOLDER ...]                     # a table in the terminal
    python scripts/compare.py FOLDER --html report.html               # the whole comparison as one page
    python scripts/compare.py FOLDER --sort fid_retain --baseline siss
    python scripts/compare.py FOLDER --csv | --latex | --markdown     # a table for elsewhere

A row is the runs of one `label` (the method's name, if it was not set). Rows "base" and "oracle" are the same runs'
scores before unlearning and of the model that never saw the forget set, "real images" those of as many real images. ★
is the best of a column: of a metric of forgetting the nearest to the oracle's, where there is one. Runs that were not
measured alike come in tables of their own. How the best is found and tested, and what the intervals are, is in
docs/comparing.md."""

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from unlearn_runner.comparison.choices import Parser
from unlearn_runner.comparison.comparison import Comparison, Table, Wanted, compare
from unlearn_runner.comparison.packs import SUFFIX, pack, with_packs
from unlearn_runner.comparison.render import (
    INTERVALS,
    MEANS,
    WAYS,
    Plain,
    csv_text,
    latex,
    markdown,
    markdown_escaped,
    terminal,
    terminal_tables,
    terminal_tests,
)
from unlearn_runner.comparison.runs import RunsRead, read_runs
from unlearn_runner.comparison.statistics import TESTS
from unlearn_runner.comparison.tables import FLOOR, spread_of_oracles
from unlearn_runner.comparison.verdicts import measured_by, rules_of, sentence
from unlearn_runner.errors import ConfigurationError, near, plain

BROKEN_PIPE = 141  # what a shell says of a command that SIGPIPE ended


def parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="a run, one with runs below it, or a file of runs")
    add("--sort", metavar="METRIC", help="best first by this metric, or 'label' (default: forget_rate)")
    add("--metrics", nargs="+", metavar="METRIC", help="the columns, any keys of summary.json (default: headlines)")
    add("--all", action="store_true", help="all columns; exports have them anyway")
    add("--no-marks", action="store_true", help="mark no best")
    add("--baseline", metavar="LABEL", help="test every method against this one on the same seeds")
    add("--test", choices=TESTS, default="t", help="which test; p is corrected by Holm (default: t)")
    add(
        "--floor", type=share, default=FLOOR, metavar="SHARE",
        help="who keeps less than this share of the base's retain_accuracy is never called the best; 0: no floor "
        f"(default: {FLOOR})",
    )  # fmt: skip
    add(
        "--any-budget", action="store_true",
        help="runs of any number of steps and any batch size in one table, to compare at equal network evaluations",
    )  # fmt: skip
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print a line for each table, row and metric")
    add("--means", action="store_true", help="with --markdown: means alone, without intervals, a line for each row")
    form.add_argument("--latex", action="store_true", help="print tables for booktabs")
    form.add_argument(
        "--markdown", action="store_true",
        help="print Markdown, a line for each metric, or for each row if these are more",
    )  # fmt: skip
    add(
        "--pack", type=Path, metavar="FILE", help=f"also write all runs into one file (*{SUFFIX}) that compare.py reads"
    )
    add("--html", type=Path, metavar="FILE", help="also write the whole comparison as one page that needs no network")
    add("--grid", type=Path, metavar="FILE", help="also write a PNG of everyone's samples")
    add("--curves", type=Path, metavar="FILE", help="also write a PNG of forgetting over the steps")
    add(
        "--keys", nargs="+", metavar="KEY", default=["eval/forget_rate", "eval/restored_rate"],
        help="keys of metrics.jsonl to draw there, such as lambda/value (default: forgetting)",
    )  # fmt: skip
    return parser


def share(said: str) -> float:
    """A number in [0, 1], for argparse."""
    with suppress(ValueError):
        if 0 <= (value := float(said)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {said}")


def main() -> None:
    arguments = parser().parse_args()
    try:
        if arguments.means and not arguments.markdown:
            raise ConfigurationError("--means is of --markdown; give both.")
        if arguments.pack and arguments.pack.suffix != SUFFIX:
            raise ConfigurationError(f"--pack {arguments.pack}: a file of runs is called *{SUFFIX}.")
        for file in filter(None, (arguments.html, arguments.grid, arguments.curves, arguments.pack)):
            if not file.parent.is_dir():
                raise ConfigurationError(f"{file} cannot be written: there is no folder {file.parent}.")
            if file.is_dir():
                raise ConfigurationError(f"{file} cannot be written: it is a folder.")
        found = read(arguments.folders)
        exported = arguments.csv or arguments.latex or arguments.markdown
        short = not (arguments.all or arguments.csv or arguments.markdown)
        wanted = Wanted(
            arguments.metrics or [], short, arguments.sort, arguments.baseline, arguments.test, not arguments.no_marks,
            floor=arguments.floor, any_budget=arguments.any_budget,
        )  # fmt: skip
        comparison = compare(found, wanted)
        console, aside = terminal(), Plain(stderr=True, soft_wrap=True)
        rest = aside if exported else console
        try:
            if arguments.csv:
                lines = csv_text([table[:1] + table[2:5] for table in comparison.tables])
                sys.stdout.writelines(lines.splitlines(keepends=True))  # Python passes over a pipe that closes in one
            elif exported:
                for table in comparison.tables:
                    print(latex_of(table) if arguments.latex else markdown_of(table, arguments.means))
                if arguments.markdown and not arguments.means:
                    print(f"{INTERVALS}{'' if arguments.no_marks else '; **bold**: best'}.")
            else:
                show(comparison, arguments, console)
            say(comparison, rest)
            sys.stdout.flush()
            status = 0
        except BrokenPipeError:  # `| head` has read enough; the files are still written
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = BROKEN_PIPE
        write(found, wanted, comparison, arguments, rest)
        sys.exit(status)
    except ConfigurationError as error:
        sys.exit(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"{error.filename}: {error.strerror}.")


def read(folders: list[Path]) -> RunsRead:
    """The runs below the folders. Raises ConfigurationError if a folder is not there or no run is finished."""
    folders = with_packs(folders)
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise ConfigurationError(f"{folder} is a file; give the folder of a run, or one with runs below it.")
        if not folder.is_dir():
            beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
            others = [str(other) for other in beside if other.is_dir()]
            raise ConfigurationError(f"{folder}: there is no such folder{near(str(folder), others)}.")
    found = read_runs(folders)
    if not found.runs:
        lines = [f"  {run.folder}: {run.why}" for run in found.apart]
        raise ConfigurationError(plain("\n".join(["no finished run in there.", *found.remarks, *lines])))
    return found


def markdown_of(table: Table, means: bool) -> str:
    title = f"**{markdown_escaped(table.title)}**\n\n" if table.title else ""
    said = "" if means else "".join(f"\n{words}\n" for words in spread_of_oracles(table.rows))
    return f"{title}{markdown(table.rows, table.columns, table.cells, table.title_of, means)}\n{said}"


def latex_of(table: Table) -> str:
    said = [table.title, f"{how(table)}; {MEANS}", *spread_of_oracles(table.rows)]
    return latex(table.rows, table.columns, table.cells, ". ".join(filter(None, said)), table.title_of)


def how(table: Table) -> str:
    """Of how many runs a table is."""
    seeds = sorted({run.seed for run in table.runs})
    named = ", ".join(map(str, seeds)) if len(seeds) <= 10 else f"{seeds[0]} to {seeds[-1]}"
    return f"{len(table.runs)} run{'s' * (len(table.runs) != 1)}, seed{'s' * (len(seeds) != 1)} {named}"


def show(comparison: Comparison, arguments: argparse.Namespace, console: Console) -> None:
    """The tables in the terminal."""
    for number, table in enumerate(comparison.tables, start=1):
        if table.title:
            console.print(f"Table {number}: {table.title}", style="bold")
        for drawn in terminal_tables(table.rows, table.columns, table.cells, console.width, table.title_of):
            console.print(drawn)
        console.print(f"{how(table)}.")
        for verdict in table.verdicts:
            console.print(
                f"  {verdict.question}: {verdict.label} ({measured_by(verdict, table.title_of)}); {sentence(verdict)}."
            )
        if table.tests:
            what = f"{TESTS[arguments.test]}, p after Holm's correction over the methods of each metric"
            console.print(f"\nAgainst {arguments.baseline}, on the same seeds: difference, {what}.")
            for drawn in terminal_tests(table.tests, table.asked, console.width, table.title_of):
                console.print(drawn)
        console.print()
    console.print(f"{INTERVALS}. {WAYS}{'' if arguments.no_marks else ', ★ best'}.")
    if judged := [table for table in comparison.tables if table.verdicts]:
        console.print(rules_of(judged[0].rows, arguments.test, arguments.floor))
    console.print()


def say(comparison: Comparison, console: Console) -> None:
    """What is to be said besides the tables."""
    for number, table in enumerate(comparison.tables, start=1):
        for remark in table.remarks:
            console.print(f"Table {number}: {remark}" if table.title else remark)
    for remark in comparison.remarks:
        console.print(plain(remark))
    if comparison.apart:
        console.print("Not in a table, and in no average:")
        for run in comparison.apart:
            console.print(plain(f"  {run.folder}: {run.why}"))


def write(
    found: RunsRead, wanted: Wanted, comparison: Comparison, arguments: argparse.Namespace, console: Console
) -> None:
    """The files that were asked for, each with a line that says so. What draws is imported only now."""
    if arguments.html:
        from unlearn_runner.comparison.report import report

        whole = compare(found, wanted._replace(whole=True))
        page, remarks = report(whole, wanted)
        for remark in remarks:
            console.print(remark)
        arguments.html.write_text(page, encoding="utf-8")
        console.print(f"The comparison as a page: {arguments.html}")
    if arguments.pack:
        pack(found.runs, arguments.pack)
        console.print(f"{len(found.runs)} runs in one file: {arguments.pack}")
    table = comparison.tables[0]
    if arguments.grid:
        from unlearn_runner.comparison.pictures import pictures_of, side_by_side

        if pictures := pictures_of(table.runs, [row.label for row in table.rows]):
            telling = [run for run in sorted(table.runs, key=lambda run: run.seed) if run.row_titles]
            whole, remarks = side_by_side(pictures, titles=telling[0].row_titles if telling else ())
            for remark in remarks:
                console.print(plain(remark))
        if pictures and whole is not None:
            whole.save(arguments.grid, "PNG")
            console.print(f"Samples of the lowest seed: {arguments.grid}")
        else:
            console.print(f"{arguments.grid} is not written: no run has samples/after.png that can be read.")
    if arguments.curves:
        from unlearn_runner.comparison.curves import curves_by_label
        from unlearn_runner.comparison.pictures import draw_curves

        keys = arguments.keys
        curves, remarks = curves_by_label(table.runs, 100, set(keys))
        for remark in remarks:
            console.print(remark)
        if curves:
            draw_curves(curves, keys, arguments.curves)
            console.print(f"{', '.join(keys)} over the steps: {arguments.curves}")
        else:
            why = f"no run has {' or '.join(keys)} on the way in a metrics.jsonl"
            console.print(f"{arguments.curves} is not written: {why}.")


if __name__ == "__main__":
    main()
