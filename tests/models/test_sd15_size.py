"""What a step takes that trains a network of Stable Diffusion 1.5's size. Random weights: nothing is downloaded."""

from functools import partial

import pytest
import torch
from bench import sd15_sized

from unlearn_runner.methods.denoising import Denoising
from unlearn_runner.methods.method import Setting, Update
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
