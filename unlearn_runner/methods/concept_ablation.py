"""Concept Ablation (ICCV 2023, 2303.13516): under the concept's prompt the network learns to predict as under an
anchor's, on pictures that the base draws under the anchor.

Released code (github.com/nupurkmr9/concept-ablation, diffusers/train.py): 200 pictures; the prediction under the anchor
is the trained network's own, without gradient; the denoising loss under the anchor's own prompt counts 1, on other
pictures of the same set, here on the same ones; keys and values of the cross-attention move
(model.network.trainable=cross_attention_kv).

# Notation (variable -> paper)
# cond, anchor -> c*, c;  x0 -> x, drawn under the anchor;  anchor_weight -> lambda of the regularisation
"""

from collections.abc import Callable
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn_runner.data.streams import Images
from unlearn_runner.methods.denoising import draw_noise
from unlearn_runner.methods.distillation.overrides import drawn_labels
from unlearn_runner.methods.method import Method, Setting, Update
from unlearn_runner.models.model import GenerativeModel, squared_error
from unlearn_runner.options import BatchSize, NonNegativeFloat, NumInferenceSteps
from unlearn_runner.rules import model_options
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


@final
class ConceptAblation(Method):
    """The step reads no image of the dataset.

    Args:
        batch_size: pictures in a step.
        anchor: the text that the forget prompts are to be read as.
        variant: "model": the target is the network's own prediction under the anchor (the paper's model-based loss);
            "noise": the noise itself, so that the anchor's pictures stand under the forget prompts (noise-based).
        anchor_weight: of the denoising loss of the same pictures under the anchor.
        num_images: pictures that the base draws under the anchor, before the first step.
        num_inference_steps: of drawing them by DDIM, with the model's guidance.
    """

    requires = ("noise", "prompts", "base")

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        batch_size: BatchSize,
        anchor: str = "",
        variant: Literal["model", "noise"] = "model",
        anchor_weight: NonNegativeFloat = 1.0,
        num_images: BatchSize = 200,
        num_inference_steps: NumInferenceSteps = 50,
    ):
        model = setting.model
        model_options.require_steps(num_inference_steps, model.num_train_timesteps, "method.num_inference_steps")
        self.reads = Streams(retain=None, forget=False)
        self.networks = (model,)
        self.trained, self.labels = model, setting.labels
        self.batch_size, self.anchor, self.by_model = batch_size, anchor, variant == "model"
        self.anchor_weight = anchor_weight
        self.num_images, self.num_inference_steps = num_images, num_inference_steps
        self.update = update(model)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    @torch.no_grad()
    def begin(self, images: Images | None) -> None:
        """A resumed run draws the same pictures again; its generator's state is restored afterwards."""
        self.condition = self.trained.embed([self.anchor])
        full, rest = divmod(self.num_images, self.batch_size)
        self.drawn = torch.cat([self._pictures(n) for n in [self.batch_size] * full + [rest] * (rest > 0)])

    def _pictures(self, n: int) -> Float[Tensor, "n ..."]:
        """Encoded."""
        cond = self.condition.expand(n, -1, -1)
        return self.trained.encode(self.trained.sample(n, cond, self.generator, self.num_inference_steps))

    def step(self, batch: Batch) -> Metrics:
        model, g = self.trained, self.generator

        # 1. noisy pictures of the anchor
        x0 = self.drawn[torch.randint(self.num_images, (self.batch_size,), generator=g, device=g.device)]
        timesteps, eps = draw_noise(model, x0, g)
        noising = model.noising(x0, timesteps, None)
        x_t = noising.sample(eps)

        # 2. the prediction under the anchor, and under a forget prompt
        under_anchor = model.predict(x_t, timesteps, self.condition.expand(self.batch_size, -1, -1))
        prediction = model.predict(x_t, timesteps, drawn_labels(self.labels.forget, self.batch_size, g, g.device))

        # 3. the losses and the update
        losses_anchor = model.loss(under_anchor, x0, x_t, eps, noising.std, timesteps) / model.num_entries
        if self.by_model:
            losses = squared_error(prediction, under_anchor.detach()) / model.num_entries
        else:
            losses = model.loss(prediction, x0, x_t, eps, noising.std, timesteps) / model.num_entries
        loss_forget, loss_anchor = losses.mean(), losses_anchor.mean()
        gradient = self.update.gradient(loss_forget + self.anchor_weight * loss_anchor)
        self.update.apply(gradient)
        return {
            "loss/forget": loss_forget.detach(),
            "loss/anchor": loss_anchor.detach(),
            "grad_norm/update": gradient.norm(),
        }

    def stateful(self) -> dict[str, Stateful]:
        return {**self.update.stateful(), "noise": GeneratorState(self.generator)}
