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
# # First steps
#
# asynctrain trains image classifiers in your event loop. A notebook has one already, so `await` works in any cell; there
# is nothing to start or to patch.
#
# The package brings 1,797 handwritten digits along. We write them out as image files, a folder per class, which is how
# your own images would lie on your disk.

# %%
from pathlib import Path
from tempfile import mkdtemp

import asynctrain as at

folder = Path(mkdtemp()) / "digits"
at.data.unpack_digits(folder)
train, test = at.ImageFolder(folder / "train"), at.ImageFolder(folder / "test")
train, test

# %% [markdown]
# A loader makes batches of them, in a new order each epoch. A model knows its layers and what they cost; it holds no
# weights. A trainer puts the model, an optimizer and a home for the computing together.

# %%
loader = at.Loader(train, batch_size=32, image_size=(8, 8), channels=1, seed=0)
model = at.models.small_cnn(num_classes=10, image_shape=(8, 8, 1))
print(model.summary())

# %%
epochs = 10
executor = at.ThreadExecutor()
rate = at.optim.cosine(5e-3, steps=epochs * loader.batches_per_epoch)
trainer = at.Trainer(model, optimizer=at.optim.adamw(rate), executor=executor, seed=0)
history = await trainer.fit(loader, epochs=epochs, validate=test)
history

# %% [markdown]
# `history` is what the run was: its last evaluation, and all the others. It draws itself above; as numbers it is
# `history.to_rows()`.

# %%
assert history.evaluations[-1].result.accuracy > 0.95
history.evaluations[-1].result

# %% [markdown]
# A classifier is the model with its weights, the names of the classes, and what is done to an image first. It is one file.

# %%
classifier = at.Classifier.from_state(model, history.state, classes=train.classes, settings=loader.settings)
classifier.save(folder / "digits.safetensors")
seven = next((folder / "test" / "7").iterdir())
await at.Classifier.load(folder / "digits.safetensors").predict(seven)

# %% [markdown]
# The same seed gives the same bits, however many threads there are. This is the digest of all weights:

# %%
async with at.ThreadExecutor(1) as one_thread:
    again = at.Trainer(model, optimizer=at.optim.adamw(rate), executor=one_thread, seed=0)
    repeated = await again.fit(loader, epochs=epochs, validate=test)

assert repeated.state.digest() == history.state.digest()
history.state.digest()

# %%
await executor.aclose()
