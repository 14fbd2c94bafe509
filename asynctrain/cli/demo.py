"""``asynctrain demo``: handwritten digits, from image files to a classifier, in less than a minute."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.table import Table

import asynctrain as at
from asynctrain.cli.folders import open_data
from asynctrain.cli.output import people, suggest, to_programs
from asynctrain.cli.recipe import Recipe
from asynctrain.cli.train import new_run_dir, report, train
from asynctrain.data.digits import unpack_digits
from asynctrain.train.run_folder import MODEL

DIGITS = {"epochs": 60, "batch_size": 32, "lr": 5e-3}  # by cross-validation on the training images alone
SHOWN = 7  # predictions, side by side
INK = 128  # a pixel at least this bright is drawn


async def demo(seed: int, executor: str, run_dir: Path | None, as_json: bool) -> None:
    """Unpack the digits, train on them, and show how well unseen ones are recognised."""
    run_dir = run_dir or new_run_dir(Path("demo"))
    people.print("1,797 handwritten digits (UCI, CC BY 4.0), a fifth of them kept for the test")
    recipe = Recipe(run_dir / "data", seed=seed, executor=executor, **DIGITS)  # type: ignore[arg-type]
    await asyncio.to_thread(unpack_digits, recipe.folder)
    data = await asyncio.to_thread(open_data, recipe.folder, recipe.holdout, seed, None)
    outcome = await train(data, recipe, run_dir)

    test = [Path(str(data.test[index].source)) for index in range(len(data.test))]
    classifier = await asyncio.to_thread(at.Classifier.load, run_dir / MODEL)
    shown = choose(test, await classifier.predict(tuple(test), top_k=1))
    people.print(gallery(*shown))
    report(outcome)
    suggest("predict", run_dir / MODEL, *shown[0][:3])
    suggest("evaluate", run_dir / MODEL, run_dir / "data" / "test")
    suggest("train", run_dir / "data", "--model", "linear")
    if as_json:
        to_programs(asdict(outcome))


def choose(images: Sequence[Path], predictions: Sequence[at.Prediction]) -> tuple[list[Path], list[at.Prediction]]:
    """Return the images to be shown, with their predictions: the mistakes first, then the least certain."""

    def certainty(index: int) -> tuple[bool, float]:
        return predictions[index].label == truth(images[index]), predictions[index].probability

    chosen = sorted(range(len(images)), key=certainty)[:SHOWN]
    return [images[index] for index in chosen], [predictions[index] for index in chosen]


def truth(image: Path) -> str:
    """Return the class of an image: the name of its folder."""
    return image.parent.name


def gallery(images: Sequence[Path], predictions: Sequence[at.Prediction]) -> Table:
    """Return a table with a column for each image: its pixels, what was seen on it, what it is."""
    pixels = []
    for path in images:
        with Image.open(path) as image:
            pixels.append(half_blocks(np.asarray(image)))
    pairs = list(zip(images, predictions, strict=True))
    wrong = [truth(path) != found.label for path, found in pairs]
    table = Table(box=None, show_header=False, title="The mistakes, and the least certain of the others")
    table.add_column(no_wrap=True)
    table.add_row("", *pixels)
    table.add_row("predicted", *(_marked(found.label, bad) for (_, found), bad in zip(pairs, wrong, strict=True)))
    table.add_row("true", *(truth(path) for path, _ in pairs))
    table.add_row("probability", *(f"{found.probability:.0%}" for _, found in pairs))
    return table


def _marked(label: str, wrong: bool) -> str:
    return f"[bold red]{label} ✗[/]" if wrong else f"[green]{label}[/]"


def half_blocks(pixels: npt.NDArray[np.uint8]) -> str:
    """Draw pixels (H, W), H even, with a character for each two of them: H / 2 lines of W characters."""
    ink = pixels >= INK
    return "\n".join(
        "".join(" ▄▀█"[2 * upper + lower] for upper, lower in zip(*rows, strict=True))
        for rows in zip(ink[::2], ink[1::2], strict=True)
    )
