"""SalUn: which weights its mask lets move, that the others stay, and what its loss asks for."""

import math
from functools import partial

import pytest
import torch
from toy import gaussian_model
from trainers import build_trainer, flat_state

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.methods import salun
from unlearn_runner.methods.denoising import denoising_loss, draw_noise
from unlearn_runner.methods.distillation.overrides import Fixed
from unlearn_runner.methods.method import Mask, Setting, Update
from unlearn_runner.methods.salun import SalUn, relabelled_loss, salient
from unlearn_runner.spec import Labels
from unlearn_runner.types import Batch, make_generator

LABELS = Labels(retain=(0, 2), forget=(1,), names=("a", "b", "c"), contents=(0, 1, 2))


@pytest.fixture
def trainer_of(composed, digits, tmp_path, monkeypatch):
    """Of these options, with a small network, whose saliency is measured on fewer draws."""
    monkeypatch.setattr(salun, "DRAWS", 200)
    small = ("model.network.block_out_channels=[8]", "model.network.attention=[false]", "trainer.batch_size=4")
    return lambda *options: build_trainer(composed(*small, *options), digits, tmp_path)


def test_relabelled_loss_by_hand():
    """Two Gaussians of width 0: the predictions' difference is the distance of their means in units of the noise."""
    model = gaussian_model([0.0, 1.0, -0.5], [1e-4] * 3)
    x_t, t = torch.zeros(2, 1, 2, 2), torch.tensor([100, 400])
    found = relabelled_loss(model, x_t, t, torch.tensor([1, 1]), torch.tensor([0, 2]))
    gamma, sigma = (part.flatten() for part in model.path.amplitudes(t))
    wanted = 4 * (torch.tensor([1.0, 1.5]) * gamma / sigma) ** 2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    assert found.requires_grad
    gradient = torch.autograd.grad(found[0], model.backbone.unet.means)[0]
    assert gradient[1] != 0
    assert gradient[0] == 0, "the target has no gradient"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_mask_is_the_largest_share_of_the_summed_gradient(trainer_of, share):
    """Against the gradient of one batch of all noisy forget images, weight by weight."""
    trainer = trainer_of()
    model, images = trainer.method.networks[0], trainer.stream.images().forget
    keep = salient(model, images, share)
    rows = torch.arange(len(images)).repeat(-(-salun.DRAWS // len(images)))
    assert len(rows) >= salun.DRAWS
    generator, losses = make_generator(0, "saliency"), []
    for part in rows.split(32):
        x0, cond = images.take(part)
        losses.append(denoising_loss(model, x0, cond, *draw_noise(model, x0, generator)).sum())
    sizes = [part.abs().flatten() for part in torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters()))]
    sizes = torch.cat(sizes).double()
    wanted = sizes >= sizes.sort(descending=True).values[round(share * len(sizes)) - 1]
    wanted &= sizes > 0
    agree = (keep == wanted).double().mean().item()
    assert agree > 0.999, "but for weights whose gradients are equal up to rounding"
    assert keep.sum().item() <= round(share * len(sizes)) + 1


def test_weights_without_a_gradient_never_move(trainer_of):
    """Under one forget label the other labels' embeddings have none, whatever the share."""
    trainer = trainer_of()
    model = trainer.method.networks[0]
    keep = salient(model, trainer.stream.images().forget, 0.999)
    start, of_labels = 0, None
    for name, weight in model.named_parameters():
        if "class_embedding" in name:
            of_labels = keep[start : start + weight.numel()].view_as(weight)
        start += weight.numel()
    assert of_labels.any(1).sum().item() == 1


@pytest.mark.parametrize("method", ["salun", "siss", "naive_deletion", "posterior", "erase_diff", "sfd"])
def test_masked_weights_stay_to_the_bit(trainer_of, method):
    """Under a decay that would move every weight, and momentum."""
    saliency = "method.update.saliency=0.3"
    decay = [] if method == "sfd" else ["method.update.optimizer.weight_decay=0.5"]
    trainer = trainer_of(f"method={method}", saliency, *decay)
    masks = [part for part in trainer.method.stateful().values() if isinstance(part, Mask)]
    assert len(masks) == 1
    update, keep = trainer.method.update, masks[0].keep
    before = torch.cat([weight.detach().flatten().clone() for weight in update.weights])
    for _ in range(3):
        trainer.method.step(trainer.stream.next())
    after = torch.cat([weight.detach().flatten() for weight in update.weights])
    assert torch.equal(before[~keep], after[~keep])
    assert (before[keep] != after[keep]).double().mean().item() > 0.9
    shipped = torch.cat([weight.detach().flatten() for weight in update.model.parameters()])
    torch.testing.assert_close(shipped[~keep], before[~keep], rtol=1e-6, atol=0)
    assert keep.double().mean().item() == pytest.approx(0.3, abs=0.01)


def test_a_resumed_mask_is_the_one_of_the_base(trainer_of):
    """A checkpoint has it; and a trainer that begins again measures the same."""
    first = trainer_of("method=salun")
    first.method.step(first.stream.next())
    state = flat_state(first)
    second = trainer_of("method=salun")
    mask = next(part for part in second.method.stateful().values() if isinstance(part, Mask))
    kept = next(value for name, value in state.items() if name.endswith("keep"))
    assert torch.equal(mask.keep, kept)


def test_passes_of_the_measurement_are_counted(trainer_of):
    plain, masked = (trainer_of(f"method.update.saliency={share}") for share in ("null", "0.5"))
    assert plain.clock.network_evaluations == 0
    assert masked.clock.network_evaluations >= salun.DRAWS


def test_what_is_no_generative_model_has_no_saliency():
    with pytest.raises(ConfigurationError, match="a Linear has no forget gradient to choose weights by"):
        Update(torch.nn.Linear(2, 2), torch.optim.Adam, saliency=0.5)


def test_forgotten_label_comes_to_mean_the_other():
    """On Gaussians: the forgotten class's mean goes to that of the class in its place, whose own mean stays."""
    model = gaussian_model([0.0, 1.0, -0.5], [0.1] * 3)
    update = partial(Update, optimizer=partial(torch.optim.Adam, lr=0.02))
    method = SalUn(Setting(model, make_generator(0, "m"), LABELS), update, override=partial(Fixed, label=2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        labels = torch.tensor([0, 2]).repeat(32)
        eps = torch.randn((2, 64, 1, 2, 2), generator=generator) * 0.1
        x0_retain = eps[0] + torch.tensor([0.0, -0.5]).repeat(32)[:, None, None, None]
        metrics = method.step(Batch(x0_retain, eps[1] + 1.0, labels, torch.ones(64, dtype=torch.int64), 0.1))
    assert model.backbone.unet.means.tolist() == pytest.approx([0.0, -0.5, -0.5], abs=0.05)
    assert all(math.isfinite(value) for value in metrics.values())
