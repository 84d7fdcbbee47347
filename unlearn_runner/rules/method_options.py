"""Options of methods that cannot work together, or that would learn or forget nothing: one sentence each.

Functions of plain values that raise ConfigurationError. A constructor calls those that are about its own arguments;
`configuration.check` calls them for a configuration whose constructors are not imported yet.
"""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from unlearn_runner.constructors import class_name
from unlearn_runner.errors import ConfigurationError


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


def schedule_that_lasts(path: str, schedule: Mapping[str, Any], steps: int) -> None:
    if class_name(schedule) == "OneCycleLR":
        total = schedule.get("total_steps") or (schedule.get("epochs") or 0) * (schedule.get("steps_per_epoch") or 0)
        if 0 < total < steps:  # 0: neither is given, which torch refuses
            raise ConfigurationError(
                f"{path}.total_steps must be at least {steps}, the steps of this optimizer in the run, got {total}."
            )
    polynomial = "polynomial" in (schedule.get("name"), *class_name(schedule).split("_"))
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
    on_policy = class_name(agent) == "PPO"
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


OF_CONSTRUCTORS: dict[str, tuple[Callable[..., None], ...]] = {
    "methods.siss.siss.SISS": (
        tau_or_rho,
        variance_of_gradients,
    ),
    "methods.siss.without_importance_sampling.SISSNoIS": (tau_or_rho,),
    "methods.siss.lambda_controllers.Inferred": (
        context_of_lambda,
        lambda_of_an_image,
    ),
    "methods.siss.rl_lambda.RLLambda": (
        tau_or_rho,
        variance_of_gradients,
        range_of_lambda,
        whole_episodes,
    ),
    "methods.distillation.networks.NoiseRange": (range_of_noise,),
    "methods.distillation.sfd.SFD": (
        something_to_forget,
        second_stage,
    ),
    "methods.distillation.hybrid.hybrid": (
        something_to_forget,
        something_distilled,
        shares_that_sum_to_one,
    ),
    "methods.policy.critic_guided.CriticGuided": (
        enough_steps_to_learn_from,
        prompts_of_both_kinds,
        history_of_rewards,
    ),
}
