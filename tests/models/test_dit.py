"""DiT against diffusers' own pipeline, on a tiny one of its classes."""

import json
import shutil

import pytest
import torch
from diffusers import DiTPipeline
from pipelines import foreign_dit, foreign_sd3

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.dit import build_dit
from unlearn_runner.models.model import denoising_loss

NAMES = tuple("0123456789")
SHAPE = (1, 16, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return foreign_dit(tmp_path_factory.mktemp("dit"))


def built(folder, loaded=True, names=NAMES, image_shape=SHAPE, **more):
    model = build_dit(image_shape, names, 0, str(folder), **({"gradient_checkpointing": False} | more))
    if loaded:
        model.load(folder)
    return model


def drawn(model, labels, steps=4, seed=5):
    images = model.sample(len(labels), torch.tensor(labels), torch.Generator().manual_seed(seed), steps)
    return (images / 2 + 0.5).clamp(0, 1)


def drawn_by_pipeline(folder, labels, guidance_scale, steps=4, seed=5):
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipeline(labels, guidance_scale, generator, steps, output_type="pt").images


@pytest.mark.parametrize(("learnt_variance", "guidance_scale"), [(True, 1.0), (False, 1.0)])
def test_draws_what_its_pipeline_draws(tmp_path, learnt_variance, guidance_scale):
    folder = foreign_dit(tmp_path / "dit", learnt_variance)
    model = built(folder, guidance_scale=guidance_scale)
    theirs = drawn_by_pipeline(folder, [7, 1, 0], guidance_scale)
    torch.testing.assert_close(drawn(model, [7, 1, 0]), theirs, atol=1e-5, rtol=1e-4)
    model.save(tmp_path / "saved")
    torch.testing.assert_close(drawn_by_pipeline(tmp_path / "saved", [7, 1, 0], guidance_scale), theirs)
    assert DiTPipeline.from_pretrained(tmp_path / "saved").get_label_ids(["7", "1"]) == [7, 1]
    again = built(tmp_path / "saved", guidance_scale=guidance_scale)
    assert torch.equal(drawn(again, [7, 1, 0]), drawn(model, [7, 1, 0]))


def test_guidance_is_the_pipelines(tmp_path):
    """Its pipeline knows no class by the number 1,000, so of a small one there must be as many."""
    folder = foreign_dit(tmp_path, classes=1000)
    names = tuple(map(str, range(1000)))
    theirs = drawn_by_pipeline(folder, [7, 999], 4.0)
    torch.testing.assert_close(drawn(built(folder, names=names), [7, 999]), theirs, atol=1e-5, rtol=1e-4)
    assert (drawn(built(folder, names=names, guidance_scale=1.0), [7, 999]) - theirs).abs().max() > 1e-4


def test_the_half_that_tells_the_variance_is_left_out(folder):
    model = built(folder)
    x0, t, labels = torch.rand(2, *SHAPE) * 2 - 1, torch.tensor([10, 800]), torch.tensor([3, 7])
    eps = torch.randn(2, *model.sample_shape)
    x_t = model.path.amplitudes(t).scale * model.encode(x0) + model.path.amplitudes(t).std * eps
    prediction = model.backbone.transformer(x_t, t, labels).sample
    assert prediction.shape[1] == 2 * x_t.shape[1]
    loss = denoising_loss(model, x0, labels, t, eps)
    torch.testing.assert_close(loss, (prediction[:, : x_t.shape[1]] - eps).square().flatten(1).sum(1))
    loss.sum().backward()
    rows = model.backbone.transformer.proj_out_2.weight.grad.reshape(4, -1, 16)  # of each place of a patch
    assert rows[:, :4].abs().sum() > 0
    assert rows[:, 4:].abs().sum() == 0


def test_labels_are_never_dropped(folder):
    model = built(folder).train()
    x, t, labels = torch.randn(64, *model.sample_shape), torch.full((64,), 500), torch.full((64,), 7)
    before = torch.random.get_rng_state()
    prediction = model.predict(x, t, labels)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(prediction, model.eval().predict(x, t, labels))


def test_what_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"images of \(1, 16, 16\) with 10 classes, the dataset has .* with 2;"
    ):
        built(folder, loaded=False, names=("a", "b"))
    with pytest.raises(ConfigurationError, match=r"the dataset has \(3, 16, 16\)"):
        built(folder, loaded=False, image_shape=(3, 16, 16))
    with pytest.raises(ConfigurationError, match="DiT draws under class labels, the dataset has none"):
        built(folder, loaded=False, names=None)
    with pytest.raises(ConfigurationError, match="it is a StableDiffusion3Pipeline; take model=sd3"):
        built(foreign_sd3(tmp_path / "sd3"), loaded=False)


@pytest.mark.parametrize(
    ("part", "changes", "says"),
    [
        ("transformer", {"out_channels": 5}, "turns 4 channels into 5; noisy samples have 4"),
        ("transformer", {"_class_name": "PixArtTransformer2DModel"}, "only a DiTTransformer2DModel can be read there"),
        ("scheduler", {"variance_type": "learned_range", "_class_name": "DDPMScheduler"}, "learnt variance"),
    ],
)
def test_parts_that_do_not_fit_are_refused(folder, tmp_path, part, changes, says):
    copied = shutil.copytree(folder, tmp_path / "copied")
    file = copied / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    if part == "scheduler":
        index = copied / "model_index.json"
        index.write_text(index.read_text().replace("DDIMScheduler", "DDPMScheduler"))
    with pytest.raises(ConfigurationError, match=says):
        built(copied, loaded=False)


def test_the_former_name_of_its_network_is_read(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copied")
    for file in (copied / "model_index.json", copied / "transformer" / "config.json"):
        file.write_text(file.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    assert torch.equal(drawn(built(copied), [7, 1]), drawn(built(folder), [7, 1]))
