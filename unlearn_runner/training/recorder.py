"""What a run leaves: lines, pictures, scores, the model and the summary, in its folder and its dashboard."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import mean
from types import TracebackType
from typing import Any, final

from rich.console import Console

from unlearn_runner.catalogue import In, keys
from unlearn_runner.cli import as_override, command_again
from unlearn_runner.errors import ConfigurationError, Interrupted, NonFiniteError, first_line, writing
from unlearn_runner.evaluation.evaluator import Evaluation, Evaluator, gap
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.training.checkpoint import Checkpoints
from unlearn_runner.training.loggers import Logger, SafeLogger
from unlearn_runner.training.pictures import draw_lambda
from unlearn_runner.training.progress import ProgressBar, comparison_table
from unlearn_runner.training.provenance import environment, peak_memory_gb
from unlearn_runner.training.relearning import Relearning
from unlearn_runner.training.run_folder import NoFolder, RunFolder
from unlearn_runner.training.signals import Interrupts
from unlearn_runner.training.trainer import COSTS, Recorder, Trainer

HEADLINES = keys(In.RUN)
DIAGNOSTICS = ("lambda/value", "grad_variance/", "weights/")
STATUS = {None: "finished", NonFiniteError: "diverged", Interrupted: "interrupted", KeyboardInterrupt: "interrupted"}


@final
class ProgressRecorder(Recorder):
    """For training on the side, such as that of a base: a progress bar, and nothing left."""

    def __init__(self, progress: ProgressBar):
        self.progress = progress

    def log(self, step: int, values: dict[str, float]) -> None:
        self.progress.update(step, values)

    def note(self, step: int, values: dict[str, float]) -> None:
        pass

    def evaluate(self, model: GenerativeModel, step: int) -> None:
        pass

    def finish(self, model: GenerativeModel, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


@final
class RunRecorder(Recorder):
    """The record of one run. As a context it opens the dashboard and, however the run ends, closes all with
    its status: finished, diverged (a loss, a picture or a headline score that is not finite), interrupted (a signal) or
    failed (anything else). What is not a finite number is left out of the record, and said.
    """

    def __init__(
        self,
        folder: RunFolder | NoFolder,
        logger: Logger,
        config: dict[str, Any],
        max_steps: int,
        console: Console,
        interrupts: Interrupts,
    ):
        self.folder = folder
        self.logger = SafeLogger(logger, partial(console.print, markup=False, soft_wrap=True))
        self.config = config
        self.console = console
        self.interrupts = interrupts
        self.started = time.perf_counter()
        self.progress = ProgressBar("unlearning", max_steps, console)
        self.evaluator: Evaluator | None = None  # set by `watch`
        self.probe: Evaluator | None = None
        self.at_threshold: Evaluator | None = None
        self.threshold: float | None = None
        self.before: Evaluation | None = None
        self.scores: dict[str, float] = {}
        self.costs: dict[str, float] = {}
        self.intervals: dict[str, list[float]] = {}
        self.deletion_steps: dict[str, int] = {}
        self.reached: dict[str, float] = {}  # empty until a look finds at most `threshold`
        self.provenance: dict[str, Any] = {}
        self.not_finite: dict[str, None] = {}  # keys of what was left out, in the order of their first time
        self.trainer: Trainer | None = None

    def __enter__(self) -> "RunRecorder":
        self.interrupts.protect(RunRecorder.__exit__)
        try:
            self.folder.write_summary("running", {})
            self.logger.start(self.folder.path, self.config)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Whatever fails on the way, and whatever signal comes, the rest is done; what failed first is raised."""
        status = STATUS.get(kind, "failed")
        metrics = self.scores | self._costs()
        failures: list[Exception] = []

        def attempt(close: Callable[..., Any], *arguments: Any) -> None:
            try:
                close(*arguments)
            except Exception as failure:
                failures.append(failure)

        attempt(self.progress.close)
        if kind is Interrupted and self.trainer is not None:
            attempt(self.trainer.save)
        if error is not None:
            attempt(self._say_how_to_go_on, status)
        attempt(self._write_end, status, metrics, error)
        kept = self.trainer is not None and self.trainer.plan.keep_checkpoints
        if status == "finished" and not kept and not failures:
            self.folder.drop_checkpoints()
        attempt(self.folder.close)
        self.interrupts.protect(None)  # the record is closed: a dashboard that does not answer may be left
        attempt(self.logger.finish, metrics, status != "finished")
        if error is None and failures:
            raise failures[0]
        for failure in failures:
            self.console.print(f"the record is not whole: {first_line(failure)}", soft_wrap=True)
        if error is None and self.interrupts.received is not None:
            raise Interrupted("the run had finished when the signal came")

    def _say_how_to_go_on(self, status: str) -> None:
        if Checkpoints(self.folder.checkpoints).all():
            again = command_again(as_override("resume_from_checkpoint", str(self.folder.path.resolve())))
            self.console.print(f"{status}; go on with: {again}", soft_wrap=True)
        elif status == "interrupted":  # there is nothing of the run, but of what it stands on
            self.console.print(
                f"{status} before the first checkpoint; what was made until now is in the cache, go on with: "
                f"{command_again()}",
                soft_wrap=True,
            )

    def _write_end(self, status: str, metrics: dict[str, float], error: BaseException | None) -> None:
        more: dict[str, Any] = {} if error is None else {"error": f"{type(error).__name__}: {error}"}
        if self.intervals:
            more["intervals"] = self.intervals
        if self.not_finite:
            more["not_finite"] = list(self.not_finite)
        provenance = {"environment": environment(), "evaluation": self.provenance}
        self.folder.write_summary(status, metrics, **more, provenance=provenance)

    def watch(
        self,
        base: GenerativeModel,
        evaluator: Evaluator,
        probe: Evaluator,
        at_threshold: Evaluator | None = None,
        threshold: float | None = None,
    ) -> None:
        """Score the base model, and from now on score and compare with it.

        `probe` takes the looks on the way; `at_threshold`, if it is given, scores the model once more when a look finds
        a forget_rate of at most `threshold` for the first time.
        """
        self.evaluator, self.probe, self.at_threshold, self.threshold = evaluator, probe, at_threshold, threshold
        data = {"name": evaluator.spec.name, "fingerprint": evaluator.data.fingerprint}
        self.provenance = {"data": data, **evaluator.provenance(base)}
        for sentence in (*evaluator.judge.doubts(), *evaluator.left_out()):
            self.console.print(sentence, soft_wrap=True)
        self.console.print("measuring the base model")
        try:
            self.before = evaluator.once(base)
        except NonFiniteError as error:
            raise ConfigurationError(
                f"model.weights={self.config['model']['weights']}: the base cannot be unlearned, for of what it draws "
                f"{error}; mend its weights or its noise schedule, or give others."
            ) from error
        self._record(0, "base", self.before, "before")

    def relearn(self, prefix: str, model: GenerativeModel, relearning: Relearning) -> None:
        """Measure how fast a model learns again what it was to forget."""
        if not model.has_training_loss:
            self.console.print("relearning is left out: this model has no loss of its own that it could learn by.")
            return
        self.console.print(f"relearning ({prefix})")
        started = time.perf_counter()

        def forget_rate_of(model: GenerativeModel) -> float:
            return self.probe(model).scores["forget_rate"]

        try:
            scores = relearning(model, self.evaluator.data, forget_rate_of, self.scores["base/forget_rate"])
        except NonFiniteError:  # it is relearning that diverged
            scores = {"relearn_steps": math.nan}
        self._write(self.trainer.total_steps, {f"{prefix}/{key}": value for key, value in scores.items()})
        self.costs.setdefault("cost/relearning_seconds", time.perf_counter() - started)  # the unlearned model's

    def compare_with_oracle(self, model: GenerativeModel) -> None:
        """Score the model that never saw the forget set."""
        self.console.print("measuring the oracle")
        with _named("the oracle"):
            oracle = self.evaluator.once(model, self.before.judged)
        self._record(self.trainer.total_steps, "oracle", oracle, "oracle")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.note(step, values)
        self.progress.update(step, values)

    def note(self, step: int, values: dict[str, float]) -> None:
        self._append(step, values)

    def evaluate(self, model: GenerativeModel, step: int) -> None:
        with _named(f"the model after step {step}"):
            evaluation = self.probe(model)
        self.progress.forget_rate = evaluation.scores["forget_rate"]
        self._record(step, "eval", evaluation, f"step_{step:06d}")
        if evaluation.scores["forget_rate"] == 0:
            taken = self.trainer.run_step
            self.deletion_steps = {"deletion_steps": taken, "lasting_deletion_steps": taken} | self.deletion_steps
        else:
            self.deletion_steps.pop("lasting_deletion_steps", None)
        if self.threshold is not None and not self.reached and evaluation.scores["forget_rate"] <= self.threshold:
            self._reach(model, step)

    def _reach(self, model: GenerativeModel, step: int) -> None:
        """The first look that finds little enough to forget: what it took, and what is left of the rest."""
        reached = {"steps": float(self.trainer.run_step)}
        for name in ("seconds", "network_evaluations"):
            reached[name] = float(getattr(self.trainer, name))
        if self.at_threshold is not None:
            evaluation = self.at_threshold(model, self.before.judged)
            reached |= evaluation.scores | dict.fromkeys(evaluation.not_finite, math.nan)
        self.reached = self._write(step, {f"reached/{key}": value for key, value in reached.items()})

    def finish(self, model: GenerativeModel, step: int) -> None:
        self.progress.close()
        self.folder.save_model(model.save)  # before it is scored: a failing metric loses nothing
        for sentence in self.evaluator.left_out_of(model):
            self.console.print(sentence, soft_wrap=True)
        self.console.print("measuring the unlearned model")
        with _named("the unlearned model"):
            after = self.evaluator(model, self.before.judged)
        self._record(step, "eval", after, "after")
        self._write(step, {f"eval/{key}": float(value) for key, value in self.deletion_steps.items()})
        rehearsals = self.trainer.total_steps - self.trainer.run_step
        lines = [line for line in self.folder.lines() if line["step"] > rehearsals]
        self.scores |= self.reached | means_of(lines)
        path = self.folder.path / "samples" / "lambda.png"
        with writing(path):
            drawn = draw_lambda(lines, path)
        if drawn:
            self.logger.image(step, "samples/lambda", path)
        self.costs["cost/sampling_seconds"] = after.seconds["sampling"]
        self.costs["cost/network_evaluations_per_sample"] = after.evaluations_per_sample
        self.costs["cost/evaluation_seconds"] = sum(after.seconds.values())
        self.provenance["seconds"] = after.seconds

    def report(self) -> None:
        """The distances from the oracle, if there is one, and the short table at the end.

        Raises NonFiniteError if a headline score of the unlearned model is not a finite number.
        """
        after, oracle = (
            {key.removeprefix(prefix): value for key, value in self.scores.items() if key.startswith(prefix)}
            for prefix in ("eval/", "oracle/")
        )
        if oracle:
            distances = {f"oracle_gap/{key}": value for key, value in gap(after, oracle).items()}
            self._write(self.trainer.total_steps, distances)
        before, after = (
            {name: self.scores[f"{prefix}/{name}"] for name in HEADLINES if f"{prefix}/{name}" in self.scores}
            for prefix in ("base", "eval")
        )
        keys = [name for name in HEADLINES if name in after]
        self.console.print(comparison_table(before, after, keys))
        rows = [[key, before.get(key), after[key], after[key] - before[key]] for key in keys if key in before]
        self.logger.table("results", ["metric", "before", "after", "change"], rows)
        seconds = time.perf_counter() - self.started
        self.console.print(f"{seconds:.0f} s; everything is in {self.folder.path}", soft_wrap=True)
        if lost := [f"eval/{name}" for name in HEADLINES if f"eval/{name}" in self.not_finite]:
            raise NonFiniteError(
                f"{', '.join(lost)}: not a finite number, all else that was measured is in {self.folder.path}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self.folder.position(),
            "forget_rate": self.progress.forget_rate,
            "deletion_steps": dict(self.deletion_steps),
            "reached": dict(self.reached),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.folder.truncate(state_dict["position"])
        self.progress.forget_rate = state_dict["forget_rate"]
        self.deletion_steps, self.reached = state_dict["deletion_steps"], state_dict["reached"]

    def _finite(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Without those that are not finite numbers; of each key that is said once."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        if new := [key for key in values if key not in finite and key not in self.not_finite]:
            self.not_finite |= dict.fromkeys(new)
            text = f"{', '.join(new)}: not a finite number at step {step}, left out wherever it is none"
            self.console.print(text, soft_wrap=True)
        return finite

    def _record(self, step: int, prefix: str, evaluation: Evaluation, picture: str) -> None:
        scores = evaluation.scores | dict.fromkeys(evaluation.not_finite, math.nan)
        self._write(step, {f"{prefix}/{key}": value for key, value in scores.items()})
        self.intervals |= {f"{prefix}/{key}": interval for key, interval in evaluation.intervals.items()}
        path = self.folder.save_grid(picture, evaluation.grid, evaluation.grid_columns)
        self.logger.image(step, f"samples/{prefix}", path)

    def _write(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Scores, of which the finite ones are returned."""
        finite = self._append(step, values)
        self.scores |= finite
        return finite

    def _append(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """A line of what is finite, which is returned."""
        finite = self._finite(step, values)
        self.folder.append(step, finite)
        self.logger.log(step, finite)
        return finite

    def _costs(self) -> dict[str, float]:
        memory = peak_memory_gb()
        costs = ({} if memory is None else {"cost/peak_memory_gb": memory}) | self.costs
        if self.trainer is not None:
            costs |= {f"cost/{name}": getattr(self.trainer, name) for name in COSTS}
            costs |= {f"cost/policy_{name}": spent for name, spent in self.trainer.rehearsed.items()}
        return costs


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Of what has come to be not finite in here, it is said whose it is."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{name} has diverged: {error}") from error


def means_of(lines: list[dict[str, Any]]) -> dict[str, float]:
    """What the method tells of itself at every step, on average over the run: mean/lambda/value, ..."""
    logged: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith(DIAGNOSTICS):
                logged.setdefault(f"mean/{key}", []).append(value)
    return {key: mean(values) for key, values in logged.items()}
