"""What of a run is scored, and when, and all of it into the run's record."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

from unlearn_runner.cache import cached_scores
from unlearn_runner.catalogue import USUAL, hides_rubble, is_rubble
from unlearn_runner.errors import ConfigurationError, NonFiniteError
from unlearn_runner.evaluation.evaluator import Evaluator
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.spec import BY_NAME
from unlearn_runner.training.clock import Clock, Listener
from unlearn_runner.training.record import Oracle, Record
from unlearn_runner.training.relearning import RELEARNING_VERSION, Relearning


@final
class RunRecorder:
    """Scores the base model when it is made; then listens to a trainer, scores its model and compares it with the base.

    Args:
        base: the model before unlearning.
        evaluator: scores the base, the unlearned model and the oracles.
        probe: takes the looks on the way.
        at_threshold: scores the model once more when a look finds a forget_rate of at most `threshold` for the first
            time; None: it does not.
        relearning: how a model is taught again what it was to forget; None: it is not.
    """

    def __init__(
        self,
        record: Record,
        base: GenerativeModel,
        evaluator: Evaluator,
        probe: Evaluator,
        at_threshold: Evaluator | None = None,
        threshold: float | None = None,
        relearning: Relearning | None = None,
    ):
        self.record, self.say = record, record.console.print
        self.evaluator, self.probe, self.at_threshold = evaluator, probe, at_threshold
        self.threshold, self.relearning = threshold, relearning
        self.deletion_steps: dict[str, int] = {}
        self.reached: dict[str, float] = {}  # empty until a look finds at most `threshold`
        data = {"name": evaluator.spec.name, "fingerprint": evaluator.data.fingerprint}
        rows = {"forget_rows": evaluator.forget_rows, "row_titles": evaluator.row_titles}
        record.provenance |= {"data": data, **rows, **evaluator.provenance(base)}
        for sentence in (*in_context(evaluator.judge.doubts(), evaluator.spec.content_names), *evaluator.left_out()):
            self.say(sentence, soft_wrap=True)
        self.say("measuring the base model")
        try:
            self.before = evaluator.once(base)
        except NonFiniteError as error:
            raise ConfigurationError(
                f"model.weights={record.config['model']['weights']}: the base cannot be unlearned, for of what it "
                f"draws {error}; mend its weights or its noise schedule, or give others."
            ) from error
        record.evaluation(0, "base", self.before, "before")
        record.score(0, {f"floor/{key}": value for key, value in evaluator.floor(base).items()})

    @property
    def listener(self) -> Listener:
        return Listener(logged=self.logged, noted=self.noted, evaluate=self.evaluate, finish=self.finish, state=self)

    def logged(self, clock: Clock, values: dict[str, float]) -> None:
        self.record.line(clock.step, values)
        self.record.progress.update(clock.step, values)

    def noted(self, clock: Clock, values: dict[str, float]) -> None:
        self.record.line(clock.step, values)

    def evaluate(self, clock: Clock, model: GenerativeModel) -> None:
        """A look on the way."""
        with _named(f"the model after step {clock.step}"):
            found = self.probe(model)
        forget_rate = self.record.progress.forget_rate = found.scores["forget_rate"]
        self.record.evaluation(clock.step, "eval", found, f"step_{clock.step:06d}")
        if forget_rate > 0:
            self.deletion_steps.pop("lasting_deletion_steps", None)
        elif self.before.scores["forget_rate"] > 0:  # else there was nothing to delete that a look could see
            taken = clock.run_step
            self.deletion_steps = {"deletion_steps": taken, "lasting_deletion_steps": taken} | self.deletion_steps
        if self.threshold is not None and not self.reached and forget_rate <= self.threshold:
            self._reach(clock, model)

    def _reach(self, clock: Clock, model: GenerativeModel) -> None:
        """The first look that finds little enough to forget: what it took, and what is left of the rest."""
        taken = {"steps": clock.run_step, "seconds": clock.seconds, "network_evaluations": clock.network_evaluations}
        reached = {name: float(value) for name, value in taken.items()}
        if self.at_threshold is not None:
            found = self.at_threshold(model, self.before.judged)
            reached |= found.scores | dict.fromkeys(found.not_finite, math.nan)
        self.reached = self.record.score(clock.step, {f"reached/{key}": value for key, value in reached.items()})

    def finish(self, clock: Clock, model: GenerativeModel) -> None:
        record = self.record
        record.progress.close()
        record.model(model)  # before it is scored: a failing metric loses nothing
        for sentence in self.evaluator.left_out_of(model):
            self.say(sentence, soft_wrap=True)
        self.say("measuring the unlearned model")
        with _named("the unlearned model"):
            after = self.evaluator(model, self.before.judged)
        record.evaluation(clock.step, "eval", after, "after")
        if (sentence := rubble_in(after.scores, self.before.scores)) is not None:
            self.say(sentence, soft_wrap=True)
        record.score(clock.step, {f"eval/{key}": float(value) for key, value in self.deletion_steps.items()})
        record.scores |= self.reached
        record.averages(clock.step, since=clock.step - clock.run_step)  # not of rehearsals
        record.costs["cost/sampling_seconds"] = after.seconds["sampling"]
        record.costs["cost/network_evaluations_per_sample"] = after.evaluations_per_sample
        record.costs["cost/evaluation_seconds"] = sum(after.seconds.values())
        record.provenance["seconds"] = after.seconds

    def relearn(self, step: int, model: GenerativeModel) -> None:
        """Measure how fast the unlearned model learns again what it was to forget, if that is asked for."""
        started = time.perf_counter()
        if scores := self._relearnt("eval", model):
            self.record.score(step, {f"eval/{key}": value for key, value in scores.items()})
            self.record.costs["cost/relearning_seconds"] = time.perf_counter() - started

    def _relearnt(self, name: str, model: GenerativeModel) -> dict[str, float]:
        """The scores of relearning, by their names without a prefix; NaN where it has diverged."""
        if self.relearning is None:
            return {}
        if not model.has_training_loss:
            self.say("relearning is left out: this model has no loss of its own that it could learn by.")
            return {}
        self.say(f"relearning ({name})")

        def forget_rate_of(model: GenerativeModel) -> float:
            return self.probe(model).scores["forget_rate"]

        try:
            return self.relearning(model, self.evaluator.data, forget_rate_of, self.record.scores["base/forget_rate"])
        except NonFiniteError:  # it is relearning that diverged
            return {"relearn_steps": math.nan}

    def _relearnt_once(self, name: str, model: GenerativeModel) -> dict[str, float]:
        """The same, kept in the cache: for oracles, which many runs with the same base share."""
        if self.relearning is None or not model.has_training_loss:
            return self._relearnt(name, model)
        key = {
            **self.probe.key(model),
            "relearning": self.record.config["evaluation"]["relearning"],
            "relearning_version": RELEARNING_VERSION,
            "base_rate": self.record.scores["base/forget_rate"],
        }
        return cached_scores(self.probe.cache_dir, "relearnings", key, lambda: self._relearnt(name, model))

    def compare_with_oracles(self, step: int, oracles: Iterable[tuple[dict[str, Any], GenerativeModel]]) -> None:
        """Score the models that never saw the forget set, each of which comes after where it is from: its `seed`, or
        the `folder` of one of the user's own.
        """
        found = []
        for origin, model in oracles:
            name = "the oracle " + (f"of seed {origin['seed']}" if "seed" in origin else f"in {origin['folder']}")
            self.say(f"measuring {name}", soft_wrap=True)
            with _named(name):
                scored = self.evaluator.once(model, self.before.judged)
            self.record.picture(step, scored, f"oracle_{len(found) + 1}" if found else "oracle")
            scores = scored.scores | dict.fromkeys(scored.not_finite, math.nan) | self._relearnt_once(name, model)
            found.append(Oracle(origin, scores, scored.intervals))
        self.record.oracles(step, found)

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self.record.position(),
            "forget_rate": self.record.progress.forget_rate,
            "not_finite": list(self.record.not_finite),
            "deletion_steps": dict(self.deletion_steps),
            "reached": dict(self.reached),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.record.truncate(state_dict["position"])
        self.record.progress.forget_rate = state_dict["forget_rate"]
        self.record.not_finite = dict.fromkeys(state_dict["not_finite"])
        self.deletion_steps, self.reached = state_dict["deletion_steps"], state_dict["reached"]


def in_context(doubts: list[str], contents: tuple[str, ...]) -> list[str]:
    """A judge's doubts; one sentence where they are no fault of its: no judge distinguishes images that are to be
    forgotten by name from others like them.
    """
    if doubts and contents == BY_NAME:
        return [
            "The judge cannot tell the images to forget from the others, which are of the same kind: copy_rate, "
            "mia_auc and nll_forget (evaluation=instances) say whether they are forgotten, not forget_rate."
        ]
    return doubts


def rubble_in(scores: dict[str, float], base: dict[str, float]) -> str | None:
    """A sentence where much of what is drawn instead of the forgotten content is like no real image: more than the base
    draws anyhow; and where the base draws so much of it that this cannot be known.
    """
    nothing, usual = scores.get("nothing_rate", 0.0), next((base[key] for key in USUAL if key in base), 0.0)
    if nothing and hides_rubble(usual):
        return (
            f"WARNING: {usual:.0%} of what the base draws is like no real image, so it cannot be known whether the "
            "unlearned model draws rubble; look at samples/after.png."
        )
    if not is_rubble(nothing, usual):
        return None
    return (
        f"WARNING: {nothing:.0%} of the samples under the forget condition are like no real image of any content "
        "(nothing_rate): this is rubble rather than forgetting; look at samples/after.png."
    )


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Of what has come to be not finite in here, it is said whose it is."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{name} has diverged: {error}") from error
