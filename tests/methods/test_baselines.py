"""Denoising, NegGrad, EraseDiff and the update they share."""

import math
from functools import partial

import pytest
import torch
from conftest import assert_same_bits
from toy import gaussian_model

from unlearn_runner.methods.denoising import Denoising, denoising_loss, draw_noise, drawn_loss
from unlearn_runner.methods.erase_diff import EraseDiff, combine, combine_by_cosine, erase_diff_loss
from unlearn_runner.methods.method import Mask, Setting, Update
from unlearn_runner.methods.neg_grad import NegGrad, neg_grad_loss
from unlearn_runner.models.model import squared_error
from unlearn_runner.spec import Labels
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
    prediction = network.backbone.unet(x_t, timesteps, class_labels=images.cond_retain).sample
    target = eps if prediction_type == "epsilon" else velocity
    torch.testing.assert_close(found, ((prediction - target) ** 2).sum((1, 2, 3)), rtol=1e-4, atol=1e-4)


def test_erase_diff_direction():
    g_r, g_f = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert combine(g_r, g_f, 0.1).tolist() == pytest.approx([1.0, 0.2])
    along = torch.tensor([4.0, 0.0])  # <g_r, g_f> / ||g_f||^2 = 0.25 > eta: erasing comes by itself
    assert combine(g_r, along, 0.1).tolist() == [1.0, 0.0]
    against = torch.tensor([-1.0, 0.0])
    direction = combine(g_r, against, 0.1)
    assert (direction @ against / against.square().sum()).item() == pytest.approx(0.1)
    assert combine(g_r, torch.zeros(2), 0.1).tolist() == [1.0, 0.0]


def test_direction_of_the_released_erase_diff():
    """1 + max(eta - cos, 0), by hand: orthogonal, 60 degrees apart, opposed; and eta bounds what it erases."""
    g_r, g_f = torch.tensor([[3.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert combine_by_cosine(g_r, g_f, 0.1).tolist() == pytest.approx([3.0, 0.2])
    sixty = torch.tensor([0.5, math.sqrt(0.75)], dtype=torch.float64)
    assert combine_by_cosine(g_r, sixty, 0.1).tolist() == [3.0, 0.0]
    found = combine_by_cosine(g_r, sixty, 0.7)
    assert found.tolist() == pytest.approx([3 + 0.2 * 0.5, 0.2 * math.sqrt(0.75)])
    assert combine_by_cosine(g_r, -g_r, 0.1).tolist() == pytest.approx([3 - 1.1 * 3, 0.0])
    assert combine_by_cosine(g_r, 0 * g_f, 0.1).tolist() == [3.0, 0.0]
    for scale in (1e-3, 1e3):  # the multiplier does not depend on the norms
        found = combine_by_cosine(g_r, scale * sixty, 0.7)
        assert ((found - g_r) / scale).tolist() == pytest.approx([0.2 * 0.5, 0.2 * math.sqrt(0.75)], rel=1e-4)


LABELS = Labels(retain=(0, 2), forget=(1,), names=("zero", "one", "two"), contents=(0, 1, 2))
KEPT, FORGOTTEN, STD = -0.3, 0.4, 0.5  # means of labels 0 and 2, of label 1, and the deviation of all


def released(b=8, update=sgd, **settings):
    """The released EraseDiff on a model whose predictions are known, and a batch of its images."""
    model = gaussian_model([KEPT, FORGOTTEN, KEPT], [STD] * 3)
    x = torch.randn(2, b, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    images = Batch(x[0], x[1], torch.arange(b) % 2 * 2, torch.ones(b, dtype=torch.int64), 0.1)
    method = EraseDiff(Setting(model, make_generator(0, "m"), LABELS), update, variant="released", **settings)
    return method, images


def test_gradient_of_the_released_erasing_objective_by_hand():
    """eps = sigma (x_t - gamma mean) / v, v = gamma^2 std^2 + sigma^2: under two labels with the same std it differs by
    sigma gamma (mean_1 - mean_0) / v at every x_t. The other label's prediction has no gradient.
    """
    method, images = released()
    gradient = method._gradient(method._erasing(images))
    timesteps, _ = draw_noise(method.trained, images.x0_forget, make_generator(0, "m"))
    gamma, sigma = (part.flatten() for part in method.trained.path.amplitudes(timesteps))
    slope = sigma * gamma / (gamma**2 * STD**2 + sigma**2)
    by_mean = (2 * slope**2 * (FORGOTTEN - KEPT)).mean()
    assert gradient[:3].tolist() == pytest.approx([0, by_mean.item(), 0], rel=1e-4)
    assert gradient[3] == gradient[5] == 0
    assert gradient[4] != 0  # the own standard deviation matters


@pytest.mark.parametrize("multiplier", [None, 0.3])
def test_a_released_step_is_the_retain_gradient_and_the_multiplied_erasing_gradient(multiplier):
    method, images = released(inner_steps=0, multiplier=multiplier, eta=0.5)
    before = torch.cat([weight.detach().clone() for weight in method.update.weights])
    twin, _ = released()
    g, update = make_generator(0, "m"), twin.update
    twin.generator = g
    pixels = twin.trained.num_entries
    retain = drawn_loss(twin.trained, images.x0_retain, images.cond_retain, g).mean() / pixels
    grad_retain = update.gradient(retain)
    forget = twin._erasing(images) / pixels
    grad_forget = update.gradient(forget)
    cosine = torch.nn.functional.cosine_similarity(grad_retain, grad_forget, dim=0)
    factor = (0.5 - cosine).clamp(min=0) if multiplier is None else 0.3
    assert factor > 0
    metrics = method.step(images)
    after = torch.cat([weight.detach() for weight in method.update.weights])
    torch.testing.assert_close(before - after, 0.01 * (grad_retain + factor * grad_forget), rtol=1e-3, atol=1e-7)
    assert metrics["loss/retain"].item() == pytest.approx(retain.item(), rel=1e-5)
    assert metrics["loss/forget"].item() == pytest.approx(forget.item(), rel=1e-5)


def test_inner_steps_of_the_released_erase_diff_leave_moments_alone():
    """What they reach is subtracted from the objective in the released code: a constant, so no gradient. Weights come
    back to the bit; rounds begin at every outer_steps-th step.
    """
    adam = partial(Update, optimizer=partial(torch.optim.Adam, lr=0.01), max_grad_norm=1e-3)
    method, images = released(update=adam, inner_steps=3, outer_steps=2)
    weights = dict(method.trained.state_dict())
    before = {name: weight.clone() for name, weight in weights.items()}
    method._minimise_erasing(images)
    assert_same_bits(weights, before)
    (state, _) = method.update.optimizer.state.values()
    assert state["step"] == 3
    assert state["exp_avg"][1] > 1e-2, "gradients are not cut"
    moved = []
    minimise = method._minimise_erasing
    method._minimise_erasing = lambda batch: (moved.append(method.taken.value), minimise(batch))
    for _ in range(5):
        method.step(images)
    assert moved == [0, 2, 4]


def test_inner_steps_reach_the_minimum_of_the_erasing_objective():
    """theta^K predicts under the forget label what it predicts under the others."""
    adam = partial(Update, optimizer=partial(torch.optim.Adam, lr=0.02))
    method, images = released(update=adam)
    with method.update.trial() as descend:
        for _ in range(150):
            descend(method._gradient(method._erasing(images)))
        means = method.trained.backbone.unet.means.tolist()
    assert means == pytest.approx([KEPT] * 3, abs=0.02)
    assert method.trained.backbone.unet.means.tolist() == pytest.approx([KEPT, FORGOTTEN, KEPT])


def test_masked_weights_have_no_moments_of_a_trial():
    mask = Mask()
    method, images = released(
        update=partial(Update, optimizer=partial(torch.optim.Adam, lr=0.01), transforms=[mask]), inner_steps=2
    )
    mask.keep = torch.zeros(6, dtype=torch.bool)
    before = [weight.detach().clone() for weight in method.update.weights]
    method.step(images)
    for weight, kept in zip(method.update.weights, before, strict=True):
        assert torch.equal(weight, kept)


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


def averaged_over(steps, **settings):
    """How much the weights before the first step and after each one weigh in what ships."""
    weight = torch.nn.Linear(steps + 1, 1, bias=False)
    weight.weight.data.zero_()
    weight.weight.data[0, 0] = 1
    update = Update(weight, partial(torch.optim.SGD, lr=1.0), **settings)
    for step in range(1, steps + 1):
        gradient = torch.zeros(steps + 1)
        gradient[step - 1], gradient[step] = 1, -1  # the weights after step n are the n-th unit vector
        update.apply(gradient)
    return update.model.weight.detach().flatten().double()


def test_what_the_average_of_a_run_spans():
    """The figures of conf/method/update/adamw.yaml and docs/add_a_method.md."""
    shares = averaged_over(250, ema_decay=0.98)
    ages = torch.arange(250, -1, -1, dtype=torch.float64)
    assert shares.sum().item() == pytest.approx(1)
    assert shares[0] == 0, "nothing of the base"
    assert (shares @ ages).item() == pytest.approx(25, abs=0.1)
    assert 1 / shares.square().sum().item() == pytest.approx(53.5, abs=0.2)
    assert torch.equal(averaged_over(250, ema_decay=0.9999), shares), "the warm-up is not over"
    assert torch.equal(averaged_over(250, ema_decay=0.966), shares)
    assert not torch.equal(averaged_over(250, ema_decay=0.96), shares)
    at_once = averaged_over(250, ema_decay=0.9999, ema_warmup=False)
    assert at_once[0].item() == pytest.approx(0.9999**250, rel=1e-4)
    assert at_once[0] > 0.975
    torch.testing.assert_close(at_once[1:], 1e-4 * 0.9999 ** ages[1:], rtol=1e-3, atol=0)
    assert averaged_over(250, ema_decay=0.98, ema_warmup=False)[0].item() == pytest.approx(0.98**250, rel=1e-4)


def test_gradient_is_that_of_autograd(tiny_network):
    network = tiny_network()
    loss = sum(weight.square().sum() for weight in network.parameters())
    flat = sgd(network).gradient(loss)
    torch.testing.assert_close(flat, torch.cat([2 * w.detach().flatten() for w in network.parameters()]))
