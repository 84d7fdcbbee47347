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
