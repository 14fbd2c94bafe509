"""Train a classifier on a folder of images (a folder per class) inside an event loop, on uvloop.

python examples/quickstart.py flowers/
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvloop

import asynctrain as at


async def main(folder: Path) -> None:
    """Train on four fifths of the images, follow the run, and save the classifier beside the folder."""
    data = await asyncio.to_thread(at.ImageFolder, folder)
    train, held_out = data.split(0.8, seed=0)
    model = at.models.small_cnn(num_classes=len(data.classes), image_shape=(32, 32, 3))
    loader = at.Loader(train, batch_size=32, image_size=(32, 32), seed=0)
    schedule = at.optim.cosine(3e-3, steps=10 * loader.batches_per_epoch)

    async with at.ThreadExecutor() as executor:
        trainer = at.Trainer(model, optimizer=at.optim.adamw(schedule), executor=executor, seed=0)
        async with trainer.start(loader, epochs=10, validate=held_out) as run:
            async for event in run:
                if isinstance(event, at.events.EpochEnd) and event.validation:
                    print(f"epoch {event.epoch}: loss {event.loss:.4f}, accuracy {event.validation.accuracy:.1%}")
            history = await run.result()

    classifier = at.Classifier.from_state(model, history.state, classes=data.classes)
    await asyncio.to_thread(classifier.save, folder.with_suffix(".safetensors"))
    print(await classifier.predict(str(held_out[0].source)))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(Path(sys.argv[1])))
