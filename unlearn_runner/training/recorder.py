"""What a run leaves: lines, pictures, scores, the model and the summary, in its folder and its dashboard."""

import time
from types import TracebackType
from typing import Any, final

from rich.console import Console

from unlearn_runner.cache import atomic
from unlearn_runner.errors import Interrupted, NonFiniteError
from unlearn_runner.evaluation.evaluator import Evaluation, Evaluator, gap
from unlearn_runner.models.model import DiffusionModel
from unlearn_runner.training.loggers import Logger
from unlearn_runner.training.progress import ProgressBar, comparison_table
from unlearn_runner.training.provenance import environment, peak_memory_gb
from unlearn_runner.training.run_folder import RunFolder
from unlearn_runner.training.trainer import Recorder, Trainer

HEADLINES = (
    "forget_rate",
    "restored_rate",
    "retain_accuracy",
    "fid_retain",
    "kid_retain",
    "is_retain",
    "ssim_retain",
)
STATUS = {None: "finished", NonFiniteError: "diverged", Interrupted: "interrupted", KeyboardInterrupt: "interrupted"}


@final
class ProgressRecorder(Recorder):
    """For training on the side, such as that of a base: a progress bar, and nothing left."""

    def __init__(self, progress: ProgressBar):
        self.progress = progress

    def log(self, step: int, values: dict[str, float]) -> None:
        self.progress.update(step, values)

    def evaluate(self, model: DiffusionModel, step: int) -> None:
        pass

    def finish(self, model: DiffusionModel, step: int) -> None:
        self.progress.close()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


@final
class RunRecorder(Recorder):
    """The record of one run. As a context it opens the dashboard and, however the run ends, closes all with
    its status: finished, diverged (a non-finite loss), interrupted (a signal) or failed (anything else).
    """

    def __init__(self, folder: RunFolder, logger: Logger, config: dict[str, Any], max_steps: int, console: Console):
        self.folder = folder
        self.logger = logger
        self.config = config
        self.console = console
        self.started = time.perf_counter()
        self.progress = ProgressBar("unlearning", max_steps, console)
        self.evaluator: Evaluator | None = None  # set by `watch`
        self.probe: Evaluator | None = None
        self.before: Evaluation | None = None
        self.scores: dict[str, float] = {}
        self.provenance: dict[str, Any] = {}
        self.trainer: Trainer | None = None

    def __enter__(self) -> "RunRecorder":
        self.folder.write_summary("running", {})
        try:
            self.logger.start(self.folder.path, self.config)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.progress.close()
        status = STATUS.get(kind, "failed")
        if kind is Interrupted and self.trainer is not None:
            self.trainer.save()
        if error is not None and self.trainer is not None and (kept := self.trainer.checkpoints.all()):
            self.console.print(f"{status}; go on with resume_from_checkpoint={kept[-1]}", soft_wrap=True)
        more = {} if error is None else {"error": f"{type(error).__name__}: {error}"}
        metrics = self.scores | self._costs()
        self.folder.write_summary(
            status, metrics, **more, provenance={"environment": environment(), "evaluation": self.provenance}
        )
        self.folder.close()
        self.logger.finish(metrics, failed=status != "finished")

    def watch(self, base: DiffusionModel, evaluator: Evaluator, probe: Evaluator) -> None:
        """Score the base model, and from now on score and compare with it."""
        self.evaluator, self.probe = evaluator, probe
        self.provenance = evaluator.provenance()
        self.console.print("measuring the base model")
        self.before = evaluator(base)
        self._record(0, "base", self.before, "before")

    def compare_with_oracle(self, model: DiffusionModel) -> None:
        """Score the model that never saw the forget set, and the distance of the unlearned model from it."""
        oracle = self.evaluator(model, self.before.judged)
        step = self.trainer.total_steps
        self._record(step, "oracle", oracle, "oracle")
        after = {key.removeprefix("eval/"): value for key, value in self.scores.items() if key.startswith("eval/")}
        self._write(step, {f"oracle_gap/{key}": value for key, value in gap(after, oracle.scores).items()})

    def log(self, step: int, values: dict[str, float]) -> None:
        self.folder.append(step, values)
        self.logger.log(step, values)
        self.progress.update(step, values)

    def evaluate(self, model: DiffusionModel, step: int) -> None:
        evaluation = self.probe(model)
        self.progress.forget_rate = evaluation.scores["forget_rate"]
        self._record(step, "eval", evaluation, f"step_{step:06d}")

    def finish(self, model: DiffusionModel, step: int) -> None:
        self.progress.close()
        with atomic(self.folder.model) as temporary:  # before it is scored: a failing metric loses nothing
            model.save(temporary)
        self.console.print("measuring the unlearned model")
        self._record(step, "eval", self.evaluator(model, self.before.judged), "after")

    def report(self) -> None:
        """The short table at the end: metric, before, after, change."""
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

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.folder.position(), "forget_rate": self.progress.forget_rate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.folder.truncate(state_dict["position"])
        self.progress.forget_rate = state_dict["forget_rate"]

    def _record(self, step: int, prefix: str, evaluation: Evaluation, picture: str) -> None:
        self._write(step, {f"{prefix}/{key}": value for key, value in evaluation.scores.items()})
        path = self.folder.save_grid(picture, evaluation.grid, evaluation.grid_columns)
        self.logger.image(step, f"samples/{prefix}", path)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.scores |= values
        self.folder.append(step, values)
        self.logger.log(step, values)

    def _costs(self) -> dict[str, float]:
        costs = {"cost/peak_memory_gb": peak_memory_gb()}
        if self.trainer is not None:
            for name in ("seconds", "images", "network_evaluations"):
                costs[f"cost/{name}"] = getattr(self.trainer, name)
        return costs
