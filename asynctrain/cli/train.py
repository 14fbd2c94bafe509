"""``asynctrain train DIR``: from a folder of images to a model file."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import asynctrain as at
from asynctrain.cli.folders import Data, open_data
from asynctrain.cli.output import people, percent, suggest, to_programs
from asynctrain.cli.progress import show
from asynctrain.cli.recipe import Recipe, make_executor
from asynctrain.train.run_folder import MODEL


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training has come to; ``seconds`` are those of the run, evaluations included."""

    test_accuracy: float
    digest: str
    seconds: float
    images_per_second: float
    run_dir: str


async def train_folder(path: Path, recipe: Recipe, holdout: float, run_dir: Path | None, as_json: bool) -> None:
    """Train on the images of ``path`` and say what was reached and how to use it."""
    data = await asyncio.to_thread(open_data, path, holdout, recipe.seed, recipe.side)
    outcome = await train(data, recipe, run_dir or new_run_dir(path))
    report(outcome)
    suggest("predict", Path(outcome.run_dir) / MODEL, str(data.test[0].source))
    if as_json:
        to_programs(asdict(outcome))


async def train(data: Data, recipe: Recipe, run_dir: Path) -> Outcome:
    """Train and test as ``recipe`` says, showing the progress; interrupted, say where the weights are."""
    height, width, channels = data.image_shape
    loader = at.Loader(
        data.train, batch_size=recipe.batch_size, image_size=(height, width), channels=channels, seed=recipe.seed
    )
    epochs = recipe.epochs_for(loader.batches_per_epoch)
    model = at.models.get(recipe.model)(num_classes=len(loader.classes), image_shape=data.image_shape)
    async with make_executor(recipe.executor) as executor:
        trainer = at.Trainer(
            model,
            optimizer=recipe.make_optimizer(epochs * loader.batches_per_epoch),
            executor=executor,
            microbatch=recipe.microbatch,
            seed=recipe.seed,
        )
        try:
            async with trainer.start(loader, epochs=epochs, validate=data.test, run_dir=run_dir) as run:
                await show(run, people)
                history = await run.result()
        except asyncio.CancelledError:
            _say_where(run_dir / MODEL)
            raise
    tested = history.epochs[-1].validation
    return Outcome(
        test_accuracy=tested.accuracy if tested else float("nan"),
        digest=history.state.digest(),
        seconds=history.seconds,
        images_per_second=history.samples_per_second,
        run_dir=str(run_dir),
    )


def new_run_dir(subject: Path) -> Path:
    """Return the path of a run folder that is named after ``subject``, what is trained on, and the time."""
    return Path("runs") / f"{subject.resolve().name}-{datetime.now():%Y%m%d-%H%M%S}"


def report(outcome: Outcome) -> None:
    """Tell people what was reached, and lead over to suggestions."""
    people.print(
        f"{percent(outcome.test_accuracy)} of the test images are recognised "
        f"({outcome.seconds:.1f} s, {outcome.images_per_second:,.0f} images/s)",
        style="bold",
    )
    people.print(f"The run is in {outcome.run_dir}; next:", markup=False, soft_wrap=True)


def _say_where(model: Path) -> None:
    if model.exists():
        people.print(f"interrupted; the weights reached so far: {model}", markup=False, soft_wrap=True)
