"""From Python: the same runs as by command, with pipelines and pictures in memory."""

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline
from PIL import Image
from pipelines import tiny
from safetensors.torch import save_file

import unlearn_runner as ur
from unlearn_runner.errors import ConfigurationError

DEBUG = ["debug=default", "hardware=cpu"]


@pytest.fixture
def overrides(shared_cache):
    return [*DEBUG, f"paths.cache={shared_cache}"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipe")
    tiny(num_tokens=40).save(folder)
    return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)


def weights(pipeline) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipeline.unet.state_dict().items()}


def test_a_concept_of_a_pipeline_in_memory(pipe, overrides, tmp_path):
    before = weights(pipe)
    result = ur.forget(
        pipe, concept="it's a cat", keep=["a dog", "a cow"], method="esd", steps=2, folder=tmp_path / "run",
        overrides=[*overrides, "dataset.num_images=3", "method.num_inference_steps=2"],
    )  # fmt: skip
    assert type(result.pipeline) is StableDiffusionPipeline and result.pipeline.unet.dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items()), "what was given stays"
    assert any(not torch.equal(value, before[name]) for name, value in weights(result.pipeline).items())
    assert {"base/forget_rate", "eval/forget_rate", "eval/retain_accuracy"} <= result.scores.keys()
    assert result.folder == tmp_path / "run" and "it's a cat" in (result.folder / "config.yaml").read_text()
    images = result.pipeline("a dog", num_inference_steps=1, height=16, width=16, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_pictures_of_a_ddpm(tiny_network, overrides, tmp_path):
    """Arrays, tensors, PIL images and paths; the folder of a pipeline instead of the pipeline."""
    tiny_network(image_shape=(1, 16, 16), num_labels=None).save(tmp_path / "ddpm")
    g = np.random.default_rng(0)
    pictures = [g.integers(0, 256, (16, 16), dtype=np.uint8) for _ in range(30)]
    Image.fromarray(pictures[1]).save(tmp_path / "one.png")
    forget = [
        pictures[0],
        tmp_path / "one.png",
        Image.fromarray(pictures[2]),
        torch.from_numpy(pictures[3])[None] / 255,
    ]
    result = ur.forget(tmp_path / "ddpm", images=forget, keep=pictures[4:], method="siss", overrides=overrides)
    assert type(result.pipeline) is DDPMPipeline and result.folder is None
    assert {"eval/copy_rate", "eval/mia_auc", "eval/closer_to_forget"} <= result.scores.keys()


def test_captioned_pictures(pipe, overrides):
    pictures = [Image.fromarray(np.full((20, 30, 3), shade, dtype=np.uint8)) for shade in range(0, 240, 12)]
    keep = [(picture, f"shade {number}") for number, picture in enumerate(pictures[2:])]
    forget = [(pictures[0], "black"), (pictures[1], "shade 3")]
    result = ur.forget(pipe, images=forget, keep=keep, method="siss", overrides=overrides)
    assert {"eval/copy_rate", "eval/restored_rate"} <= result.scores.keys()


def test_measure_and_compare(pipe, overrides, tmp_path):
    crossing = {name: value * 2 for name, value in weights(pipe).items() if "attn2" in name}
    save_file(crossing, tmp_path / "esd.safetensors")
    concepts = {"concept": "a cat", "keep": ["a dog"]}
    found = ur.measure(
        tmp_path / "esd.safetensors", base=pipe, **concepts, folder=tmp_path / "measured",
        overrides=[*overrides, "label=esd", "dataset.num_images=3"],
    )  # fmt: skip
    assert found.pipeline is None
    assert {"base/probe_noise", "eval/probe_noise", "eval/attack_tokens"} <= found.scores.keys()
    table = ur.compare([found], metrics=["forget_rate", "probe_noise"])
    assert list(table.index)[-1] == "esd" and list(table.columns) == ["forget_rate", "probe_noise"]
    assert table.loc["esd", "probe_noise"] == pytest.approx(found.scores["eval/probe_noise"])


def test_mistakes(pipe, tmp_path):
    keep = {"keep": ["a dog"]}
    for call, sentence in (
        (lambda: ur.forget(pipe, **keep), "give either concept=... or images=..."),
        (lambda: ur.forget(3, concept="x", **keep), "expected a pipeline of diffusers', .*, got a int"),
        (lambda: ur.forget("org/name", concept="x", **keep), "of a hub id say what it is with model=<sd15"),
        (lambda: ur.forget(pipe, images=[np.full((4, 4), 3.0)], keep=[np.zeros((4, 4))]), r"must lie in \[0, 1\]"),
        (lambda: ur.forget(pipe, concept="x", keep=["x"], overrides=DEBUG), "retain_concepts must be"),
        (lambda: ur.compare([ur.api.Result(None, {}, None)]), "a result without a folder"),
        (lambda: ur.compare([tmp_path]), "there is no finished run"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            call()
    with pytest.raises(AttributeError, match="no attribute 'forgot'"):
        ur.forgot  # noqa: B018
