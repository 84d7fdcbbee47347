"""SalUn: saliency unlearning (ICLR 2024, 2310.12508). A forget image is denoised as if it stood under another
condition, and only the weights that matter most to it move.

Released code (github.com/OPTML-Group/Unlearn-Saliency, DDPM/runners/diffusion.py and SD/train-scripts): the other
condition is always the next class; alpha is 1e-3 for DDPM, of a retain loss summed over 3,072 entries, that is about 3
in means, and 0.5 for Stable Diffusion, in means; half of the weights move. There the gradient is cut before the mask,
here after it.

# Notation (variable -> paper)
# losses_retain -> l_MSE(theta_u; D_r);  other -> c' != c;  retain_weight -> alpha
# keep, share -> m_S = 1(|gradient| >= gamma), where gamma leaves this share of the weights
"""

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.data.streams import ImageSet
from unlearn_runner.distributed import averaged
from unlearn_runner.gradients import as_vector, gradients
from unlearn_runner.methods.denoising import draw_noise, drawn_loss
from unlearn_runner.methods.distillation.overrides import Override, OverrideBatch
from unlearn_runner.methods.method import Method, Setting, Update
from unlearn_runner.models.model import DiffusionModel, GenerativeModel, squared_error
from unlearn_runner.options import NonNegativeFloat
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams, make_generator

DRAWS = 1024  # noisy forget images that saliency is measured on, at least
PART = 32  # of which so many at once


def relabelled_loss(
    model: DiffusionModel,
    x_t: Float[Tensor, "b c h w"],
    timesteps: Int64[Tensor, "b"],
    cond: Shaped[Tensor, "b ..."],
    other: Shaped[Tensor, "b ..."],
) -> Float[Tensor, "b"]:
    """||eps(x_t | c) - eps(x_t | c')||^2, summed over the entries; the second without gradient (2310.12508, equation 6;
    also the model-based loss of Concept Ablation, 2303.13516, equation 6, where c' is the anchor).
    """
    with torch.no_grad():
        target = model.predict(x_t, timesteps, other)
    return squared_error(model.predict(x_t, timesteps, cond), target)


def salient(model: GenerativeModel, images: ImageSet, share: float) -> Bool[Tensor, "p"]:
    """Which of the trainable weights have the largest denoising gradient over these images, in absolute value; so large
    a share of all, but none whose gradient is 0 (2310.12508, equation 3).

    The gradient is a sum over the set, as in the released code: each image with a t and eps of its own, as often as
    makes `DRAWS` of them.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    generator = make_generator(0, "saliency", weights[0].device)
    rows = torch.arange(len(images)).repeat(-(-DRAWS // len(images)))
    total = None
    for part in rows.split(PART):
        x0, cond = images.take(part)
        loss = drawn_loss(model, x0.to(weights[0].dtype), cond, generator).sum()
        gradient = averaged(as_vector(gradients(loss, weights), weights))
        total = gradient if total is None else total + gradient
    size = total.abs()
    least = size.kthvalue(len(size) - max(1, round(share * len(size))) + 1).values
    return (size >= least) & (size > 0)


@final
class SalUn(Method):
    """The prediction at a noisy forget image is to be the network's own under another condition; the retain images keep
    their denoising loss. Which weights move says `method.update.saliency`.

    Args:
        override: which kept label takes the forgotten one's place, for each sample. In the paper any other.
        retain_weight: alpha, of the retain loss. Both losses are means over the entries.
    """

    requires = ("noise", "labels")

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        override: Callable[..., Override],
        retain_weight: NonNegativeFloat = 1.0,
    ):
        self.reads = Streams(retain="retain", forget=True)
        self.networks = (setting.model,)
        self.trained = setting.model
        self.override = override(setting.labels)
        self.retain_weight = retain_weight
        self.update = update(setting.model)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def step(self, batch: Batch) -> Metrics:
        model, g, cond = self.trained, self.generator, batch.cond_forget

        # 1. retain images as they are
        losses_retain = drawn_loss(model, batch.x0_retain, batch.cond_retain, g) / model.num_entries

        # 2. noisy forget images, and the prediction under another condition
        timesteps, eps = draw_noise(model, batch.x0_forget, g)
        x_t = model.noising(batch.x0_forget, timesteps, cond).sample(eps)
        other = self.override(OverrideBatch(batch.x0_forget, cond, model, g))
        losses_forget = relabelled_loss(model, x_t, timesteps, cond, other) / model.num_entries

        # 3. the update
        loss_retain, loss_forget = losses_retain.mean(), losses_forget.mean()
        gradient = self.update.gradient(loss_forget + self.retain_weight * loss_retain)
        self.update.apply(gradient)
        return {
            "loss/retain": loss_retain.detach(),
            "loss/forget": loss_forget.detach(),
            "grad_norm/update": gradient.norm(),
        }

    def stateful(self) -> dict[str, Stateful]:
        return {**self.update.stateful(), "noise": GeneratorState(self.generator)}
