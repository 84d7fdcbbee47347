"""Extractors from weights made here: the hub's cannot be had in a test."""

import pytest
import torch
from torch.nn import functional as F

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.classifier import ClassifierRecipe, trained_judge
from unlearn_runner.evaluation.features import feature_extractor

CPU = torch.device("cpu")


def test_open_clip_features(clip_weights, digits, shared_cache):
    import open_clip

    extractor = feature_extractor("open_clip", None, "tiny-for-tests", str(clip_weights))
    judge = trained_judge(digits, ClassifierRecipe(max_steps=4), shared_cache, CPU, extractor)
    judged = judge(digits.forget.pixels[:5])
    assert judged.features.shape == (5, 12)
    assert judged.features.square().mean().item() == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(judged.is_logits, judged.logits), "CLIP's tower has no classes: the classifier's serve"
    assert "weights.pt" in judge.provenance()["extractor"]

    model, _, preprocess = open_clip.create_model_and_transforms("tiny-for-tests", pretrained=str(clip_weights))
    from PIL import Image

    picture = Image.fromarray(digits.forget.pixels[0, 0].numpy()).convert("RGB")
    with torch.no_grad():
        wanted = F.normalize(model.eval().encode_image(preprocess(picture)[None]), dim=1) * 12**0.5
    assert torch.cosine_similarity(wanted, judged.features[:1]).item() > 0.999


def test_open_clip_without_weights_says_what_to_give(tmp_path):
    with pytest.raises(ConfigurationError, match=r"open_clip_pretrained=<file>"):
        feature_extractor("open_clip", None, "ViT-B-32", str(tmp_path / "none.pt"))


def test_a_damaged_inception_is_fetched_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    file.parent.mkdir()
    file.write_text("half of it")
    fetched = []

    def download(url, path, **_):
        fetched.append(path)
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ConfigurationError, match=r"could not be downloaded \(no network\); get it from https://"):
        feature_extractor("inception")
    assert fetched == [str(file)]
    assert f"{file.name}.damaged-1, downloaded again" in capsys.readouterr().out
    assert (file.parent / f"{file.name}.damaged-1").read_text() == "half of it"


def test_inception_from_a_file(tmp_path, digits):
    """The real network of torch-fidelity, with random weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    def without_weights(*_, **__):
        raise OSError("no network")

    network = module.FeatureExtractorInceptionV3.__new__(module.FeatureExtractorInceptionV3)
    original, module.load_state_dict_from_url = module.load_state_dict_from_url, without_weights
    try:
        with pytest.raises(OSError, match="no network"):
            network.__init__("inception", ["2048"])
    finally:
        module.load_state_dict_from_url = original
    torch.save(network.state_dict(), tmp_path / "weights.pth")  # built, and not yet filled: random

    extractor = feature_extractor("inception", str(tmp_path / "weights.pth"))
    features, logits = extractor(digits.forget.pixels[:2])
    assert features.shape == (2, 2048)
    assert logits.shape == (2, 1008)
    assert "weights.pth" in extractor.name


def test_inception_refuses_what_is_not_its_weights(tmp_path):
    with pytest.raises(ConfigurationError, match="no such file"):
        feature_extractor("inception", str(tmp_path / "none.pth"))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ConfigurationError, match="is not torch-fidelity's InceptionV3"):
        feature_extractor("inception", str(tmp_path / "other.pth"))


def test_inception_without_network_says_which_file_to_put_where(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    with pytest.raises(
        ConfigurationError, match=r"could not be downloaded .* put it at .*checkpoints/weights-inception"
    ):
        feature_extractor("inception")


def coloured(n=4):
    return torch.randint(256, (n, 3, 40, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_efficientnet_sees_pictures_as_its_package_wants_them():
    """Its documented preprocessing: mean 127 and deviation 128 of pixels from 0 to 255, at 224 pixels a side."""
    from efficientnet_lite_pytorch import EfficientNet

    extractor = feature_extractor("efficientnet")
    images = coloured()
    features, logits = extractor(images)
    assert (features.shape, logits.shape) == ((4, extractor.num_features), (4, 1000))
    assert EfficientNet.get_image_size("efficientnet-lite0") == 224
    resized = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
    wanted = extractor.network((resized - 127) / 128)  # the package's whole network, its own pooling and dropout
    assert torch.allclose(logits, wanted, atol=1e-4)
    grey = images[:, :1]
    assert torch.allclose(extractor(grey)[0], extractor(grey.expand(-1, 3, -1, -1))[0])


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_dinov2_from_a_folder(tmp_path, kind):
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**small)).eval()
    model.save_pretrained(tmp_path / "tiny")
    extractor = feature_extractor("dinov2", dinov2_weights=str(tmp_path / "tiny"))
    assert (extractor.num_features, extractor.name) == (16, "dinov2 tiny (2 layers)")
    images = coloured()
    features, logits = extractor(images)
    assert (features.shape, logits) == ((4, 16), None)
    resized = F.interpolate(images.float() / 255, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(part)[:, None, None] for part in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        wanted = model(pixel_values=(resized - mean) / std).last_hidden_state[:, 0]
    assert torch.allclose(features, wanted, atol=1e-5)


def test_dinov2_refuses_what_is_none(tmp_path):
    with pytest.raises(ConfigurationError, match=r"needs judge\.extractor\.dinov2_weights=<folder>.*got None"):
        feature_extractor("dinov2")
    with pytest.raises(ConfigurationError, match=r"needs judge\.extractor\.dinov2_weights=<folder>"):
        feature_extractor("dinov2", dinov2_weights=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigurationError, match=r"is no DINOv2 in transformers' format \(it is a bert\)"):
        feature_extractor("dinov2", dinov2_weights=str(tmp_path))


def test_a_dinov2_with_weights_missing_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import Dinov2Config, Dinov2Model

    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match="1 of its weights are missing"):
        feature_extractor("dinov2", dinov2_weights=str(tmp_path))
