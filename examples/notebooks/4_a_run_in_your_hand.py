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
# # A run in your hand
#
# Start a run in one cell; watch it, pause it, ask it, resume it and stop it from others while it trains. The notebook stays
# yours meanwhile: the run is a task in the same event loop, and its computing is in threads.

# %%
import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import mkdtemp

import asynctrain as at

folder = Path(mkdtemp()) / "digits"
at.data.unpack_digits(folder)
train, test = at.ImageFolder(folder / "train"), at.ImageFolder(folder / "test")
loader = at.Loader(train, batch_size=32, image_size=(8, 8), channels=1, cache=at.data.MemoryCache(2**28), seed=0)
model = at.models.small_cnn(num_classes=10, image_shape=(8, 8, 1))

# %% [markdown]
# In a program a run lives in a block: `async with trainer.start(...) as run`. In a notebook the block is to stay open over
# several cells, so an exit stack holds it; the last cell closes it, and with it whatever is still under way.

# %%
hand = AsyncExitStack()
executor = await hand.enter_async_context(at.ThreadExecutor())
trainer = at.Trainer(model, optimizer=at.optim.adamw(3e-3), executor=executor, seed=0)
run = await hand.enter_async_context(
    trainer.start(loader, epochs=1000, validate=test, run_dir=folder.parent / "run")
)
run

# %% [markdown]
# This cell has returned, and the run goes on. Where is it now?

# %%
await asyncio.sleep(1)
run.progress

# %% [markdown]
# Events can be followed by any number of listeners, each from where it likes.

# %%
async for event in run:
    if isinstance(event, at.events.EpochEnd):
        print(f"epoch {event.epoch}: loss {event.loss:.3f}, {event.validation.accuracy:.1%} of the test digits")
        if event.epoch == 3:
            break

# %% [markdown]
# `snapshot()` is a classifier with the weights of this very step. It costs nothing, stays as it is, and answers while the
# training goes on.

# %%
zero = next((folder / "test" / "0").iterdir())
early = run.snapshot()
before = run.progress.step
said = await early.predict(zero)
print(f"asked at step {before}, answered at step {run.progress.step}: {said.label}, {said.probability:.1%}")

# %% [markdown]
# Pause: it takes effect after the step the run is in.

# %%
step = await run.pause()
await asyncio.sleep(0.3)
assert run.progress.step == step and run.progress.paused
run

# %%
run.resume()
while run.progress.step < step + 20:
    await asyncio.sleep(0.02)
run.progress.step - step

# %% [markdown]
# Save it now, into a file from which it could go on, on another day or after a crash:

# %%
saved = await run.checkpoint()
saved.name

# %% [markdown]
# And stop it, normally. What it has learned is in the history.

# %%
history = await run.stop()
assert history.reason == "stopped"
history

# %%
await hand.aclose()

# %% [markdown]
# From the checkpoint in the middle of the epoch, a new trainer goes on with exactly the next batch.

# %%
async with at.ThreadExecutor(1) as other:
    again = at.Trainer(model, optimizer=at.optim.adamw(3e-3), executor=other, seed=0)
    resumed = await again.resume(saved, loader, steps=history.state.step, run_dir=folder.parent / "again", validate=test)
assert resumed.state.digest() == history.state.digest()
resumed.state.digest()
