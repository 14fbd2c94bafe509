"""The commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import asynctrain as at
from asynctrain.cli import demo as demos
from asynctrain.cli import info as infos
from asynctrain.cli import train as training
from asynctrain.cli import use
from asynctrain.cli.process import run
from asynctrain.cli.recipe import OPTIMIZERS, Recipe, make_executor

app = typer.Typer(
    help="Train image classifiers from folders of images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _known_model(name: str) -> str:
    try:
        at.models.get(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return name


def _known_optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        raise typer.BadParameter(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    return name


def _known_executor(text: str) -> str:
    try:
        make_executor(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return text


def _between_0_and_1(share: float) -> float:
    if not 0 < share < 1:
        raise typer.BadParameter(f"holdout must be between 0 and 1, both excluded, got {share}")
    return share


Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")]
Out = Annotated[Path | None, typer.Option(metavar="RUN_DIR", help="A new folder for the run; by default under runs/.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same weights, bit for bit.")]
Where = Annotated[
    str,
    typer.Option("--executor", callback=_known_executor, help="Where to compute: threads, threads:2, or inline."),
]
ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="A file that asynctrain has written.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a step.")]


@app.command()
def demo(seed: Seed = 0, executor: Where = "threads", out: Out = None, json: Json = False) -> None:
    """Train on 1,797 handwritten digits, from image files, in less than a minute."""
    run(lambda: demos.demo(seed, executor, out, json))


@app.command()
def train(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A folder of images per class, or train/ and test/ (or val/) with these."),
    ],
    model: Annotated[
        str, typer.Option(callback=_known_model, help=f"One of {', '.join(at.models.NAMES)}.")
    ] = "small_cnn",
    epochs: Annotated[int | None, typer.Option(min=1, help="By default about 2,000 steps, but 5 to 40 epochs.")] = None,
    batch_size: BatchSize = 64,
    microbatch: Annotated[int, typer.Option(min=1, help="The most images that one worker takes at once.")] = 32,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Height and width in pixels; by default the images' own, at most 64.")
    ] = None,
    lr: Annotated[float | None, typer.Option(min=0.0, help="The highest learning rate.")] = None,
    optimizer: Annotated[str, typer.Option(callback=_known_optimizer, help="adamw, adam or sgd.")] = "adamw",
    holdout: Annotated[
        float,
        typer.Option(
            callback=_between_0_and_1, help="The share of each class to test with, where DIR has no test folder."
        ),
    ] = 0.2,
    seed: Seed = 0,
    executor: Where = "threads",
    out: Out = None,
    json: Json = False,
) -> None:
    """Train a classifier on a folder of images."""
    recipe = Recipe(model, epochs, batch_size, microbatch, image_size, lr, optimizer, seed, executor)
    run(lambda: training.train_folder(folder, recipe, holdout, out, json))


@app.command()
def evaluate(
    model: ModelFile,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Images in folders named as the model's classes.")],
    batch_size: BatchSize = 64,
    executor: Where = "threads",
    json: Json = False,
) -> None:
    """Measure how well a model recognises labelled images."""
    run(lambda: use.evaluate(model, folder, batch_size, executor, json))


@app.command()
def predict(
    model: ModelFile,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to name for each image.")] = 3,
    json: Json = False,
) -> None:
    """Say what is on images."""
    run(lambda: use.predict(model, images, top, json))


@app.command()
def info(json: Json = False) -> None:
    """Tell versions, loop, CPUs and numeric fingerprint, for bug reports."""
    run(lambda: infos.info(json))
