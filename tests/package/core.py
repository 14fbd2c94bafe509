"""What the demo does, with the hard dependencies alone; run by the Python of an environment that has no others.

It trains on the bundled digits, on threads and in a process, half way and then from the checkpoint on, and prints what
came of it as one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import asynctrain as at

EPOCHS = 4


async def learn(folder: Path) -> dict[str, object]:
    """Train on the digits, in ``folder``, and return what is to be told."""
    await asyncio.to_thread(at.data.unpack_digits, folder / "digits")
    train, test = at.ImageFolder(folder / "digits" / "train"), at.ImageFolder(folder / "digits" / "test")
    model = at.models.small_cnn(num_classes=10, image_shape=(8, 8, 1))
    loader = at.Loader(train, batch_size=32, image_size=(8, 8), channels=1, seed=0)

    def trainer_on(executor: at.Executor) -> at.Trainer:
        return at.Trainer(model, optimizer=at.optim.adamw(5e-3), executor=executor, seed=0)

    async with at.ThreadExecutor() as executor:
        whole = await trainer_on(executor).fit(loader, epochs=EPOCHS, validate=test)
        half = EPOCHS * loader.batches_per_epoch // 2 + 3
        await trainer_on(executor).fit(loader, epochs=EPOCHS, steps=half, validate=test, run_dir=folder / "run")
    async with at.ProcessExecutor(1) as process:
        resumed = await trainer_on(process).resume(folder / "run", loader, epochs=EPOCHS, validate=test)

    at.Classifier.from_state(model, whole.state, classes=train.classes).save(folder / "digits.safetensors")
    classifier = await asyncio.to_thread(at.Classifier.load, folder / "digits.safetensors")
    records = [test[index] for index in range(len(test))]
    predictions = await classifier.predict(tuple(Path(str(record.source)) for record in records))
    labels = [test.classes[record.label] for record in records]
    right = sum(found.label == label for found, label in zip(predictions, labels, strict=True))
    validation = whole.epochs[-1].validation
    return {
        "imported from": at.__file__,
        "accuracy": validation and validation.accuracy,
        "accuracy of the file": right / len(records),
        "digests": [whole.state.digest(), resumed.state.digest()],
        "steps": [whole.state.step, half],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(learn(Path(sys.argv[1])))))  # noqa: T201 - for whoever started this
