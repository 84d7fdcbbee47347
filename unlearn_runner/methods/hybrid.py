"""Hybrids of distillation and adaptive weights (2512.01054, section 5.2 and introduction): three ways, all data-free.

`multi_class`: SFD that turns the forgotten class into a mixture of all that are kept; each picture has its own shares.
`siss_sfd_student`: SISS on a student of many steps, with images of a distilled generator instead of real ones.
`siss_sfd_labels`: SFD on a batch of mixed labels, lambda of which are to be forgotten; a lambda controller chooses it.

The paper has prose only for the latter two. In `multi_class` it learns pi by its loss, whose sign is indefinite for
alpha > 1; here pi is the exact minimiser of squared distances d_r and the KL. The fake score is never pushed up its
loss.

# Notation (variable -> paper)
# costs -> d_r;  prior, mixture -> pi0, pi;  beta -> beta, weight of KL(pi || pi0)
# posterior -> rho_r(x_t), the chance that x_t is of class r;  lambd -> lambda;  forget_weight -> g_f, with g_r = 1
# student -> epsilon_theta;  eta -> weight of the student's forget term
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, final

import torch
from annotated_types import Gt, Le
from jaxtyping import Float, Int64
from torch import Tensor

from unlearn_runner.data.streams import Images
from unlearn_runner.gradients import gradients
from unlearn_runner.methods.denoising import draw_noise
from unlearn_runner.methods.lambdas import Constant, Inferred, LambdaController, Seen
from unlearn_runner.methods.method import Counter, Method, Setting, Update, copy_weights
from unlearn_runner.methods.overrides import Asked, Override, class_costs, drawn_labels
from unlearn_runner.methods.sfd import (
    LabelSampler,
    Noised,
    NoiseRange,
    Trio,
    distil_steps,
    distillation_state,
    generator_loss,
    split_losses,
)
from unlearn_runner.methods.siss import importance_weights, mix, siss_loss
from unlearn_runner.models.model import GenerativeModel, predict_x0, squared_error
from unlearn_runner.options import (
    BatchSize,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    UnitInterval,
)
from unlearn_runner.rules import method_options
from unlearn_runner.spec import Labels
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


def mixture_costs(
    x0_teachers: Float[Tensor, "b r c h w"], x0_fake: Float[Tensor, "b c h w"], x0: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b r"]:
    """d_r = ||f_phi(c_r) - f_psi(c_f)||^2 / omega_r, omega_r the mean of |f_phi(c_r) - x_g|: how far each class is.

    Unlike the generator's loss it is never negative, so a mixture can be fitted to it.
    """
    omega = (x0_teachers - x0[:, None]).abs().flatten(2).mean(2).clamp(min=1e-5)
    return (x0_teachers - x0_fake[:, None]).square().flatten(2).sum(2) / omega


def optimal_mixture(costs: Float[Tensor, "b r"], prior: Float[Tensor, "r"], beta: float) -> Float[Tensor, "b r"]:
    """pi_r proportional to pi0_r exp(-d_r / beta): the minimiser of sum_r pi_r d_r + beta KL(pi || pi0)."""
    return torch.softmax(prior.log() - costs / beta, 1)


def mixture_guess(
    x0_teachers: Float[Tensor, "b r c h w"], class_costs: Float[Tensor, "b r"], mixture: Float[Tensor, "b r"]
) -> Float[Tensor, "b c h w"]:
    """E[x0|x_t] of the mixture sum_r pi_r p(.|c_r): sum_r rho_r f_phi(c_r), rho_r proportional to pi_r p(x_t|c_r).

    class_costs: -log p(x_t|c_r), up to a constant. Weighing the guesses by pi would aim at an average picture instead.
    """
    posterior = torch.softmax(mixture.log() - class_costs, 1)
    return (posterior[:, :, None, None, None] * x0_teachers).sum(1)


def student_losses(
    eps_pred: Float[Tensor, "b c h w"], eps_override: Float[Tensor, "b c h w"], eta: float
) -> Float[Tensor, "b"]:
    """What replaces SISS's unbounded ascent: eta ||eps_theta(m, c_f) - eps_phi(m, c_override)||^2, to be descended."""
    return eta * squared_error(eps_pred, eps_override.detach())


@final
class MultiClass(Method):
    """SFD with an adaptive mixture of all retained classes in place of an override rule.

    Args:
        beta: how much the mixture may depend on the picture; towards infinity it is the prior.
        prior: of the retained classes in the order of their labels; None: all alike.
        target: "drawn": one class is drawn from each sample's own mixture, which is unbiased and takes one pass with a
            gradient; "mixture_score": the score of the mixture itself, with the batch's mean mixture, for which every
            class takes one, and `num_draws` noises tell the classes apart (`overrides.class_costs`).
    """

    requires = ("noise", "labels", "base")

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        fake_update: Callable[[GenerativeModel], Update],
        batch_size: BatchSize,
        forget_samples: Annotated[float, Gt(0), Le(1)],
        forget_weight: PositiveFloat,
        alpha: float,
        noise: NoiseRange,
        beta: PositiveFloat,
        prior: Sequence[PositiveFloat] | None = None,
        target: Literal["drawn", "mixture_score"] = "drawn",
        num_draws: PositiveInt = 1,
    ):
        self.trio = Trio(setting.model, noise)
        count = len(setting.labels.retain)
        method_options.shares_that_sum_to_one(prior)
        method_options.share_for_each_class(prior, count)
        if prior is None:
            prior = [1 / count] * count
        self.reads = Streams(retain=None, forget=False)
        self.networks = self.trio.networks
        self.retained = setting.labels.retain
        self.labels = LabelSampler(setting.labels, batch_size, forget_samples, forget_weight)
        self.alpha, self.beta = alpha, beta
        self.prior, self.target, self.num_draws = torch.tensor(prior), target, num_draws
        self.update = update(self.trio.generator)
        self.fake_update = fake_update(self.trio.fake)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def begin(self, images: Images | None) -> None:
        self.trio.begin()

    def step(self, batch: Batch) -> Metrics:
        trio, g = self.trio, self.generator

        # 1. fake score
        metrics = trio.teach_fake(self.fake_update, self.labels.draw(g, trio.device), g)

        # 2. generator: towards its own class, or under the forget labels towards a mixture of the others
        drawn = self.labels.draw(g, trio.device)
        noised = trio.draw(drawn.labels, trio.draw_timesteps(len(drawn.labels), g), g)
        kept, forget = (noised.select(rows) for rows in (slice(drawn.kept), slice(drawn.kept, None)))
        own, forgotten = drawn.labels[: drawn.kept], drawn.labels[drawn.kept :]
        losses = trio.generator_losses(kept, own, own, self.alpha)
        if len(forgotten):
            mixture, shares = self._mixture(forget, forgotten)
            metrics |= shares
            losses = torch.cat([losses, self._forget_losses(forget, forgotten, mixture)])
        gradient = self.update.gradient((drawn.weights * losses).sum())
        self.update.apply(gradient)
        return {
            **metrics,
            **split_losses("loss/", losses, drawn.kept, trio.teacher.num_entries),
            "grad_norm/generator": gradient.norm(),
        }

    def _mixture(self, noised: Noised, forget: Int64[Tensor, "b"]) -> tuple[Float[Tensor, "b r"], Metrics]:
        """Each sample's mixture, and what to log of it: the mean KL from the prior in nats, the mean cost."""
        prior = self.prior.to(self.trio.device)
        with torch.no_grad():
            x0_fake = predict_x0(self.trio.fake, noised.x_t, noised.timesteps, forget)
            costs = mixture_costs(self._guesses(noised), x0_fake, noised.x0)
        mixture = optimal_mixture(costs, prior, self.beta)
        kl = (mixture * (mixture.clamp(min=torch.finfo(mixture.dtype).tiny) / prior).log()).sum(1)
        metrics = {"mixture/kl": kl.mean(), "mixture/cost": (mixture * costs).sum(1).mean()}
        shares = zip(self.retained, mixture.mean(0), strict=True)
        return mixture, metrics | {f"mixture/share/{label}": share for label, share in shares}

    def _forget_losses(
        self, noised: Noised, forget: Int64[Tensor, "b"], mixture: Float[Tensor, "b r"]
    ) -> Float[Tensor, "b"]:
        trio = self.trio
        if self.target == "drawn":
            chosen = torch.multinomial(mixture, 1, generator=self.generator).squeeze(1)
            return trio.generator_losses(noised, self._retained()[chosen], forget, self.alpha)
        costs = class_costs(
            trio.teacher, noised.x_t.detach(), noised.timesteps, self.retained, self.num_draws, self.generator
        )
        constant = mixture.mean(0, keepdim=True).expand_as(mixture)  # a mixture that does not depend on x_t has a score
        target = mixture_guess(self._guesses(noised), costs, constant)
        x0_fake = predict_x0(trio.fake, noised.x_t, noised.timesteps, forget)
        return generator_loss(target, x0_fake, noised.x0, self.alpha)

    def _guesses(self, noised: Noised) -> Float[Tensor, "b r c h w"]:
        """The teacher's guess of x0 for each retained class."""
        count, b = len(self.retained), len(noised.x_t)
        x_t, timesteps = (part.repeat_interleave(count, 0) for part in (noised.x_t, noised.timesteps))
        guesses = predict_x0(self.trio.teacher, x_t, timesteps, self._retained().repeat(b), guided=True)
        return guesses.unflatten(0, (b, count))

    def _retained(self) -> Int64[Tensor, "r"]:
        return torch.tensor(self.retained, device=self.trio.device)

    def stateful(self) -> dict[str, Stateful]:
        return distillation_state(self.update, self.fake_update, self.generator)


@final
class MixedLabels(Method):
    """SFD on one batch in which each sample has a forget label with chance lambda; importance weights keep the losses.

    A retain sample weighs 1 / (1 - lambda), a forget sample g_f / lambda, in both parts of the step: for every lambda
    the mean is SFD's, and lambda decides where the samples tell most.
    """

    requires = ("noise", "labels", "base")

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        fake_update: Callable[[GenerativeModel], Update],
        override: Callable[[Labels], Override],
        batch_size: BatchSize,
        forget_weight: PositiveFloat,
        alpha: float,
        noise: NoiseRange,
        lambd: UnitInterval | LambdaController,
    ):
        self.trio = Trio(setting.model, noise)
        self.reads = Streams(retain=None, forget=False)
        self.networks = self.trio.networks
        self.labels = setting.labels
        self.override = override(setting.labels)
        self.batch_size, self.forget_weight, self.alpha = batch_size, forget_weight, alpha
        self.lambd = controller(lambd)
        self.update = update(self.trio.generator)
        self.fake_update = fake_update(self.trio.fake)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def begin(self, images: Images | None) -> None:
        self.trio.begin()

    def step(self, batch: Batch) -> Metrics:
        trio, g, b = self.trio, self.generator, self.batch_size

        # 1. lambda, and labels by it
        timesteps = trio.draw_timesteps(b, g)
        level = timesteps / trio.teacher.num_train_timesteps
        lambd = self.lambd.next(level).lambd
        from_forget = torch.rand(b, generator=g, device=trio.device) < lambd
        retain, forget = (drawn_labels(part, b, g, trio.device) for part in (self.labels.retain, self.labels.forget))
        labels = torch.where(from_forget, forget, retain)
        # labels tell for certain which of the two a sample is: the ratio of densities is infinite or zero
        w_retain, w_forget = importance_weights(torch.where(from_forget, math.inf, -math.inf), lambd)

        # 2. fake score
        fake_losses = trio.fake_losses(labels, timesteps, g)
        weights = w_retain + self.forget_weight * w_forget
        fake_gradient = self.fake_update.gradient((weights * fake_losses).mean())
        self.fake_update.apply(fake_gradient)

        # 3. generator: the slopes over its images first, then both terms' gradients over its weights
        noised = trio.draw(labels, timesteps, g)
        targets = labels.clone()
        if from_forget.any():
            asked = Asked(noised.x0[from_forget].detach(), labels[from_forget], trio.teacher, g)
            targets[from_forget] = self.override(asked)
        losses = trio.generator_losses(noised, targets, labels, self.alpha)
        terms = siss_loss(losses, losses, w_retain, w_forget)
        (slopes,) = gradients(terms[0] + terms[1], [noised.x0], retain_graph=True)
        slopes_retain, slopes_forget = (
            torch.where(rows[:, None, None, None], slopes, 0.0) for rows in (~from_forget, from_forget)
        )
        grad_retain = self.update.gradient_from(noised.x0, slopes_retain, retain_graph=True)
        grad_forget = self.update.gradient_from(noised.x0, slopes_forget)
        self.update.apply(grad_retain + self.forget_weight * grad_forget)

        # 4. lambda's controller learns from what was seen
        pixels = trio.teacher.num_entries
        norms = grad_retain.norm(), grad_forget.norm()
        weighted = [(w * losses).detach() / pixels for w in (w_retain, w_forget)]
        seen = seen_of(
            level, (w_retain, w_forget), weighted, (slopes_retain * b, slopes_forget * b), norms, self.forget_weight
        )
        return {
            "loss/fake": (weights * fake_losses).detach().mean() / pixels,
            "loss/retain": weighted[0].mean(),
            "loss/forget": weighted[1].mean(),
            "grad_norm/fake": fake_gradient.norm(),
            "grad_norm/retain": norms[0],
            "grad_norm/forget": norms[1],
            "lambda/value": torch.as_tensor(lambd, device=trio.device).mean(),
            **self.lambd.learn(seen),
        }

    def stateful(self) -> dict[str, Stateful]:
        return {**distillation_state(self.update, self.fake_update, self.generator), "lambd": self.lambd}


@final
class Student(Method):
    """SISS without data, on a student that keeps the teacher's many steps and is what ships.

    For `distil_share` of the steps a one-step generator is distilled, of all labels alike, the forgotten too. Then it
    is frozen, and supplies x and a: the student descends SISS's retain term, and in place of SISS's ascent it learns to
    predict under a forget label what the teacher predicts under the override (`student_losses`). The labels of x and a
    differ, so the importance weights are one-hot.
    """

    requires = ("noise", "labels", "base")

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        generator_update: Callable[[GenerativeModel], Update],
        fake_update: Callable[[GenerativeModel], Update],
        override: Callable[[Labels], Override],
        batch_size: BatchSize,
        max_steps: PositiveInt,
        distil_share: OpenUnitInterval,
        alpha: float,
        noise: NoiseRange,
        eta: PositiveFloat,
        lambd: UnitInterval | LambdaController,
    ):
        method_options.something_to_forget(distil_share, max_steps)
        method_options.something_distilled(distil_share, max_steps)
        self.trio = Trio(setting.model, noise)
        self.student = copy.deepcopy(self.trio.fake)
        self.reads = Streams(retain=None, forget=False)
        self.networks = (self.student, *self.trio.networks)
        self.labels = setting.labels
        self.override = override(setting.labels)
        self.batch_size, self.alpha, self.eta = batch_size, alpha, eta
        self.lambd = controller(lambd)
        self.distil_steps = distil_steps(distil_share, max_steps)
        self.taken = Counter()
        self.update = update(self.student)
        self.generator_update = generator_update(self.trio.generator)
        self.fake_update = fake_update(self.trio.fake)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def begin(self, images: Images | None) -> None:
        copy_weights(self.student, self.trio.teacher)
        self.trio.begin()

    def step(self, batch: Batch) -> Metrics:
        distilling = self.taken.value < self.distil_steps
        if self.taken.value == self.distil_steps:  # from now on the generator is what would ship of it
            self.trio.generator.load_state_dict(self.generator_update.model.state_dict())
        self.taken.value += 1
        return self._distil() if distilling else self._unlearn()

    def _distil(self) -> Metrics:
        """One step of plain distillation: SFD without anything to forget."""
        trio, g, b = self.trio, self.generator, self.batch_size

        # 1. fake score
        labels = drawn_labels(range(trio.teacher.num_labels), b, g, trio.device)
        fake_losses = trio.fake_losses(labels, trio.draw_timesteps(b, g), g)
        self.fake_update.apply(self.fake_update.gradient(fake_losses.mean()))

        # 2. generator
        labels = drawn_labels(range(trio.teacher.num_labels), b, g, trio.device)
        noised = trio.draw(labels, trio.draw_timesteps(b, g), g)
        losses = trio.generator_losses(noised, labels, labels, self.alpha)
        self.generator_update.apply(self.generator_update.gradient(losses.mean()))
        pixels = trio.teacher.num_entries
        return {
            "loss/distil_fake": fake_losses.detach().mean() / pixels,
            "loss/distil": losses.detach().mean() / pixels,
        }

    def _unlearn(self) -> Metrics:
        """One step of SISS on the generator's images."""
        student, teacher, g, b = self.student, self.trio.teacher, self.generator, self.batch_size

        # 1. x and a by the frozen generator; t, eps, lambda, and from which of the two m is drawn
        source, device = self.trio.generator, self.trio.device
        conds = [drawn_labels(part, b, g, device) for part in (self.labels.retain, self.labels.forget)]
        z = torch.randn((2, b, *student.sample_shape), generator=g, device=device)
        with torch.no_grad():
            images = [source.predict(part, torch.zeros_like(cond), cond) for part, cond in zip(z, conds, strict=True)]
        drawn = Batch(*images, *conds, forget_share=0.0)
        timesteps, eps = draw_noise(student, drawn.x0_retain, g)
        level = timesteps / student.num_train_timesteps
        lambd = self.lambd.next(level).lambd
        from_forget = torch.rand(b, generator=g, device=device) < lambd
        noisings = (student.noising(x0, timesteps, cond) for x0, cond in zip(images, conds, strict=True))
        mixture = mix(drawn, timesteps, *noisings, eps, from_forget, lambd)

        # 2. the student's prediction; its target: the noise that leads to x, or the teacher's under another label
        prediction = student.predict(mixture.m, timesteps, mixture.cond)
        losses_retain = student.loss(
            prediction, drawn.x0_retain, mixture.m, mixture.retain.eps, mixture.retain.std, timesteps
        )
        with torch.no_grad():
            others = self.override(Asked(drawn.x0_forget, drawn.cond_forget, teacher, g))
            wanted = teacher.predict(mixture.m, timesteps, torch.where(from_forget, others, mixture.cond))
        eps_pred, eps_override = (student.path.noise_of(part, mixture.m, timesteps) for part in (prediction, wanted))
        losses_forget = student_losses(eps_pred, eps_override, self.eta)

        # 3. both terms' gradients, both to descend
        w_retain, w_forget = mixture.retain.weight, mixture.forget.weight
        terms = siss_loss(losses_retain, losses_forget, w_retain, w_forget)
        slopes_retain, grad_retain = self.update.gradient_through(prediction, terms[0], retain_graph=True)
        slopes_forget, grad_forget = self.update.gradient_through(prediction, terms[1])
        self.update.apply(grad_retain + grad_forget)

        # 4. lambda's controller learns from what was seen
        pixels = student.num_entries
        norms = grad_retain.norm(), grad_forget.norm()
        pairs = ((w_retain, losses_retain), (w_forget, losses_forget))
        weighted = [(w * losses).detach() / pixels for w, losses in pairs]
        seen = seen_of(level, (w_retain, w_forget), weighted, (slopes_retain * b, slopes_forget * b), norms, 1.0)
        return {
            "loss/retain": weighted[0].mean(),
            "loss/forget": weighted[1].mean(),
            "grad_norm/retain": norms[0],
            "grad_norm/forget": norms[1],
            "lambda/value": torch.as_tensor(lambd, device=device).mean(),
            **self.lambd.learn(seen),
        }

    def stateful(self) -> dict[str, Stateful]:
        parts = {"": self.update, "generator_": self.generator_update, "fake_": self.fake_update}
        return {
            **{prefix + name: part for prefix, update in parts.items() for name, part in update.stateful().items()},
            "noise": GeneratorState(self.generator),
            "lambd": self.lambd,
            "steps": self.taken,
        }


def controller(lambd: float | LambdaController) -> LambdaController:
    """Raises ConfigurationError for objectives made for a forget term that is ascended: here both are descended."""
    if isinstance(lambd, Inferred):
        method_options.objective_without_ascent(lambd.objective)
        method_options.lambda_without_images(lambd.per)
    return lambd if isinstance(lambd, LambdaController) else Constant(lambd)


def seen_of(
    level: Float[Tensor, "b"],
    weights: tuple[Float[Tensor, "b"], Float[Tensor, "b"]],
    losses: Sequence[Float[Tensor, "b"]],
    slopes: tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]],
    norms: tuple[Float[Tensor, ""], Float[Tensor, ""]],
    c_forget: float,
) -> Seen:
    """A step as lambda's controllers see it, from pairs of retain and forget. One-hot samples have no inner product."""
    return Seen(
        level,
        *weights,
        *losses,
        *(part.square().flatten(1).sum(1) for part in slopes),
        inner_product=(slopes[0] * slopes[1]).flatten(1).sum(1),
        norm_retain=norms[0],
        norm_forget=norms[1],
        c_retain=torch.ones_like(norms[0]),
        c_forget=torch.full_like(norms[1], c_forget),
    )


VARIANTS: dict[str, tuple[type[Method], tuple[str, ...]]] = {
    "multi_class": (MultiClass, ("forget_samples", "forget_weight", "beta", "prior", "target", "num_draws")),
    "siss_sfd_labels": (MixedLabels, ("override", "forget_weight", "lambd")),
    "siss_sfd_student": (Student, ("generator_update", "override", "max_steps", "distil_share", "eta", "lambd")),
}


FURTHER_OPTIONS = {
    "hybrid": (
        "unlearn_runner.methods.hybrid.MultiClass",
        "unlearn_runner.methods.hybrid.MixedLabels",
        "unlearn_runner.methods.hybrid.Student",
    )
}


def hybrid(
    setting: Setting, variant: Literal["multi_class", "siss_sfd_labels", "siss_sfd_student"], **options: Any
) -> Method:
    """The method of `method.variant`, given those of the options that it has; `options` are those of all variants."""
    cls, own = VARIANTS[variant]
    others = {name for _, names in VARIANTS.values() for name in names} - set(own)
    return cls(setting, **{name: value for name, value in options.items() if name not in others})
