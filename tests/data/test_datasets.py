"""Each dataset says which images are forget, retain and held out, and refuses what cannot work."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unlearn_runner.data.digits import Digits
from unlearn_runner.data.digits_trousers import DigitsTrousers, draw_trousers
from unlearn_runner.data.forget_retain import ForgetRetain
from unlearn_runner.data.hub import decode_rows
from unlearn_runner.data.hub_classes import HubClasses, class_index
from unlearn_runner.data.image_folder import ImageFolder
from unlearn_runner.data.images import Decoder
from unlearn_runner.data.mnist_trousers import MnistTrousers
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.types import Labels

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the real images in {SHARED}")


def test_digits_trousers(digits):
    assert digits.spec.label_names == tuple("0123456789")
    assert digits.spec.content_names[digits.spec.forget_content] == "trousers"
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


@pytest.mark.parametrize(
    "settings", [{"contamination": 0.0}, {"contamination": 1.0}, {"test_fraction": 1.5}, {"image_size": 4}]
)
def test_digits_trousers_refuses(settings):
    with pytest.raises(ConfigurationError, match=r"dataset\."):
        DigitsTrousers(**settings)


def test_all_or_nothing_is_refused(digits):
    none = digits.forget.select(torch.arange(0))
    with pytest.raises(ConfigurationError, match="empty"):
        ForgetRetain(digits.spec, none, digits.retain, digits.forget_test, digits.retain_test)
    with pytest.raises(ConfigurationError, match="whole dataset"):
        ForgetRetain(digits.spec, digits.forget, none, digits.forget_test, digits.retain_test)


@needs_shared
def test_mnist_trousers():
    settings = {"source": str(SHARED / "mnist"), "garment_source": str(SHARED / "fashion_mnist")}
    data = MnistTrousers(**settings).load()
    assert (len(data.retain), len(data.forget), len(data.retain_test)) == (60_000, 6_742, 10_000)
    assert data.retain.pixels.shape[1:] == (1, 28, 28)
    assert data.forget_labels == [1]
    distinct = {row.numpy().tobytes() for row in data.forget.pixels}
    assert 300 < len(distinct) <= 394, "drawn with replacement from the 394 there are"
    with pytest.raises(ConfigurationError, match="garment must be one of"):
        MnistTrousers(**settings, garment="hat")


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
        ({"garments": 0}, "dataset.garments must be positive"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            MnistTrousers(**settings | wrong).load()


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
    with pytest.raises(ConfigurationError, match=r"dataset.channels must be 1 \(grey\) or 3 \(colour\), got 4"):
        HubClasses(**settings, forget_class="7", channels=4)


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
