"""Denoising, NegGrad, EraseDiff and the update they share."""

import pytest
import torch

from unlearn_runner.methods.denoising import Denoising, denoising_loss, draw_noise, drawn_loss
from unlearn_runner.methods.erase_diff import EraseDiff, combine, erase_diff_loss
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.methods.neg_grad import NegGrad, neg_grad_loss
from unlearn_runner.models.model import squared_error
from unlearn_runner.types import Batch, make_generator


def sgd(model, **settings):
    return Update(model, lambda weights: torch.optim.SGD(weights, lr=0.01), **settings)


def batch(b=16):
    x = torch.rand(2, b, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return Batch(x[0], x[1], torch.arange(b) % 10, torch.ones(b, dtype=torch.int64), 0.1)


def test_losses_golden_values():
    prediction = torch.tensor([[1.0, 3.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    target = torch.tensor([[0.0, 1.0], [2.0, 0.0]]).view(2, 1, 1, 2)
    assert squared_error(prediction, target).tolist() == [5.0, 4.0]
    assert neg_grad_loss(squared_error(prediction, target)).item() == pytest.approx(-9 / 2)
    assert erase_diff_loss(prediction, target).item() == pytest.approx(9 / 2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_denoising_loss_is_the_published_one(tiny_network, prediction_type):
    """||eps_theta(gamma x0 + sigma eps, t) - eps||^2, or the same of v, with diffusers' own noising and targets."""
    network, images = tiny_network(prediction_type=prediction_type), batch()
    timesteps = torch.arange(16) * 60
    eps = torch.randn(images.x0_retain.shape, generator=torch.Generator().manual_seed(1))
    found = denoising_loss(network, images.x0_retain, images.cond_retain, timesteps, eps)
    x_t = network.scheduler.add_noise(images.x0_retain, eps, timesteps)
    velocity = network.scheduler.get_velocity(images.x0_retain, eps, timesteps)
    answer = network.backbone.unet(x_t, timesteps, class_labels=images.cond_retain).sample
    target = eps if prediction_type == "epsilon" else velocity
    torch.testing.assert_close(found, ((answer - target) ** 2).sum((1, 2, 3)), rtol=1e-4, atol=1e-4)


def test_erase_diff_direction():
    g_r, g_f = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert combine(g_r, g_f, 0.1).tolist() == pytest.approx([1.0, 0.2])
    along = torch.tensor([4.0, 0.0])  # <g_r, g_f> / ||g_f||^2 = 0.25 > eta: erasing comes by itself
    assert combine(g_r, along, 0.1).tolist() == [1.0, 0.0]
    against = torch.tensor([-1.0, 0.0])
    direction = combine(g_r, against, 0.1)
    assert (direction @ against / against.square().sum()).item() == pytest.approx(0.1)
    assert combine(g_r, torch.zeros(2), 0.1).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("cls", [Denoising, NegGrad, EraseDiff])
def test_each_moves_its_loss_the_right_way(tiny_network, cls):
    """On one batch, many steps: the loss that is logged falls, or for NegGrad rises."""
    network = tiny_network()
    method = cls(Setting(network, make_generator(0, "m")), lambda m: sgd(m, max_grad_norm=1.0))
    key = "loss/retain" if cls is Denoising else "loss/forget"
    values = [method.step(batch())[key].item() for _ in range(40)]
    first, last = sum(values[:5]), sum(values[-5:])
    assert last > first if cls is NegGrad else last < first


def test_erase_diff_speaks_of_noise_whatever_the_network_predicts(tiny_network):
    network, images = tiny_network(prediction_type="v_prediction"), batch()
    found = EraseDiff(Setting(network, make_generator(0, "m")), sgd).step(images)["loss/forget"]
    network, g = tiny_network(prediction_type="v_prediction"), make_generator(0, "m")
    drawn_loss(network, images.x0_retain, images.cond_retain, g)
    timesteps, eps = draw_noise(network, images.x0_forget, g)
    gamma, sigma = network.path.amplitudes(timesteps)
    x_t = gamma * images.x0_forget + sigma * eps
    v = network.predict(x_t, timesteps, images.cond_forget)
    uniform = torch.rand(eps.shape, generator=g)
    assert found.item() == pytest.approx(((gamma * v + sigma * x_t - uniform) ** 2).mean().item(), rel=1e-4)


def test_each_reads_only_its_streams(tiny_network):
    images = batch()
    generator = make_generator(0, "m")
    Denoising(Setting(tiny_network(), generator), sgd).step(images._replace(x0_forget=None, cond_forget=None))
    NegGrad(Setting(tiny_network(), generator), sgd).step(images._replace(x0_retain=None, cond_retain=None))


def test_update_clips_steps_and_averages(tiny_network):
    network = tiny_network()
    update = sgd(network, max_grad_norm=2.0, ema_decay=0.5)
    start = torch.cat([w.detach().flatten() for w in network.parameters()])
    gradient = torch.zeros_like(start)
    gradient[0] = 8.0
    update.apply(gradient)
    moved = torch.cat([w.detach().flatten() for w in network.parameters()])
    assert (start - moved)[0].item() == pytest.approx(0.01 * 2.0, rel=1e-4)
    assert torch.equal(start[1:], moved[1:])
    shipped = torch.cat([w.flatten() for w in update.model.parameters()])
    assert update.model is not network
    decay = update.ema.cur_decay_value
    assert shipped[0].item() == pytest.approx((decay * start + (1 - decay) * moved)[0].item(), rel=1e-5)


def test_gradient_is_that_of_autograd(tiny_network):
    network = tiny_network()
    loss = sum(weight.square().sum() for weight in network.parameters())
    flat = sgd(network).gradient(loss)
    torch.testing.assert_close(flat, torch.cat([2 * w.detach().flatten() for w in network.parameters()]))
