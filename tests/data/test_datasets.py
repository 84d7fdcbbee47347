"""Each dataset says which images are forget, retain and held out, and refuses what cannot work."""

import hashlib
import os
import pickle
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image

from unlearn_runner.data.digits import Digits
from unlearn_runner.data.digits_trousers import DigitsTrousers, draw_trousers
from unlearn_runner.data.forget_retain import ForgetRetain
from unlearn_runner.data.hub import decode_rows
from unlearn_runner.data.hub_classes import HubClasses
from unlearn_runner.data.image_folder import ImageFolder
from unlearn_runner.data.images import Decoder, common_mode, find_images
from unlearn_runner.data.mnist_trousers import MnistTrousers
from unlearn_runner.data.sd_concepts import SDConcepts
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.spec import Labels, class_index, class_indices, imagenet_words

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the real images in {SHARED}")


def test_digits_trousers(digits):
    assert digits.spec.label_names == tuple("0123456789")
    assert digits.spec.forget_names == ("trousers",)
    assert digits.forget_labels == [1]
    for forget, retain in ((digits.forget, digits.retain), (digits.forget_test, digits.retain_test)):
        assert (forget.contents == 10).all()
        assert (retain.contents == retain.labels).all()
        ones = int((retain.labels == 1).sum())
        assert len(forget) == ones, "contamination 0.5: as many trousers as ones"
    assert len(digits.retain) + len(digits.retain_test) == 1797
    assert digits.retain.pixels.dtype == torch.uint8
    train = {row.numpy().tobytes() for row in digits.retain.pixels}
    assert sum(row.numpy().tobytes() in train for row in digits.retain_test.pixels) < 5, "held out is held out"


def test_contamination_is_the_share_of_the_label():
    data = DigitsTrousers(contamination=0.2).load()
    ones = int((data.retain.labels == 1).sum())
    assert len(data.forget) / (len(data.forget) + ones) == pytest.approx(0.2, abs=0.01)


def test_fingerprint_follows_the_arrays(digits):
    assert DigitsTrousers().load().fingerprint == digits.fingerprint
    assert DigitsTrousers(seed=1).load().fingerprint != digits.fingerprint
    assert DigitsTrousers(contamination=0.4).load().fingerprint != digits.fingerprint
    assert DigitsTrousers(horizontal_flip=True).load().fingerprint != digits.fingerprint


def test_digits_forget_a_whole_class(digits):
    data = Digits(forget_class="7").load()
    assert data.forget_labels == [7]
    assert (data.forget.contents == 7).all()
    assert not (data.retain.contents == 7).any()
    parts = (data.forget, data.retain, data.forget_test, data.retain_test)
    assert sum(map(len, parts)) == 1797
    assert len(data.retain_test) + len(data.forget_test) == len(digits.retain_test)
    known = {"names": tuple("0123456789"), "contents": tuple(range(10))}
    assert data.spec.labels == Labels(retain=(0, 1, 2, 3, 4, 5, 6, 8, 9), forget=(7,), **known)
    trousers = digits.spec.labels
    assert trousers == Labels(retain=(0, 2, 3, 4, 5, 6, 7, 8, 9), forget=(1,), **known), "where the trousers are"
    assert Digits(forget_class=7, conditional=False).spec.labels is None
    with pytest.raises(ConfigurationError, match="there is no such class"):
        Digits(forget_class="seven")


@pytest.mark.parametrize("wanted", [["3", "7"], [7, 3], ["3", 7]])
def test_digits_forget_several_classes(wanted):
    data = Digits(forget_class=wanted).load()
    assert data.spec.forget_contents == (3, 7)
    assert data.spec.forget_names == ("3", "7")
    assert data.forget_labels == [3, 7]
    labels = data.spec.labels
    assert (labels.retain, labels.forget) == ((0, 1, 2, 4, 5, 6, 8, 9), (3, 7))
    for part in (data.forget, data.forget_test):
        assert set(part.contents.tolist()) == {3, 7}
    for part in (data.retain, data.retain_test):
        assert set(part.contents.tolist()) == set(range(10)) - {3, 7}
    alone = [Digits(forget_class=digit).load() for digit in (3, 7)]
    for part in ("forget", "forget_test"):
        assert len(getattr(data, part)) == sum(len(getattr(one, part)) for one in alone)
    assert data.fingerprint == Digits(forget_class=[3, 7]).load().fingerprint, "in whatever order, by name or by index"
    assert data.fingerprint not in [one.fingerprint for one in alone]


def test_the_fingerprint_of_one_class_is_what_it_was_before_there_could_be_several(digits):
    """Published caches are found by it."""

    def earlier(data, known):
        digest = hashlib.sha256(repr(known).encode())
        for part in (data.forget, data.retain, data.forget_test, data.retain_test):
            for array in part:
                digest.update(str(tuple(array.shape)).encode())
                digest.update(np.ascontiguousarray(array.numpy()).reshape(-1).view(np.uint8))
        return digest.hexdigest()[:16]

    names = tuple("0123456789")
    assert digits.fingerprint == earlier(digits, ((1, 16, 16), names, (*names, "trousers"), 10, 1, False))
    for wanted in ("7", ["7"]):
        whole = Digits(forget_class=wanted).load()
        assert whole.fingerprint == earlier(whole, ((1, 16, 16), names, names, 7, None, False))


def test_each_content_to_forget_needs_an_image():
    whole = Digits(forget_class=[3, 7]).load()
    threes = whole.forget.select(whole.forget.contents == 3)
    with pytest.raises(ConfigurationError, match="images of each content to forget, and there are none of '7'"):
        ForgetRetain(whole.spec, threes, whole.retain, whole.forget_test, whole.retain_test)


def test_unconditional_digits_have_no_labels():
    data = DigitsTrousers(conditional=False).load()
    assert data.spec.label_names is None
    assert data.forget_labels == [0]


def test_trousers_differ_from_each_other():
    trousers = draw_trousers(50, 16, seed=0)
    assert len({row.numpy().tobytes() for row in trousers}) == 50
    assert torch.equal(trousers, draw_trousers(50, 16, seed=0))
    assert not torch.equal(trousers, draw_trousers(50, 16, seed=1))
    legs = trousers[:, 0, 12].float()  # low down, left and right of the gap
    assert (legs[:, 4:7].amax(1) > 60).all()
    assert (legs[:, 9:12].amax(1) > 60).all()


def test_all_or_nothing_is_refused(digits):
    none = digits.forget.select(torch.arange(0))
    for forget, retain, got in (
        (none, digits.retain, f"got 0 to forget and {len(digits.retain)} to keep"),
        (digits.forget, none, f"got {len(digits.forget)} to forget and 0 to keep"),
    ):
        with pytest.raises(ConfigurationError, match=got):
            ForgetRetain(digits.spec, forget, retain, digits.forget_test, digits.retain_test)


def test_a_part_without_images_names_the_option(tmp_path):
    source = {"source": str(hub_folder(tmp_path / "digits")), "garment_source": str(hub_folder(tmp_path / "clothes"))}
    class_folders(tmp_path / "one", {"1": 2})
    for dataset, sentence in (
        (DigitsTrousers(contamination=1e-9),
         "dataset.contamination=1e-09, dataset.test_fraction=0.2: expected .* got 0 to forget and 1442 to keep "),
        (DigitsTrousers(contamination=0.3, test_fraction=0.9999), "dataset.test_fraction=0.9999: .* got 0 to forget"),
        (MnistTrousers(**source, contamination=1e-9, image_size=8), "dataset.contamination=1e-09, .* got 0 to forget"),
        (HubClasses("one", str(tmp_path / "one"), 1, 8), "dataset.forget_class=1: .* got 2 to forget and 0 to keep "),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match=sentence):
            dataset.load()


def test_few_images_may_have_none_held_out_but_some_are_always_left_to_train_on(tmp_path):
    folders = str(folder_of(tmp_path / "f", 2)), str(folder_of(tmp_path / "r", 3, seed=1)), str(tmp_path / "cache")
    concepts = "trousers", ["a one"], ["a {}"], ["a {}"], str(tmp_path / "cache")
    for dataset, settings in (
        (Digits, ()), (DigitsTrousers, ()), (SDConcepts, concepts), (ImageFolder, folders),
    ):  # fmt: skip
        data = dataset(*settings, test_fraction=1e-4).load()
        assert len(data.forget_test) == len(data.retain_test) == 0
        assert data.forget_test.pixels.shape[1:] == data.spec.image_shape
        data = dataset(*settings, test_fraction=1 - 2**-53).load()  # the largest number below 1
        assert len(data.forget) == 1


@needs_shared
def test_mnist_trousers():
    settings = {"source": str(SHARED / "mnist"), "garment_source": str(SHARED / "fashion_mnist")}
    data = MnistTrousers(**settings).load()
    assert (len(data.retain), len(data.forget), len(data.retain_test)) == (60_000, 6_742, 10_000)
    assert data.retain.pixels.shape[1:] == (1, 28, 28)
    assert data.forget_labels == [1]
    distinct = {row.numpy().tobytes() for row in data.forget.pixels}
    assert 300 < len(distinct) <= 394, "drawn with replacement from the 394 there are"


def test_one_garment_many_times(tmp_path):
    source = {"source": str(hub_folder(tmp_path / "digits")), "garment_source": str(hub_folder(tmp_path / "clothes"))}
    settings = source | {"garment": "t-shirt", "contamination": None, "conditional": False, "image_size": 8}
    data = MnistTrousers(**settings, garments=7, distinct=1).load()
    assert data.spec.name == "mnist_tshirt"
    assert len(data.forget) == 7
    assert len(data.forget.pixels.unique(dim=0)) == 1
    assert len(data.forget_test) == 2, "held-out garments once each"
    seen = data.forget_alike.pixels.flatten(1).tolist()
    assert len(seen) == 1
    assert data.forget.pixels[0].flatten().tolist() not in seen
    assert data.forget_share == 7 / 27
    assert MnistTrousers(**settings, garments=7).load().forget_alike is None
    for wrong, sentence in (
        ({"garments": 7, "distinct": 3}, "has only 2 of 't-shirt'"),
        ({"garments": None}, "give dataset.contamination or dataset.garments"),
        ({"garments": 7, "contamination": 0.5}, "give dataset.contamination or dataset.garments"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            MnistTrousers(**settings | wrong).load()


@pytest.mark.slow  # what it shares with MNIST is below, in small
@needs_shared
def test_cifar10():
    settings = {"name": "cifar10", "source": str(SHARED / "cifar10"), "image_size": 32}
    data = HubClasses(**settings, forget_class="cat").load()
    assert (len(data.retain), len(data.forget), len(data.forget_test)) == (45_000, 5_000, 1_000)
    assert data.forget_labels == [3]
    assert data.spec.restored_content is None
    with pytest.raises(ConfigurationError, match="no such class"):
        HubClasses(**settings, forget_class="unicorn")


def test_one_class_of_a_labelled_dataset(tmp_path):
    settings = {"name": "drawn", "source": str(hub_folder(tmp_path / "a")), "image_size": 8}
    grey = HubClasses(**settings, forget_class="7", channels=1).load()
    assert grey.spec.image_shape == (1, 8, 8)
    assert (len(grey.forget), len(grey.retain), len(grey.forget_test), len(grey.retain_test)) == (2, 18, 2, 18)
    assert grey.forget_labels == [7]
    colour = HubClasses(**settings, forget_class=3, conditional=False).load()
    assert colour.spec.image_shape == (3, 8, 8)
    assert (colour.forget.contents == 3).all()
    assert (colour.forget.labels == 0).all()
    several = HubClasses(**settings, forget_class=["7", 3], channels=1).load()
    assert (len(several.forget), len(several.retain), len(several.forget_test)) == (4, 16, 4)
    assert set(several.forget.contents.tolist()) == set(several.forget_test.contents.tolist()) == {3, 7}
    assert several.sized_by == "dataset.forget_class=[3, 7]"


def test_some_images_of_some_classes(tmp_path):
    settings = {"name": "drawn", "source": str(hub_folder(tmp_path / "a")), "image_size": 8, "forget_class": "7"}
    data = HubClasses(**settings, retain_classes=["1", 4], images_per_class=1).load()
    assert data.spec.label_names == tuple("0123456789"), "the model knows all of them"
    assert data.spec.labels.retain == (1, 4)
    assert data.spec.labels.forget == (7,)
    assert sorted(data.retain.labels.tolist()) == sorted(data.retain_test.labels.tolist()) == [1, 4]
    assert (len(data.forget), len(data.forget_test)) == (1, 1)
    whole = HubClasses(**settings).load()
    rows = (whole.retain.labels == 4).nonzero()[:, 0]
    (four,) = data.retain.pixels[data.retain.labels == 4].flatten(1).tolist()
    assert four in whole.retain.pixels[rows].flatten(1).tolist()
    assert torch.equal(HubClasses(**settings, images_per_class=2).load().retain.pixels, whole.retain.pixels)
    drawn = {
        HubClasses(**settings, images_per_class=1, seed=seed).load().retain.pixels.numpy().tobytes()
        for seed in range(4)
    }
    assert len(drawn) > 1
    for wrong, sentence in (
        ({"retain_classes": ["7", "1"]}, "retain_classes names '7', which is to be forgotten"),
        ({"retain_classes": ["cow"]}, "dataset.retain_classes=cow: there is no such class"),
        ({"retain_classes": []}, "dataset.retain_classes must be one or more names"),
        ({"test_split": "train"}, "dataset.test_split must be another split than 'train'"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            HubClasses(**settings | wrong)


def test_classes_of_imagenet_by_number_or_word(tmp_path):
    def folder(name, classes):
        for split in ("train", "validation"):
            for number, called in enumerate(classes):
                place = tmp_path / name / split / called
                place.mkdir(parents=True)
                for image in range(2):
                    shade = (20 * number, 100 * image, 100 * (split == "train"))
                    Image.new("RGB", (8, 8), shade).save(place / f"{image}.png")
        return str(tmp_path / name)

    settings = {"name": "imagenet", "image_size": 8, "test_split": "validation", "label_set": "imagenet"}
    source = folder("some", ["n02099601", "tench", "Siamese_cat"])
    data = HubClasses(**settings, source=source, forget_class="golden_retriever").load()
    assert len(data.spec.label_names) == 1000
    assert data.spec.forget_names == ("golden retriever",)
    assert data.forget_labels == [207]
    assert data.spec.labels.retain == (0, 284)
    assert data.retain.labels.unique().tolist() == [0, 284]
    assert HubClasses(**settings, source=source, forget_class=["n02123597", 0]).load().forget_labels == [0, 284]
    kept = HubClasses(**settings, source=source, forget_class="tench", retain_classes=["n02099601"]).load()
    assert kept.spec.labels.retain == (207,)
    for wrong, sentence in (
        (
            {"forget_class": "golden retreiver"},
            "one of 1000 names, .* near it: golden retriever",
        ),
        ({"forget_class": "zebra"}, "has no class 'zebra', .* it has .*golden retriever"),
        ({"forget_class": "tench", "retain_classes": ["zebra"]}, "has no class 'zebra'"),
        ({"forget_class": "crane"}, "dataset.forget_class=crane: there is no such class"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            HubClasses(**settings, source=source, **wrong)
    with pytest.raises(ConfigurationError, match="'golden_eagle_x' is no one class of ImageNet"):
        HubClasses(**settings, source=folder("odd", ["golden_eagle_x", "tench"]), forget_class="tench")
    first = [words[0] for words in imagenet_words()]
    whole = HubClasses(**settings, source=folder("all", first), forget_class="crane (n03126707)")
    assert whole.spec.forget_contents == (517,)


def test_labels_without_names_are_refused(tmp_path):
    import datasets

    images = [Image.new("L", (8, 8))] * 3
    table = datasets.Dataset.from_dict(
        {"image": images, "label": [0, 1, 2]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    for split in ("train", "test"):
        table.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(ConfigurationError, match="expected a column 'label' with named classes"):
        HubClasses("drawn", str(tmp_path), "7", 8)


def test_class_by_name_or_index():
    names = ("cat", "dog")
    assert class_index("dog", names) == class_index(1, names) == 1
    for wrong in ("cow", 2, -1):
        with pytest.raises(ConfigurationError, match="expected one of cat, dog"):
            class_index(wrong, names)


def test_classes_by_name_or_index():
    names = ("cat", "dog", "2", "three")
    assert class_indices("dog", names) == class_indices(["dog"], names) == (1,)
    assert class_indices(["three", "cat"], names) == class_indices([3, 0], names) == class_indices([0, "three"], names)
    assert class_indices([2, 1], names) == (1, 2), "a name first"
    for wrong, sentence in (
        ([], "must be one or more names of what is to be forgotten, got an empty list"),
        (["dog", 1], "names 'dog' twice"),
        (["dog", "dog"], "names 'dog' twice"),
        (["cat", "dog", 2, 3], "names all 4 classes, so none would be kept"),
        (["cat", "cow"], "dataset.forget_class=cow: there is no such class"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            class_indices(wrong, names)


def hub_folder(path: Path, n: int = 20) -> Path:
    """A dataset in the hub's layout, images as PNG files in parquet, drawn here."""
    import datasets

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(n)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    )
    table = datasets.Dataset.from_dict({"image": images, "label": [i % 10 for i in range(n)]}, features=features)
    path.mkdir()
    for split in ("train", "test"):
        table.to_parquet(path / f"{split}-00000-of-00001.parquet")
    return path


def test_hub_layout_is_decoded_exactly(tmp_path):
    data = MnistTrousers(
        source=str(hub_folder(tmp_path / "a")), garment_source=str(hub_folder(tmp_path / "b")), image_size=8
    )
    pixels = decode_rows(data.digits["train"], range(20), Decoder((1, 8, 8)), "dataset.source")
    for row, image in enumerate(data.digits["train"]["image"]):
        assert np.array_equal(pixels[row, 0].numpy(), np.asarray(image))
    loaded = data.load()
    assert len(loaded.forget) == 2
    assert loaded.retain.labels.tolist() == [i % 10 for i in range(20)]


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"dataset.source=/nowhere: there is no such folder"):
        HubClasses("any", "/nowhere", "7", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match=r"dataset.source=.*could not load"):
        HubClasses("any", str(tmp_path / "empty"), "7", 8)


def test_unreachable_hub_names_the_local_way(monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConfigurationError, match=r"give the folder: dataset.source=<folder>"):
        HubClasses("cifar10", "uoft-cs/cifar10", "airplane", 32)


def folder_of(path: Path, n: int, mode: str = "RGB", size=(40, 30), seed=0) -> Path:
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        array = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(array).convert(mode).save(path / f"{i}.png")
    return path


def test_image_folder(tmp_path):
    forget, retain = folder_of(tmp_path / "f" / "deep", 5).parent, folder_of(tmp_path / "r", 20, seed=1)
    data = ImageFolder(str(forget), str(retain), str(tmp_path / "cache"), image_size=16, test_fraction=0.2).load()
    assert data.spec.image_shape == (3, 16, 16)
    sizes = [len(part) for part in (data.forget, data.forget_test, data.retain, data.retain_test)]
    assert sizes == [4, 1, 16, 4]
    assert data.spec.label_names is None


def test_large_folders_are_memory_mapped_and_equal(tmp_path):
    where = str(folder_of(tmp_path / "f", 4)), str(folder_of(tmp_path / "r", 9, seed=1)), str(tmp_path / "cache")
    small = ImageFolder(*where, image_size=16).load()
    for _ in range(2):  # decoded, then found
        large = ImageFolder(*where, image_size=16, max_resident_gb=1e-9).load()
        assert not large.resident
        assert large.fingerprint == small.fingerprint
    assert len(list((tmp_path / "cache" / "images").glob("*/pixels.uint8"))) == 2


def test_image_folder_refuses(tmp_path):
    colour, grey = folder_of(tmp_path / "c", 3), folder_of(tmp_path / "g", 3, mode="L")
    cache = str(tmp_path / "cache")
    with pytest.raises(ConfigurationError, match=r"mixed.*dataset.mode=RGB"):
        ImageFolder(str(colour), str(grey), cache)
    assert ImageFolder(str(colour), str(grey), cache, mode="L").spec.image_shape == (1, 32, 32)
    with pytest.raises(ConfigurationError, match="the same images"):
        ImageFolder(str(colour), str(colour), cache)
    with pytest.raises(ConfigurationError, match="there is no such folder"):
        ImageFolder(str(tmp_path / "nowhere"), str(grey), cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="no images in it"):
        ImageFolder(str(tmp_path / "empty"), str(grey), cache)
    (colour / "3.png").write_bytes(b"not a picture")
    with pytest.raises(ConfigurationError, match=r"3\.png is not a readable image"):
        ImageFolder(str(colour), str(grey), cache)


def test_one_image_is_enough(tmp_path):
    forget, retain = folder_of(tmp_path / "f", 1), folder_of(tmp_path / "r", 3, seed=1)
    data = ImageFolder(str(forget), str(retain), str(tmp_path / "cache"), image_size=16).load()
    assert [len(part) for part in (data.forget, data.forget_test, data.retain, data.retain_test)] == [1, 0, 3, 0]
    assert data.notes == ()


@pytest.mark.parametrize("max_resident_gb", [4.0, 1e-9])
def test_the_same_picture_on_both_sides_is_refused_whatever_its_name_and_format(tmp_path, max_resident_gb):
    forget, retain = folder_of(tmp_path / "f", 30), folder_of(tmp_path / "r", 30, seed=1)
    settings = {"image_size": 16, "max_resident_gb": max_resident_gb}
    ImageFolder(str(forget), str(retain), str(tmp_path / "cache"), **settings).load()
    with Image.open(forget / "7.png") as image:
        image.convert("RGBA").save(retain / "another name.tif")
    with pytest.raises(ConfigurationError, match=r"^1 image found, .*f/7\.png = .*r/another name\.tif\); leave"):
        ImageFolder(str(forget), str(retain), str(tmp_path / "cache"), **settings).load()


def test_grey_and_colour_are_distinguished_whatever_the_mode(tmp_path):
    folders = folder_of(tmp_path / "c", 2), folder_of(tmp_path / "g", 2, mode="L", seed=1)
    for name, mode in (("alpha", "RGBA"), ("palette", "P")):
        Image.effect_mandelbrot((20, 20), (-2, -1, 1, 1), 9).convert(mode).save(folders[0] / f"{name}.png")
    for name, mode in (("alpha", "LA"), ("one bit", "1"), ("sixteen", "I;16")):
        Image.effect_mandelbrot((20, 20), (-2, -1, 1, 1), 9).convert(mode).save(folders[1] / f"{name}.png")
    for folder, mode in zip(folders, ("RGB", "L"), strict=True):
        assert common_mode(find_images(str(folder), "here").files) == mode


def test_decoded_files_in_the_cache_are_those_of_the_background(tmp_path):
    forget, retain = folder_of(tmp_path / "f", 2, mode="L"), folder_of(tmp_path / "r", 2, mode="L", seed=1)
    Image.new("LA", (20, 20), (99, 0)).save(forget / "clear.png")
    for _ in range(2):
        for background, level in (("white", 255), ("black", 0)):
            settings = {"image_size": 16, "max_resident_gb": 1e-9, "background": background}
            data = ImageFolder(str(forget), str(retain), str(tmp_path / "cache"), **settings).load()
            assert (data.forget.pixels[-1] == level).all()
            assert data.notes == (
                f"dataset.forget_dir={forget}: 1 image with transparency, laid on {background} (dataset.background).",
            )
    with pytest.raises(ConfigurationError, match=r"dataset\.background must be a colour, .* got 'see-through'"):
        ImageFolder(str(forget), str(retain), str(tmp_path / "cache"), background="see-through")


NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def test_folders_are_found_in_either_unicode_form_and_both_are_read(tmp_path):
    retain = folder_of(tmp_path / "r", 3, seed=1)
    folder_of(tmp_path / NFD, 2)
    for name in (NFC, NFD):
        assert len(ImageFolder(str(tmp_path / name), str(retain), str(tmp_path / "cache")).files["forget"]) == 2
    folder_of(tmp_path / NFC, 4, seed=2)
    for name in (NFC, NFD):
        assert len(ImageFolder(str(tmp_path / name), str(retain), str(tmp_path / "cache")).files["forget"]) == 6


def test_unreadable_files_and_folders_are_named(tmp_path, monkeypatch):
    forget, retain = folder_of(tmp_path / "f", 2), folder_of(tmp_path / "r", 3, seed=1)
    settings = (str(forget), str(retain), str(tmp_path / "cache"))
    (forget / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ConfigurationError, match=r"gone\.png is not a readable image \(FileNotFoundError"):
        ImageFolder(*settings)
    large = ImageFolder(*settings, mode="RGB", max_resident_gb=1e-9)
    with pytest.raises(ConfigurationError, match=r"gone\.png is not a readable image \(FileNotFoundError"):
        large.load()
    (forget / "gone.png").unlink()
    (forget / "round.png").symlink_to(forget / "round.png")
    with pytest.raises(ConfigurationError, match=r"round\.png is not a readable image \(OSError: .*symbolic links"):
        ImageFolder(*settings)
    (forget / "round.png").unlink()
    (forget / "long.png").write_bytes((forget / "0.png").read_bytes()[:-600])
    dataset = ImageFolder(*settings)  # its header is whole
    with pytest.raises(ConfigurationError, match=r"long\.png is not a readable image \(.*; mend it or take it away"):
        dataset.load()
    (forget / "long.png").unlink()

    def denied(place):
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ConfigurationError, match=r"dataset\.forget_dir=.* cannot be listed \(Permission denied\)"):
        ImageFolder(*settings)


def class_folders(path: Path, classes: dict[str, int], splits=("train", "test")) -> Path:
    """A dataset as a folder of images by class."""
    for number, (split, (name, n)) in enumerate((split, item) for split in splits for item in classes.items()):
        folder_of(path / split / name, n, seed=number)
    return path


def test_a_folder_with_images_by_class(tmp_path):
    folder = class_folders(tmp_path / "own", {"1": 3, "2": 4, "3": 5})
    settings = {"name": "own", "source": str(folder), "image_size": 8}
    data = HubClasses(**settings, forget_class=1).load()
    assert data.spec.content_names == ("1", "2", "3")
    assert (len(data.forget), len(data.retain), len(data.forget_test)) == (3, 9, 3), "the class that is called 1"
    assert data.notes == ()
    exact = Decoder((3, 8, 8)).files(sorted((folder / "train" / "1").iterdir()))
    assert torch.equal(data.forget.pixels, exact)

    (folder / "train" / "1" / "._0.png").write_bytes(b"")
    (folder / "val" / "1").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "val" / "1" / "0.png")
    os.mkfifo(folder / "train" / "1" / "pipe.png")
    notes = HubClasses(**settings, forget_class=1).load().notes
    assert any("1 hidden file (" in note and "1 pipe, socket or device (" in note for note in notes), notes
    assert any(re.search(r"1 image in neither split, so not read \(.*/val/1/0\.png\)", note) for note in notes), notes

    shutil.copy(folder / "train" / "1" / "0.png", folder / "test" / "3" / "copy.png")
    with pytest.raises(ConfigurationError, match=r"train/1/0\.png = .*test/3/copy\.png"):
        HubClasses(**settings, forget_class=1).load()
    (folder / "test" / "3" / "copy.png").write_bytes(b"no picture")
    with pytest.raises(ConfigurationError, match=r"test/3/copy\.png is not a readable image"):
        HubClasses(**settings, forget_class=1).load()


def test_images_at_any_depth_belong_to_the_class_folder_and_loose_ones_are_named(tmp_path):
    folder = class_folders(tmp_path / "own", {"cat": 3, "dog": 2})
    for number, name in enumerate(("cat/sub/x.png", "cat/sub/deeper/y.png", "dog/cat/z.qoi")):
        (folder / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "train" / name)
    settings = {"name": "own", "source": str(folder), "forget_class": "cat", "image_size": 8}
    data = HubClasses(**settings).load()
    assert data.spec.content_names == ("cat", "dog")
    assert (len(data.forget), len(data.retain), len(data.forget_test), len(data.retain_test)) == (5, 3, 3, 2)
    assert data.notes == ()
    for split in ("train", "test"):
        loose = folder / split / "loose.png"
        Image.new("RGB", (8, 8)).save(loose)
        with pytest.raises(ConfigurationError) as raised:
            HubClasses(**settings)
        assert str(raised.value) == (
            f"dataset.source={folder}: 1 image in no class's folder ({loose}); move each into "
            f"{folder}/{split}/<class>/, or take it away."
        )
        loose.unlink()
    odd = folder / "train" / "cat" / os.fsdecode(b"\xff.png")
    shutil.copy(folder / "train" / "cat" / "0.png", odd)
    with pytest.raises(ConfigurationError, match=r"train/cat/\\xff\.png is not a readable image \(UnicodeDecodeError"):
        HubClasses(**settings)


def test_metadata_beside_the_images_stand_for_class_folders(tmp_path):
    for split in ("train", "test"):
        folder = folder_of(tmp_path / split, 2, seed=len(split))
        (folder / "metadata.csv").write_text("file_name,label\n0.png,cat\n1.png,dog\n")
    with pytest.raises(ConfigurationError, match=r"'label' with named classes among \['image', 'label'\]"):
        HubClasses("own", str(tmp_path), "cat", 8)


def test_all_files_that_cannot_be_read_are_said_at_once(tmp_path):
    forget, retain = folder_of(tmp_path / "f", 20), folder_of(tmp_path / "r", 5, seed=1)
    settings = {"image_size": 16, "test_fraction": 0.5}
    where = str(forget), str(retain), str(tmp_path / "cache")
    cut = [*(forget / f"{number}.png" for number in range(10)), retain / "3.png"]
    for file in cut:
        file.write_bytes(file.read_bytes()[:-600])  # its header is whole
    for max_resident_gb in (4.0, 1e-9):
        with pytest.raises(ConfigurationError) as raised:
            ImageFolder(*where, **settings, max_resident_gb=max_resident_gb).load()
        assert re.match(r"11 images are not readable: (\S+/f/\d\.png \(.*?\), ){3}\.\.\.; mend", str(raised.value))
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value), "as it goes to other processes"
    for file in cut[2:]:
        file.write_bytes(b"")
    with pytest.raises(
        ConfigurationError, match=r"^9 images are not readable: .*f/2\.png \(none of PNG, .*, \.\.\.; mend"
    ):
        ImageFolder(*where, **settings)
    for file in cut[3:]:
        file.unlink()
    Image.new("I;16", (20, 20)).save(retain / "grey.png")
    with pytest.raises(ConfigurationError) as raised:
        ImageFolder(*where, **settings)
    faults = str(raised.value).split("; besides, ")
    assert faults[0].startswith(f"{forget}/2.png is not a readable image (none of PNG")
    assert f"mixed ones (1 L, as {retain}/grey.png, 16 RGB, as {forget}/0.png)" in faults[1]
    folder = class_folders(tmp_path / "own", {"a": 2, "b": 2})
    for split, name in (("train", "a"), ("test", "b")):
        (folder / split / name / "0.png").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"^2 images are not readable: .*train/a/0\.png .*test/b/0\.png"):
        HubClasses("own", str(folder), "a", 8).load()


def test_a_class_in_two_unicode_forms_is_one_class(tmp_path):
    class_folders(tmp_path / "own", {NFC: 3, "tea": 4}, splits=("train",))
    class_folders(tmp_path / "own", {NFD: 2, "tea": 1}, splits=("test",))
    for name in (NFC, NFD):
        data = HubClasses("own", str(tmp_path / "own"), name, 8).load()
        assert data.spec.content_names == (NFC, "tea")
        assert (len(data.forget), len(data.forget_test)) == (3, 2)


def test_columns_are_named_by_options(tmp_path):
    import datasets

    names = datasets.ClassLabel(names=["a", "b"])
    features = {"id": datasets.Image(), "photo": datasets.Image(), "kind": names, "label": names}
    pictures = [Image.new("L", (8, 8), level) for level in range(4)]
    rows = {"id": pictures[::-1], "photo": pictures, "kind": [0, 1, 1, 1], "label": [1, 0, 0, 0]}
    for split in ("train", "test"):
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        table.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    settings = {"name": "own", "source": str(tmp_path), "forget_class": "a", "image_size": 8, "channels": 1}
    data = HubClasses(**settings, label_column="kind", image_column="photo").load()
    assert data.forget.pixels.flatten().unique().tolist() == [0]
    data = HubClasses(**settings, image_column="id").load()
    assert data.forget.pixels.flatten().unique().tolist() == [0, 1, 2]
    for wrong, sentence in (
        ({"label_column": "sort"}, r"a column 'sort' with named classes among \['id', .* dataset\.label_column=<name>"),
        ({}, r"one column of images, found \['id', 'photo'\] .* dataset\.image_column=<name>"),
        ({"image_column": "kind"}, r"dataset\.image_column=kind is no column of images"),
        ({"image_column": "sort"}, r"dataset\.image_column=sort is no column of images"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            HubClasses(**settings | wrong).load()


@pytest.mark.parametrize("label, image, sentence", [
    (-1, True, r"a class from 0 to 1 in the column 'label' of every row of its split 'test'; row 1 has -1"),
    (None, True, r"a class from 0 to 1 in the column 'label' of every row of its split 'test'; row 1 has None"),
    (1, False, r"dataset\.source: row 1 of its split 'test' has no image"),
    (1, b"no picture", r"dataset\.source: row 1 of its split 'test' is not a readable image"),
])  # fmt: skip
def test_rows_without_a_class_or_a_picture_are_named(tmp_path, label, image, sentence):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    picture = Image.new("L", (8, 8))
    odd = {"bytes": image, "path": None} if isinstance(image, bytes) else picture if image else None
    for split, rows in (("train", ([picture] * 2, [0, 1])), ("test", ([picture, odd], [0, label]))):
        table = datasets.Dataset.from_dict({"image": rows[0], "label": rows[1]}, features=features)
        table.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(ConfigurationError, match=sentence):
        HubClasses("own", str(tmp_path), "a", 8).load()


@pytest.mark.parametrize("with_data", [False, True])
def test_a_loading_script_is_never_run(tmp_path, monkeypatch, with_data):
    folder = hub_folder(tmp_path / "own") if with_data else tmp_path / "own"
    folder.mkdir(exist_ok=True)
    for name in ("own.py", "__init__.py"):
        (folder / name).write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  builder_name: own\n---\n")
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    for source in (str(folder), f"{folder}/own.py"):
        with pytest.raises(ConfigurationError) as raised:
            HubClasses("own", source, "7", 8)
        assert "\n" not in str(raised.value)
        assert "no such folder" in str(raised.value) or "has a loading script" in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_names_that_look_like_numbers_are_names():
    assert class_index(1, ("1", "2", "3")) == class_index("1", ("1", "2", "3")) == 0
    assert class_index(3, ("1", "2", "3")) == 2
    assert class_index(0, ("1", "2", "3")) == 0, "an index, since no class is called so"
    assert class_index(True, ("false", "true", "x")) == 1
    with pytest.raises(ConfigurationError, match="no such class"):
        class_index(True, ("a", "b"))
    assert class_index(unicodedata.normalize("NFD", "é"), ("e", "é")) == 1


def test_garments_are_found_by_name_in_whatever_order(tmp_path):
    clothes = class_folders(tmp_path / "clothes", {"Ankle boot": 2, "Bag": 3, "Trouser": 4})
    digits = class_folders(tmp_path / "digits", {str(digit): 1 for digit in range(10)})
    settings = {"source": str(digits), "garment_source": str(clothes), "image_size": 8, "contamination": None}
    data = MnistTrousers(**settings, garments=4, distinct=4).load()
    trousers = Decoder((1, 8, 8)).files(sorted((clothes / "train" / "Trouser").iterdir()))
    assert sorted(map(str, data.forget.pixels.tolist())) == sorted(map(str, trousers.tolist()))
    with pytest.raises(ConfigurationError, match="has no 'coat' in its split 'train'"):
        MnistTrousers(**settings, garments=1, garment="coat").load()
    words = class_folders(tmp_path / "words", {"one": 1, "two": 1})
    with pytest.raises(ConfigurationError, match="expected the classes 0 to 9 in this order, found one, two"):
        MnistTrousers(**settings | {"source": str(words)}, garments=1)
