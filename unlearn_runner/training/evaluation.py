"""What a run measures of its models, when, and with which samples: the group `evaluation` of the configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from unlearn_runner.evaluation.evaluator import Sampling
from unlearn_runner.evaluation.metrics import Metric
from unlearn_runner.evaluation.novelty import NoveltyRecipe
from unlearn_runner.options import (
    BatchSize,
    Bootstrap,
    Features,
    NumInferenceSteps,
    NumSamples,
    PositiveInt,
    References,
    Sampler,
    Seed,
    Seeds,
    UnitInterval,
)
from unlearn_runner.rules import evaluation_options
from unlearn_runner.training.relearning import Relearning


@final
@dataclass(frozen=True)
class Look:
    """Metrics, of samples drawn for them alone."""

    metrics: Mapping[str, Metric | None]
    sampling: Sampling


@final
@dataclass(frozen=True)
class EvaluationPlan:
    """Everything that is measured in one run.

    The numbers of the first lines are for a person to set: `sampling` and the metrics take theirs from them, and the
    trainer takes `every`.
    """

    num_samples: NumSamples
    sampler: Sampler
    num_inference_steps: NumInferenceSteps
    batch_size: BatchSize
    seed: Seed
    bootstrap: Bootstrap | None
    oracle: bool | str | Sequence[str]  # also score the model that never saw the forget set
    every: PositiveInt | None  # steps between two looks; None: none
    features: Features  # for the judge
    sampling: Sampling
    metrics: Mapping[str, Metric | None]  # of base, unlearned model and oracle
    relearning: Relearning | None
    threshold: UnitInterval | None  # the first look with at most this forget_rate is recorded
    at_threshold: Look | None  # what is measured of the model then, besides
    probe: Look  # the looks on the way
    oracle_seeds: Seeds | None = None  # of several such models; None, as in old run folders: one, of the base's seed
    novelty: NoveltyRecipe | None = None  # which pictures are nothing; None, as in old run folders: it never abstains
    references: References = "training"  # real images that samples are compared with; run folders had no others

    def __post_init__(self) -> None:
        evaluation_options.whose_oracles(self.oracle, self.oracle_seeds)

    @property
    def own_oracles(self) -> Sequence[str]:
        """Folders or hub ids of models that never saw the forget set and that are not to be trained here."""
        return evaluation_options.own_oracles(self.oracle)

    def seeds_of_oracles(self, base: int) -> Sequence[int]:
        """Of the models to train without the forget set; `base` is the seed that the base was trained with."""
        return self.oracle_seeds or ([base] if self.oracle is True else [])
