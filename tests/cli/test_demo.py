"""``asynctrain demo`` and the digits it is about."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from asynctrain.cli.demo import half_blocks
from asynctrain.data import unpack_digits

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "bundle_digits.py"


@pytest.fixture(scope="module")
def bundle() -> dict[str, Any]:
    with files("asynctrain.data").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        return dict(arrays)


def test_the_demo_reaches_99_percent_on_digits_it_never_trained_on(
    asynctrain: Callable[..., Any], tmp_path: Path
) -> None:
    called = asynctrain("demo", "--out", tmp_path / "run", "--json")
    assert called.code == 0, called.stderr
    assert called.json["test_accuracy"] >= 0.99
    assert called.json["seconds"] < 60
    assert called.json["run_dir"] == str(tmp_path / "run")
    assert "The mistakes, and the least certain" in called.stderr


def test_digits_are_unpacked_into_class_folders_of_png_files(tmp_path: Path, bundle: dict[str, Any]) -> None:
    unpack_digits(tmp_path)
    paths = sorted(tmp_path.rglob("*.png"))
    assert len(paths) == 1797
    for path in paths[::100]:
        index = int(path.stem)
        assert path.parent.name == str(bundle["labels"][index])
        assert path.parent.parent.name == ("test" if bundle["test"][index] else "train")
        with Image.open(path) as image:
            assert image.mode == "L"
            pixels = np.asarray(image)
        np.testing.assert_array_equal(pixels, bundle["images"][index].astype(int) * 255 // 16)


def test_the_bundle_holds_1797_digits_of_which_a_fifth_of_each_class_is_for_the_test(bundle: dict[str, Any]) -> None:
    assert {name: (array.shape, array.dtype.name) for name, array in bundle.items()} == {
        "images": ((1797, 8, 8), "uint8"),
        "labels": ((1797,), "uint8"),
        "test": ((1797,), "bool"),
    }
    assert bundle["images"].max() == 16
    counts = np.bincount(bundle["labels"])
    np.testing.assert_array_equal(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    np.testing.assert_array_equal(np.bincount(bundle["labels"][bundle["test"]]), np.round(0.2 * counts))


def test_the_bundle_is_what_its_script_makes(bundle: dict[str, Any]) -> None:
    pytest.importorskip("sklearn", reason="scripts/bundle_digits.py needs scikit-learn")
    made = runpy.run_path(str(SCRIPT))["digits"]()
    assert made.keys() == bundle.keys()
    for name, array in made.items():
        np.testing.assert_array_equal(array, bundle[name], strict=True)


def test_pixels_are_drawn_two_to_a_character() -> None:
    pixels = np.array([[0, 255, 0, 255], [0, 0, 255, 255]], np.uint8)
    assert half_blocks(pixels) == " ▀▄█"
