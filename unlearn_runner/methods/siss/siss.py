"""SISS: subtracted importance sampled scores (2503.01034). Its loss is in mixture.py.

# Notation (variable -> paper), besides mixture.py's
# forget_share -> K/N, forget images among all;  superfactor -> s
"""

from collections.abc import Callable
from typing import Annotated, Literal, final

import torch
from annotated_types import Gt
from jaxtyping import Float, Int64
from torch import Tensor

from unlearn_runner.data.streams import Images
from unlearn_runner.gradients import gradients
from unlearn_runner.methods.denoising import draw_eps
from unlearn_runner.methods.method import Method, Setting, Update
from unlearn_runner.methods.retained_images import TRUST_CAP, RetainedImages, encoded, retained_images, trust
from unlearn_runner.methods.siss.gradient_norms import GradientVariance, LastNorms, NormFix
from unlearn_runner.methods.siss.lambda_controllers import Constant, LambdaController
from unlearn_runner.methods.siss.lambda_objectives import SeparateTerms, StepObservation
from unlearn_runner.methods.siss.mixture import Mixture, Origin, mix, siss_loss
from unlearn_runner.methods.siss.passes import LossesAndSlopes, effective_sample_size, shared_passes
from unlearn_runner.methods.siss.timesteps import TimestepSampler, Uniform
from unlearn_runner.models.model import GenerativeModel, Noising, denoising_loss
from unlearn_runner.options import PositiveFloat, PositiveInt, UnitInterval
from unlearn_runner.rules import method_options
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


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
            self.lambd.observe(self.separate_terms(batch, timesteps, eps, self.lambd.needs_norms))
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
        seen = StepObservation(
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

    def separate_terms(
        self, batch: Batch, timesteps: Int64[Tensor, "b"], eps: Float[Tensor, "b ..."], norms: bool = True
    ) -> SeparateTerms:
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
        return SeparateTerms(*losses, torch.stack(lengths) if norms else None)

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
