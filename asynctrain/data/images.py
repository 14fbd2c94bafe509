"""Images from the wild: encoded bytes of any kind become uint8 arrays of one shape.

Only JPEG, PNG, WEBP, BMP, GIF and TIFF are opened: some of Pillow's other formats start programs or take memory out of
all proportion to the file. ``decode`` is plain and synchronous; run it in a thread.
"""

from __future__ import annotations

import sys
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from math import ceil
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from asynctrain.arena import Array
from asynctrain.errors import DecodeError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
RESIZES = ("squash", "fit", "crop")
DECODERS = ("pillow", "simplejpeg", "imagecodecs")
MAX_PIXELS = 1024**3 // 4 // 3  # where Pillow, too, begins to warn: 256 MiB of RGB

_ORIENTATION = 0x0112  # the EXIF tag, and what undoes each of its values
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_USUAL = {"f": (1.0, 255.0, 65535.0), "i": (255.0, 65535.0)}  # what white is in images of floats, of integers
_EXIF = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where it may hide in ``image.info``


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """What every image becomes.

    Attributes:
        size: (H, W) in pixels.
        channels: 3 for RGB, 1 for grey.
        resize: ``"squash"`` scales height and width each to fit, whatever the proportions were; ``"fit"`` keeps the
            proportions, shows all of the image, centred, and fills the rest; ``"crop"`` keeps the proportions, fills
            the whole size, and cuts off what sticks out, as much on either side.
        max_pixels: images of more pixels are rejected before they are decoded. Decoding one takes up to about 12
            bytes per pixel for a moment.
        fill: what ``"fit"`` puts beside the image, in all channels, 0 (black) to 255 (white).
        exact: whether each pixel of a large image counts when it is made small. Without, JPEG files are decoded at a
            fraction of their size where that is still enough, and other large images are first reduced by whole
            factors: several times faster, and a little different.
        decoder: ``"pillow"`` for all formats; ``"simplejpeg"`` decodes JPEG files, ``"imagecodecs"`` PNG files, each
            if it is installed (``pip install "asynctrain[fast]"``). Pillow takes what these are not for: other formats,
            photos to be turned, CMYK, transparency, palettes, 16 bits, and files that they refuse.
    """

    size: tuple[int, int] = (64, 64)
    channels: int = 3
    resize: str = "squash"
    max_pixels: int = MAX_PIXELS
    fill: int = 0
    exact: bool = False
    decoder: str = "pillow"

    def __post_init__(self) -> None:
        if not _is_size(self.size):
            raise ValueError(f"size must be (height, width), two integers of 1 or more, got {self.size}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {self.channels}")
        if self.resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {self.resize!r}")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be 1 or more, got {self.max_pixels}")
        if self.fill not in range(256):
            raise ValueError(f"fill must be an integer from 0 to 255, got {self.fill!r}")
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {self.decoder!r}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return (*self.size, self.channels)

    def to_json(self) -> Mapping[str, Any]:
        """Return the settings as JSON values."""
        return {**asdict(self), "size": list(self.size)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ImageSettings:
        """Return the settings that ``to_json`` described."""
        return cls(**{**value, "size": tuple(value["size"])})


def _is_size(size: object) -> bool:
    return isinstance(size, tuple) and len(size) == 2 and all(isinstance(side, int) and side >= 1 for side in size)


def decoder_fingerprint(settings: ImageSettings) -> dict[str, str]:
    """Return the libraries and versions that, together with ``settings``, decide about each pixel.

    Raises:
        ModuleNotFoundError: the decoder that ``settings`` name is not installed.
    """
    _require_installed(settings.decoder)
    return {
        "decoder": settings.decoder,
        settings.decoder: _version_of(settings.decoder),
        "pillow": _version_of("pillow"),
        "jpeg": _first_built_in("libjpeg_turbo", "jpg"),
        "zlib": _first_built_in("zlib_ng", "zlib"),
        "webp": _first_built_in("webp"),
        "tiff": _first_built_in("libtiff"),
    }


@cache
def _version_of(package: str) -> str:
    """Return the version of an installed package.

    It is looked up once: each time that a folder of ``sys.path`` has changed, the lookup keeps another listing of it.
    """
    from importlib.metadata import version  # here, as it imports for 20 ms

    return version(package)


def _first_built_in(*libraries: str) -> str:
    """Return name and version of the first of Pillow's ``libraries`` that it was built with."""
    versions = {library: features.version(library) for library in libraries}
    return next((f"{library} {version}" for library, version in versions.items() if version), "none")


@cache
def _require_installed(decoder: str) -> None:
    if decoder != "pillow" and find_spec(decoder) is None:
        raise ModuleNotFoundError(
            f'decoder "{decoder}" needs the package {decoder}, which is not installed: pip install "asynctrain[fast]"',
            name=decoder,
        )


def decode(
    encoded: bytes | Array | Image.Image, settings: ImageSettings, name: str = "image", out: Array | None = None
) -> Array:
    """Return an image as ``settings`` want it: upright, opaque, 8 bits, of one size.

    Photos are turned upright by their EXIF orientation. Transparent parts show white. Images of 16 bits keep their
    upper 8; integer and float images are scaled from the narrowest usual range that holds them ([0, 1], [0, 255],
    [0, 65535], or else their own). Of an animation the first frame counts.

    Args:
        encoded: a file's bytes, a Pillow image, or an array (H, W) or (H, W, C) of uint8, C being 1, 3 or 4.
        settings: what to make of it.
        name: stands in errors, usually the path.
        out: (H, W, C) uint8, written and returned; by default a new array.

    Raises:
        DecodeError: it cannot be decoded, has too many pixels, or is of no permitted format. What Pillow or numpy
            raised is its cause.
        ModuleNotFoundError: the decoder that ``settings`` name is not installed.
    """
    if out is None:
        out = np.empty(settings.shape, np.uint8)
    elif out.shape != settings.shape or out.dtype != np.uint8:
        raise ValueError(f"out must be {settings.shape} of uint8, got {out.shape} of {out.dtype}")
    _require_installed(settings.decoder)
    try:
        with quiet_pillow():
            if isinstance(encoded, np.ndarray):
                _convert_array(encoded, settings, out)
            elif isinstance(encoded, Image.Image):
                _convert_image(encoded, settings, out)
            else:
                _convert_file(encoded, settings, out)
    except Exception as error:  # Pillow raises nearly anything: OSError, SyntaxError, KeyError, struct.error, ...
        raise DecodeError(name, _reason(error)) from error
    return out


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    return f"cannot be decoded: {error}" if str(error) else f"cannot be decoded: {type(error).__name__}"


def _convert_array(array: Array, settings: ImageSettings, out: Array) -> None:
    if array.dtype != np.uint8:
        raise TypeError(f"an array must be uint8, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if 0 in array.shape or (array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4))):
        raise ValueError(f"an array must have the shape (H, W) or (H, W, 1, 3 or 4), got {array.shape}")
    if array.shape[:2] == settings.size and array.ndim == 2:
        out[...] = array[:, :, np.newaxis]
    elif array.shape == out.shape:
        out[...] = array
    else:
        image = Image.fromarray(array)
        _write(image, _placed(image.size, 1, settings), settings, out)


def _convert_image(image: Image.Image, settings: ImageSettings, out: Array) -> None:
    _check_pixels(image.size, settings)
    image.load()
    _write(image, _placed(image.size, _orientation(image), settings), settings, out)


def _convert_file(encoded: bytes, settings: ImageSettings, out: Array) -> None:
    plain = _plain_png(encoded)
    if plain is not None and _convert_plain_png(encoded, plain, settings, out):
        return
    image = _identified(encoded)
    if image.format in ("JPEG", "MPO"):
        _convert_jpeg(encoded, image, settings, out)
    else:
        _convert_image(image, settings, out)


def _convert_plain_png(encoded: bytes, plain: _PlainPng, settings: ImageSettings, out: Array) -> bool:
    """Return False where the pixels turn out to be damaged, for Pillow's own reader to have the last word."""
    _check_pixels(plain.size, settings)
    if settings.decoder == "imagecodecs":
        import imagecodecs

        try:
            _convert_array(imagecodecs.png_decode(encoded), settings, out)
        except imagecodecs.PngError:
            return False
        return True
    try:
        image = Image.frombytes(plain.mode, plain.size, plain.compressed, "zip", plain.mode)
    except ValueError:
        return False
    _write(image, _placed(plain.size, 1, settings), settings, out)
    return True


def _convert_jpeg(encoded: bytes, image: Image.Image, settings: ImageSettings, out: Array) -> None:
    """Decode a JPEG file, opened as ``image``, at a fraction of its size where that is enough."""
    _check_pixels(image.size, settings)
    placement = _placed(image.size, _orientation(image), settings)
    pixels = None
    if settings.decoder == "simplejpeg" and image.mode in ("L", "RGB") and placement.orientation == 1:
        pixels = _decoded_by_simplejpeg(encoded, image.mode, placement, settings)
    if pixels is not None:
        image = Image.fromarray(pixels)
    elif not settings.exact:
        image.draft("L" if settings.channels == 1 else "RGB", placement.needed)
    image.load()
    _write(image, placement, settings, out)


def _decoded_by_simplejpeg(encoded: bytes, mode: str, placement: _Placement, settings: ImageSettings) -> Array | None:
    """Return the pixels of as few eighths of the size as are enough, None where simplejpeg finds the file at fault."""
    import simplejpeg  # type: ignore[import-untyped]

    width, height = (0, 0) if settings.exact else placement.needed
    grey = mode == "L" or (settings.channels == 1 and not settings.exact)
    try:
        pixels: Array = simplejpeg.decode_jpeg(encoded, "GRAY" if grey else "RGB", min_height=height, min_width=width)
    except ValueError:
        return None
    return pixels[:, :, 0] if grey else pixels


def _identified(encoded: bytes) -> Image.Image:
    if not encoded:
        raise ValueError("it is empty")
    _import_formats()
    return Image.open(BytesIO(encoded), formats=FORMATS)


@cache
def _import_formats() -> None:
    """Import the six formats by name, in the thread that decodes first.

    When Pillow does not know one yet it imports all the plugins it has, over forty.
    """
    from PIL import (  # noqa: F401
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )


def _check_pixels(size: tuple[int, int], settings: ImageSettings) -> None:
    width, height = size
    if width * height > settings.max_pixels:
        raise ValueError(f"{width} x {height} pixels are more than max_pixels = {settings.max_pixels}")


_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_HEADER = Struct(">IIBBBBBI")  # width, height, bits, colour type, compression, filter, interlacing, checksum
_PNG_CHUNK = Struct(">I4s")  # length and name
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_PNG_MODES = {0: "L", 2: "RGB"}  # by colour type
_PNG_HARMLESS = frozenset({b"bKGD", b"cHRM", b"gAMA", b"iCCP", b"pHYs", b"sBIT", b"sRGB", b"tIME"})  # not looked at


class _PlainPng(NamedTuple):
    """A PNG file of nothing but 8-bit grey (L) or RGB pixels, which are ``compressed`` but not interlaced."""

    mode: str
    size: tuple[int, int]
    compressed: bytes


def _plain_png(encoded: bytes) -> _PlainPng | None:
    """Return what a PNG file of the plainest kind consists of, None for any other and for what may be damaged.

    Most are of that kind. Pillow's reader of all that PNG permits takes as long as decoding 28 x 28 pixels.
    """
    end = len(encoded) - len(_PNG_END)
    if end < 33 or not encoded.startswith(_PNG_START) or not encoded.endswith(_PNG_END):
        return None
    width, height, bits, colour, *methods, checksum = _PNG_HEADER.unpack_from(encoded, 16)
    plain = bits == 8 and colour in _PNG_MODES and methods == [0, 0, 0] and width and height
    if not plain or checksum != zlib.crc32(encoded[12:29]):
        return None
    parts: list[bytes] = []
    offset = 33
    while offset < end:
        length, name = _PNG_CHUNK.unpack_from(encoded, offset)
        stop = offset + 8 + length
        if name == b"IDAT":
            parts.append(encoded[offset + 8 : stop])
        elif parts or name not in _PNG_HARMLESS or _damaged(encoded, offset, stop):
            return None
        offset = stop + 4
    return _PlainPng(_PNG_MODES[colour], (width, height), b"".join(parts)) if offset == end else None


def _damaged(encoded: bytes, offset: int, stop: int) -> bool:
    """Return whether the checksum of the PNG chunk from ``offset`` to ``stop`` is wrong."""
    return zlib.crc32(encoded[offset + 4 : stop]) != int.from_bytes(encoded[stop : stop + 4])


class _Placement(NamedTuple):
    """Where the pixels of an image go.

    orientation: of EXIF, 1 to 8. size: (width, height) that it is scaled to, before it is turned upright. cut: the
    shares of its width and height that are cut off on either side before. needed: (width, height) that the whole image
    must at least have for that.
    """

    orientation: int
    size: tuple[int, int]
    cut: tuple[float, float]
    needed: tuple[int, int]


def _placed(size: tuple[int, int], orientation: int, settings: ImageSettings) -> _Placement:
    """Return where an image of ``size`` (width, height), not yet turned upright, goes."""
    height, width = settings.size if orientation < 5 else settings.size[::-1]
    if settings.resize == "squash":
        return _Placement(orientation, (width, height), (0, 0), (width, height))
    across, down = width / size[0], height / size[1]
    if settings.resize == "fit":
        scale = min(across, down)
        fitted = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        return _Placement(orientation, fitted, (0, 0), fitted)
    scale = max(across, down)
    cut = (1 - across / scale) / 2, (1 - down / scale) / 2
    return _Placement(orientation, (width, height), cut, (ceil(size[0] * scale), ceil(size[1] * scale)))


def _write(image: Image.Image, placement: _Placement, settings: ImageSettings, out: Array) -> None:
    """Write a loaded image into ``out``.

    All that is costly in memory comes after the resize: turning upright, composing, converting colours.
    """
    image = _resized(_eight_bits(image), placement, settings)
    if placement.orientation != 1:
        image = image.transpose(_UPRIGHT[placement.orientation])
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    mode = "L" if settings.channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    width, height = image.size
    pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(height, width, settings.channels)
    if pixels.shape == out.shape:
        out[...] = pixels
    else:
        top, left = (out.shape[0] - height) // 2, (out.shape[1] - width) // 2
        out[...] = settings.fill
        out[top : top + height, left : left + width] = pixels


def _resized(image: Image.Image, placement: _Placement, settings: ImageSettings) -> Image.Image:
    width, height = image.size
    if image.size == placement.size and placement.cut == (0, 0):
        return image
    left, top = placement.cut[0] * width, placement.cut[1] * height
    gap = None if settings.exact else 2.0
    return image.resize(
        placement.size, Image.Resampling.BILINEAR, (left, top, width - left, height - top), reducing_gap=gap
    )


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 if there is none; TIFF files are turned by Pillow itself."""
    if not any(key in image.info for key in _EXIF):
        return 1
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in _UPRIGHT else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the image in a mode of 8 bits per channel, in which pixels can be averaged."""
    transparent = image.has_transparency_data
    if image.mode in ("L", "RGB"):
        return image.convert(image.mode + "A") if transparent else image  # one colour stands for transparent
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if transparent else "RGB")
    if image.mode == "1":
        return image.convert("LA" if transparent else "L")
    if image.mode.startswith("I;16"):
        return _upper_bits(image)
    if image.mode == "LAB":  # which Pillow converts to RGB only, so not to grey directly
        return image.convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_scaled(np.asarray(image)))
    return image


def _upper_bits(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    grey = Image.fromarray((pixels >> 8).astype(np.uint8))
    if "transparency" in image.info:
        opaque = pixels != image.info["transparency"]
        return Image.merge("LA", [grey, Image.fromarray(opaque.astype(np.uint8) * 255)])
    return grey


def _scaled(pixels: Array) -> Array:
    """Return (H, W) integers or floats as uint8, scaled from the narrowest usual range that holds them; NaN is 0."""
    finite = pixels[np.isfinite(pixels)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    usual = [limit for limit in _USUAL[pixels.dtype.kind] if low >= 0 and high <= limit]
    low, high = (0.0, usual[0]) if usual else (low, high)
    known = np.nan_to_num(pixels.astype(np.float64), nan=low, posinf=high, neginf=low)
    return ((known - low) * (255 / max(high - low, 1e-300))).round().astype(np.uint8)


class _Quiet(AbstractContextManager[None]):
    """One filter for Pillow's modules while anyone is inside, in any thread; then that one only is removed.

    ``warnings.catch_warnings`` is not for threads: it puts back the filters it found, those of others gone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._filter: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                warnings.filterwarnings("ignore", module=r"PIL\.(?#asynctrain)")  # equal to no filter of anyone else
                self._filter = warnings.filters[0]

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._filter in warnings.filters:
                warnings.filters.remove(self._filter)  # type: ignore[attr-defined]


_QUIET = _Quiet()  # for all threads together


@contextmanager
def _quiet_here() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def quiet_pillow() -> AbstractContextManager[None]:
    """Keep Pillow's warnings of odd metadata from the program's standard error, and from becoming its errors.

    Those who decode many images hold it around all of them: entering for the first time costs 10 us, then under 1.
    """
    if getattr(sys.flags, "context_aware_warnings", False):  # on free-threaded Python each context has its filters
        return _quiet_here()
    return _QUIET
