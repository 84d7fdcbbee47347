"""What a step or an edit takes of a network of Stable Diffusion 1.5's size. Random weights: nothing is downloaded."""

import time
from functools import partial

import pytest
import torch
from bench import sd15_sized

from unlearn_runner.methods.denoising import Denoising
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.methods.uce import UCE
from unlearn_runner.spec import Labels
from unlearn_runner.training.provenance import peak_memory_gb
from unlearn_runner.types import Batch

pytestmark = pytest.mark.slow


def test_a_lora_step_fits_a_card_of_24_gb():
    model = sd15_sized("lora", lora_rank=4, gradient_checkpointing=True)
    assert sum(weight.numel() for weight in model.backbone.unet.parameters()) == 859_520_964
    model.freeze_for_unlearning()
    update = partial(Update, optimizer=torch.optim.AdamW)
    method = Denoising(Setting(model, torch.Generator().manual_seed(0)), update)
    metrics = method.step(Batch(torch.rand(1, 3, 512, 512) * 2 - 1, None, torch.tensor([0]), None, 0.0))
    assert metrics["loss/retain"].isfinite()
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    print(f"{trained} weights trained, peak {peak_memory_gb():.1f} GB")
    assert peak_memory_gb() < 24


@pytest.mark.parametrize("rounds", [0, 3], ids=["uce", "rece"])
def test_a_closed_form_edit_takes_less_than_a_minute(rounds):
    model = sd15_sized("lora", lora_rank=4)
    model.freeze_for_unlearning()
    names = tuple(model.prompts)
    labels = Labels(retain=tuple(range(1, len(names))), forget=(0,), names=names, contents=tuple(range(len(names))))
    method = UCE(Setting(model, torch.Generator().manual_seed(0), labels), rounds=rounds)
    before = [layer.weight.clone() for layer in model.text_projections()]
    start = time.perf_counter()
    method.step(Batch(None, None, None, None, 0.0))
    seconds = time.perf_counter() - start
    print(f"{seconds:.1f} s for {len(before)} projections")
    assert len(before) == 32
    assert all(not torch.equal(old, layer.weight) for old, layer in zip(before, model.text_projections(), strict=True))
    assert seconds < 60
