"""From a checked configuration to the parts that it describes, in the one order that works, and one run of them.

Nothing below this module knows a configuration. Heavy libraries are imported by the functions that need them: what is
wrong with a configuration was said before.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import get_object

from unlearn_runner.errors import Interrupted
from unlearn_runner.rules import configuration, method_options
from unlearn_runner.spec import DataSpec

if TYPE_CHECKING:
    import torch

    from unlearn_runner.data.forget_retain import Dataset, ForgetRetain
    from unlearn_runner.drivers.driver import Driver
    from unlearn_runner.evaluation.evaluator import Evaluator
    from unlearn_runner.evaluation.judge import Judge, JudgeRecipe
    from unlearn_runner.hardware import Hardware
    from unlearn_runner.methods.method import Method
    from unlearn_runner.models.clip import Clip
    from unlearn_runner.models.model import GenerativeModel
    from unlearn_runner.training.checkpoint import Checkpoint
    from unlearn_runner.training.evaluation import EvaluationPlan, Look
    from unlearn_runner.training.loggers import Logger
    from unlearn_runner.training.trainer import Plan

Config = Mapping[str, Any]


# 1. One part


def make(node: Any, **given: Any) -> Any:
    """The part that a node of a resolved configuration describes: an object of its `_target_`, with the options of the
    node, made first where they are nodes themselves, and what is `given` besides; with `_partial_` a function that
    takes what is still missing.

    Unlike `hydra.utils.instantiate` it takes texts as they are: that resolves them once more, and so computes what a
    text refers to, be it a person's prompt. Raises InstantiationException from what the target raises.
    """
    if isinstance(node, (list, tuple)):
        return [make(part) for part in node]
    if not isinstance(node, Mapping):
        return node
    options = {key: make(part) for key, part in node.items() if key not in ("_target_", "_partial_")} | given
    if "_target_" not in node:
        return options
    target = get_object(node["_target_"])
    if node.get("_partial_"):
        return partial(target, **options)
    return _called(node["_target_"], target, **options)


def _called(name: str, target: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
    try:
        return target(*arguments, **options)
    except Exception as error:
        raise InstantiationException(f"Error in call to target '{name}': {error!r}") from error


def build_network(cfg: Config, spec: DataSpec, seed: int) -> "GenerativeModel":
    """The network of the group `model` for a dataset, with fresh weights drawn from `seed`."""
    return make(cfg["model"]["network"], image_shape=spec.image_shape, label_names=spec.label_names, seed=seed)


def build_method(
    cfg: Config, network: "GenerativeModel", spec: DataSpec, generator: "torch.Generator", clip: "Clip | None" = None
) -> "Method":
    """The method of the group `method`. Raises ConfigurationError unless there is what it requires."""
    from unlearn_runner.methods.method import Setting

    labels = spec.labels
    there = method_options.facts(
        network.is_diffusion, labels is not None, network.prompts is not None, clip is not None,
        cfg["trainer"]["init"],
    )  # fmt: skip
    configuration.require_of_methods(cfg, there)
    return _called(cfg["method"]["_target_"], make(cfg["method"]), Setting(network, generator, labels, clip))


# 2. All parts


@dataclass(frozen=True)
class Parts:
    """What a configuration describes, built and checked. No image is read yet, and no weight."""

    hardware: "Hardware"
    dataset: "Dataset"
    plan: "Plan"
    driver: "Driver"
    logger: "Logger | None"
    evaluation: "EvaluationPlan"
    judge: "JudgeRecipe"
    network: "GenerativeModel"
    clip: "Clip | None"
    method: "Method"
    cfg: Config

    def fresh_network(self, seed: int, spec: DataSpec | None = None) -> "GenerativeModel":
        """A network like the run's, for the run's dataset or another."""
        return self.hardware.prepare(build_network(self.cfg, spec or self.dataset.spec, seed))


def build_parts(cfg: Config) -> Parts:
    """The constructors check what the user gave; the network comes late, for importing it takes longest."""
    from unlearn_runner.distributed import is_first
    from unlearn_runner.evaluation.evaluator import require_enough_samples
    from unlearn_runner.models.one_step import reader_of
    from unlearn_runner.models.prompted import require_distinguished
    from unlearn_runner.training.trainer import planned
    from unlearn_runner.types import make_generator

    seed = cfg["seed"]
    hardware = make(cfg["hardware"])
    hardware.apply()
    dataset = make(cfg["dataset"])
    plan, driver = make(cfg["trainer"]), make(cfg["driver"])
    logger = make(cfg["logger"]) if is_first() else None
    evaluation, judge = make(cfg["evaluation"]), make(cfg["judge"])
    judge.require(dataset.spec)
    num_labels = None if dataset.spec.label_names is None else len(dataset.spec.label_names)
    for path, look in looks_of(evaluation).items():
        if look is not None:
            require_enough_samples(look.metrics, look.sampling, judge.num_features, num_labels, path)
    network = build_network(cfg, dataset.spec, seed)
    if plan.init == "base":  # before it is placed: on the device are then no weights that are to be halved
        network.freeze_for_unlearning()
    network = hardware.prepare(network)
    for source in evaluation.own_oracles:
        reader_of(network, source, "evaluation.oracle")
    if network.is_diffusion:
        configuration.require_steps_everywhere(cfg, network.num_train_timesteps)
    if network.prompts is not None:
        require_distinguished(network, dataset.spec.labels)
    clip = make(cfg["clip"]["network"])
    if clip is not None:
        hardware.place(clip)
    method = build_method(cfg, network, dataset.spec, make_generator(seed, "method", hardware.device), clip)
    return Parts(
        hardware, dataset, planned(plan, method), driver, logger, evaluation, judge, network, clip, method, cfg
    )  # fmt: skip


def drawn_by(network: "GenerativeModel", dataset: "Dataset", device: "torch.device") -> "ForgetRetain":
    """The images that the base draws of a dataset's prompts, drawn once for all runs."""
    from unlearn_runner.types import make_generator

    def draw(labels):
        generator = make_generator(dataset.seed, "base images", device)
        steps, batch = dataset.num_inference_steps, dataset.batch_size
        return network.sample(len(labels), labels.to(device), generator, steps, batch_size=batch)

    return dataset.load_from(draw, {"model": network.fingerprint(), "device": device.type})


# 3. A run


def unlearn(cfg: dict[str, Any], fresh_folder: Path) -> Path:
    """One run, in a folder of its own or in that of the run which it resumes; returns it."""
    from unlearn_runner.data.streams import BatchStream
    from unlearn_runner.distributed import is_first
    from unlearn_runner.evaluation.evaluator import require_references
    from unlearn_runner.models.model import require_usable
    from unlearn_runner.training.checkpoint import Checkpoints
    from unlearn_runner.training.pretraining import pretrained
    from unlearn_runner.training.progress import run_console
    from unlearn_runner.training.record import Record
    from unlearn_runner.training.recorder import RunRecorder
    from unlearn_runner.training.run_folder import open_run_folder
    from unlearn_runner.training.signals import Interrupts
    from unlearn_runner.training.trainer import Trainer

    console, cache_dir = run_console(quiet=not is_first()), Path(cfg["paths"]["cache"]).expanduser()

    # 1. Build every part, and find what is to be resumed.
    parts = build_parts(cfg)
    network, method, plan = parts.network, parts.method, parts.plan
    pretraining = make(cfg["model"]["pretraining"])
    total_steps = parts.driver.total_steps(method, plan)
    data, identity, checkpoint = what_to_resume(parts)
    for look in looks_of(parts.evaluation).values() if data is not None else ():
        if look is not None:  # before a base is trained; the evaluator asks again
            require_references(look.metrics, look.sampling, data)
    path, folder = open_run_folder(fresh_folder, checkpoint, cfg, identity)

    with (
        Interrupts() as interrupts,
        Record(
            path, folder, parts.logger, cfg, total_steps, plan.keep_checkpoints, console, interrupts
        ) as record,
    ):  # fmt: skip
        # 2. Get the base weights and the judge, or make them once.
        def trained(population: str, seed: int) -> Path:
            key = {name: cfg["model"][name] for name in ("network", "pretraining")} | parts.hardware.beyond_rounding
            if seed != pretraining.seed:  # as of a run whose base has this seed
                key["pretraining"] = key["pretraining"] | {"seed": seed}
            recipe, fresh = replace(pretraining, seed=seed), parts.fresh_network
            return pretrained(population, recipe, key, fresh, data, cache_dir, interrupts, console)

        weights = cfg["model"]["weights"]
        base = trained("all", pretraining.seed) if weights == "auto" else weights
        network.load(base)
        record.identity |= {"base": _digest_of(base), "base_folder": str(base)}
        require_usable(network, "the base", f"model.weights={weights}")
        for _ in own_oracles(parts):  # those that cannot be used are found now, and read again at the end
            continue
        if data is None:
            data = drawn_by(network, parts.dataset, parts.hardware.device)
        for note in data.notes:
            console.print(note, soft_wrap=True)
        record.inventory(data.inventory)
        judge = trained_judge_of(parts, data, cache_dir, console)

        # 3. Measure, unlearn, measure.
        evaluators = evaluators_of(parts, data, judge, cache_dir)
        recorder = RunRecorder(record, network, *evaluators, parts.evaluation.threshold, parts.evaluation.relearning)
        if plan.init == "scratch":
            network.load_state_dict(parts.fresh_network(cfg["seed"]).state_dict())
        trainer = Trainer(
            method,
            BatchStream(data, method.reads, plan.batch_size, cfg["seed"], parts.hardware.device, network.encode),
            plan,
            {"recorder": recorder.listener},
            Checkpoints(path / "checkpoints", plan.checkpoints_total_limit),
            interrupts,
            identity,
            resettable=total_steps > plan.max_steps,
        )
        try:
            train = parts.driver.prepare(trainer)
            if checkpoint is not None:
                trainer.resume(checkpoint._replace(identity=identity))  # `continued` has seen to it
            train()
            step = trainer.clock.step
            recorder.relearn(step, method.model)
            retrained = [] if pretraining is None else retrained_oracles(parts, pretraining.seed, trained)
            recorder.compare_with_oracles(step, chain(own_oracles(parts), retrained))
            record.report(step)
        except Interrupted:
            record.attempt(trainer.save)
            raise
        finally:
            record.spent(trainer.clock)
    return path


def own_oracles(parts: Parts) -> Iterator[tuple[dict[str, Any], "GenerativeModel"]]:
    """The models of the user's own that never saw the forget set, one after the other: each after the `folder` that it
    is from and the `digest` of its weights. Raises ConfigurationError if a weight is not finite.
    """
    from unlearn_runner.models.model import require_usable

    for source in parts.evaluation.own_oracles:
        oracle = _oracle_in(parts, source)
        require_usable(oracle, "the oracle", f"evaluation.oracle={source}")
        yield {"folder": source, "digest": _digest_of(source)}, oracle


def retrained_oracles(
    parts: Parts, base_seed: int, trained: Callable[[str, int], Path]
) -> Iterator[tuple[dict[str, Any], "GenerativeModel"]]:
    """The same of those that are `trained` here, each from the cache if it is there: after its `seed` and `digest`."""
    for seed in parts.evaluation.seeds_of_oracles(base_seed):
        folder = trained("retain", seed)
        yield {"seed": seed, "digest": _digest_of(folder)}, _oracle_in(parts, folder)


def _oracle_in(parts: Parts, source: str | Path) -> "GenerativeModel":
    from unlearn_runner.models.one_step import reader_of

    oracle = reader_of(parts.fresh_network(parts.cfg["seed"]), source, "evaluation.oracle")
    oracle.load(source, "evaluation.oracle")
    return oracle


def _digest_of(source: str | Path) -> str:
    from unlearn_runner.distributed import from_first
    from unlearn_runner.weights import weights_identity

    return from_first(lambda: weights_identity(source))


def what_to_resume(parts: Parts) -> tuple["ForgetRetain | None", dict[str, Any], "Checkpoint | None"]:
    """The images, unless the base is to draw them, the run's identity, and the checkpoint that it goes on from."""
    from unlearn_runner.distributed import from_first
    from unlearn_runner.training.run_folder import DATA, checkpoint_to_resume, continued, identity_of_run

    cfg, dataset = parts.cfg, parts.dataset
    identity = from_first(lambda: identity_of_run(cfg))
    outputs = Path(cfg["paths"]["outputs"])
    checkpoint = checkpoint_to_resume(cfg["resume_from_checkpoint"], outputs, identity, parts.driver.extendable)
    data = None if dataset.from_base else dataset.load()
    if data is not None:
        identity[DATA] = data.fingerprint
    return data, identity if checkpoint is None else continued(identity, checkpoint), checkpoint


def evaluators_of(
    parts: Parts, data: "ForgetRetain", judge: "Judge", cache_dir: Path
) -> tuple["Evaluator", "Evaluator", "Evaluator | None"]:
    """For the base and the end, for looks on the way, and for the look at the threshold, if there is one."""
    from unlearn_runner.evaluation.evaluator import Evaluator

    return tuple(
        look and Evaluator(data, judge, look.metrics, look.sampling, cache_dir, parts.clip)
        for look in looks_of(parts.evaluation).values()
    )


def looks_of(plan: "EvaluationPlan") -> dict[str, "EvaluationPlan | Look | None"]:
    """What is measured, by where it is in the configuration."""
    return {
        "evaluation": plan,
        "evaluation.probe": plan.probe,
        "evaluation.at_threshold": plan.at_threshold,
    }


def trained_judge_of(parts: Parts, data: "ForgetRetain", cache_dir: Path, console: Any) -> "Judge":
    """The run's judge, and before it CLIP where that is trained here; each from the cache if it is there."""
    from unlearn_runner.evaluation.novelty import abstaining
    from unlearn_runner.training.clip import trained_clip
    from unlearn_runner.training.progress import ProgressBar

    clip_training = make(parts.cfg["clip"]["training"])
    if clip_training is not None:
        with closing(ProgressBar("training CLIP", clip_training.max_steps, console)) as progress:
            network = parts.cfg["clip"]["network"]
            parts.clip.load(trained_clip(parts.clip, clip_training, network, cache_dir, progress.update))
    with closing(ProgressBar("training the judge", parts.judge.max_steps, console)) as progress:
        judge = parts.judge.judge(data, cache_dir, parts.hardware.device, progress.update)
    return abstaining(judge, data, parts.evaluation.novelty, cache_dir)
