"""What a run leaves: lines, pictures, scores, the model and the summary, in its folder and its dashboard."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from types import TracebackType
from typing import Any, NamedTuple, final

from rich.console import Console

from unlearn_runner.cache import fingerprint
from unlearn_runner.catalogue import In, keys, title, what_z_says, z_of
from unlearn_runner.cli import as_override, command_again
from unlearn_runner.comparison.model_card import model_card
from unlearn_runner.errors import Interrupted, NonFiniteError, first_line, writing
from unlearn_runner.evaluation.evaluator import Evaluation, gap
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.training.checkpoint import Checkpoints
from unlearn_runner.training.clock import Clock
from unlearn_runner.training.loggers import Logger, SafeLogger
from unlearn_runner.training.pictures import draw_lambda
from unlearn_runner.training.progress import ProgressBar, comparison_table
from unlearn_runner.training.provenance import environment, peak_memory_gb
from unlearn_runner.training.run_folder import RunFolder
from unlearn_runner.training.signals import Interrupts
from unlearn_runner.weights import weights_identity

HEADLINES = keys(In.RUN)
DIAGNOSTICS = ("lambda/value", "grad_variance/", "weights/")
STATUS = {None: "finished", NonFiniteError: "diverged", Interrupted: "interrupted", KeyboardInterrupt: "interrupted"}


class Oracle(NamedTuple):
    """A model that never saw the forget set, as it was scored."""

    origin: dict[str, Any]  # its `seed`, or the `folder` of one of the user's own; the `digest` of its weights
    scores: dict[str, float]  # without a prefix; NaN where it is no finite number
    intervals: dict[str, list[float]]  # of those scores; empty without a bootstrap


@final
class Record:
    """The record of one run. As a context it opens the dashboard and, however the run ends, closes all with
    its status: finished, diverged (a loss, a picture or a headline score that is not finite), interrupted (a signal) or
    failed (anything else). What is not a finite number is left out of the record, and said.

    Args:
        path: of the run folder.
        folder: None in all processes but the first: these keep the scores, and write nothing.
        logger: of the first process; None: the folder alone.
        config: for the dashboard.
        max_steps: how many steps the progress bar has.
        keep_checkpoints: also of a run that has finished.
    """

    def __init__(
        self,
        path: Path,
        folder: RunFolder | None,
        logger: Logger | None,
        config: dict[str, Any],
        max_steps: int,
        keep_checkpoints: bool,
        console: Console,
        interrupts: Interrupts,
    ):
        self.path = path
        self.folder = folder
        say = partial(console.print, markup=False, soft_wrap=True)
        self.loggers = [] if logger is None else [SafeLogger(logger, say)]
        self.config = config
        self.keep_checkpoints = keep_checkpoints
        self.console = console
        self.interrupts = interrupts
        self.started = time.perf_counter()
        self.progress = ProgressBar("unlearning", max_steps, console)
        self.scores: dict[str, float] = {}
        self.costs: dict[str, float] = {}
        self.intervals: dict[str, list[float]] = {}
        self.compared: list[Oracle] = []
        self.provenance: dict[str, Any] = {}
        self.identity: dict[str, str] = {"started": now()}  # of what was done: dates, and digests of weights
        self.not_finite: dict[str, None] = {}  # keys of what was left out, in the order of their first time
        self.failures: list[Exception] = []  # of what is attempted

    def __enter__(self) -> "Record":
        self.interrupts.protect(Record.attempt, Record.spent, Record.__exit__)
        try:
            if self.folder is not None:
                self.folder.write_summary("running", {})
            for logger in self.loggers:
                logger.start(self.path, self.config)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Whatever fails on the way, and whatever signal comes, the rest is done; what failed first is raised."""
        status = STATUS.get(kind, "failed")
        memory = peak_memory_gb()
        metrics = self.scores | ({} if memory is None else {"cost/peak_memory_gb": memory}) | self.costs
        self.attempt(self.progress.close)
        if error is not None:
            self.attempt(self._say_how_to_go_on, status)
        if self.folder is not None:
            self.attempt(self._write_end, self.folder, status, metrics, error)
            if status == "finished" and not self.keep_checkpoints and not self.failures:
                self.folder.drop_checkpoints()
            self.attempt(self.folder.close)
        self.interrupts.protect()  # the record is closed: a dashboard that does not answer may be left
        for logger in self.loggers:
            self.attempt(logger.finish, metrics, status != "finished")
        if error is None and self.failures:
            raise self.failures[0]
        for failure in self.failures:
            self.console.print(f"the record is not whole: {first_line(failure)}", soft_wrap=True)
        if error is None and self.interrupts.received is not None:
            raise Interrupted("the run had finished when the signal came")

    def attempt(self, close: Callable[..., Any], *arguments: Any) -> None:
        """Do something that ends the run, whatever signal comes; what fails of it is said when the record is closed."""
        try:
            close(*arguments)
        except Exception as failure:
            self.failures.append(failure)

    def spent(self, clock: Clock) -> None:
        """What training has cost when it ends, however it ends."""
        self.costs |= clock.costs()

    def _say_how_to_go_on(self, status: str) -> None:
        if Checkpoints(self.path / "checkpoints").all():
            again = command_again(as_override("resume_from_checkpoint", str(self.path.resolve())))
            self.console.print(f"{status}; go on with: {again}", soft_wrap=True)
        elif status == "interrupted":  # there is nothing of the run, but of what it stands on
            self.console.print(
                f"{status} before the first checkpoint; what was made until now is in the cache, go on with: "
                f"{command_again()}",
                soft_wrap=True,
            )

    def _write_end(
        self, folder: RunFolder, status: str, metrics: dict[str, float], error: BaseException | None
    ) -> None:
        more: dict[str, Any] = {} if error is None else {"error": f"{type(error).__name__}: {error}"}
        if self.intervals:
            more["intervals"] = self.intervals
        if self.compared:
            more["oracles"] = [
                {
                    **oracle.origin,
                    "metrics": oracle.scores,
                    **({"intervals": oracle.intervals} if oracle.intervals else {}),
                }
                for oracle in self.compared
            ]
        if self.not_finite:
            more["not_finite"] = list(self.not_finite)
        more["identity"] = {**self.identity, "finished": now()}
        provenance = {"environment": environment(), "evaluation": self.provenance}
        folder.write_summary(status, metrics, **more, provenance=provenance)
        if status == "finished" and folder.model.is_dir():
            folder.write_card(model_card(self.path))

    def inventory(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """What became of each file of the data, as data.jsonl; its digest is in the summary."""
        if rows:
            self.provenance["files_digest"] = fingerprint(list(rows))
            if self.folder is not None:
                self.folder.write_inventory(rows)

    def line(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """A line of what is finite, which is returned."""
        finite = self._finite(step, values)
        if self.folder is not None:
            self.folder.append(step, finite)
        for logger in self.loggers:
            logger.log(step, finite)
        return finite

    def score(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """A line of scores, of which the finite ones are returned, and are the summary's."""
        finite = self.line(step, values)
        self.scores |= finite
        return finite

    def evaluation(self, step: int, prefix: str, found: Evaluation, picture: str) -> None:
        """The scores of a model in place of its former ones, and its pictures as samples/<picture>.png."""
        self.scores = {key: value for key, value in self.scores.items() if not key.startswith(f"{prefix}/")}
        self.intervals = {key: part for key, part in self.intervals.items() if not key.startswith(f"{prefix}/")}
        scores = found.scores | dict.fromkeys(found.not_finite, math.nan)
        self.score(step, {f"{prefix}/{key}": value for key, value in scores.items()})
        self.intervals |= {f"{prefix}/{key}": interval for key, interval in found.intervals.items()}
        self.picture(step, found, picture, prefix)

    def picture(self, step: int, found: Evaluation, name: str, shown_as: str | None = None) -> None:
        """What a model has drawn, as samples/<name>.png; on a dashboard under its name, or as is said."""
        if self.folder is not None:
            path = self.folder.save_grid(name, found.grid, found.grid_columns, self.provenance.get("row_titles", ()))
            self._show(step, f"samples/{shown_as or name}", path)

    def oracles(self, step: int, found: Sequence[Oracle]) -> None:
        """The scores of the models that never saw the forget set, on average; of several their standard deviation, too.
        Each one's own are in the summary, with where it is from.
        """
        if not found:
            return
        self.compared = [
            oracle._replace(scores={key: value for key, value in oracle.scores.items() if math.isfinite(value)})
            for oracle in found
        ]
        all_have = [key for key in found[0].scores if all(key in oracle.scores for oracle in found)]
        values = {key: [oracle.scores[key] for oracle in found] for key in all_have}
        finite = self.score(step, {f"oracle/{key}": mean(each) for key, each in values.items()})
        if len(found) == 1:
            self.intervals |= {f"oracle/{key}": interval for key, interval in found[0].intervals.items()}
        else:
            spread = {key: stdev(each) for key, each in values.items() if f"oracle/{key}" in finite}
            self.score(step, {f"oracle_std/{key}": value for key, value in spread.items()})

    def model(self, model: GenerativeModel) -> None:
        """The model that ships."""
        if self.folder is not None:
            self.folder.save_model(model.save)
            self.identity["result"] = weights_identity(self.path / "model")

    def averages(self, step: int, since: int) -> None:
        """What the lines after a step say on average, and lambda's picture."""
        if self.folder is None:
            return
        lines = [line for line in self.folder.lines() if line["step"] > since]
        self.scores |= means_of(lines)
        path = self.path / "samples" / "lambda.png"
        with writing(path):
            drawn = draw_lambda(lines, path)
        if drawn:
            self._show(step, "samples/lambda", path)

    def report(self, step: int) -> None:
        """The distances from the oracles, if there are some, and the short table at the end.

        Raises NonFiniteError if a headline score of the unlearned model is not a finite number.
        """
        before, after, oracle, spread, floor = (
            {key.removeprefix(prefix): value for key, value in self.scores.items() if key.startswith(prefix)}
            for prefix in ("base/", "eval/", "oracle/", "oracle_std/", "floor/")
        )
        if oracle:
            self.score(step, {f"oracle_gap/{key}": value for key, value in gap(after, oracle).items()})
        in_spreads = {
            key: z
            for key in spread
            if key in after and (z := z_of(key, after[key], [each.scores[key] for each in self.compared])) is not None
        }
        if in_spreads:
            self.score(step, {f"gap_z/{key}": value for key, value in in_spreads.items()})
        keys = [key for name in HEADLINES for key in after if fnmatchcase(key, name)]
        extractor = self.provenance.get("features", {}).get("extractor")
        titles = {key: title(key, extractor) for key in keys}
        change = {key: after[key] - before[key] for key in keys if key in before}
        self.console.print(comparison_table(before, after, titles, oracle, spread, in_spreads, floor))
        if in_spreads:
            self.console.print(what_z_says(len(self.compared)), soft_wrap=True)
        beside = {"oracle": oracle, "oracle_std": spread, "gap_z": in_spreads, "real images": floor}
        columns = {"before": before, "after": after, "change": change} | {
            key: part for key, part in beside.items() if part
        }
        rows = [[key, *(column.get(key) for column in columns.values())] for key in change]
        for logger in self.loggers:
            logger.table("results", ["metric", *columns], rows)
        seconds = time.perf_counter() - self.started
        self.console.print(f"this command took {seconds:.0f} s; everything is in {self.path}", soft_wrap=True)
        if lost := [f"eval/{name}" for name in HEADLINES if f"eval/{name}" in self.not_finite and name not in after]:
            raise NonFiniteError(
                f"{', '.join(lost)}: not a finite number, all else that was measured is in {self.path}"
            )

    def position(self) -> int:
        """Where the next line will begin, in bytes."""
        return 0 if self.folder is None else self.folder.position()

    def truncate(self, position: int) -> None:
        """Forget the lines written after a checkpoint."""
        if self.folder is not None:
            self.folder.truncate(position)

    def _show(self, step: int, key: str, path: Path) -> None:
        for logger in self.loggers:
            logger.image(step, key, path)

    def _finite(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Without those that are not finite numbers; of each key that is said once."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        if new := [key for key in values if key not in finite and key not in self.not_finite]:
            self.not_finite |= dict.fromkeys(new)
            text = f"{', '.join(new)}: not a finite number at step {step}, left out wherever it is none"
            self.console.print(text, soft_wrap=True)
        return finite


def means_of(lines: list[dict[str, Any]]) -> dict[str, float]:
    """What the method tells of itself at every step, on average over the run: mean/lambda/value, ..."""
    logged: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith(DIAGNOSTICS):
                logged.setdefault(f"mean/{key}", []).append(value)
    return {key: mean(values) for key, values in logged.items()}


def now() -> str:
    """The time, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
