"""What lambda, the share of samples drawn from the forget image, is chosen for (2512.01054, section 5.1).

What lambda can and cannot do. For m ~ q_lambda = (1 - lambda) q(.|x) + lambda q(.|a),
    d w_x / d lambda = (w_x - w_a) w_x,   d w_a / d lambda = (w_x - w_a) w_a,   d log q_lambda / d lambda = w_a - w_x.
With L = c_x w_x l_x - c_a w_a l_a at a sample, the derivative of E[L] has a pathwise part E[P] and a score part E[S],
and P + S = 0 at every m: the expected loss does not depend on lambda. What does is the variance of its gradient
G = c_x w_x grad l_x - c_a w_a grad l_a, and with it, since forget gradients are rescaled and Adam divides by its own
second moment, how strongly a step forgets.

A surrogate under a norm fix. `variance` and `closed_form` minimise M(lambda) = E||G||^2 for constants c_x and c_a. A
norm fix makes c_a = tau / ||g_a|| of the very batch, whose norm depends on lambda: then M, with c_a as it was found, is
not the second moment of the step, whose forget part has the norm tau whatever lambda is. docs/adaptive_lambda.md says
how the two differ.

# Notation (variable -> paper)
# mean, std -> mu, sigma of q_phi(z|c);  lambd -> lambda = sigmoid(z);  beta -> weight of KL(q_phi || prior)
# c_retain, c_forget -> the constants before the two terms;  slope -> d (objective at a sample) / d lambda
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn


class StepObservation(NamedTuple):
    """What one step of SISS saw at its b samples; detached. Losses are means over pixels."""

    level: Float[Tensor, "b"]  # t / T
    w_retain: Float[Tensor, "b"]
    w_forget: Float[Tensor, "b"]
    losses_retain: Float[Tensor, "b"]  # w_x l_x
    losses_forget: Float[Tensor, "b"]  # w_a l_a
    square_retain: Float[Tensor, "b"]  # ||w_x grad l_x||^2, the gradient with respect to the network's prediction
    square_forget: Float[Tensor, "b"]  # ||w_a grad l_a||^2
    inner_product: Float[Tensor, "b"]  # <w_x grad l_x, w_a grad l_a>
    norm_retain: Float[Tensor, ""]  # of the batch's gradients over the network's weights
    norm_forget: Float[Tensor, ""]
    c_retain: Float[Tensor, ""]  # what the two gradients were multiplied by before they were added
    c_forget: Float[Tensor, ""]  # below 0 where the forget term is descended, too

    def square_norm(self) -> Float[Tensor, "b"]:
        """||G||^2 of each sample.

        With respect to the network's prediction, not to its weights: Katharopoulos and Fleuret's bound (1803.00942) up
        to a factor that all samples share. It costs nothing; per-sample gradients over the weights cost more than the
        step.
        """
        cross = 2 * self.c_retain * self.c_forget * self.inner_product
        return self.c_retain**2 * self.square_retain + self.c_forget**2 * self.square_forget - cross


def pathwise_slope(seen: StepObservation) -> Float[Tensor, "b"]:
    """P = (w_x - w_a)(c_x w_x l_x - c_a w_a l_a): the paper's gradient, through the weights alone. BIASED.

    As in section 5.1, but for losses that are means over pixels, without constants. The samples' own dependence on
    lambda (the score part, S = -P) is left out, as the paper's reparameterisation leaves it out. Where weights are
    one-hot P is positive at every sample, so it pulls lambda to 0 whatever the model does; the prior alone holds it.
    (Where losses are negative, as a VAE's nats may be, it pulls lambda to 1.)
    """
    loss = seen.losses_retain - seen.losses_forget  # the paper's constants are 1
    return (seen.w_retain - seen.w_forget) * loss


def variance_slope(seen: StepObservation) -> Float[Tensor, "b"]:
    """d M / d lambda = -E[||G||^2 (w_a - w_x)], M = E||G||^2: UNBIASED for M, which is convex, if c_x and c_a are
    constants.

    Under a norm fix c_a is the batch's own and depends on lambda, which this leaves out: M is a surrogate then. In
    units of M itself, so that it does not depend on the size of network and images. ||G||^2 is
    `StepObservation.square_norm`.
    """
    square = seen.square_norm()
    return -square * (seen.w_forget - seen.w_retain) / square.mean().clamp(min=torch.finfo(square.dtype).tiny)


def blend_slope(seen: StepObservation) -> Float[Tensor, "b"]:
    """d/d lambda of (1 - lambda) w_x l_x - lambda w_a l_a, as the paper's section 5.3 reads: UNBIASED, but for a loss
    that falls with lambda whatever the model does; the prior alone holds it below 1.
    """
    return -(seen.losses_retain + seen.losses_forget)


def closed_form(rms_retain: Float[Tensor, "..."], rms_forget: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """lambda* = c_a R_a / (c_x R_x + c_a R_a): the minimiser of M = (c_x R_x)^2 / (1 - lambda) + (c_a R_a)^2 / lambda.

    That is E||G||^2 where weights are one-hot and c_x, c_a constants; R is the root mean square of a sample's gradient
    norm; the arguments are c_x R_x and c_a R_a. One half where both are 0. Under a norm fix, with c_a = tau / ||g_a||,
    it minimises a surrogate: taken again and again it does not end at the least second moment of the step.
    """
    total = rms_retain + rms_forget
    return torch.where(total > 0, rms_forget / total, 0.5)


def kl_to_gaussian(mean: Tensor, std: Tensor, prior_mean: float, prior_std: float) -> Tensor:
    """KL(N(mean, std^2) || N(prior_mean, prior_std^2)) of the logit, in nats, in [0, inf)."""
    ratio = std / prior_std
    return ((mean - prior_mean).square() / prior_std**2 + ratio.square() - 1) / 2 - ratio.log()


def kl_to_uniform(mean: Tensor, std: Tensor, nodes: int = 32) -> Tensor:
    """KL of a Gaussian logit to the logit of a lambda that is uniform on [0, 1], in nats, by Gauss-Hermite quadrature.

    The logit of a uniform variable is standard logistic: log p(z) = -z - 2 log(1 + exp(-z)).
    """
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    z = mean[..., None] + std[..., None] * mean.new_tensor(points)
    log_prior = (-z - 2 * nn.functional.softplus(-z)) @ mean.new_tensor(weights / math.sqrt(2 * math.pi))
    entropy = std.log() + 0.5 * math.log(2 * math.pi * math.e)
    return -entropy - log_prior


class SeparateTerms(NamedTuple):
    """SISS's two terms, each on its own (`SISS.separate_terms`): the loss at the noisy x and that at the noisy a, as
    means over pixels, without importance weights; detached.
    """

    losses_retain: Float[Tensor, "b"]  # l_x
    losses_forget: Float[Tensor, "b"]  # l_a
    norms: Float[Tensor, "2"] | None  # ||grad l_x||, ||grad l_a|| of the batch, over the network's weights

    def of_batch(self) -> Float[Tensor, "n"]:
        """l_x, l_a, and with norms ||grad l_x||, ||grad l_a||."""
        losses = torch.stack([self.losses_retain.mean(), self.losses_forget.mean()])
        return losses if self.norms is None else torch.cat([losses, self.norms])


OBJECTIVES = {"pathwise": pathwise_slope, "variance": variance_slope, "blend": blend_slope}
