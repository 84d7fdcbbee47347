"""Combinations of options that cannot work, or that would learn or forget nothing: one sentence each.

Functions of plain values. A constructor calls those that are about its own arguments; `check` calls them, too, for a
configuration whose constructors are not imported yet, and those that are about several groups. Imports nothing heavy.
All raise ConfigurationError.
"""

import math
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from inspect import signature
from pathlib import Path
from typing import Any

from PIL import ImageColor

from unlearn_runner import catalogue, recognition
from unlearn_runner.constructors import constant_of, constructor_of, makes
from unlearn_runner.errors import ConfigurationError, existing_folder, folder_or_name, near, no_checkpoint
from unlearn_runner.spec import DataSpec, Labels, require_templates, spec_of
from unlearn_runner.weights import file_or_located, located, weights_identity

# 1. About the arguments of one constructor


def tau_or_rho(tau: float | None, rho: float | None) -> None:
    if tau is not None and rho is not None:
        raise ConfigurationError(f"give method.tau or method.rho, not both; got tau={tau} and rho={rho}.")


def variance_of_gradients(norm_every: int, gradient_variance: bool) -> None:
    if norm_every > 1 and gradient_variance:
        raise ConfigurationError(
            f"method.norm_every={norm_every} does not know both gradients at every step; add "
            "method.gradient_variance=false, or leave it at 1."
        )


def context_of_lambda(objective: str, context: str) -> None:
    if objective == "variance" and context == "current":
        raise ConfigurationError(
            "method.lambd.context must be previous with objective=variance, whose gradient this step's noise would "
            "bias; got current: take method/lambd=pathwise, or leave it out."
        )


def lambda_of_an_image(per: str, context: str, image_features: bool) -> None:
    if image_features and per != "image":
        raise ConfigurationError(f"method.lambd.image_features needs method.lambd.per=image, got {per}; leave it out.")
    if per == "image" and context == "previous" and not image_features:
        raise ConfigurationError(
            "method.lambd.per=image has nothing to tell images apart by: add method.lambd.image_features=true or, with "
            "method/lambd=pathwise or blend, method.lambd.context=current."
        )


def lambda_without_images(per: str) -> None:
    if per == "image":
        raise ConfigurationError(
            "method.lambd.per=image needs pairs of images, which hybrids have none of: take timestep."
        )


def range_of_lambda(low: float, high: float, lambd: float) -> None:
    if not low < high:
        raise ConfigurationError(f"method.low must be below method.high, got {low} and {high}.")
    if not low <= lambd <= high:
        raise ConfigurationError(f"method.lambd must lie in [method.low, method.high], got {lambd}.")


def policy_of_lambda(
    on_policy: bool, ent_coef: float | str, use_sde: bool, state_dependent_std: bool, kl_weight: float
) -> None:
    """What of a policy's Gaussian can be had together; ent_coef and use_sde are the agent's."""
    if kl_weight > 0 and not (on_policy and ent_coef):
        raise ConfigurationError(
            f"method.kl_weight={kl_weight} needs method/agent=ppo with method.agent.ent_coef above 0, through which "
            "Stable-Baselines3 takes it; add these, or leave it at 0."
        )
    if on_policy and use_sde and (state_dependent_std or kl_weight > 0):
        raise ConfigurationError(
            "method.agent.use_sde=true has a standard deviation of its own; add method.state_dependent_std=false and "
            "leave method.kl_weight at 0."
        )


def whole_episodes(training: str, episodes: int, episodes_per_update: int, policy: str | None = None) -> None:
    if training == "episodic" and policy is None and episodes % episodes_per_update:
        raise ConfigurationError(
            f"method.episodes={episodes} is not a multiple of method.episodes_per_update={episodes_per_update}; "
            f"{multiples(episodes, episodes_per_update)} would be."
        )


def range_of_noise(least: float, most: float) -> None:
    if not least < most:
        raise ConfigurationError(f"method.noise.least must be less than method.noise.most, got {least} and {most}.")


def enough_steps_to_learn_from(
    minibatches: int, num_rollouts: int, timestep_share: float, num_inference_steps: int
) -> None:
    if minibatches > num_rollouts * max(1, round(timestep_share * (num_inference_steps - 1))):
        raise ConfigurationError(
            f"method.minibatches must be at most the steps that a round learns from, got {minibatches} for "
            f"num_rollouts={num_rollouts} of num_inference_steps={num_inference_steps}."
        )


def prompts_of_both_kinds(forget_share: float, num_rollouts: int) -> None:
    if round(forget_share * num_rollouts) == 0:
        raise ConfigurationError(
            f"method.forget_share={forget_share} of method.num_rollouts={num_rollouts} is no roll-out at all, so "
            "nothing would be forgotten; give more of either."
        )


def history_of_rewards(history: int, least_history: int) -> None:
    if least_history > history:
        raise ConfigurationError(
            f"method.least_history must be at most method.history={history}, got {least_history}: no prompt would ever "
            "have as many."
        )


def something_to_forget(distil_share: float, max_steps: int) -> None:
    if distil_share > 0 and round(distil_share * max_steps) >= max_steps:
        raise ConfigurationError(
            f"method.distil_share={distil_share} leaves none of {max_steps} steps to forget in; give less of it, or "
            "more trainer.max_steps."
        )


def second_stage(distil_share: float, second_teacher: str) -> None:
    if second_teacher == "fake_score" and distil_share == 0:
        raise ConfigurationError(
            "method.second_teacher=fake_score needs method.distil_share above 0, got 0: there is no second stage; take "
            "method=sfd_two_stage, or leave it at base."
        )


def something_distilled(distil_share: float, max_steps: int, variant: str = "siss_sfd_student") -> None:
    if variant == "siss_sfd_student" and round(distil_share * max_steps) == 0:
        raise ConfigurationError(
            f"method.distil_share={distil_share} leaves none of {max_steps} steps to distil in, and the student learns "
            "from what was distilled; give more of it, or more trainer.max_steps."
        )


def shares_that_sum_to_one(prior: Sequence[float] | None) -> None:
    if prior is not None and not math.isclose(sum(prior), 1, rel_tol=1e-6):
        raise ConfigurationError(f"method.prior must be shares that sum to 1, or null; got {list(prior)}.")


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


def levels_of_attention(weights: str, attention: Sequence[bool], block_out_channels: Sequence[int]) -> None:
    if weights == "auto" and len(attention) != len(block_out_channels):
        raise ConfigurationError(
            f"model.network.attention must have one entry for each of the {len(block_out_channels)} "
            f"block_out_channels, got {len(attention)}."
        )


def groups_of_channels(weights: str, block_out_channels: Sequence[int], norm_num_groups: int) -> None:
    if weights == "auto" and any(channels % norm_num_groups for channels in block_out_channels):
        raise ConfigurationError(
            "model.network.block_out_channels must be one or more numbers that divide by norm_num_groups="
            f"{norm_num_groups}, got {list(block_out_channels)}."
        )


def heads_of_channels(
    weights: str, block_out_channels: Sequence[int], attention: Sequence[bool], attention_head_dim: int
) -> None:
    # diffusers attends in the middle of the UNet, whose channels are the last, whatever `attention` says
    attended = [channels for channels, wanted in zip(block_out_channels, attention, strict=False) if wanted]
    if weights == "auto" and any(channels % attention_head_dim for channels in (*attended, block_out_channels[-1])):
        raise ConfigurationError(
            f"model.network.attention_head_dim must divide the channels that are attended to, got {attention_head_dim} "
            f"for block_out_channels={list(block_out_channels)}."
        )


def heads_of_latents(weights: str, block_out_channels: Sequence[int], attention_heads: int) -> None:
    if weights == "auto" and any(channels % attention_heads for channels in block_out_channels):
        raise ConfigurationError(
            f"model.network.attention_heads must divide block_out_channels={list(block_out_channels)}, got "
            f"{attention_heads}."
        )


def heads_of_texts(weights: str, text_width: int) -> None:
    if weights == "auto" and text_width % 4:
        raise ConfigurationError(f"model.network.text_width must divide by 4, got {text_width}.")


def another_split(test_split: str) -> None:
    if test_split == "train":
        raise ConfigurationError("dataset.test_split must be another split than 'train', which is learnt from.")


def classes_for_dit(conditional: bool) -> None:
    if not conditional:
        raise ConfigurationError("DiT draws under class labels, the dataset has none; take dataset.conditional=true.")


def t5_of_fresh(weights: str, t5: bool) -> None:
    if weights == "auto" and t5:
        raise ConfigurationError("model.network.t5 must be false with model.weights=auto: a small one has no T5.")


def width_of_transformer(weights: str, heads: int, attention_head_dim: int) -> None:
    if weights == "auto" and (heads * attention_head_dim % 4 or attention_head_dim % 2):
        raise ConfigurationError(
            "model.network.heads times model.network.attention_head_dim must divide by 4, and the latter by 2, got "
            f"{heads} and {attention_head_dim}."
        )


def channels_of_autoencoder(weights: str, vae: Mapping[str, Any] | None) -> None:
    if weights == "auto" and vae is not None:
        channels, groups = vae.get("block_out_channels", (16, 32)), vae.get("norm_num_groups", 8)
        if any(width % groups for width in channels):
            raise ConfigurationError(
                f"model.network.vae.block_out_channels must divide by norm_num_groups={groups}, got {list(channels)}."
            )


def range_of_betas(weights: str, beta_start: float, beta_end: float, beta_schedule: str) -> None:
    if weights == "auto" and beta_schedule != "squaredcos_cap_v2" and not beta_start <= beta_end:
        raise ConfigurationError(f"model.network.beta_start must be at most beta_end, got {beta_start} and {beta_end}.")


def flow_of_pixels(weights: str, prediction_type: str) -> None:
    if weights == "auto" and prediction_type == "flow":
        raise ConfigurationError(
            "model.network.prediction_type must be epsilon or v_prediction, got 'flow': flows are models of pixels so "
            "far, none of latents; take model=ddpm_tiny for one."
        )


def timesteps_of_flow(weights: str, prediction_type: str, num_train_timesteps: int) -> None:
    """At the last one there is no image; a likelihood needs two others."""
    if weights == "auto" and prediction_type == "flow" and num_train_timesteps < 3:
        raise ConfigurationError(
            f"model.network.num_train_timesteps must be at least 3 for a flow, got {num_train_timesteps}."
        )


def prediction_of_weights(weights: str, asked: str, there: str) -> None:
    """What weights predict is said by their folder; the option, where it is not the default, must agree."""
    if asked not in ("epsilon", there):
        raise ConfigurationError(
            f"model.network.prediction_type={asked}: model.weights={weights} predicts {there}, by its scheduler; leave "
            "prediction_type out, or give other weights."
        )


def heads_of_clip(width: int, text_width: int, heads: int) -> None:
    for name, value in (("width", width), ("text_width", text_width)):
        if value % heads:
            raise ConfigurationError(f"clip.network.{name} must divide by heads={heads}, got {value}.")


def patches_of_clip(image_size: int, patch_size: int) -> None:
    if image_size % patch_size:
        raise ConfigurationError(f"clip.network.image_size must divide by patch_size={patch_size}, got {image_size}.")


def amount_of_garments(contamination: float | None, garments: int | None) -> None:
    if (contamination is None) == (garments is None):
        raise ConfigurationError(
            "give dataset.contamination or dataset.garments and set the other to null; "
            f"got contamination={contamination} and garments={garments}."
        )


def two_folders(forget_dir: str, retain_dir: str) -> None:
    if os.path.realpath(Path(forget_dir).expanduser()) == os.path.realpath(Path(retain_dir).expanduser()):
        raise ConfigurationError(
            "dataset.forget_dir and dataset.retain_dir hold the same images, so nothing would be kept; give two "
            "different folders."
        )


def known_colour(background: str) -> None:
    try:
        ImageColor.getrgb(background)
    except ValueError as error:
        raise ConfigurationError(
            f"dataset.background must be a colour, as white or '#ffffff', got '{background}'."
        ) from error


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


OF_CONSTRUCTORS: dict[str, tuple[Callable[..., None], ...]] = {
    "methods.siss.SISS": (tau_or_rho, variance_of_gradients),
    "methods.siss.SISSNoIS": (tau_or_rho,),
    "methods.lambdas.Inferred": (context_of_lambda, lambda_of_an_image),
    "methods.rl_lambda.RLLambda": (tau_or_rho, variance_of_gradients, range_of_lambda, whole_episodes),
    "methods.sfd.NoiseRange": (range_of_noise,),
    "methods.sfd.SFD": (something_to_forget, second_stage),
    "methods.hybrid.hybrid": (something_to_forget, something_distilled, shares_that_sum_to_one),
    "methods.critic_guided.CriticGuided": (enough_steps_to_learn_from, prompts_of_both_kinds, history_of_rewards),
    "training.evaluation.EvaluationPlan": (whose_oracles,),
    "evaluation.metrics.KID": (size_of_subsets,),
    "evaluation.novelty.NoveltyRecipe": (number_of_balls,),
    "evaluation.metrics.PrecisionRecall": (number_of_neighbours,),
    "models.ddpm.build_ddpm": (
        levels_of_attention, groups_of_channels, heads_of_channels, range_of_betas, timesteps_of_flow,
    ),
    "models.vae.build_vae": (groups_of_channels,),
    "models.stable_diffusion.build_stable_diffusion": (
        flow_of_pixels, groups_of_channels, heads_of_latents, heads_of_texts, channels_of_autoencoder, range_of_betas,
    ),
    "models.clip.small_clip": (heads_of_clip, patches_of_clip),
    "data.mnist_trousers.MnistTrousers": (amount_of_garments,),
    "data.hub_classes.HubClasses": (known_colour,),
    "data.sd_concepts.SDConcepts": (known_colour,),
    "data.request.Request": (known_colour,),
    "data.image_folder.ImageFolder": (known_colour, two_folders),
}  # fmt: skip


# 2. About a model, a dataset and a method together

REQUIREMENTS = {  # what a method may require, and what is said where it is not there
    "noise": "{method} needs a diffusion model; take model=ddpm_tiny, or another method.",
    "labels": "{method} needs a dataset with labels or prompts; take dataset.conditional=true, or another method.",
    "prompts": "{method} needs prompts; take model=sd_tiny dataset=sd_concepts, or another method.",
    "clip": "{method} asks CLIP; say which with clip=tiny or clip=vit_b_32.",
    "base": "{method} begins with the base; trainer.init must be base, got 'scratch'.",
    "images": "",  # the retain and the forget set, at its beginning: they are always there
}


def require(requires: Sequence[str], there: Container[str], method: str) -> None:
    """Whether model, dataset and CLIP are what a method says that it needs."""
    for need in requires:
        if need not in REQUIREMENTS:
            raise ConfigurationError(f"{method} requires '{need}'; a method may require {', '.join(REQUIREMENTS)}.")
        if need not in there:
            raise ConfigurationError(REQUIREMENTS[need].format(method=method))


def facts(diffusion: bool, labels: bool, prompts: bool, clip: bool, init: str) -> set[str]:
    """Which of REQUIREMENTS a run has."""
    found = {"noise": diffusion, "labels": labels, "prompts": labels and prompts, "clip": clip, "base": init == "base"}
    return {"images", *(name for name, there in found.items() if there)}


def label_that_is_kept(label: int, retain: Sequence[int]) -> None:
    if label not in retain:
        raise ConfigurationError(
            f"method.override.label must be one of the labels that are kept, {', '.join(map(str, retain))}; "
            f"got {label}."
        )


def share_for_each_class(prior: Sequence[float] | None, count: int) -> None:
    if prior is not None and len(prior) != count:
        raise ConfigurationError(
            f"method.prior must be null or {count} shares, one for each class that is kept; got {list(prior)}."
        )


def noise_of_schedule(ratio: float, least: float, most: float, option: str) -> None:
    if not least <= ratio <= most:
        raise ConfigurationError(
            f"{option} must be a ratio of noise to signal that the model's schedule has, {least:.3g} to {most:.3g}; "
            f"got {ratio}."
        )


def objective_without_ascent(objective: str) -> None:
    """Hybrid's two terms are both descended."""
    if objective != "variance":
        raise ConfigurationError(
            f"method/lambd={objective} speaks of a forget loss that is to rise, and method=hybrid has none; take "
            "variance, closed_form or constant."
        )


def prompts_for_texts(prompts: bool) -> None:
    if not prompts:
        raise ConfigurationError(
            "model: Stable Diffusion draws under prompts, and the dataset has none; take dataset=sd_concepts, or "
            "dataset=request with dataset.captions=auto."
        )


def require_steps(num_inference_steps: int, num_train_timesteps: int, option: str) -> None:
    """No more steps of sampling than the schedule has."""
    if num_inference_steps > num_train_timesteps:
        raise ConfigurationError(
            f"{option} must be at most {num_train_timesteps}, the timesteps of the model's schedule; got "
            f"{num_inference_steps}."
        )


def sides_that_halve(height: int, width: int, halvings: int, blocks: int) -> None:
    if height % 2**halvings or width % 2**halvings:
        raise ConfigurationError(
            f"model.network: {blocks} blocks halve the image {halvings} times, so its sides must divide by "
            f"{2**halvings}; the dataset's are {height} x {width}. Choose another dataset.image_size or fewer blocks."
        )


def sides_of_latents(height: int, width: int, sides: int) -> None:
    if height % sides or width % sides:
        raise ConfigurationError(
            f"model: this Stable Diffusion draws images whose sides divide by {sides}; the dataset's are "
            f"{height} x {width}, choose another dataset.image_size."
        )


def teachable(has_recipe: bool, has_corpus: bool, weights: str, from_base: bool) -> None:
    """Whether the base can be had."""
    if weights == "auto" and not has_recipe:
        raise ConfigurationError(
            "model.weights must be a folder or a hub id, got 'auto': model.pretraining is null, so there is no recipe "
            "to train a base by."
        )
    if from_base and weights == "auto" and not has_corpus:
        raise ConfigurationError(
            "dataset.source=base: this model's base would have to draw the images that it learns from; give "
            "model.weights, or another source."
        )


def retrainable(option: str, has_corpus: bool, weights: str, instead: str) -> None:
    """Whether the base's recipe on the retained images makes a model that differs from the base by these alone."""
    if weights != "auto":
        raise ConfigurationError(
            f"{option} retrains by model.pretraining, but how model.weights={weights} was trained is not known, so the "
            f"two could differ by their recipes and not by the forget set; {instead}."
        )
    if has_corpus:
        raise ConfigurationError(
            f"{option} retrains on the dataset without the forget set, but this model's base learns from "
            f"model.pretraining.corpus and not from the dataset, so the two would differ by more; {instead}."
        )


def a_clip(option: str, there: bool) -> None:
    if not there:
        raise ConfigurationError(
            f"{option} asks CLIP; say which with clip=tiny or clip=vit_b_32, or leave it out with {option}=null."
        )


# 3. Of a whole configuration


def check(cfg: Mapping[str, Any], allow: Sequence[str] = ()) -> None:
    """All of the above, and what else is known of a configuration before anything is built; it holds the defaults of
    all constructors. `allow` is what the user trusts besides the runner's own code.
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
    _evaluation(cfg, spec)
    _objective(cfg)


def parts(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every group of options that has a `_target_`, with its path."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, part in node.items():
            yield from parts(part, f"{path}.{key}".strip("."))
    elif isinstance(node, (list, tuple)):
        for index, part in enumerate(node):
            yield from parts(part, f"{path}[{index}]")


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
            require_steps(node["num_inference_steps"], timesteps, f"{path}.num_inference_steps")


def _name(node: Mapping[str, Any]) -> str:
    return node["_target_"].rpartition(".")[2]


def require_of_methods(cfg: Mapping[str, Any], there: Container[str]) -> None:
    """`require` for the method of a configuration, and for each that it holds."""
    for _, node in parts(cfg["method"]):
        if makes(node["_target_"], "methods.method.Method"):
            name = f"method={cfg['choices']['method']}"
            require(constructor_of(node["_target_"]).requires, there, name)
            if _name(node) == "EraseDiff" and node.get("variant") == "released":
                require(("labels",), there, f"{name} method.variant=released")


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
    _own_oracles(own_oracles(cfg["evaluation"]["oracle"]), cfg["model"]["weights"])
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
        prompts_for_texts(prompted)
    there = facts(
        _is_diffusion(cfg), bool(labelled), draws_texts and prompted, clip is not None, trainer["init"]
    )  # fmt: skip
    require_of_methods(cfg, there)
    has_corpus = bool((recipe or {}).get("corpus"))
    teachable(recipe is not None, has_corpus, weights, dataset.get("source") == "base")
    seeds = cfg["evaluation"]["oracle_seeds"]
    if seeds is not None or cfg["evaluation"]["oracle"] is True:
        option = "evaluation.oracle=true" if seeds is None else f"evaluation.oracle_seeds={list(seeds)}"
        retrainable(option, has_corpus, weights, "give one of your own, evaluation.oracle=<folder>, or leave it out")
    if trainer["init"] == "scratch":
        instead = "to measure one of your own take method=given method.weights=<folder>"
        retrainable(f"method={cfg['choices']['method']} (trainer.init=scratch)", has_corpus, weights, instead)
    if weights == "auto" and draws_texts and recipe.get("autoencoder") is None:
        raise ConfigurationError(
            "model.pretraining.autoencoder must be a recipe, got null: there is no other to encode by."
        )
    if method.get("critic_update") is not None and method["critic_warmup"] >= trainer["max_steps"]:
        raise ConfigurationError(
            f"method.critic_warmup must be below trainer.max_steps={trainer['max_steps']}, got "
            f"{method['critic_warmup']}: in these rounds the critic alone learns, so nothing would be forgotten."
        )
    if _name(method) == "RLLambda" and "LambdaDriver" not in cfg["driver"]["_target_"]:
        raise ConfigurationError(
            "driver must be that of method=rl_lambda, got another: choose the method by its group."
        )
    if _name(cfg["driver"]) == "LambdaDriver":
        if _name(method) != "RLLambda":
            raise ConfigurationError(f"driver: this one is for method=rl_lambda, got {_name(method)}.")
        agent = method["agent"]
        policy_of_lambda(
            _name(agent) == "PPO", agent.get("ent_coef", 0.0), agent.get("use_sde", False),
            method["state_dependent_std"], method["kl_weight"],
        )  # fmt: skip
        whole_rollouts(method, trainer["max_steps"])
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
            sides_of_latents(size, size, 2**halvings)
        elif blocks:
            halvings = blocks - 1 if _is_diffusion(cfg) else blocks
            sides_that_halve(size, size, halvings, blocks)
    lambd = method.get("lambd")
    if _name(method) == "hybrid" and isinstance(lambd, Mapping) and _name(lambd) == "Inferred":
        objective_without_ascent(lambd["objective"])
        lambda_without_images(lambd.get("per", "batch"))
    _schedules(cfg)


def _labels(method: Mapping[str, Any], labels: Labels) -> None:
    """What a method says of a dataset's labels."""
    for _, node in parts(method):
        if _name(node) == "Fixed" and "label" in node:
            label_that_is_kept(node["label"], labels.retain)
    if "prior" in method:
        share_for_each_class(method["prior"], len(labels.retain))


def _noise(noise: Mapping[str, Any], network: Mapping[str, Any], timesteps: int) -> None:
    if not {"prediction_type", "beta_start", "beta_end", "beta_schedule"} <= network.keys():
        return  # a builder of one's own: the model itself is asked when it is built
    first, last = ratios_of_schedule(network, timesteps)
    for option in ("init", "least", "most"):
        rounding = 5e-4 * noise[option]  # the model itself, which has float32, is asked again when it is built
        if not first - rounding <= noise[option] <= last + rounding:
            noise_of_schedule(noise[option], first, last, f"method.noise.{option}")


def ratios_of_schedule(network: Mapping[str, Any], timesteps: int) -> tuple[float, float]:
    """The least and the largest ratio of noise to image of the schedule that is made of a network's options."""
    if network.get("prediction_type") == "flow":
        return 1 / (timesteps - 1), float(timesteps - 1)  # at the last timestep there is no image
    ends = (network["beta_start"], network["beta_end"])

    def cosine(t: int) -> float:
        return math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    def along(t: int, start: float, end: float) -> float:
        return start + (end - start) * t / (timesteps - 1)

    beta = {
        "linear": lambda t: along(t, *ends),
        "scaled_linear": lambda t: along(t, *map(math.sqrt, ends)) ** 2,
        "squaredcos_cap_v2": lambda t: min(1 - cosine(t + 1) / cosine(t), 0.999),
    }[network["beta_schedule"]]
    signals = 1 - beta(0), math.prod(1 - beta(t) for t in range(timesteps))
    return tuple(math.sqrt(1 / signal - 1) for signal in signals)


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
            schedule_that_lasts(f"{path}.lr_schedule", schedule, steps)


def _steps_of_update(method: Mapping[str, Any], name: str, max_steps: int) -> int:
    """How many steps a method's optimizer takes in a run."""
    if name == "critic_update":
        return max_steps * method["critic_steps"]
    if _name(method) == "CriticGuided":
        warmup = 0 if method["critic_update"] is None else method["critic_warmup"]
        return (max_steps - warmup) * method["minibatches"]
    if method.get("variant") == "siss_sfd_student":
        distil_steps = round(method["distil_share"] * max_steps)
        return max_steps - distil_steps if name == "update" else distil_steps
    return max_steps


def schedule_that_lasts(path: str, schedule: Mapping[str, Any], steps: int) -> None:
    if _name(schedule) == "OneCycleLR":
        total = schedule.get("total_steps") or (schedule.get("epochs") or 0) * (schedule.get("steps_per_epoch") or 0)
        if 0 < total < steps:  # 0: neither is given, which torch refuses
            raise ConfigurationError(
                f"{path}.total_steps must be at least {steps}, the steps of this optimizer in the run, got {total}."
            )
    polynomial = "polynomial" in (schedule.get("name"), *_name(schedule).split("_"))
    total, warmup = schedule.get("num_training_steps"), schedule.get("num_warmup_steps")
    if polynomial and total is not None and warmup == total:  # diffusers divides by the steps between the two
        raise ConfigurationError(
            f"{path}.num_warmup_steps of a polynomial must be below num_training_steps={total}, got {warmup}."
        )


def whole_rollouts(method: Mapping[str, Any], max_steps: int) -> None:
    """Whether an agent's rollouts, of the lengths that the options of method=rl_lambda say, make up the run."""
    if method.get("policy") is not None:
        return
    agent = method["agent"]
    on_policy = _name(agent) == "PPO"
    if not on_policy:
        divides(max_steps, "method.agent.train_freq", agent["train_freq"])
    elif method["training"] == "online":
        divides(max_steps, "method.update_every", method["update_every"])
        batches_of(method["update_every"], "method.update_every", agent.get("batch_size"))
    else:
        steps = max_steps * method["episodes_per_update"]
        batches_of(steps, "method.episodes_per_update", agent.get("batch_size"))


def divides(total: int, name: str, steps: int) -> None:
    if total % steps:
        raise ConfigurationError(
            f"trainer.max_steps={total} is not a multiple of {name}={steps}; {multiples(total, steps)} would be: "
            "the agent makes whole rollouts only."
        )


def batches_of(steps: int, name: str, batch: int | None) -> None:
    if batch and steps % batch:
        divisors = ", ".join(str(number) for number in range(2, steps + 1) if steps % number == 0)
        raise ConfigurationError(
            f"a rollout of {steps} steps ({name}) does not divide into batches of method.agent.batch_size={batch}; "
            f"one of {divisors} would do."
        )


def multiples(value: int, of: int) -> str:
    """The nearest multiples, for a sentence."""
    below = value // of * of
    return f"{below} or {below + of}" if below else str(of)


def _evaluation(cfg: Mapping[str, Any], spec: DataSpec | None) -> None:
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
            if _name(node) == "Paraphrases" and not node["templates"]:
                raise ConfigurationError(
                    f"{path}.metrics.{name} has no templates: give dataset.paraphrases, or leave it out with "
                    f"{path}.metrics.{name}=null."
                )
            if _name(node) in ("Paraphrases", "Robustness") and node["templates"]:
                require_templates(f"{path}.metrics.{name}.templates", node["templates"])
            if _name(node) == "Neighbours" and spec is not None:
                near_conditions(node["near"], spec)
            least, why = least_samples(_name(node), node, features)
            classes = len(labels) if node.get("per_class") and labels is not None else None
            enough_samples(f"{path}.metrics.{name}", least, why, look["sampling"]["num_samples"], classes)
        needed = {"evaluation.probe": "evaluation.every", "evaluation": "evaluation.relearning"}.get(path)
        asked = path == "evaluation.probe" or (path == "evaluation" and evaluation["relearning"] is not None)
        if asked and not any("forget_rate" in catalogue.made_by(_name(node)) for node in metrics.values()):
            raise ConfigurationError(f"{path}.metrics.rates must not be null: {needed} asks for its forget_rate.")


def features_of(judge: Mapping[str, Any]) -> int:
    """How many features a judge has; 0 of one that is only known when it is built."""
    extractor = (judge.get("extractor") or {}).get("name", "classifier")
    own = (judge.get("classifier") or {}).get("num_features", 0)
    return {"classifier": own, "inception": 2048, "efficientnet": 1280}.get(extractor, 0)


def measured(node: Mapping[str, Any]) -> bool:
    """Whether a metric measures anything in the features that there are."""
    return _name(node) != "CMMD" or node.get("features") in (None, "open_clip")


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


def _objective(cfg: Mapping[str, Any]) -> None:
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
        return [key for node in nodes for key in catalogue.made_by(_name(node)) or ("*",)]

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
