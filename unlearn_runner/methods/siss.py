"""SISS: subtracted importance sampled scores (Data Unlearning in Diffusion Models, ICLR 2025, 2503.01034).

# Notation (variable -> paper)
# x0_retain, x0_forget -> x, a;  lambd -> lambda;  scale, std of a Noising -> gamma_t, sigma_t
# mixture.m -> m_t ~ q_lambda = (1 - lambda) q(.|x) + lambda q(.|a)
# w_retain, w_forget, or weight of an Origin -> q(m|x) / q_lambda(m), q(m|a) / q_lambda(m)
# forget_share -> K/N, forget images among all;  superfactor -> s
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, final

import torch
from annotated_types import Gt
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.data.streams import Images
from unlearn_runner.gradients import gradients
from unlearn_runner.methods.denoising import draw_eps, drawn_loss
from unlearn_runner.methods.lambdas import ApartTerms, Constant, LambdaController, Seen
from unlearn_runner.methods.method import Method, Setting, Update
from unlearn_runner.methods.retained_images import TRUST_CAP, RetainedImages, encoded, retained_images, trust
from unlearn_runner.methods.timesteps import TimestepSampler, Uniform
from unlearn_runner.models.model import GenerativeModel, Noising, denoising_loss
from unlearn_runner.options import PositiveFloat, PositiveInt, UnitInterval
from unlearn_runner.rules import method_options
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


def siss_loss(
    losses_retain: Float[Tensor, "b"],
    losses_forget: Float[Tensor, "b"],
    w_retain: Float[Tensor, "b"],
    w_forget: Float[Tensor, "b"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The two terms of SISS (2503.01034, equation 9): L_retain to descend, L_forget to ascend.

    losses_retain: l_x = ||eps_theta(m) - eps_x||^2, the prediction at the mixture's sample m compared with the noise
    that would have made m from x; losses_forget: l_a, with the noise that would have made it from a; where the network
    predicts v or a velocity, the same of that. Each is weighted and averaged over the batch. With all of X as retain
    stream, N/(N-K) L_retain - K/(N-K) L_forget is naive deletion's loss in expectation, for every lambda.
    """
    return (w_retain * losses_retain).mean(), (w_forget * losses_forget).mean()


def importance_weights(
    log_ratio: Float[Tensor, "b"], lambd: float | Float[Tensor, "#b"]
) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
    """w_retain in [0, 1/(1-lambda)] and w_forget in [0, 1/lambda], from log_ratio = log q(m|a) - log q(m|x).

    Written with sigmoids, which neither overflow nor cancel however far the images are apart;
    (1 - lambda) w_retain + lambda w_forget = 1. At lambda 0 and 1, which a number may be but no tensor, the weight of
    the other image is the plain, unbounded ratio of the two densities.
    """
    if isinstance(lambd, Tensor):
        u = torch.logit(lambd) + log_ratio
    elif lambd == 0:
        return torch.ones_like(log_ratio), log_ratio.exp()
    elif lambd == 1:
        return (-log_ratio).exp(), torch.ones_like(log_ratio)
    else:
        u = math.log(lambd) - math.log1p(-lambd) + log_ratio
    return torch.sigmoid(-u) / (1 - lambd), torch.sigmoid(u) / lambd


class Origin(NamedTuple):
    """The mixture's samples seen as noised from one of the two images."""

    x0: Float[Tensor, "b c h w"]
    eps: Float[Tensor, "b ..."]  # that leads from x0 to the sample
    std: Float[Tensor, "b ..."]
    weight: Float[Tensor, "b"]  # q(m|x0) / q_lambda(m)


class Mixture(NamedTuple):
    """Samples m of q_lambda, and what they are to the two images they may have come from."""

    m: Float[Tensor, "b ..."]
    timesteps: Int64[Tensor, "b"]
    cond: Shaped[Tensor, "b ..."] | None  # of the image that the sample was drawn from
    retain: Origin
    forget: Origin

    def select(self, rows: Tensor | slice) -> "Mixture":
        retain, forget = (Origin(*(part[rows] for part in origin)) for origin in (self.retain, self.forget))
        cond = None if self.cond is None else self.cond[rows]
        return Mixture(self.m[rows], self.timesteps[rows], cond, retain, forget)


def mix(
    batch: Batch,
    timesteps: Int64[Tensor, "b"],
    noising_retain: Noising,
    noising_forget: Noising,
    eps: Float[Tensor, "b ..."],
    from_forget: Bool[Tensor, "b"],
    lambd: float | Float[Tensor, "#b"],
) -> Mixture:
    """Noise x or a, as `from_forget` says, by the pair's common eps, and weigh the outcome (equations 6 to 8).

    With conditions the mixture is over (m, c): where the two images' conditions differ, m's condition tells
    which of them it came from, and the weights are exactly one-hot.
    """
    pick = from_forget.view(-1, *[1] * (eps.ndim - 1))
    std_retain, std_forget = noising_retain.std, noising_forget.std
    std_own, std_other = torch.where(pick, std_forget, std_retain), torch.where(pick, std_retain, std_forget)
    # Standardised by the other image's q, m is ratio eps + shift or ratio eps - shift: no log-densities are subtracted
    # that are nearly equal. A diffusion model's ratio is 1.
    ratio = std_own / std_other
    shift = (noising_retain.scale / std_other) * (noising_retain.center - noising_forget.center)
    across = -(eps * shift * ratio).flatten(1).sum(1)
    half_distance = shift.square().flatten(1).sum(1) / 2 - ((1 - ratio.square()) * eps.square()).flatten(1).sum(1) / 2
    log_volume = (std_retain.log() - std_forget.log()).expand_as(eps).flatten(1).sum(1)
    log_ratio = across + torch.where(from_forget, half_distance, -half_distance) + log_volume
    w_retain, w_forget = importance_weights(log_ratio, lambd)
    cond = batch.cond_retain
    if cond is not None:
        differ = (batch.cond_retain != batch.cond_forget).reshape(len(cond), -1).any(1)
        chance = lambd if isinstance(lambd, Tensor) else eps.new_full((), lambd)
        tiny = torch.finfo(eps.dtype).tiny  # at the ends of lambda no sample is of the kind that would be divided by 0
        w_retain = torch.where(differ, (~from_forget) / (1 - chance).clamp(min=tiny), w_retain)
        w_forget = torch.where(differ, from_forget / chance.clamp(min=tiny), w_forget)
        chosen = from_forget.view(-1, *[1] * (cond.ndim - 1))
        cond = torch.where(chosen, batch.cond_forget, batch.cond_retain)
    drawn = Noising(
        noising_retain.scale, torch.where(pick, noising_forget.center, noising_retain.center), std_own
    ).sample(eps)
    return Mixture(
        m=drawn,
        timesteps=timesteps,
        cond=cond,
        retain=Origin(batch.x0_retain, torch.where(pick, ratio * eps - shift, eps), std_retain, w_retain),
        forget=Origin(batch.x0_forget, torch.where(pick, eps, ratio * eps + shift), std_forget, w_forget),
    )


def shared_passes(
    w_retain: Float[Tensor, "b"], w_forget: Float[Tensor, "b"], call: float = 4.0
) -> list[tuple[Bool[Tensor, "b"], tuple[int, ...]]]:
    """The cheapest way to pass a batch: which rows together, and back for which of the terms 0, 1 (retain, forget).

    A pass forward and back costs 3 units a row, a second pass back over the same graph 2, and each of these passes
    what `call` units cost besides. A row whose weight in a term is below rounding needs no pass back for it, which is
    exact to rounding. Rows with weight in both terms go together with two passes back, or once with each of the others.

    Numbers of rows are multiples of an eighth of the batch, for which some rows pass that need not: a CPU compiles
    kernels for each number, and those of every number that chance makes would fill its memory. The most rows first:
    what they leave of it is room enough for the others.
    """
    negligible, unit = torch.finfo(w_retain.dtype).eps / 16, max(1, len(w_retain) // 8)
    in_retain, in_forget = w_retain > negligible, w_forget > negligible

    def first(rows: Bool[Tensor, "b"], n: Int64[Tensor, ""]) -> Bool[Tensor, "b"]:
        return rows & (rows.cumsum(0) <= n)

    def some(rows: Bool[Tensor, "b"]) -> Bool[Tensor, "b"]:
        """As many of these as make whole units."""
        return first(rows, rows.sum() // unit * unit)

    def filled(rows: Bool[Tensor, "b"]) -> Bool[Tensor, "b"]:
        """These, and as many others as make whole units."""
        return rows | first(~rows, -rows.sum() % unit)

    only_retain, only_forget = some(in_retain & ~in_forget), some(in_forget & ~in_retain)
    rest = (in_retain | in_forget) & ~only_retain & ~only_forget
    ways = [
        [(torch.ones_like(rest), (0, 1))],
        [(filled(in_retain), (0,)), (filled(in_forget), (1,))],
        [(only_retain, (0,)), (only_forget, (1,)), (rest, (0, 1))],
    ]
    sums = iter(torch.stack([rows.sum() for way in ways for rows, _ in way]).tolist())  # from the device at once
    counts = [[next(sums) for _ in way] for way in ways]

    def cost(way: int) -> float:
        passes = ((count, len(terms)) for count, (_, terms) in zip(counts[way], ways[way], strict=True) if count)
        return sum(count * (1 + 2 * backward) + call * (1 + backward) for count, backward in passes)

    best = min(range(len(ways)), key=cost)
    parts = sorted(zip(counts[best], ways[best], strict=True), key=lambda part: -part[0])
    return [part for count, part in parts if count]


@final
class NormFix:
    """Rescales every forget gradient to norm tau (2503.01034, section 4), up or down.

    tau is absolute, as in the released code, or, which is ours, `rho` times a moving average of the retain gradient's
    norm, which needs no tuning to the size of images and network. With neither, the factor is 1. The rescaling is at
    most `max_scale`, ours too, so that a batch that holds next to nothing to forget is not blown up. Stays on the
    device: no host sync.
    """

    def __init__(
        self,
        tau: float | None = None,
        rho: float | None = None,
        ema_decay: float = 0.9,
        max_scale: float = 1e4,
    ):
        method_options.tau_or_rho(tau, rho)
        self.tau, self.rho, self.ema_decay, self.max_scale = tau, rho, ema_decay, max_scale
        self.average: Tensor | None = None

    def scale(self, norm_retain: Float[Tensor, ""], norm_forget: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What to multiply the forget gradient by."""
        if self.tau is None and self.rho is None:
            return torch.ones_like(norm_forget)
        if self.average is None:
            self.average = norm_retain
        self.average = self.ema_decay * self.average + (1 - self.ema_decay) * norm_retain
        wanted = self.rho * self.average if self.rho is not None else self.tau
        # 0 / 0 cannot arise from the cap: a forget gradient of zero norm is multiplied by max_scale and stays 0.
        return (wanted / norm_forget).clamp(max=self.max_scale)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = state_dict["average"]


@final
class LastNorms:
    """The norms of the two gradients and the norm fix's factor, as they were last measured; stateful."""

    def __init__(self, every: int):
        self.every = every
        self.steps = 0
        self.last: tuple[Float[Tensor, ""], ...] = ()

    def due(self) -> bool:
        """Whether this step measures them."""
        self.steps += 1
        return (self.steps - 1) % self.every == 0

    def keep(self, norm_retain: Float[Tensor, ""], norm_forget: Float[Tensor, ""], fix: Float[Tensor, ""]) -> None:
        """A batch without a forget sample says nothing of the factor: then the one before stays, at first 0."""
        if self.every > 1:
            before = self.last[2] if self.last else torch.zeros_like(fix)
            self.last = (norm_retain, norm_forget, torch.where(norm_forget > 0, fix, before))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "last": list(self.last)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.last = state_dict["steps"], tuple(state_dict["last"])


class LossesAndSlopes(NamedTuple):
    """What the two terms of one batch make of the network's prediction; all detached."""

    losses_retain: Float[Tensor, "b"]  # w_x l_x, summed over pixels
    losses_forget: Float[Tensor, "b"]
    slopes_retain: Float[Tensor, "b c h w"]  # gradient of w_x l_x over the network's prediction
    slopes_forget: Float[Tensor, "b c h w"]


@final
class GradientVariance:
    """||g - h||^2 / 2 of the gradients g, h of two consecutive steps, which have nearly the same weights and samples of
    their own: the variance of a batch's gradient, summed over the network's weights.

    Keeps a vector of the network's size for each gradient, also in checkpoints.
    """

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}

    def __call__(self, gradients: dict[str, Float[Tensor, "p"]]) -> Metrics:
        """grad_variance/<name> of each; nothing at the first step."""
        found = {
            f"grad_variance/{name}": (gradient - self.before[name]).square().sum() / 2
            for name, gradient in gradients.items()
            if name in self.before
        }
        self.before = gradients
        return found

    def state_dict(self) -> dict[str, Any]:
        return dict(self.before)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = dict(state_dict)


@final
class SISS(Method):
    """Descends L_retain and ascends L_forget on samples of a mixture of a retain and a forget image.

    With `forget_target="posterior"` it descends both, L_forget being the loss at the posterior mean of the retained
    images instead of at the forget image: bounded, and nothing is ascended. (The target of `method=posterior`;
    samples count by `trust`, with cap TRUST_CAP.)

    Args:
        lambd: share of samples drawn from the forget image, in [0, 1], or a LambdaController.
        tau, rho: norm of the forget gradient, absolute or relative to the retain gradient's (see NormFix).
        population: "retain": x from X without A, no factors, as in the released code; "all": x from all of X
            with the factors N/(N-K) and K/(N-K), as in the theory. Either is right, both together would be wrong.
        superfactor: s, how much more than deletion's share the forget term weighs. Without effect under a norm fix.
        split: back-propagate each term only through the samples that carry weight in it. Which these are, the host has
            to ask the device. None: on a CPU, where passes cost by the sample; a GPU passes a whole batch at once.
        norm_every: steps between two measurements of the gradients' norms; in between the terms share one pass back,
            and the forget gradient is multiplied by what was last found right. 1: at every step, as in the paper.
        timesteps: which timesteps to look at; None: uniformly drawn ones.
        forget_target: what L_forget compares the network's prediction with, see above.
        gradient_variance: log grad_variance/{retain,forget,update}.
    """

    requires = ("images",)

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        lambd: UnitInterval | LambdaController = 0.5,
        tau: PositiveFloat | None = None,
        rho: PositiveFloat | None = None,
        population: Literal["retain", "all"] = "retain",
        superfactor: Annotated[float, Gt(-1)] = 0.0,
        split: bool | None = None,
        norm_every: PositiveInt = 1,
        timesteps: TimestepSampler | None = None,
        gradient_variance: bool = False,
        forget_target: Literal["ascent", "posterior"] = "ascent",
    ):
        method_options.variance_of_gradients(norm_every, gradient_variance)
        self.reads = Streams(retain=population, forget=True)
        self.networks = (setting.model,)
        self.trained = setting.model
        self.lambd = lambd if isinstance(lambd, LambdaController) else Constant(lambd)
        self.norm_fix = NormFix(tau, rho)
        self.superfactor = superfactor
        self.split = split
        self.labels, self.forget_target = setting.labels, forget_target
        self.retained: RetainedImages | None = None
        self.norms = LastNorms(norm_every)
        self.timesteps = Uniform() if timesteps is None else timesteps
        self.gradient_variance = GradientVariance() if gradient_variance else None
        self.update = update(setting.model)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def begin(self, images: Images | None) -> None:
        self.lambd.begin(self.trained.num_features)
        if self.forget_target == "posterior":
            self.retained = retained_images(self.trained, images, self.labels, "nearest", self.generator)

    def step(self, batch: Batch) -> Metrics:
        model, b, pixels = self.trained, len(batch.x0_retain), self.trained.num_entries

        # 1. t and eps common to each pair, lambda, and from which of the two images m is drawn
        timesteps, t_weights = self.timesteps.draw(b, model.num_train_timesteps, self.generator, batch.x0_retain.device)
        eps = draw_eps(model, batch.x0_retain, self.generator)
        coin = torch.rand((b,), generator=self.generator, device=eps.device)
        level = timesteps / model.num_train_timesteps
        if self.lambd.needs_terms:
            self.lambd.observe(self.terms_apart(batch, timesteps, eps, self.lambd.needs_norms))
        features = self._features(batch) if self.lambd.needs_features else None
        lambd, scale_retain, scale_forget = self.lambd.next(level, features)

        # 2. the sample m, its weights, and the noise that leads to it from x and from a
        noising_retain = model.noising(batch.x0_retain, timesteps, batch.cond_retain)
        noising_forget = model.noising(batch.x0_forget, timesteps, batch.cond_forget)
        mixture = mix(batch, timesteps, noising_retain, noising_forget, eps, coin < lambd, lambd)
        if self.retained is not None:
            mixture = mixture._replace(forget=self._explained(mixture, noising_forget))

        # 3. the gradients of both terms, and the forget gradient at its norm; or both at once, at the last norms
        scales = (t_weights * scale_retain, t_weights * scale_forget)
        c_retain, c_forget = self.factors(batch)
        if self.norms.due():
            found, (grad_retain, grad_forget) = self._gradients(mixture, *scales)
            grad_retain, grad_forget = grad_retain * c_retain, grad_forget * c_forget
            norm_retain, norm_forget = grad_retain.norm(), grad_forget.norm()
            fix = self.norm_fix.scale(norm_retain, norm_forget)
            gradient = grad_retain - fix * grad_forget
            self.norms.keep(norm_retain, norm_forget, fix)
        else:
            norm_retain, norm_forget, fix = self.norms.last
            found, gradient = self._joint_gradient(mixture, *scales, c_retain, fix * c_forget)

        # 4. the update
        self.update.apply(gradient)

        # 5. lambda's controller and the timesteps' sampler learn from what was seen
        w_retain, w_forget = mixture.retain.weight, mixture.forget.weight
        losses_retain, losses_forget = found.losses_retain / pixels, found.losses_forget / pixels
        c_forget = torch.where(norm_forget > 0, c_forget * fix, 0.0)  # no forget sample was drawn, none is scaled
        self.timesteps.learn(level, c_retain * losses_retain + abs(c_forget) * losses_forget)
        variances = {}
        if self.gradient_variance is not None:
            variances = self.gradient_variance({"retain": grad_retain, "forget": grad_forget, "update": gradient})
        seen = Seen(
            level=level,
            w_retain=w_retain,
            w_forget=w_forget,
            losses_retain=losses_retain * t_weights,
            losses_forget=losses_forget * t_weights,
            square_retain=found.slopes_retain.square().flatten(1).sum(1),
            square_forget=found.slopes_forget.square().flatten(1).sum(1),
            inner_product=(found.slopes_retain * found.slopes_forget).flatten(1).sum(1),
            norm_retain=norm_retain,
            norm_forget=norm_forget,
            c_retain=eps.new_full((), c_retain),
            c_forget=c_forget,
        )
        from_retain = (1 - lambd) * w_retain
        return {
            "loss/retain": seen.losses_retain.mean(),
            "loss/forget": seen.losses_forget.mean(),
            "grad_norm/retain": norm_retain,
            "grad_norm/forget": norm_forget,
            "lambda/value": norm_retain.new_full((), lambd) if isinstance(lambd, float) else lambd.mean(),
            "weights/ess_retain": effective_sample_size(w_retain),
            "weights/ess_forget": effective_sample_size(w_forget),
            "weights/one_hot": (torch.minimum(from_retain, 1 - from_retain) < 1e-3).float().mean(),
            **variances,
            **self.lambd.learn(seen),
        }

    def factors(self, batch: Batch) -> tuple[float, float]:
        """What the term to descend is multiplied by, and that to ascend: N/(N-K) and (1 + s) K/(N-K), or 1 and 1 + s
        for x from X without A. Below 0 the latter is descended, too.
        """
        share = batch.forget_share if self.reads.retain == "all" else 0.0
        sign = 1 if self.forget_target == "ascent" else -1
        return 1 / (1 - share), sign * (1 + self.superfactor) * (share / (1 - share) if share else 1.0)

    @torch.no_grad()
    def _explained(self, mixture: Mixture, noising: Noising) -> Origin:
        """The mixture's samples seen as noised from what the retained images say of them."""
        model, forget = self.trained, mixture.forget
        target = self.retained.target(mixture.m, noising, mixture.cond, encoded(model, forget.x0))
        if not model.is_diffusion:
            return forget._replace(x0=target)
        eps = (mixture.m - noising.scale * target) / noising.std
        return Origin(target, eps, forget.std, forget.weight * trust(eps - forget.eps, TRUST_CAP))

    def terms_apart(
        self, batch: Batch, timesteps: Int64[Tensor, "b"], eps: Float[Tensor, "b ..."], norms: bool = True
    ) -> ApartTerms:
        """L_x at the noisy x and L_a at the noisy a; with `norms` those of the gradients of their means over the batch,
        sums over pixels. Two forward passes, and as many backward passes for the norms.
        """
        losses, lengths = [], []
        for x0, cond in ((batch.x0_retain, batch.cond_retain), (batch.x0_forget, batch.cond_forget)):
            with torch.set_grad_enabled(norms):
                loss = denoising_loss(self.trained, x0, cond, timesteps, eps)
            losses.append(loss.detach() / self.trained.num_entries)
            if norms:
                lengths.append(self.update.gradient(loss.mean()).norm())
        return ApartTerms(*losses, torch.stack(lengths) if norms else None)

    def _features(self, batch: Batch) -> Float[Tensor, "b d"]:
        """What the network makes of the clean x and a of each pair, side by side."""
        x0 = torch.cat([batch.x0_retain, batch.x0_forget])
        cond = None if batch.cond_retain is None else torch.cat([batch.cond_retain, batch.cond_forget])
        return torch.cat(self.trained.features(x0, cond).chunk(2), 1)

    def _gradients(
        self, mixture: Mixture, scale_retain: Float[Tensor, "b"], scale_forget: Float[Tensor, "b"]
    ) -> tuple[LossesAndSlopes, tuple[Float[Tensor, "p"], Float[Tensor, "p"]]]:
        """Both terms, each sample's two losses multiplied by its scales besides its weights; and the gradients of their
        means over the batch, over the network's weights.
        """
        weights, scales = (mixture.retain.weight, mixture.forget.weight), (scale_retain, scale_forget)
        b, losses = len(weights[0]), [torch.zeros_like(weight) for weight in weights]
        slopes = [weight.new_zeros((b, *self.trained.prediction_shape)) for weight in weights]
        sums = [self.update.zero_gradient() for _ in weights]
        split = weights[0].device.type == "cpu" if self.split is None else self.split
        for rows, terms in shared_passes(*weights) if split else [(slice(None), (0, 1))]:
            prediction, found = self._losses(mixture.select(rows))
            means = siss_loss(
                *found, *(weight[rows] * scale[rows] for weight, scale in zip(weights, scales, strict=True))
            )
            for term in terms:
                loss = means[term] * (len(prediction) / b)
                over_prediction, gradient = self.update.gradient_through(
                    prediction, loss, retain_graph=term != terms[-1]
                )
                losses[term][rows] = (weights[term][rows] * found[term]).detach()
                slopes[term][rows] = over_prediction * b
                sums[term] = sums[term] + gradient
        return LossesAndSlopes(*losses, *slopes), (sums[0], sums[1])

    def _joint_gradient(
        self,
        mixture: Mixture,
        scale_retain: Float[Tensor, "b"],
        scale_forget: Float[Tensor, "b"],
        c_retain: float,
        c_forget: Float[Tensor, ""],
    ) -> tuple[LossesAndSlopes, Float[Tensor, "p"]]:
        """c_retain g_x - c_forget g_a by one pass back, and what the two terms make of the network's prediction."""
        prediction, losses = self._losses(mixture)
        weights = (mixture.retain.weight, mixture.forget.weight)
        terms = siss_loss(*losses, weights[0] * scale_retain, weights[1] * scale_forget)
        slopes = [gradients(term, [prediction], retain_graph=True)[0] for term in terms]
        gradient = self.update.gradient_from(prediction, c_retain * slopes[0] - c_forget * slopes[1])
        weighted = [(weight * loss).detach() for weight, loss in zip(weights, losses, strict=True)]
        return LossesAndSlopes(*weighted, *(part * len(prediction) for part in slopes)), gradient

    def _losses(self, mixture: Mixture) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The network's prediction at m, and what it costs if m is a sample of x, and if m is a sample of a."""
        prediction = self.trained.predict(mixture.m, mixture.timesteps, mixture.cond)
        return prediction, tuple(
            self.trained.loss(prediction, origin.x0, mixture.m, origin.eps, origin.std, mixture.timesteps)
            for origin in (mixture.retain, mixture.forget)
        )

    def stateful(self) -> dict[str, Stateful]:
        parts = {
            **self.update.stateful(),
            "noise": GeneratorState(self.generator),
            "lambd": self.lambd,
            "norm_fix": self.norm_fix,
            "norms": self.norms,
            "timesteps": self.timesteps,
        }
        if self.gradient_variance is not None:
            parts["gradient_variance"] = self.gradient_variance
        return parts


@final
class SISSNoIS(Method):
    """SISS without importance sampling (2503.01034, section 4): x and a are noised and denoised on their own.

    The same two terms and norm fix; a forward pass for each image, each with its own t and eps. (In the released code
    the two of a pair have t and eps in common, as in SISS itself: the same expectation.)
    """

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        tau: PositiveFloat | None = None,
        rho: PositiveFloat | None = None,
    ):
        self.reads = Streams(retain="retain", forget=True)
        self.networks = (setting.model,)
        self.trained = setting.model
        self.norm_fix = NormFix(tau, rho)
        self.update = update(setting.model)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def step(self, batch: Batch) -> Metrics:
        # 1. L_retain at the noisy x, L_forget at the noisy a
        (loss_retain, grad_retain), (loss_forget, grad_forget) = (
            (loss.detach() / self.trained.num_entries, self.update.gradient(loss))
            for x0, cond in ((batch.x0_retain, batch.cond_retain), (batch.x0_forget, batch.cond_forget))
            for loss in [drawn_loss(self.trained, x0, cond, self.generator).mean()]
        )

        # 2. the forget gradient at its norm, and the update
        norm_retain, norm_forget = grad_retain.norm(), grad_forget.norm()
        self.update.apply(grad_retain - self.norm_fix.scale(norm_retain, norm_forget) * grad_forget)
        return {
            "loss/retain": loss_retain,
            "loss/forget": loss_forget,
            "grad_norm/retain": norm_retain,
            "grad_norm/forget": norm_forget,
        }

    def stateful(self) -> dict[str, Stateful]:
        return {
            **self.update.stateful(),
            "noise": GeneratorState(self.generator),
            "norm_fix": self.norm_fix,
        }


def effective_sample_size(weights: Float[Tensor, "b"]) -> Float[Tensor, ""]:
    """(sum w)^2 / (b sum w^2): the share of the batch that the weights leave in effect, 0 if none has any."""
    tiny = torch.finfo(weights.dtype).tiny
    return weights.sum().square() / (len(weights) * weights.square().sum() + tiny)
