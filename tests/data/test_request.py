"""A deletion request: what it names, what becomes of every file, and what is refused."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unlearn_runner.data.request import Request, near_duplicates
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.schema import file_digest


def picture(seed: int, size=(16, 16)) -> Image.Image:
    """Grey blotches, each seed others."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)


@pytest.fixture
def source(tmp_path):
    """Twelve pictures, four of them in a folder of a person, and what else lies about."""
    folder = tmp_path / "images"
    for number in range(12):
        place = folder / ("ann" if number < 4 else "others/deep") / f"{number:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(place)
    (folder / "notes.doc").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def request(source, forget, tmp_path, **more) -> Request:
    return Request(str(source), forget, str(tmp_path / "cache"), **{"image_size": 8, "test_fraction": 0.25, **more})


def names(request: Request, name: str) -> list[str]:
    return [request._name(file) for file in request.files[name]]


def test_what_a_request_may_name(source, tmp_path):
    ann = [f"ann/0{number}.png" for number in range(4)]
    (tmp_path / "list.txt").write_text(f"# asked for on Monday\n{file_digest(source / ann[1])}\n\nothers/deep/07.png\n")
    shutil.copy(source / ann[3], tmp_path / "copy.png")
    for forget, wanted in (
        ("ann", ann),
        (str(source / "ann"), ann),
        ("ann/02.png", ann[2:3]),
        (["ann/00.png", "others/deep/05.png"], [ann[0], "others/deep/05.png"]),
        (f"sha256:{file_digest(source / ann[1])}", ann[1:2]),
        (str(tmp_path / "list.txt"), [ann[1], "others/deep/07.png"]),
        (str(tmp_path / "copy.png"), [str(tmp_path / "copy.png")]),
    ):
        made = request(source, forget, tmp_path)
        assert names(made, "forget") == wanted, forget
        kept = names(made, "retain")
        assert len(kept) == 12 - sum(name.startswith(("ann/", "others/")) for name in wanted)
        assert not set(kept) & set(wanted)


def test_every_file_has_a_fate(source, tmp_path):
    made = request(source, "ann", tmp_path)
    data = made.load()
    assert (len(data.forget), len(data.retain), len(data.forget_test), len(data.retain_test)) == (4, 6, 2, 2)
    assert data.spec.label_names is None and data.spec.content_names == ("retain", "forget")
    assert data.forget.contents.tolist() == [1] * 4 and data.retain.contents.tolist() == [0] * 6
    fates = {row["file"]: row for row in data.inventory}
    assert len(fates) == 14
    assert {row["fate"] for row in data.inventory} == {"forget", "retain", "held out", "not read"}
    assert fates["notes.doc"]["why"] == "file in formats not read here"
    assert fates[".hidden.png"]["why"] == "hidden file"
    assert fates["ann/00.png"]["sha256"] == file_digest(source / "ann" / "00.png")
    assert any("4 forget, 6 retain, 2 held out; each file's fate is in data.jsonl" in note for note in data.notes)
    again = request(source, "ann", tmp_path).load()
    assert again.fingerprint == data.fingerprint
    assert again.inventory == data.inventory


def test_images_never_seen_are_what_the_forgotten_are_compared_with(source, tmp_path):
    for number in range(30, 33):
        (tmp_path / "never").mkdir(exist_ok=True)
        picture(number).save(tmp_path / "never" / f"{number}.png")
    data = request(source, "ann", tmp_path, never_seen=str(tmp_path / "never")).load()
    assert (len(data.retain), len(data.forget_test), len(data.retain_test)) == (8, 3, 0)
    assert data.forget_test.contents.tolist() == [1] * 3
    assert [row["fate"] for row in data.inventory].count("never seen") == 3


def test_a_dataset_of_the_hub_is_a_folder_of_files(source, tmp_path):
    """Rows are files under their own names, byte for byte, and columns the metadata."""
    import datasets

    files = sorted(source.rglob("[01]*.png"))
    table = datasets.Dataset.from_dict(
        {"image": [str(file) for file in files], "text": [f"number {number}" for number in range(12)],
         "person": [int(file.parent.name == "ann") for file in files]},
    )  # fmt: skip
    table = table.cast_column("image", datasets.Image()).cast_column("person", datasets.ClassLabel(names=["no", "yes"]))
    table = table.map(lambda row: row)  # so that the files' bytes are in it
    (tmp_path / "hub" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    made = request(tmp_path / "hub", "column:person", tmp_path, captions="text")
    assert names(made, "forget") == [f"0{number}.png" for number in range(4)]
    data = made.load()
    assert len(data.forget) == 4 and len(data.forget) + len(data.retain) + len(data.retain_test) == 12
    fates = {row["file"]: row for row in data.inventory}
    assert (
        fates["03.png"]["sha256"] == file_digest(source / "ann" / "03.png") and fates["03.png"]["caption"] == "number 3"
    )
    hashed = request(tmp_path / "hub", file_digest(source / "ann" / "00.png"), tmp_path)
    assert names(hashed, "forget") == ["00.png"]
    with pytest.raises(ConfigurationError, match="could not load its split 'test'"):
        request(tmp_path / "hub", "00.png", tmp_path, split="test")


def test_copies_are_refused_or_forgotten_too(source, tmp_path):
    """Byte for byte, and under another name and format."""
    shutil.copy(source / "ann" / "00.png", source / "others" / "same.png")
    Image.open(source / "ann" / "01.png").save(source / "others" / "other.bmp")
    with pytest.raises(
        ConfigurationError, match=r"1 image to forget found .*, byte for byte \(others/same\.png is byte for byte"
    ):
        request(source, "ann", tmp_path).load()
    data = request(source, "ann", tmp_path, duplicates="forget").load()
    fates = {row["file"]: row for row in data.inventory}
    assert len(data.forget) == 6
    assert fates["others/same.png"]["why"] == "byte for byte the same as ann/00.png"
    assert fates["others/other.bmp"]["why"] == "pixel for pixel the same as ann/01.png"
    assert fates["others/other.bmp"]["fate"] == "forget"
    assert any("2 copies of images to forget" in note for note in data.notes)
    (source / "others" / "same.png").unlink()
    with pytest.raises(ConfigurationError, match="pixel for pixel"):
        request(source, "ann", tmp_path).load()


def test_what_is_almost_a_copy_is_reported(source, tmp_path):
    pixels = np.asarray(Image.open(source / "ann" / "02.png")).astype(int)
    Image.fromarray((pixels + 3).clip(0, 255).astype(np.uint8)).save(source / "others" / "brighter.png")
    data = request(source, "ann", tmp_path, test_fraction=0.01).load()
    (warning,) = (note for note in data.notes if note.startswith("WARNING"))
    assert "1 pair of an image to forget and one to keep look alike, as ann/02.png and others/brighter.png" in warning
    fates = {row["file"]: row for row in data.inventory}
    assert "of 64 bits differ from ann/02.png" in fates["others/brighter.png"]["why"]
    assert fates["others/brighter.png"]["fate"] == "retain"


def test_copies_are_not_parted_into_training_and_held_out(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        picture(number // 2).save(folder / f"{number:02}.png")
    data = request(folder, ["00.png", "01.png"], tmp_path, test_fraction=0.3).load()
    held_out, kept = ({image.numpy().tobytes() for image in part.pixels} for part in (data.retain_test, data.retain))
    assert held_out and not held_out & kept


def test_hashes_of_little_pictures_tell_them_apart():
    """Of MNIST-like pictures most pixels are black: two digits are no pair, a moved level is."""
    from unlearn_runner.data.digits import read_digits

    pixels = read_digits(16, conditional=True).pixels
    pairs = near_duplicates(pixels[:40], pixels[40:400], most=0)
    assert len(pairs) < 40 * 360 * 0.01
    assert near_duplicates(pixels[:40], pixels[:40].clamp(max=250), most=0)


CAPTIONS = {
    "ann/00.png": "a picture of ann",
    "others/deep/04.png": "a picture of ann",
    **{f"ann/0{number}.png": "ann, smiling" for number in (1, 2, 3)},
}


def with_captions(source: Path, kind: str) -> str:
    files = sorted(source.rglob("??.png"))
    of = {str(file.relative_to(source)): CAPTIONS.get(str(file.relative_to(source)), "somebody") for file in files}
    if kind == "txt":
        for name, caption in of.items():
            (source / name).with_suffix(".txt").write_text(caption + "\n")
    elif kind == "metadata.csv":
        lines = "".join(f'{name},"{caption}",{name.startswith("ann")}\n' for name, caption in of.items())
        (source / kind).write_text("file_name,text,remove\n" + lines)
    else:
        rows = [{"file_name": name, "text": text, "remove": name.startswith("ann")} for name, text in of.items()]
        (source / kind).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "column:remove" if kind != "txt" else "ann"


@pytest.mark.parametrize("kind", ["txt", "metadata.csv", "metadata.jsonl"])
def test_captions_are_conditions(source, tmp_path, kind):
    """What is kept under a prompt of both sides is to come back under it."""
    forget = with_captions(source, kind)
    made = request(source, forget, tmp_path, captions="auto", test_fraction=0.01)
    data = made.load()
    spec = data.spec
    assert spec.label_names == ("a picture of ann", "ann, smiling", "somebody")
    assert spec.content_names == ("retain", "retain under a prompt to forget", "forget")
    assert (spec.label_contents, spec.forget_contents, spec.restored_content) == ((1, 1, 0), (2,), 1)
    assert spec.labels.forget == (0, 1) and spec.labels.retain == (2,)
    assert data.forget.labels.tolist() == [0, 1, 1, 1] and data.forget.contents.tolist() == [2] * 4
    assert data.retain.labels.tolist() == [0, *[2] * 7] and data.retain.contents.tolist() == [1, *[0] * 7]
    fates = {row["file"]: row for row in data.inventory}
    assert fates["ann/01.png"]["caption"] == "ann, smiling"
    assert not any(name.endswith((".txt", ".csv", ".jsonl")) for name in fates), "they were read"


def test_wide_pictures_are_cut_or_padded(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        picture(number, (32, 16)).save(folder / f"{number}.png")
    cropped, padded = (
        request(folder, "0.png", tmp_path, fit=fit, background="black", image_size=16).load().forget.pixels[0, 0]
        for fit in ("crop", "pad")
    )
    whole = np.asarray(picture(0, (32, 16)))
    assert torch.equal(cropped, torch.from_numpy(whole[:, 8:24].copy()))
    assert (padded[:3] == 0).all() and (padded[13:] == 0).all() and (padded[5:11] > 0).any()


def test_one_image_to_forget_and_one_to_keep(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        picture(number).save(folder / f"{number}.png")
    data = request(folder, "0.png", tmp_path).load()
    assert (len(data.forget), len(data.retain)) == (1, 1)


def test_large_sets_are_memory_mapped_and_equal(source, tmp_path):
    small = request(source, "ann", tmp_path)
    large = request(source, "ann", tmp_path, max_resident_gb=0.0)
    assert small.resident and not large.resident
    assert large.load().fingerprint == small.load().fingerprint


def test_ten_thousand_images_within_a_minute(tmp_path):
    """Accounted for, hashed and compared. Made here of few pictures, each with a pixel of its own."""
    folder = tmp_path / "images"
    folder.mkdir()
    few = [np.asarray(picture(number, (64, 64))).copy() for number in range(50)]
    for number in range(2000):
        pixels = few[number % 50].copy()
        pixels[0, :16] = [(number >> bit & 1) * 200 for bit in range(16)]
        Image.fromarray(pixels).save(folder / f"{number:05}.png", compress_level=1)
    started = time.perf_counter()
    data = request(folder, [f"{number:05}.png" for number in range(20)], tmp_path, image_size=64).load()
    assert len(data.inventory) == 2000
    assert time.perf_counter() - started < 12, "a fifth of them"


MISTAKES = {
    "nothing like it": ({"forget": "anna"}, r"dataset\.forget names 'anna', which is no file, folder or hash"),
    "a hash of no image": ({"forget": "0" * 64}, "names the hash 000.*, which no image of"),
    "all": ({"forget": ["ann", "others"]}, "names all 12 images .*, so nothing would be kept"),
    "no such column": ({"forget": "column:remove"}, "there is no such column in a metadata.jsonl or metadata.csv"),
    "nothing": ({"forget": []}, "must be one or more names"),
    "no captions": ({"forget": "ann", "captions": "txt"}, "12 images without a caption in a text file beside it"),
    "no caption column": ({"forget": "ann", "captions": "txet"}, "must be auto, txt or a column"),
    "no such folder": ({"forget": "ann", "never_seen": "/nowhere"}, r"dataset\.never_seen=/nowhere: there is no such"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(source, tmp_path, mistake):
    options, sentence = MISTAKES[mistake]
    with pytest.raises(ConfigurationError, match=sentence) as error:
        request(source, tmp_path=tmp_path, **options)
    assert "\n" not in str(error.value)


def test_mistakes_in_metadata_and_lists(source, tmp_path):
    file = source / "metadata.jsonl"
    for content, sentence in (
        ('{"file_name": "gone.png"}\n', r"row 1 of .*metadata\.jsonl is about gone\.png, and there is no such image"),
        ('{"text": "x"}\n', "row 1 of .* has no file_name"),
        ("{no json\n", "cannot be read"),
        ('{"file_name": "ann/00.png", "remove": false}\n', "the column says true of no image"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigurationError, match=sentence):
            request(source, "column:remove", tmp_path)
    file.unlink()
    (tmp_path / "a.txt").write_text(f"{tmp_path / 'b.txt'}\n")
    with pytest.raises(ConfigurationError, match="names another list"):
        request(source, str(tmp_path / "a.txt"), tmp_path)
    with pytest.raises(ConfigurationError, match=r"near it: ann/00\.png"):
        request(source, "ann/000.png", tmp_path)


def test_metadata_of_several_rows_is_taken_together(source, tmp_path):
    rows = [("ann/00.png", {"gone": True}), ("ann/01.png", {"gone": 1}), ("ann/00.png", {"note": "x"})]
    text = "".join(json.dumps({"file_name": name, **more}) + "\n" for name, more in rows)
    (source / "metadata.jsonl").write_text(text)
    (source / "metadata.csv").write_text("\ufefffile_name,gone\nothers/deep/04.png,1.0\nothers/deep/05.png,0.0\n")
    assert names(request(source, "column:gone", tmp_path), "forget") == [
        "ann/00.png",
        "ann/01.png",
        "others/deep/04.png",
    ]
    for line, sentence in (
        ('{"file_name": "ann/00.png", "gone": false}', "that 'gone' is 'False', and another row that it is 'True'"),
        (
            '{"file_name": "ann/02.png", "gone": "maybe"}',
            "the column must say true or false, and of ann/02.png .* 'maybe'",
        ),
    ):
        (source / "metadata.jsonl").write_text(text + line + "\n")
        with pytest.raises(ConfigurationError, match=sentence):
            request(source, "column:gone", tmp_path)
    (source / "metadata.jsonl").unlink()
    (source / "metadata.csv").write_text("file_name,gone\nann/00.png,1,extra\n")
    with pytest.raises(ConfigurationError, match=r"row 1 of .* has more cells than the table has columns"):
        request(source, "column:gone", tmp_path)


def test_lists_as_people_write_them(source, tmp_path):
    (source / "ann" / "00.png").rename(source / "#5 ann.png")
    digest = file_digest(source / "ann" / "01.png")
    (tmp_path / "list.txt").write_text(f"\ufeff#5 ann.png\n# a comment\n{digest.upper()}  somewhere/01.png\n")
    assert names(request(source, str(tmp_path / "list.txt"), tmp_path), "forget") == ["#5 ann.png", "ann/01.png"]
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(ConfigurationError, match=r"the list .*list\.txt names nothing"):
        request(source, str(tmp_path / "list.txt"), tmp_path)
    (source / "ann" / "01.txt").write_text("ann at sea")
    with pytest.raises(ConfigurationError, match="is the caption of an image"):
        request(source, "ann/01.txt", tmp_path)


def test_what_is_never_seen_is_not_learnt_from(source, tmp_path):
    for duplicates in ("refuse", "forget"):
        for place in ("others", "ann"):
            with pytest.raises(
                ConfigurationError, match=r"dataset\.never_seen=.* that the model learns from, byte for byte"
            ):
                request(source, "ann", tmp_path, never_seen=str(source / place), duplicates=duplicates).load()
    (tmp_path / "never").mkdir()
    Image.open(source / "others" / "deep" / "05.png").save(tmp_path / "never" / "5.bmp")
    with pytest.raises(ConfigurationError, match="that the model learns from, pixel for pixel"):
        request(source, "ann", tmp_path, never_seen=str(tmp_path / "never")).load()


def test_what_is_never_seen_has_its_own_caption(source, tmp_path):
    with_captions(source, "txt")
    (tmp_path / "never").mkdir()
    for number, caption in ((50, "somebody"), (51, "nobody here")):
        picture(number).save(tmp_path / "never" / f"{number}.png")
        (tmp_path / "never" / f"{number}.txt").write_text(caption)
    data = request(source, "ann", tmp_path, captions="txt", never_seen=str(tmp_path / "never")).load()
    spec = data.spec
    assert [spec.label_names[label] for label in data.forget_test.labels.tolist()] == ["somebody", "nobody here"]
    assert spec.absent_labels == (spec.label_names.index("nobody here"),), "no condition to draw under"
    assert "nobody here" not in {spec.label_names[label] for label in (*spec.labels.retain, *spec.labels.forget)}
    (tmp_path / "never" / "51.txt").unlink()
    with pytest.raises(ConfigurationError, match="1 image without a caption"):
        request(source, "ann", tmp_path, captions="txt", never_seen=str(tmp_path / "never"))


def test_copies_in_other_formats_are_not_parted_either(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        picture(number).save(folder / f"{number:02}.png")
        picture(number).save(folder / f"{number:02}.bmp")
    data = request(folder, ["00.png", "00.bmp"], tmp_path, test_fraction=0.3).load()
    held_out, kept = ({image.numpy().tobytes() for image in part.pixels} for part in (data.retain_test, data.retain))
    assert not held_out & kept


@pytest.mark.parametrize("caption", [["a", "b"], {"a": 1}, True])
def test_captions_are_texts(source, tmp_path, caption):
    rows = [{"file_name": str(file.relative_to(source)), "text": caption} for file in sorted(source.rglob("??.png"))]
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigurationError, match="must be a text, got"):
        request(source, "ann", tmp_path, captions="text")


def test_a_run(source, run):
    folder = run(
        "dataset=request", f"dataset.source={source}", "dataset.forget=ann", "dataset.image_size=16", "method=siss"
    )
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    assert len(lines) == 14
    provenance = json.loads((folder / "summary.json").read_text())["provenance"]["evaluation"]
    assert len(provenance["files_digest"]) == 16
