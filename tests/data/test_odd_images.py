"""Every image file that people have comes out as it looks, or is named in one sentence."""

import io
import os
import signal
import socket
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, features

from unlearn_runner.data.images import SEVERAL, TRANSPARENT, Decoder, find_images
from unlearn_runner.errors import ConfigurationError

SIDE = 16
ROWS, COLUMNS = np.mgrid[0:SIDE, 0:SIDE]
COLOUR = np.stack([ROWS * 16, COLUMNS * 16, (ROWS + 2 * COLUMNS) * 5], -1).astype(np.uint8)  # no symmetry
GREY = (ROWS * 9 + COLUMNS * 7).astype(np.uint8)
ALPHA = np.where(COLUMNS < 4, 0, np.where(COLUMNS < 8, 128, 255)).astype(np.uint8)


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(np.rint(grey)[:, :, None], 3, 2)


def laid_on(colour: np.ndarray, alpha: np.ndarray, ground: int = 255) -> np.ndarray:
    share = alpha[:, :, None] / 255
    return colour * share + ground * (1 - share)


def saved(image: Image.Image, format: str, **more) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.save(file, format, **more)
    return file.getvalue()


# 1. What PIL can write: mode by mode, as the picture and as what a person sees of it

CMYK = np.concatenate([255 - COLOUR, (GREY // 3)[:, :, None]], 2)
PALETTE = Image.fromarray(COLOUR).quantize(64)
MODES: dict[str, tuple[Image.Image, np.ndarray]] = {
    "1": (Image.fromarray(GREY > 100), rgb((GREY > 100) * 255)),
    "L": (Image.fromarray(GREY), rgb(GREY)),
    "LA": (Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]), laid_on(rgb(GREY), ALPHA)),
    "P": (PALETTE, np.array(PALETTE.getpalette(), dtype=np.uint8).reshape(-1, 3)[np.asarray(PALETTE)]),
    "RGB": (Image.fromarray(COLOUR), COLOUR),
    "RGBA": (Image.fromarray(np.dstack([COLOUR, ALPHA])), laid_on(COLOUR, ALPHA)),
    "CMYK": (Image.fromarray(CMYK, "CMYK"), (255 - CMYK[:, :, :3]) * (1 - CMYK[:, :, 3:] / 255)),
    "YCbCr": (Image.fromarray(COLOUR).convert("YCbCr"), COLOUR),
    "LAB": (Image.fromarray(COLOUR).convert("LAB"), COLOUR),
    "I;16": (Image.fromarray(GREY.astype(np.uint16) * 257 + 100), rgb(GREY + 100 / 257)),
    "I": (Image.fromarray(GREY.astype(np.int32)), rgb(GREY)),
    "F": (Image.fromarray(GREY.astype(np.float32) / 255), rgb(GREY)),
}  # fmt: skip
FORMATS: dict[str, tuple[str, dict, int]] = {  # format, how it is saved, by how much levels may differ
    "png": ("PNG", {}, 1),
    "jpg": ("JPEG", {"quality": 100, "subsampling": 0}, 8),
    "jfif": ("JPEG", {"quality": 100, "subsampling": 0, "progressive": True}, 8),
    "webp": ("WEBP", {"lossless": True, "exact": True}, 1),
    "bmp": ("BMP", {}, 1),
    "gif": ("GIF", {}, 20),  # 256 colours
    "tif": ("TIFF", {}, 3),
    "tiff": ("TIFF", {"compression": "tiff_lzw"}, 3),
    "jp2": ("JPEG2000", {}, 1),
    "ppm": ("PPM", {}, 1),
    "qoi": ("QOI", {}, 1),
    "avif": ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 8),
}
if not features.check("avif"):
    del FORMATS["avif"]


def kept(mode: str, suffix: str) -> np.ndarray | None:
    """What is to be seen of what PIL wrote; None where it cut off levels itself as it wrote."""
    seen = MODES[mode][1]
    if mode in ("I;16", "I", "F", "LAB") and suffix in ("webp", "gif", "avif"):
        return None
    if mode == "I" and suffix in ("png", "ppm", "jp2"):  # whole numbers become 16 bits
        return rgb(GREY / 257)
    if (mode, suffix) in (("LA", "gif"), ("RGBA", "bmp"), ("RGBA", "ppm")):  # has lost its alpha
        return rgb(GREY) if mode == "LA" else COLOUR
    if (mode, suffix) == ("RGBA", "gif"):  # a colour is transparent or not
        return laid_on(COLOUR, np.where(ALPHA >= 128, 255, 0))
    return seen


def written() -> list[tuple[str, bytes, np.ndarray | str, int]]:
    cases = []
    for suffix, (format, options, off) in FORMATS.items():
        for mode, (image, _) in MODES.items():
            seen = kept(mode, suffix)
            if seen is None:
                continue
            try:
                data = saved(image, format, **options)
            except (OSError, KeyError, ValueError):
                continue  # PIL cannot write it
            cases.append(
                (f"{mode.replace(';', '_')}.{suffix}", data, seen, max(off, {"YCbCr": 6, "LAB": 32}.get(mode, 0)))
            )
    return cases


# 2. EXIF orientation: what turns the stored rows as they were seen (Exif 2.32, 4.6.5.A)

TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored),
}


def turned() -> list[tuple[str, bytes, np.ndarray | str, int]]:
    cases = []
    for suffix in sorted(FORMATS.keys() & {"jpg", "png", "webp", "tif", "avif"}):  # in one order for all workers
        format, options, off = FORMATS[suffix]
        for number, turn in TURNED.items():
            exif = Image.Exif()
            exif[0x0112] = number
            data = saved(Image.fromarray(COLOUR), format, exif=exif, **options)
            cases.append((f"orientation_{number}.{suffix}", data, turn(COLOUR), off))
    exif = Image.Exif()
    exif[0x0112] = 6
    sixteen = Image.fromarray(GREY.astype(np.uint16) * 257)
    cases.append(("orientation_6_16_bits.png", saved(sixteen, "PNG", exif=exif), np.rot90(rgb(GREY), -1), 0))
    whole = saved(Image.fromarray(COLOUR), "JPEG", quality=100, subsampling=0, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    return [*cases, ("damaged_exif.jpg", whole, COLOUR, 8)]


# 3. Files made here byte by byte, for PIL does not write them


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    bits: int, colour_type: int, rows: list[bytes], clear: bytes = b"", size: tuple[int, int] | None = None
) -> bytes:
    header = struct.pack(">IIBBBBB", *(size or (SIDE, SIDE)), bits, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    transparent = chunk(b"tRNS", clear) if clear else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + transparent + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def big_endian(levels: np.ndarray) -> list[bytes]:
    return [row.astype(">u2").tobytes() for row in levels]


def packed(levels: np.ndarray, bits: int) -> list[bytes]:
    """Rows of levels below 2**bits, several in a byte."""
    digits = (levels[:, :, None] >> np.arange(bits)[::-1]) & 1
    return [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in digits]


def tiff(bits: int, levels: bytes, sample_format: int = 1, photometric: int = 1) -> bytes:
    tags = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: photometric, 277: 1, 278: SIDE, 339: sample_format}
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags |= {273: start, 279: len(levels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + levels


def by_hand() -> list[tuple[str, bytes, np.ndarray | str, int]]:
    wide = GREY.astype(np.uint16) * 257 + 77  # 16 bits
    wide_colour = COLOUR.astype(np.uint16) * 257
    wide_alpha = ALPHA.astype(np.uint16) * 257
    few = ROWS % 4  # two bits
    nibbles = COLUMNS  # four bits
    floats, tens = GREY.astype("<f4"), GREY.astype(">u2") * 4
    one = COLOUR[2, 3]
    without_one = np.where((one == COLOUR).all(2, keepdims=True), 255, COLOUR)
    cases = [
        ("grey_16.png", png(16, 0, big_endian(wide)), rgb(wide / 257), 0),
        ("colour_16.png", png(16, 2, big_endian(wide_colour.reshape(SIDE, -1))), COLOUR, 1),
        ("grey_alpha_16.png", png(16, 4, big_endian(np.dstack([wide, wide_alpha]).reshape(SIDE, -1))),
         laid_on(rgb(wide / 257), ALPHA), 1),
        ("colour_alpha_16.png", png(16, 6, big_endian(np.dstack([wide_colour, wide_alpha]).reshape(SIDE, -1))),
         laid_on(COLOUR, ALPHA), 1),
        ("clear_level_1.png", png(1, 0, packed(few % 2, 1), b"\0\0"), rgb(few * 0 + 255), 0),
        ("clear_level_2.png", png(2, 0, packed(few, 2), b"\0\1"), rgb(np.where(few == 1, 255, few * 85)), 0),
        ("clear_level_4.png", png(4, 0, packed(nibbles, 4), b"\0\7"),
         rgb(np.where(nibbles == 7, 255, nibbles * 17)), 0),
        ("clear_level_8.png", png(8, 0, [row.tobytes() for row in GREY], b"\0\7"),
         rgb(np.where(GREY == 7, 255, GREY)), 0),
        ("clear_level_16.png", png(16, 0, big_endian(wide), struct.pack(">H", wide[0, 1])),
         rgb(np.where(wide == wide[0, 1], 255, wide / 257)), 0),
        ("clear_colour_8.png", png(8, 2, [row.tobytes() for row in COLOUR], struct.pack(">HHH", *one)),
         without_one, 0),
        ("clear_colour_16.png",
         png(16, 2, big_endian(wide_colour.reshape(SIDE, -1)), struct.pack(">HHH", *wide_colour[2, 3])),
         without_one, 1),
        ("white_is_zero_8.tif", tiff(8, GREY.tobytes(), photometric=0), rgb(255 - GREY.astype(int)), 0),
        ("white_is_zero_16.tif", tiff(16, wide.astype("<u2").tobytes(), photometric=0), rgb((65535 - wide) / 257), 0),
        ("grey_16.tif", tiff(16, wide.astype("<u2").tobytes()), rgb(wide / 257), 0),
        ("grey_12.tif", tiff(12, b"".join(packed(GREY.astype(int) * 16, 12))), rgb(GREY / 4095 * 16 * 255), 0),
        ("grey_32.tif", tiff(32, GREY.astype("<u4").tobytes()), rgb(GREY), 0),
        ("grey_32_wide.tif", tiff(32, (GREY.astype("<u4") << 20).tobytes()),
         "levels from 0 to .* expected 0 to 255: ", 0),
        ("signed_16.tif", tiff(16, (GREY.astype("<i2") - 9).tobytes(), sample_format=2), "levels from -9 to", 0),
        ("float_255.tif", tiff(32, floats.tobytes(), sample_format=3), rgb(GREY), 0),
        ("float_1.tif", tiff(32, (floats / 255).tobytes(), sample_format=3), rgb(GREY), 0),
        ("float_wide.tif", tiff(32, (floats * 9).tobytes(), sample_format=3), "levels from 0.0 to .* with 8 bits", 0),
        ("float_nan.tif", tiff(32, (floats * np.nan).tobytes(), sample_format=3), "levels from nan to nan", 0),
        ("double.tif", tiff(64, floats.astype("<f8").tobytes(), sample_format=3), "is not a readable image", 0),
        ("grey_16.pgm", b"P5 16 16 65535\n" + wide.astype(">u2").tobytes(), rgb(wide / 257), 0),
        ("grey_10.pgm", b"P5 16 16 1023\n" + tens.astype(">u2").tobytes(), rgb(GREY / 1023 * 4 * 255), 1),
        ("grey_4.pgm", b"P5 16 16 15\n" + nibbles.astype(np.uint8).tobytes(), rgb(nibbles * 17), 0),
        ("text.pgm", b"P2 16 16 15\n" + " ".join(map(str, nibbles.ravel())).encode(), rgb(nibbles * 17), 0),
        ("colour_16.ppm", b"P6 16 16 65535\n" + wide_colour.astype(">u2").tobytes(), COLOUR, 1),
        ("float.pfm", b"Pf\n16 16\n-1.0\n" + (floats[::-1] / 255).tobytes(), rgb(GREY), 0),
    ]  # fmt: skip
    adobe = saved(MODES["CMYK"][0], "JPEG", quality=100)
    return [*cases, ("adobe_cmyk.jpeg", adobe, MODES["CMYK"][1], 8)]


# 4. Damaged, and not what their names say


def damaged() -> list[tuple[str, bytes, np.ndarray | str, int]]:
    cases = []
    for suffix, (format, options, _) in FORMATS.items():
        whole = saved(Image.fromarray(COLOUR), format, **options)
        for part in (3, 30, len(whole) * 3 // 5):
            cases.append((f"cut_at_{part}.{suffix}", whole[:part], "is not a readable image", 0))
    picture = saved(Image.fromarray(COLOUR), "PNG")
    flipped = bytearray(picture)
    flipped[picture.index(b"IDAT") + 20] ^= 4
    bomb = png(8, 0, [b"\0"], size=(20_000, 20_000))
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**7)))
    jpeg = saved(Image.fromarray(COLOUR), "JPEG", quality=100, subsampling=0)
    sentence = "is not a readable image"
    return [
        *cases,
        ("empty.png", b"", sentence, 0),
        ("noise.jpg", np.random.default_rng(0).bytes(5000), sentence, 0),
        ("page.png", b"<!doctype html><title>404</title>", f"{sentence} \\(none of PNG, JPEG", 0),
        ("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", sentence, 0),
        ("phone.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500), sentence, 0),
        ("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\nshowpage\n%%EOF\n", sentence, 0),
        ("flipped.png", bytes(flipped), sentence, 0),
        ("bomb.png", bomb, f"{sentence} \\(DecompressionBombError", 0),
        ("bomb_in_text.png", picture[:33] + text + picture[33:], f"{sentence} \\(ValueError", 0),
        ("no_chunk.png", picture[:33] + b"\0\0\0\1\xff\xff\xff\xff" + picture[33:], sentence, 0),
        ("no_scan.tif", b"II*\0\x08\0\0\0\xff\xff" + bytes(40), sentence, 0),
        ("in_truth_a_jpeg.png", jpeg, COLOUR, 8),
        ("LOUD.PNG", picture, COLOUR, 0),
        ("a name with = and [bold] and 'quotes'.png", picture, COLOUR, 0),
        ("ünïcödé.png", picture, COLOUR, 0),
    ]


CASES = {name: (data, seen, off) for name, data, seen, off in [*written(), *turned(), *by_hand(), *damaged()]}


def test_there_are_many_of_them():
    assert len(CASES) > 150
    assert sum(not isinstance(seen, str) for _, seen, _ in CASES.values()) > 100
    assert {"RGBA.png", "CMYK.jpg", "I_16.png", "F.tif", "P.gif", "RGB.webp", "LA.png", "1.tif"} <= CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_right_or_named(tmp_path, name):
    data, seen, off = CASES[name]
    path = tmp_path / name
    path.write_bytes(data)
    if isinstance(seen, str):
        with pytest.raises(ConfigurationError, match=seen) as raised:
            Decoder((3, SIDE, SIDE)).files([path])
        assert str(raised.value).startswith(str(path))
        assert "\n" not in str(raised.value)
    else:
        pixels = Decoder((3, SIDE, SIDE)).files([path])[0].permute(1, 2, 0).numpy()
        assert np.abs(pixels - np.asarray(seen, dtype=float)).max() <= off + 0.5


# 5. What the files of a folder have in common


def test_only_the_first_frame_is_read_and_that_is_said(tmp_path):
    frames = [Image.fromarray(COLOUR[::turn, :]) for turn in (1, -1, 1)]
    for suffix, (format, options, _) in FORMATS.items():
        if suffix in ("gif", "webp", "tif", "avif", "png"):
            first = tmp_path / f"frames.{suffix}"
            first.write_bytes(saved(frames[0], format, save_all=True, append_images=frames[1:], **options))
    (tmp_path / "previews.jpg").write_bytes(
        saved(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=100)
    )
    files = sorted(tmp_path.iterdir())
    decoder = Decoder((3, SIDE, SIDE))
    pixels = decoder.files(files)
    assert np.abs(pixels.permute(0, 2, 3, 1).numpy() - COLOUR.astype(float)).max(axis=(1, 2, 3)).max() < 40
    n = len(files) - 1
    assert n >= 4
    assert decoder.seen == {SEVERAL: n}
    assert decoder.notes("here") == [f"here: {n} images with several frames or pages, of which the first is read."]


@pytest.mark.parametrize("background, ground", [("white", 255), ("black", 0), ("#808080", 128), ("rgb(3, 3, 3)", 3)])
def test_transparency_is_laid_on_the_background_and_counted(tmp_path, background, ground):
    opaque = Image.fromarray(np.dstack([COLOUR, np.full_like(GREY, 255)]))
    for name, image in (("clear", MODES["RGBA"][0]), ("opaque", opaque), ("plain", MODES["RGB"][0])):
        image.save(tmp_path / f"{name}.png")
    decoder = Decoder((3, SIDE, SIDE), background)
    pixels = decoder.files(sorted(tmp_path.iterdir())).permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels[0] - laid_on(COLOUR, ALPHA, ground)).max() <= 1
    assert np.array_equal(pixels[1], COLOUR)
    assert np.array_equal(pixels[2], COLOUR)
    assert decoder.seen == {TRANSPARENT: 1}
    assert decoder.notes("here") == [f"here: 1 image with transparency, laid on {background} (dataset.background)."]


@pytest.mark.parametrize("name, called", [
    (b"\xff.png", r"\xff.png"), (b"two\nlines.png", r"two\nlines.png"), (b"\x1b[31mred.png", r"\x1b[31mred.png"),
])  # fmt: skip
def test_any_name_can_be_read_and_printed(tmp_path, name, called):
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(saved(MODES["RGB"][0], "PNG"))
    assert np.array_equal(Decoder((3, SIDE, SIDE)).files([path])[0].permute(1, 2, 0), COLOUR)
    path.write_bytes(b"")
    with pytest.raises(ConfigurationError) as raised:
        Decoder((3, SIDE, SIDE)).files([path])
    assert str(raised.value).startswith(f"{tmp_path}/{called} is not a readable image (")
    str(raised.value).encode("utf-8")


def test_the_middle_square_is_that_of_the_picture_as_seen(tmp_path):
    wide = np.zeros((SIDE, 3 * SIDE, 3), np.uint8)
    wide[:, SIDE : 2 * SIDE] = COLOUR
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(wide).save(tmp_path / "a.png", exif=exif)
    pixels = Decoder((3, SIDE, SIDE)).files([tmp_path / "a.png"])[0].permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, np.rot90(COLOUR, -1))


@pytest.fixture
def not_for_ever():
    """A pipe that is opened waits for ever; the test then fails instead."""
    signal.alarm(30)
    yield
    signal.alarm(0)


def test_what_is_no_image_is_not_opened_and_said_with_counts(tmp_path, not_for_ever):
    root, elsewhere = tmp_path / "own", tmp_path / "elsewhere"
    picture = saved(Image.fromarray(COLOUR), "PNG")
    for name in (
        "own/a.png", "own/deep/er/b.PNG", "own/x.png/inside.png", "elsewhere/c.png",
        "own/._a.png", "own/.DS_Store", "own/.ipynb_checkpoints/a-checkpoint.png", "own/__MACOSX/deep/._b.png",
        "own/phone.HEIC", "own/drawing.svg", "own/raw.CR2", "own/no_suffix", "own/deep/a.txt", "own/deep/b.txt",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture)
    (root / "linked").symlink_to(elsewhere)
    (root / "deep" / "loop").symlink_to(root)
    (root / "link.png").symlink_to(elsewhere / "c.png")
    os.mkfifo(root / "pipe.png")
    (root / "link_to_pipe.png").symlink_to(root / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "s.png"))
    (root / "device.png").symlink_to("/dev/zero")
    found = find_images(str(root), "dataset.forget_dir")
    assert [str(path.relative_to(root)) for path in found.files] == [
        "a.png", "deep/er/b.PNG", "link.png", "x.png/inside.png",
    ]  # fmt: skip
    assert found.notes == [
        f"dataset.forget_dir={root}: 4 images, besides "
        "6 files in formats not read here (.txt: 2, .cr2: 1, .heic: 1, .svg: 1, no suffix: 1); "
        f"1 folder named like an image, whose contents are read ({root}/x.png); "
        f"4 hidden files ({root}/.DS_Store); "
        f"2 linked folders, not followed ({root}/deep/loop); "
        f"4 pipes, sockets or devices ({root}/device.png)."
    ]
    with pytest.raises(ConfigurationError, match="it is no regular file"):
        Decoder((3, SIDE, SIDE)).files([root / "pipe.png"])
