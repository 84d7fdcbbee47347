"""What `hardware` sets for the whole process."""

import copy
import os
import platform
import subprocess
import sys

import pytest
import torch
from hydra.utils import instantiate

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.hardware import Hardware
from unlearn_runner.types import Passes

FAULTS = """
import resource, torch
from unlearn_runner.hardware import Hardware
if {apply}:
    Hardware("cpu").apply()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):  # the heap grows and settles
    torch.zeros(16_000_000)
before = faults()
for _ in range(10):
    torch.zeros(16_000_000)
print(faults() - before)
"""
KERNELS = """
import torch
from unlearn_runner.hardware import Hardware
Hardware("cpu").apply()
convolution = torch.nn.Conv2d(8, 8, 3)
with torch.no_grad():
    for _ in range(2):
        print("turn", flush=True)
        for b in range(2, 602):
            convolution(torch.zeros(b, 8, 8, 8))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept_for_the_next_step():
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(apply=apply)], capture_output=True, check=True).stdout)
        for apply in (False, True)
    )
    assert plain > 1000  # each of the ten times 64 MB, twice what glibc would come to keep by itself
    assert kept < plain / 10


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="convolutions are not oneDNN's")
def test_compiled_kernels_are_kept():
    """Of more shapes than oneDNN keeps by itself."""
    said = subprocess.run(
        [sys.executable, "-c", KERNELS], env=os.environ | {"ONEDNN_VERBOSE": "profile_create"},
        capture_output=True, check=True, text=True,
    ).stdout  # fmt: skip
    _, first, second = (turn.count("cache_miss") for turn in said.split("turn\n"))
    assert first > 1024
    assert second == 0


@pytest.fixture
def two_gpus(monkeypatch):
    """As far as questions go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


def options(composed, *overrides: str) -> Hardware:
    return instantiate(composed(*overrides)["hardware"])


def test_defaults_are_right_for_the_machine(composed, two_gpus, monkeypatch):
    for name in ("auto", "single_gpu", "multi_gpu"):
        hardware = options(composed, f"hardware={name}")
        assert (hardware.device.type, hardware.passes.precision) == ("cuda", torch.bfloat16)
        assert hardware.processes == (2 if name == "multi_gpu" else 1)
    assert options(composed, "hardware=cpu").device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("auto", "cpu"):
        hardware = options(composed, f"hardware={name}")
        assert (hardware.device.type, hardware.passes) == ("cpu", Passes())
        weight = hardware.place(torch.nn.Conv2d(2, 2, 3)).weight
        assert not weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"accelerator": "cuda", "num_processes": 4}, "needs as many GPUs, torch finds 2 here"),
        ({"accelerator": "cpu", "cuda_graphs": True}, "cuda_graphs must be false or null, got true: there is no GPU"),
    ],
)
def test_what_is_not_there_is_refused(two_gpus, settings, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        Hardware(**settings)


def test_as_many_processes_as_were_started(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="is 1, but 2 were started"):
        Hardware("cpu")
    assert Hardware("cpu", num_processes=2).processes == 2


def passes_of(network, passes: Passes) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    """The prediction, the gradients, and how many images went through the network at once."""
    network.passes, sizes = passes, []
    hook = network.backbone.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((5, 1, 8, 8), generator=generator)
    prediction = network.predict(x, torch.arange(5), torch.arange(5))
    weights = list(network.parameters())
    torch.autograd.grad(prediction.sum(), weights, retain_graph=True)  # SISS asks twice
    gradients = torch.autograd.grad(prediction.square().sum(), weights)
    hook.remove()
    return prediction, list(gradients), sizes


def test_parts_of_a_batch_have_its_gradient(tiny_network):
    network = tiny_network()
    prediction, gradients, sizes = passes_of(network, Passes())
    again, in_parts, parts = passes_of(network, Passes(parts=3))
    assert sizes == [5]
    assert sorted(parts) == [1] * 3 + [2] * 6, "each once forward, and again on each way back"
    assert torch.allclose(prediction, again, atol=1e-6)
    for one, other in zip(gradients, in_parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_bf16_is_of_the_passes_alone(tiny_network):
    network = tiny_network()
    exact, gradients, _ = passes_of(network, Passes())
    rough, rounded, _ = passes_of(network, Passes(torch.bfloat16))
    assert rough.dtype == torch.float32
    assert {part.dtype for part in rounded} == {torch.float32}
    assert 1e-5 < (exact - rough).norm() / exact.norm() < 0.05
    norms = [torch.cat([part.flatten() for part in parts]).norm() for parts in (gradients, rounded)]
    assert 0.9 < norms[0] / norms[1] < 1.1


def test_bf16_has_bases_of_its_own(two_gpus, monkeypatch):
    """What it trains is not taken for what float32 trains, whose place in the cache does not change."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert Hardware("cpu").beyond_rounding == Hardware("cuda", mixed_precision="no").beyond_rounding == {}
    for bf16 in (Hardware("cpu", mixed_precision="bf16"), Hardware("cuda", mixed_precision=None)):
        assert bf16.beyond_rounding == {"precision": "bfloat16"}


def test_compiles_unets_only(tiny_network):
    network = tiny_network()
    copied = copy.deepcopy(Hardware("cpu", compile=True).prepare(network))
    assert network.backbone.unet._compiled_call_impl is not None
    assert copied.backbone.unet._compiled_call_impl is None, "a copy is as it was, not the original's"
    with pytest.raises(ConfigurationError, match=r"hardware\.compile must be false"):
        Hardware("cpu", compile=True).prepare(torch.nn.Linear(1, 1))
