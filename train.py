"""One command: compose a configuration, make a model forget, measure it. See README.md."""

from contextlib import closing, suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from unlearn_runner.assembly import make
from unlearn_runner.cli import configuration, failure_on_record, one_sentence


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | tuple[float, ...] | None:
    """Returns the scores that `objective` names, for a sweeper that looks for the best."""
    fresh_folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        with failure_on_record():
            return run(configuration(cfg), fresh_folder)
    finally:
        with suppress(OSError):  # Hydra made it and the two around it; a mistake or a resumed run leaves them empty
            for folder in (fresh_folder, *fresh_folder.parents[:2]):
                folder.rmdir()


def run(cfg: dict, fresh_folder: Path) -> float | tuple[float, ...] | None:
    """`unlearn`, unless that is to be skipped, in this process, in those that torchrun has started together, or in as
    many new ones as asked for.
    """
    from unlearn_runner.distributed import joined, launch, started_outside
    from unlearn_runner.training.run_folder import finished, objectives

    processes = make(cfg["hardware"]).processes
    places = (Path(cfg["paths"]["outputs"]), fresh_folder.parent)
    folder = finished(places, cfg) if cfg.get("skip_finished") else None
    if folder is not None:
        print(f"skipped, for it is finished: {folder}")
    elif processes > 1 and started_outside() is None:
        folder = launch(__file__, "unlearn", (cfg, fresh_folder), processes)
    else:
        with joined():
            folder = unlearn(cfg, fresh_folder)
    return objectives(folder, cfg.get("objective"))


def unlearn(cfg: dict, fresh_folder: Path) -> Path:
    """One run, in a folder of its own or in that of the run which it resumes; returns it."""
    # Heavy libraries only now: what is wrong on the command line was said before.
    from unlearn_runner.data.streams import BatchStream
    from unlearn_runner.distributed import from_first, is_first
    from unlearn_runner.errors import folder_or_name
    from unlearn_runner.evaluation.evaluator import Evaluator, require_enough_samples
    from unlearn_runner.models.model import require_usable
    from unlearn_runner.models.stable_diffusion import require_told_apart
    from unlearn_runner.training.checkpoint import Checkpoints
    from unlearn_runner.training.clip import trained_clip
    from unlearn_runner.training.loggers import NoLogger
    from unlearn_runner.training.pretraining import pretrained
    from unlearn_runner.training.progress import ProgressBar, run_console
    from unlearn_runner.training.recorder import RunRecorder
    from unlearn_runner.training.run_folder import (
        DATA,
        checkpoint_to_resume,
        continued,
        identity_of_run,
        open_run_folder,
    )
    from unlearn_runner.training.signals import Interrupts
    from unlearn_runner.training.trainer import Trainer
    from unlearn_runner.types import make_generator

    console, seed = run_console(quiet=not is_first()), cfg["seed"]
    cache_dir = Path(cfg["paths"]["cache"]).expanduser()

    # 1. Build every part. The constructors check what the user gave; no image and no weight is read yet.
    hardware = make(cfg["hardware"])
    hardware.apply()
    dataset = make(cfg["dataset"])

    def build_network(seed: int, spec=dataset.spec):
        return hardware.prepare(build_model(cfg["model"]["network"], spec, seed))

    # the network late: importing it takes longest, and what is wrong elsewhere shall be said before
    plan, driver = make(cfg["trainer"]), make(cfg["driver"])
    logger = make(cfg["logger"]) if is_first() else NoLogger()
    evaluation, judge_recipe = make(cfg["evaluation"]), make(cfg["judge"])
    num_labels = None if dataset.spec.label_names is None else len(dataset.spec.label_names)
    require_enough_samples(evaluation.metrics, evaluation.sampling, judge_recipe.num_features, num_labels)
    network = build_network(seed)
    if network.prompts is not None:
        require_told_apart(network, dataset.spec.labels)
    pretraining = make(cfg["model"]["pretraining"])
    if plan.init == "base":
        network.freeze_for_unlearning()
    clip, clip_training = make(cfg["clip"]["network"]), make(cfg["clip"]["training"])
    if clip is not None:
        hardware.place(clip)
    method = build_method(cfg["method"], network, dataset.spec, make_generator(seed, "method", hardware.device), clip)
    total_steps = driver.total_steps(method, plan)
    identity = from_first(lambda: identity_of_run(cfg))
    outputs, extendable = Path(cfg["paths"]["outputs"]), driver.extendable
    checkpoint = checkpoint_to_resume(cfg["resume_from_checkpoint"], outputs, identity, extendable)
    data = None if dataset.from_base else dataset.load()
    if data is not None:
        identity[DATA] = data.fingerprint
    if checkpoint is not None:
        identity = continued(identity, checkpoint)
    folder = open_run_folder(fresh_folder, checkpoint, cfg, identity)

    with Interrupts() as interrupts, RunRecorder(folder, logger, cfg, total_steps, console, interrupts) as recorder:
        # 2. Get the judge and the base weights, or make them once.
        def weights_of(population: str) -> str | Path:
            if population == "all" and cfg["model"]["weights"] != "auto":
                return folder_or_name(cfg["model"]["weights"], "model.weights")
            key = {name: cfg["model"][name] for name in ("network", "pretraining")} | hardware.beyond_rounding
            return pretrained(population, pretraining, key, build_network, data, cache_dir, interrupts, console)

        network.load(weights_of("all"))
        require_usable(network, cfg["model"]["weights"])
        if data is None:
            data = drawn_by(network, dataset, hardware.device)
        for note in data.notes:
            console.print(note, soft_wrap=True)
        if clip_training is not None:
            with closing(ProgressBar("training CLIP", clip_training.max_steps, console)) as progress:
                clip.load(trained_clip(clip, clip_training, cfg["clip"]["network"], cache_dir, progress.update))
        with closing(ProgressBar("training the classifier", judge_recipe.max_steps, console)) as progress:
            judge = judge_recipe.judge(data, cache_dir, hardware.device, progress.update)

        # 3. Measure, unlearn, measure.
        recorder.watch(
            network,
            Evaluator(data, judge, evaluation.metrics, evaluation.sampling, cache_dir, clip),
            *(
                look and Evaluator(data, judge, look.metrics, look.sampling, cache_dir, clip)
                for look in (evaluation.probe, evaluation.at_threshold)
            ),
            evaluation.threshold,
        )
        if plan.init == "scratch":
            network.load_state_dict(build_network(seed).state_dict())
        trainer = Trainer(
            method,
            BatchStream(data, method.reads, plan.batch_size, seed, hardware.device, network.encode),
            plan,
            recorder,
            Checkpoints(folder.checkpoints, plan.checkpoints_total_limit),
            interrupts,
            identity,
            resettable=total_steps > plan.max_steps,
        )
        recorder.trainer = trainer
        driver.prepare(trainer)
        if checkpoint is not None:
            trainer.resume(checkpoint._replace(identity=identity))  # `continued` has seen to it
        driver.run(trainer)
        if relearning := evaluation.relearning:
            recorder.relearn("eval", method.model, relearning)
        if evaluation.oracle:
            oracle = build_network(seed)
            oracle.load(weights_of("retain"))
            recorder.compare_with_oracle(oracle)
            if relearning:
                recorder.relearn("oracle", oracle, relearning)
        recorder.report()
    return folder.path


def build_model(node, spec, seed):
    """The network of a configuration for a dataset; one that draws under prompts has a key for the dataset's."""
    names = spec.label_names
    prompts = {"prompts": names} if "prompts" in node else {}
    num_labels = None if names is None else len(names)
    return make(node, image_shape=spec.image_shape, num_labels=num_labels, seed=seed, **prompts)


def drawn_by(network, dataset, device):
    """The images that the base draws of a dataset's prompts, drawn once for all runs."""
    from unlearn_runner.types import make_generator

    def draw(labels):
        generator = make_generator(dataset.seed, "base images", device)
        steps, batch = dataset.num_inference_steps, dataset.batch_size
        return network.sample(len(labels), labels.to(device), generator, steps, batch_size=batch)

    return dataset.load_from(draw, {"model": network.fingerprint(), "device": device.type})


def build_method(node, network, spec, generator, clip=None):
    """The method of a configuration; one that draws labels or asks CLIP has a key for the dataset's and the group's."""
    given = {name: part for name, part in (("labels", spec.labels), ("clip", clip)) if name in node}
    return make(node, model=network, generator=generator, **given)


if __name__ == "__main__":
    with one_sentence():
        main()
