"""A run, from outside: what it learns, tells, refuses, and leaves."""

from __future__ import annotations

import asyncio
import json
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info

import asynctrain as at
from asynctrain.errors import DecodeError, DivergenceError
from asynctrain.executors import Executor
from asynctrain.train.events import EpochEnd, Event, RunEnd, RunStart, StepEnd


def trainer(model: at.Model, executor: Executor, **arguments: Any) -> at.Trainer:
    return at.Trainer(
        model, **{"optimizer": at.optim.adamw(1e-2), "executor": executor, "microbatch": 12, "seed": 3, **arguments}
    )


@pytest.fixture(scope="module")
def digests() -> dict[str, str]:
    """Digests that all tests of this module must agree on, over both event loops."""
    return {}


HOMES: dict[str, Callable[[], Executor]] = {
    "inline": at.InlineExecutor,
    **{
        f"{workers} threads by {split}": lambda workers=workers, split=split: at.ThreadExecutor(workers, split=split)  # type: ignore[misc]
        for workers in (1, 2, 3)
        for split in ("microbatches", "layers")
    },
}


@pytest.mark.parametrize("home", HOMES)
async def test_the_same_seed_gives_the_same_parameters_from_every_home_and_loop(
    home: str, model: at.Model, loader: at.Loader, digests: dict[str, str]
) -> None:
    async with HOMES[home]() as executor:
        history = await trainer(model, executor).fit(loader, epochs=3)
    assert digests.setdefault("fit", history.state.digest()) == history.state.digest()


async def test_another_seed_gives_other_parameters(model: at.Model, loader: at.Loader) -> None:
    async with at.ThreadExecutor(2) as executor:
        states = [(await trainer(model, executor, seed=seed).fit(loader, epochs=1)).state for seed in (3, 4)]
    assert states[0].digest() != states[1].digest()


async def test_it_learns_what_can_be_learned_from_files(model: at.Model, blob_folder: Path) -> None:
    train, held_out = at.ImageFolder(blob_folder).split(0.8, seed=0)
    loader = at.Loader(train, batch_size=16, image_size=(12, 12), channels=1)
    async with at.ThreadExecutor() as executor:
        learning = trainer(model, executor)
        history = await learning.fit(loader, epochs=6, validate=held_out)
        evaluation = await learning.evaluate(loader.evaluating(held_out))
    assert evaluation.accuracy == 1.0
    assert history.epochs[-1].validation == evaluation
    assert history.epochs[-1].loss < history.epochs[0].loss / 2


async def test_events_tell_the_run_in_order(model: at.Model, loader: at.Loader) -> None:
    async with at.ThreadExecutor(2) as executor, trainer(model, executor).start(loader, epochs=2) as run:
        events: list[Event] = [event async for event in run]
        history = await run.result()
    kinds = [type(event) for event in events]
    assert kinds == [RunStart, *[StepEnd] * 5, EpochEnd, *[StepEnd] * 5, EpochEnd, RunEnd]
    start, end = events[0], events[-1]
    assert isinstance(start, RunStart)
    assert (start.epochs, start.steps, start.samples_per_epoch) == (2, 10, 180)
    assert isinstance(end, RunEnd)
    assert (end.reason, end.step, end.error) == ("finished", 10, None)
    steps = [event for event in events if isinstance(event, StepEnd)]
    assert [(event.epoch, event.step) for event in steps] == [(1 + i // 5, i + 1) for i in range(10)]
    assert [event.samples for event in steps] == [40, 40, 40, 40, 20] * 2
    assert history.epochs == tuple(event for event in events if isinstance(event, EpochEnd))
    weighted = sum(event.loss * event.samples for event in steps[:5]) / 180
    assert history.epochs[0].loss == pytest.approx(weighted)


async def test_every_listener_gets_every_event(model: at.Model, loader: at.Loader) -> None:
    async def listen(run: at.Run) -> list[Event]:
        return [event async for event in run]

    async with at.ThreadExecutor(2) as executor, trainer(model, executor).start(loader, epochs=1) as run:
        first, second = await asyncio.gather(listen(run), listen(run))
        late = await listen(run)
    assert first == second == late


async def test_stop_ends_the_run_normally_after_the_step_it_is_in(model: at.Model, loader: at.Loader) -> None:
    async with at.ThreadExecutor(2) as executor, trainer(model, executor).start(loader, epochs=1000) as run:
        async for event in run:
            if isinstance(event, StepEnd) and event.step == 7:
                history = await run.stop()
                break
    assert history.reason == "stopped"
    assert history.state.step in (7, 8)


async def test_a_run_goes_on_from_a_state_to_the_bits_of_one_that_never_stopped(
    model: at.Model, loader: at.Loader
) -> None:
    async with at.ThreadExecutor(2) as executor, at.InlineExecutor() as inline:
        whole = await trainer(model, executor).fit(loader, epochs=3)
        async with trainer(model, executor).start(loader, epochs=3) as run:
            async for event in run:
                if isinstance(event, StepEnd) and event.step == 6:
                    break
            half = await run.stop()
        rest = await trainer(model, inline).fit(loader, epochs=3, state=half.state)
    assert 0 < half.state.cursor.position < 180, "it was stopped in the middle of an epoch"
    assert rest.state.digest() == whole.state.digest()
    assert rest == whole, "the history is whole as well"


@pytest.mark.parametrize("epochs", [(1, 3), (3, 1)], ids=["first ends first", "second ends first"])
async def test_two_runs_at_once_on_one_executor_have_the_bits_they_have_alone_and_give_blas_its_threads_back(
    model: at.Model, loader: at.Loader, epochs: tuple[int, int]
) -> None:
    before = blas_threads()
    async with at.ThreadExecutor(2) as executor:
        alone = [await trainer(model, executor, seed=s).fit(loader, epochs=n) for s, n in enumerate(epochs)]
        both = await asyncio.gather(
            *(trainer(model, executor, seed=s).fit(loader, epochs=n) for s, n in enumerate(epochs))
        )
        assert blas_threads() == before
    assert [history.state.digest() for history in both] == [history.state.digest() for history in alone]


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


async def test_what_the_user_is_handed_is_read_only_and_his_own(model: at.Model, loader: at.Loader) -> None:
    async with at.ThreadExecutor(2) as executor, trainer(model, executor).start(loader, epochs=2) as run:
        async for event in run:
            if isinstance(event, StepEnd) and event.step == 2:
                break
        state = run.state
        digest = state.digest()
        await run.result()
        assert state.digest() == digest
        with pytest.raises(ValueError, match="read-only"):
            state.params["dense1/weight"][0, 0] = 1.0


async def test_nothing_in_a_run_from_files_blocks_the_loop(
    model: at.Model, blob_folder: Path, tmp_path: Path, no_blocking_calls: None
) -> None:
    folder = await asyncio.to_thread(at.ImageFolder, blob_folder)
    loader = at.Loader(folder, batch_size=16, image_size=(12, 12), channels=1)
    async with at.ThreadExecutor(2) as executor:
        await trainer(model, executor).fit(loader, epochs=1, validate=folder, run_dir=tmp_path / "run")


async def test_the_run_folder_holds_configuration_history_and_a_model_that_predicts(
    model: at.Model, loader: at.Loader, blobs: at.ArrayDataset, tmp_path: Path
) -> None:
    async with at.ThreadExecutor(2) as executor:
        history = await trainer(model, executor).fit(loader, epochs=4, validate=blobs, run_dir=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(len(lines)))
    counts = Counter(line["event"] for line in lines)
    assert (counts["StepEnd"], counts["Evaluation"], counts["EpochEnd"]) == (20, 4, 4)
    assert counts["CheckpointSaved"] >= 1, "at the end, and before that as soon as the one before it is written"
    assert lines[-1]["event"] == "RunEnd"
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert at.Model.from_json(config["program"]["architecture"]) == model
    classifier = at.Classifier.load(tmp_path / "run" / "model.safetensors")
    image = blobs[1].source.read()
    assert (await classifier.predict(image)).label == "middle"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "config.toml",
        "history.jsonl",
        "model.safetensors",
    ]
    assert history.reason == "finished"


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_is(
    model: at.Model, loader: at.Loader, tmp_path: Path
) -> None:
    async with at.ThreadExecutor(2) as executor:
        await trainer(model, executor).fit(loader, epochs=1, run_dir=tmp_path)
        before = content(tmp_path)
        with pytest.raises(FileExistsError, match="run_dir must be a folder without a run in it"):
            await trainer(model, executor).fit(loader, epochs=1, run_dir=tmp_path)
    assert content(tmp_path) == before


async def test_a_broken_image_ends_the_run_with_its_name_and_leaves_the_last_state(
    model: at.Model, blob_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    for name in ("top", "middle"):
        (folder / name).mkdir(parents=True)
        for path in (blob_folder / name).iterdir():
            (folder / name / path.name).write_bytes(path.read_bytes())
    broken = folder / "top" / "zzz.png"
    broken.write_bytes(b"no image")
    loader = at.Loader(at.ImageFolder(folder), batch_size=16, image_size=(12, 12), channels=1, shuffle=False)
    async with at.ThreadExecutor(2) as executor:
        learning = trainer(model, executor)
        with pytest.raises(DecodeError, match=r"zzz\.png") as caught:
            await learning.fit(loader, epochs=1, run_dir=tmp_path / "run")
    assert caught.value.path == str(broken)
    assert learning.state.step == 7, "the batches before the broken image's own were applied"
    assert json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[-1])["reason"] == "failed"


async def test_divergence_is_an_error_that_leaves_the_state_before_it(model: at.Model, loader: at.Loader) -> None:
    async with at.ThreadExecutor(2) as executor:
        learning = trainer(model, executor, optimizer=at.optim.sgd(1e12))
        with pytest.raises(DivergenceError):
            await learning.fit(loader, epochs=5)
    assert np.isfinite(learning.state.params.vector).all()


async def test_an_error_nobody_listened_to_is_raised_when_the_block_is_left(model: at.Model, loader: at.Loader) -> None:
    async with at.ThreadExecutor(2) as executor:
        with pytest.raises(DivergenceError):
            async with trainer(model, executor, optimizer=at.optim.sgd(1e12)).start(loader, epochs=5) as run:
                await asyncio.wait([run.task])


async def test_an_error_in_the_block_passes_through_bare_and_ends_the_run(model: at.Model, loader: at.Loader) -> None:
    async with at.ThreadExecutor(2) as executor:
        with pytest.raises(LookupError, match="the user's own"):
            async with trainer(model, executor).start(loader, epochs=1000) as run:
                raise LookupError("the user's own")
    assert run.task.done()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"microbatch": 0}, "microbatch must be at least 1, got 0"),
        ({"dtype": "float16"}, "dtype must be 'float32' or 'float64', got 'float16'"),
        ({"seed": -1}, "seed must be between 0"),
        ({"loss": "nll"}, "nll"),
    ],
)
def test_wrong_arguments_of_a_trainer_are_named(model: at.Model, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(model, at.InlineExecutor(), **arguments)


async def test_model_and_images_that_do_not_fit_are_told_apart(model: at.Model, blobs: at.ArrayDataset) -> None:
    wrong = at.Loader(blobs, image_size=(28, 28), channels=3)
    with pytest.raises(
        ValueError, match=r"the model takes images of shape \(12, 12, 1\), the loader delivers \(28, 28, 3\)"
    ):
        await trainer(model, at.InlineExecutor()).fit(wrong, epochs=1)
    small = at.nn.models.linear(num_classes=2, image_shape=(12, 12, 1))
    loader = at.Loader(blobs, image_size=(12, 12), channels=1)
    with pytest.raises(ValueError, match=r"outputs of shape \(2,\) for the 3 classes"):
        await trainer(small, at.InlineExecutor()).fit(loader, epochs=1)


async def test_epochs_below_one_and_a_second_run_of_one_trainer_are_refused(model: at.Model, loader: at.Loader) -> None:
    learning = trainer(model, at.InlineExecutor())
    with pytest.raises(ValueError, match="epochs must be above 0, got 0"):
        await learning.fit(loader, epochs=0)
    async with learning.start(loader, epochs=1):
        with pytest.raises(RuntimeError, match="has a run under way"):
            await learning.fit(loader, epochs=1)


@pytest.mark.anyio
async def test_a_misspelt_option_is_refused_and_not_left_out(model: at.Model, loader: at.Loader) -> None:
    with pytest.raises(TypeError, match=r"options must be among epochs, .*; got validation"):
        await trainer(model, at.InlineExecutor()).fit(loader, epochs=1, validation=loader)  # type: ignore[call-arg]


@pytest.mark.anyio
async def test_a_run_under_way_has_no_history_yet(model: at.Model, loader: at.Loader) -> None:
    async with trainer(model, at.InlineExecutor()).start(loader, epochs=1) as run:
        with pytest.raises(RuntimeError, match="at its end"):
            run.history()


def function_of_the_step(factor: float) -> Callable[[int], float]:
    def rate(step: int) -> float:
        return factor / (step + 1)

    return rate


@pytest.mark.anyio
async def test_a_run_with_a_schedule_of_ones_own_is_resumed_by_another_process(
    model: at.Model, loader: at.Loader, tmp_path: Path
) -> None:
    def make(executor: Executor) -> at.Trainer:  # each function has an address of its own, as in another process
        return trainer(model, executor, optimizer=at.optim.sgd(function_of_the_step(0.1)))

    executor = at.InlineExecutor()
    whole = await make(executor).fit(loader, steps=5)
    await make(executor).fit(loader, steps=3, run_dir=tmp_path / "run")
    resumed = await make(executor).resume(tmp_path / "run", loader, steps=5)
    assert resumed.state.digest() == whole.state.digest()


@pytest.mark.anyio
@pytest.mark.parametrize("verb", ["pause", "stop", "result", "checkpoint"])
async def test_a_callback_that_would_wait_for_the_run_for_ever_is_told_so(
    verb: str, model: at.Model, loader: at.Loader, tmp_path: Path
) -> None:
    runs: list[at.Run] = []

    async def ask(event: Event) -> None:
        if isinstance(event, StepEnd):
            await getattr(runs[0], verb)()

    async def train() -> None:
        start = trainer(model, at.InlineExecutor()).start(loader, epochs=1, callbacks=[ask], run_dir=tmp_path / "run")
        async with asyncio.timeout(10), start as run:
            runs.append(run)
            await run.result()

    with pytest.raises(RuntimeError, match="a callback cannot wait for the run"):
        await train()


@pytest.mark.anyio
@pytest.mark.parametrize("wrong", [[5], [0, 5, 59]], ids=["one", "in all microbatches"])
@pytest.mark.parametrize("where", ["training", "validation"])
async def test_a_bad_label_is_the_one_error_of_the_run_and_no_group(
    wrong: list[int], where: str, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    images, labels = blobs.images[:60], blobs.labels[:60].copy()
    bad = at.ArrayDataset(images, labels, blobs.classes)
    bad.labels[wrong] = 7
    over = at.Loader(bad, batch_size=60, image_size=(12, 12), channels=1, shuffle=False)
    async with at.ThreadExecutor(2) as executor:
        training, validation = (over, None) if where == "training" else (loader, over)
        with pytest.raises(ValueError, match="labels must be") as caught:
            await trainer(model, executor).fit(training, epochs=1, validate=validation)
    assert not isinstance(caught.value, ExceptionGroup)
