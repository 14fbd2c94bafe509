from __future__ import annotations

import gc
import hashlib
import json
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import PIL
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from asynctrain.arena import Array
from asynctrain.data import ImageSettings, decode, images
from asynctrain.data.images import decoder_fingerprint, quiet_pillow
from asynctrain.errors import DecodeError

RGB = ImageSettings((4, 6), 3)
GREY = ImageSettings((4, 6), 1)

with_simplejpeg = pytest.mark.skipif(find_spec("simplejpeg") is None, reason="simplejpeg has no wheel for this Python")
FAST = [pytest.param("simplejpeg", marks=with_simplejpeg), "imagecodecs"]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def of(pixels: Array) -> Image.Image:
    return Image.fromarray(pixels)


def photo(height: int = 333, width: int = 500) -> Array:
    """Return something smooth, (height, width, 3), of which no two parts are alike."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x / 2, y / 2, (x + y) / 4 + 20 * np.sin(x / 15)], axis=2).clip(0, 255).astype(np.uint8)


@pytest.fixture
def grey() -> Array:
    return np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


@pytest.fixture
def colour() -> Array:
    return np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_an_image_of_the_wanted_size_and_mode_arrives_unchanged(kind: str, colour: Array) -> None:
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(encoded(of(colour), kind, **options), RGB), colour)


@pytest.mark.parametrize("form", ["array", "array with a channel axis", "Pillow image", "bytes"])
def test_grey_images_of_any_form_become_grey_or_rgb(form: str, grey: Array) -> None:
    image: Any = {
        "array": grey,
        "array with a channel axis": grey[:, :, np.newaxis],
        "Pillow image": of(grey),
        "bytes": encoded(of(grey)),
    }[form]
    assert np.array_equal(decode(image, GREY)[:, :, 0], grey)
    assert np.array_equal(decode(image, RGB), np.dstack([grey] * 3))


def test_colours_become_grey_by_their_luminance(colour: Array) -> None:
    expected = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    for form in (colour, of(colour), encoded(of(colour))):
        assert np.abs(decode(form, GREY)[:, :, 0] - expected).max() <= 1


def test_one_bit_images_become_black_and_white() -> None:
    bits = np.eye(4, 6, dtype=np.bool_)
    assert np.array_equal(decode(encoded(of(bits)), GREY)[:, :, 0], bits * np.uint8(255))


def test_palette_images_become_their_colours(colour: Array) -> None:
    image = of(colour).quantize(24)
    assert np.array_equal(decode(encoded(image), RGB), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "1", "I;16"])
def test_transparent_parts_show_white(mode: str) -> None:
    """Left half transparent black, right half opaque black, in all the ways that PNG can say so."""
    options: dict[str, Any] = {}
    alpha = np.repeat(np.array([[0, 255]], np.uint8), 4, axis=0).repeat(3, axis=1)
    if mode in ("RGBA", "LA"):
        black = Image.new(mode[:-1], (6, 4))
        image = black.copy()
        image.putalpha(Image.fromarray(alpha))
    elif mode == "P":
        image, options = Image.fromarray(alpha // 255).convert("P"), {"transparency": 0}
        image.putpalette([0] * 6)
    elif mode == "I;16":
        image, options = Image.fromarray((alpha == 0).astype(np.uint16)), {"transparency": 1}
    else:
        almost_black = np.where(alpha == 0, 1, 0).astype(np.uint8) * (255 if mode == "1" else 1)
        image = Image.fromarray(almost_black).convert(mode)
        options = {"transparency": {"1": 255, "L": 1, "RGB": (1, 1, 1)}[mode]}
    assert np.array_equal(decode(encoded(image, **options), GREY)[:, :, 0], 255 - alpha)


def test_half_transparent_parts_are_mixed_with_white() -> None:
    image = Image.new("RGBA", (6, 4), (200, 0, 100, 128))
    assert decode(image, RGB)[0, 0].tolist() == pytest.approx([227, 127, 177], abs=1)


def test_transparent_pixels_do_not_bleed_their_colour_when_resized() -> None:
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[::2] = (255, 0, 0, 0)  # invisible red between opaque black
    pixels[1::2] = (0, 0, 0, 255)
    small = decode(pixels, RGB).astype(int)
    assert np.ptp(small, axis=2).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    pixels = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)
    assert np.array_equal(decode(encoded(of(pixels), kind), GREY)[:, :, 0], pixels // 256)


@pytest.mark.parametrize(
    ("low", "high", "black", "white"),
    [(0, 1, 0, 255), (0, 200, 0, 200), (0, 65535, 0, 255), (-3, 7, 0, 255), (0, 1e6, 0, 255)],
)
def test_floats_are_scaled_from_the_narrowest_usual_range_that_holds_them(
    low: float, high: float, black: int, white: int
) -> None:
    pixels = np.linspace(low, high, 24, dtype=np.float32).reshape(4, 6)
    out = decode(encoded(of(pixels), "TIFF"), GREY)
    assert (out.min(), out.max()) == (black, white)
    assert np.abs(out[:, :, 0] - np.linspace(black, white, 24).reshape(4, 6)).max() <= 1


def test_integers_of_32_bits_are_scaled_and_constant_or_odd_floats_are_no_error() -> None:
    wide = np.linspace(0, 2**20, 24).astype(np.int32).reshape(4, 6)
    assert decode(encoded(of(wide), "TIFF"), GREY).max() == 255
    for value in (0.0, -5.0, float("nan"), float("inf")):
        decode(encoded(of(np.full((4, 6), value, np.float32)), "TIFF"), GREY)
    odd = np.array([[0, 1, np.nan, np.inf, -np.inf, 0.5]] * 4, np.float32)
    assert decode(of(odd), GREY)[0, :, 0].tolist() == [0, 255, 0, 255, 0, 128]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(kind: str, orientation: int) -> None:
    """A picture with one bright corner, stored in each of the eight ways, always has it at the top left."""
    upright = np.zeros((40, 60), np.uint8)
    upright[:20, :30] = 200
    undo = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright[::-1, ::-1].T,
        8: upright.T[:, ::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = of(np.ascontiguousarray(undo[orientation])).convert("RGB")
    out = decode(encoded(stored, kind, exif=exif), GREY)[:, :, 0]
    assert out[0, 0] > 180
    assert max(out[0, -1], out[-1, 0], out[-1, -1]) < 20


def test_a_resize_averages_what_a_pixel_covers() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (400, 600), dtype=np.uint8)
    assert np.abs(decode(pixels, GREY).astype(int) - pixels.mean()).max() < 4


def test_a_photo_decoded_at_a_fraction_of_its_size_looks_the_same() -> None:
    settings = ImageSettings((40, 60), 3)
    fast = decode(encoded(of(photo()), "JPEG", quality=95), settings).astype(int)
    full = decode(photo(), settings).astype(int)
    assert np.abs(fast - full).mean() < 2


def test_exact_means_that_each_pixel_of_the_full_size_counts() -> None:
    content = encoded(of(photo()), "JPEG", quality=95)
    full = Image.open(BytesIO(content)).resize((60, 40), Image.Resampling.BILINEAR)
    assert np.array_equal(decode(content, ImageSettings((40, 60), 3, exact=True)), np.asarray(full))
    assert np.array_equal(
        decode(content, ImageSettings((40, 60), 1, exact=True))[..., 0], np.asarray(full.convert("L"))
    )
    assert not np.array_equal(decode(content, ImageSettings((40, 60), 3)), np.asarray(full))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [(300, 400), (400, 300), (401, 37), (9, 8), (1, 600)])
def test_fit_shows_all_of_the_image_in_its_proportions_and_fills_the_rest(size: tuple[int, int], exact: bool) -> None:
    content = encoded(Image.new("L", size[::-1], 255), "JPEG")
    out = decode(content, ImageSettings((48, 64), 1, "fit", fill=7, exact=exact))[..., 0]
    scale = min(48 / size[0], 64 / size[1])
    shown = out == 255
    assert set(np.unique(out)) <= {7, 255}
    assert shown.any(axis=1).sum() == max(1, round(size[0] * scale))
    assert shown.any(axis=0).sum() == max(1, round(size[1] * scale))
    for lines in (shown.any(axis=0), shown.any(axis=1)):
        before, after = np.argmax(lines), np.argmax(lines[::-1])
        assert 0 <= after - before <= 1  # centred


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(333, 500), (500, 333), (30, 200)])
def test_crop_shows_the_middle_in_its_proportions(kind: str, size: tuple[int, int]) -> None:
    content = encoded(of(photo(*size)), kind)
    side = min(size)
    left, top = (size[1] - side) / 2, (size[0] - side) / 2
    middle = Image.open(BytesIO(content)).resize((40, 40), 2, (left, top, left + side, top + side))
    out = decode(content, ImageSettings((40, 40), 3, "crop")).astype(int)
    assert np.abs(out - np.asarray(middle)).mean() < 2.5
    exact = decode(content, ImageSettings((40, 40), 3, "crop", exact=True)).astype(int)
    assert np.abs(exact - np.asarray(middle)).max() <= 1


@pytest.mark.parametrize("resize", ["fit", "crop"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_proportions_are_those_of_the_upright_image(resize: str, orientation: int) -> None:
    """A tall picture, its upper half bright, stored in each of the eight ways."""
    upright = np.zeros((90, 30), np.uint8)
    upright[:45] = 200
    undo = {5: upright.T, 6: upright.T[::-1], 7: upright[::-1, ::-1].T, 8: upright.T[:, ::-1]}
    undo |= {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(of(np.ascontiguousarray(undo[orientation])), exif=exif)
    out = decode(content, ImageSettings((30, 30), 1, resize, fill=99))[..., 0]
    beside = 10 if resize == "fit" else 0
    assert (out[:, :beside] == 99).all()
    assert (out[:14, beside : 30 - beside] == 200).all()
    assert (out[16:, beside : 30 - beside] == 0).all()


def test_an_image_of_the_wanted_proportions_is_the_same_in_all_modes() -> None:
    content = encoded(of(photo(80, 120)))
    squashed, fitted, cropped = (decode(content, ImageSettings((40, 60), 3, mode)) for mode in images.RESIZES)
    assert np.array_equal(fitted, squashed)
    assert np.array_equal(cropped, squashed)


# The short way for plain PNG files


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(pixels: Array, before: bytes = b"", pieces: int = 1, between: bytes = b"", after: bytes = b"") -> bytes:
    """Return a PNG file of (H, W) or (H, W, 3) uint8 with more chunks at several places."""
    height, width, *channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels else 0, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    step = -(-len(packed) // pieces)
    data = between.join(chunk(b"IDAT", packed[start : start + step]) for start in range(0, len(packed), step))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + data + after + chunk(b"IEND", b"")


def by_pillows_reader(content: bytes) -> Array | None:
    """Return the pixels that Pillow's own reader finds, None if it rejects the file."""
    with quiet_pillow():
        try:
            image: Image.Image = PngImagePlugin.PngImageFile(BytesIO(content))
            image.load()
        except Exception:
            return None
        if image.size[0] * image.size[1] > 10_000:  # the damage made it huge
            return None
        return decode(image, ImageSettings(image.size[::-1], 3))


def here(content: bytes, size: tuple[int, int], decoder: str = "pillow") -> Array | None:
    try:
        return decode(content, ImageSettings(size, 3, decoder=decoder, max_pixels=10_000))
    except DecodeError:
        return None


GAMMA, TEXT = chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"tEXt", b"Comment\0none")


@pytest.mark.parametrize("decoder", ["pillow", "imagecodecs"])
@pytest.mark.parametrize(
    "extras",
    [
        {},
        {"before": GAMMA},
        {"before": TEXT},
        {"before": chunk(b"tRNS", b"\0\7\0\7\0\7")},
        {"before": chunk(b"sBIT", b"\5\5\5") + chunk(b"pHYs", struct.pack(">IIB", 1, 2, 0))},
        {"before": GAMMA[:-1] + b"\0"},
        {"after": TEXT},
        {"after": chunk(b"eXIf", b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\3\0\0\0\0\0\0\0")},
        {"pieces": 4},
        {"pieces": 4, "between": TEXT},
        {"pieces": 2, "between": GAMMA},
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_png_files_give_what_pillows_reader_makes_of_them(mode: str, extras: dict[str, Any], decoder: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    content = png(pixels if mode == "RGB" else pixels[..., 0], **extras)
    expected, found = by_pillows_reader(content), here(content, (7, 9), decoder)
    assert (expected is None) == (found is None)
    assert expected is None or found is None or np.array_equal(expected, found)


@pytest.mark.parametrize("decoder", ["pillow", *FAST])
def test_plain_png_files_never_see_pillows_slow_reader(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(images, "_identified")
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    assert np.array_equal(decode(encoded(of(pixels)), ImageSettings((7, 9), decoder=decoder)), pixels)
    assert decode(encoded(of(pixels[..., 0])), ImageSettings((3, 5), 1, decoder=decoder)).shape == (3, 5, 1)


@given(
    st.binary(min_size=6 * 7 * 3, max_size=6 * 7 * 3),
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), max_size=3),
    st.integers(0, 400),
    st.sampled_from(["pillow", "imagecodecs"]),
)
def test_damaged_png_files_are_accepted_or_rejected_as_by_pillows_reader(
    content: bytes, flips: list[tuple[int, int]], cut: int, decoder: str
) -> None:
    damaged = bytearray(png(np.frombuffer(content, np.uint8).reshape(6, 7, 3), GAMMA, pieces=2))
    for place, change in flips:
        damaged[place % len(damaged)] ^= change
    del damaged[len(damaged) - max(0, cut - 300) :]
    expected, found = by_pillows_reader(bytes(damaged)), here(bytes(damaged), (6, 7), decoder)
    assert (expected is None) == (found is None)
    if expected is not None and found is not None and expected.shape == found.shape:
        assert np.array_equal(expected, found)


# Other decoders


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list that the fast decoders write their names to when they are called."""
    names: list[str] = []

    def spy(name: str, function: str) -> None:
        module = import_module(name)
        original = getattr(module, function)

        def called(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, called)

    if find_spec("simplejpeg"):
        spy("simplejpeg", "decode_jpeg")
    spy("imagecodecs", "png_decode")
    return names


@pytest.mark.parametrize("resize", images.RESIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_imagecodecs_gives_the_pixels_of_png_files_that_pillow_gives(
    mode: str, channels: int, resize: str, calls: list[str]
) -> None:
    for size in ((40, 50), (120, 90)):
        content = encoded(of(photo(*size)).convert(mode))
        fast = decode(content, ImageSettings((40, 50), channels, resize, decoder="imagecodecs"))
        assert np.array_equal(fast, decode(content, ImageSettings((40, 50), channels, resize)))
    assert calls == ["imagecodecs"] * 2


@with_simplejpeg
@pytest.mark.parametrize("resize", images.RESIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_simplejpeg_gives_nearly_the_pixels_of_jpeg_files_that_pillow_gives(
    mode: str, channels: int, resize: str, calls: list[str]
) -> None:
    for size in ((333, 500), (90, 70), (20, 30)):
        content = encoded(of(photo(*size)).convert(mode), "JPEG", quality=90)
        exact = ImageSettings((64, 48), channels, resize, exact=True, decoder="simplejpeg")
        slow = decode(content, ImageSettings((64, 48), channels, resize, exact=True)).astype(int)
        assert np.abs(decode(content, exact) - slow).max() <= 2
        scaled = ImageSettings((64, 48), channels, resize, decoder="simplejpeg")
        assert np.abs(decode(content, scaled) - slow).mean() < 2
    assert calls == ["simplejpeg"] * 6


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("decoder", FAST)
@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (of(photo(60, 40)), "JPEG", {"exif": turned(6)}),
        (of(photo(60, 40)), "PNG", {"exif": turned(6)}),
        (of(photo(60, 40)).convert("CMYK"), "JPEG", {}),
        (of(photo(60, 40)).convert("RGBA"), "PNG", {}),
        (of(photo(60, 40)), "PNG", {"transparency": (1, 2, 3)}),
        (of(photo(60, 40)).quantize(30), "PNG", {}),
        (of(photo(60, 40)[..., 0].astype(np.uint16) * 200), "PNG", {}),
        (of(photo(60, 40)[..., 0] > 99), "PNG", {}),
        (of(photo(60, 40)), "WEBP", {}),
        (of(photo(60, 40)), "BMP", {}),
    ],
)
def test_what_a_fast_decoder_is_not_for_goes_through_pillow(
    image: Image.Image, kind: str, options: dict[str, Any], decoder: str, calls: list[str]
) -> None:
    content = encoded(image, kind, **options)
    assert np.array_equal(
        decode(content, ImageSettings((30, 30), decoder=decoder)), decode(content, ImageSettings((30, 30)))
    )
    assert not calls


@pytest.mark.parametrize("decoder", FAST)
def test_fast_decoders_reject_what_is_broken_or_too_large(decoder: str, calls: list[str]) -> None:
    for kind in ("JPEG", "PNG"):
        content = encoded(Image.effect_noise((50, 50), 90), kind)
        with pytest.raises(DecodeError, match="cannot be decoded: "):
            decode(content[: len(content) // 2], ImageSettings((30, 30), decoder=decoder))
        calls.clear()
        with pytest.raises(DecodeError, match="50 x 50 pixels are more than max_pixels = 2499"):
            decode(content, ImageSettings((30, 30), max_pixels=2499, decoder=decoder))
        assert not calls


def test_fast_decoders_are_not_imported_unless_they_are_named() -> None:
    program = """
import sys
from io import BytesIO
from PIL import Image
from asynctrain.data.images import ImageSettings, decode, decoder_fingerprint

for kind in ("JPEG", "PNG"):
    Image.new("RGB", (9, 9)).save(file := BytesIO(), kind)
    decode(file.getvalue(), ImageSettings())
decoder_fingerprint(ImageSettings())
print({"simplejpeg", "imagecodecs"} & set(sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"set()\n"


@pytest.fixture
def without_extras(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    images._require_installed.cache_clear()
    yield
    images._require_installed.cache_clear()


@pytest.mark.usefixtures("without_extras")
@pytest.mark.parametrize("decoder", ["simplejpeg", "imagecodecs"])
def test_a_decoder_that_is_not_installed_is_told_with_the_extra_to_install(decoder: str) -> None:
    settings = ImageSettings(decoder=decoder)
    for use in (lambda: decode(encoded(Image.new("L", (9, 9))), settings), lambda: decoder_fingerprint(settings)):
        with pytest.raises(
            ModuleNotFoundError, match=rf'"{decoder}" needs .*: pip install "asynctrain\[fast\]"'
        ) as caught:
            use()
        assert caught.value.name == decoder
    decode(encoded(Image.new("L", (9, 9))), ImageSettings())  # which needs nothing


def test_the_fingerprint_names_the_decoder_and_all_versions() -> None:
    plain = decoder_fingerprint(ImageSettings())
    assert plain["decoder"] == "pillow"
    assert plain["pillow"] == PIL.__version__
    assert all(any(letter.isdigit() for letter in plain[key]) for key in ("jpeg", "zlib", "webp", "tiff"))
    fast = decoder_fingerprint(ImageSettings(decoder="imagecodecs"))
    assert fast == {**plain, "decoder": "imagecodecs", "imagecodecs": imagecodecs.__version__}


@with_simplejpeg
def test_the_fingerprint_names_simplejpeg_where_that_decodes() -> None:
    assert decoder_fingerprint(ImageSettings(decoder="simplejpeg"))["simplejpeg"]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(kind: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode(data, RGB)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb_or_grey(kind: str) -> None:
    data = encoded(Image.new("CMYK", (60, 40), (0, 255, 255, 0)), kind)
    red = decode(data, RGB)[0, 0].astype(int)
    assert red[0] > 230
    assert max(red[1:]) < 25
    assert abs(int(decode(data, GREY)[0, 0, 0]) - 76) < 10


def test_lab_becomes_rgb_or_grey() -> None:
    data = encoded(Image.new("LAB", (6, 4), (255, 128, 128)), "TIFF")
    assert decode(data, RGB).shape == (4, 6, 3)
    assert decode(data, GREY).shape == (4, 6, 1)


def test_a_given_pillow_image_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(Image.new("RGB", (600, 400)), "JPEG"))
    with Image.open(tmp_path / "a.jpg") as image:
        decode(image, RGB)
        assert image.size == (600, 400)


def test_the_pixels_go_into_the_array_that_is_given(grey: Array) -> None:
    batch = np.full((3, 4, 6, 1), 7, np.uint8)
    out = batch[1]
    assert decode(encoded(of(grey)), GREY, out=out) is out
    assert np.array_equal(batch[1, :, :, 0], grey)
    assert (batch[[0, 2]] == 7).all()


@pytest.mark.parametrize("out", [np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6, 1), np.float32)])
def test_an_array_that_does_not_fit_is_told(out: Array) -> None:
    with pytest.raises(ValueError, match=r"out must be \(4, 6, 1\) of uint8, got"):
        decode(b"", GREY, out=out)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"not an image at all", "is no JPEG, PNG, WEBP, BMP, GIF or TIFF image"),
        (encoded(Image.new("RGB", (50, 50)))[:-40], "cannot be decoded: "),
        (encoded(Image.effect_noise((50, 50), 90), "JPEG")[:-200], "cannot be decoded: image file is truncated"),
        (encoded(Image.new("RGB", (8, 8)), "PPM"), "is no JPEG"),
        (encoded(Image.new("RGB", (8, 8)), "ICO"), "is no JPEG"),
        (np.zeros((4, 4), np.float32), "an array must be uint8, got float32"),
        (np.zeros((4, 4, 2), np.uint8), r"an array must have the shape .*, got \(4, 4, 2\)"),
        (np.zeros((0, 4), np.uint8), r"an array must have the shape .*, got \(0, 4\)"),
    ],
)
def test_what_is_no_image_is_named_with_a_reason_and_its_cause(content: bytes | Array, reason: str) -> None:
    with pytest.raises(DecodeError, match=f"^photos/x: .*{reason}") as caught:
        decode(content, RGB, "photos/x")
    assert caught.value.path == "photos/x"
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)


def test_too_many_pixels_are_rejected_before_they_are_decoded() -> None:
    settings = ImageSettings((4, 6), 3, max_pixels=99)
    decode(encoded(Image.new("L", (9, 11))), settings)
    truncated = encoded(Image.effect_noise((10, 10), 90))[:80]  # decoding it would fail in another way
    with pytest.raises(DecodeError, match="10 x 10 pixels are more than max_pixels = 99"):
        decode(truncated, settings)


def test_pillows_warnings_neither_leak_nor_become_errors_and_filters_are_as_before() -> None:
    image = encoded(Image.new("L", (6, 4)), "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff")
    bomb = encoded(Image.new("1", (12000, 12000)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        decode(image, RGB)
        with pytest.raises(DecodeError, match="max_pixels"):
            decode(bomb, RGB)
        assert list(warnings.filters) == before
    assert not caught
    with pytest.warns(UserWarning, match="Corrupt EXIF"), Image.open(BytesIO(image)) as opened:
        opened.getexif()  # so it does warn those who ask


def test_many_threads_decoding_leave_the_warning_filters_as_they_were() -> None:
    image = encoded(Image.new("L", (6, 4)))
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: decode(image, RGB), range(500)))
    assert list(warnings.filters) == before


@pytest.mark.skipif(getattr(sys.flags, "context_aware_warnings", False), reason="each context has filters of its own")
def test_filters_of_others_stay_even_if_they_say_the_same() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        before = list(warnings.filters)
        with quiet_pillow():
            warnings.filterwarnings("ignore", message="added meanwhile")
        assert list(warnings.filters[1:]) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (0, 4)}, r"size must be \(height, width\), two integers of 1 or more, got \(0, 4\)"),
        ({"size": (4, 4, 3)}, "size must be"),
        ({"size": (4, 4.5)}, "size must be"),
        ({"size": 28}, "size must be .*, got 28"),
        ({"channels": 4}, "channels must be 1 .* or 3 .*, got 4"),
        ({"resize": "stretch"}, "resize must be one of squash, fit, crop, got 'stretch'"),
        ({"max_pixels": 0}, "max_pixels must be 1 or more, got 0"),
        ({"fill": 256}, "fill must be an integer from 0 to 255, got 256"),
        ({"fill": "black"}, "fill must be an integer from 0 to 255, got 'black'"),
        ({"decoder": "opencv"}, "decoder must be one of pillow, simplejpeg, imagecodecs, got 'opencv'"),
    ],
)
def test_wrong_settings_are_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSettings(**arguments)


def test_settings_survive_json() -> None:
    settings = ImageSettings((28, 32), 1, "fit", max_pixels=1000, fill=255, exact=True, decoder="imagecodecs")
    assert ImageSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert settings.shape == (28, 32, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("decoder", ["pillow", *FAST])
def test_strange_and_broken_images_end_as_their_manifest_says(odd_images: Path, channels: int, decoder: str) -> None:
    manifest = json.loads((odd_images / "manifest.json").read_text())
    if manifest["pillow"].split(".")[0] != PIL.__version__.split(".")[0]:
        pytest.skip(f"the manifest was made with Pillow {manifest['pillow']}, this is {PIL.__version__}")
    wrong = []
    for entry in manifest["entries"]:
        content = (odd_images / entry["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        try:
            decode(content, ImageSettings((64, 64), channels, decoder=decoder), entry["file"])
            outcome = "decode"
        except DecodeError as error:
            outcome = "reject" if error.path == entry["file"] else "named wrongly"
        if outcome != entry["expect"] and not entry["version_dependent"]:
            wrong.append((entry["file"], entry["expect"], outcome))
    assert not wrong
    assert len(manifest["entries"]) == 217


def test_naming_the_decoders_again_keeps_nothing_whatever_has_changed_in_the_folders_of_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)

    def listings() -> int:
        return sum(type(thing).__name__ == "Lookup" for thing in gc.get_objects())

    known, before = decoder_fingerprint(RGB), listings()
    for number in range(5):
        (tmp_path / str(number)).touch()
        os.utime(tmp_path, (number, number))
        assert decoder_fingerprint(RGB) == known
    assert listings() == before
