"""The DDPM wrapper against diffusers."""

import functools

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.attention import ChannelsFirstProcessor, attend
from unlearn_runner.models.ddpm import build_ddpm, ddpm
from unlearn_runner.models.sampling import sampling_scheduler


def test_noising_is_the_schedulers(tiny_network):
    network = tiny_network()
    x0, eps = torch.randn(2, 5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 10, 500, 900, 999])
    gamma, sigma = network.path.amplitudes(timesteps)
    torch.testing.assert_close(gamma * x0 + sigma * eps, network.scheduler.add_noise(x0, eps, timesteps))


def test_targets(tiny_network):
    x0, eps = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([1, 300, 999])
    assert torch.equal(tiny_network().path.wanted(x0, eps, timesteps), eps)
    v = tiny_network(prediction_type="v_prediction")
    torch.testing.assert_close(v.path.wanted(x0, eps, timesteps), v.scheduler.get_velocity(x0, eps, timesteps))


def assert_draws_as(pipeline, ours):
    """To the bit with our attention, and up to rounding with diffusers'."""

    def draw():
        return pipeline(3, torch.Generator().manual_seed(5), num_inference_steps=7, output_type="pt").images

    ours = (ours / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(draw(), ours, rtol=0, atol=1e-5)
    attend(pipeline.unet, ChannelsFirstProcessor())
    assert torch.equal(draw(), ours)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_saved_pipeline_draws_the_same_images(tiny_network, tmp_path, prediction_type):
    network = tiny_network(num_labels=None, prediction_type=prediction_type)
    network.save(tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert_draws_as(pipeline, network.sample(3, None, torch.Generator().manual_seed(5), 7, "ddpm"))


def test_saved_conditional_pipeline_draws_the_same_images(tiny_network, tmp_path):
    network = tiny_network()
    network.save(tmp_path)
    labels = torch.tensor([4, 1, 9])
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.forward = functools.partial(pipeline.unet.forward, class_labels=labels)  # as docs/ tells
    assert_draws_as(pipeline, network.sample(3, labels, torch.Generator().manual_seed(5), 7, "ddpm"))


def test_ddim_is_deterministic_and_starts_at_the_last_timestep(tiny_network):
    network = tiny_network()
    labels = torch.zeros(4, dtype=torch.int64)
    a, b = (network.sample(4, labels, torch.Generator().manual_seed(1), 5) for _ in range(2))
    assert torch.equal(a, b)
    assert a.min() >= -1
    assert a.max() <= 1
    assert sampling_scheduler(network.scheduler.config, "ddim", 5).timesteps[0] == 999


@torch.no_grad()
def test_clipped_ddim_goes_on_with_the_noise_that_leads_to_the_clipped_picture(tiny_network):
    network, labels = tiny_network(), torch.arange(4)
    x = torch.randn(4, *network.image_shape, generator=torch.Generator().manual_seed(1))
    times = sampling_scheduler(network.scheduler.config, "ddim", 5).timesteps
    clipped = False
    for t, after in zip(times, [*times[1:], None], strict=True):
        gamma, sigma = network.path.amplitudes(t.expand(4))
        x0 = (x - sigma * network.predict(x, t.expand(4), labels)) / gamma
        clipped |= bool((x0.abs() > 1).any())
        x0 = x0.clamp(-1, 1)
        gamma_next, sigma_next = (1, 0) if after is None else network.path.amplitudes(after.expand(4))
        x = gamma_next * x0 + sigma_next * (x - gamma * x0) / sigma
    ours, plain = (network.sample(4, labels, torch.Generator().manual_seed(1), 5, s) for s in ("ddim_clipped", "ddim"))
    assert clipped
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    assert (plain - x).abs().max() > 0.01


def test_batches_share_nothing_but_the_generator(tiny_network):
    network = tiny_network()
    generator = torch.Generator().manual_seed(1)
    whole = network.sample(5, torch.arange(5), generator, 3, batch_size=2)
    generator.manual_seed(1)
    parts = [network.sample(len(part), part, generator, 3) for part in torch.arange(5).split(2)]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_sampling_counts_and_leaves_training_mode(tiny_network):
    network = tiny_network().train()
    network.sample(4, torch.zeros(4, dtype=torch.int64), torch.Generator(), 5)
    assert network.network_evaluations == 20
    assert network.backbone.unet.training


def test_weights_come_from_the_seed_alone(tiny_network):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = tiny_network(seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    b, c = tiny_network(seed=3), tiny_network(seed=4)
    same = [torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))


@pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "network alone"])
def test_weights_from_a_folder(tiny_network, tmp_path, pipeline, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    source = tiny_network(seed=7)
    source.save(tmp_path) if pipeline else (
        source.backbone.unet.save_pretrained(tmp_path), source.scheduler.save_pretrained(tmp_path)
    )  # fmt: skip
    loaded = build_ddpm((1, 8, 8), tuple("0123456789"), 0, f"~/{tmp_path.name}", [1], [False])
    loaded.load(tmp_path)
    for x, y in zip(source.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(x, y)


def test_refuses(tiny_network, tmp_path):
    with pytest.raises(ConfigurationError, match="must divide by 2"):
        tiny_network(image_shape=(1, 9, 9))
    with pytest.raises(ConfigurationError, match="one entry for each"):
        tiny_network(attention=[False])
    with pytest.raises(ConfigurationError, match="there is no such folder"):
        build_ddpm((1, 8, 8), tuple("0123456789"), 0, "./nowhere", [8], [False])
    with pytest.raises(ConfigurationError, match="expected 'auto', a folder"):
        build_ddpm((1, 8, 8), tuple("0123456789"), 0, str(tmp_path), [8], [False])
    tiny_network(num_labels=None).save(tmp_path)
    with pytest.raises(ConfigurationError, match=r"no labels.*10 labels"):
        build_ddpm((1, 8, 8), tuple("0123456789"), 0, str(tmp_path), [8], [False])
    with pytest.raises(ConfigurationError, match="prediction_type"):
        ddpm(tiny_network().backbone.unet, DDPMScheduler(prediction_type="sample"))


def test_an_option_that_the_weights_contradict_is_refused(tiny_network, tmp_path):
    tiny_network(prediction_type="v_prediction").save(tmp_path)

    def build(prediction_type):
        return build_ddpm(
            (1, 8, 8), tuple("0123456789"), 0, str(tmp_path), [8], [False], prediction_type=prediction_type
        )

    for fine in ("epsilon", "v_prediction"):  # the default says nothing
        assert build(fine).path.prediction_type == "v_prediction"
    with pytest.raises(
        ConfigurationError, match=r"prediction_type=flow: model.weights=.* predicts v_prediction, by its"
    ):
        build("flow")
