"""Concept Ablation: what it draws, what its two losses teach, and that no image of the dataset is read."""

from functools import partial

import pytest
import torch
from pipelines import PROMPTS, tiny

from unlearn_runner.methods.concept_ablation import ConceptAblation
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.models.model import denoising_loss, squared_error
from unlearn_runner.spec import Labels
from unlearn_runner.types import Batch, make_generator

LABELS = Labels(retain=(0,), forget=(1, 2), names=PROMPTS, contents=(0, 1, 1))
NOTHING = Batch(None, None, None, None, 0.0)


def ablation(model, lr=3e-3, **settings):
    update = partial(Update, optimizer=partial(torch.optim.Adam, lr=lr))
    settings = {"batch_size": 8, "num_images": 12, "num_inference_steps": 3, **settings}
    method = ConceptAblation(Setting(model, make_generator(0, "method"), LABELS), update, **settings)
    method.begin(None)
    return method


def tuned(**more):
    model = tiny(seed=0, guidance_scale=2.0, **more)
    model.freeze_for_unlearning()
    return model


def test_pictures_are_the_bases_under_the_anchor():
    model = tuned()
    method = ablation(model, anchor=PROMPTS[0])
    drawn = model.sample(12, torch.zeros(12, dtype=torch.int64), make_generator(0, "method"), 3)
    torch.testing.assert_close(method.drawn, model.encode(drawn))
    assert torch.equal(ablation(model, anchor=PROMPTS[0]).drawn, method.drawn), "a resumed run draws the same again"


@pytest.mark.parametrize("anchor", [PROMPTS[0], ""])
def test_the_forget_prompts_come_to_be_answered_as_the_anchor(anchor):
    model = tuned()
    method = ablation(model, anchor=anchor, anchor_weight=0.0)
    z, t = method.drawn[:4], torch.full((4,), 500)
    x_t = model.noising(z, t, None).sample(torch.randn(z.shape, generator=torch.Generator().manual_seed(1)))

    def distance():
        with torch.no_grad():
            as_anchor = model.predict(x_t, t, method.condition.expand(4, -1, -1))
            return squared_error(model.predict(x_t, t, torch.tensor([1, 2, 1, 2])), as_anchor).mean().item()

    before = distance()
    for _ in range(60):
        metrics = method.step(NOTHING)
    assert distance() < 0.3 * before
    assert set(metrics) == {"loss/forget", "loss/anchor", "grad_norm/update"}


def test_noise_based_it_learns_the_anchors_pictures_under_the_forget_prompts():
    model = tuned(prediction_type="v_prediction")
    method = ablation(model, variant="noise", anchor=PROMPTS[0], anchor_weight=0.0)

    def cost(label):
        generator = torch.Generator().manual_seed(2)
        t, eps = torch.tensor([300, 500, 700]).repeat(4), torch.randn(method.drawn.shape, generator=generator)
        with torch.no_grad():
            return denoising_loss(model, method.drawn, torch.full((12,), label), t, eps).mean().item()

    before = cost(1), cost(2)
    for _ in range(60):
        method.step(NOTHING)
    assert cost(1) < 0.9 * before[0]
    assert cost(2) < 0.9 * before[1]


def test_anchor_weight_counts_the_anchors_own_loss():
    """Two steps from the same state, whose gradients differ by the anchor's."""
    gradients = []
    for weight in (0.0, 1.0, 3.0):
        method = ablation(tuned(), anchor_weight=weight)
        method.update.apply = gradients.append
        method.step(NOTHING)
    torch.testing.assert_close(gradients[2] - gradients[0], 3 * (gradients[1] - gradients[0]), rtol=1e-3, atol=1e-7)
    assert (gradients[1] - gradients[0]).norm() > 0
