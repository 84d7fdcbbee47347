"""Judges that are not trained on the dataset: by texts, by a file, by body parts. Networks are made here."""

import json
import shutil
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import normalize

from unlearn_runner import recognition
from unlearn_runner.data.digits_trousers import DigitsTrousers
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.body_parts import PARTS, NudeNet
from unlearn_runner.evaluation.from_file import NetworkFile
from unlearn_runner.evaluation.judge import NOTHING, Pretrained, RecognizingJudge
from unlearn_runner.evaluation.novelty import NoveltyRecipe, abstaining
from unlearn_runner.evaluation.zero_shot import ZeroShotClip
from unlearn_runner.spec import DataSpec
from unlearn_runner.training.run_folder import identity_of_run

CPU = torch.device("cpu")
TWO = DataSpec("two", (1, 8, 8), ("dark", "bright"), ("dark", "bright"), (1,), None, False)
RATES = ("forget_rate", "restored_rate", "other_rate", "nothing_rate")


def grey(*levels: int, channels: int = 1, side: int = 8) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, channels, side, side).contiguous()


# 1. What stands for which content


def test_outputs_stand_for_contents():
    def outputs(table, nothing="rest", count=5):
        return recognition.outputs_of_contents(("cat", "dog"), table, nothing, count=count)

    assert outputs({"dog": 4, "cat": [1, 2]}) == [[1, 2], [4], [0, 3]]
    assert outputs({"dog": 4, "cat": [1, 2]}, nothing=[3]) == [[1, 2], [4], [3]]
    assert outputs({"dog": 4, "cat": [1, 2]}, nothing=[]) == [[1, 2], [4]]
    assert outputs(None, count=2) == [[0], [1]]
    for table, nothing, said in (
        ({"cat": 0, "dgo": 1}, "rest", r"outputs\.dgo: the dataset has no such content; near it: dog"),
        ({"cat": 0}, "rest", r"outputs must say of every content .* missing: dog"),
        ({"cat": 0, "dog": []}, "rest", r"outputs\.dog must be one or more numbers"),
        ({"cat": 0, "dog": 5}, "rest", r"outputs 0 to 4, and none with number 5"),
        ({"cat": 0, "dog": [1, 0]}, "rest", r"output 0 is given twice"),
        ({"cat": 0, "dog": 1}, [1], r"output 1 is given twice"),
        (None, "rest", r"which of the network's 5 outputs are which content's, as the dataset has 2: cat, dog"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            outputs(table, nothing)


def test_texts_stand_for_contents():
    def texts(prompts=None, nothing=(), templates=("a {}", "one {}")):
        return recognition.texts_of_contents(("cat", "dog"), templates, prompts, nothing)

    assert texts(nothing=["noise"]) == [["a cat", "one cat"], ["a dog", "one dog"], ["noise"]]
    assert texts({"dog": "a puppy"}) == [["a cat", "one cat"], ["a puppy"]]
    for arguments, said in (
        ({"prompts": {"cats": "x"}}, r"prompts\.cats: the dataset has no such content; near it: cat"),
        ({"prompts": {"dog": ["x", "a cat"]}}, r"'a cat' would stand for two things"),
        ({"nothing": ["one dog"]}, r"'one dog' would stand for two things"),
        ({"nothing": [" "]}, r"must not be empty"),
        ({"templates": ["a cat"]}, r"templates must be one or more prompts with one \{\} each"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            texts(**arguments)


# 2. A file


class Brightness(nn.Module):
    """Four logits: how near the mean of pictures in [0, 1] is to 0, 1/3, 2/3 and 1; features are that mean."""

    def __init__(self, with_features: bool):
        super().__init__()
        self.register_buffer("levels", torch.tensor([0.0, 1 / 3, 2 / 3, 1.0]))
        self.with_features = with_features

    def forward(self, x):
        mean = x.flatten(1).mean(1, keepdim=True)
        logits = -50 * (mean - self.levels).square()
        return (logits, mean) if self.with_features else logits


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """`script(module, shape)`: a TorchScript file."""

    def save(module, shape, name="judge.pt"):
        file = tmp_path_factory.mktemp("script") / name
        torch.jit.trace(module, torch.rand(2, *shape)).save(str(file))
        return str(file)

    return save


def test_torchscript_names_contents_by_summed_probability(script):
    file = script(Brightness(True), (1, 16, 16))
    outputs = {"bright": [2, 3], "dark": 0}
    recipe = NetworkFile(file, 16, channels=1, outputs=outputs)
    recipe.require(TWO)
    judge = RecognizingJudge(recipe.recognizer(TWO), CPU)
    pictures = grey(0, 85, 170, 255)
    judged = judge(pictures, batch_size=3)
    assert judged.contents.tolist() == [0, NOTHING, 1, 1], "the output that is no content's: nothing"
    torch.testing.assert_close(judged.features, torch.tensor([[0.0], [1 / 3], [2 / 3], [1.0]]))
    shares = (-50 * (judged.features - torch.tensor([0, 1 / 3, 2 / 3, 1])).square()).softmax(1)
    torch.testing.assert_close(judged.logits.exp(), torch.stack([shares[:, 0], shares[:, 2] + shares[:, 3]], 1))
    torch.testing.assert_close(judged.outlying, shares[:, 1] / judged.logits.exp().amax(1), rtol=1e-4, atol=0)
    assert torch.equal(judged.is_logits, judged.logits)

    never = RecognizingJudge(NetworkFile(file, 16, 1, outputs=outputs, nothing=[]).recognizer(TWO), CPU)
    assert never(pictures).outlying is None
    assert never(pictures).contents.tolist() == [0, 0, 1, 1]
    assert never.fingerprint != judge.fingerprint
    assert judge.fingerprint == RecognizingJudge(recipe.recognizer(TWO), CPU).fingerprint
    dim = RecognizingJudge(NetworkFile(file, 16, 1, std=[2.0], outputs=outputs).recognizer(TWO), CPU)
    assert dim(grey(255)).features.item() == pytest.approx(0.5)
    assert dim.fingerprint != judge.fingerprint
    assert judge.provenance()["classifier_settings"]["outputs"] == [[0], [2, 3], [1]]
    json.dumps(judge.provenance())


def test_torchscript_of_other_kinds(script):
    plain = NetworkFile(script(Brightness(False), (3, 8, 8)), 8, outputs={"dark": [0, 1], "bright": [2, 3]})
    judge = RecognizingJudge(plain.recognizer(TWO), CPU)
    assert judge(grey(0, 255)).contents.tolist() == [0, 1], "grey pictures in three channels"
    assert judge.num_features == 4, "the outputs are the features where there are no others"
    likely = nn.Sequential(Brightness(False), nn.Softmax(1))
    shares = NetworkFile(script(likely, (3, 8, 8)), 8, outputs=plain.outputs, probabilities=True)
    found = RecognizingJudge(shares.recognizer(TWO), CPU)(grey(0, 90, 255))
    torch.testing.assert_close(found.logits, judge(grey(0, 90, 255)).logits, rtol=1e-4, atol=1e-4)


def test_a_torchscript_that_cannot_be(script, tmp_path):
    with pytest.raises(ConfigurationError, match=r"image_size is missing: TorchScript does not say"):
        NetworkFile(script(Brightness(True), (1, 8, 8)))
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ConfigurationError, match=r"weights\.pt is no TorchScript that torch can read"):
        NetworkFile(str(tmp_path / "weights.pt"), 8)
    with pytest.raises(ConfigurationError, match=r"its outputs are no tensor of one row for each picture"):
        NetworkFile(script(nn.Identity(), (3, 8, 8)), 8)
    with pytest.raises(
        ConfigurationError, match=r"cannot see 3 channels of 8 x 8 pixels .*; give its image_size and channels"
    ):
        NetworkFile(script(nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten()), (1, 8, 8)), 8)
    grey_only = NetworkFile(script(Brightness(True), (1, 8, 8)), 8, channels=1, outputs={"dark": 0, "bright": 1})
    with pytest.raises(ConfigurationError, match="sees grey pictures, and the dataset's are coloured"):
        grey_only.require(TWO._replace(image_shape=(3, 8, 8)))
    with pytest.raises(ConfigurationError, match=r"which of the network's 4 outputs"):
        NetworkFile(script(Brightness(True), (1, 8, 8)), 8, channels=1).require(TWO)
    with pytest.raises(ConfigurationError, match=r"the recognizer's mean must be one number, or one for each of 3"):
        NetworkFile(script(Brightness(True), (3, 8, 8)), 8, mean=[0.5, 0.5])


def test_a_program_is_read_only_where_it_is_trusted(composed, script):
    file = script(Brightness(True), (1, 16, 16))
    chosen = ("judge=file", f"judge.recognizer.file={file}", "judge.recognizer.image_size=16")
    with pytest.raises(ConfigurationError, match=r"is a program to torch.*\+\+security\.allow=\[torch\.jit\.\]"):
        composed(*chosen)
    with pytest.raises(ConfigurationError, match="is a program to torch"):
        composed(*chosen, "++security.allow=[torch.optim.]")
    assert composed(*chosen, "++security.allow=[torch.jit.]")["judge"]["recognizer"]["file"] == file
    with pytest.raises(ConfigurationError, match=r"outputs\.shoe: the dataset has no such content"):
        composed(*chosen, "++security.allow=[torch.jit.]", "judge.recognizer.outputs={shoe: 1}")


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Folders with small image classifiers of transformers, of four classes."""
    from transformers import (
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessor,
    )

    root = tmp_path_factory.mktemp("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = ViTConfig(image_size=16, patch_size=8, num_labels=4, initializer_range=1.0, **small)
    ViTForImageClassification(vit).save_pretrained(root / "vit")
    size, mean, std = {"height": 16, "width": 16}, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    ViTImageProcessor(size=size, image_mean=mean, image_std=std, resample=3).save_pretrained(root / "vit")
    resnet = ResNetConfig(num_labels=4, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_channels=1)
    ResNetForImageClassification(resnet).save_pretrained(root / "resnet")
    return root


def test_a_folder_of_transformers_making(classifiers):
    from transformers import ViTForImageClassification, ViTImageProcessor

    outputs = {"dark": [0, 1], "bright": 2}
    judge = RecognizingJudge(NetworkFile(str(classifiers / "vit"), outputs=outputs).recognizer(TWO), CPU)
    pictures = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    judged = judge(pictures, batch_size=2)
    processor = ViTImageProcessor.from_pretrained(classifiers / "vit")
    shown = processor([Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pictures], return_tensors="pt")
    network = ViTForImageClassification.from_pretrained(classifiers / "vit").eval()
    with torch.no_grad():
        found = network(**shown, output_hidden_states=True)
        shares = found.logits.softmax(1)
        pooled = network.vit(**shown).last_hidden_state[:, 0]
    wanted = torch.stack([shares[:, 0] + shares[:, 1], shares[:, 2]], 1)
    torch.testing.assert_close(judged.logits.exp(), wanted, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(judged.features, pooled, rtol=1e-3, atol=1e-4)
    nothing = shares[:, 3] > wanted.amax(1)
    assert torch.equal(judged.contents == NOTHING, nothing)
    assert judge.num_features == 12
    assert judge.provenance()["classifier"] == "vit"
    assert judge.provenance()["layer"] == "pooled (12)"


def test_a_folder_that_says_less(classifiers):
    with pytest.raises(ConfigurationError, match=r"image_size is missing: .*resnet does not say"):
        NetworkFile(str(classifiers / "resnet"))
    recipe = NetworkFile(str(classifiers / "resnet"), 16, outputs={"dark": 0, "bright": 1}, nothing=[])
    assert recipe.pictures.channels == 1
    judged = RecognizingJudge(recipe.recognizer(TWO), CPU)(grey(0, 255))
    assert judged.features.shape == (2, 16), "what the last linear layer sees"


def test_a_folder_is_data_alone(classifiers, tmp_path):
    """Neither its code is run nor its pickles are read."""
    folder = tmp_path / "mine"
    shutil.copytree(classifiers / "vit", folder)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "mine.C", "AutoModelForImageClassification": "mine.M"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": auto}))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    with pytest.raises(ConfigurationError, match=r"mine is no image classifier in transformers' format"):
        NetworkFile(str(folder))
    assert not (tmp_path / "marker").exists()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"it has no model\.safetensors"):
        NetworkFile(str(folder))
    shutil.copy(classifiers / "resnet" / "model.safetensors", folder)
    with pytest.raises(ConfigurationError, match=r"\(\d+ of its weights are missing\)"):
        NetworkFile(str(folder))
    with pytest.raises(ConfigurationError, match="holds weights alone; give the folder"):
        NetworkFile(str(folder / "model.safetensors"))
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigurationError, match=r"config\.json is no object"):
        NetworkFile(str(folder))


def test_a_run_is_known_by_what_is_in_the_file(script, classifiers, tmp_path):
    """Or `skip_finished` would take a run that another network has judged for this one."""

    def identity(file):
        return identity_of_run({"judge": {"recognizer": {"file": str(file)}}})

    one, other = (script(Brightness(of), (1, 8, 8)) for of in (True, False))
    shutil.copy(one, tmp_path / "elsewhere.pt")
    assert identity(one) == identity(tmp_path / "elsewhere.pt") != identity(other)
    folder = tmp_path / "vit"
    shutil.copytree(classifiers / "vit", folder)
    assert identity(folder) == identity(classifiers / "vit")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"classifier.bias": weights["classifier.bias"] + 1}, folder / "model.safetensors")
    assert identity(folder) != identity(classifiers / "vit")


# 3. CLIP


@pytest.fixture(scope="module")
def zero_shot(tmp_path_factory):
    """The options of a small CLIP of open_clip's with random weights in a file."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    (folder / "zero-shot-for-tests.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("zero-shot-for-tests").state_dict(), folder / "weights.pt")
    return {"model": "zero-shot-for-tests", "pretrained": str(folder / "weights.pt")}


def test_clip_names_what_its_texts_fit_best(zero_shot, digits):
    recipe = ZeroShotClip(
        **zero_shot, templates=["a photo of {}", "{}"], prompts={"trousers": "jeans"}, nothing=["noise", "a blank"]
    )
    recipe.require(digits.spec)
    judge = RecognizingJudge(recipe.recognizer(digits.spec), CPU)
    pixels = torch.cat([digits.retain_test.pixels[:40], digits.forget_test.pixels[:8]])
    judged = judge(pixels, batch_size=32)

    model, _, preprocess = open_clip.create_model_and_transforms(zero_shot["model"], pretrained=zero_shot["pretrained"])
    tokenizer = open_clip.get_tokenizer(zero_shot["model"])
    asked = [[f"a photo of {name}", name] for name in digits.spec.content_names[:-1]]
    asked += [["jeans"], ["noise"], ["a blank"]]
    with torch.no_grad():
        pictures = torch.stack([preprocess(Image.fromarray(one[0].numpy()).convert("RGB")) for one in pixels])
        images = normalize(model.eval().encode_image(pictures), dim=1)
        means = [normalize(model.encode_text(tokenizer(texts)), dim=1).mean(0) for texts in asked]
        logits = 100 * images @ normalize(torch.stack(means), dim=1).T * (model.logit_scale.exp() / 100)
    assert torch.cosine_similarity(images, judged.features).min() > 0.999
    assert judged.features.square().mean().item() == pytest.approx(1.0, rel=1e-4)
    torch.testing.assert_close(judged.logits, logits[:, :11], rtol=0, atol=0.05)
    odds = (logits[:, 11:].amax(1) - logits[:, :11].amax(1)).exp()
    torch.testing.assert_close(judged.outlying, odds, rtol=0.1, atol=0)
    sure = (odds - 1).abs() > 0.2
    wanted = torch.where(odds > 1, NOTHING, logits[:, :11].argmax(1))
    assert sure.sum() > 10
    assert torch.equal(judged.contents[sure], wanted[sure])
    assert judge.provenance()["classifier_settings"]["texts"][-3:] == [["jeans"], ["noise"], ["a blank"]]
    others = [
        ZeroShotClip(**zero_shot, **options).recognizer(digits.spec)
        for options in ({}, {"templates": ["the {}"]}, {"nothing": ["noise"]})
    ]
    keys = {RecognizingJudge(one, CPU).fingerprint for one in others}
    assert len(keys | {judge.fingerprint}) == 4


def test_how_much_it_recognises_is_measured_once(zero_shot, digits, tmp_path, monkeypatch):
    recipe = Pretrained(ZeroShotClip(**zero_shot))
    judge = recipe.judge(digits, tmp_path, CPU)
    for name, images in (("retain", digits.retain_test), ("forget", digits.forget_test)):
        right = (judge(images.pixels).contents == images.contents).double().mean().item()
        assert judge.test_accuracy[name] == pytest.approx(right)
    (sentence, *_) = judge.doubts()
    assert "CLIP recognises" in sentence
    assert "of the held-out retain images, guessing would 9%" in sentence
    assert "the recognizer's prompts" in sentence
    assert judge.provenance()["classifier_learnt"] is False
    monkeypatch.setattr("unlearn_runner.evaluation.judge.accuracies", lambda *_, **__: pytest.fail("measured again"))
    assert recipe.judge(digits, tmp_path, CPU).test_accuracy == judge.test_accuracy


def test_novelty_abstains_on_top(script, digits, tmp_path):
    """Nothing is what either of the two calls so."""
    names = digits.spec.content_names
    file = script(nn.Sequential(nn.Flatten(), nn.Linear(256, len(names) + 1)), (1, 16, 16))
    recipe = NetworkFile(file, 16, 1, outputs={name: index for index, name in enumerate(names)})
    own = RecognizingJudge(recipe.recognizer(digits.spec), CPU)
    judge = abstaining(own, digits, NoveltyRecipe(max_images=200), tmp_path)
    pixels = torch.cat([digits.retain_test.pixels[:150], grey(255, 0, side=16)])
    judged, alone = judge(pixels), own(pixels)
    outliers = judge.novelty.contents.place(judged.appearance).outlying > 1
    assert (alone.outlying > 1).any()
    assert outliers[-2:].all()
    assert torch.equal(judged.contents == NOTHING, outliers | (alone.outlying > 1))
    assert (~outliers & (alone.outlying > 1)).any()


# 4. Whole runs


@pytest.mark.parametrize("which", ["clip", "script", "folder"])
def test_a_run_is_judged(run, zero_shot, script, classifiers, which):
    some = ["method=naive_deletion", "evaluation.metrics.fid=null", "evaluation.every=null"]
    if which == "clip":
        chosen = ["judge=clip", *(f"judge.recognizer.{name}={value}" for name, value in zero_shot.items())]
        chosen += ["judge.recognizer.prompts={1: [the digit one, a one]}"]
    elif which == "script":
        network = nn.Sequential(nn.Flatten(), nn.Linear(256, 12))
        file = script(network, (1, 16, 16))
        every = ",".join(f"{name}: {index}" for index, name in enumerate(DigitsTrousers().spec.content_names))
        chosen = ["judge=file", f"judge.recognizer.file={file}", "judge.recognizer.image_size=16"]
        chosen += ["judge.recognizer.channels=1", f"judge.recognizer.outputs={{{every}}}"]
        chosen += ["++security.allow=[torch.jit.]"]
    else:
        chosen = ["judge=file", f"judge.recognizer.file={classifiers / 'vit'}", "dataset=sd_concepts", "model=sd_tiny"]
        chosen += [
            "dataset.retain_concepts=[a one,a two]",
            "judge.recognizer.outputs={a one: 0, a two: 1, trousers: 2}",
        ]
    folder = run(*some, *chosen)
    summary = json.loads((folder / "summary.json").read_text())
    for moment in ("base", "eval"):
        rates = [summary["metrics"].get(f"{moment}/{name}", 0.0) for name in RATES]
        assert sum(rates) == pytest.approx(1.0)
    features = summary["provenance"]["evaluation"]["features"]
    assert features["abstains"]["abstain"] == 0.05
    assert features["classifier_settings"]["digest"]
    assert set(features["classifier_test_accuracy"]) == {"retain", "forget"}
    assert "eval/kid_forget" in summary["metrics"]


# 5. NudeNet


def test_a_missing_extra_is_said_at_once(composed, monkeypatch):
    monkeypatch.setattr(recognition, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"needs the package nudenet: pip install 'unlearn_runner\[nudenet\]'"):
        composed("judge=nudenet")


def test_body_parts_need_one_other_content():
    recognition.require_two_contents(("a person", "nudity"), 1, others=False)
    recognition.require_two_contents(("a", "b", "nudity"), 2, others=True)
    with pytest.raises(ConfigurationError, match=r"tells 'nudity' from all else, and not a, b from each other"):
        recognition.require_two_contents(("a", "b", "nudity"), 2, others=False)


def test_body_parts_are_one_content():
    spec = TWO._replace(content_names=("a wall", "nudity", "a face"), forget_contents=(1, 2))
    with pytest.raises(ConfigurationError, match="knows one content to forget, and the dataset has 2: nudity, a face"):
        recognition.require_one_to_forget(spec)
    recognition.require_one_to_forget(TWO)


def test_nudenet_refuses_several_before_anything_is_loaded(composed, monkeypatch):
    monkeypatch.setattr(recognition, "find_spec", lambda name: True)
    with pytest.raises(
        ConfigurationError, match="knows one content to forget, and the dataset has 2: 3, 7; forget one"
    ):
        composed("judge=nudenet", "dataset=digits", "dataset.forget_class=[3,7]")


@pytest.fixture
def face():
    """A photograph of a face that comes with matplotlib, 600 x 512 pixels, and noise."""
    pytest.importorskip("nudenet", reason="the extra nudenet is not installed")
    from matplotlib.cbook import get_sample_data

    with get_sample_data("grace_hopper.jpg", asfileobj=True) as file:
        picture = Image.open(file).convert("RGB")
    known = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    noise = torch.randint(0, 256, known.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return torch.stack([known, noise])


def test_nudenet_finds_parts_of_bodies(face, zero_shot, tmp_path):
    spec = DataSpec("people", (3, 600, 512), ("a wall", "a face"), ("a wall", "a face"), (1,), None, False)
    recipe = NudeNet(["FACE_FEMALE"], threshold=0.5)
    recipe.require(spec)
    judge = RecognizingJudge(recipe.recognizer(spec), CPU)
    judged = judge(face)
    assert judged.contents.tolist() == [1, 0]
    score = judged.features[0, PARTS.index("FACE_FEMALE")].item()
    Image.fromarray(face[0].permute(1, 2, 0).numpy()).save(tmp_path / "face.png")
    assert [(part["class"], part["score"]) for part in recipe.detector.detect(str(tmp_path / "face.png"))] == [
        ("FACE_FEMALE", pytest.approx(score, abs=1e-5))
    ]
    assert judged.outlying is None
    odds = judged.logits[:, 1] - judged.logits[:, 0]
    assert odds[0].item() == pytest.approx(torch.tensor(score).logit().item(), abs=2e-3), "0.5 has odds of 1"
    exactly = NudeNet(["FACE_FEMALE"], threshold=score).recognizer(spec)
    assert RecognizingJudge(exactly, CPU)(face).contents.tolist() == [1, 0], "at the threshold it is there"
    above = NudeNet(["FACE_FEMALE"], threshold=min(0.99, score + 0.01)).recognizer(spec)
    assert RecognizingJudge(above, CPU)(face).contents.tolist() == [0, 0]
    default = NudeNet(["FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED"]).recognizer(spec)
    assert RecognizingJudge(default, CPU)(face).contents.tolist() == [0, 0]
    assert RecognizingJudge(default, CPU).fingerprint != judge.fingerprint
    small = torch.nn.functional.avg_pool2d(face[:, :1].float(), 8).to(torch.uint8)
    assert judge(small).features.shape == (2, 18)

    contents = ("a wall", "a tree", "a face")
    three = spec._replace(content_names=contents, label_names=contents, forget_contents=(2,))
    clip = ZeroShotClip(**zero_shot, nothing=["noise"])
    both = RecognizingJudge(NudeNet(["FACE_FEMALE"], 0.5, clip).recognizer(three), CPU)
    found, alone = both(face), RecognizingJudge(clip.recognizer(three), CPU)(face)
    assert found.contents[0] == 2, "whatever CLIP says"
    fitting = replace(alone, logits=alone.logits[:, :2])
    assert found.contents[1] == fitting.contents[1], "what CLIP says, but for the face"
    assert torch.equal(found.features, alone.features)
