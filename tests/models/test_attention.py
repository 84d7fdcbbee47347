"""The UNets' attention on a CPU against diffusers' own."""

import copy
from unittest.mock import patch

import pytest
import torch
from conftest import names
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.autograd import gradcheck

from unlearn_runner.models import attention
from unlearn_runner.models.attention import ChannelsFirstAttention, attend
from unlearn_runner.models.ddpm import build_ddpm
from unlearn_runner.types import make_generator


def attentive(num_labels=None):
    """A network that attends at both of its resolutions."""
    return build_ddpm((1, 16, 16), names(num_labels), 0, "auto", [16, 32], [True, True], norm_num_groups=8)


def as_in_diffusers(model):
    """A copy with diffusers' own attention."""
    theirs = copy.deepcopy(model)
    attend(theirs.backbone.unet, AttnProcessor2_0())
    return theirs


@pytest.mark.parametrize("at_once", [2**23, 100])
def test_gradients_are_those_of_finite_differences(at_once):
    """Also head by head, and with fewer queries than keys."""
    shapes = ((2, 3, 4), (2, 3, 5), (2, 3, 5))
    parts = [torch.randn(shape, dtype=torch.float64, generator=make_generator(0, "x")) for shape in shapes]
    with patch.object(attention, "AT_ONCE", at_once):
        assert gradcheck(ChannelsFirstAttention.apply, [part.requires_grad_() for part in parts])


@pytest.mark.parametrize("at_once", [2**23, 100])
def test_answers_and_gradients_are_those_of_diffusers(at_once):
    model = attentive(num_labels=3).double()
    x, t, labels = torch.randn(5, 1, 16, 16).double(), torch.arange(5), torch.arange(5) % 3
    theirs = as_in_diffusers(model)
    found = []
    with patch.object(attention, "AT_ONCE", at_once):
        for network in (model, theirs):
            prediction = network.predict(x, t, labels)
            loss, weights = prediction.square().sum(), list(network.backbone.unet.parameters())
            once = torch.autograd.grad(loss, weights, retain_graph=True)
            twice = torch.autograd.grad(loss, weights)  # as SISS goes back
            assert all(map(torch.equal, once, twice))
            found.append([prediction, *once])
    for ours, wanted in zip(*found, strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("at_once", [2**23, 100])
def test_passes_of_sampling_and_of_training_have_the_same_bits(at_once):
    """Policy gradients need it: their first ratios are exactly 1."""
    model = attentive()
    x, t = torch.randn(5, 1, 16, 16, generator=make_generator(1, "x")), torch.arange(5)
    with patch.object(attention, "AT_ONCE", at_once):
        followed = model.predict(x, t, None)
        with torch.inference_mode():
            assert torch.equal(model.predict(x, t, None), followed)
    assert followed.requires_grad


def test_other_attention_than_of_pixels_is_left_to_diffusers():
    """In bf16, and in UNets whose attention has no normalisation of its own."""
    model = attentive()
    x, t = torch.randn(2, 1, 16, 16, generator=make_generator(1, "x")), torch.arange(2)
    with patch.object(ChannelsFirstAttention, "apply", side_effect=AssertionError("used")):
        with torch.autocast("cpu", torch.bfloat16):
            model.predict(x, t, None)
        for module in model.backbone.unet.modules():
            if isinstance(module, attention.Attention):
                module.group_norm = None
        model.predict(x, t, None)
        with pytest.raises(AssertionError, match="used"):
            attentive().predict(x, t, None)
