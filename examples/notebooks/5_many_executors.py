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
# # One seed, many homes, the same bits
#
# Gradients can be computed inline, on threads, in processes, on a Dask cluster. What comes out is the same to the last bit,
# whoever computes, in whatever order they finish, and whoever dies on the way.

# %%
import asyncio
import os
import signal
from pathlib import Path
from tempfile import mkdtemp

import asynctrain as at

folder = Path(mkdtemp()) / "digits"
at.data.unpack_digits(folder)
data = at.ImageFolder(folder / "train")
loader = at.Loader(data, batch_size=64, image_size=(8, 8), channels=1, seed=0)
model = at.models.small_cnn(num_classes=10, image_shape=(8, 8, 1))
optimizer = at.optim.adamw(3e-3)

# %%
digests = {}
homes = {
    "inline": at.InlineExecutor(),
    "one thread": at.ThreadExecutor(1),
    "two threads, a layer's gradient each": at.ThreadExecutor(2, split="layers"),
    "two processes": at.ProcessExecutor(2),
}
for name, home in homes.items():
    async with home as executor:
        trainer = at.Trainer(model, optimizer=optimizer, executor=executor, microbatch=16, seed=0)
        history = await trainer.fit(loader, steps=60)
    digests[name] = history.state.digest()
    print(f"{digests[name][:16]}  {history.seconds:5.2f} s  {name}")

# %%
assert len(set(digests.values())) == 1

# %% [markdown]
# ## A worker is killed
#
# Two worker processes, and one of them is killed in the middle of the run, as the system does when memory runs out. Its
# microbatch is computed by the other one, a new worker takes its place, and the run tells of both.

# %%
async with at.ProcessExecutor(2) as executor:
    trainer = at.Trainer(model, optimizer=optimizer, executor=executor, microbatch=16, seed=0)
    async with trainer.start(loader, steps=60) as run:
        async for event in run:
            if isinstance(event, at.events.StepEnd) and event.step == 20:
                os.kill(executor.pids[0], signal.SIGKILL)
            if isinstance(event, (at.events.WorkerLost, at.events.WorkerJoined)):
                print(event)
        history = await run.result()

assert history.state.digest() == digests["inline"]
history.state.digest()[:16]

# %% [markdown]
# ## Two runs at once
#
# Two runs can share one home. Each ends with the bits that it has alone.

# %%
async with at.ThreadExecutor() as executor:
    trainers = [at.Trainer(model, optimizer=optimizer, executor=executor, microbatch=16, seed=seed) for seed in (0, 1)]
    both = await asyncio.gather(*(trainer.fit(loader, steps=60) for trainer in trainers))

assert both[0].state.digest() == digests["inline"]
[history.state.digest()[:16] for history in both]
