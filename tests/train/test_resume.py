"""Going on from a checkpoint: to the same bits, or with an error that says what differs."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import asynctrain as at
from asynctrain.data import images
from asynctrain.errors import CheckpointError, FingerprintError
from asynctrain.executors import Executor
from asynctrain.train import checkpoint
from asynctrain.train.controllers import EarlyStopping, ReduceOnPlateau
from asynctrain.train.events import Event, Resumed, RunStart, StepEnd
from asynctrain.train.recorded import RecordedRun
from asynctrain.train.saving import Saving

pytestmark = pytest.mark.one_loop

EPOCHS = 4
STOPPED_AT = 8  # steps, in the second epoch


HOLDING = """
import os, sys, time
from pathlib import Path
from asynctrain.train.run_folder import RunFolder
held = RunFolder(Path(sys.argv[1])).hold()
if os.fork() == 0:  # as in a pool, whose workers a killed program leaves behind
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def make(model: at.Model, executor: Executor, **arguments: Any) -> at.Trainer:
    optimizer = at.optim.average_weights(at.optim.adamw(1e-2), 0.9)
    return at.Trainer(model, **{"optimizer": optimizer, "executor": executor, "microbatch": 12, "seed": 3, **arguments})


def asked(blobs: at.ArrayDataset, **options: Any) -> Any:
    return {
        "epochs": EPOCHS,
        "validate": blobs,
        "controllers": [EarlyStopping(patience=3), ReduceOnPlateau("loss", patience=1)],
        "saving": Saving(steps=3, seconds=None),
        **options,
    }


async def interrupted(model: at.Model, loader: at.Loader, blobs: at.ArrayDataset, run_dir: Path) -> None:
    """Leave a run that was cancelled in its second epoch."""
    async with (
        at.ThreadExecutor(2) as executor,
        make(model, executor).start(loader, **asked(blobs, run_dir=run_dir)) as run,
    ):
        async for event in run:
            if isinstance(event, StepEnd) and event.step == STOPPED_AT:
                break


@pytest.fixture
async def run_dir(model: at.Model, loader: at.Loader, blobs: at.ArrayDataset, tmp_path: Path) -> Path:
    await interrupted(model, loader, blobs, tmp_path / "run")
    return tmp_path / "run"


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_on_another_home_with_another_number_of_workers_it_ends_with_the_same_bits_and_history(
    run_dir: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    async with at.ThreadExecutor(3) as executor, at.InlineExecutor() as inline:
        whole = await make(model, inline).fit(loader, **asked(blobs))
        resumed = await make(model, executor).resume(run_dir, loader, **asked(blobs))
    assert resumed.state.digest() == whole.state.digest()
    for slot, arrays in whole.state.optimizer_state.items():
        np.testing.assert_array_equal(resumed.state.optimizer_state[slot].vector, arrays.vector)
    assert resumed == whole
    assert resumed.state.controllers == whole.state.controllers


async def test_events_go_on_in_the_same_file_under_new_numbers_and_can_be_heard_from_the_first(
    run_dir: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    before = lines(run_dir)
    async with (
        at.ThreadExecutor(2) as executor,
        make(model, executor).start(loader, **asked(blobs, resume=run_dir)) as run,
    ):
        events: list[Event] = [event async for event in run]
        later = [event async for event in run.events(len(before))]
    assert lines(run_dir)[: len(before)] == before
    assert [event.number for event in events] == list(range(len(lines(run_dir))))
    assert later == events[len(before) :]
    assert isinstance(later[0], RunStart)
    (resumed,) = (event for event in later if isinstance(event, Resumed))
    assert resumed.attempt == 2
    steps = [event for event in later if isinstance(event, StepEnd)]
    assert [event.step for event in steps] == list(range(resumed.step + 1, EPOCHS * 5 + 1))
    assert {event.attempt for event in steps} == {2}


def lines(run_dir: Path) -> list[str]:
    return (run_dir / "history.jsonl").read_text().splitlines()


async def test_it_goes_on_after_a_last_line_of_the_events_that_a_crash_has_torn(
    run_dir: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    with (run_dir / "history.jsonl").open("a") as file:
        file.write('{"event": "StepEnd", "numb')
    async with at.ThreadExecutor(2) as executor:
        await make(model, executor).resume(run_dir, loader, **asked(blobs))
    numbers = [json.loads(line)["number"] for line in lines(run_dir)]
    assert numbers == list(range(len(numbers)))


async def test_a_run_that_has_finished_can_be_resumed_and_has_nothing_left_to_do(
    run_dir: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    async with at.ThreadExecutor(2) as executor:
        finished = await make(model, executor).resume(run_dir, loader, **asked(blobs))
        again = await make(model, executor).resume(run_dir, loader, **asked(blobs))
    assert again.state.digest() == finished.state.digest()
    assert again.events == finished.events


async def test_a_run_can_go_on_in_a_new_folder_and_leaves_the_old_one_as_it_is(
    run_dir: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset, tmp_path: Path
) -> None:
    before = content(run_dir)
    async with at.ThreadExecutor(2) as executor:
        history = await make(model, executor).resume(run_dir, loader, **asked(blobs, run_dir=tmp_path / "other"))
        whole = await make(model, executor).fit(loader, **asked(blobs))
    assert history == whole
    assert content(run_dir) == before
    assert (tmp_path / "other" / "model.safetensors").exists()


async def test_an_earlier_checkpoint_can_be_gone_on_from_and_what_is_saved_then_stays(
    run_dir: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    latest, earlier = checkpoint.find(run_dir)
    saving = Saving(seconds=None, epochs=False, keep=1)
    async with (
        at.ThreadExecutor(2) as executor,
        make(model, executor).start(loader, **asked(blobs, resume=earlier, saving=saving)) as run,
    ):
        path = await run.checkpoint()
        assert path < latest
        assert checkpoint.load(path).state.attempt == 2
        await run.cancel()


async def test_a_run_is_begun_where_there_is_none_and_gone_on_with_where_there_is_one(
    model: at.Model, loader: at.Loader, blobs: at.ArrayDataset, tmp_path: Path
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)  # a crash may leave as little
    options = asked(blobs, run_dir=tmp_path / "run", resume=True)
    async with at.ThreadExecutor(2) as executor:
        async with make(model, executor).start(loader, **options) as run:
            async for event in run:
                if isinstance(event, StepEnd) and event.step == STOPPED_AT:
                    break
        history = await make(model, executor).fit(loader, **options)
        assert history == await make(model, executor).fit(loader, **asked(blobs))
        assert history.state.attempt == 2
        with pytest.raises(ValueError, match="run_dir must be given where resume is True"):
            await make(model, executor).fit(loader, **asked(blobs, resume=True))


async def test_a_folder_has_one_run_at_a_time_and_a_killed_process_holds_none(
    model: at.Model, loader: at.Loader, blobs: at.ArrayDataset, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    async with at.ThreadExecutor(1) as executor:
        async with make(model, executor).start(loader, **asked(blobs, run_dir=run_dir, epochs=10**6)) as run:
            await run.checkpoint()
            with pytest.raises(CheckpointError, match=r"run: another run is under way in this folder$"):
                await make(model, executor).resume(run_dir, loader, **asked(blobs))
            elsewhere = await make(model, executor).resume(run_dir, loader, **asked(blobs, run_dir=tmp_path / "other"))
            assert elsewhere.state.step >= 1
        holder = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOLDING, run_dir, stdout=asyncio.subprocess.PIPE
        )
        assert holder.stdout is not None
        child = int(await holder.stdout.readline())
        with pytest.raises(CheckpointError, match="another run is under way"):
            await make(model, executor).resume(run_dir, loader, **asked(blobs))
        holder.kill()
        await holder.wait()
        assert (await make(model, executor).resume(run_dir, loader, **asked(blobs))).reason == "finished"
        os.kill(child, signal.SIGKILL)
        await holder.communicate()


async def test_a_checkpoint_that_was_damaged_is_passed_over_with_a_warning(
    run_dir: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset, caplog: pytest.LogCaptureFixture
) -> None:
    latest = checkpoint.find(run_dir)[0]
    latest.write_bytes(latest.read_bytes()[:-100])
    async with at.ThreadExecutor(2) as executor:
        history = await make(model, executor).resume(run_dir, loader, **asked(blobs))
        assert history.state.digest() == (await make(model, executor).fit(loader, **asked(blobs))).state.digest()
        for path in checkpoint.find(run_dir):
            path.write_bytes(b"")
        with pytest.raises(CheckpointError, match="whole safetensors file"):
            await make(model, executor).resume(run_dir, loader, **asked(blobs))
    assert f"a checkpoint is passed over: {latest}: " in caplog.text


async def test_a_checkpoint_outside_of_a_run_folder_can_be_gone_on_from_and_nothing_is_written_beside_it(
    run_dir: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset, tmp_path: Path
) -> None:
    alone = tmp_path / "a" / "b" / "copy.safetensors"
    alone.parent.mkdir(parents=True)
    shutil.copy(checkpoint.find(run_dir)[0], alone)
    async with at.ThreadExecutor(2) as executor:
        history = await make(model, executor).resume(alone, loader, **asked(blobs))
        whole = await make(model, executor).fit(loader, **asked(blobs))
    assert history == whole
    assert list(content(tmp_path / "a")) == [alone]


Changed = Callable[[at.Model, at.ArrayDataset], tuple[at.Model, dict[str, Any], dict[str, Any]]]

OTHERS: dict[str, tuple[str, Changed]] = {
    "model": (
        r"architecture\.layers is .* there and .* here",
        lambda model, blobs: (at.models.linear(num_classes=3, image_shape=(12, 12, 1)), {}, {}),
    ),
    "optimizer": (
        "optimizer is .* there and .* here",
        lambda model, blobs: (model, {"optimizer": at.optim.adamw(1e-2)}, {}),
    ),
    "learning rate": (
        r"optimizer\.(optimizer\.)?learning_rate is 0\.01 there and 0\.02 here",
        lambda model, blobs: (model, {"optimizer": at.optim.average_weights(at.optim.adamw(2e-2), 0.9)}, {}),
    ),
    "seed": ("seed is 3 there and 4 here", lambda model, blobs: (model, {"seed": 4}, {})),
    "dtype": ('dtype is "float32" there and "float64" here', lambda model, blobs: (model, {"dtype": "float64"}, {})),
    "microbatch": ("microbatch is 12 there and 13 here", lambda model, blobs: (model, {"microbatch": 13}, {})),
    "batch size": ("batch_size is 40 there and 20 here", lambda model, blobs: (model, {}, {"batch_size": 20})),
    "loader seed": ("loader_seed is 0 there and 1 here", lambda model, blobs: (model, {}, {"seed": 1})),
    "order": (r"order\.shuffle is true there and false here", lambda model, blobs: (model, {}, {"shuffle": False})),
    "augmentation": (
        "augment is null there and .* here",
        lambda model, blobs: (model, {}, {"augment": at.augment.standard()}),
    ),
    "samples": (
        "samples is 180 there and 144 here",
        lambda model, blobs: (model, {}, {"dataset": blobs.split(0.8, seed=0)[0]}),
    ),
}


@pytest.mark.parametrize("other", OTHERS)
async def test_what_would_give_other_bits_is_refused_and_named(
    other: str, run_dir: Path, model: at.Model, blobs: at.ArrayDataset
) -> None:
    told, change = OTHERS[other]
    changed, of_trainer, of_loader = change(model, blobs)
    dataset = of_loader.pop("dataset", blobs)
    loader = at.Loader(dataset, **{"batch_size": 40, "image_size": (12, 12), "channels": 1, **of_loader})
    before = content(run_dir)
    with pytest.raises(CheckpointError, match=told) as caught:
        await make(changed, at.InlineExecutor(), **of_trainer).resume(run_dir, loader, **asked(blobs))
    assert caught.value.path == str(checkpoint.find(run_dir)[0])
    assert content(run_dir) == before


async def test_another_machine_is_refused_unless_close_bits_will_do(
    run_dir: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = at.numeric_fingerprint
    monkeypatch.setattr("asynctrain.train.trainer.numeric_fingerprint", lambda *of: here(*of) | {"blas": "another 1.0"})
    async with at.ThreadExecutor(2) as executor:
        with pytest.raises(FingerprintError, match=r"blas is 'another 1\.0' here"):
            await make(model, executor).resume(run_dir, loader, **asked(blobs))
        history = await make(model, executor).resume(run_dir, loader, **asked(blobs, bits="close"))
    assert history.state.step == EPOCHS * 5


async def test_another_version_of_the_decoder_is_refused_and_named_unless_close_bits_will_do(
    run_dir: Path, model: at.Model, blobs: at.ArrayDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = images.decoder_fingerprint
    other_jpeg = {"jpeg": "libjpeg 9.9"}
    monkeypatch.setattr("asynctrain.data.loader.decoder_fingerprint", lambda settings: here(settings) | other_jpeg)
    other = at.Loader(blobs, batch_size=40, image_size=(12, 12), channels=1)
    async with at.ThreadExecutor(2) as executor:
        with pytest.raises(FingerprintError, match=r"jpeg is 'libjpeg 9\.9' here") as caught:
            await make(model, executor).resume(run_dir, other, **asked(blobs))
        assert set(caught.value.differences) == {"jpeg"}
        history = await make(model, executor).resume(run_dir, other, **asked(blobs, bits="close"))
    assert history.state.step == EPOCHS * 5


async def test_another_decoder_is_refused_and_named(run_dir: Path, model: at.Model, blobs: at.ArrayDataset) -> None:
    other = at.Loader(blobs, batch_size=40, image_size=(12, 12), channels=1, decoder="imagecodecs")
    with pytest.raises(FingerprintError, match="decoder is 'imagecodecs' here and 'pillow' there"):
        await make(model, at.InlineExecutor()).resume(run_dir, other, **asked(blobs))


async def test_a_run_killed_before_its_first_checkpoint_begins_anew_in_its_folder_under_the_next_numbers(
    run_dir: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    for path in [*checkpoint.find(run_dir), run_dir / "model.safetensors"]:
        path.unlink()
    before, config = lines(run_dir), (run_dir / "config.toml").read_text()
    async with at.ThreadExecutor(2) as executor:
        optimizer = at.optim.average_weights(at.optim.adamw(2e-2), 0.9)
        with pytest.raises(CheckpointError, match=r"learning_rate is 0\.01 there and 0\.02 here") as caught:
            await make(model, executor, optimizer=optimizer).resume(run_dir, loader, **asked(blobs))
        assert caught.value.path == str(run_dir / "config.toml")
        with pytest.raises(CheckpointError, match="microbatch is 12 there and 6 here"):
            await make(model, executor, microbatch=6).resume(run_dir, loader, **asked(blobs))
        whole = await make(model, executor).fit(loader, **asked(blobs))
        resumed = await make(model, executor).resume(run_dir, loader, **asked(blobs))
    assert resumed == whole
    assert resumed.state.digest() == whole.state.digest()
    assert (run_dir / "config.toml").read_text() == config
    assert lines(run_dir)[: len(before)] == before
    events = [at.events.from_json(json.loads(line)) for line in lines(run_dir)]
    assert [event.number for event in events] == list(range(len(events)))
    (again,) = (event for event in events if isinstance(event, Resumed))
    assert (again.step, again.attempt) == (0, 2)


async def test_a_run_killed_before_its_first_event_begins_anew(
    run_dir: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    for path in checkpoint.find(run_dir):
        path.unlink()
    (run_dir / "history.jsonl").unlink()
    async with at.ThreadExecutor(2) as executor:
        resumed = await make(model, executor).resume(run_dir, loader, **asked(blobs))
    assert resumed.state.step == EPOCHS * 5
    assert [json.loads(line)["number"] for line in lines(run_dir)] == list(range(len(lines(run_dir))))


async def test_checkpoints_without_their_events_can_be_gone_on_from(
    run_dir: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    (run_dir / "history.jsonl").unlink()
    async with at.ThreadExecutor(2) as executor:
        whole = await make(model, executor).fit(loader, **asked(blobs))
        resumed = await make(model, executor).resume(run_dir, loader, **asked(blobs))
    assert resumed == whole
    told = [at.events.from_json(json.loads(line)) for line in lines(run_dir)]
    assert [event.number for event in told] == list(range(len(told)))
    assert [event.attempt for event in told if isinstance(event, Resumed)] == [2]


@pytest.mark.parametrize("broken", ['{"event": "StepEnd", "numb', '{"event": "Nonsense"}', "[]", "\udcff\0"])
async def test_a_corrupt_line_of_the_events_is_one_error_that_names_file_and_line(
    broken: str, run_dir: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    told = lines(run_dir)
    told[3] = broken
    (run_dir / "history.jsonl").write_text("\n".join(told) + "\n", errors="surrogateescape")
    before = content(run_dir)
    for read in (RecordedRun.read, at.History.load):
        with pytest.raises(CheckpointError, match="line 4 is no event"):
            read(run_dir)
    with pytest.raises(CheckpointError, match="line 4 is no event") as caught:
        await make(model, at.InlineExecutor()).resume(run_dir, loader, **asked(blobs))
    assert caught.value.path == str(run_dir / "history.jsonl")
    assert content(run_dir) == before


async def test_a_finished_run_resumed_with_fewer_epochs_tells_no_fewer_steps_than_it_has_done(
    run_dir: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    asking = asked(blobs, resume=run_dir, epochs=1)
    async with at.ThreadExecutor(2) as executor, make(model, executor).start(loader, **asking) as run:
        history = await run.result()
        new = [event async for event in run.events(run.first_event)]
        left = run.progress.eta
    assert isinstance(new[0], RunStart)
    assert (new[0].step, new[0].steps) == (STOPPED_AT, STOPPED_AT)
    assert not [event for event in new if isinstance(event, StepEnd)]
    assert left in (None, 0.0)
    assert history.state.step == STOPPED_AT


async def test_what_is_not_as_it_was_beside_the_training_is_told(
    run_dir: Path,
    model: at.Model,
    loader: at.Loader,
    blobs: at.ArrayDataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fewer, _ = blobs.split(0.5, seed=0)

    async def differences(**changed: Any) -> str:
        caplog.clear()
        options = asked(blobs, resume=run_dir, steps=STOPPED_AT, run_dir=tmp_path / str(changed.keys()), **changed)
        async with at.ThreadExecutor(2) as executor, make(model, executor).start(loader, **options) as run:
            (resumed,) = [event async for event in run if isinstance(event, Resumed)]
        assert at.events.from_json(at.events.to_json(resumed)).differences == resumed.differences  # type: ignore[union-attr]
        assert [record.args[0] for record in caplog.records if record.name == "asynctrain"] == list(resumed.differences)  # type: ignore[index]
        return "; ".join(resumed.differences)

    assert await differences() == ""
    assert re.search(r"validate\.samples is 180 there and \d+ here", await differences(validate=fewer))
    told = await differences(controllers=[EarlyStopping(patience=9), ReduceOnPlateau("loss", patience=1)])
    assert re.fullmatch(r"controllers\.early_stopping is .*patience=3.* there and .*patience=9.* here", told)
    assert await differences(validate_every=2) == "validate_every is null there and 2 here"
    assert (
        await differences(metrics=[at.metrics.TopK(2)])
        == 'metrics is [] there and ["TopK(k=2, ignore_index=None)"] here'
    )


async def test_other_labels_and_weights_of_the_same_number_of_samples_are_refused(
    run_dir: Path, model: at.Model, blobs: at.ArrayDataset
) -> None:
    def over(labels: Any, weights: Any = None) -> at.Loader:
        data = at.ArrayDataset(blobs.images, labels, blobs.classes, weights)
        return at.Loader(data, batch_size=40, image_size=(12, 12), channels=1)

    trainer = make(model, at.InlineExecutor())
    with pytest.raises(CheckpointError, match="labels is"):
        await trainer.resume(run_dir, over(blobs.labels[::-1]), **asked(blobs))
    with pytest.raises(CheckpointError, match="weights is null there"):
        await trainer.resume(run_dir, over(blobs.labels, np.full(180, 0.5)), **asked(blobs))


async def test_other_weights_of_a_sampler_are_refused(model: at.Model, blobs: at.ArrayDataset, tmp_path: Path) -> None:
    def drawing(weights: Any) -> at.Loader:
        return at.Loader(
            blobs, batch_size=40, image_size=(12, 12), channels=1, sampler=at.data.WeightedSampler(weights, seed=0)
        )

    trainer = make(model, at.InlineExecutor())
    await trainer.fit(drawing(np.ones(180)), steps=2, run_dir=tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"order\.first is"):
        await trainer.resume(tmp_path / "run", drawing(np.arange(180)), steps=3)


def test_a_checkpoint_with_any_bit_flipped_or_any_end_cut_off_is_refused(
    saved: tuple[Path, bytes], tmp_path: Path
) -> None:
    path, content = saved
    draw = random.Random(0)
    broken = tmp_path / path.name
    for place in [*range(0, 2000, 7), *(draw.randrange(len(content)) for _ in range(300))]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        broken.write_bytes(flipped)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(broken)
        assert caught.value.path == str(broken)
    for size in [0, 1, 7, 8, 9, *(draw.randrange(len(content)) for _ in range(100)), len(content) - 1]:
        broken.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            checkpoint.load(broken)


@pytest.fixture(scope="module")
def saved(blobs: at.ArrayDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Return a checkpoint, its path and its bytes."""
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    model = at.models.linear(num_classes=3, image_shape=(12, 12, 1))
    loader = at.Loader(blobs, batch_size=40, image_size=(12, 12), channels=1)
    asyncio.run(interrupted(model, loader, blobs, run_dir))
    path = checkpoint.find(run_dir)[0]
    return path, path.read_bytes()


class Trap:
    """Code that runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code from the file was run",)


def test_foreign_files_are_refused_and_no_code_from_them_is_run(tmp_path: Path) -> None:
    foreign = {
        "pickle": pickle.dumps(Trap()),
        "text": b"weights",
        "header only": (16).to_bytes(8, "little") + b'{"a":1}         ',
        "huge header": (2**62).to_bytes(8, "little") + b"{}",
    }
    for name, content in foreign.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="whole safetensors file"):
            checkpoint.load(path)


async def test_a_model_file_is_no_checkpoint_and_says_so(
    run_dir: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of the format"):
        await make(model, at.InlineExecutor()).resume(run_dir / "model.safetensors", loader, **asked(blobs))


async def test_a_folder_without_a_run_and_a_missing_path_are_told_apart(
    model: at.Model, loader: at.Loader, blobs: at.ArrayDataset, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="holds no run to go on with"):
        await make(model, at.InlineExecutor()).resume(tmp_path, loader, **asked(blobs))
    with pytest.raises(FileNotFoundError):
        await make(model, at.InlineExecutor()).resume(tmp_path / "none", loader, **asked(blobs))


FULL_DISK = """
import asyncio, json, resource, sys
from pathlib import Path
import numpy as np
import asynctrain as at
from asynctrain.train.events import CheckpointSaved
from asynctrain.train.saving import Saving

run_dir, limit = Path(sys.argv[1]), int(sys.argv[2])
images = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 1), dtype=np.uint8)
dataset = at.ArrayDataset(images, np.arange(40) % 2, classes=("a", "b"))
loader = at.Loader(dataset, batch_size=8, image_size=(8, 8), channels=1)
model = at.models.mlp(num_classes=2, image_shape=(8, 8, 1), hidden=(256,))
options = {"resume": run_dir} if run_dir.exists() else {"run_dir": run_dir}

def fill(event):
    if limit and isinstance(event, at.events.StepEnd) and event.step == 8:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

async def main():
    async with at.ThreadExecutor(2) as executor:
        trainer = at.Trainer(model, optimizer=at.optim.adamw(1e-2), executor=executor, microbatch=4)
        history = await trainer.fit(loader, epochs=6, saving=Saving(steps=5), callbacks=[fill], **options)
    print(history.state.digest())

try:
    asyncio.run(main())
except OSError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""


def test_a_full_disk_is_a_clear_error_that_leaves_the_earlier_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    def child(run_dir: Path, limit: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", FULL_DISK, str(run_dir), str(limit)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert hasattr(resource, "RLIMIT_FSIZE")
    whole = child(tmp_path / "whole", 0)
    full = child(tmp_path / "full", 50_000)
    assert full.returncode == 1
    file = tmp_path / "full" / "checkpoints" / "step-0000000010.safetensors"
    assert full.stderr == f"[Errno 27] File too large: '{file}'\n"
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["step-0000000005.safetensors"]
    resumed = child(tmp_path / "full", 0)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == whole.stdout
