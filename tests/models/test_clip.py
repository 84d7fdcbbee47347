"""The CLIP wrapper and the critic built on its tower."""

import json
import pickle
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.features import feature_extractor
from unlearn_runner.models.clip import pretrained_clip, small_clip
from unlearn_runner.models.critic import Critic

SMALL = {"width": 16, "layers": 1, "heads": 2, "text_width": 16, "text_layers": 1, "embed_dim": 8}


def test_images_are_seen_as_open_clip_shows_them():
    clip = small_clip(0, **SMALL)
    shown = open_clip.image_transform(
        clip.size, is_train=False, mean=clip.mean.flatten().tolist(), std=clip.std.flatten().tolist()
    )
    pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = shown(Image.fromarray(pixels.numpy()))
    ours = clip.pixels(pixels.permute(2, 0, 1)[None] / 127.5 - 1)
    torch.testing.assert_close(ours[0], theirs, rtol=1e-5, atol=1e-5)
    grey = torch.rand(2, 1, 32, 32) * 2 - 1
    assert clip.pixels(grey).shape == (2, 3, 16, 16)
    torch.testing.assert_close(clip.of_images(grey).norm(dim=1), torch.ones(2))


def test_texts_are_those_of_the_network():
    clip = small_clip(0, **SMALL)
    tokens = open_clip.SimpleTokenizer(context_length=16)(["a seven", "trousers"])
    theirs = normalize(clip.network.encode_text(tokens), dim=1)
    torch.testing.assert_close(clip.of_texts(["a seven", "trousers"]), theirs)


def test_weights_come_from_the_seed_and_go_through_a_file(tmp_path):
    before = torch.get_rng_state()
    a, b, c = (small_clip(seed, **SMALL) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(a.of_images(images), b.of_images(images))
    assert not torch.equal(a.of_images(images), c.of_images(images))
    a.save(tmp_path)
    c.load(tmp_path)
    assert torch.equal(a.of_images(images), c.of_images(images))
    assert not any(weight.requires_grad for weight in a.parameters())


def test_one_of_open_clips_models_from_a_file(tmp_path):
    torch.manual_seed(0)
    network = open_clip.create_model("RN50")
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    clip = pretrained_clip("RN50", str(tmp_path / "weights.pt"))
    for name, weight in network.state_dict().items():
        assert torch.equal(clip.network.state_dict()[name], weight), name
    assert clip.of_texts(["a seven"]).shape == (1, clip.num_features)
    assert clip.name == "open_clip RN50 weights.pt"


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """Two small models of one architecture for open_clip, with either activation."""
    folder = tmp_path_factory.mktemp("configs")
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    for name, more in (("small-for-tests", {}), ("small-for-tests-quickgelu", {"quick_gelu": True})):
        (folder / f"{name}.json").write_text(json.dumps(config | more))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    return open_clip.create_model("small-for-tests").state_dict()


def test_weights_are_used_with_the_activation_that_they_learnt_with(configured, tmp_path):
    """Whatever tells it: the tag, the config beside a file, its own entries, its name."""
    with pytest.raises(
        ConfigurationError, match=r"network\.model=ViT-L-14: .*'openai' learnt with QuickGELU.*L-14-quick"
    ):
        pretrained_clip("ViT-L-14", "openai")
    for tag in ("openai", "metaclip_fullcc", "dfn2b"):
        with pytest.raises(ConfigurationError, match=r"take judge\.extractor.open_clip_model=ViT-B-16-quickgelu"):
            feature_extractor("open_clip", None, "ViT-B-16", tag)
    hub, own, plain = (tmp_path / name / "open_clip_model.safetensors" for name in ("hub", "own", "plain"))
    for file in (hub, own, plain):
        file.parent.mkdir()
    weights = {name: part.contiguous() for name, part in configured.items()}
    save_file(weights, hub)
    save_file(weights, plain)
    save_file(weights | {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}, own)
    (hub.parent / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    for file in (hub, own):
        with pytest.raises(
            ConfigurationError, match=r"learnt with QuickGELU, and this model has GELU; take .*-quickgelu"
        ):
            pretrained_clip("small-for-tests", str(file))
    quick, gelu = pretrained_clip("small-for-tests-quickgelu", str(hub)), pretrained_clip("small-for-tests", str(plain))
    assert quick.provenance["clip_activation"] == "QuickGELU"
    assert gelu.provenance == {
        "clip": "open_clip small-for-tests open_clip_model.safetensors",
        "clip_activation": "GELU",
    }
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert not torch.equal(quick.of_images(images), gelu.of_images(images))
    assert "clip_activation" not in small_clip(0, **SMALL).provenance
    with pytest.raises(ConfigurationError, match="learnt with QuickGELU"):
        pretrained_clip("ViT-B-32", str(copied(plain, tmp_path / "ViT-B-32-openai.safetensors")))
    (hub.parent / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    with pytest.raises(
        ConfigurationError, match=r"learnt with GELU, and this model has QuickGELU; take .*=small-for-tests"
    ):
        pretrained_clip("small-for-tests-quickgelu", str(hub))


def copied(source: Path, place: Path) -> Path:
    place.write_bytes(source.read_bytes())
    return place


class Malicious:
    """What a hostile file holds: unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("kind", ["torch", "pickle", "script", "npz", "cut"])
def test_a_file_that_holds_more_than_weights_is_not_read(configured, tmp_path, kind):
    """And no message advises to trust it."""
    mark, file = tmp_path / "mark", tmp_path / ("weights.npz" if kind == "npz" else "weights.pt")
    if kind == "torch":
        torch.save(configured | {"extra": Malicious(mark)}, file)
    elif kind == "script":
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))
    elif kind == "npz":
        np.savez(file, weights=np.array([Malicious(mark)], dtype=object), allow_pickle=True)
    else:
        file.write_bytes(pickle.dumps(Malicious(mark)) if kind == "pickle" else b"PK\x03\x04 cut short")
    for option, load in (
        ("clip.network.pretrained", lambda: pretrained_clip("small-for-tests", str(file))),
        (
            "judge.extractor.open_clip_pretrained",
            lambda: feature_extractor("open_clip", None, "small-for-tests", str(file)),
        ),
    ):
        with pytest.raises(ConfigurationError, match=rf"{option}=.*weights\.\w+: expected safetensors") as raised:
            load()
        assert "weights_only" not in str(raised.value)
        assert "trust" not in str(raised.value)
    assert not mark.exists()


def test_texts_that_are_cut_are_said(caplog):
    clip = small_clip(0, **SMALL)
    clip.of_texts(["a seven"])
    assert not caplog.records
    clip.of_texts(["a seven", "one word after another until there are more of them than it can read at once"])
    assert "CLIP reads only the first 16 tokens of a text; these are longer: 'one word" in caplog.text


def test_refuses(tmp_path):
    with pytest.raises(ConfigurationError, match="open_clip has no such model; take ViT-B-32"):
        pretrained_clip("ViT-Z", "openai")
    with pytest.raises(ConfigurationError, match=r"RN50 needs the weights '.*nowhere\.pt', which could not be had"):
        pretrained_clip("RN50", str(tmp_path / "nowhere.pt"))
    with pytest.raises(ConfigurationError, match="width must divide by heads=2, got 15"):
        small_clip(0, **(SMALL | {"width": 15}))
    with pytest.raises(ConfigurationError, match="must divide by patch_size=4, got 18"):
        small_clip(0, image_size=18, **SMALL)


def test_critic_reads_latents_times_and_prompts():
    clip = small_clip(0, **SMALL)
    critic = Critic(clip, num_channels=4)
    x, level, texts = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 1.0]), clip.of_texts(["a", "b", "c"])
    values = critic(x, level, texts)
    assert values.shape == (3,)
    assert ((values > 0) & (values < 1)).all()
    for other in (critic(x + 1, level, texts), critic(x, level / 2, texts), critic(x, level, texts.flip(1))):
        assert (other != values).all()
    values.sum().backward()
    assert all(weight.grad is not None for weight in critic.tower.parameters())
    assert not any(weight.requires_grad for weight in clip.parameters()), "CLIP itself stays as it is"
