"""Which files of others' weights are read, and what tells them apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.weights import stored_tensors, weight_files, weights_identity

NAME = "diffusion_pytorch_model"


def filled(folder: Path, *names: str) -> Path:
    """A folder of weight files, each of one tensor of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        save_file({f"w{index}": torch.full((2, index + 1), float(index))}, folder / name)
    return folder


def test_identity_is_of_bytes_not_of_places(tmp_path):
    for name in ("a", "b"):
        filled(tmp_path / name / "unet", f"{NAME}.safetensors")
        (tmp_path / name / "unet" / "config.json").write_text("{}")
    first = weights_identity(tmp_path / "a")
    assert first == weights_identity(str(tmp_path / "b"))
    for change in (
        lambda: (tmp_path / "b" / "unet" / "config.json").write_text('{"x": 1}'),
        lambda: (tmp_path / "b" / "model_index.json").write_text("{}"),
        lambda: filled(tmp_path / "b" / "unet", "other", f"{NAME}.safetensors"),
    ):
        before = weights_identity(tmp_path / "b")
        change()
        assert weights_identity(tmp_path / "b") not in (before, first)
    before = weights_identity(tmp_path / "b")
    (tmp_path / "b" / "unet" / "notes.md").write_text("no part of it")
    filled(tmp_path / "b" / "unet", f"{NAME}.fp16.safetensors")  # not read beside a plain one
    assert weights_identity(tmp_path / "b") == before


def test_identity_of_a_file_and_of_names(tmp_path, monkeypatch):
    file = filled(tmp_path, "clip.safetensors") / "clip.safetensors"
    first = weights_identity(file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # as many bytes as before
    file.write_bytes(content)
    os.utime(file, ns=(0, 0))
    assert weights_identity(file) != first
    assert weights_identity("auto") == "auto"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert weights_identity("some/model") == "some/model"
    (tmp_path / "models--some--model" / "refs").mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs" / "main").write_text("c0ffee")
    assert weights_identity("some/model") == "some/model@c0ffee"


def test_the_module_loads_no_torch():
    code = "import sys, unlearn_runner.weights as w; w.weights_identity('auto'); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.parametrize(
    ("names", "read"),
    [
        ([f"{NAME}.safetensors", f"{NAME}.fp16.safetensors"], 1),
        ([f"{NAME}.fp16.safetensors"], 1),
        ([f"{NAME}-00001-of-00002.safetensors", f"{NAME}-00002-of-00002.safetensors"], 2),
        ([f"{NAME}.fp16-00001-of-00002.safetensors", f"{NAME}.fp16-00002-of-00002.safetensors"], 2),
        (["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"], 2),
        (["model.safetensors"], 1),
    ],
)
def test_files_that_are_read(tmp_path, names, read):
    folder = filled(tmp_path, *names)
    assert [file.name for file in weight_files(folder)] == names[:read]
    assert stored_tensors(folder)[f"w{read - 1}"].shape == (2, read)


def test_files_that_are_not_read(tmp_path):
    def refused(folder, match):
        with pytest.raises(ConfigurationError, match=match):
            stored_tensors(folder)

    refused(filled(tmp_path / "empty"), "there must be weights as safetensors in .*empty, found none")
    (filled(tmp_path / "pickle") / f"{NAME}.bin").write_bytes(b"")
    refused(tmp_path / "pickle", r"found only diffusion_pytorch_model\.bin, a pickle")
    refused(filled(tmp_path / "half", f"{NAME}-00001-of-00003.safetensors"), "holds 1 of the 3 files")
    refused(filled(tmp_path / "two", f"{NAME}.fp16.safetensors", f"{NAME}.non_ema.safetensors"), "fp16, non_ema")
    cut = filled(tmp_path / "cut", f"{NAME}.safetensors") / f"{NAME}.safetensors"
    for content in (cut.read_bytes()[:-3], b"", b"<html>", b"\xff" * 100):
        cut.write_bytes(content)
        refused(cut.parent, rf"{cut} is no whole safetensors file")
