"""Who chooses lambda at every step of SISS (2512.01054, section 5.1); by what, is in lambda_objectives.py."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.methods.siss.lambda_objectives import (
    OBJECTIVES,
    SeparateTerms,
    StepObservation,
    closed_form,
    kl_to_gaussian,
    kl_to_uniform,
)
from unlearn_runner.methods.siss.timesteps import range_of
from unlearn_runner.options import Decay, NonNegativeInt, OpenUnitInterval, PositiveFloat, Seed, UnitInterval, Width
from unlearn_runner.rules import method_options
from unlearn_runner.types import GeneratorState, Metrics, make_generator, moved

LEAST = 1e-3  # an inferred lambda lies in [LEAST, 1 - LEAST]: at 0 and 1 the weights are not bounded


class Mixing(NamedTuple):
    """lambda, and what a sample's two losses are multiplied by beside their weights: one number, or one a sample."""

    lambd: float | Tensor
    scale_retain: float | Tensor = 1.0
    scale_forget: float | Tensor = 1.0


class LambdaController(ABC):
    """Chooses lambda before a step and learns from what the step saw. Stateful: checkpoints store it."""

    needs_terms = False  # whether `observe` is to be called before `next`
    needs_norms = False  # and with norms, which take backward passes
    needs_features = False  # whether `next` is to be called with features

    def begin(self, num_features: int | None) -> None:  # noqa: B027 - most controllers read no features
        """Called once before the first step: how many features the model has for an image, None if it has none."""

    def observe(self, terms: SeparateTerms) -> None:  # noqa: B027 - most controllers read no terms
        """What the batch's two terms are before lambda is chosen."""

    @abstractmethod
    def next(self, level: Float[Tensor, "b"], features: Float[Tensor, "b d"] | None = None) -> Mixing:
        """lambda for samples at these noise levels, t / T in [0, 1), from pairs of images with these features."""

    @abstractmethod
    def learn(self, seen: StepObservation) -> Metrics:
        """Learn from the step that `next` was called for; returns what to log."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@final
class Constant(LambdaController):
    """The same lambda in [0, 1] at every step: static SISS."""

    def __init__(self, value: UnitInterval):
        self.value = float(value)

    def next(self, level: Float[Tensor, "b"], features: Float[Tensor, "b d"] | None = None) -> Mixing:
        return Mixing(self.value)

    def learn(self, seen: StepObservation) -> Metrics:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


@final
class Chosen(LambdaController):
    """Another's choice: `choose` sets lambda for the next step."""

    def __init__(self, initial: float):
        self.value = self.previous = initial

    def choose(self, value: float) -> None:
        self.previous, self.value = self.value, value

    def next(self, level: Float[Tensor, "b"], features: Float[Tensor, "b d"] | None = None) -> Mixing:
        return Mixing(self.value)

    def learn(self, seen: StepObservation) -> Metrics:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "previous": self.previous}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value, self.previous = state_dict["value"], state_dict["previous"]


def as_features(terms: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """log1p, with the sign of negative ones: a VAE's nats may be negative."""
    terms = terms.float()
    return terms.sign() * terms.abs().log1p()


@final
class Inferred(LambdaController):
    """lambda = sigmoid(z), z ~ q_phi(z|c) = N(mean, std^2), by a small network phi that learns at every step.

    phi minimises objective + beta KL(q_phi || prior). The context c is [l_x, l_a, ||g_x||, ||g_a||] (log1p, with the
    sign of negative ones) and what `per` adds. At its beginning q_phi is the prior, whatever the context.

    Args:
        objective: "pathwise", the paper's; "variance"; or "blend", where the mixture keeps lambda 1/2 and the terms are
            multiplied by 2 (1 - lambda) and 2 lambda, so that 1/2 is plain SISS. See their functions.
        optimizer: called with phi's weights.
        context: "previous": moving averages of what the steps before saw, of weighted losses and of the gradients that
            were added, at no cost; "current": the paper's, this batch's losses and norms at the noisy x and the noisy
            a, before lambda is drawn, which takes two forward and two backward passes more. It depends on the step's
            noise, so `variance`, whose score is that of the mixture over all noise, would be biased by it and refuses.
        beta: weight of the KL, > 0 [?].
        prior: "gaussian" on the logit, or "uniform" on lambda.
        prior_mean, prior_std: of the Gaussian, on the logit.
        norms: whether c has the gradient norms; without, "current" takes two forward passes more and no backward pass.
        per: what has a lambda of its own: the "batch"; each sample by its "timestep", t / T being in c; or each pair of
            images x, a (the paper's motive: "different images need different lambda"), by t / T and what tells images
            apart: with context "current" the pair's own l_x and l_a, and `image_features`.
        image_features: with per="image", c has what the network makes of the clean x and a
            (`GenerativeModel.features`), normalised over features. One forward pass of both more.
        hidden: width of the two hidden layers.
        ema_decay: of the previous context.
    """

    def __init__(
        self,
        objective: Literal["pathwise", "variance", "blend"],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        context: Literal["previous", "current"] = "previous",
        beta: PositiveFloat = 0.1,
        prior: Literal["gaussian", "uniform"] = "gaussian",
        prior_mean: float = 0.0,
        prior_std: PositiveFloat = 1.0,
        norms: bool = True,
        per: Literal["batch", "timestep", "image"] = "batch",
        image_features: bool = False,
        hidden: Width = 32,
        ema_decay: Decay = 0.9,
        seed: Seed = 0,
    ):
        method_options.context_of_lambda(objective, context)
        method_options.lambda_of_an_image(per, context, image_features)
        self.objective = objective
        self.needs_terms = context == "current"
        self.needs_norms = norms
        self.needs_features = image_features
        self.slope = OBJECTIVES[objective]
        self.beta = beta
        self.uniform_prior = prior == "uniform"
        # A uniform lambda's logit has mean 0 and standard deviation pi / sqrt(3); 1.749 is nearest to it in KL.
        self.prior_mean, self.prior_std = (0.0, 1.749) if self.uniform_prior else (float(prior_mean), float(prior_std))
        self.per = per
        self.seed, self.hidden, self.make_optimizer = seed, hidden, optimizer
        self.ema_decay = ema_decay
        self.context = torch.zeros(4 if norms else 2)  # of the batch
        self.losses: Float[Tensor, "b 2"] | None = None  # of this batch's pairs, if they are in the context
        self.generator = make_generator(seed, "lambda")
        self._asked: tuple[Tensor, Tensor, Tensor] | None = None  # lambda, mean, std of this step, with their graph
        self._build(0)

    def begin(self, num_features: int | None) -> None:
        if self.needs_features:
            if num_features is None:
                raise ConfigurationError(
                    "method.lambd.image_features=true needs a model whose network has a middle block; leave it out."
                )
            self._build(2 * num_features)

    def _build(self, num_features: int) -> None:
        size = len(self.context) + num_features + 2 * (self.per != "batch") + 2 * self._sees_pairs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # nn.Module's initialisers know no other generator
            self.network = nn.Sequential(
                nn.Linear(size, self.hidden), nn.Tanh(), nn.Linear(self.hidden, self.hidden), nn.Tanh(),
                nn.Linear(self.hidden, 2),
            )  # fmt: skip
        for weight in self.network[-1].parameters():
            nn.init.zeros_(weight)
        self.optimizer = self.make_optimizer(self.network.parameters())

    @property
    def _sees_pairs(self) -> bool:
        return self.needs_terms and self.per == "image"

    def posterior(
        self, level: Float[Tensor, "b"], features: Float[Tensor, "b d"] | None = None
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """Mean and standard deviation of the logit: for each sample, or one for all."""
        self._move(level.device)
        if self.per == "batch":
            context = self.context[None]
        else:
            turn = torch.stack([2 * level - 1, (torch.pi * level).cos()], 1)
            context = torch.cat([self.context.expand(len(level), -1), turn], 1)
        if self._sees_pairs:
            context = torch.cat([context, self.losses], 1)
        if features is not None:
            context = torch.cat([context, nn.functional.layer_norm(features, features.shape[1:])], 1)
        mean, log_std = self.network(context).unbind(1)
        return self.prior_mean + mean, self.prior_std * log_std.exp()

    def observe(self, terms: SeparateTerms) -> None:
        self._move(terms.losses_retain.device)
        self.context = as_features(terms.of_batch())
        if self._sees_pairs:
            self.losses = as_features(torch.stack([terms.losses_retain, terms.losses_forget], 1))

    def next(self, level: Float[Tensor, "b"], features: Float[Tensor, "b d"] | None = None) -> Mixing:
        mean, std = self.posterior(level, features)
        e = moved(torch.randn(mean.shape, generator=self.generator), mean.device)
        lambd = torch.sigmoid(mean + std * e).clamp(LEAST, 1 - LEAST)
        self._asked = (lambd, mean, std)
        if self.objective == "blend":
            return Mixing(0.5, 2 * (1 - lambd.detach()), 2 * lambd.detach())
        return Mixing(lambd.detach())

    def learn(self, seen: StepObservation) -> Metrics:
        # 1. phi's own step: the slope at each sample times d lambda / d phi, and the prior
        lambd, mean, std = self._asked
        slope = self.slope(seen)
        if self.uniform_prior:
            kl = kl_to_uniform(mean, std).mean()
        else:
            kl = kl_to_gaussian(mean, std, self.prior_mean, self.prior_std).mean()
        loss = (slope * lambd).mean() + self.beta * kl
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._asked = None

        # 2. the context of the next step
        if not self.needs_terms:
            norms = [seen.norm_retain, seen.norm_forget] if self.needs_norms else []
            found = torch.stack([seen.losses_retain.mean(), seen.losses_forget.mean(), *norms])
            self.context = self.ema_decay * self.context + (1 - self.ema_decay) * as_features(found)
        return {
            "lambda/inferred": lambd.detach().mean(),
            "lambda/posterior_mean": mean.detach().mean(),
            "lambda/posterior_std": std.detach().mean(),
            "lambda/kl": kl.detach(),
            **(self._over_levels(seen.level.device) if self.per == "timestep" else {}),
            **({"lambda/std_over_images": lambd.detach().std(correction=0)} if self.per == "image" else {}),
        }

    def _over_levels(self, device: torch.device) -> Metrics:
        with torch.no_grad():
            mean, _ = self.posterior(LEVELS.to(device))
        return over_levels(torch.sigmoid(mean))

    def _move(self, device: torch.device) -> None:
        """To where the samples are. Adam has made no state before the first step, so this leaves nothing behind."""
        if self.context.device != device:
            self.network.to(device)
            self.context = self.context.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "context": self.context,
            "generator": GeneratorState(self.generator).state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.network.load_state_dict(state_dict["network"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.context = state_dict["context"].to(self.context.device)
        GeneratorState(self.generator).load_state_dict(state_dict["generator"])


@final
class ClosedForm(LambdaController):
    """lambda* of `closed_form`, from moving averages of what the steps before saw: the `variance` objective without a
    network, exact where weights are one-hot and no norm fix is on. Under one it minimises the same surrogate.

    E[||grad l_x||^2] over q(.|x) is estimated without bias from the mixture's samples, as E[w_x ||grad l_x||^2].

    Args:
        per: R_x and R_a, and so lambda, for the "batch", or by "timestep": for each of `num_levels` equal ranges of
            t / T.
        ema_decay: of all averages.
        initial: lambda of the first step.
        least_samples: lambda is at least this many of a batch's samples: a batch without any forgets nothing, and the
            norm fix does not make up for it in the next.
    """

    def __init__(
        self,
        per: Literal["batch", "timestep"] = "batch",
        num_levels: Width = 10,
        ema_decay: Decay = 0.9,
        initial: OpenUnitInterval = 0.1,
        least_samples: NonNegativeInt = 2,
    ):
        self.num_levels = num_levels if per == "timestep" else 1
        self.ema_decay = ema_decay
        self.initial = initial
        self.least_samples = least_samples
        self.sums: Tensor | None = None  # rows: samples, R_x^2, R_a^2; a column for each range of levels
        self.norms: Tensor | None = None  # of the retain and the forget gradient, before and after their constants

    def next(self, level: Float[Tensor, "b"], features: Float[Tensor, "b d"] | None = None) -> Mixing:
        if self.sums is None:
            return Mixing(torch.full_like(level[:1], self.initial))
        lambdas = self._lambdas(len(level))
        return Mixing(lambdas[range_of(level, self.num_levels)] if self.num_levels > 1 else lambdas)

    def learn(self, seen: StepObservation) -> Metrics:
        tiny = torch.finfo(seen.w_retain.dtype).tiny
        squares = [
            torch.where(w > 0, square / w.clamp(min=tiny), 0.0)
            for square, w in ((seen.square_retain, seen.w_retain), (seen.square_forget, seen.w_forget))
        ]
        rows = torch.stack([torch.ones_like(squares[0]), *squares])
        found = rows.new_zeros(3, self.num_levels).index_add_(1, range_of(seen.level, self.num_levels), rows)
        norms = torch.stack([seen.norm_retain, seen.norm_forget])
        norms = torch.stack([norms, norms * torch.stack([seen.c_retain, seen.c_forget]).abs()]).to(found)
        if self.sums is None:
            self.sums, self.norms = found, norms
        else:
            self.sums = self.ema_decay * self.sums + (1 - self.ema_decay) * found
            self.norms = self.ema_decay * self.norms + (1 - self.ema_decay) * norms
        if self.num_levels == 1:
            return {}
        return over_levels(self._lambdas(len(seen.level))[range_of(LEVELS.to(rows.device), self.num_levels)])

    def _lambdas(self, batch_size: int) -> Float[Tensor, "levels"]:
        count, retain, forget = self.sums
        whole = self.sums.sum(1)  # a range that no sample has met takes the mean of all
        rms_retain, rms_forget = (
            torch.where(count > 0, part / count, total / whole[0]).sqrt()
            for part, total in ((retain, whole[1]), (forget, whole[2]))
        )
        # Under a norm fix the constants change from step to step, and a single forget sample's is no guide.
        c_retain, c_forget = self.norms[1] / self.norms[0].clamp(min=torch.finfo(self.norms.dtype).tiny)
        least = min(max(LEAST, self.least_samples / batch_size), 1 - LEAST)
        return closed_form(c_retain * rms_retain, c_forget * rms_forget).clamp(least, 1 - LEAST)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "norms": self.norms}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sums, self.norms = state_dict["sums"], state_dict["norms"]


LEVELS = torch.linspace(0.05, 0.95, 10)  # t / T at which a lambda over t is logged
AT_LEVEL = "lambda/at/"  # its keys, before the level


def over_levels(lambdas: Float[Tensor, "10"]) -> Metrics:
    """lambda at ten noise levels, as scalars to log: lambda/at/0.05 to lambda/at/0.95."""
    return {f"{AT_LEVEL}{level:.2f}": value for level, value in zip(LEVELS.tolist(), lambdas, strict=True)}
