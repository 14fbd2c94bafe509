"""What can be asked of a run while it trains."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

import asynctrain as at
from asynctrain._aio import ServingGroup, thread_pool
from asynctrain.errors import ClosedError
from asynctrain.train import checkpoint, saving
from asynctrain.train.control import Limits
from asynctrain.train.events import CheckpointSaved, Evaluation, Event, Missed, Paused, Resumed, RunEnd, StepEnd
from asynctrain.train.history import History
from asynctrain.train.log import EventLog
from asynctrain.train.run_folder import RunFolder
from asynctrain.train.saving import Saving
from asynctrain.types import Cursor

FOREVER = 100_000  # epochs


@pytest.fixture
async def executor() -> AsyncIterator[at.ThreadExecutor]:
    async with at.ThreadExecutor(2) as executor:
        yield executor


@pytest.fixture
def trainer(model: at.Model, executor: at.ThreadExecutor) -> at.Trainer:
    return at.Trainer(model, optimizer=at.optim.adamw(1e-2), executor=executor, microbatch=12, seed=3)


async def reach(run: at.Run, step: int) -> None:
    """Wait until ``step`` is told."""
    async for event in run.events(step):  # none is told before as many events
        if isinstance(event, StepEnd) and event.step >= step:
            return


# Pause and resume


async def test_a_pause_takes_effect_within_250_ms_and_nothing_is_trained_until_it_is_over(
    trainer: at.Trainer, loader: at.Loader
) -> None:
    whole = await trainer.fit(loader, epochs=3)
    async with trainer.start(loader, epochs=3) as run:
        await reach(run, 4)
        start = time.perf_counter()
        steps = await run.pause()
        assert time.perf_counter() - start < 0.25
        assert run.progress.paused
        assert "paused" in repr(run)
        await asyncio.sleep(0.05)
        assert run.state.step == run.progress.step == steps
        run.resume()
        history = await run.result()
        events = [event async for event in run]
    assert history == whole
    assert history.state.digest() == whole.state.digest()
    (paused,) = (event for event in events if isinstance(event, Paused))
    (resumed,) = (event for event in events if isinstance(event, Resumed))
    assert paused.step == resumed.step == steps
    assert resumed.number == paused.number + 1


async def test_pausing_twice_and_resuming_what_does_not_wait_are_no_errors(
    trainer: at.Trainer, loader: at.Loader
) -> None:
    async with trainer.start(loader, epochs=FOREVER) as run:
        run.resume()
        first, second = await asyncio.gather(run.pause(), run.pause())
        assert first == second == await run.pause()
        run.resume()
        await reach(run, first + 3)
        await run.stop()


async def test_a_run_that_is_resumed_and_paused_in_one_turn_stays_paused_and_says_so(
    trainer: at.Trainer, loader: at.Loader
) -> None:
    async with asyncio.timeout(20), trainer.start(loader, epochs=FOREVER) as run:
        steps = await run.pause()
        for _ in range(3):
            run.resume()
            assert await run.pause() == steps
        run.resume()
        await reach(run, steps + 3)
        await run.stop()


async def test_a_pause_that_is_asked_for_while_the_end_of_another_is_told_waits_for_no_batch(
    trainer: at.Trainer,
) -> None:
    feed = Feed()
    feed.give(1)
    telling = asyncio.Event()

    async def dawdle(event: Event) -> None:
        if isinstance(event, Resumed):
            telling.set()
            await asyncio.sleep(0.05)

    async with asyncio.timeout(20), trainer.start(feed.loader, epochs=1, callbacks=[dawdle]) as run:
        await run.pause()  # after the step it is in, or amid the wait for the next batch
        for _ in range(2):
            telling.clear()
            run.resume()
            await telling.wait()
            await run.pause()
        await run.stop()


class Slow:
    """A metric that lets an evaluation take a while, and counts its batches."""

    def __init__(self) -> None:
        self.batches = 0
        self.begun = asyncio.Event()

    def begin(self) -> None:
        return None

    def add(self, gathered: None, outputs: Any, batch: Any) -> None:
        self.batches += 1
        self.begun.set()

    def result(self, gathered: None) -> dict[str, Any]:
        return {}


async def test_a_pause_and_a_checkpoint_do_not_wait_for_the_end_of_an_evaluation(
    trainer: at.Trainer, loader: at.Loader, blobs: at.ArrayDataset, tmp_path: Path
) -> None:
    held_out = at.Loader(blobs, batch_size=1, image_size=(12, 12), channels=1, shuffle=False)
    whole = await trainer.fit(loader, epochs=2, validate=held_out)
    slow = Slow()
    asked: Any = {"epochs": 2, "validate": held_out, "metrics": [slow]}
    async with trainer.start(loader, **asked, run_dir=tmp_path / "run") as run:
        await slow.begun.wait()
        start = time.perf_counter()
        assert await run.pause() == 5
        assert time.perf_counter() - start < 0.25
        seen = slow.batches
        assert seen < len(blobs)
        path = await run.checkpoint()
        assert slow.batches == seen, "it waits in the middle of the evaluation"
        run.resume()
        history = await run.result()
        events = [event async for event in run]
    (paused,) = (event.number for event in events if isinstance(event, Paused))
    assert paused < min(event.number for event in events if isinstance(event, Evaluation))
    assert history == whole
    assert history.state.digest() == whole.state.digest()
    resumed = await trainer.resume(path, loader, epochs=2, validate=held_out, run_dir=tmp_path / "other")
    assert resumed == whole, "what was saved there goes on with the whole evaluation"


async def test_what_is_saved_amid_the_last_evaluation_is_saved_again_with_what_it_has_found(
    trainer: at.Trainer, loader: at.Loader, blobs: at.ArrayDataset, tmp_path: Path
) -> None:
    held_out = at.Loader(blobs, batch_size=1, image_size=(12, 12), channels=1, shuffle=False)
    slow = Slow()
    async with trainer.start(loader, epochs=1, validate=held_out, metrics=[slow], run_dir=tmp_path / "run") as run:
        await slow.begun.wait()
        path = await run.checkpoint()
        assert checkpoint.load(path).state.history == ()
        history = await run.result()
    assert at.History.load(tmp_path / "run") == history
    assert len(history.epochs) == len(history.evaluations) == 1


async def test_time_in_a_pause_is_no_time_of_the_epoch_or_the_evaluation(
    trainer: at.Trainer, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    slow = Slow()
    start = time.perf_counter()
    async with trainer.start(loader, epochs=1, validate=blobs, metrics=[slow]) as run:
        await slow.begun.wait()
        await run.pause()
        await asyncio.sleep(1)
        run.resume()
        history = await run.result()
    passed = time.perf_counter() - start
    assert history.epochs[0].seconds < passed - 1
    assert history.evaluations[0].seconds < passed - 1


async def test_in_a_pause_the_rate_and_the_time_that_is_left_stay_what_they_were(
    trainer: at.Trainer, loader: at.Loader
) -> None:
    async with trainer.start(loader, epochs=FOREVER) as run:
        await reach(run, 2)
        await run.pause()
        before = run.progress
        await asyncio.sleep(0.01)
        after = run.progress
        assert before.eta
        assert (after.samples_per_second, after.eta) == (before.samples_per_second, before.eta)
        await run.cancel()


async def test_a_paused_run_can_be_stopped_cancelled_and_saved(
    trainer: at.Trainer, loader: at.Loader, tmp_path: Path
) -> None:
    async with trainer.start(loader, epochs=FOREVER, run_dir=tmp_path / "run") as run:
        await reach(run, 2)
        steps = await run.pause()
        path = await run.checkpoint()
        assert checkpoint.load(path).state.step == steps
        history = await run.stop()
    assert (history.reason, history.state.step) == ("stopped", steps)
    async with trainer.start(loader, epochs=FOREVER) as run:
        await run.pause()
        await run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run.result()


async def test_a_pause_asked_of_a_run_that_ends_meanwhile_or_has_ended_does_not_wait_for_ever(
    trainer: at.Trainer, loader: at.Loader
) -> None:
    async with trainer.start(loader, epochs=1) as run:
        await run.result()
        assert await run.pause() == 5
    async with trainer.start(loader, epochs=FOREVER) as run:
        pausing = asyncio.create_task(run.pause())
        await run.cancel()
        await asyncio.wait_for(pausing, 1)


async def test_a_run_that_is_cancelled_before_it_has_done_anything_ends_all_the_same(
    trainer: at.Trainer, loader: at.Loader
) -> None:
    async with trainer.start(loader, epochs=FOREVER) as run:
        async with asyncio.timeout(1):
            await run.cancel()
        assert [event async for event in run] == []
        with pytest.raises(asyncio.CancelledError):
            await run.result()


# Checkpoints


async def test_a_checkpoint_asked_for_is_whole_when_its_path_comes_and_holds_the_state_of_its_step(
    trainer: at.Trainer, loader: at.Loader, tmp_path: Path
) -> None:
    async with trainer.start(loader, epochs=FOREVER, run_dir=tmp_path / "run") as run:
        await reach(run, 2)
        paths = await asyncio.gather(run.checkpoint(), run.checkpoint())
        saved = checkpoint.load(paths[0])
        assert paths[0] == paths[1]
        assert paths[0].name == checkpoint.name_of(saved.state.step)
        stopped = await run.stop()
        told = [event async for event in run if isinstance(event, CheckpointSaved)]
    assert str(paths[0]) in [event.path for event in told]
    alone = await trainer.fit(loader, epochs=FOREVER, steps=saved.state.step)
    assert saved.state.digest() == alone.state.digest()
    assert told[-1].step == stopped.state.step, "and the last one is the run's end"


async def test_a_checkpoint_without_a_run_dir_or_after_the_end_is_refused(
    trainer: at.Trainer, loader: at.Loader, tmp_path: Path
) -> None:
    async with trainer.start(loader, epochs=1) as run:
        with pytest.raises(ValueError, match="run_dir must be given"):
            await run.checkpoint()
    async with trainer.start(loader, epochs=1, run_dir=tmp_path / "run") as run:
        await run.result()
        with pytest.raises(ClosedError, match="has ended"):
            await run.checkpoint()


async def test_checkpoints_come_after_every_so_many_steps_however_slow_their_writing_is_and_the_latest_stay(
    trainer: at.Trainer, loader: at.Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save

    def slow(*arguments: Any) -> None:
        time.sleep(0.1)
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow)
    ahead: list[int] = []
    async with trainer.start(
        loader, epochs=3, run_dir=tmp_path / "run", saving=Saving(4, None, epochs=False, keep=3)
    ) as run:
        saved = 0
        async for event in run:
            if isinstance(event, CheckpointSaved):
                saved = event.step
            if isinstance(event, StepEnd):
                ahead.append(event.step - saved)
    assert max(ahead) <= 4 + 1
    found = [path.name for path in checkpoint.find(tmp_path / "run")]
    assert found == [checkpoint.name_of(step) for step in (15, 12, 8)]


async def test_checkpoints_after_epochs_that_would_cost_more_than_two_percent_are_left_out(
    trainer: at.Trainer, loader: at.Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save

    def slow(*arguments: Any) -> None:
        time.sleep(0.1)
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow)
    async with trainer.start(loader, epochs=20, run_dir=tmp_path / "run") as run:
        told = [event.step async for event in run if isinstance(event, CheckpointSaved)]
    assert told == [5, 100], "the first tells what one costs, and the last is the run's end"


class Clock:
    """A time that is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_what_was_left_out_is_saved_at_the_first_step_after_which_it_costs_no_more(
    trainer: at.Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(saving, "monotonic", clock)
    monkeypatch.setattr(saving, "perf_counter", clock)
    folder = RunFolder(tmp_path)
    monkeypatch.setattr(RunFolder, "save", lambda *arguments: setattr(clock, "now", clock.now + 1))
    state = trainer.initial_state()
    due: list[int] = []
    unchanged: Any = lambda given: given  # noqa: E731 - what is written and told is not looked at
    async with thread_pool(1, "test") as threads, ServingGroup() as tasks:
        saver = saving.Saver(Saving(seconds=None), folder, state, unchanged, tasks, threads, unchanged)
        for step in range(1, 400):  # each of a second, in epochs of 30; writing takes one, too
            clock.now += 1
            state = replace(state, step=step, cursor=Cursor(epoch=step // 30))
            if saver.is_due(state):
                due.append(step)
                saver.begin(state)
                await saver.finish(state)
    assert due[0] == 30
    assert all(later - earlier >= 49 for earlier, later in pairwise(due)), "at most 2 % of the time"
    assert any(step % 30 for step in due), "in mid-epoch, as soon as it may"
    assert len(due) == 8


async def test_a_second_cancellation_abandons_the_last_writing_and_leaves_the_earlier_checkpoint(
    trainer: at.Trainer, loader: at.Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, writing = checkpoint.write_whole, threading.Event()  # type: ignore[attr-defined]
    saving = Saving(seconds=None, epochs=False)
    async with trainer.start(loader, epochs=FOREVER, run_dir=tmp_path / "run", saving=saving) as run:
        await reach(run, 2)
        earlier = await run.checkpoint()
        await reach(run, run.state.step + 2)

        def until_nobody_wants_it(path: Path, content: bytes, stopped: checkpoint.Stopped) -> None:
            writing.set()
            while not stopped():
                time.sleep(0.001)
            write(path, content, stopped)

        monkeypatch.setattr(checkpoint, "write_whole", until_nobody_wants_it)
        cancelling = asyncio.create_task(run.cancel())
        await asyncio.to_thread(writing.wait, 5)
        assert not run.task.done()
        run.task.cancel()
        await asyncio.wait_for(cancelling, 2)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [earlier.name]
    assert checkpoint.load(earlier).state.step < trainer.state.step


async def test_a_checkpoint_that_cannot_be_described_is_an_error_of_the_run_and_nobody_waits_for_ever(
    trainer: at.Trainer, loader: at.Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise TypeError("a state that JSON cannot hold")

    monkeypatch.setattr(checkpoint, "save", broken)

    async def ask() -> None:
        async with trainer.start(loader, epochs=FOREVER, run_dir=tmp_path / "run") as run:
            await run.checkpoint()

    start = time.perf_counter()
    with pytest.raises(TypeError, match="a state that JSON cannot hold"):
        await asyncio.wait_for(ask(), 5)
    assert time.perf_counter() - start < 4, "by itself, and not because the waiting was given up"


class Strange:
    """A metric whose figure is nothing that JSON can hold."""

    def begin(self) -> None:
        return None

    def add(self, gathered: None, outputs: Any, labels: Any) -> None:
        return None

    def result(self, gathered: None) -> dict[str, Any]:
        return {"strange": {1, 2}}


async def test_an_event_that_cannot_be_written_is_an_error_of_the_run(
    trainer: at.Trainer, loader: at.Loader, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="set"):
        await asyncio.wait_for(
            trainer.fit(loader, epochs=2, validate=loader.dataset, metrics=[Strange()], run_dir=tmp_path / "run"),
            5,
        )


# Ends


@pytest.mark.parametrize(
    ("limits", "steps", "why"),
    [
        ({"epochs": 2}, 10, None),
        ({"steps": 7}, 7, "7 steps are done"),
        ({"samples": 100}, 3, "100 samples are done"),
        ({"epochs": 2, "steps": 100}, 10, None),
        ({"epochs": 2, "samples": 41}, 2, "41 samples are done"),
    ],
    ids=str,
)
async def test_the_first_limit_that_is_reached_ends_the_run_and_is_told(
    trainer: at.Trainer, loader: at.Loader, limits: dict[str, int], steps: int, why: str | None
) -> None:
    async with trainer.start(loader, **limits) as run:  # type: ignore[arg-type]
        events = [event async for event in run]
        history = await run.result()
    assert (history.reason, history.state.step) == ("finished", steps)
    end = events[-1]
    assert isinstance(end, RunEnd)
    assert (end.reason, end.why) == ("finished", why)


async def test_seconds_end_a_run_after_the_step_in_which_they_pass(trainer: at.Trainer, loader: at.Loader) -> None:
    start = time.perf_counter()
    history = await trainer.fit(loader, seconds=0.3)
    assert 0.3 <= time.perf_counter() - start < 2
    assert history.reason == "finished"


def test_a_run_without_a_limit_or_with_one_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="must have a limit"):
        Limits()
    with pytest.raises(ValueError, match="seconds must be above 0, got -1"):
        Limits(seconds=-1)


async def test_limits_count_what_was_done_before_a_resume(
    trainer: at.Trainer, loader: at.Loader, tmp_path: Path
) -> None:
    await trainer.fit(loader, samples=120, run_dir=tmp_path / "run")
    history = await trainer.resume(tmp_path / "run", loader, samples=200)
    assert (history.samples, history.state.step) == (220, 6)


async def test_a_deadline_of_asyncio_leaves_a_checkpoint_from_which_the_run_goes_on_to_the_same_bits(
    trainer: at.Trainer, loader: at.Loader, tmp_path: Path
) -> None:
    def expire(event: Event) -> None:
        if isinstance(event, StepEnd) and event.step == 7:
            deadline.reschedule(0.0)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(60) as deadline:
            await trainer.fit(loader, epochs=FOREVER, run_dir=tmp_path / "run", callbacks=[expire])
    reached = trainer.state
    (latest, *_) = checkpoint.find(tmp_path / "run")
    assert checkpoint.load(latest).state.digest() == reached.digest()
    steps = reached.step + 7
    resumed = await trainer.resume(tmp_path / "run", loader, epochs=FOREVER, steps=steps)
    whole = await trainer.fit(loader, epochs=FOREVER, steps=steps)
    assert resumed.state.digest() == whole.state.digest()
    assert resumed == whole


async def test_progress_tells_epoch_step_speed_and_what_is_left(trainer: at.Trainer, loader: at.Loader) -> None:
    async with trainer.start(loader, epochs=4, validate=loader.dataset) as run:
        begun = run.progress
        assert (begun.epoch, begun.step, begun.steps) == (1, 0, 20)
        assert np.isnan(begun.loss)
        await reach(run, 8)
        await run.pause()
        now = run.progress
        run.resume()
        await run.result()
        end = run.progress
    assert run.progress.samples_per_second == end.samples_per_second, "the rate of a run that has ended stays"
    assert now.step >= 8
    assert now.epoch == 1 + now.step // 5 or now.step % 5 == 0
    assert now.samples_per_second > 0
    assert now.eta is not None
    assert now.eta == pytest.approx((20 - now.step) * 36 / now.samples_per_second, rel=0.2)
    assert {"accuracy", "validation.loss", "validation.accuracy"} <= now.metrics.keys()
    assert (end.epoch, end.step, end.eta) == (4, 20, 0.0)
    assert end.loop_lag >= 0


# A source that lets the run wait


class Feed:
    """A source that gives what it is fed, with the labels 0 and 1 in turns, and otherwise lets others wait."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[int] = asyncio.Queue()
        stream = at.data.from_async_iterable(self._items(), classes=("dark", "bright", "glaring"))
        self.loader = at.StreamLoader(stream, batch_size=8, image_size=(12, 12), channels=1)

    def give(self, batches: int) -> None:
        for number in range(8 * batches):
            self._queue.put_nowait(number % 2)

    async def _items(self) -> AsyncIterator[tuple[Any, int]]:
        while True:
            label = await self._queue.get()
            yield np.full((12, 12), 200 * label, np.uint8), label


async def test_a_run_that_waits_for_its_next_batch_pauses_saves_and_stops_at_once(
    trainer: at.Trainer, tmp_path: Path
) -> None:
    feed = Feed()
    feed.give(2)
    async with asyncio.timeout(20), trainer.start(feed.loader, epochs=1, run_dir=tmp_path / "run") as run:
        await reach(run, 2)
        assert await run.pause() == 2
        assert (await run.checkpoint()).exists()
        feed.give(1)
        await asyncio.sleep(0.1)
        assert run.progress.step == 2, "it is paused"
        run.resume()
        await reach(run, 3)
        history = await run.stop()
        events = [event async for event in run]
    assert history.reason == "stopped"
    assert history.state.step == 3
    assert [event.step for event in events if isinstance(event, Paused | Resumed)] == [2, 2]
    assert checkpoint.load(checkpoint.find(tmp_path / "run")[0]).state.step == 3


async def test_a_run_that_waits_for_its_first_batch_can_be_stopped(trainer: at.Trainer) -> None:
    async with asyncio.timeout(20), trainer.start(Feed().loader, epochs=1) as run:
        history = await run.stop()
    assert history.reason == "stopped"
    assert history.state.step == 0


async def test_the_seconds_of_a_run_are_over_although_it_waits_for_a_batch(trainer: at.Trainer) -> None:
    feed = Feed()
    feed.give(1)
    async with asyncio.timeout(20):
        history = await trainer.fit(feed.loader, epochs=1, seconds=0.5)
    assert (history.reason, history.state.step) == ("finished", 1)


async def pause_amid_a_wait(trainer: at.Trainer, callback: Callable[[Event], None]) -> None:
    feed = Feed()
    feed.give(1)
    async with asyncio.timeout(20), trainer.start(feed.loader, epochs=1, callbacks=[callback]) as run:
        await reach(run, 1)
        await run.pause()
        await run.result()


async def test_an_error_of_a_callback_that_is_called_during_the_wait_is_the_runs(trainer: at.Trainer) -> None:
    def refuse(event: Event) -> None:
        if isinstance(event, Paused):
            raise ValueError("no pauses, please")

    with pytest.raises(ValueError, match="no pauses"):
        await pause_amid_a_wait(trainer, refuse)


async def test_a_callback_that_is_called_during_the_wait_cannot_wait_for_the_run(
    trainer: at.Trainer,
) -> None:
    feed = Feed()
    feed.give(1)
    refused: list[str] = []

    async def wait(event: Event) -> None:
        if isinstance(event, Paused):
            with pytest.raises(RuntimeError, match="a callback cannot wait for the run") as caught:
                await run.pause()
            refused.append(str(caught.value))

    async with asyncio.timeout(20), trainer.start(feed.loader, epochs=1, callbacks=[wait]) as run:
        await reach(run, 1)
        await run.pause()
        await run.stop()
    assert len(refused) == 1


# Listeners


async def test_of_three_listeners_one_that_never_reads_costs_no_memory_and_the_others_get_everything_in_order() -> None:
    log = EventLog(capacity=16)
    idle = log.follow()
    heard: list[list[Event]] = [[], []]

    async def listen(into: list[Event]) -> None:
        into.extend([event async for event in log.follow()])

    listeners = [asyncio.create_task(listen(into)) for into in heard]
    for step in range(1000):
        log.publish(Paused(step))
        if step % 10 == 9:
            await asyncio.sleep(0)
    log.end()
    await asyncio.gather(*listeners)
    assert heard[0] == heard[1] == [Paused(step) for step in range(1000)]
    assert [event.number for event in heard[0]] == list(range(1000))
    assert len(log._kept) == 16, "this is all that is kept, however far behind a listener is"
    first = await anext(idle)
    assert first == Missed(0, 983)
    assert [event.number for event in [event async for event in idle]] == list(range(984, 1000))


async def test_a_listener_that_catches_up_gives_the_loop_its_turns() -> None:
    log = EventLog()
    for step in range(200):
        log.publish(Paused(step))
    turns = most = held = 0

    async def beat() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    heart = asyncio.create_task(beat())
    last = turns
    log.end()
    async for _ in log.follow():
        time.sleep(0.0005)  # noqa: ASYNC251 (as long as it takes to write an event down for a client)
        held = held + 1 if turns == last else 1
        most, last = max(most, held), turns
    heart.cancel()
    assert turns > 50
    assert most < 10


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_loop_that_ends_with_a_run_under_way_ends_and_the_run_is_saved(
    tmp_path: Path, model: at.Model, loader: at.Loader, make_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    begun = asyncio.Event()

    def hear(event: Event) -> None:
        if isinstance(event, StepEnd):
            begun.set()

    async def train() -> None:
        async with at.ThreadExecutor(1) as executor:
            trainer = at.Trainer(model, optimizer=at.optim.sgd(0.1), executor=executor)
            await trainer.fit(loader, epochs=10**6, run_dir=tmp_path / "run", callbacks=[hear])

    async def leave() -> asyncio.Task[None]:
        training = asyncio.create_task(train())
        await begun.wait()
        return training

    with asyncio.Runner(loop_factory=make_loop) as runner:
        training = runner.run(leave())
    assert training.cancelled()
    assert History.load(tmp_path / "run").reason == "cancelled"


async def test_stopping_a_run_that_was_cancelled_gives_its_history(trainer: at.Trainer, loader: at.Loader) -> None:
    async with trainer.start(loader, epochs=10**6) as run:
        await reach(run, 1)
        await run.cancel()
        assert (await run.stop()).reason == "cancelled"


async def test_a_listener_that_never_reads_does_not_slow_the_training(trainer: at.Trainer, loader: at.Loader) -> None:
    async with trainer.start(loader, epochs=10) as run:
        idle = run.events()
        assert (await anext(idle)).number == 0

        async def listen() -> list[Event]:
            return [event async for event in run]

        first, second = await asyncio.gather(listen(), listen())
        assert (await run.result()).reason == "finished"
        rest = [event async for event in idle]
    assert first == second == [first[0], *rest]
    assert [event.number for event in first] == list(range(len(first)))


# Snapshots


async def test_predictions_of_snapshots_while_it_trains_are_those_of_a_stopped_copy_of_their_step(
    trainer: at.Trainer, loader: at.Loader, blobs: at.ArrayDataset, model: at.Model
) -> None:
    images = [blobs[number].source.read() for number in range(6)]
    answers: dict[int, Any] = {}
    async with trainer.start(loader, epochs=FOREVER) as run:
        while len(answers) < 20:
            await reach(run, run.state.step + 1)
            classifier, step = run.snapshot(), run.state.step
            answers[step] = await classifier.predict(images)
        await run.stop()
    for step in sorted(answers)[::5]:
        stopped = (await trainer.fit(loader, epochs=FOREVER, steps=step)).state
        copy = at.Classifier.from_state(model, stopped, classes=loader.classes)
        assert await copy.predict(images) == answers[step]


@pytest.mark.one_loop
async def test_twenty_predictions_a_second_leave_the_training_most_of_its_speed(
    trainer: at.Trainer, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    image = blobs[0].source.read()

    async def ask(run: at.Run) -> None:
        while True:
            await run.snapshot().predict(image)
            await asyncio.sleep(0.05)

    async def steps_in_a_second(asking: bool) -> int:
        async with trainer.start(loader, epochs=FOREVER) as run, asyncio.TaskGroup() as group:
            await reach(run, 5)
            asker = group.create_task(ask(run)) if asking else None
            before = run.state.step
            await asyncio.sleep(1)
            done = run.state.step - before
            if asker is not None:
                asker.cancel()
            await run.stop()
        return done

    rates = [await steps_in_a_second(asking) for asking in (False, True, False, True)]
    assert max(rates[1::2]) > 0.4 * min(rates[::2]), f"steps with and without predictions: {rates}"


# Several at once


async def test_two_runs_at_once_in_one_loop_on_one_executor_end_with_what_they_have_alone(
    model: at.Model, executor: at.ThreadExecutor, loader: at.Loader, tmp_path: Path
) -> None:
    def make(seed: int) -> at.Trainer:
        return at.Trainer(model, optimizer=at.optim.adamw(1e-2), executor=executor, microbatch=12, seed=seed)

    alone = [await make(seed).fit(loader, epochs=3) for seed in (1, 2)]
    both = await asyncio.gather(
        *(make(seed).fit(loader, epochs=3, run_dir=tmp_path / str(seed), saving=Saving(steps=2)) for seed in (1, 2))
    )
    assert both == alone
    assert [history.state.digest() for history in both] == [history.state.digest() for history in alone]


# Callbacks


async def test_an_error_in_a_callback_is_the_runs_and_the_state_before_it_is_saved(
    trainer: at.Trainer, loader: at.Loader, tmp_path: Path
) -> None:
    async def fail(event: Event) -> None:
        if isinstance(event, StepEnd) and event.step == 3:
            raise LookupError("a callback's own")

    with pytest.raises(LookupError, match="a callback's own"):
        await trainer.fit(loader, epochs=2, run_dir=tmp_path / "run", callbacks=[fail])
    assert checkpoint.load(checkpoint.find(tmp_path / "run")[0]).state.step == 3
    resumed = await trainer.resume(tmp_path / "run", loader, epochs=2)
    assert resumed == await trainer.fit(loader, epochs=2)


async def test_callbacks_hear_every_event_that_listeners_hear(
    trainer: at.Trainer, loader: at.Loader, tmp_path: Path
) -> None:
    heard: list[Event] = []
    async with trainer.start(
        loader, epochs=2, validate=loader.dataset, run_dir=tmp_path / "run", callbacks=[heard.append]
    ) as run:
        told = [event async for event in run]
    assert sorted(heard, key=lambda event: event.number) == told
