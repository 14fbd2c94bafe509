"""Images from the wild: encoded bytes of any kind become uint8 arrays of one shape.

Only JPEG, PNG, WEBP, BMP, GIF and TIFF are opened: some of Pillow's other formats start programs or take memory out of
all proportion to the file. ``decode`` is plain and synchronous; run it in a thread.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import numpy as np

# The six formats by name: when Pillow does not know one yet it imports all the plugins it has, over forty.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from asynctrain.arena import Array
from asynctrain.errors import DecodeError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
RESIZES = ("squash",)
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
        resize: ``"squash"`` scales height and width each to fit, whatever the proportions were.
        max_pixels: images of more pixels are rejected before they are decoded. Decoding one takes up to about 12
            bytes per pixel for a moment.
    """

    size: tuple[int, int] = (64, 64)
    channels: int = 3
    resize: str = "squash"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if not _is_size(self.size):
            raise ValueError(f"size must be (height, width), two integers of 1 or more, got {self.size}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {self.channels}")
        if self.resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {self.resize!r}")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be 1 or more, got {self.max_pixels}")

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


def decode(
    encoded: bytes | Array | Image.Image, settings: ImageSettings, name: str = "image", out: Array | None = None
) -> Array:
    """Return an image as ``settings`` want it: upright, opaque, 8 bits, of one size.

    Photos are turned upright by their EXIF orientation. Transparent parts show white. Images of 16 bits keep their
    upper 8; integer and float images are scaled from the narrowest usual range that holds them ([0, 1], [0, 255],
    [0, 65535], or else their own). Of an animation the first frame counts. JPEG files are decoded at 1/2, 1/4 or 1/8
    of their size where that is still enough, which is several times faster.

    Args:
        encoded: a file's bytes, a Pillow image, or an array (H, W) or (H, W, C) of uint8, C being 1, 3 or 4.
        settings: what to make of it.
        name: stands in errors, usually the path.
        out: (H, W, C) uint8, written and returned; by default a new array.

    Raises:
        DecodeError: it cannot be decoded, has too many pixels, or is of no permitted format. What Pillow or numpy
            raised is its cause.
    """
    if out is None:
        out = np.empty(settings.shape, np.uint8)
    elif out.shape != settings.shape or out.dtype != np.uint8:
        raise ValueError(f"out must be {settings.shape} of uint8, got {out.shape} of {out.dtype}")
    try:
        if isinstance(encoded, np.ndarray):
            _convert_array(encoded, settings, out)
        else:
            with quiet_pillow():
                _write(_fitted(_opened(encoded, settings), settings), out)
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
        _write(_fitted(Image.fromarray(array), settings), out)


def _opened(encoded: bytes | Image.Image, settings: ImageSettings) -> Image.Image:
    """Open, check the number of pixels, and decode: at a fraction of the size where the format can."""
    image = encoded if isinstance(encoded, Image.Image) else _identified(encoded)
    width, height = image.size
    if width * height > settings.max_pixels:
        raise ValueError(f"{width} x {height} pixels are more than max_pixels = {settings.max_pixels}")
    if image is not encoded and image.format in ("JPEG", "MPO"):
        image.draft("L" if settings.channels == 1 else "RGB", _size_before(_orientation(image), settings))
    image.load()
    return image


def _identified(encoded: bytes) -> Image.Image:
    if not encoded:
        raise ValueError("it is empty")
    return Image.open(BytesIO(encoded), formats=FORMATS)


def _fitted(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """Return a loaded image as L or RGB of the wanted size.

    All that is costly in memory comes after the resize: turning upright, composing, converting colours.
    """
    orientation = _orientation(image)
    image = _eight_bits(image)
    size = _size_before(orientation, settings)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if orientation != 1:
        image = image.transpose(_UPRIGHT[orientation])
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    mode = "L" if settings.channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _size_before(orientation: int, settings: ImageSettings) -> tuple[int, int]:
    """Return the (width, height) that is wanted before the image is turned upright."""
    height, width = settings.size
    return (height, width) if orientation >= 5 else (width, height)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 if there is none; TIFF files are turned by Pillow itself."""
    if not any(key in image.info for key in _EXIF):
        return 1
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in _UPRIGHT else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the image in a mode of 8 bits per channel, in which pixels can be averaged."""
    transparent = image.has_transparency_data
    if image.mode in ("L", "RGB") and transparent:  # one colour stands for transparent
        return image.convert(image.mode + "A")
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


def _write(image: Image.Image, out: Array) -> None:
    out[...] = np.frombuffer(image.tobytes(), np.uint8).reshape(out.shape)


_quiet_lock = threading.Lock()
_quiet_users = 0
_quiet_filter: Any = None


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Keep Pillow's warnings of odd metadata from the program's standard error, and from becoming its errors.

    ``warnings.catch_warnings`` is not for threads: it puts back the filters it found, those of others gone. This adds
    one filter for Pillow's modules while anyone is inside, in any thread, and removes that one only.
    """
    global _quiet_users, _quiet_filter
    with _quiet_lock:
        _quiet_users += 1
        if _quiet_users == 1:
            warnings.filterwarnings("ignore", module=r"PIL\.(?#asynctrain)")  # equal to no filter of anyone else
            _quiet_filter = warnings.filters[0]
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_users -= 1
            if _quiet_users == 0 and _quiet_filter in warnings.filters:
                warnings.filters.remove(_quiet_filter)  # type: ignore[attr-defined]
