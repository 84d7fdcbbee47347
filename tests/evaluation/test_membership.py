"""The membership attack on losses whose prediction is known."""

import pytest
import torch
from no_samples import NO_SAMPLES
from pipelines import tiny

from unlearn_runner.evaluation.likelihood import NLL
from unlearn_runner.evaluation.membership import Membership, attack, losses_at
from unlearn_runner.evaluation.metrics import first_distinct
from unlearn_runner.evaluation.view import View
from unlearn_runner.models.model import denoising_loss, squared_error
from unlearn_runner.models.one_step import OneStep
from unlearn_runner.types import make_generator


def test_attack_on_known_losses():
    low, high = torch.arange(50.0), torch.arange(50.0) + 100
    assert attack(low, high, 0.01) == (1.0, 1.0)
    assert attack(high, low, 0.01) == (0.0, 0.0)
    assert attack(low, low, 0.01)[0] == 0.5
    # Two of four members lie below all others, one above one of 100 others, one above half of them.
    members, others = torch.tensor([-2.0, -1.0, 0.5, 49.5]), torch.arange(100.0)
    auc, rate = attack(members, others, 0.01)
    assert auc == pytest.approx((1 + 1 + 0.99 + 0.5) / 4)
    assert rate == 0.75


def test_losses_are_the_denoising_loss(tiny_network):
    network = tiny_network().train()
    x0, timesteps = torch.rand(3, 1, 8, 8) * 2 - 1, torch.tensor([10, 500])
    eps, cond = torch.randn(2, 3, 1, 8, 8), torch.tensor([1, 2, 3])
    table = losses_at(network, x0, cond, timesteps, eps)
    for column, t in enumerate(timesteps):
        gamma, sigma = network.path.amplitudes(t.expand(3))
        prediction = network.predict(gamma * x0 + sigma * eps[column], t.expand(3), cond)
        assert torch.allclose(table[:, column], squared_error(prediction, eps[column]) / 64, atol=1e-6)


def test_a_memorising_model_is_caught(digits, tiny_network):
    """A network that was trained on eight of the forget images knows them from the unseen ones."""
    few = digits.forget.select(torch.arange(8))
    data = digits.__class__(digits.spec, few, digits.retain, digits.forget_test, digits.retain_test)
    network = tiny_network(image_shape=(1, 16, 16), block_out_channels=[16, 16])
    metric = Membership(num_images=8, timesteps=[100, 300])
    before = metric.score(NO_SAMPLES, metric.measure(View(network, data)))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    g = torch.Generator().manual_seed(0)
    x0 = few.pixels.float() / 127.5 - 1
    for _ in range(150):
        t, eps = torch.randint(500, (8,), generator=g), torch.randn(x0.shape, generator=g)
        gamma, sigma = network.path.amplitudes(t)
        loss = (network.predict(gamma * x0 + sigma * eps, t, few.labels) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = metric.measure(View(network, data))
    after = metric.score(NO_SAMPLES, rows)
    assert after["mia_auc"] > max(0.6, before["mia_auc"])
    assert {"mia_tpr_at_1pct_fpr", "per_timestep/mia_loss_forget/100", "per_timestep/mia_auc/300"} <= set(after)
    assert metric.score(NO_SAMPLES, metric.measure(View(network, data))) == after
    assert metric.score(NO_SAMPLES, {"forget": rows["forget"]}) == {}, "nothing held out, nothing to tell"


def test_a_memorising_vae_is_caught(digits, tiny_vae):
    few = digits.forget.select(torch.arange(8))
    data = digits.__class__(digits.spec, few, digits.retain, digits.forget_test, digits.retain_test)
    network = tiny_vae(image_shape=(1, 16, 16), block_out_channels=[8, 8])
    metric = Membership(num_images=8, num_draws=4)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    g = torch.Generator().manual_seed(0)
    x0, timesteps = few.pixels.float() / 127.5 - 1, torch.zeros(8, dtype=torch.int64)
    for _ in range(120):
        loss = denoising_loss(network, x0, few.labels, timesteps, torch.randn(8, 3, generator=g)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = metric.measure(View(network, data))
    assert rows["forget"].shape == (8,)
    scores = metric.score(NO_SAMPLES, rows)
    assert set(scores) == {"mia_auc", "mia_tpr_at_1pct_fpr"}, "it has no timesteps"
    assert scores["mia_auc"] > 0.8
    assert metric.score(NO_SAMPLES, metric.measure(View(network, data))) == scores
    generator = make_generator(0, "membership/forget")
    eps = torch.randn(4, 8, 3, generator=generator)
    chosen = first_distinct(few, 8, 0)
    x0 = chosen.pixels.float() / 127.5 - 1
    with torch.no_grad():
        wanted = [denoising_loss(network, x0, chosen.labels, timesteps, noise) for noise in eps]
    torch.testing.assert_close(rows["forget"], torch.stack(wanted).mean(0))


def test_a_latent_model_is_asked_by_its_own_loss_and_has_no_likelihood(digits):
    network = tiny(prompts=tuple(f"the digit {number}" for number in range(10)), image_shape=(1, 16, 16)).train()
    metric, likelihood = Membership(num_images=6, timesteps=[100, 900], batch_size=4), NLL()
    view = View(network, digits)
    assert not view.lacks(metric.needs)
    assert view.lacks(likelihood.needs) == ["likelihood"]
    rows = metric.measure(view)
    assert {name: tuple(part.shape) for name, part in rows.items()} == {"forget": (6, 2), "unseen": (6, 2)}
    assert 0 <= metric.score(NO_SAMPLES, rows)["mia_auc"] <= 1

    generator, chosen = (
        make_generator(0, "membership/forget"),
        first_distinct(digits.forget, 6, 0).select(torch.arange(4)),
    )
    x0, timesteps = chosen.pixels.float() / 127.5 - 1, torch.tensor([100, 900])
    eps = torch.randn((2, 4, *network.sample_shape), generator=generator)
    network.eval()
    for column, t in enumerate(timesteps):
        with torch.no_grad():
            wanted = denoising_loss(network, x0, chosen.labels, t.expand(4), eps[column]) / network.num_entries
        torch.testing.assert_close(rows["forget"][:4, column], wanted)


def test_who_can_be_asked(digits, tiny_network, tiny_vae):
    generator = OneStep(tiny_network(), 900)
    for metric, asked in ((Membership(), (True, True, False)), (NLL(), (True, True, False))):
        assert (
            tuple(not View(model, digits).lacks(metric.needs) for model in (tiny_network(), tiny_vae(), generator))
            == asked
        )
