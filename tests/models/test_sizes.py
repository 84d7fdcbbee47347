"""What a step or an edit takes of networks of the sizes that people run. Random weights: nothing is downloaded."""

import time
from functools import partial
from pathlib import Path

import pytest
import torch
from memory import SIZES, additions, sized, taken_by
from pipelines import tiny

from unlearn_runner.methods.denoising import Denoising
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.methods.uce import UCE
from unlearn_runner.models.prompted import Tuning
from unlearn_runner.spec import Labels
from unlearn_runner.training.provenance import peak_memory_gb
from unlearn_runner.types import Batch, Passes

SLOW = pytest.mark.slow


def test_parameters_are_counted_and_none_is_made():
    """The numbers that the models' makers give, and what LoRA adds."""
    known = {"sd15": 859_520_964, "sdxl": 2_567_463_684, "sd3": 2_028_328_000, "flux": 11_901_408_320}
    before = peak_memory_gb()
    found = {name: taken_by(name) for name in SIZES}
    assert {name: found[name].network for name in known} == known
    assert peak_memory_gb() < before + 1
    assert found["sd3"].texts - found["sd3 without T5"].texts == 4_762_310_656
    for taken in found.values():
        assert taken.lora_bfloat16 < taken.lora_float32 < taken.full
    model = tiny(trainable="lora", lora_rank=4)
    model.freeze_for_unlearning()
    added = sum(weight.numel() for name, weight in model.named_parameters() if ".lora_" in name)
    assert additions(tiny().backbone.unet, 4) == added


@SLOW
def test_a_lora_step_fits_a_card_of_24_gb():
    model = sized("sd15", Tuning("lora", 4, True))
    assert sum(weight.numel() for weight in model.backbone.unet.parameters()) == 859_520_964
    model.freeze_for_unlearning()
    update = partial(Update, optimizer=torch.optim.AdamW)
    method = Denoising(Setting(model, torch.Generator().manual_seed(0)), update)
    metrics = method.step(Batch(torch.rand(1, 3, 512, 512) * 2 - 1, None, torch.tensor([0]), None, 0.0))
    assert metrics["loss/retain"].isfinite()
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    print(f"{trained} weights trained, peak {peak_memory_gb():.1f} GB")
    assert peak_memory_gb() < 24


@SLOW
def test_a_lora_step_of_sdxl_fits_a_card_of_24_gb():
    """Its frozen weights in bf16, of a picture of 512x512: on a CPU with Python's own memory."""
    model = sized("sdxl", Tuning("lora", 4, True, "bfloat16"))
    model.freeze_for_unlearning()
    model.passes = Passes(torch.bfloat16, 1)
    method = Denoising(Setting(model, torch.Generator().manual_seed(0)), partial(Update, optimizer=torch.optim.AdamW))
    began, before = time.perf_counter(), memory_gb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: to build it took more
    metrics = method.step(Batch(torch.rand(1, 3, 512, 512) * 2 - 1, None, torch.tensor([0]), None, 0.0))
    assert metrics["loss/retain"].isfinite()
    seconds = time.perf_counter() - began
    print(f"{before:.1f} GiB before the step, {memory_gb('VmHWM'):.1f} at its peak, {seconds:.0f} s")
    assert before < 1.25 * taken_by("sdxl").lora_bfloat16 + 1


def memory_gb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


@SLOW
@pytest.mark.parametrize("rounds", [0, 3], ids=["uce", "rece"])
def test_a_closed_form_edit_takes_less_than_a_minute(rounds):
    model = sized("sd15", Tuning("lora", 4))
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
