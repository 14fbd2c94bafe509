from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynctrain.data import ArrayDataset, FileSource, ImageFolder, Subset
from asynctrain.data.datasets import read_patiently
from asynctrain.errors import DataError, ReadError


def touch(root: Path, *names: str) -> Path:
    """Make files that contain their own name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def names(dataset: ImageFolder) -> list[str]:
    return [Path(str(dataset[i].source)).relative_to(dataset.path).as_posix() for i in range(len(dataset))]


def test_classes_are_the_folders_and_files_come_sorted(tmp_path: Path) -> None:
    dataset = ImageFolder(touch(tmp_path, "rose/b.jpg", "rose/a.png", "aster/z.webp"))
    assert dataset.classes == ("aster", "rose")
    assert names(dataset) == ["aster/z.webp", "rose/a.png", "rose/b.jpg"]
    assert dataset.labels.tolist() == [0, 1, 1]
    assert dataset.labels.dtype == np.int64
    assert [dataset[i].label for i in range(3)] == [0, 1, 1]
    assert dataset[1].source.read() == b"rose/a.png"


def test_folders_inside_a_class_belong_to_it(tmp_path: Path) -> None:
    dataset = ImageFolder(touch(tmp_path, "rose/c.png", "rose/b/x.png", "rose/a/deep/er.png"))
    assert names(dataset) == ["rose/a/deep/er.png", "rose/b/x.png", "rose/c.png"]


def test_only_image_files_count_whatever_the_case_of_their_suffix(tmp_path: Path) -> None:
    images = ["a.jpg", "b.JPEG", "c.Png", "d.webp", "e.bmp", "f.gif", "g.tif", "h.TIFF"]
    others = ["notes.txt", "png", ".hidden.png", ".thumbnails/a.png", "x.png.part"]
    dataset = ImageFolder(touch(tmp_path, *(f"rose/{name}" for name in images + others), "README.md", ".git/x.png"))
    assert names(dataset) == [f"rose/{name}" for name in images]


def test_a_missing_path_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder") as caught:
        ImageFolder(tmp_path / "nowhere")
    assert caught.value.path == str(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("files", "path", "reason"),
    [
        (["file.png"], "file.png", "is not a folder"),
        ([".hidden"], "", "is empty"),
        (["a.png", "b.png"], "", "holds no class folders"),
        (["rose/a.png", "tulip/notes.txt"], "tulip", "holds no image"),
    ],
)
def test_a_folder_that_is_no_dataset_is_told(tmp_path: Path, files: list[str], path: str, reason: str) -> None:
    touch(tmp_path, *files)
    root = tmp_path / path if path == "file.png" else tmp_path
    with pytest.raises(DataError, match=reason) as caught:
        ImageFolder(root)
    assert caught.value.path == str(tmp_path / path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"gone\.png: cannot be read: No such file") as caught:
        FileSource(str(tmp_path / "gone.png")).read()
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_an_array_dataset_hands_out_its_images_and_names_them() -> None:
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    dataset = ArrayDataset(images, [2, 0])
    assert len(dataset) == 2
    assert dataset.classes == ("0", "1", "2")
    assert dataset.labels.tolist() == [2, 0]
    assert np.array_equal(dataset[1].source.read(), images[1])
    assert str(dataset[1].source) == "array[1]"


def test_datasets_can_be_iterated_and_end_with_index_error(tmp_path: Path) -> None:
    folder = ImageFolder(touch(tmp_path, "rose/a.png", "tulip/a.png"))
    arrays = ArrayDataset(np.zeros((2, 1, 1), np.uint8), [0, 1])
    datasets: list[Any] = [folder, arrays, Subset(arrays, [0, 1])]
    for dataset in datasets:
        assert [record.label for record in dataset] == [0, 1]


IMAGES = np.zeros((2, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("error", "images", "labels", "classes", "message"),
    [
        (TypeError, IMAGES.astype(np.float32), [0, 1], None, "images must be an array of uint8, got an array of float"),
        (TypeError, [[0]], [0], None, "images must be an array of uint8, got list"),
        (ValueError, IMAGES[0], [0, 1], None, r"images must have the shape .*, got \(4, 4\)"),
        (ValueError, np.zeros((2, 4, 4, 2), np.uint8), [0, 1], None, r"images must have .*, got \(2, 4, 4, 2\)"),
        (ValueError, IMAGES, [0], None, r"labels must have the shape \(2,\), .* got \(1,\)"),
        (TypeError, IMAGES, [0.0, 1.0], None, "labels must be integers, got an array of float64"),
        (ValueError, IMAGES, [0, 2], ["a", "b"], "labels must be between 0 and 1, got 0 to 2"),
        (ValueError, IMAGES, [-1, 1], ["a", "b"], "labels must be between 0 and 1, got -1 to 1"),
    ],
)
def test_wrong_arrays_are_told(
    error: type[Exception], images: object, labels: list[int], classes: list[str] | None, message: str
) -> None:
    with pytest.raises(error, match=message):
        ArrayDataset(images, labels, classes)  # type: ignore[arg-type]


def of_labels(labels: list[int]) -> ArrayDataset:
    return ArrayDataset(np.zeros((len(labels), 1, 1), np.uint8), labels, [str(k) for k in range(10)])


labels = st.lists(st.integers(0, 9), min_size=1, max_size=200)
fractions = st.floats(0.01, 0.99)


@given(labels, fractions, st.integers(0, 2**64 - 1))
def test_a_split_has_every_record_in_exactly_one_part(labels: list[int], fraction: float, seed: int) -> None:
    first, second = of_labels(labels).split(fraction, seed)
    assert sorted([*first.indices.tolist(), *second.indices.tolist()]) == list(range(len(labels)))
    again, _ = of_labels(labels).split(fraction, seed)
    assert np.array_equal(again.indices, first.indices)


@given(labels, fractions)
def test_a_split_has_the_same_share_of_each_class_and_some_of_it_in_both_parts(
    labels: list[int], fraction: float
) -> None:
    first, second = of_labels(labels).split(fraction)
    for label in set(labels):
        chosen, rest = (first.labels == label).sum(), (second.labels == label).sum()
        assert abs(chosen - fraction * (chosen + rest)) <= 1
        assert chosen >= 1
        assert rest >= 1 or chosen == 1


def test_splits_of_two_seeds_differ() -> None:
    dataset = of_labels([0] * 50)
    assert not np.array_equal(dataset.split(0.5, seed=0)[0].indices, dataset.split(0.5, seed=1)[0].indices)


def test_a_part_can_be_split_again_and_keeps_all_classes() -> None:
    dataset = of_labels([0, 0, 0, 0, 1, 1, 1, 1])
    train, _ = dataset.split(0.5)
    smaller, _ = train.split(0.5)
    assert len(smaller) == 2
    assert smaller.classes == dataset.classes
    assert [smaller[i].label for i in range(2)] == smaller.labels.tolist() == [0, 1]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_told(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction must be between 0 and 1, both excluded, got"):
        of_labels([0, 1]).split(fraction)


@pytest.mark.parametrize("indices", [[0, 2], [-1]])
def test_indices_out_of_range_are_told(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="indices must be between 0 and 1, got"):
        Subset(of_labels([0, 1]), indices)


class Failing:
    """A read that raises each error in turn, and then returns."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return b"content"


STALE, BROKEN = OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")


def test_a_read_that_fails_in_passing_is_tried_three_times() -> None:
    read = Failing(STALE, BROKEN)
    assert read_patiently(read, "a.png") == b"content"
    assert read.calls == 3
    with pytest.raises(ReadError, match=r"a\.png: cannot be read: Input/output error") as caught:
        read_patiently(Failing(STALE, STALE, BROKEN), "a.png")
    assert caught.value.__cause__ is BROKEN


@pytest.mark.parametrize(
    "kind", [FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError]
)
def test_a_read_that_cannot_succeed_is_tried_once(kind: type[Exception]) -> None:
    read = Failing(kind("no"))
    with pytest.raises(ReadError, match=r"a\.png: cannot be read: no"):
        read_patiently(read, "a.png")
    assert read.calls == 1
