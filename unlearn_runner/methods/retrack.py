"""ReTrack: forget images redirected towards the retained images nearest to them (2509.13007)."""

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from unlearn_runner.data.streams import Images
from unlearn_runner.methods.denoising import draw_noise, drawn_loss
from unlearn_runner.methods.method import Method, Setting, Update
from unlearn_runner.methods.retained_images import retained_images
from unlearn_runner.models.model import GenerativeModel, Noising
from unlearn_runner.options import PositiveInt, UnitInterval
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


@final
class ReTrack(Method):
    """Redirects the denoising trajectory of each forget image towards the retained images nearest to it (2509.13007).

    As in its code (github.com/sqt24/ReTrack, retrack/methods.py), but for one thing: there the loss is the posterior's
    mean of squared distances to each of the k noises, here the squared distance to their mean. The difference does not
    depend on the network. Under conditions, which the paper's models of pixels have not, the nearest are sought among
    the images of the forget condition, or among all if it has none.

    Args:
        lambd: weight of the forget term, 1 - lambd that of the retain term, each on a batch of its own. The code has
            0.005 on MNIST, 0.02 on CIFAR-10, 0.5 on Stable Diffusion.
        k: how many retained images, the nearest to the forget image without noise.
    """

    requires = ("images", "noise")

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        lambd: UnitInterval = 0.02,
        k: PositiveInt = 10,
    ):
        self.reads = Streams(retain="retain", forget=True)
        self.networks = (setting.model,)
        self.trained, self.labels = setting.model, setting.labels
        self.lambd, self.k = lambd, k
        self.update = update(setting.model)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def begin(self, images: Images | None) -> None:
        self.retained = retained_images(self.trained, images, self.labels, "all", self.generator)

    def step(self, batch: Batch) -> Metrics:
        model, g = self.trained, self.generator

        # 1. retain images as they are
        losses_retain = drawn_loss(model, batch.x0_retain, batch.cond_retain, g) / model.num_entries

        # 2. noisy forget images, and the mean of their neighbours
        timesteps, eps = draw_noise(model, batch.x0_forget, g)
        with torch.no_grad():
            x0 = model.encode(batch.x0_forget)
            noising = model.noising(x0, timesteps, batch.cond_forget)
            m = noising.sample(eps)
            weights = self._weights(m, noising, x0, batch.cond_forget)
            target = self.retained.mean(weights, x0)
            eps = (m - noising.scale * target) / noising.std
        prediction = model.predict(m, timesteps, batch.cond_forget)
        losses_forget = model.loss(prediction, target, m, eps, noising.std, timesteps) / model.num_entries

        # 3. the update
        loss_retain, loss_forget = losses_retain.mean(), losses_forget.mean()
        gradient = self.update.gradient(self.lambd * loss_forget + (1 - self.lambd) * loss_retain)
        self.update.apply(gradient)
        return {
            "loss/retain": loss_retain.detach(),
            "loss/forget": loss_forget.detach(),
            "grad_norm/update": gradient.norm(),
        }

    def _weights(
        self, m: Float[Tensor, "b ..."], noising: Noising, x0: Float[Tensor, "b ..."], cond: Shaped[Tensor, "b"] | None
    ) -> Float[Tensor, "b n"]:
        """p(x_i | m) of the k images nearest to each x0, 0 of the others."""
        near = _largest(self.retained.nearness(x0, cond), self.k)
        return self.retained.log_densities(m, noising, cond).masked_fill(~near, -torch.inf).softmax(1)

    def stateful(self) -> dict[str, Stateful]:
        return {**self.update.stateful(), "noise": GeneratorState(self.generator)}


def _largest(values: Float[Tensor, "b n"], k: int) -> Bool[Tensor, "b n"]:
    """The k largest of each row, but none that is -inf."""
    rows = values.topk(min(k, values.shape[1]), dim=1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, rows, True) & values.isfinite()
