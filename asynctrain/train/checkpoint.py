"""Checkpoints: the whole state of a run in one safetensors file, whole or absent; loading runs no code from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from asynctrain._files import write_whole
from asynctrain._safetensors import parts_of
from asynctrain.arena import Arena, Array, Layout, digest
from asynctrain.errors import CheckpointError, FingerprintError
from asynctrain.executors import fingerprint
from asynctrain.nn.model import Model
from asynctrain.train.events import EpochEnd, Evaluation, from_json, to_json
from asynctrain.train.state import Kept, TrainState
from asynctrain.types import JSON, Cursor, Program, Sums

FORMAT = "asynctrain.checkpoint/1"
FOLDER = "checkpoints"
Stopped = Callable[[], bool]

PARAMS, MODEL_STATE, OPTIMIZER, KEPT = "params", "model_state", "optimizer", "kept"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state, and what must be the same again for its run to go on with the same bits.

    Attributes:
        state: after the last step that was applied.
        optimizer: as JSON.
        microbatch: the largest number of samples in one piece of work; None for the default of ``cut``.
        data: what the loader says of itself.
        fingerprint: of the machine that computed, and of what decoded the images.
        version: of asynctrain.
        beside: what may be another when the run goes on, though it will not be the same run then: the validation data,
            the controllers, the metrics, as far as they can be told.
    """

    state: TrainState
    optimizer: JSON
    microbatch: int | None
    data: JSON
    fingerprint: Mapping[str, str]
    version: str
    beside: JSON

    def require(self, path: Path, other: Checkpoint, bits: str) -> None:
        """Raise unless a run described by ``other`` would go on from here with the same bits.

        Raises:
            CheckpointError: program, optimizer, microbatch or data differ; the message names what.
            FingerprintError: the machine differs, and ``bits`` is not ``"close"``.
        """
        mine = {**self.state.program.to_json(), **_told(self)}
        theirs = {**other.state.program.to_json(), **_told(other)}
        for name in mine:
            require_same(path, name, mine[name], theirs[name])
        if bits != "close":
            try:
                fingerprint.require_same(other.fingerprint, self.fingerprint)
            except FingerprintError as error:
                error.add_note(
                    f'the checkpoint is {path}; bits="close" goes on all the same, with nearly the same bits'
                )
                raise

    def differences(self, other: Checkpoint) -> tuple[str, ...]:
        """Return, a sentence each, what is another in ``other`` that does not keep the run from going on."""
        names = [*self.beside, *(other.beside.keys() - self.beside.keys())]
        told = (told_difference(name, self.beside.get(name), other.beside.get(name)) for name in names)
        return tuple(difference for difference in told if difference is not None)


def require_same(path: Path, name: str, there: Any, here: Any) -> None:
    """Raise ``CheckpointError`` naming the first difference between two JSON values of a ``name``, if there is one."""
    if (difference := told_difference(name, there, here)) is not None:
        raise CheckpointError(path, difference)


def told_difference(name: str, there: Any, here: Any) -> str | None:
    """Return where two JSON values of a ``name`` differ first, as a sentence: what it is there, and what here."""
    difference = _first_difference(name, _plain(there), _plain(here))
    if difference is None:
        return None
    where, theirs, ours = difference
    return f"{where} is {_short(theirs)} there and {_short(ours)} here"


def save(path: Path, checkpoint: Checkpoint, stopped: Stopped = lambda: False) -> None:
    """Write ``checkpoint``, whole or not at all. Blocks.

    Args:
        path: of the file; a file that is there is replaced when the new one is whole.
        checkpoint: what to write.
        stopped: asked while it is written; where it says True, nothing is written.

    Raises:
        OSError: the disk is full, say; what was there before is still there.
    """
    arrays = dict(_arrays(checkpoint.state))
    about = json.dumps({"format": FORMAT, **_described(checkpoint)})
    metadata = {"asynctrain": about, "sha256": _checksum(arrays, about)}
    write_whole(path, parts_of(arrays, metadata), stopped)


def load(path: Path) -> Checkpoint:
    """Read and check a file that ``save`` wrote. Blocks.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is torn, foreign, of another version, or holds other arrays than its description wants.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        about = json.loads(metadata.get("asynctrain", "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(path, "this is no whole safetensors file") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise CheckpointError(path, f"this is no checkpoint of the format {FORMAT}, but {found or 'something else'}")
    if metadata.get("sha256") != _checksum(arrays, metadata["asynctrain"]):
        raise CheckpointError(path, "its content is not what was written: the checksum differs")
    try:
        return _restored(about, arrays)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(path, f"its description cannot be used: {error}") from error


def find(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run folder, the latest first."""
    return sorted((run_dir / FOLDER).glob("step-*.safetensors"), reverse=True)


def name_of(step: int) -> str:
    """Return the file name of the checkpoint after ``step``."""
    return f"step-{step:010}.safetensors"


def _arrays(state: TrainState) -> Iterator[tuple[str, Array]]:
    groups: dict[str, Mapping[str, Array]] = {PARAMS: state.params, MODEL_STATE: state.model_state}
    groups |= {f"{OPTIMIZER}/{slot}": arrays for slot, arrays in state.optimizer_state.items()}
    for who, kept in state.kept.items():
        groups |= {f"{KEPT}/{who}/{PARAMS}": kept.params, f"{KEPT}/{who}/{MODEL_STATE}": kept.model_state}
    for group, arrays in groups.items():
        for name, array in arrays.items():
            yield f"{group}/{name}", array


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    state = checkpoint.state
    return {
        "version": checkpoint.version,
        "program": state.program.to_json(),
        "optimizer": checkpoint.optimizer,
        "slots": {slot: str(arena.layout.dtype) for slot, arena in state.optimizer_state.items()},
        "microbatch": checkpoint.microbatch,
        "data": checkpoint.data,
        "fingerprint": dict(checkpoint.fingerprint),
        "beside": checkpoint.beside,
        "step": state.step,
        "attempt": state.attempt,
        "samples": state.samples,
        "cursor": asdict(state.cursor),
        "sums": asdict(state.sums),
        "learning_rate_scale": state.learning_rate_scale,
        "controllers": dict(state.controllers),
        "stopped_by": state.stopped_by,
        "stopper": state.stopper,
        "restore": state.restore,
        "kept": {who: kept.step for who, kept in state.kept.items()},
        "history": [to_json(event) for event in state.history],
    }


def _restored(about: dict[str, Any], arrays: dict[str, Array]) -> Checkpoint:
    program = Program.from_json(about["program"])
    model = Model.from_json(program.architecture)
    params, model_state = model.layout(program.dtype), model.state_layout
    slots: dict[str, str] = about["slots"]
    state = TrainState(
        program=program,
        params=_taken(arrays, PARAMS, params),
        optimizer_state={slot: _taken_slot(arrays, slot, dtype, params) for slot, dtype in slots.items()},
        model_state=_taken(arrays, MODEL_STATE, model_state),
        step=about["step"],
        cursor=Cursor(**{**about["cursor"], "skipped": tuple(about["cursor"]["skipped"])}),
        sums=Sums(**about["sums"]),
        attempt=about["attempt"],
        samples=about["samples"],
        learning_rate_scale=about["learning_rate_scale"],
        controllers=about["controllers"],
        kept={
            who: Kept(
                step,
                _taken(arrays, f"{KEPT}/{who}/{PARAMS}", params),
                _taken(arrays, f"{KEPT}/{who}/{MODEL_STATE}", model_state),
            )
            for who, step in about["kept"].items()
        },
        stopped_by=about["stopped_by"],
        stopper=about["stopper"],
        restore=about["restore"],
        history=tuple(_remembered(event) for event in about["history"]),
    )
    if arrays:
        raise ValueError(f"it holds more than the model wants: {', '.join(sorted(arrays)[:4])}")
    return Checkpoint(
        state,
        about["optimizer"],
        about["microbatch"],
        about["data"],
        about["fingerprint"],
        about["version"],
        about["beside"],
    )


def _taken(arrays: dict[str, Array], group: str, layout: Layout) -> Arena:
    """Take the arrays of ``group`` out of ``arrays`` into an arena of ``layout``."""
    arena = layout.empty()
    for name, shape in layout.shapes.items():
        array = arrays.pop(f"{group}/{name}", None)
        if array is None or array.shape != shape or array.dtype != layout.dtype:
            found = "is missing" if array is None else f"is {array.shape} of {array.dtype}"
            raise ValueError(f"{group}/{name} {found}, and must be {shape} of {layout.dtype}")
        arena[name][...] = array
    return arena


def _taken_slot(arrays: dict[str, Array], slot: str, dtype: str, params: Layout) -> Arena:
    """Take the arrays of an optimizer's slot: one for each parameter that has state there, in the parameters' order."""
    group = f"{OPTIMIZER}/{slot}"
    shapes = {name: shape for name, shape in params.shapes.items() if f"{group}/{name}" in arrays}
    return _taken(arrays, group, Layout(shapes, np.dtype(dtype)))


def _remembered(value: JSON) -> EpochEnd | Evaluation:
    event = from_json(value)
    if not isinstance(event, EpochEnd | Evaluation):
        raise ValueError(f"a history is of ends of epochs and evaluations, got {event}")
    return event


def _checksum(arrays: Mapping[str, Array], about: str) -> str:
    return hashlib.sha256((digest(arrays) + about).encode()).hexdigest()


def _told(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"optimizer": checkpoint.optimizer, "microbatch": checkpoint.microbatch, **checkpoint.data}


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(value))


def _first_difference(where: str, there: Any, here: Any) -> tuple[str, Any, Any] | None:
    """Return where two JSON values differ first, as ``optimizer.learning_rate.peak``, and what they are there."""
    if isinstance(there, dict) and isinstance(here, dict) and there.keys() == here.keys():
        inner = ((f"{where}.{key}", there[key], here[key]) for key in there)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        inner = ((f"{where}[{number}]", *pair) for number, pair in enumerate(zip(there, here, strict=True)))
    else:
        return None if there == here else (where, there, here)
    return next((found for item in inner if (found := _first_difference(*item)) is not None), None)


def _short(value: Any, length: int = 200) -> str:
    text = json.dumps(value)
    return text if len(text) <= length else f"{text[:length]} ..."
