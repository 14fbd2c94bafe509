"""Loaders over data of which some cannot be read: what is delivered, what is told, and that resuming stays exact."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from asynctrain.arena import Array
from asynctrain.data import ArrayDataset, ImageFolder, ImageSettings, Loader, Sampler, decode
from asynctrain.data.augment import Draws, Mixing, Mixup, standard
from asynctrain.data.cache import MemoryCache
from asynctrain.errors import DecodeError, ReadError, TooManyBadSamples
from asynctrain.randomness import Purpose, generator
from asynctrain.types import Batch, Cursor, Record

pytestmark = pytest.mark.one_loop

SETTINGS = ImageSettings((4, 4), 1)


@dataclass(frozen=True)
class BrokenSource:
    """A source that cannot be read, or whose bytes are no image, in turns."""

    index: int

    def read(self) -> bytes:
        if self.index % 2:
            raise ReadError(str(self), "cannot be read: no disk")
        return b"no image"

    def __str__(self) -> str:
        return f"broken[{self.index}]"


class PartlyBroken(ArrayDataset):
    """Grey images of noise, some of them broken."""

    def __init__(self, size: int, bad: Set[int]) -> None:
        images = np.random.default_rng(size).integers(0, 256, (size, 4, 4), dtype=np.uint8)
        super().__init__(images, np.arange(size) % 3, ["a", "b", "c"])
        self.bad = bad

    def __getitem__(self, index: int, /) -> Record:
        record = super().__getitem__(index)
        return Record(BrokenSource(index), record.label) if index in self.bad else record


@dataclass(frozen=True)
class Case:
    """A loader's data and settings, in so far as they decide about the batches."""

    size: int
    bad: Set[int]
    batch_size: int
    seed: int = 0
    drop_last: bool = False
    augment: bool = False
    mix: Mixing | None = None

    def loader(self, **options: Any) -> Loader:
        usual = {"threads": 2, "chunk": 3, "errors": "skip", "max_skipped": 1.0, "channels": 1, "image_size": (4, 4)}
        return Loader(
            PartlyBroken(self.size, self.bad),
            batch_size=self.batch_size,
            seed=self.seed,
            drop_last=self.drop_last,
            augment=standard() if self.augment else None,
            mix=self.mix,
            **{**usual, **options},
        )

    def order(self, epoch: int) -> list[int]:
        """The samples of an epoch in their order, without those that ``drop_last`` leaves out in any case."""
        order: list[int] = Sampler(self.size, self.seed).order(epoch).tolist()
        return order[: self.size - self.size % self.batch_size] if self.drop_last else order

    def groups(self, epoch: int) -> list[list[int]]:
        """The positions that make up each batch of an epoch."""
        good = [position for position, index in enumerate(self.order(epoch)) if index not in self.bad]
        groups = [good[start : start + self.batch_size] for start in range(0, len(good), self.batch_size)]
        return [group for group in groups if len(group) == self.batch_size or not self.drop_last]

    def skipped(self, epoch: int) -> list[int]:
        return [position for position, index in enumerate(self.order(epoch)) if index in self.bad]

    def image(self, epoch: int, position: int) -> Array:
        """The image at a position, decoded and augmented on its own."""
        source = PartlyBroken(self.size, self.bad)[self.order(epoch)[position]].source
        image = decode(source.read(), SETTINGS)[None].copy()
        if self.augment:
            image = standard()(image, Draws(self.seed, epoch, np.array([position])))
        alone: Array = image[0]
        return alone

    def pixels_and_labels(self, epoch: int, group: list[int]) -> tuple[Array, Array]:
        """What the batch of these positions holds."""
        images = np.stack([self.image(epoch, position) for position in group])
        labels = np.array([self.order(epoch)[position] % 3 for position in group], np.int64)
        if self.mix is None:
            return images, labels
        return self.mix(images, labels, 3, generator(self.seed, Purpose.MIX, epoch, group[0]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a data set with bad samples here and there, whole batches of them, and at the end of the first epoch."""
    size, batch_size = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    seed = draw(st.integers(0, 2**64 - 1))
    drop_last = draw(st.booleans()) and size >= batch_size
    order = Sampler(size, seed).order(0).tolist()
    bad = draw(st.sets(st.integers(0, size - 1), max_size=size // 2))
    if draw(st.booleans()):
        bad |= set(order[size - draw(st.integers(1, size)) :])
    for start in draw(st.sets(st.integers(0, size // batch_size), max_size=2)):
        bad |= set(order[start * batch_size : (start + 1) * batch_size])
    mix = draw(st.sampled_from([None, Mixup(0.4)]))
    return Case(size, frozenset(bad), batch_size, seed, drop_last, augment=draw(st.booleans()), mix=mix)


stops = st.integers(0, 10**6)  # modulo the number of batches: drawing in the middle of a coroutine confuses hypothesis
machinery = st.fixed_dictionaries(
    {
        "chunk": st.one_of(st.just("auto"), st.integers(1, 14)),
        "threads": st.integers(1, 3),
        "prefetch": st.integers(1, 3),
    }
)


async def collect(loader: Loader, cursor: Cursor | None = None, epochs: int | None = None) -> list[Batch]:
    async with loader.open(cursor or Cursor(), epochs=epochs) as batches:
        return [batch async for batch in batches]


async def deliver(batches: AsyncIterator[Batch], into: list[Batch]) -> None:
    async for batch in batches:
        into.append(batch)  # noqa: PERF401 (a comprehension would lose what came before an error)


def told(batch: Batch) -> tuple[object, ...]:
    """Everything about a batch but what was skipped just before it, comparable."""
    return (
        batch.images.tobytes(),
        batch.images.shape,
        batch.labels.tolist(),
        batch.sources,
        batch.epoch,
        batch.cursor,
        batch.last,
    )


# What is delivered


@settings(max_examples=12)
@given(case=cases(), machinery=machinery, epochs=st.integers(1, 3))
async def test_the_good_samples_are_delivered_in_full_batches_and_the_bad_ones_listed(
    case: Case, machinery: dict[str, Any], epochs: int
) -> None:
    """Against a plain loop over the positions, one sample at a time."""
    async with case.loader(**machinery).open(epochs=epochs) as stream:
        batches = [batch async for batch in stream]
        skipped = stream.skipped
    expected = [(epoch, group) for epoch in range(epochs) for group in case.groups(epoch)]
    assert len(batches) == len(expected)
    for number, (batch, (epoch, group)) in enumerate(zip(batches, expected, strict=True)):
        images, labels = case.pixels_and_labels(epoch, group)
        assert np.array_equal(batch.images, images)
        assert np.array_equal(batch.labels, labels)
        assert batch.labels.dtype == labels.dtype
        assert batch.sources == tuple(f"array[{case.order(epoch)[position]}]" for position in group)
        assert batch.epoch == epoch
        if batch.last:
            assert batch.cursor == Cursor(epoch + 1)
            assert number + 1 == len(batches) or expected[number + 1][0] > epoch
        else:
            before = tuple(position for position in case.skipped(epoch) if position < group[-1])
            assert batch.cursor.position == group[-1] + 1
            assert batch.cursor.skipped == before
    listed = [(sample.epoch, sample.position) for sample in skipped]
    assert listed == [(epoch, position) for epoch in range(epochs) for position in case.skipped(epoch)]


@settings(max_examples=15)
@given(case=cases(), machines=st.tuples(machinery, machinery), epochs=st.integers(1, 3), stop=stops)
async def test_batches_before_and_after_a_stop_are_together_the_uninterrupted_ones(
    case: Case, machines: tuple[dict[str, Any], dict[str, Any]], epochs: int, stop: int
) -> None:
    whole = await collect(case.loader(**machines[0]), epochs=epochs)
    stop %= len(whole) + 1
    async with case.loader(**machines[1]).open(epochs=epochs) as stream:
        before = [await anext(stream) for _ in range(stop)]
    cursor = before[-1].cursor if before else Cursor()
    async with case.loader(**machines[1]).open(cursor, epochs=epochs) as stream:
        after = [batch async for batch in stream]
        skipped_after = stream.skipped
    together = [*before, *after]
    assert [told(batch) for batch in together] == [told(batch) for batch in whole]
    assert [batch.skipped for batch in together] == [batch.skipped for batch in whole]
    listed = [sample.position for batch in before for sample in batch.skipped]
    listed += [sample.position for sample in skipped_after]
    assert listed == [position for epoch in range(epochs) for position in case.skipped(epoch)]


@settings(max_examples=5)
@given(case=cases(), machinery=machinery, stop=stops)
async def test_a_cache_that_remembers_the_good_ones_changes_nothing(
    case: Case, machinery: dict[str, Any], stop: int
) -> None:
    whole = await collect(case.loader(**machinery), epochs=3)
    loader = case.loader(cache=MemoryCache(1_000_000), **machinery)
    assert [told(batch) for batch in await collect(loader, epochs=3)] == [told(batch) for batch in whole]
    if whole:
        stop %= len(whole)
        rest = await collect(loader, whole[stop].cursor, epochs=3)
        assert [told(batch) for batch in rest] == [told(batch) for batch in whole[stop + 1 :]]


async def test_an_epoch_in_which_all_are_bad_has_no_batch_and_the_next_goes_on() -> None:
    loader = Case(6, frozenset(range(6)), 2).loader()
    async with loader.open(epochs=3) as batches:
        assert [batch async for batch in batches] == []
        assert [sample.position for sample in batches.skipped] == [*range(6)] * 3


async def test_batches_of_several_slabs_are_augmented_and_have_soft_labels() -> None:
    case = Case(30, frozenset(range(0, 30, 4)), 5, augment=True, mix=Mixup(1.0))
    batch, *_ = await collect(case.loader())
    assert batch.labels.dtype == np.float32
    assert batch.labels.shape == (5, 3)
    assert np.allclose(batch.labels.sum(1), 1)
    again, *_ = await collect(case.loader(chunk=1, threads=3))
    assert told(batch) == told(again)


async def test_who_is_cancelled_while_waiting_for_a_batch_loses_none() -> None:
    case = Case(40, frozenset(range(0, 40, 7)), 3)
    whole = [told(batch) for batch in await collect(case.loader())]
    delivered: list[Batch] = []
    turns = 0
    async with case.loader().open() as batches:
        while len(delivered) < len(whole):
            ask = asyncio.ensure_future(anext(batches))
            for _ in range(turns % 9):
                await asyncio.sleep(0)
            turns += 1
            ask.cancel()
            await asyncio.wait([ask])
            delivered += [] if ask.cancelled() else [ask.result()]
        assert [sample.position for sample in batches.skipped] == case.skipped(0)[: len(batches.skipped)]
    assert [told(batch) for batch in delivered] == whole


# The budget


async def test_more_bad_samples_than_the_budget_end_the_epoch_with_the_file_that_was_too_much() -> None:
    case = Case(40, frozenset(range(0, 40, 5)), 4)
    delivered: list[Batch] = []
    async with case.loader(max_skipped=5).open() as batches:
        with pytest.raises(TooManyBadSamples, match="6 bad samples in this epoch are more than 5") as caught:
            await deliver(batches, delivered)
        sixth = case.skipped(0)[5]
        assert caught.value.path == f"broken[{case.order(0)[sixth]}]"
        good = [position for position in range(sixth) if position not in case.skipped(0)]
        assert len(delivered) == len(good) // 4, "what was complete before it is delivered"
        assert [sample.position for sample in batches.skipped] == case.skipped(0)[:6]
        with pytest.raises(TooManyBadSamples):  # asking again does not get past it
            await anext(batches)


@pytest.mark.parametrize(("budget", "enough"), [(8, True), (7, False), (0.2, True), (0.199, False), (0, False)])
async def test_a_budget_is_a_count_or_a_share_of_an_epoch_and_anew_for_each(budget: float, enough: bool) -> None:
    case = Case(40, frozenset(range(0, 40, 5)), 4)
    if enough:
        assert len(await collect(case.loader(max_skipped=budget), epochs=3)) == 3 * 8
    else:
        with pytest.raises(TooManyBadSamples):
            await collect(case.loader(max_skipped=budget), epochs=3)


@settings(max_examples=6)
@given(case=cases(), budget=st.integers(0, 10), machinery=machinery)
async def test_a_resumed_stream_ends_with_the_error_that_the_uninterrupted_one_ends_with(
    case: Case, budget: int, machinery: dict[str, Any]
) -> None:
    """From every batch on: the cursor knows how much of the budget was spent."""

    async def to_the_end(cursor: Cursor) -> tuple[list[Batch], str]:
        delivered: list[Batch] = []
        async with case.loader(max_skipped=budget, **machinery).open(cursor, epochs=1) as batches:
            try:
                await deliver(batches, delivered)
            except TooManyBadSamples as error:
                return delivered, str(error)
        return delivered, "the end"

    whole, end = await to_the_end(Cursor())
    for number, batch in enumerate(whole, start=1):
        rest, same_end = await to_the_end(batch.cursor)
        assert [told(batch) for batch in rest] == [told(batch) for batch in whole[number:]]
        assert same_end == end


# Files


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    """20 grey PNG files in two classes, of which two are cut off and one has gone."""
    for number in range(20):
        path = tmp_path / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), number).save(path)
    folder = ImageFolder(tmp_path)
    for number in (6, 13):
        path = tmp_path / "ab"[number % 2] / f"{number:02}.png"
        path.write_bytes(path.read_bytes()[:40])
    (tmp_path / "a" / "08.png").unlink()
    return folder


def files_loader(folder: ImageFolder, **options: Any) -> Loader:
    usual = {"image_size": (4, 4), "channels": 1, "batch_size": 4, "shuffle": False, "threads": 2, "max_skipped": 0.2}
    return Loader(folder, **{**usual, **options})


@pytest.mark.parametrize("executor", ["threads", "processes"])
async def test_each_skipped_file_is_told_with_its_position_path_and_reason(folder: ImageFolder, executor: str) -> None:
    async with files_loader(folder, errors="skip", executor=executor).open() as batches:
        delivered = [batch async for batch in batches]
        report = batches.report()
    greys = [grey for batch in delivered for grey in batch.images[:, 0, 0, 0].tolist()]
    assert greys == [0, 2, 4, 10, 12, 14, 16, 18, 1, 3, 5, 7, 9, 11, 15, 17, 19]
    assert [len(batch.labels) for batch in delivered] == [4, 4, 4, 4, 1]
    paths = [str(Path(folder.path) / name) for name in ("a/06.png", "a/08.png", "b/13.png")]
    assert [(sample.position, sample.source) for sample in batches.skipped] == list(zip((3, 4, 16), paths, strict=True))
    assert "No such file" in batches.skipped[1].reason
    assert [[sample.position for sample in batch.skipped] for batch in delivered] == [[3, 4], [], [], [16], []]
    assert "\n\n3 samples were skipped:\n" in report
    for sample in batches.skipped:
        assert f"  {sample.source}: {sample.reason}" in report


async def test_raising_names_the_first_bad_file_after_the_batches_before_it(folder: ImageFolder) -> None:
    delivered: list[Batch] = []
    async with files_loader(folder, batch_size=2).open() as batches:
        with pytest.raises(DecodeError) as caught:
            await deliver(batches, delivered)
        assert caught.value.path == str(Path(folder.path) / "a/06.png")
        assert batches.skipped == []
        assert "skipped" not in batches.report()
    assert len(delivered) == 1


async def test_an_evaluating_loader_skips_with_the_same_budget(folder: ImageFolder) -> None:
    loader = files_loader(folder, errors="skip", max_skipped=3).evaluating(folder)
    assert sum(len(batch.labels) for batch in await collect(loader)) == 17
    with pytest.raises(TooManyBadSamples):
        await collect(files_loader(folder, errors="skip", max_skipped=2).evaluating(folder))


async def test_an_error_that_is_not_the_datas_is_raised_although_samples_may_be_skipped() -> None:
    class Bug(ArrayDataset):
        def __getitem__(self, index: int, /) -> Record:
            if index == 5:
                raise ZeroDivisionError("a bug")
            return super().__getitem__(index)

    loader = files_loader(Bug(np.zeros((9, 4, 4), np.uint8), [0] * 9), errors="skip")  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError, match="a bug"):
        await collect(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"errors": "ignore"}, "errors must be 'raise' or 'skip', got 'ignore'"),
        ({"max_skipped": -1}, "max_skipped must be 0 or more, got -1"),
        ({"max_skipped": -0.1}, "max_skipped must be 0 or more, got -0.1"),
    ],
)
def test_wrong_arguments_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(4, frozenset(), 2).loader(**options)


@pytest.mark.parametrize("chunk", [1, 4, 12])
async def test_of_two_bad_samples_the_earlier_is_raised_whether_it_cannot_be_read_or_decoded(chunk: int) -> None:
    loader = Loader(
        PartlyBroken(12, {6, 7}), batch_size=3, image_size=(4, 4), channels=1, shuffle=False, chunk=chunk, threads=1
    )
    async with loader.open() as batches:
        delivered = [*(await anext(batches)).sources, *(await anext(batches)).sources]
        with pytest.raises(DecodeError, match=r"broken\[6\]"):  # 7 cannot even be read
            await anext(batches)
    assert delivered == [f"array[{index}]" for index in range(6)]
