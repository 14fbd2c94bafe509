from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from asynctrain.data import ArrayDataset, Dataset, ImageFolder, Subset
from asynctrain.data.fetching import is_async
from asynctrain.data.mixing import Concat, Interleave
from asynctrain.errors import ReadError
from asynctrain.types import Record


def arrays(labels: list[int], classes: list[str], first: int = 0) -> ArrayDataset:
    """Return 1 x 1 images whose pixel counts from ``first``."""
    images = np.arange(first, first + len(labels), dtype=np.uint8).reshape(-1, 1, 1)
    return ArrayDataset(images, labels, classes)


def seen(dataset: Dataset) -> list[tuple[int, str]]:
    records = [dataset[i] for i in range(len(dataset))]
    return [(int(np.asarray(r.source.read()).item()), dataset.classes[r.label]) for r in records]


def test_a_concatenation_has_the_records_of_all_and_says_whose_each_is() -> None:
    both = Concat(
        {"garden": arrays([1, 0], ["a", "b"]), "none": arrays([], ["a", "b"]), "field": arrays([1], ["a", "b"], 9)}
    )
    assert seen(both) == [(0, "b"), (1, "a"), (9, "b")]
    assert both.labels.tolist() == [1, 0, 1]
    assert [str(both[i].source) for i in range(-3, 0)] == ["garden: array[0]", "garden: array[1]", "field: array[0]"]
    with pytest.raises(IndexError):
        both[3]


def test_equal_classes_keep_their_order_and_others_are_merged_by_name() -> None:
    assert Concat([arrays([0], ["b", "a"]), arrays([1], ["b", "a"])]).classes == ("b", "a")
    merged = Concat([arrays([0, 1], ["tulip", "rose"]), arrays([0, 1], ["aster", "tulip"], 5)])
    assert merged.classes == ("aster", "rose", "tulip")
    assert seen(merged) == [(0, "tulip"), (1, "rose"), (5, "aster"), (6, "tulip")]
    assert merged.labels.tolist() == [merged[i].label for i in range(4)] == [2, 1, 0, 2]
    assert Concat([arrays([0], ["10"]), arrays([0], ["9"])]).classes == ("9", "10")


def test_a_file_keeps_its_identity_and_an_error_names_the_part(image_folder: Path) -> None:
    folder = ImageFolder(image_folder)
    source = Concat({"flowers": folder})[0].source
    identity = folder[0].source.identity()  # type: ignore[attr-defined]
    assert source.identity() == identity is not None  # type: ignore[attr-defined]
    (image_folder / "rose" / "00.png").unlink()
    with pytest.raises(ReadError, match=r"^flowers: .*rose/00\.png: cannot be read: No such file") as caught:
        source.read()
    assert isinstance(caught.value.__cause__, ReadError)


class Fetched:
    """A source that is fetched, and fails."""

    connection: AbstractAsyncContextManager[object] = nullcontext()

    def read(self) -> bytes:
        raise AssertionError

    async def fetch(self) -> bytes:
        raise ReadError("far/away.png", "is lost")


class Far(Subset):
    """A dataset whose sources are fetched."""

    in_flight = 8

    def __getitem__(self, index: int, /) -> Record:
        return Record(Fetched(), super().__getitem__(index).label)


async def test_a_source_that_is_fetched_is_still_fetched_and_its_error_names_the_part() -> None:
    near = arrays([0], ["a"])
    both = Concat({"near": near, "far": Far(near, [0])})
    assert not is_async(both[0].source)
    source = both[1].source
    assert is_async(source)
    assert source.connection is Fetched.connection
    with pytest.raises(ReadError, match=r"^far: far/away\.png: is lost"):
        await source.fetch()


def test_a_mix_asks_for_as_many_records_as_keep_each_part_busy() -> None:
    near, far = arrays([0] * 30, ["a"]), Far(arrays([0] * 10, ["a"]), range(10))
    assert Interleave([near, far], weights=[3, 1]).in_flight == 32
    assert Concat([near, far]).in_flight == 32
    assert Interleave([near, far], weights=[10_000, 1]).in_flight == 1024
    assert Subset(far, [0]).in_flight == 8
    for dataset in (Concat([near]), Subset(near, [0])):
        assert not hasattr(dataset, "in_flight")


def test_a_mix_takes_turns_by_weight_and_each_part_keeps_an_order_of_its_own() -> None:
    mix = Interleave([arrays([0] * 6, ["a"]), arrays([0] * 2, ["a"], 100)], weights=[2, 1])
    plain = mix.sampler(seed=0, shuffle=False).order(0)
    assert [pixel for pixel, _ in seen(Subset(mix, plain))] == [0, 100, 1, 2, 101, 3, 4, 5]
    shuffled = [seen(Subset(mix, mix.sampler(seed=0).order(epoch))) for epoch in range(3)]
    assert all(
        [pixel >= 100 for pixel, _ in epoch] == [False, True, False, False, True, False, False, False]
        for epoch in shuffled
    )
    assert len({tuple(epoch) for epoch in shuffled}) == 3
    assert all(sorted(epoch) == sorted(seen(mix)) for epoch in shuffled)


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="Concat must have at least one source, got none"):
        Concat([])
    with pytest.raises(ValueError, match="classes must differ from one another, got a, a"):
        Concat([arrays([0], ["b"]), arrays([0], ["a", "a"])])
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]):
        with pytest.raises(ValueError, match="weights must be 2 positive finite numbers, one for each source, got"):
            Interleave([arrays([0], ["a"]), arrays([0], ["a"])], weights)
