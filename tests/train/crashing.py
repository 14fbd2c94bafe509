"""A training that is killed and resumed: the child process, and who kills it.

The child announces each step it has applied and each ``CheckpointSaved`` that is delivered to it, one JSON line each,
written in one call to a pipe, so that what was announced before a SIGKILL arrives. At its end it tells what the run has
come to.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
from PIL import Image

import asynctrain as at
from asynctrain import _files
from asynctrain.arena import digest
from asynctrain.train import checkpoint
from asynctrain.train.controllers import EarlyStopping, ReduceOnPlateau
from asynctrain.train.events import CheckpointSaved, Event, Resumed, StepEnd, to_json
from asynctrain.train.run_folder import RunFolder
from asynctrain.train.saving import Saving

INTERVAL = 5  # steps between two checkpoints

Moment = Literal["half", "written", "renamed"]
MOMENTS: tuple[Moment, ...] = ("half", "written", "renamed")


@dataclass(frozen=True)
class Life:
    """What a child is to do.

    Attributes:
        data: the folder of images.
        run_dir: that of the run, which it goes on with if it was begun.
        patience: of early stopping, in epochs.
        workers: that compute gradients; 0 is inline.
        threads: that decode images.
        die_in_write: kill itself in which of its checkpoint's writings, counted from 1; 0 for none.
        moment: and where: with half of the temporary file written, with all of it, or after the rename.
    """

    data: str
    run_dir: str
    patience: int
    workers: int = 1
    threads: int = 1
    die_in_write: int = 0
    moment: Moment = "half"


def make_images(folder: Path) -> None:
    """Write 64 + 24 grey 8x8 PNG files in two classes that are hard to tell apart. Blocks."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 32), ("test", 12)):
        for label, name in enumerate(("left", "right")):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 180, (8, 8), dtype=np.uint8)
                pixels[:, 4 * label : 4 * label + 4] += 30
                Image.fromarray(pixels).save(folder / part / name / f"{number:02}.png")


# The child


async def live(life: Life) -> None:
    """Train, from the latest checkpoint on if there is one, and tell what it came to."""
    nn = at.nn
    model = at.Model(
        [
            nn.Conv2D(4, 3),
            nn.BatchNorm(),
            nn.ReLU(),
            nn.MaxPool2D(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Dense(2),
        ],
        input_shape=(8, 8, 1),
    )
    data = Path(life.data)
    loader = at.Loader(
        at.ImageFolder(data / "train"),
        batch_size=10,
        image_size=(8, 8),
        channels=1,
        seed=5,
        augment=at.augment.compose(at.augment.HorizontalFlip(0.1), at.augment.RandomCrop(1)),
        mix=at.augment.Mixup(0.3),
        threads=life.threads,
    )
    run_dir = Path(life.run_dir)
    options: Any = {"resume" if RunFolder(run_dir).holds_run() else "run_dir": run_dir}
    async with at.ThreadExecutor(life.workers) if life.workers else at.InlineExecutor() as executor:
        trainer = at.Trainer(
            model,
            optimizer=at.optim.average_weights(at.optim.accumulate(at.optim.adamw(3e-3), 3), 0.9),
            executor=executor,
            microbatch=4,
            seed=7,
        )
        async with trainer.start(
            loader,
            epochs=1000,
            validate=at.ImageFolder(data / "test"),
            controllers=[
                EarlyStopping("loss", patience=life.patience),
                ReduceOnPlateau("loss", patience=3, factor=0.7),
            ],
            saving=Saving(steps=INTERVAL, seconds=None, epochs=False),
            callbacks=[_announce_step],
            **options,
        ) as run:
            async for event in run:
                if isinstance(event, CheckpointSaved):
                    _announce(saved=event.step)
            history = await run.result()
    _announce(ending=_ending(history))


def _ending(history: at.History) -> dict[str, Any]:
    state = history.state
    groups = {"params": state.params, "model_state": state.model_state, **state.optimizer_state}
    return {
        "digests": {name: digest(arrays) for name, arrays in groups.items()},
        "step": state.step,
        "samples": history.samples,
        "reason": history.reason,
        "stopped_by": state.stopped_by,
        "learning_rate_scale": state.learning_rate_scale,
        "events": [_compared(event) for event in history.events],
    }


def _compared(event: Event) -> dict[str, Any]:
    """Return what must be equal in two events that are."""
    told = to_json(event)
    return {known.name: told[known.name] for known in fields(event) if known.compare}


def _announce_step(event: Event) -> None:
    if isinstance(event, StepEnd):
        _announce(step=event.step)
    if isinstance(event, Resumed):
        _announce(resumed=event.step, attempt=event.attempt)


def _announce(**told: Any) -> None:
    os.write(1, (json.dumps(told) + "\n").encode())


def _arm(life: Life) -> None:
    """Have this process kill itself in the checkpoint's writing that ``life`` names."""
    writes = iter(range(1, sys.maxsize))

    def dying(path: Path, content: list[bytes | memoryview], stopped: Any) -> None:
        if next(writes) == life.die_in_write:
            _arm_this_write(path, sum(map(len, content)), life.moment)
        _files.write_whole(path, content, stopped)

    patch.object(checkpoint, "write_whole", dying).start()


def _arm_this_write(path: Path, size: int, moment: Moment) -> None:
    sync, syncs = os.fsync, iter(("written", "renamed"))

    def dying_sync(descriptor: int) -> None:
        sync(descriptor)
        if next(syncs) == moment:
            _die(path, moment)

    def torn(**options: Any) -> Any:
        file = tempfile.NamedTemporaryFile(**options)  # noqa: SIM115 - who asked for it closes it
        write = file.write

        def half(content: bytes) -> None:
            write(content[: size // 2])
            file.flush()
            _die(path, moment)

        patch.object(file, "write", half).start()
        return file

    if moment == "half":
        patch.object(_files, "NamedTemporaryFile", torn).start()
    else:
        patch.object(os, "fsync", dying_sync).start()


def _die(path: Path, moment: Moment) -> None:
    _announce(dying=moment, step=int(path.stem.rpartition("-")[2]))
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


# Who kills it


@dataclass
class Crashes:
    """A run that is killed again and again, and what was seen of it.

    Attributes:
        data, run_dir, patience: of the run.
        steps: how many were applied, in all lives.
        step: the last that was applied.
        saved: the step of the last checkpoint that was announced.
        kills: how many, and ``in_writes`` those of them that were inside a checkpoint's writing.
        ending: what the run came to, once it did.
        attempts: as the resumed runs tell them.
    """

    data: Path
    run_dir: Path
    patience: int
    steps: int = 0
    step: int = 0
    saved: int = 0
    kills: int = 0
    in_writes: int = 0
    ending: dict[str, Any] | None = None
    attempts: list[int] = field(default_factory=list)

    def run_through(self) -> dict[str, Any]:
        """Let a child go on to the end, and return what it came to."""
        self.live()
        assert self.ending is not None
        return self.ending

    def live(
        self,
        *,
        workers: int = 1,
        threads: int = 1,
        kill_after: int | None = None,
        delay: float = 0.0,
        die_in_write: int = 0,
        moment: Moment = "half",
    ) -> None:
        """Start a child; kill it ``delay`` seconds after its ``kill_after``-th step, or let it do so in a write."""
        life = Life(str(self.data), str(self.run_dir), self.patience, workers, threads, die_in_write, moment)
        command = [sys.executable, __file__, json.dumps(asdict(life))]
        steps = 0
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            try:
                if kill_after == 0:
                    self._kill(child, delay)
                for told in _lines(child):
                    steps += "saved" not in told and "step" in told and "dying" not in told
                    self._note(told)
                    if steps == kill_after:
                        kill_after = None
                        self._kill(child, delay)
            finally:
                child.kill()
        assert self.ending is not None or child.returncode == -signal.SIGKILL, "the child failed by itself"
        if self.ending is None:
            self.kills += 1
        self._check_files()

    def _kill(self, child: subprocess.Popen[bytes], delay: float) -> None:
        time.sleep(delay)
        child.kill()

    def _note(self, told: dict[str, Any]) -> None:
        match told:
            case {"dying": _}:
                self.in_writes += 1
            case {"step": step}:
                self.steps += 1
                self.step = step
            case {"saved": step}:
                self.saved = step
            case {"resumed": step, "attempt": attempt}:
                assert step >= self.saved, "a resumed run goes on at or after the last checkpoint that was announced"
                assert self.step - step <= INTERVAL + 1, "and has lost no more than an interval and the step beside it"
                self.attempts.append(attempt)
            case {"ending": ending}:
                self.ending = ending

    def _check_files(self) -> None:
        """Fail if there is a checkpoint that cannot be read, or a line of the events but the last that is torn."""
        for path in checkpoint.find(self.run_dir):
            checkpoint.load(path)
        events = self.run_dir / "history.jsonl"
        if events.exists():
            numbers = [json.loads(line)["number"] for line in events.read_text().rpartition("\n")[0].splitlines()]
            assert numbers == list(range(len(numbers))), "no number is given twice, and none is left out"


def _lines(child: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    assert child.stdout is not None
    for line in child.stdout:
        yield json.loads(line)


def crash(crashes: Crashes, kills: int, seed: int) -> None:
    """Kill the run ``kills`` times at seeded random moments, every fourth in a write, then let it end.

    Each life has another number of workers and of decoding threads.
    """
    draw = random.Random(seed)
    while crashes.kills < kills and crashes.ending is None:
        live = partial(crashes.live, workers=crashes.kills % 4, threads=1 + crashes.kills % 3)
        if crashes.kills % 4 == 3:
            live(die_in_write=draw.randint(1, 3), moment=draw.choice(MOMENTS))
        else:
            live(kill_after=draw.randint(0, 3 * INTERVAL), delay=draw.uniform(0, 0.01))
    if crashes.ending is None:
        crashes.live(workers=2)


if __name__ == "__main__":
    asked = Life(**json.loads(sys.argv[1]))
    _arm(asked)
    asyncio.run(live(asked))
