"""Relearning counts steps until the probe finds the content again, and leaves the model alone."""

from functools import partial

import pytest
import torch
from conftest import assert_same_bits
from pipelines import tiny

from unlearn_runner.data.streams import to_unit_range
from unlearn_runner.methods.method import Update
from unlearn_runner.training.relearning import Relearning

UPDATE = partial(Update, optimizer=partial(torch.optim.AdamW, lr=1e-3))


def test_relearning_trains_a_copy_until_the_content_is_back(digits, tiny_network):
    network = tiny_network(image_shape=(1, 16, 16)).requires_grad_(False)
    start = {name: weight.clone() for name, weight in network.state_dict().items()}
    seen = []

    def probe(model):
        pairs = zip(model.parameters(), network.parameters(), strict=True)
        moved = sum(float((a - b).detach().abs().sum()) for a, b in pairs)
        seen.append(moved)
        return 0.1 * (len(seen) - 1)

    scores = Relearning(UPDATE, max_steps=9, every=2, batch_size=4, threshold=0.5)(network, digits, probe, 0.4)
    assert scores["relearn_steps"] == 4.0
    assert scores["relearn_reached"] == 1.0
    assert scores["per_step/relearn_forget_rate/2"] == pytest.approx(0.1)
    assert seen[0] == 0
    assert seen[0] < seen[1] < seen[2]
    assert_same_bits(dict(network.state_dict()), start)


def test_relearning_says_when_it_did_not_come_back(digits, tiny_network):
    network = tiny_network(image_shape=(1, 16, 16))
    scores = Relearning(UPDATE, max_steps=3, every=2, batch_size=4)(network, digits, lambda _: 0.0, 0.0)
    assert (scores["relearn_steps"], scores["relearn_reached"]) == (3.0, 0.0)
    assert {key for key in scores if key.startswith("per_step")} == {
        f"per_step/relearn_forget_rate/{step}" for step in (0, 2, 3)
    }


def test_a_latent_model_relearns_by_the_loss_of_latents(digits):
    network = tiny(prompts=tuple(f"the digit {number}" for number in range(10)), image_shape=(1, 16, 16))
    network.freeze_for_unlearning()
    network.requires_grad_(False)
    start = {name: weight.clone() for name, weight in network.state_dict().items()}
    moved = []

    def probe(model):
        weights = model.state_dict()
        moved.append({name.split(".")[1] for name, weight in start.items() if not torch.equal(weight, weights[name])})
        return 0.0

    scores = Relearning(UPDATE, max_steps=2, every=1, batch_size=4)(network, digits, probe, 0.4)
    assert (scores["relearn_steps"], scores["relearn_reached"]) == (2.0, 0.0)
    assert moved == [set(), {"unet"}, {"unet"}], "images reach neither the autoencoder nor the text encoder"
    assert_same_bits(dict(network.state_dict()), start)


def test_benign_relearning_sees_what_was_kept(digits, tiny_network, monkeypatch):
    from unlearn_runner.methods.denoising import Denoising

    seen = []

    def step(self, batch):
        seen.append(batch.x0_retain)
        return {}

    monkeypatch.setattr(Denoising, "step", step)
    network = tiny_network(image_shape=(1, 16, 16))
    for images in ("forget", "retain"):
        seen.clear()
        Relearning(UPDATE, images, max_steps=3, every=3, batch_size=8)(network, digits, lambda _: 0.0, 0.4)
        known = {image.tobytes() for image in to_unit_range(getattr(digits, images).pixels).numpy()}
        assert all(image.numpy().tobytes() in known for batch in seen for image in batch), images
