"""The VAE against torch.distributions and diffusers' folders."""

import copy

import pytest
import torch
from conftest import assert_same_bits, names
from torch.distributions import Normal

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.methods.denoising import denoising_loss
from unlearn_runner.models.vae import VAENetwork, build_vae

F64 = torch.float64


def batch(b=5, seed=0, image_shape=(1, 8, 8), latent=3, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    x0 = torch.rand(b, *image_shape, generator=g, dtype=dtype) * 2 - 1
    return x0, torch.zeros(b, dtype=torch.int64), torch.randn(b, latent, generator=g, dtype=dtype)


@pytest.mark.parametrize("num_labels", [10, None], ids=["conditional", "unconditional"])
@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 12, 8)])
def test_loss_is_the_negative_elbo_at_one_latent(tiny_vae, num_labels, image_shape):
    network = tiny_vae(image_shape, num_labels).double()
    network.vae.log_sigma.data.fill_(-0.7)
    x0, timesteps, eps = batch(image_shape=image_shape)
    labels = None if num_labels is None else torch.tensor([1, 1, 3, 0, 9])
    mean, std = network.vae.encode(x0, labels)
    z = mean + std * eps
    image = network.vae.decode(z, labels)
    log_q = Normal(mean, std).log_prob(z).sum(1)
    log_prior = Normal(0.0, 1.0).log_prob(z).sum(1)
    log_likelihood = Normal(image, torch.tensor(-0.7, dtype=F64).exp()).log_prob(x0).flatten(1).sum(1)
    losses = denoising_loss(network, x0, labels, timesteps, eps)
    torch.testing.assert_close(losses, log_q - log_prior - log_likelihood, rtol=1e-12, atol=1e-12)
    alone = denoising_loss(network, x0[:1], None if labels is None else labels[:1], timesteps[:1], eps[:1])
    torch.testing.assert_close(alone, losses[:1], rtol=1e-12, atol=1e-12)


def test_loss_about_another_image_takes_its_noise(tiny_vae):
    """As SISS asks: what z costs if it is a sample of an image that it was not made from."""
    network = tiny_vae(num_labels=None).double()
    x0, timesteps, eps = batch()
    other = x0.flip(0)
    own, foreign = (network.noising(images, timesteps, None) for images in (x0, other))
    z = own.sample(eps)
    foreign_eps = (z - foreign.center) / foreign.std
    prediction = network.predict(z, timesteps, None)
    found = network.loss(prediction, other, z, foreign_eps, foreign.std, timesteps)
    log_q = Normal(foreign.center, foreign.std).log_prob(z).sum(1)
    log_likelihood = Normal(prediction, 1.0).log_prob(other).flatten(1).sum(1)
    torch.testing.assert_close(found, log_q - Normal(0.0, 1.0).log_prob(z).sum(1) - log_likelihood)


def test_labels_reach_encoder_and_decoder(tiny_vae):
    network = tiny_vae()
    x0, timesteps, z = batch(2, dtype=torch.float32)
    a, b = (torch.full((2,), label) for label in (1, 7))
    assert not torch.equal(network.noising(x0, timesteps, a).center, network.noising(x0, timesteps, b).center)
    assert not torch.equal(network.predict(z, timesteps, a), network.predict(z, timesteps, b))


@pytest.mark.parametrize("num_labels", [10, None], ids=["conditional", "unconditional"])
def test_samples_are_the_decoders_means_of_the_prior(tiny_vae, num_labels):
    network = tiny_vae(num_labels=num_labels).train()
    labels = None if num_labels is None else torch.arange(5)
    images = network.sample(5, labels, torch.Generator().manual_seed(1), 25, batch_size=2)
    assert network.network_evaluations == 5, "one pass for each image, however many steps"
    assert network.training
    g = torch.Generator().manual_seed(1)
    parts = [
        network.vae.decode(torch.randn(len(rows), 3, generator=g), None if labels is None else labels[rows])
        for rows in torch.arange(5).split(2)
    ]
    assert torch.equal(images, torch.cat(parts).clamp(-1, 1))
    again = network.sample(5, labels, torch.Generator().manual_seed(1), 3, "ddpm", batch_size=2)
    assert torch.equal(images, again)


@pytest.mark.parametrize("num_labels", [10, None], ids=["conditional", "unconditional"])
def test_saved_folder_gives_the_same_bits(tiny_vae, tmp_path, num_labels):
    network = tiny_vae(num_labels=num_labels, seed=7)
    network.vae.log_sigma.data.fill_(-1.25)
    network.save(tmp_path)
    assert {path.name for path in (tmp_path / "vae").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    network_there = VAENetwork.from_pretrained(tmp_path, subfolder="vae")  # as docs/ tells
    labels = None if num_labels is None else torch.tensor([1, 1, 7, 7])
    z = torch.randn(4, network_there.config.latent_size, generator=torch.Generator().manual_seed(5))
    ours = network.sample(4, labels, torch.Generator().manual_seed(5), 1)
    assert torch.equal(network_there.decode(z, labels).clamp(-1, 1), ours)

    for source in (tmp_path, tmp_path / "vae"):
        loaded = build_vae((1, 8, 8), names(num_labels), 0, str(source))
        loaded.load(source)
        assert_same_bits(dict(loaded.state_dict()), dict(network.state_dict()))
        assert loaded.sample_shape == (3,)


def test_weights_come_from_the_seed_alone(tiny_vae):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = tiny_vae(seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    b, c = tiny_vae(seed=3), tiny_vae(seed=4)
    assert_same_bits(dict(a.state_dict()), dict(b.state_dict()))
    assert not all(torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))


def test_unlearning_may_move_the_decoder_only(tiny_vae):
    network = tiny_vae()
    copy_of_all = copy.deepcopy(network)
    network.freeze_for_unlearning()
    free = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert free == {name for name, _ in network.named_parameters() if name.startswith("vae.decoder.")}
    assert all(weight.requires_grad for weight in copy_of_all.parameters()), "base training moves all three parts"
    x0, timesteps, eps = batch(3, dtype=torch.float32)
    loss = denoising_loss(copy_of_all, x0, torch.tensor([1, 2, 3]), timesteps, eps).sum()
    gradients = torch.autograd.grad(loss, list(copy_of_all.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_refuses(tiny_vae, tiny_network, tmp_path):
    with pytest.raises(ConfigurationError, match="sides must divide by 4; the dataset's are 10 x 8"):
        tiny_vae(image_shape=(1, 10, 8))
    with pytest.raises(ConfigurationError, match=r"divide by norm_num_groups=4, got \[8, 6\]"):
        tiny_vae(block_out_channels=[8, 6])
    with pytest.raises(ConfigurationError, match="there is no such folder"):
        build_vae((1, 8, 8), tuple("0123456789"), 0, "./nowhere")
    with pytest.raises(ConfigurationError, match="expected 'auto', or a folder"):
        build_vae((1, 8, 8), tuple("0123456789"), 0, str(tmp_path))
    tiny_network().save(tmp_path / "ddpm")
    with pytest.raises(ConfigurationError, match="expected 'auto', or a folder"):
        build_vae((1, 8, 8), tuple("0123456789"), 0, str(tmp_path / "ddpm"))
    with pytest.raises(ConfigurationError, match="expected 'auto', or a folder"):
        build_vae((1, 8, 8), tuple("0123456789"), 0, str(tmp_path / "ddpm" / "unet"))
    tiny_vae(num_labels=None).save(tmp_path)
    with pytest.raises(ConfigurationError, match=r"no labels.*10 labels"):
        build_vae((1, 8, 8), tuple("0123456789"), 0, str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"\(1, 8, 8\) with no labels.*\(1, 16, 16\)"):
        build_vae((1, 16, 16), None, 0, str(tmp_path))
