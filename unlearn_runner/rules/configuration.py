"""What is known of a whole configuration before anything is built. Imports nothing heavy."""

import os
from collections.abc import Container, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from unlearn_runner import recognition
from unlearn_runner.constructors import class_name, constructor_of, makes, parts
from unlearn_runner.errors import ConfigurationError, existing_folder, folder_or_name, no_checkpoint
from unlearn_runner.rules import dataset_options, evaluation_options, method_options, model_options
from unlearn_runner.spec import Labels, spec_of
from unlearn_runner.weights import file_or_located, located, weights_identity

OF_CONSTRUCTORS = (
    method_options.OF_CONSTRUCTORS
    | model_options.OF_CONSTRUCTORS
    | dataset_options.OF_CONSTRUCTORS
    | evaluation_options.OF_CONSTRUCTORS
)


def check(cfg: Mapping[str, Any], allow: Sequence[str] = ()) -> None:
    """The rules of all constructors, and what else is known before anything is built; `cfg` holds all their defaults.
    `allow` is what the user trusts besides the runner's own code.
    """
    timesteps = _timesteps(cfg)
    for path, node in parts(cfg):
        of_constructor(node)
        if path != "dataset":
            spec_of(node)
    if timesteps is not None:
        require_steps_everywhere(cfg, timesteps)
    _folders(cfg)
    spec = spec_of(cfg["dataset"])
    for path, node in parts(cfg["judge"], "judge"):
        recognition.check(path, node, spec, allow)
    _models_and_methods(cfg)
    if spec is not None and spec.labels is not None:
        _labels(cfg["method"], spec.labels)
    if timesteps is not None and "noise" in cfg["method"]:
        _noise(cfg["method"]["noise"], cfg["model"]["network"], timesteps)
    evaluation_options.check_evaluation(cfg, spec)
    evaluation_options.check_objective(cfg)


def of_constructor(node: Mapping[str, Any]) -> None:
    """The rules for the arguments of one constructor, where all that they ask for is given."""
    for rule in OF_CONSTRUCTORS.get(node["_target_"].removeprefix("unlearn_runner."), ()):
        wanted = signature(rule).parameters
        given = {name: node[name] for name in wanted if name in node}
        if all(name in given or option.default is not option.empty for name, option in wanted.items()):
            rule(**given)


def require_steps_everywhere(cfg: Mapping[str, Any], timesteps: int) -> None:
    """`require_steps` for all parts of a configuration that sample by a model with so many timesteps."""
    for path, node in parts(cfg):
        if "num_inference_steps" in node:
            model_options.require_steps(node["num_inference_steps"], timesteps, f"{path}.num_inference_steps")


def require_of_methods(cfg: Mapping[str, Any], there: Container[str]) -> None:
    """`require` for the method of a configuration, and for each that it holds."""
    for _, node in parts(cfg["method"]):
        if makes(node["_target_"], "methods.method.Method"):
            name = f"method={cfg['choices']['method']}"
            method_options.require(constructor_of(node["_target_"]).requires, there, name)
            if class_name(node) == "EraseDiff" and node.get("variant") == "released":
                method_options.require(("labels",), there, f"{name} method.variant=released")


def _is_diffusion(cfg: Mapping[str, Any]) -> bool:
    return makes(cfg["model"]["network"]["_target_"], "models.model.DiffusionModel")


def _timesteps(cfg: Mapping[str, Any]) -> int | None:
    """Of the schedule of a model that is built here; None of another's, which is asked when it is read."""
    network = cfg["model"]["network"]
    if network.get("weights") != "auto" or not _is_diffusion(cfg):
        return None
    return network.get("num_train_timesteps", 1000 if _draws_texts(network) else None)


FOLDERS = ("dataset.forget_dir", "dataset.retain_dir", "dataset.never_seen")
FOLDERS_OR_NAMES = ("dataset.source", "dataset.garment_source", "method.policy")
WORDS = ("auto", "embedded", "base")  # that are no folder


def _folders(cfg: Mapping[str, Any]) -> None:
    """Folders that are not there."""
    for options, require in (
        (FOLDERS, existing_folder),
        (FOLDERS_OR_NAMES, folder_or_name),
        (("model.weights",), located),
        (("method.weights",), file_or_located),
    ):
        for option in options:
            group, name = option.split(".")
            value = cfg[group].get(name)
            if isinstance(value, str) and value not in WORDS:
                require(value, option)
    _own_oracles(evaluation_options.own_oracles(cfg["evaluation"]["oracle"]), cfg["model"]["weights"])
    wanted = cfg["resume_from_checkpoint"]
    if wanted not in (None, "latest") and not Path(wanted).expanduser().is_dir():
        raise no_checkpoint(wanted)


def _own_oracles(sources: Sequence[str], weights: str) -> None:
    """Each must be there, and be another model than the base and the other oracles. Reads weights if there are some."""
    models: dict[str, str] = {}
    for source in sources:
        if source.count("/") != 1:  # a hub id has one
            existing_folder(source, "evaluation.oracle")
        located(source, "evaluation.oracle")
        if (same := models.setdefault(weights_identity(source), source)) != source or sources.count(source) > 1:
            raise ConfigurationError(
                f"evaluation.oracle={source} holds the same model as {same}, which would count twice; give another."
            )
    if weights != "auto" and sources and (same := models.get(weights_identity(weights))) is not None:
        raise ConfigurationError(
            f"evaluation.oracle={same} holds the same model as model.weights={weights}, which is to unlearn; give one "
            "that never saw the forget set."
        )


TEXT_TO_IMAGE = (  # builders of what draws under prompts
    "models.stable_diffusion.build_stable_diffusion",
    "models.stable_diffusion.build_sdxl",
    "models.stable_diffusion_3.build_sd3",
    "models.flux.build_flux",
)


def _draws_texts(network: Mapping[str, Any]) -> bool:
    return network["_target_"].removeprefix("unlearn_runner.") in TEXT_TO_IMAGE


def _models_and_methods(cfg: Mapping[str, Any]) -> None:
    network, dataset, method, trainer = cfg["model"]["network"], cfg["dataset"], cfg["method"], cfg["trainer"]
    recipe, weights, clip = cfg["model"]["pretraining"], cfg["model"]["weights"], cfg["clip"]["network"]
    prompted = "concept" in dataset or "template" in dataset or dataset.get("captions") is not None
    of_files = "forget_dir" in dataset or "captions" in dataset  # which have no classes
    labelled = prompted or dataset.get("conditional", not of_files)
    draws_texts = _draws_texts(network)
    if draws_texts:
        model_options.prompts_for_texts(prompted)
    there = method_options.facts(
        _is_diffusion(cfg), bool(labelled), draws_texts and prompted, clip is not None, trainer["init"]
    )  # fmt: skip
    require_of_methods(cfg, there)
    has_corpus = bool((recipe or {}).get("corpus"))
    model_options.teachable(recipe is not None, has_corpus, weights, dataset.get("source") == "base")
    seeds = cfg["evaluation"]["oracle_seeds"]
    if seeds is not None or cfg["evaluation"]["oracle"] is True:
        option = "evaluation.oracle=true" if seeds is None else f"evaluation.oracle_seeds={list(seeds)}"
        model_options.retrainable(
            option, has_corpus, weights, "give one of your own, evaluation.oracle=<folder>, or leave it out"
        )
    if trainer["init"] == "scratch":
        instead = "to measure one of your own take method=given method.weights=<folder>"
        model_options.retrainable(
            f"method={cfg['choices']['method']} (trainer.init=scratch)", has_corpus, weights, instead
        )
    if weights == "auto" and draws_texts and recipe.get("autoencoder") is None:
        raise ConfigurationError(
            "model.pretraining.autoencoder must be a recipe, got null: there is no other to encode by."
        )
    if method.get("critic_update") is not None and method["critic_warmup"] >= trainer["max_steps"]:
        raise ConfigurationError(
            f"method.critic_warmup must be below trainer.max_steps={trainer['max_steps']}, got "
            f"{method['critic_warmup']}: in these rounds the critic alone learns, so nothing would be forgotten."
        )
    if class_name(method) == "RLLambda" and "LambdaDriver" not in cfg["driver"]["_target_"]:
        raise ConfigurationError(
            "driver must be that of method=rl_lambda, got another: choose the method by its group."
        )
    if class_name(cfg["driver"]) == "LambdaDriver":
        if class_name(method) != "RLLambda":
            raise ConfigurationError(f"driver: this one is for method=rl_lambda, got {class_name(method)}.")
        agent = method["agent"]
        method_options.policy_of_lambda(
            class_name(agent) == "PPO", agent.get("ent_coef", 0.0), agent.get("use_sde", False),
            method["state_dependent_std"], method["kl_weight"],
        )  # fmt: skip
        method_options.whole_rollouts(method, trainer["max_steps"])
    precision = cfg["hardware"].get("mixed_precision")
    if network.get("frozen_dtype") == "bfloat16" and precision != "bf16":
        raise ConfigurationError(
            "model.network.frozen_dtype=bfloat16 needs hardware.mixed_precision=bf16, so that the network computes in "
            f"it, got {precision}."
        )
    if cfg["hardware"].get("compile") and not (_is_diffusion(cfg)):
        raise ConfigurationError("hardware.compile must be false, got true: this model has no UNet.")
    processes, most = cfg["hardware"].get("num_processes"), max(8, os.cpu_count() or 1)
    if cfg["hardware"].get("accelerator") == "cpu" and processes is not None and processes > most:
        raise ConfigurationError(
            f"hardware.num_processes must be at most {most} on this machine's CPU, got {processes}."
        )
    size = dataset.get("image_size")
    if weights == "auto" and size is not None:
        blocks = len(network.get("block_out_channels", ()))
        if draws_texts:
            halvings = len((network.get("vae") or {}).get("block_out_channels", (16, 32))) + blocks - 2
            model_options.sides_of_latents(size, size, 2**halvings)
        elif blocks:
            halvings = blocks - 1 if _is_diffusion(cfg) else blocks
            model_options.sides_that_halve(size, size, halvings, blocks)
    lambd = method.get("lambd")
    if class_name(method) == "hybrid" and isinstance(lambd, Mapping) and class_name(lambd) == "Inferred":
        method_options.objective_without_ascent(lambd["objective"])
        method_options.lambda_without_images(lambd.get("per", "batch"))
    _schedules(cfg)


def _labels(method: Mapping[str, Any], labels: Labels) -> None:
    """What a method says of a dataset's labels."""
    for _, node in parts(method):
        if class_name(node) == "Fixed" and "label" in node:
            method_options.label_that_is_kept(node["label"], labels.retain)
    if "prior" in method:
        method_options.share_for_each_class(method["prior"], len(labels.retain))


def _noise(noise: Mapping[str, Any], network: Mapping[str, Any], timesteps: int) -> None:
    if not {"prediction_type", "beta_start", "beta_end", "beta_schedule"} <= network.keys():
        return  # a builder of one's own: the model itself is asked when it is built
    first, last = model_options.ratios_of_schedule(network, timesteps)
    for option in ("init", "least", "most"):
        rounding = 5e-4 * noise[option]  # the model itself, which has float32, is asked again when it is built
        if not first - rounding <= noise[option] <= last + rounding:
            method_options.noise_of_schedule(noise[option], first, last, f"method.noise.{option}")


def _schedules(cfg: Mapping[str, Any]) -> None:
    """Schedules of the learning rate that torch or diffusers would end before the training."""
    updates = [
        (f"method.{name}", part, _steps_of_update(cfg["method"], name, cfg["trainer"]["max_steps"]))
        for name, part in cfg["method"].items()
        if isinstance(part, Mapping)
    ]
    updates += [
        (f"{path}.update", node["update"], node["max_steps"])
        for path, node in parts(cfg)
        if path != "method" and "update" in node and "max_steps" in node
    ]
    for path, update, steps in updates:
        schedule = update.get("lr_schedule")
        if schedule is not None:
            method_options.schedule_that_lasts(f"{path}.lr_schedule", schedule, steps)


def _steps_of_update(method: Mapping[str, Any], name: str, max_steps: int) -> int:
    """How many steps a method's optimizer takes in a run."""
    if name == "critic_update":
        return max_steps * method["critic_steps"]
    if class_name(method) == "CriticGuided":
        warmup = 0 if method["critic_update"] is None else method["critic_warmup"]
        return (max_steps - warmup) * method["minibatches"]
    if method.get("variant") == "siss_sfd_student":
        distil_steps = round(method["distil_share"] * max_steps)
        return max_steps - distil_steps if name == "update" else distil_steps
    return max_steps
