"""Handwritten digits that come with the package, to try things on: 1,797 of them, as image files."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image


def unpack_digits(folder: str | os.PathLike[str]) -> None:
    """Write the digits as grey PNG files of 8 x 8 pixels, a folder a class: ``train/7/0123.png``, ``test/7/0124.png``.

    A fifth is for testing, the same one always. They are from the UCI Machine Learning Repository, CC BY 4.0; the
    package's ``data/digits.md`` says more. Blocks for half a second; raises ``OSError``.
    """
    with files("asynctrain.data").joinpath("digits.npz").open("rb") as file, np.load(file) as bundle:
        images, labels, test = bundle["images"], bundle["labels"], bundle["test"]
    places = [Path(folder, "test" if tests else "train", str(label)) for label, tests in zip(labels, test, strict=True)]
    for place in set(places):
        place.mkdir(parents=True, exist_ok=True)
    grey = (images.astype(np.uint16) * 255 // 16).astype(np.uint8)  # 0..16 -> 0..255
    for index, (pixels, place) in enumerate(zip(grey, places, strict=True)):
        Image.fromarray(pixels).save(place / f"{index:04}.png")
