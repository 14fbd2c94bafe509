"""``asynctrain train DIR``: from a folder of images to a model file."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import asynctrain as at
from asynctrain._aio import ServingGroup
from asynctrain.cli.folders import Data, open_data
from asynctrain.cli.homes import make_executor
from asynctrain.cli.output import people, percent, suggest, to_programs
from asynctrain.cli.progress import show
from asynctrain.cli.recipe import Recipe
from asynctrain.errors import AsyncTrainError
from asynctrain.train import checkpoint
from asynctrain.train.run_folder import MODEL, RunFolder


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training has come to.

    test_accuracy: of the weights it ended with, or None where these were not tested. seconds: of the run, evaluations
    included.
    """

    test_accuracy: float | None
    digest: str
    seconds: float
    images_per_second: float
    run_dir: str


async def train_folder(recipe: Recipe, run_dir: Path | None, resumed: Path | None, as_json: bool) -> None:
    """Train on the images of a folder and say what was reached and how to use it."""
    data = await asyncio.to_thread(open_data, recipe.folder, recipe.holdout, recipe.seed, recipe.image_size)
    run_dir = run_dir or (new_run_dir(recipe.folder) if resumed is None else run_dir_of(resumed))
    if resumed is None and RunFolder(run_dir).holds_run():
        raise ValueError(
            f"--out must be a folder without a run in it, and {run_dir} holds one; --resume {run_dir} goes on with that"
        )
    outcome = await train(data, recipe, run_dir, resumed)
    report(outcome)
    suggest("predict", Path(outcome.run_dir) / MODEL, str(data.test[0].source))
    if as_json:
        to_programs(asdict(outcome))


async def train(data: Data, recipe: Recipe, run_dir: Path, resumed: Path | None = None) -> Outcome:
    """Train and test as ``recipe`` says, showing the progress; ended early, say from where it can go on.

    Args:
        data: what to train on and test with.
        recipe: how.
        run_dir: the folder of the run; a new one, unless it is that of ``resumed``.
        resumed: a run folder or a checkpoint to go on from.
    """
    loader = recipe.make_loader(data.train, data.image_shape)
    epochs = recipe.epochs_for(loader.batches_per_epoch)
    model = at.models.get(recipe.model)(num_classes=len(loader.classes), image_shape=data.image_shape)
    chosen = replace(recipe, epochs=epochs, image_size=data.image_shape[0], lr=recipe.peak)
    async with make_executor(recipe.executor) as executor:
        trainer = at.Trainer(
            model,
            optimizer=recipe.make_optimizer(epochs * loader.batches_per_epoch),
            executor=executor,
            microbatch=recipe.microbatch,
            seed=recipe.seed,
            kernels=recipe.kernels,
        )
        async with trainer.start(
            loader,
            epochs=epochs,
            seconds=recipe.seconds,
            validate=data.test,
            metrics=recipe.make_metrics(len(loader.classes)),
            controllers=recipe.make_controllers(),
            saving=recipe.make_saving(),
            run_dir=run_dir,
            resume=resumed,
            config={"train": chosen.to_toml()},
        ) as run:
            await _to_its_end(run, run_dir)
            history = await run.result()
    return Outcome(
        test_accuracy=tested_accuracy(history),
        digest=history.state.digest(),
        seconds=history.seconds,
        images_per_second=history.samples_per_second,
        run_dir=str(run_dir),
    )


async def _to_its_end(run: at.Run, run_dir: Path) -> None:
    """Show the run until it ends; a cancellation reaches it in the same call, and a second one too while it saves."""
    try:
        async with ServingGroup() as group:
            shown = group.create_task(show(run.events(run.first_event), people), name="show-progress")
            await run.task
            await asyncio.wait([shown])
    except asyncio.CancelledError:
        _say_where(run_dir, "interrupted; {done}, {go_on}:")
        raise
    except (AsyncTrainError, OSError):
        _say_where(run_dir, "failed; {done}; when the cause is mended, {go_on}:")
        raise


def tested_accuracy(history: at.History) -> float | None:
    """Return what the test of the weights that the run ended with has found, if there was one."""
    state = history.state
    step = state.kept[state.restore].step if state.restore else state.step
    return next((tested.result.accuracy for tested in reversed(history.evaluations) if tested.step == step), None)


def new_run_dir(subject: Path) -> Path:
    """Return the path of a run folder that is named after ``subject``, what is trained on, and the time."""
    return Path("runs") / f"{subject.resolve().name}-{datetime.now():%Y%m%d-%H%M%S}"


def run_dir_of(resumed: Path) -> Path:
    """Return the run folder that ``resumed``, itself one or a checkpoint in one, belongs to."""
    return resumed.parent.parent if resumed.is_file() else resumed


def report(outcome: Outcome) -> None:
    """Tell people what was reached, and lead over to suggestions."""
    speed = f"{outcome.seconds:.1f} s, {outcome.images_per_second:,.0f} images/s"
    if outcome.test_accuracy is None:
        people.print(f"The training has ended before a test ({speed})", style="bold")
    else:
        people.print(f"{percent(outcome.test_accuracy)} of the test images are recognised ({speed})", style="bold")
    people.print(f"The run is in {outcome.run_dir}; next:", markup=False, soft_wrap=True)


def _say_where(run_dir: Path, sentence: str) -> None:
    """Say by ``sentence``, with what is ``done`` and how to ``go_on``, what there is of a run that has ended early."""
    if not RunFolder(run_dir).holds_run():
        return
    paths = checkpoint.find(run_dir)
    done = f"the last step is in {paths[0]}" if paths else "no step is done yet"
    told = sentence.format(done=done, go_on="go on with" if paths else "begin anew with")
    people.print(told, markup=False, soft_wrap=True)
    suggest("train", "--resume", run_dir)
