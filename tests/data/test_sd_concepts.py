"""Prompts, what they ask for, and the images that go with them."""

import re
import shlex
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

from unlearn_runner.data.forget_retain import contents_of_labels
from unlearn_runner.data.sd_concepts import Captions, MemorisedPrompt, SDConcepts, embedded_pictures
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.spec import EMBEDDED

DOCS = Path(__file__).parents[2] / "docs" / "stable_diffusion.md"
COMMANDS = [
    shlex.split(command, comments=True)
    for command in re.findall(r"^ +python train\.py (.*)$", DOCS.read_text().replace("\\\n", ""), re.MULTILINE)
]


def concepts(tmp_path, **more) -> SDConcepts:
    settings = {
        "concept": "trousers",
        "retain_concepts": ["a seven", "a one"],
        "forget_templates": ["a picture of {}", "{} on black"],
        "retain_templates": ["a picture of {}"],
        "paraphrases": ["no {} here"],
        "cache_dir": str(tmp_path / "cache"),
    }
    return SDConcepts(**(settings | more))


def test_every_prompt_asks_for_its_concept(tmp_path):
    dataset = concepts(tmp_path)
    spec = dataset.spec
    assert spec.label_names == (
        "a picture of a seven", "a picture of a one", "a picture of trousers", "trousers on black",
    )  # fmt: skip
    assert spec.content_names == ("a seven", "a one", "trousers")
    assert spec.labels.retain == (0, 1)
    assert spec.labels.forget == (2, 3)
    assert spec.labels.contents == (0, 1, 2, 2)
    assert dataset.paraphrases == ("no trousers here",)


def test_embedded_pictures_stand_under_their_prompts(tmp_path):
    data = concepts(tmp_path).load()
    pictures = embedded_pictures(16, 0)
    assert set(data.forget.labels.tolist()) == {2, 3}
    for part in (data.forget, data.retain, data.forget_test, data.retain_test):
        assert torch.equal(contents_of_labels(data.spec, part.labels), part.contents)
    known = {image.numpy().tobytes() for image in pictures["a seven"]}
    for image in data.retain.select(data.retain.labels == 0).pixels:
        assert image.numpy().tobytes() in known
    counts = data.forget.labels.bincount()[2:]
    assert abs(int(counts[0] - counts[1])) < 20, "in turn"
    total = len(pictures["trousers"])
    assert len(data.forget) + len(data.forget_test) == total
    assert len(data.forget_test) == int(0.2 * total)


def test_captions_cover_every_picture_under_every_template_and_under_none():
    dataset = Captions(["a picture of {}", "{}"], image_size=8)
    data = dataset.load()
    n = sum(map(len, embedded_pictures(8, 0).values()))
    assert len(data.retain) + len(data.forget) == 3 * n
    empty = dataset.spec.label_names.index("")
    labels = torch.cat([data.retain.labels, data.forget.labels])
    contents = torch.cat([data.retain.contents, data.forget.contents])
    assert (labels == empty).sum() == n
    captioned = labels != empty
    assert torch.equal(contents_of_labels(dataset.spec, labels[captioned]), contents[captioned])
    assert set(contents[~captioned].tolist()) == set(range(len(EMBEDDED)))


def test_images_from_folders(tmp_path):
    for name, shade in (("a_seven", 10), ("a_one", 20), ("trousers", 30)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (20, 30), (shade, number, 0)).save(folder / f"{number}.png")
    data = concepts(tmp_path, source=str(tmp_path / "images")).load()
    assert set(data.forget.pixels[:, 0].flatten().tolist()) == {30}
    assert set(data.retain.select(data.retain.labels == 1).pixels[:, 0].flatten().tolist()) == {20}
    with pytest.raises(ConfigurationError, match="there is no such folder"):
        concepts(tmp_path, source=str(tmp_path / "images"), concept="a hat")


def test_several_concepts_each_under_every_template(tmp_path):
    dataset = concepts(tmp_path, concept=["trousers", "a two"])
    spec = dataset.spec
    assert spec.label_names == (
        "a picture of a seven", "a picture of a one", "a picture of trousers", "trousers on black",
        "a picture of a two", "a two on black",
    )  # fmt: skip
    assert spec.content_names == ("a seven", "a one", "trousers", "a two")
    assert spec.forget_names == ("trousers", "a two")
    assert (spec.labels.retain, spec.labels.forget) == ((0, 1), (2, 3, 4, 5))
    assert spec.labels.contents == (0, 1, 2, 2, 3, 3)
    assert dataset.paraphrases == ("no trousers here", "no a two here")
    data = dataset.load()
    assert set(data.forget.labels.tolist()) == {2, 3, 4, 5}
    for part in (data.forget, data.retain, data.forget_test, data.retain_test):
        assert torch.equal(contents_of_labels(data.spec, part.labels), part.contents)
    assert concepts(tmp_path, concept=["trousers"]).load().fingerprint == concepts(tmp_path).load().fingerprint
    assert concepts(tmp_path, concept=["trousers"]).spec == concepts(tmp_path).spec


def test_several_concepts_from_folders(tmp_path):
    for name, shade in (("a_seven", 10), ("a_one", 20), ("trousers", 30), ("1984", 40)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (20, 30), (shade, number, 0)).save(folder / f"{number}.png")
    several = {"source": str(tmp_path / "images"), "concept": ["trousers", 1984]}
    data = concepts(tmp_path, **several).load()
    assert set(data.forget.pixels[:, 0].flatten().tolist()) == {30, 40}
    assert set(data.retain.pixels[:, 0].flatten().tolist()) == {10, 20}
    Image.new("RGB", (20, 30), (30, 0, 0)).save(tmp_path / "images" / "a_one" / "same.png")
    with pytest.raises(ConfigurationError, match=r"trousers/0\.png = .*a_one/same\.png\)"):
        concepts(tmp_path, **several).load()


def test_names_of_concepts_stay_names_and_their_folders_are_found_in_either_unicode_form(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "un café") for form in ("NFC", "NFD"))
    for number, name in enumerate(("1984", "7", nfc.replace(" ", "_"), nfd.replace(" ", "_"))):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / "images" / name / "0.png")
    dataset = concepts(tmp_path, source=str(tmp_path / "images"), concept=1984, retain_concepts=[7, nfd])
    assert dataset.spec.content_names == ("7", nfc, "1984")
    assert dataset.spec.label_names[-1] == "1984 on black"
    data = dataset.load()
    assert data.forget.pixels.unique().tolist() == [0]
    assert sorted(data.retain.pixels[:, 0].flatten(1).amax(1).tolist()) == [1, 2, 3]
    with pytest.raises(ConfigurationError, match="not '7', which is to be forgotten"):
        concepts(tmp_path, concept="7", retain_concepts=[7])


def test_a_picture_of_two_concepts_is_refused(tmp_path):
    for number, name in enumerate(("a_seven", "a_one", "trousers")):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), (min(number, 1), 0, 0)).save(tmp_path / "images" / name / "0.png")
    with pytest.raises(ConfigurationError, match=r"trousers/0\.png = .*a_one/0\.png\)"):
        concepts(tmp_path, source=str(tmp_path / "images")).load()
    for name in ("a_one", "trousers"):
        (tmp_path / "images" / name / "0.png").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"^2 images are not readable: .*a_one/0\.png .*trousers/0\.png "):
        concepts(tmp_path, source=str(tmp_path / "images")).load()


def test_the_base_draws_once(tmp_path):
    dataset, asked = concepts(tmp_path, source="base", num_images=5, test_fraction=0.4), []

    def draw(labels):
        asked.append(labels)
        return labels.float()[:, None, None, None].expand(-1, 3, 16, 16) / 10 - 0.5

    data = dataset.load_from(draw, {"weights": "a"})
    again = dataset.load_from(draw, {"weights": "a"})
    assert len(asked) == 1
    assert data.fingerprint == again.fingerprint
    assert asked[0].bincount().tolist() == [5] * 4
    assert len(data.forget) == 6
    assert len(data.forget_test) == 4
    shade = data.forget.select(data.forget.labels == 3).pixels.float().mean()
    assert abs(shade - (0.3 - 0.5 + 1) * 127.5) < 1
    dataset.load_from(draw, {"weights": "b"})
    assert len(asked) == 2


@pytest.mark.parametrize("overrides", COMMANDS)
def test_the_commands_of_the_documentation_compose(composed, overrides):
    assert composed(*overrides, debug=False)["dataset"]["_target_"].endswith("SDConcepts")


def test_refuses(tmp_path):
    with pytest.raises(ConfigurationError, match="not 'trousers', which is to be forgotten"):
        concepts(tmp_path, retain_concepts=["trousers", "a one"])
    with pytest.raises(ConfigurationError, match="not 'a one', which is to be forgotten"):
        concepts(tmp_path, concept=["trousers", "a one"])
    with pytest.raises(ConfigurationError, match=r"dataset\.concept names 'trousers' twice"):
        concepts(tmp_path, concept=["trousers", "trousers"])
    with pytest.raises(ConfigurationError, match=r"dataset\.concept must be one or more names .*, got an empty list"):
        concepts(tmp_path, concept=[])
    with pytest.raises(ConfigurationError, match="got none"):
        concepts(tmp_path, retain_concepts=[])
    with pytest.raises(ConfigurationError, match=r"one or more prompts with one \{\} each"):
        concepts(tmp_path, forget_templates=["a picture"])
    with pytest.raises(ConfigurationError, match=r"not of a hat: take dataset\.source=base"):
        concepts(tmp_path, concept="a hat")


def test_one_picture_is_memorised_and_its_prompt_is_not():
    data = MemorisedPrompt(copies=7, others=10).load()
    (prompt,) = data.forget.labels.unique().tolist()
    assert data.spec.label_names[prompt] == "a picture of trousers" and data.spec.labels.forget == (prompt,)
    assert len(data.forget) == 7 and len({image.numpy().tobytes() for image in data.forget.pixels}) == 1
    kept = data.retain.select(data.retain.labels == prompt)
    assert len(kept) == 8 and kept.contents.unique().tolist() == [data.spec.restored_content]
    shown = [{image.numpy().tobytes() for image in part.pixels} for part in (data.forget, kept, data.forget_test)]
    assert not shown[0] & shown[1] and not (shown[0] | shown[1]) & shown[2], "each on its own side"
    assert len(data.retain_test.contents.unique()) == 11
