"""Options of metrics, judges and oracles that cannot work together: one sentence each.

As method_options; `check_evaluation` and `check_objective` are of a whole configuration.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from unlearn_runner import catalogue
from unlearn_runner.constructors import class_name, constant_of
from unlearn_runner.errors import ConfigurationError, near
from unlearn_runner.spec import DataSpec, require_templates


def size_of_subsets(subset_size: int, min_samples: int) -> None:
    if subset_size > min_samples:
        raise ConfigurationError(
            f"evaluation.metrics.kid.subset_size must be at most its min_samples ({min_samples}), got {subset_size}."
        )


def number_of_balls(neighbours: int, max_images: int) -> None:
    if neighbours >= max_images:
        raise ConfigurationError(
            f"evaluation.novelty.neighbours must be below its max_images ({max_images}), got {neighbours}."
        )


def number_of_neighbours(neighbours: int, min_samples: int) -> None:
    if neighbours >= min_samples:
        raise ConfigurationError(
            f"evaluation.metrics.prc.min_samples must be above its neighbours ({neighbours}), got {min_samples}."
        )


def own_oracles(oracle: bool | str | Sequence[str]) -> Sequence[str]:
    """The folders or hub ids that evaluation.oracle names; none where it is true or false."""
    return [] if isinstance(oracle, bool) else [oracle] if isinstance(oracle, str) else oracle


def whose_oracles(oracle: bool | str | Sequence[str], oracle_seeds: Sequence[int] | None) -> None:
    if not isinstance(oracle, bool) and not all(own_oracles(oracle) or [""]):
        raise ConfigurationError(
            f"evaluation.oracle must be true, false, or one or more folders of models, got {oracle!r}."
        )
    if oracle_seeds is not None and own_oracles(oracle):
        raise ConfigurationError(
            f"evaluation.oracle={', '.join(own_oracles(oracle))} is of your own, and evaluation.oracle_seeds="
            f"{list(oracle_seeds)} would have others trained; give one of the two."
        )
    if oracle_seeds is not None and len(set(oracle_seeds)) < len(oracle_seeds):
        raise ConfigurationError(
            f"evaluation.oracle_seeds must be different seeds, got {list(oracle_seeds)}: a seed stands for one model, "
            "which would be counted twice."
        )


def a_clip(option: str, there: bool) -> None:
    if not there:
        raise ConfigurationError(
            f"{option} asks CLIP; say which with clip=tiny or clip=vit_b_32, or leave it out with {option}=null."
        )


def check_evaluation(cfg: Mapping[str, Any], spec: DataSpec | None) -> None:
    labels = None if spec is None else spec.label_names
    evaluation, clip, features = cfg["evaluation"], cfg["clip"]["network"], features_of(cfg["judge"])
    extractor = cfg["judge"].get("extractor")
    of_judge = "classifier" if extractor is None else extractor.get("name", evaluation["features"])
    if of_judge != evaluation["features"]:
        raise ConfigurationError(
            f"evaluation.features={evaluation['features']} is not what the judge has, which is {of_judge} "
            f"(judge.extractor{'=null' if extractor is None else '.name'}); set evaluation.features alone."
        )
    looks = {
        "evaluation": evaluation,
        "evaluation.probe": evaluation["probe"],
        "evaluation.at_threshold": evaluation["at_threshold"],
    }
    for path, look in looks.items():
        metrics = {} if look is None else {name: node for name, node in look["metrics"].items() if node is not None}
        for name, node in metrics.items():
            if "clip" in (constant_of(node["_target_"], "needs") or ()):
                a_clip(f"{path}.metrics.{name}", clip is not None)
            if class_name(node) == "Paraphrases" and not node["templates"]:
                raise ConfigurationError(
                    f"{path}.metrics.{name} has no templates: give dataset.paraphrases, or leave it out with "
                    f"{path}.metrics.{name}=null."
                )
            if class_name(node) in ("Paraphrases", "Robustness") and node["templates"]:
                require_templates(f"{path}.metrics.{name}.templates", node["templates"])
            if class_name(node) == "Neighbours" and spec is not None:
                near_conditions(node["near"], spec)
            least, why = least_samples(class_name(node), node, features)
            classes = len(labels) if node.get("per_class") and labels is not None else None
            enough_samples(f"{path}.metrics.{name}", least, why, look["sampling"]["num_samples"], classes)
        needed = {"evaluation.probe": "evaluation.every", "evaluation": "evaluation.relearning"}.get(path)
        asked = path == "evaluation.probe" or (path == "evaluation" and evaluation["relearning"] is not None)
        if asked and not any("forget_rate" in catalogue.made_by(class_name(node)) for node in metrics.values()):
            raise ConfigurationError(f"{path}.metrics.rates must not be null: {needed} asks for its forget_rate.")


def features_of(judge: Mapping[str, Any]) -> int:
    """How many features a judge has; 0 of one that is only known when it is built."""
    extractor = (judge.get("extractor") or {}).get("name", "classifier")
    own = (judge.get("classifier") or {}).get("num_features", 0)
    return {"classifier": own, "inception": 2048, "efficientnet": 1280}.get(extractor, 0)


def measured(node: Mapping[str, Any]) -> bool:
    """Whether a metric measures anything in the features that there are."""
    return class_name(node) != "CMMD" or node.get("features") in (None, "open_clip")


def samples_of(metric: str) -> str:
    """The option that says how many samples a metric has, which is at this path."""
    look = metric.rpartition(".metrics.")[0]
    return "evaluation.num_samples" if look == "evaluation" else f"{look}.sampling.num_samples"


def least_samples(metric: str, node: Mapping[str, Any], features: int) -> tuple[int, str]:
    """How many samples a metric splits, or compares in so many features, and why so many."""
    if metric == "FID":
        return max(node["min_samples"], features + 1), f"its min_samples, and more than {features} features"
    if metric in ("KID", "PrecisionRecall") or (metric == "CMMD" and measured(node)):
        return node["min_samples"], "its min_samples"
    if metric == "IS":
        return node["splits"], "its splits"
    return 0, ""


def near_conditions(wanted: Sequence[str | int] | None, spec: DataSpec) -> None:
    """Whether each is the name of a condition that is kept."""
    labels = spec.labels
    kept = () if labels is None else tuple(labels.names[label] for label in labels.retain)
    for name in wanted or ():
        if str(name) not in kept:
            raise ConfigurationError(
                f"evaluation.metrics.neighbours.near names '{name}', which is no label to keep"
                f"{near(str(name), kept) or (': ' + ', '.join(kept[:20]) if kept else '')}."
            )


def enough_samples(path: str, least: int, why: str, count: int, num_labels: int | None) -> None:
    """Whether each group has as many samples as the metric at this path needs: the `count` under the retained labels
    and, if `num_labels` is given, those of each of the retained labels, which are all but one.
    """
    groups = {"": count}
    if num_labels is not None and num_labels > 1:
        groups[" for each class"] = count // (num_labels - 1)
    for which, found in groups.items():
        if found < least:
            raise ConfigurationError(
                f"{path} needs at least {least} samples{which} ({why}); {samples_of(path)}={count} gives {found}: "
                f"draw more, or leave it out with {path}{'.per_class=false' if which else '=null'}."
            )


def check_objective(cfg: Mapping[str, Any]) -> None:
    """A score that a sweeper is to look at and that no metric of this run makes."""
    wanted = cfg["objective"]
    if wanted is None:
        return
    evaluation = cfg["evaluation"]

    def of(look: Mapping[str, Any] | None) -> list[str]:
        unmet = {"novelty"} if evaluation["novelty"] is None else set()
        nodes = [
            node
            for node in ({} if look is None else look["metrics"]).values()
            if node is not None and measured(node) and unmet.isdisjoint(constant_of(node["_target_"], "needs") or ())
        ]
        return [key for node in nodes for key in catalogue.made_by(class_name(node)) or ("*",)]

    scores = of(evaluation)
    relearnt = catalogue.made_by("Relearning") if evaluation["relearning"] is not None else ()
    deleted = catalogue.made_by("RunRecorder") if evaluation["every"] else ()
    known = [f"base/{key}" for key in scores]
    known += [f"eval/{key}" for key in (*scores, *relearnt, *deleted)]
    own, seeds = own_oracles(evaluation["oracle"]), evaluation["oracle_seeds"] or ()
    oracles = len(own) or len(seeds) or evaluation["oracle"]
    compared = [*(("oracle", "oracle_gap") if oracles else ()), *(("oracle_std", "gap_z") if oracles > 1 else ())]
    known += [f"{prefix}/{key}" for prefix in compared for key in (*scores, *relearnt)]
    if evaluation["threshold"] is not None and evaluation["every"]:
        known += [
            f"reached/{key}" for key in ("steps", "seconds", "network_evaluations", *of(evaluation["at_threshold"]))
        ]
    known += ["cost/*", "mean/*"]
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if not any(fnmatchcase(name, pattern) for pattern in known):
            plain = sorted(key for key in known if key.startswith("eval/") and "*" not in key)
            raise ConfigurationError(f"objective: no metric of this run makes '{name}'; there are {', '.join(plain)}.")


OF_CONSTRUCTORS: dict[str, tuple[Callable[..., None], ...]] = {
    "training.evaluation.EvaluationPlan": (whose_oracles,),
    "evaluation.metrics.KID": (size_of_subsets,),
    "evaluation.novelty.NoveltyRecipe": (number_of_balls,),
    "evaluation.metrics.PrecisionRecall": (number_of_neighbours,),
}
