"""What a stream tells of its stages: right counts, shares of time, and the right stage blamed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from asynctrain._aio import Failure, Flow, Meter
from asynctrain.data import ArrayDataset, Loader
from asynctrain.data.pipeline import Pipeline, arriving, hand_on
from asynctrain.data.statistics import StageStatistics, Statistics, snapshot
from asynctrain.types import Record

LATE = 0.02  # seconds that a slow stage takes for an item


def stage_of(name: str, **values: Any) -> StageStatistics:
    usual = StageStatistics(name, 0, 0, 0.0, 1, utilization=0.0, starved=0.0, blocked=0.0, occupancy=0.0, capacity=1)
    return replace(usual, **values)


def is_small(item: int) -> bool:
    return item < 8


async def quick(item: int) -> int:
    return item


async def late(item: int) -> int:
    await asyncio.sleep(LATE)
    return item


def late_in_a_thread(item: int) -> int:
    threading.Event().wait(LATE)
    return item


async def numbers(pause: float) -> AsyncIterator[int]:
    for number in range(30):
        await asyncio.sleep(pause)
        yield number


async def one_by_one(inbox: Flow[int], outbox: Flow[int], meter: Meter) -> None:
    """Regroup nothing, slowly."""
    async for item in arriving(inbox, meter):
        assert not isinstance(item, Failure)
        await hand_on(await late(item), outbox, meter)


async def read_all(pipeline: Pipeline[Any], pause: float = 0.0) -> Statistics:
    async with pipeline.open() as stream:
        async for _ in stream:
            await asyncio.sleep(pause)
        return stream.statistics()


async def test_each_stage_counts_the_items_it_has_handed_on() -> None:
    statistics = await read_all(Pipeline(range(10)).map(quick, concurrency=3).filter(is_small).batch(3))
    counted = {stage.name: (stage.items, stage.failures) for stage in statistics.stages}
    assert counted == {
        "source": (10, 0),
        "quick": (10, 0),
        "is_small": (10, 0),
        "is_small-kept": (8, 0),
        "batch": (3, 0),
    }
    assert [stage.concurrency for stage in statistics.stages] == [1, 3, 1, 1, 1]
    assert [stage.capacity for stage in statistics.stages] == [1, 3, 1, 1, 2]
    for stage in statistics.stages:
        assert stage.items_per_second == pytest.approx(stage.items / statistics.seconds)
        assert 0 <= stage.occupancy <= 1
        assert 0 <= stage.utilization <= 1


async def test_failures_are_counted_where_they_happen_and_not_as_items() -> None:
    def inverse(item: int) -> float:
        return 1 / item

    async with Pipeline([2, 1, 0]).map(inverse).map(quick).batch(1).open() as stream:
        with pytest.raises(ZeroDivisionError):
            _ = [item async for item in stream]
        counted = {stage.name: (stage.items, stage.failures) for stage in stream.statistics().stages}
    assert counted == {"source": (3, 0), "inverse": (2, 1), "quick": (2, 0), "batch": (2, 0)}


async def test_an_item_counts_as_the_samples_it_says_to_hold_and_as_one_if_they_are_something_else() -> None:
    items = [SimpleNamespace(samples=samples) for samples in (3, 4, np.zeros(9), "many", None)]
    statistics = await read_all(Pipeline(items).map(quick).batch(2))
    assert [stage.items for stage in statistics.stages] == [10, 10, 3]


def slow_map() -> Pipeline[Any]:
    return Pipeline(range(30)).map(quick).map(late, name="slow").map(quick).batch(2)


def slow_map_in_threads() -> Pipeline[int]:
    return Pipeline(range(30)).map(quick, concurrency=4).map(late_in_a_thread, concurrency=2, name="slow").map(quick)


def slow_last_stage() -> Pipeline[int]:
    return Pipeline(range(30)).map(quick, concurrency=4).map(late, name="slow")


def slow_regrouping() -> Pipeline[int]:
    return Pipeline(range(30)).map(quick).through(one_by_one, name="slow").map(quick)


def slow_source() -> Pipeline[Any]:
    return Pipeline(numbers(LATE)).map(quick).batch(3)


@pytest.mark.parametrize(
    "build", [slow_map, slow_map_in_threads, slow_last_stage, slow_regrouping, slow_source], ids=lambda f: f.__name__
)
async def test_the_stage_that_the_others_wait_for_is_named(build: Any) -> None:
    statistics = await read_all(build())
    slow = "source" if build is slow_source else "slow"
    assert statistics.bottleneck == slow
    assert statistics.report().startswith(f"The stage {slow!r} is the bottleneck: ")
    others = [stage for stage in statistics.stages if stage.name != slow]
    (stage,) = (stage for stage in statistics.stages if stage.name == slow)
    assert stage.utilization > 0.5
    assert all(other.utilization < 0.5 for other in others)


async def test_the_wait_for_a_thread_that_others_use_is_no_work() -> None:
    data = ArrayDataset(np.zeros((8, 2, 2, 1), np.uint8), np.zeros(8, np.int64), ["a"])
    with ThreadPoolExecutor(1) as threads:
        threads.submit(threading.Event().wait, 0.3)
        shared = SimpleNamespace(workers=1, submit=threads.submit)
        async with Loader(data, batch_size=8, image_size=(2, 2), channels=1).open(threads=shared) as batches:
            await anext(batches)
            loaded = batches.statistics()
        threads.submit(threading.Event().wait, 0.3)
        mapped = await read_all(Pipeline(range(8)).map(abs, executor=threads))
    for statistics in loaded, mapped:
        assert statistics.seconds > 0.2
        assert all(stage.utilization < 0.5 for stage in statistics.stages)


async def test_stages_before_the_slow_one_are_blocked_and_those_behind_it_starve() -> None:
    statistics = await read_all(slow_map())
    stages = {stage.name: stage for stage in statistics.stages}
    half = statistics.seconds / 2
    assert stages["source"].blocked > half
    assert stages["quick"].blocked > half
    assert stages["quick"].occupancy > 0.5
    assert stages["batch"].starved > half
    assert stages["batch"].blocked < half


async def test_a_slow_consumer_is_named_as_such() -> None:
    statistics = await read_all(Pipeline(range(30)).map(quick).batch(1), pause=LATE)
    assert statistics.bottleneck is None
    assert statistics.report().startswith("The consumer is the slowest: it waited ")


def test_a_report_says_who_holds_it_up_for_how_long_and_what_would_help() -> None:
    stages = (
        stage_of("source", items=1000, items_per_second=500.0, blocked=1.5, occupancy=1.0),
        stage_of(
            "decode",
            items=998,
            items_per_second=499.0,
            failures=2,
            concurrency=3,
            utilization=0.97,
            starved=0.04,
            capacity=3,
        ),
    )
    told = Statistics(2.0, stages, 0.5, {"decode": "a cache would help"}).report()
    assert told == (
        "The stage 'decode' is the bottleneck: its 3 places worked 97% of the time, while the consumer waited for data "
        "25% of it; a cache would help.\n"
        "\n"
        "stage   items  items/s  at once  busy  starved  blocked      queue  failed\n"
        "source  1,000      500        1    0%    0.0 s    1.5 s  100% of 1       0\n"
        "decode    998      499        3   97%    0.0 s    0.0 s    0% of 3       2"
    )


def test_without_a_hint_more_concurrency_is_what_may_help() -> None:
    told = Statistics(2.0, (stage_of("read", utilization=1.0),), 1.0, {}).report()
    assert "its one place worked 100% of the time" in told
    assert "; more concurrency of 'read' may help." in told


def test_a_meter_that_has_counted_nothing_yet_makes_no_division_by_zero() -> None:
    stage = snapshot(Meter("read", 2), 0.0)
    assert (stage.items_per_second, stage.utilization, stage.occupancy) == (0.0, 0.0, 0.0)
    assert Statistics(0.0, (stage,), 0.0, {}).report().startswith("The stage 'read'")


class _Late:
    """An image that takes its time to be read."""

    def read(self) -> Any:
        threading.Event().wait(LATE)
        return np.zeros((4, 4), np.uint8)

    def __str__(self) -> str:
        return "late"


class LateDataset(ArrayDataset):
    """Images that take their time to be read."""

    def __getitem__(self, index: int, /) -> Record:
        return Record(_Late(), 0)


async def test_a_loader_names_its_slow_stage_with_what_would_help() -> None:
    dataset = LateDataset(np.zeros((40, 4, 4), np.uint8), [0] * 40)
    loader = Loader(dataset, batch_size=4, image_size=(4, 4), channels=1, chunk=2, threads=2)
    async with loader.open() as batches:
        assert len([batch async for batch in batches]) == 10
        statistics, told = batches.statistics(), batches.report()
    assert [stage.name for stage in statistics.stages] == ["source", "read", "decode", "assemble"]
    assert [stage.items for stage in statistics.stages] == [40] * 4  # samples, in chunks and batches alike
    assert statistics.bottleneck == "read"
    assert told.startswith("The stage 'read' is the bottleneck: ")
    assert "; a cache keeps decoded images" in told
