"""Erased Stable Diffusion: its target, where its noisy pictures come from, and what it refuses."""

from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler
from pipelines import PROMPTS, tiny

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.methods.esd import ESD, esd_loss
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.models.model import evaluating
from unlearn_runner.models.sampling import denoise
from unlearn_runner.spec import Labels
from unlearn_runner.types import Batch, make_generator

LABELS = Labels(retain=(0,), forget=(1, 2), names=PROMPTS, contents=(0, 1, 1))
NOTHING = Batch(None, None, None, None, 0.0)


def esd(model, lr=1e-3, batch_size=3, **settings):
    update = partial(Update, optimizer=partial(torch.optim.Adam, lr=lr))
    return ESD(Setting(model, make_generator(0, "method"), LABELS), update, batch_size, **settings)


def tuned(seed=0, **more):
    model = tiny(seed=seed, guidance_scale=2.0, **more)
    model.freeze_for_unlearning()
    return model


def test_loss_by_hand():
    prediction, concept, empty = (torch.tensor([[[part]]]) for part in ([1.0, 0.0], [3.0, 1.0], [2.0, 1.0]))
    assert esd_loss(prediction, concept, empty, 1.0).item() == 0.0 + 1.0
    assert esd_loss(prediction, concept, empty, 2.0).item() == 1.0 + 1.0


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_target_in_v_is_the_target_in_noise(eta):
    """The three predictions have x_t in common, so the same combination of them is the same noise."""
    model = tuned(prediction_type="v_prediction")
    z, t = torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([300, 700])
    labels = torch.tensor([1, 2])
    with torch.no_grad():
        concept, empty = (model.predict(z, t, cond) for cond in (labels, torch.full_like(labels, -1)))
        in_noise = [model.path.noise_of(part, z, t) for part in (concept, empty)]
    wanted = in_noise[1] - eta * (in_noise[0] - in_noise[1])
    found = model.path.noise_of(empty - eta * (concept - empty), z, t)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("stop", [0, 2, 4])
def test_noisy_pictures_are_those_of_the_sampler(stop):
    model = tuned()
    method = esd(model, num_inference_steps=5)
    labels = torch.tensor([1, 2, 1])
    x_t, t = method._drawn_until(stop, labels)
    z = torch.randn((3, *model.sample_shape), generator=make_generator(0, "method"))
    scheduler = DDIMScheduler.from_config(model.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(5)
    assert t.tolist() == [scheduler.timesteps[stop]] * 3
    scheduler.timesteps = scheduler.timesteps[:stop]
    with torch.no_grad(), evaluating(model):
        torch.testing.assert_close(x_t, denoise(model, scheduler, z, labels, torch.Generator()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drawn_by", ["trained", "base"])
def test_which_network_draws(drawn_by):
    """Once the trained one has moved, the base still draws what it drew."""
    model = tuned()
    method = esd(model, lr=1e-2, num_inference_steps=5, drawn_by=drawn_by)
    state = method.generator.get_state()
    before, _ = method._drawn_until(4, torch.tensor([1, 2, 1]))
    method.step(NOTHING)
    method.generator.set_state(state)
    after, _ = method._drawn_until(4, torch.tensor([1, 2, 1]))
    assert torch.equal(before, after) == (drawn_by == "base")


def test_it_learns_to_answer_as_guided_away_and_spares_the_base():
    model = tuned()
    method = esd(model, lr=3e-3, num_inference_steps=3)
    method.step(NOTHING)
    start = {name: weight.clone() for name, weight in method.base.state_dict().items()}
    x_t, t = torch.randn(4, *model.sample_shape, generator=torch.Generator().manual_seed(1)), torch.full((4,), 500)
    labels, none = torch.tensor([1, 2, 1, 2]), torch.full((4,), -1)

    def distance():
        with torch.no_grad():
            concept, empty = (method.base.predict(x_t, t, cond) for cond in (labels, none))
            return esd_loss(model.predict(x_t, t, labels), concept, empty, 1.0).mean().item()

    before = distance()
    for _ in range(60):
        metrics = method.step(NOTHING)
    assert distance() < 0.5 * before
    assert metrics["loss/forget"] > 0
    assert all(torch.equal(weight, start[name]) for name, weight in method.base.state_dict().items())
    # once a step under the prompt, twice by the base, and twice (guidance) each step of the drawing
    assert method.base.network_evaluations == 2 * 3 * 61 + 16


def test_what_it_refuses():
    with pytest.raises(ConfigurationError, match=r"must be at most 1000, .*; got 1001"):
        esd(tuned(), num_inference_steps=1001)
