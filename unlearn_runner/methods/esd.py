"""ESD: Erased Stable Diffusion (ICCV 2023, 2303.07345): the concept's prompt comes to mean what leads away from it.

# Notation (variable -> paper)
# prediction, concept, empty -> eps_theta(x_t, c, t), eps_theta*(x_t, c, t), eps_theta*(x_t, t)
# eta -> eta;  base -> theta*, the frozen network
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unlearn_runner.data.streams import Images
from unlearn_runner.methods.distillation.overrides import drawn_labels
from unlearn_runner.methods.method import Method, Setting, Update, copy_weights
from unlearn_runner.models.model import GenerativeModel, evaluating, squared_error
from unlearn_runner.models.path import ladder
from unlearn_runner.options import BatchSize, NumInferenceSteps, PositiveFloat
from unlearn_runner.rules import model_options
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


def esd_loss(
    prediction: Float[Tensor, "b c h w"],
    concept: Float[Tensor, "b c h w"],
    empty: Float[Tensor, "b c h w"],
    eta: float,
) -> Float[Tensor, "b"]:
    """||eps_theta(x_t, c, t) - [eps*(x_t, t) - eta (eps*(x_t, c, t) - eps*(x_t, t))]||^2 (2303.07345, section 4).

    Summed over the entries. The target is guidance with its sign turned. It is the same of predictions in v or in
    velocity, which are one combination of x_t and eps for all three. The released code's target,
    eps*(x_t, c, t) - 2 (eps*(x_t, c, t) - eps*(x_t, t)), is the one of eta 1.
    """
    return squared_error(prediction, empty - eta * (concept - empty))


@final
class ESD(Method):
    """Under a forget prompt, the network learns to predict what the base does when it is guided away from that prompt.

    Reads no image: x_t is what a network draws under the prompt, with its guidance, stopped on the way. Which weights
    move, the paper's ESD-x and ESD-u, says model.network.trainable.

    Args:
        batch_size: pictures in a step, all stopped at the same timestep, which is drawn anew.
        num_inference_steps: of a whole drawing by DDIM.
        eta: how far away; the paper's 1.
        drawn_by: "trained": the network of today draws x_t, as in the paper; "base": as in its code as it is released
            today (github.com/rohitgandikota/erasing, esd_sd.py), with guidance 3.
    """

    requires = ("noise", "prompts", "base")

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        batch_size: BatchSize,
        num_inference_steps: NumInferenceSteps = 50,
        eta: PositiveFloat = 1.0,
        drawn_by: Literal["trained", "base"] = "trained",
    ):
        model = setting.model
        model_options.require_steps(num_inference_steps, model.num_train_timesteps, "method.num_inference_steps")
        self.reads = Streams(retain=None, forget=False)
        self.trained, self.labels = model, setting.labels
        self.batch_size, self.eta = batch_size, eta
        self.times = ladder(model.num_train_timesteps, num_inference_steps)
        self.update = update(model)
        self.base = copy.deepcopy(model).requires_grad_(False)
        self.networks = (model, self.base)
        self.drawing = model if drawn_by == "trained" else self.base
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def begin(self, images: Images | None) -> None:
        copy_weights(self.base, self.trained)

    def step(self, batch: Batch) -> Metrics:
        model, g = self.trained, self.generator

        # 1. x_t as it is drawn under the prompt, stopped at a random timestep
        labels = drawn_labels(self.labels.forget, self.batch_size, g, g.device)
        stop = int(torch.randint(len(self.times) - 1, (1,), generator=g, device=g.device))
        x_t, t = self._drawn_until(stop, labels)

        # 2. what the base predicts under the prompt and under none
        with torch.no_grad():
            concept, empty = (self.base.predict(x_t, t, cond) for cond in (labels, torch.full_like(labels, -1)))

        # 3. the network's own prediction under the prompt, and the update
        losses = esd_loss(model.predict(x_t, t, labels), concept, empty, self.eta)
        loss = losses.mean() / model.num_entries
        gradient = self.update.gradient(loss)
        self.update.apply(gradient)
        return {"loss/forget": loss.detach(), "grad_norm/forget": gradient.norm()}

    @torch.no_grad()
    def _drawn_until(
        self, stop: int, labels: Int64[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b c h w"], Int64[Tensor, "b"]]:
        """x_t after `stop` steps of DDIM from pure noise, and its t."""
        g, model = self.generator, self.drawing
        x = torch.randn((len(labels), *model.sample_shape), generator=g, device=g.device)
        times = self.times.to(g.device)[:, None].expand(-1, len(labels))
        with evaluating(model):
            for t, t_next in pairwise(times[: stop + 1]):
                x = model.path.step(x, model.guided(x, t, labels), t, t_next, eta=0.0).mean
        return x, times[stop]

    def stateful(self) -> dict[str, Stateful]:
        return {**self.update.stateful(), "noise": GeneratorState(self.generator)}
