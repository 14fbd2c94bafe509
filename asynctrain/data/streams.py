"""Streams: records that come one after the other, from whatever can be iterated asynchronously.

A dataset is read at random, a stream as it comes. It is opened at an epoch and a position; one that can be read only
once refuses all but the first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import numpy as np
from PIL import Image

from asynctrain._aio import Failure, ServingGroup, in_thread
from asynctrain.arena import Array
from asynctrain.data.catalog import distinct
from asynctrain.data.datasets import ArraySource, Dataset
from asynctrain.data.mixing import checked_weights, merged_classes, named, named_parts, part_of
from asynctrain.data.sampler import Order, Turns, turns
from asynctrain.errors import AsyncTrainError, ClosedError, DataError, ReadError
from asynctrain.types import Record, Source

Picture = bytes | Array | Image.Image
Item = tuple[Picture, int | str]
Items = AsyncIterable[Item] | Callable[[int], AsyncIterable[Item]]


class RecordStream(Protocol):
    """What a loader needs of a stream."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the labels 0, 1, ..."""
        ...

    @property
    def replayable(self) -> bool:
        """Whether it can be opened at any epoch and position, and gives the same records each time."""
        ...

    @property
    def length(self) -> int | None:
        """How many records an epoch has; None where that shows only at its end."""
        ...

    def open(self, epoch: int, position: int) -> AbstractAsyncContextManager[AsyncIterator[Record]]:
        """Open the records of ``epoch`` from ``position`` on.

        Raises:
            ValueError: it cannot be opened there; the message says what would make it possible.
            DataError: while iterating: the stream itself failed, so that nothing can follow.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class HeldSource:
    """An image that is in memory already: the bytes of a file, or what Pillow has opened."""

    content: bytes | Image.Image
    name: str

    def read(self) -> Any:
        """Return the content, which ``asynctrain.data.decode`` takes either way."""
        return self.content

    def __str__(self) -> str:
        return self.name


def from_async_iterable(
    items: Items, classes: Sequence[str], *, name: str = "stream", length: int | None = None, timeout: float = 60.0
) -> RecordStream:
    """Return the pairs (image, label) of an async iterable as a stream.

    An image is the bytes of a file, an array (H, W) or (H, W, C) of uint8, or a Pillow image; a label is the number or
    the name of a class. An item is asked for when there is room for it, so whoever makes them is held back by whoever
    uses them.

    Args:
        items: an async iterable, which is read once: it refuses a second epoch, and to go on in the middle. Or a
            function that takes a position and returns an async iterable of the items from there on, such as an async
            generator function ``async def photos(position)``; it must give the same items each time.
        classes: the names of the labels 0, 1, ...
        name: stands in errors; the items are ``stream[0]``, ``stream[1]``, ...
        length: how many items an epoch has, if that is known; another number is then an error.
        timeout: seconds, positive; how long to wait for an item.

    Raises:
        TypeError: ``items`` is neither.
        ValueError: ``classes`` has a name twice, or a number is out of range.
        ReadError: while iterating: the iterable raised (its error is the cause), gave nothing in time, or ended before
            or after ``length`` items.
        DataError: while iterating: an item is not a pair of an image and a label.
    """
    if not isinstance(items, AsyncIterable) and not callable(items):
        raise TypeError(f"items must be an async iterable, or a function that returns one, got {type(items).__name__}")
    if length is not None and length < 0:
        raise ValueError(f"length must be 0 or more, got {length}")
    if not timeout > 0:
        raise ValueError(f"timeout must be more than 0 seconds, got {timeout}")
    return _IterableStream(items, distinct(classes), name, length, timeout)


@dataclass(eq=False)
class _IterableStream:
    items: Items
    classes: tuple[str, ...]
    name: str
    length: int | None
    timeout: float
    _used: bool = False

    @property
    def replayable(self) -> bool:
        return not isinstance(self.items, AsyncIterable)

    def open(self, epoch: int, position: int) -> AbstractAsyncContextManager[AsyncIterator[Record]]:
        _check_place(epoch, position, self.length)
        if not self.replayable and (epoch > 0 or position > 0 or self._used):
            raise ValueError(
                f"{self.name} can be read only once, from its beginning; for another epoch, or to go on in the middle "
                f"(epoch {epoch}, position {position}), give from_async_iterable a function that takes a position"
            )
        return self._opened(position)

    @asynccontextmanager
    async def _opened(self, position: int) -> AsyncIterator[AsyncIterator[Record]]:
        self._used = True
        try:
            iterator = aiter(self.items if isinstance(self.items, AsyncIterable) else self.items(position))
        except Exception as error:
            raise ReadError(self.name, f"cannot be opened: {type(error).__name__}: {error}") from error
        records = _Items(iterator, self, position)
        try:
            yield records
        finally:
            records.close()
            if isinstance(iterator, AsyncGenerator):
                async with asyncio.timeout(self.timeout):
                    await iterator.aclose()

    def record(self, item: object, number: int) -> Record:
        """Return what the iterable gave as a record."""
        name = f"{self.name}[{number}]"
        if not isinstance(item, tuple) or len(item) != 2:
            raise DataError(name, f"is no pair of an image and a label: {type(item).__name__}")
        return Record(_source(item[0], name), self._label(item[1], name))

    def _label(self, label: Any, name: str) -> int:
        if isinstance(label, str) and label in self.classes:
            return self.classes.index(label)
        if _is_integer(label) and int(label) in range(len(self.classes)):
            return int(label)
        raise DataError(
            name, f"its label must be one of {', '.join(self.classes)} or 0 to {len(self.classes) - 1}, got {label!r}"
        )

    def __repr__(self) -> str:
        return f"<stream {self.name}: {'read again' if self.replayable else 'read once'}, {len(self.classes)} classes>"


def _is_integer(label: object) -> bool:
    return isinstance(label, Integral) and not isinstance(label, bool)


def _source(image: object, name: str) -> Source:
    if isinstance(image, np.ndarray):
        return ArraySource(image, name)
    if isinstance(image, (bytes, Image.Image)):
        return HeldSource(image, name)
    raise DataError(name, f"its image must be bytes, an array or a Pillow image, got {type(image).__name__}")


def _check_place(epoch: int, position: int, length: int | None) -> None:
    if epoch < 0 or position < 0 or (length is not None and position > length):
        bound = "0 or more" if length is None else f"0 to {length}"
        raise ValueError(f"epoch must be 0 or more and position {bound}, got epoch {epoch}, position {position}")


class _Items(AsyncIterator[Record]):
    """The records of an opened iterable. What ends it is told to whoever asks again."""

    def __init__(self, items: AsyncIterator[Item], stream: _IterableStream, position: int) -> None:
        self._items = items
        self._stream = stream
        self._position = position
        self._end: Exception | None = None

    async def __anext__(self) -> Record:
        if self._end is None:
            try:
                return await self._next()
            except Exception as error:
                self._end = error
        raise self._end

    async def _next(self) -> Record:
        stream, number = self._stream, self._position
        try:
            async with asyncio.timeout(stream.timeout) as deadline:
                item = await anext(self._items)
        except StopAsyncIteration:
            if stream.length not in (None, number):
                raise ReadError(stream.name, f"ended after {number} of {stream.length} items") from None
            raise
        except AsyncTrainError:
            raise
        except Exception as error:
            late = isinstance(error, TimeoutError) and deadline.expired()
            reason = f"gave nothing for {stream.timeout:g} s" if late else f"failed: {type(error).__name__}: {error}"
            raise ReadError(f"{stream.name}[{number}]", reason) from error
        if number == stream.length:
            raise ReadError(stream.name, f"gave more than {number} items")
        self._position += 1
        return stream.record(item, number)

    def close(self) -> None:
        """Refuse what comes."""
        self._end = _closed(self._stream.name)


def _closed(name: str) -> ClosedError:
    return ClosedError(f"the records of {name} were used after their block had ended")


class DatasetStream:
    """A dataset as a stream, to be mixed with streams.

    Args:
        dataset: whose records.
        order: the order in each epoch, a ``Sampler`` for example.

    Attributes:
        length: how many records an epoch has.
        replayable: True.
    """

    replayable = True

    def __init__(self, dataset: Dataset, order: Order) -> None:
        self.dataset = dataset
        self.order = order
        self.classes = dataset.classes
        self.length = order.size

    def open(self, epoch: int, position: int) -> AbstractAsyncContextManager[AsyncIterator[Record]]:
        """Open the records of ``epoch`` from ``position`` on; raises ``ValueError`` where there is no such place."""
        _check_place(epoch, position, self.length)
        return self._opened(epoch, position)

    @asynccontextmanager
    async def _opened(self, epoch: int, position: int) -> AsyncIterator[AsyncIterator[Record]]:
        order = await in_thread(self.order.order, epoch)
        yield _records(self.dataset, order[position:])

    def __repr__(self) -> str:
        return f"<DatasetStream of {self.dataset!r}>"


async def _records(dataset: Dataset, indices: Array) -> AsyncIterator[Record]:
    for index in indices:
        yield dataset[int(index)]


class InterleaveStreams:
    """Several streams mixed evenly, as ``Interleave`` mixes datasets (``DatasetStream`` brings those in).

    Each stream is read ahead by a task of its own, so that a slow one does not hold up the others for longer than the
    mix demands. Which stream is next never depends on which is ready. If one fails, the records before come, then its
    error, with its name. When one is used up, the others go on.

    To begin in the middle of an epoch, each stream is opened where the mix has brought it, which can be told only if
    the lengths of all are known.

    Args:
        streams: one or more; in a mapping they have names, else they are ``source 0``, ``source 1``, ...
        weights: one for each stream, positive; how often it has its turn, relative to the others. By default all equal.
        ahead: how many records of each stream may wait for their turn, 1 or more.

    Attributes:
        classes: of all streams; see ``Concat``.
        replayable: whether all streams are, and have a known length.
        length: the sum of the lengths, None if one is not known.

    Raises:
        ValueError: there are no streams, one has two classes of the same name, ``weights`` or ``ahead`` is wrong.
    """

    def __init__(
        self,
        streams: Sequence[RecordStream] | Mapping[str, RecordStream],
        weights: Sequence[float] | None = None,
        *,
        ahead: int = 4,
    ) -> None:
        if ahead < 1:
            raise ValueError(f"ahead must be 1 or more, got {ahead}")
        self.streams = named_parts(streams, type(self).__name__)
        self.weights = checked_weights(weights, len(self.streams))
        self.ahead = ahead
        self.classes, self._relabel = merged_classes([stream.classes for stream in self.streams.values()])
        lengths = [stream.length for stream in self.streams.values()]
        known = [length for length in lengths if length is not None]
        self._lengths = known if len(known) == len(lengths) else None
        self.length = None if self._lengths is None else sum(self._lengths)
        self.replayable = self.length is not None and all(stream.replayable for stream in self.streams.values())

    def open(self, epoch: int, position: int) -> AbstractAsyncContextManager[AsyncIterator[Record]]:
        """Open the mix of ``epoch`` from ``position`` on.

        Raises:
            ValueError: a stream can be read only once, or has no known length, and this is not the beginning.
            DataError: while iterating: a stream failed; its name is in the path.
            ClosedError: while iterating: the block has ended.
        """
        _check_place(epoch, position, self.length)
        for name, stream in self.streams.items():
            if (epoch or position) and not stream.replayable:
                raise ValueError(f"{name} can be read only once, so the mix must begin at epoch 0, position 0")
            if position and stream.length is None:
                raise ValueError(f"{name} has no known length, so the mix must begin at position 0, got {position}")
        return self._opened(epoch, position)

    @asynccontextmanager
    async def _opened(self, epoch: int, position: int) -> AsyncIterator[AsyncIterator[Record]]:
        given = await in_thread(self._given, position)
        queues = [_Queue(self.ahead) for _ in self.streams]
        mix = _Mix(queues, Turns(self.weights, given))
        async with ServingGroup() as tasks:
            parts = zip(self.streams.items(), given, self._relabel, queues, strict=True)
            for (name, stream), start, relabel, queue in parts:
                reading = _read_ahead(name, stream.open(epoch, start), relabel, queue)
                tasks.create_task(reading, name=f"stream-{name}")
            try:
                yield mix
            finally:
                mix.close()

    def _given(self, position: int) -> list[int]:
        """Return how many records each stream has given before ``position``. Blocks."""
        if position == 0 or self._lengths is None:
            return [0] * len(self.streams)
        so_far = turns([min(length, position) for length in self._lengths], self.weights)[:position]
        given: list[int] = np.bincount(so_far, minlength=len(self.streams)).tolist()
        return given

    def __repr__(self) -> str:
        return f"<InterleaveStreams of {', '.join(self.streams)}>"


_Queue = asyncio.Queue[Record | Failure]


async def _read_ahead(
    part: str, opening: AbstractAsyncContextManager[AsyncIterator[Record]], relabel: Array, queue: _Queue
) -> None:
    """Put the records of a stream into its queue, and at last what ended them."""
    try:
        async with opening as records:
            async for record in records:
                await queue.put(part_of(part, record, int(relabel[record.label])))
    except DataError as error:
        failure = named(error, part)
        failure.__cause__ = error
        await queue.put(Failure(failure))
    except Exception as error:
        error.add_note(f"raised by {part}")
        await queue.put(Failure(error))
    else:
        await queue.put(Failure(StopAsyncIteration()))


class _Mix(AsyncIterator[Record]):
    """The records of several queues by turns. What ends it is told to whoever asks again."""

    def __init__(self, queues: Sequence[_Queue], turns: Turns) -> None:
        self._queues = queues
        self._turns = turns
        self._end: Exception | None = None

    async def __anext__(self) -> Record:
        while self._end is None and (turn := self._turns.next) is not None:
            item = await self._queues[turn].get()
            if isinstance(item, Record):
                self._turns.took(turn)
                return item
            if isinstance(item.error, StopAsyncIteration):
                self._turns.ended(turn)
            else:
                self._end = item.error
        raise self._end or StopAsyncIteration

    def close(self) -> None:
        """Refuse what comes."""
        self._end = _closed("a mix")
