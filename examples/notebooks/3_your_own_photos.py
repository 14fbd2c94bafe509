# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own photos
#
# Put your photos into a folder per class and name the folder here. Without one this notebook makes some pictures of its
# own: circles, squares and stripes of all colours and sizes.

# %%
import os
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from PIL import Image, ImageDraw

import asynctrain as at

photos = os.environ.get("PHOTOS")  # or write: photos = "flowers/"

# %%
SIZE = 48


def drawing(kind: str, rng: np.random.Generator) -> Image.Image:
    """Return a picture of one kind of shape, in random colours, at a random place."""
    paper, ink = (tuple(int(level) for level in rng.integers(0, 256, 3)) for _ in range(2))
    image = Image.new("RGB", (SIZE, SIZE), paper)
    x, y, radius = (int(number) for number in rng.integers((14, 14, 8), (34, 34, 14)))
    pen = ImageDraw.Draw(image)
    if kind == "circles":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
    elif kind == "squares":
        pen.rectangle((x - radius, y - radius, x + radius, y + radius), fill=ink)
    else:
        for offset in range(0, SIZE, 8):
            pen.line((offset, 0, offset + x - 24, SIZE), fill=ink, width=3)
    return image


def draw_folder(folder: Path, kinds: list[str], each: int, seed: int) -> Path:
    """Fill a folder with drawings."""
    rng = np.random.default_rng(seed)
    for kind in kinds:
        (folder / kind).mkdir(parents=True)
        for number in range(each):
            drawing(kind, rng).save(folder / kind / f"{number:03}.png")
    return folder


folder = Path(photos) if photos else draw_folder(Path(mkdtemp()) / "shapes", ["circles", "squares", "stripes"], 200, 0)
data = at.ImageFolder(folder)
train, held_out = data.split(0.8, seed=0)
data, len(train), len(held_out)

# %% [markdown]
# Augmentation shows the model each photo a little different every time: flipped, moved, in other light. It is what helps
# most where there are few photos. `EarlyStopping` ends the run when the held-out loss has not fallen for some epochs, and
# gives back the best weights.

# %%
size = (32, 32)
loader = at.Loader(train, batch_size=32, image_size=size, augment=at.augment.standard(), seed=0)
model = at.models.small_cnn(num_classes=len(data.classes), image_shape=(*size, 3))
executor = at.ThreadExecutor()
rate = at.optim.cosine(3e-3, steps=20 * loader.batches_per_epoch, warmup=10)
trainer = at.Trainer(model, optimizer=at.optim.adamw(rate), executor=executor, seed=0)
history = await trainer.fit(
    loader,
    epochs=20,
    validate=held_out,
    controllers=[at.EarlyStopping(patience=6)],
    metrics=[at.metrics.ConfusionMatrix(), at.metrics.WorstSamples(8)],
)
history

# %% [markdown]
# Where is it wrong? The confusion matrix has a row for each true class; below are the worst mistakes, as images.

# %%
history.plot_confusion(data.classes)

# %%
history.plot_mistakes(data.classes)

# %% [markdown]
# ## Transfer: begin with what was learned before
#
# A network that has learned one thing has learned to see. To tell other classes apart, from few examples, take all weights
# but those of the last layer, and hold the first layers still.

# %%
few = draw_folder(Path(mkdtemp()) / "few", ["circles", "squares"], 24, 1)
new = at.ImageFolder(few)
new_train, new_test = new.split(0.5, seed=0)
classifier = at.Classifier.from_state(model, history.state, classes=data.classes, settings=loader.settings)

other = at.models.small_cnn(num_classes=2, image_shape=(*size, 3))
last_layer = list(other.layers_with_parameters)[-1]
optimizer = at.optim.freeze(at.optim.adamw(1e-3), "conv*")
transfer = at.Trainer(other, optimizer=optimizer, executor=executor, seed=0)
kept = [f"{layer}/*" for layer in other.layers_with_parameters if layer != last_layer]
begun = transfer.initial_state(classifier, only=kept)
small = at.Loader(new_train, batch_size=8, image_size=size, seed=0)
moved = await transfer.fit(small, epochs=10, validate=new_test, state=begun)
moved

# %%
frozen = next(name for name in moved.state.params if name.startswith("conv"))
assert (moved.state.params[frozen] == classifier.params[frozen]).all()
moved.evaluations[-1].result.accuracy

# %%
await executor.aclose()
