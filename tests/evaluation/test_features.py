"""Extractors from weights made here: the hub's cannot be had in a test."""

import json

import pytest
import torch
from torch.nn import functional as F

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.classifier import ClassifierRecipe, trained_judge
from unlearn_runner.evaluation.features import feature_extractor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory):
    """A tiny CLIP that open_clip builds from a configuration, and its weights in a file."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1},
    }
    (folder / "tiny-for-tests.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-for-tests").state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


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


def test_a_pickle_is_not_read(tmp_path):
    import pickle

    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "written"), "w")

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ConfigurationError, match="objects, which could run code and are not read") as raised:
        feature_extractor("inception", str(tmp_path / "evil.pth"))
    assert "weights_only" not in str(raised.value), "nobody is told to trust it"
    assert not (tmp_path / "written").exists()


def test_inception_without_network_says_which_file_to_put_where(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    with pytest.raises(
        ConfigurationError, match=r"could not be downloaded .* put it at .*checkpoints/weights-inception"
    ):
        feature_extractor("inception")


def test_unknown_extractor():
    with pytest.raises(ConfigurationError, match="one of classifier, inception, open_clip; got 'resnet'"):
        feature_extractor("resnet")
