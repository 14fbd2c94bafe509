from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynctrain.data.catalog import Labels, Names


@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=8)))
def test_names_come_back_as_they_were_whatever_their_characters(names: list[str]) -> None:
    kept = Names(names)
    assert len(kept) == len(names)
    assert [kept[i] for i in range(len(names))] == names
    assert [kept[i - len(names)] for i in range(len(names))] == names


def test_names_end_with_index_error() -> None:
    with pytest.raises(IndexError):
        Names(["a"])[1]


@pytest.mark.parametrize(
    ("given_labels", "classes", "numbers"),
    [
        (["tulip", "rose", "tulip"], ("rose", "tulip"), [1, 0, 1]),
        ([10, 9, 10], ("9", "10"), [1, 0, 1]),
        (["10", 9, "-1"], ("-1", "9", "10"), [2, 1, 0]),
        (["010", "9"], ("010", "9"), [0, 1]),  # with a leading zero it is a name
        ([np.int64(3), " 3 "], ("3",), [0, 0]),
    ],
)
def test_labels_become_numbers_of_sorted_classes(
    given_labels: list[object], classes: tuple[str, ...], numbers: list[int]
) -> None:
    labels = Labels()
    for label in given_labels:
        labels.append(label)
    found, encoded = labels.encoded()
    assert found == classes
    assert encoded.tolist() == numbers
    assert encoded.dtype == np.int64


def test_given_classes_keep_their_order_and_need_not_all_occur() -> None:
    labels = Labels(["tulip", "aster", "rose"])
    labels.append("rose")
    assert labels.encoded()[0] == ("tulip", "aster", "rose")
    assert labels.encoded()[1].tolist() == [2]
    with pytest.raises(ValueError, match="the label must be one of tulip, aster, rose, got daisy"):
        labels.append("daisy")


@pytest.mark.parametrize("label", [None, "", "  ", True, 1.0, ["rose"]])
def test_what_is_no_label_is_told(label: object) -> None:
    with pytest.raises(ValueError, match="the label must be a name or an integer, got"):
        Labels().append(label)


def test_classes_that_come_twice_are_told() -> None:
    with pytest.raises(ValueError, match="classes must differ from one another, got a, b, a"):
        Labels(["a", "b", "a"])
