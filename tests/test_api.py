"""From Python: the same runs as by command, with pipelines and pictures in memory."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
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


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        (np.full((4, 4), 3.0), r"its values must lie in \[0, 1\], got 3.0 to 3.0"),
        (np.full((4, 4), 300), r"its values must lie in \[0, 255\]"),
        (np.zeros((2, 4, 4)), r"got the shape \(2, 4, 4\)"),
        (np.zeros((0, 4)), r"got the shape \(0, 4\)"),
        (np.zeros((1, 1, 4, 4)), r"got the shape \(1, 1, 4, 4\)"),
        (None, "keep\\[1\\] is no picture"),
        ("nowhere.png", "No such file"),
        (".", "Is a directory|directory"),
    ],
    ids=str,
)
def test_what_is_no_picture(pipe, picture, sentence):
    with pytest.raises(ConfigurationError, match=sentence) as error:
        ur.forget(pipe, images=[np.zeros((8, 8))], keep=[np.ones((8, 8)), picture])
    assert "\n" not in str(error.value)


def test_pictures_become_what_they_are(tmp_path):
    """Whole numbers are levels of 255, floats shares of it; a file stays what it is, with how it is to be turned."""
    levels = np.array([[0, 1], [128, 255]])
    turned = Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    same = (
        levels,
        levels.astype(np.uint8),
        levels / 255,
        torch.tensor(levels / 255, dtype=torch.float64, requires_grad=True),
    )
    for number, picture in enumerate(same):
        with Image.open(ur.api._written(picture, tmp_path / str(number), "x")) as written:
            assert np.array_equal(np.asarray(written), levels), number
    coarse = torch.tensor([[0.0, 1.0]]).to(torch.bfloat16)
    with Image.open(ur.api._written(coarse[None].expand(3, 1, 2), tmp_path / "colour", "x")) as written:
        assert np.asarray(written).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    copied = ur.api._written(tmp_path / "turned.jpg", tmp_path / "file", "x")
    assert copied.read_bytes() == (tmp_path / "turned.jpg").read_bytes()


def test_mistakes(pipe, tmp_path):
    keep, blank = {"keep": ["a dog"]}, np.zeros((8, 8))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.png").write_bytes(b"mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    concept = {"concept": "x", **keep}
    for call, sentence in (
        (lambda: ur.forget(pipe, **keep), "give either concept=... or images=..."),
        (lambda: ur.forget(3, **concept), "expected a pipeline of diffusers', .*, got a int"),
        (lambda: ur.forget("org/name", **concept), "of a hub id say what it is with model=<sd15"),
        (
            lambda: ur.forget("a/b", **concept, overrides=["model=sd15", "dataset.image_size=big"]),
            "whole number, got 'big'",
        ),
        (lambda: ur.forget(tmp_path / "broken", **concept), "this is no whole pipeline .there is neither unet/"),
        (lambda: ur.forget(pipe, concept="x", keep=["x"], overrides=DEBUG), "retain_concepts must be"),
        (lambda: ur.forget(pipe, **concept, method="nope"), "method=nope: there is no such option"),
        (lambda: ur.forget(pipe, **concept, overrides=["nonsense.x=1"]), "nonsense"),
        (lambda: ur.forget(pipe, **concept, overrides="trainer.max_steps=-1"), "trainer.max_steps must be"),
        (lambda: ur.forget(pipe, **concept, folder=tmp_path / "full"), "is there already; give a new one"),
        (
            lambda: ur.forget(pipe, images=[], keep=[blank]),
            "images must be a folder or a list of pictures, got an empty",
        ),
        (lambda: ur.forget(pipe, images=Image.fromarray(np.uint8(blank)), keep=[blank]), "got a Image"),
        (
            lambda: ur.forget(pipe, images=[(blank, "a")], keep=[blank]),
            "some pictures have a caption and some none",
        ),
        (lambda: ur.compare([ur.api.Result(None, {}, None)]), "a result without a folder"),
        (lambda: ur.compare([]), "give one or more runs"),
        (lambda: ur.compare(str(tmp_path)), "there is no finished run"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            call()
    assert (tmp_path / "full" / "a.png").read_bytes() == b"mine"
    with pytest.raises(AttributeError, match="no attribute 'forgot'"):
        ur.forgot  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_notebooks(notebook, tmp_path, monkeypatch, shared_cache):
    """Their cells, one after the other, with runs that are cut short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNLEARN_RUNNER_CACHE", str(shared_cache))
    names: dict = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("overrides=[", 'overrides=["debug=default", "hardware=cpu", '), names)
    assert list((tmp_path / "outputs").rglob("model_index.json"))
    assert (tmp_path / "outputs/request/report.html").is_file() or notebook.stem != "deletion_request"
