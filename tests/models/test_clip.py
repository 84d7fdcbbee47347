"""The CLIP wrapper and the critic built on its tower."""

import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from unlearn_runner.errors import ConfigurationError
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
