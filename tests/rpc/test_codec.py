"""Arrays on the wire: nothing is lost, nothing is trusted."""

from __future__ import annotations

from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynctrain.arena import ALIGNMENT, Arena
from asynctrain.rpc import worker_pb2 as pb
from asynctrain.rpc.codec import FRAME, RANK, Arrival, Cargo, Frame, checksum, frame_in, layouts_of, nbytes
from asynctrain.rpc.link import parsed

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


def frames_of(cargo: Cargo) -> list[Frame]:
    """Return the frames of a cargo as whoever receives their messages finds them."""
    frames = []
    for message in cargo.frames(7):
        assert len(message) < 2**22
        frame = frame_in(message)
        assert frame is not None
        frames.append(frame)
    return frames


def travelled(cargo: Cargo) -> list[Arena]:
    """Return what arrives, by way of the bytes of the messages."""
    announced = pb.Parameters.FromString(pb.Parameters(groups=cargo.groups()).SerializeToString())
    arrival = Arrival(layouts_of(announced.groups))
    for frame in frames_of(cargo):
        arrival.take(frame)
    assert arrival.is_complete
    return arrival.arenas()


@given(st.lists(st.tuples(SHAPES, DTYPES), max_size=3))
@settings(max_examples=100)
def test_what_is_sent_arrives_with_the_same_names_shapes_dtypes_and_bits_aligned(
    parts: list[tuple[dict[str, tuple[int, ...]], str]],
) -> None:
    sent = [arena(shapes, dtype) for shapes, dtype in parts]
    for before, after in zip(sent, travelled(Cargo.of(*sent)), strict=True):
        assert after.layout == before.layout
        assert list(after) == list(before)
        assert after.vector.tobytes() == before.vector.tobytes()
        for array in after.values():
            assert array.flags.c_contiguous
            assert array.ctypes.data % ALIGNMENT == 0 or not array.size


def test_large_arrays_are_cut_into_frames_of_two_mebibytes_and_small_ones_share_one() -> None:
    large = arena({"large": (3 * FRAME // 4 + 5,)}, "float32")
    assert [len(frame.data) for frame in frames_of(Cargo.of(large))] == [FRAME] * 3 + [64]
    small = arena({f"small{i}": (3,) for i in range(100)}, "float32")
    assert [frame.number for frame in frames_of(Cargo.of(small, small))] == [0]
    (after,) = travelled(Cargo.of(large))
    assert after.vector.tobytes() == large.vector.tobytes()


def summed(data: bytes) -> int:
    """Return the checksum that the contract asks for, word by word."""
    sums = [0] * 1024
    for i in range(len(data) // 8):
        sums[i % 1024] = (sums[i % 1024] + int.from_bytes(data[8 * i : 8 * i + 8], "little")) % 2**64
    return crc32(b"".join(value.to_bytes(8, "little") for value in sums))


@pytest.mark.parametrize("size", [64, 8192, 8256, 3 * 8192 + 64])
def test_a_checksum_is_that_of_the_contract_and_notices_words_that_change_or_change_places(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    assert checksum(data) == summed(data.tobytes())
    for other in (np.roll(data, 8), data ^ np.uint8(1), np.where(np.arange(size) == size - 1, 255 - data, data)):
        assert checksum(np.ascontiguousarray(other, np.uint8)) != checksum(data)


def test_arrays_that_are_sent_without_a_copy_arrive_each_as_an_arena_of_its_own() -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 3, 3, 1), dtype=np.uint8), np.arange(10)[::2]
    one, other = travelled(Cargo.of_arrays({"images": images, "labels": labels}))
    np.testing.assert_array_equal(one["images"], images)
    np.testing.assert_array_equal(other["labels"], labels)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.binary(min_size=1))
def test_frames_are_messages_as_protobuf_writes_them_of_either_side(
    transfer: int, number: int, checksum: int, data: bytes
) -> None:
    """Ours are read by protobuf, and those that protobuf writes in another order are left to it."""
    (message,) = Cargo.of_arrays({"a": np.frombuffer(data, np.uint8)}).frames(transfer)
    for whole in (pb.FromWorker.FromString(message), pb.FromCoordinator.FromString(message)):
        assert (whole.frame.transfer, whole.frame.number) == (transfer, 0)
        assert whole.frame.data[: len(data)] == data
        assert whole.frame.checksum == summed(whole.frame.data)
    said = pb.Frame(transfer=transfer, number=number, data=data, checksum=checksum)
    message = pb.FromWorker(frame=said).SerializeToString()
    assert parsed(message, pb.FromWorker) == ("frame", Frame(transfer, number, memoryview(data), checksum))


@given(st.data())
def test_a_message_that_is_damaged_is_read_as_protobuf_reads_it(data: st.DataObject) -> None:
    (message,) = Cargo.of_arrays({"a": np.arange(70, dtype=np.uint8)}).frames(300)
    damaged = bytearray(message)
    damaged[data.draw(st.integers(0, 20))] ^= 1 << data.draw(st.integers(0, 7))
    found = frame_in(bytes(damaged))
    if found is not None:
        frame = pb.FromWorker.FromString(bytes(damaged)).frame
        assert found == Frame(frame.transfer, frame.number, memoryview(frame.data), frame.checksum)


def test_a_damaged_a_missing_a_short_and_a_further_frame_are_errors() -> None:
    cargo = Cargo.of(arena({"a": (FRAME // 4 + 16,)}, "float32"))
    first, second = frames_of(cargo)
    flipped = memoryview(bytes([first.data[0] ^ 1]) + first.data[1:])
    for wrong in (replace(first, data=flipped), second, replace(first, data=first.data[:-1]), replace(first, number=1)):
        with pytest.raises(ValueError, match="frame"):
            Arrival(layouts_of(cargo.groups())).take(wrong)
    arrival = Arrival(layouts_of(cargo.groups()))
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
        Cargo.of_arrays({"a": np.zeros(3, np.complex128)}).groups()
