from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from asynctrain.data import ArrayDataset, ImageSettings, Sampler, decode
from asynctrain.data.streams import DatasetStream, InterleaveStreams, Item, RecordStream, from_async_iterable
from asynctrain.errors import ClosedError, DataError, ReadError
from asynctrain.types import Record

CLASSES = ("rose", "tulip")


async def counted(start: int, stop: int, name: str = "") -> AsyncIterator[Item]:
    for number in range(start, stop):
        yield f"{name}{number}".encode(), number % 2


def replayed(count: int, name: str = "", length: int | None = None) -> RecordStream:
    return from_async_iterable(lambda position: counted(position, count, name), CLASSES, name=name, length=length)


async def taken(stream: RecordStream, epoch: int = 0, position: int = 0) -> list[str]:
    async with stream.open(epoch, position) as records:
        return [bytes(record.source.read()).decode() async for record in records]


async def test_bytes_arrays_and_pillow_images_are_taken_with_labels_by_number_or_name() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    image = Image.fromarray(pixels)
    file = BytesIO()
    image.save(file, "PNG")

    async def items() -> AsyncIterator[Item]:
        yield file.getvalue(), 1
        yield pixels, "rose"
        yield image, np.int64(1)  # type: ignore[misc]

    async with from_async_iterable(items(), CLASSES, name="camera").open(0, 0) as records:
        found = [record async for record in records]
    assert [record.label for record in found] == [1, 0, 1]
    assert [str(record.source) for record in found] == ["camera[0]", "camera[1]", "camera[2]"]
    for record in found:
        assert np.array_equal(decode(record.source.read(), ImageSettings((2, 2))), pixels)


async def test_what_can_be_read_once_refuses_all_but_the_first_pass() -> None:
    stream = from_async_iterable(counted(0, 3), CLASSES)
    assert not stream.replayable
    assert stream.length is None
    for epoch, position in [(1, 0), (0, 1)]:
        with pytest.raises(ValueError, match=r"stream can be read only once, .* give from_async_iterable a function"):
            stream.open(epoch, position)
    assert await taken(stream) == ["0", "1", "2"]
    with pytest.raises(ValueError, match="stream can be read only once"):
        stream.open(0, 0)


async def test_a_function_of_the_position_is_opened_anywhere_and_in_every_epoch() -> None:
    stream = replayed(4)
    assert stream.replayable
    assert await taken(stream) == await taken(stream, epoch=5) == ["0", "1", "2", "3"]
    assert await taken(stream, epoch=1, position=3) == ["3"]
    async with stream.open(0, 2) as records:
        assert str((await anext(records)).source) == "[2]"


async def test_items_are_asked_for_only_when_they_are_wanted() -> None:
    asked = 0

    async def items() -> AsyncIterator[Item]:
        nonlocal asked
        while True:
            asked += 1
            yield b"", 0

    async with from_async_iterable(items(), CLASSES).open(0, 0) as records:
        for number in range(1, 4):
            await anext(records)
            await asyncio.sleep(0)
            assert asked == number


async def test_leaving_early_closes_the_iterable() -> None:
    closed = []

    async def items() -> AsyncIterator[Item]:
        try:
            while True:
                yield b"", 0
        finally:
            closed.append(True)

    async with from_async_iterable(items(), CLASSES).open(0, 0) as records:
        await anext(records)
    assert closed == [True]
    with pytest.raises(ClosedError, match="the records of stream were used after their block had ended"):
        await anext(records)


async def failing(error: Exception) -> AsyncIterator[Item]:
    yield b"", 0
    raise error


async def silent() -> AsyncIterator[Item]:
    yield b"", 0
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("items", "kind", "message"),
    [
        (lambda: failing(OSError("unplugged")), ReadError, r"camera\[1\]: failed: OSError: unplugged"),
        (lambda: failing(TimeoutError("its own")), ReadError, r"camera\[1\]: failed: TimeoutError: its own"),
        (lambda: failing(DataError("a.jpg", "is odd")), DataError, "^a.jpg: is odd"),
        (lambda: silent(), ReadError, r"camera\[1\]: gave nothing for 0\.05 s"),
    ],
)
async def test_what_ends_a_stream_is_told_to_whoever_asks_again(
    items: Callable[[], AsyncIterator[Item]], kind: type[DataError], message: str
) -> None:
    async with from_async_iterable(items(), CLASSES, name="camera", timeout=0.05).open(0, 0) as records:
        await anext(records)
        for _ in range(2):
            with pytest.raises(kind, match=message):
                await anext(records)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (b"", r"stream\[0\]: is no pair of an image and a label: bytes"),
        (("a.jpg", 0), r"stream\[0\]: its image must be bytes, an array or a Pillow image, got str"),
        ((b"", 2), r"stream\[0\]: its label must be one of rose, tulip or 0 to 1, got 2"),
        ((b"", -1), r"its label must be .*, got -1"),
        ((b"", "aster"), r"its label must be .*, got 'aster'"),
        ((b"", True), r"its label must be .*, got True"),
        ((b"", None), r"its label must be .*, got None"),
    ],
)
async def test_an_item_that_is_no_sample_is_told(item: Any, reason: str) -> None:
    async def items() -> AsyncIterator[Any]:
        yield item

    with pytest.raises(DataError, match=reason):
        await taken(from_async_iterable(items(), CLASSES))


@pytest.mark.parametrize(("length", "reason"), [(2, "gave more than 2 items"), (4, "ended after 3 of 4 items")])
async def test_a_length_that_does_not_hold_is_told(length: int, reason: str) -> None:
    with pytest.raises(ReadError, match=f"stream: {reason}"):
        await taken(from_async_iterable(counted(0, 3), CLASSES, length=length))


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(TypeError, match="items must be an async iterable, or a function that returns one, got list"):
        from_async_iterable([], CLASSES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout must be more than 0 seconds, got 0"):
        from_async_iterable(counted, CLASSES, timeout=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length must be 0 or more, got -1"):
        replayed(1, length=-1)
    with pytest.raises(ValueError, match="classes must differ"):
        from_async_iterable(counted, ["a", "a"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="position 0 to 5, got epoch 0, position 6"):
        replayed(5, length=5).open(0, 6)
    with pytest.raises(ValueError, match="position 0 or more, got epoch 0, position -1"):
        replayed(5).open(0, -1)
    with pytest.raises(ValueError, match="InterleaveStreams must have at least one source, got none"):
        InterleaveStreams([])
    with pytest.raises(ValueError, match="ahead must be 1 or more, got 0"):
        InterleaveStreams([replayed(1)], ahead=0)
    with pytest.raises(ValueError, match="weights must be 1 positive finite numbers"):
        InterleaveStreams([replayed(1)], [1, 2])


async def test_a_dataset_is_a_stream_in_its_samplers_order() -> None:
    dataset = ArrayDataset(np.arange(9, dtype=np.uint8).reshape(9, 1, 1), [0] * 9)
    sampler = Sampler(9, seed=3)
    stream = DatasetStream(dataset, sampler)
    assert (stream.length, stream.replayable, stream.classes) == (9, True, ("0",))
    async with stream.open(2, 4) as records:
        found = [int(np.asarray(record.source.read()).item()) async for record in records]
    assert found == sampler.order(2)[4:].tolist()


async def test_a_mix_takes_turns_by_weight_and_the_others_go_on_when_one_is_used_up() -> None:
    mix = InterleaveStreams({"a": replayed(6, "a"), "b": replayed(2, "b")}, [2, 1])
    assert await taken(mix) == ["a0", "b0", "a1", "a2", "b1", "a3", "a4", "a5"]
    assert (mix.length, mix.replayable) == (None, False)


async def test_a_mix_goes_on_exactly_at_any_position() -> None:
    streams = [replayed(5, "a", length=5), replayed(2, "b", length=2), replayed(0, "c", length=0)]
    mix = InterleaveStreams(streams, [1, 2, 1], ahead=1)
    assert (mix.length, mix.replayable) == (7, True)
    whole = await taken(mix)
    assert sorted(whole) == ["a0", "a1", "a2", "a3", "a4", "b0", "b1"]
    for position in range(8):
        assert await taken(mix, 1, position) == whole[position:]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=4), st.data())
def test_any_mix_before_and_after_a_stop_is_the_whole_one(sources: list[tuple[int, int]], data: st.DataObject) -> None:
    mix = InterleaveStreams(
        [replayed(size, f"{k}-", length=size) for k, (size, _) in enumerate(sources)], [weight for _, weight in sources]
    )
    assert mix.length is not None
    position = data.draw(st.integers(0, mix.length))
    whole = asyncio.run(taken(mix))
    assert len(set(whole)) == mix.length
    assert asyncio.run(taken(mix, 0, position)) == whole[position:]


async def test_a_mix_merges_classes_by_name_and_says_whose_each_record_is() -> None:
    async def other() -> AsyncIterator[Item]:
        yield b"", "rose"
        yield b"", "aster"

    mix = InterleaveStreams({"a": replayed(2, "x"), "b": from_async_iterable(other(), ["rose", "aster"])})
    assert mix.classes == ("aster", "rose", "tulip")
    async with mix.open(0, 0) as records:
        found = [(str(record.source), mix.classes[record.label]) async for record in records]
    assert found == [("a: x[0]", "rose"), ("b: stream[0]", "rose"), ("a: x[1]", "tulip"), ("b: stream[1]", "aster")]


async def test_a_mix_refuses_what_a_source_of_it_cannot() -> None:
    once = InterleaveStreams({"a": replayed(2, length=2), "camera": from_async_iterable(counted(0, 2), CLASSES)})
    for epoch, position in [(1, 0), (0, 1)]:
        with pytest.raises(
            ValueError, match="camera can be read only once, so the mix must begin at epoch 0, position 0"
        ):
            once.open(epoch, position)
    unknown = InterleaveStreams({"a": replayed(2), "b": replayed(2, length=2)})
    with pytest.raises(ValueError, match="a has no known length, so the mix must begin at position 0, got 1"):
        unknown.open(0, 1)
    assert await taken(unknown, epoch=1) == ["0", "0", "1", "1"]


async def test_a_source_that_fails_is_named_after_the_records_before_it() -> None:
    mix = InterleaveStreams(
        {"folder": replayed(9, "f"), "camera": from_async_iterable(failing(OSError("unplugged")), CLASSES)}
    )
    async with mix.open(0, 0) as records:
        found = [str((await anext(records)).source) for _ in range(3)]
        assert found == ["folder: f[0]", "camera: stream[0]", "folder: f[1]"]
        for _ in range(2):
            with pytest.raises(ReadError, match=r"^camera: stream\[1\]: failed: OSError: unplugged") as caught:
                await anext(records)
    assert isinstance(caught.value.__cause__, ReadError)
    assert isinstance(caught.value.__cause__.__cause__, OSError)


async def test_a_mix_reads_each_source_ahead_while_it_waits_for_another_and_no_further_than_its_bound() -> None:
    gate, asked = asyncio.Event(), 0

    async def slow() -> AsyncIterator[Item]:
        await gate.wait()
        yield b"slow", 0

    async def quick() -> AsyncIterator[Item]:
        nonlocal asked
        while True:
            asked += 1
            yield b"quick", 0

    streams = {"slow": from_async_iterable(slow(), CLASSES), "quick": from_async_iterable(quick(), CLASSES)}
    async with InterleaveStreams(streams, ahead=3).open(0, 0) as records:
        waiting = asyncio.ensure_future(anext(records))
        for _ in range(50):
            await asyncio.sleep(0)
        assert asked == 4  # three wait for their turn, one for room
        gate.set()
        assert (await waiting).source.read() == b"slow"


async def test_a_mix_can_be_left_while_its_sources_wait() -> None:
    async with InterleaveStreams({"a": from_async_iterable(silent(), CLASSES), "b": replayed(5)}).open(0, 0) as records:
        first: Record = await anext(records)
        assert str(first.source) == "a: stream[0]"
    with pytest.raises(ClosedError, match="the records of a mix were used after their block had ended"):
        await anext(records)


async def test_a_source_that_cannot_be_opened_is_named() -> None:
    def broken(position: int) -> AsyncIterator[Item]:
        raise OSError("no camera")

    mix = InterleaveStreams({"a": replayed(3), "b": from_async_iterable(broken, CLASSES, name="camera")})
    async with mix.open(0, 0) as records:
        await anext(records)
        with pytest.raises(ReadError, match="b: camera: cannot be opened: OSError: no camera"):
            await anext(records)
