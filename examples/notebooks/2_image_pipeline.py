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
# # The image pipeline
#
# Between the files and the model are stages: read, decode, augment, batch. Each is a coroutine between bounded queues, so
# nothing runs ahead for ever, and each tells what it does and what it waits for.

# %%
from pathlib import Path
from tempfile import mkdtemp
from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import asynctrain as at

# %% [markdown]
# Some pictures to work with: 400 noisy photos of three colours, as JPEG files.

# %%
folder = Path(mkdtemp())
rng = np.random.default_rng(0)
colours = {"blue": (60, 90, 200), "green": (60, 180, 80), "red": (200, 70, 60)}
for number in range(400):
    name = list(colours)[number % 3]
    (folder / name).mkdir(exist_ok=True)
    coarse = rng.normal(colours[name], 60, (12, 16, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(coarse).resize((320, 240)).save(folder / name / f"{number:03}.jpg")
data = at.ImageFolder(folder)
data

# %% [markdown]
# A loader is opened where it is used, and closed at the end of the block, whatever happens in it. A batch has the pixels,
# the labels, the names of the files, and a cursor: the exact place behind it.

# %%
loader = at.Loader(data, batch_size=32, image_size=(64, 64), augment=at.augment.standard(), seed=0)
async with loader.open() as batches:
    first = await anext(batches)
    second = await anext(batches)
first.images.shape, first.images.dtype, first.labels[:8], first.cursor

# %%
figure, axes = plt.subplots(1, 8, figsize=(10, 1.6))
for axis, image, label in zip(axes, first.images, first.labels, strict=False):
    axis.imshow(image)
    axis.set_title(data.classes[label], fontsize=8)
    axis.axis("off")

# %% [markdown]
# A stream that is opened at a cursor goes on as if it had never stopped, to the last bit of the augmentation. This is what
# makes runs resumable in the middle of an epoch.

# %%
async with loader.open(first.cursor) as batches:
    resumed = await anext(batches)
assert (resumed.images == second.images).all()
resumed.sources == second.sources

# %% [markdown]
# ## Who waits for whom?
#
# `report()` names the stage that holds the others up, and what would help.

# %%
async with loader.open() as batches:
    async for batch in batches:
        pass
    print(batches.report())

# %% [markdown]
# Decoding is what costs. A cache keeps the decoded images, so later epochs only read them; augmentation comes after it,
# and stays random.

# %%
cached = at.Loader(data, batch_size=32, image_size=(64, 64), cache=at.data.MemoryCache(2**28), seed=0)
for epoch in range(3):
    start, images = perf_counter(), 0
    async with cached.open(at.Cursor(epoch)) as batches:
        async for batch in batches:
            images += batch.samples
    print(f"epoch {epoch}: {images / (perf_counter() - start):,.0f} images/s")

# %% [markdown]
# ## Files that are none
#
# A broken file is never skipped silently. By default it is an error that names the file; with `errors="skip"` it is left
# out, and listed.

# %%
(folder / "red" / "broken.jpg").write_bytes(b"not an image")
careful = at.Loader(at.ImageFolder(folder), batch_size=32, image_size=(64, 64), errors="skip", seed=0)
async with careful.open() as batches:
    async for batch in batches:
        pass
    skipped = list(batches.skipped)
assert len(skipped) == 1
skipped
