"""Progress on a terminal as a bar, elsewhere as plain lines."""

import sys
import time
from contextlib import suppress
from typing import Any, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unlearn_runner.training.clock import Clock

SECONDS_BETWEEN_LINES = 10.0


def run_console(quiet: bool = False) -> Console:
    """Where a run says what it does. Text is text: no brackets or colons of a path mean a style or a picture."""
    return Console(file=Lasting(sys.stdout), quiet=quiet, markup=False, emoji=False, highlight=False)


@final
class Lasting:
    """A stream that may go away, with its terminal or the program at the other end of the pipe: the run goes on."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@final
class ProgressBar:
    """Step, loss, forget rate, images per second and the time that remains."""

    def __init__(self, title: str, total: int, console: Console):
        self.title = title
        self.total = total
        self.console = console
        self.forget_rate: float | None = None
        self._first: tuple[int, float, float] | None = None  # step, images, seconds
        self._line_at = 0.0
        self._bar: Progress | None = None

    def update(self, step: int, values: dict[str, float]) -> None:
        """Show a logged step."""
        if self._first is None:
            self._first = (step, values["images"], values["seconds"])
        status = self._status(values)
        if self.console.is_terminal:
            if self._bar is None:
                texts = ("{task.description}", "{task.fields[status]}")
                title, status_of = (TextColumn(text, markup=False) for text in texts)
                self._bar = Progress(title, BarColumn(), MofNCompleteColumn(), status_of, TimeRemainingColumn(),
                                     console=self.console)  # fmt: skip
                self._bar.start()
                self._bar.add_task(self.title, total=self.total, status="")
            self._bar.update(self._bar.task_ids[0], completed=step, status=status)
        elif time.monotonic() - self._line_at > SECONDS_BETWEEN_LINES or step >= self.total:
            self._line_at = time.monotonic()
            self.console.print(
                f"{self.title}: step {step}/{self.total}, {status}{self._remaining(step, values)}",
                soft_wrap=True,
            )
        if step >= self.total:
            self.close()

    def logged(self, clock: Clock, values: dict[str, float]) -> None:
        """Show the event of a trainer."""
        self.update(clock.step, values)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _status(self, values: dict[str, float]) -> str:
        losses = [f"{key} {values[key]:.4f}" for key in ("loss/retain", "loss/forget") if key in values]
        shown = losses or [f"{key} {value:.4f}" for key, value in values.items() if key.startswith("loss/")]
        if self.forget_rate is not None:
            shown.append(f"forget_rate {self.forget_rate:.2f}")
        images, seconds = values["images"] - self._first[1], values["seconds"] - self._first[2]
        if seconds > 0 and images > 0:  # a method may read none
            shown.append(f"{images / seconds:.0f} images/s")
        return ", ".join(shown)

    def _remaining(self, step: int, values: dict[str, float]) -> str:
        done, seconds = step - self._first[0], values["seconds"] - self._first[2]
        return f", {seconds / done * (self.total - step):.0f} s left" if done and step < self.total else ""


def _rounded(value: float) -> float:
    """To three digits, and never to a negative zero."""
    return round(value, 3) + 0.0


def comparison_table(
    before: dict[str, float],
    after: dict[str, float],
    titles: dict[str, str],
    oracle: dict[str, float],
    oracle_std: dict[str, float],
    gap_z: dict[str, float],
    floor: dict[str, float],
) -> Any:
    """A rich table of the keys in `titles`, which says how they are called: metric, before, after, change; the oracles'
    mean ± standard deviation, the distance from it in units of that, and the score of as many real images, where there
    are some.
    """
    from rich.table import Table

    def said(values: dict[str, float], key: str, form: str = ".3f") -> str:
        return f"{_rounded(values[key]):{form}}" if key in values else ""

    change = {key: value - before[key] for key, value in after.items() if key in before}
    table = Table("metric", show_edge=False)
    further = {"oracle": oracle, "z": gap_z, "real images": floor}
    for column in ("before", "after", "change", *(name for name, values in further.items() if values)):
        table.add_column(column, justify="right")
    for key, title in titles.items():
        cells = [said(before, key), said(after, key), said(change, key, "+.3f")]
        spread = f" ± {oracle_std[key]:.3f}" if key in oracle_std else ""
        cells += [said(oracle, key) + spread] if oracle else []
        cells += [said(gap_z, key, "+.1f")] if gap_z else []
        cells += [said(floor, key)] if floor else []
        table.add_row(title, *cells)
    return table
