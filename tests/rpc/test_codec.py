"""Arrays on the wire: nothing is lost, nothing is trusted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynctrain.arena import ALIGNMENT, Arena
from asynctrain.rpc import worker_pb2 as pb
from asynctrain.rpc.codec import FRAME, RANK, Arrival, frames, groups_of, layouts_of, nbytes

SHAPES = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
    st.lists(st.integers(0, 7), max_size=4).map(tuple),
    max_size=6,
)
DTYPES = st.sampled_from(["float32", "float64", "int64", "uint8"])


def arena(shapes: dict[str, tuple[int, ...]], dtype: str, seed: int = 0) -> Arena:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.integers(0, 256, shape).astype(dtype) for name, shape in shapes.items()}
    return Arena.of(arrays, dtype)


def travelled(arenas: list[Arena]) -> list[Arena]:
    """Return what arrives, by way of the bytes of the messages."""
    announced = pb.Parameters.FromString(pb.Parameters(groups=groups_of(arenas)).SerializeToString())
    arrival = Arrival(layouts_of(announced.groups))
    for frame in frames(7, arenas):
        assert len(frame.SerializeToString()) < 2**22
        arrival.take(pb.Frame.FromString(frame.SerializeToString()))
    assert arrival.is_complete
    return arrival.arenas()


@given(st.lists(st.tuples(SHAPES, DTYPES), max_size=3))
@settings(max_examples=100)
def test_what_is_sent_arrives_with_the_same_names_shapes_dtypes_and_bits_aligned(
    parts: list[tuple[dict[str, tuple[int, ...]], str]],
) -> None:
    sent = [arena(shapes, dtype) for shapes, dtype in parts]
    for before, after in zip(sent, travelled(sent), strict=True):
        assert after.layout == before.layout
        assert list(after) == list(before)
        assert after.vector.tobytes() == before.vector.tobytes()
        for array in after.values():
            assert array.flags.c_contiguous
            assert array.ctypes.data % ALIGNMENT == 0 or not array.size


def test_large_arrays_are_cut_into_frames_of_two_mebibytes_and_small_ones_share_one() -> None:
    large = arena({"large": (3 * FRAME // 4 + 5,)}, "float32")
    assert [len(frame.data) for frame in frames(1, [large])] == [FRAME] * 3 + [64]
    small = arena({f"small{i}": (3,) for i in range(100)}, "float32")
    assert [frame.number for frame in frames(1, [small, small])] == [0]
    (after,) = travelled([large])
    assert after.vector.tobytes() == large.vector.tobytes()


def changed(frame: pb.Frame, **changes: object) -> pb.Frame:
    other = pb.Frame.FromString(frame.SerializeToString())
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def test_a_damaged_a_missing_a_short_and_a_further_frame_are_errors() -> None:
    sent = [arena({"a": (FRAME // 4 + 16,)}, "float32")]
    first, second = frames(1, sent)
    flipped = bytes([first.data[0] ^ 1]) + first.data[1:]
    for wrong in (changed(first, data=flipped), second, changed(first, data=first.data[:-1]), changed(first, number=1)):
        with pytest.raises(ValueError, match="frame"):
            Arrival(layouts_of(groups_of(sent))).take(wrong)
    arrival = Arrival(layouts_of(groups_of(sent)))
    arrival.take(first)
    arrival.take(second)
    with pytest.raises(ValueError, match="frame 2 of 0 bytes"):
        arrival.take(second)


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        (pb.Group(dtype="|O"), "dtypes"),
        (pb.Group(dtype=">f4"), "dtypes"),
        (pb.Group(dtype=""), "dtypes"),
        (pb.Group(dtype="<f4", tensors=[pb.Tensor(name="a"), pb.Tensor(name="a")]), "twice"),
        (pb.Group(dtype="<f4", tensors=[pb.Tensor(name="a", shape=[1] * (RANK + 1))]), "axes"),
        (pb.Group(dtype="<f4", tensors=[pb.Tensor(name="a", shape=[2**31])]), "axes"),
        (pb.Group(dtype="<f4", tensors=[pb.Tensor(name=str(i)) for i in range(2**16 + 1)]), "at most"),
    ],
)
def test_what_cannot_be_an_array_is_refused(group: pb.Group, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        layouts_of([group])


def test_the_size_of_what_is_announced_is_known_before_anything_is_allocated() -> None:
    huge = pb.Group(dtype="<f8", tensors=[pb.Tensor(name="a", shape=[2**30, 2**30, 2**30, 2**30])])
    assert nbytes(layouts_of([huge])) == 2**123


def test_arrays_of_other_dtypes_do_not_travel() -> None:
    with pytest.raises(ValueError, match="dtypes"):
        groups_of([Arena.of({"a": np.zeros(3, np.complex128)})])
