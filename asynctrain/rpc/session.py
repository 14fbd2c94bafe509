"""One program on an executor's workers: what is sent to all of them alike, and the memory of what they send back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import overload

import numpy as np

from asynctrain._aio import in_thread
from asynctrain.arena import Arena, Array, Layout, aligned_empty
from asynctrain.errors import ClosedError
from asynctrain.executors.crew import Crew
from asynctrain.executors.shared_memory import Places, write
from asynctrain.rpc import worker_pb2 as pb
from asynctrain.rpc.codec import FRAME, Cargo, are_alike, nbytes
from asynctrain.types import ForwardResult, ForwardWork, GradientResult, GradientWork, Params, Program

COPIED_AT_ONCE = 2**20  # bytes: more are copied in a thread, and not by the loop


class Parcel(dict[str, Array]):
    """The parameters of one version as all workers get them, for a crew to hand to its members; as a mapping, empty.

    A frame is made when the first worker is to get it, and kept for the others and for those that come later.
    """

    def __init__(self, session: int, version: int, transfer: int, cargo: Cargo) -> None:
        super().__init__()
        self.transfer = transfer
        header = pb.Parameters(session=session, version=version, transfer=transfer, groups=cargo.groups())
        self._made = [pb.FromCoordinator(parameters=header).SerializeToString()]
        self._messages = 1 + -(-cargo.nbytes // FRAME)
        self._more = cargo.frames(transfer)

    def messages(self) -> Iterator[bytes]:
        """Yield what has to be sent to a worker."""
        for number in range(self._messages):
            if number == len(self._made):
                self._made.append(next(self._more))
            yield self._made[number]


class GrpcSession:
    """One program on the executor's workers.

    Args:
        program: what they compute.
        places: where things lie in it.
        crew: of the workers.
        new_number: gives numbers for sessions, work and transfers.
    """

    def __init__(self, program: Program, places: Places, crew: Crew, new_number: Callable[[], int]) -> None:
        self.places = places
        self.crew = crew
        self.new_number = new_number
        self.number = new_number()
        text = json.dumps(program.to_json())
        if len(text) > FRAME:
            raise ValueError(f"a program must be of at most {FRAME} characters to travel, got {len(text)}")
        self.opening = pb.FromCoordinator(open=pb.Open(session=self.number, program=text))
        self.closing = pb.FromCoordinator(close=pb.Close(session=self.number))
        self._free: list[Array] = []
        self._closed = False

    @property
    def slots(self) -> int:
        """How many pieces of work its workers compute at once."""
        return self.crew.slots

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """The numeric fingerprint of its workers."""
        return self.crew.fingerprint

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        """Begin to send the parameters; raises ``ValueError`` where they are not the program's."""
        if self._closed:
            raise ClosedError(f"{self} is closed")
        arenas = [await _arena(params, self.places.params, "params")]
        if model_state:
            arenas.append(await _arena(model_state, self.places.state, "model_state"))
        parcel = Parcel(self.number, version, self.new_number(), Cargo.of(*arenas))
        await self.crew.broadcast(parcel, {}, version)

    @overload
    async def compute(self, work: GradientWork, version: int) -> GradientResult: ...
    @overload
    async def compute(self, work: ForwardWork, version: int) -> ForwardResult: ...
    async def compute(self, work: GradientWork | ForwardWork, version: int) -> GradientResult | ForwardResult:
        """Return the result of ``work``, whichever worker has it first."""
        return await self.crew.compute(work, version)

    def memory(self, size: int) -> Array:
        """Return where a result may arrive: memory that was given back, or else new."""
        return self._free.pop() if self._free else aligned_empty((size,), np.uint8)

    def give_back(self, memory: Array) -> None:
        """Take the memory of a result that nobody reads any more."""
        if not self._closed:
            self._free.append(memory)

    def close(self) -> None:
        """Stop all work and refuse more."""
        self._closed = True
        self._free.clear()
        self.crew.close()

    def __repr__(self) -> str:
        return f"<session {self.number} on {self.crew}>"


async def _arena(arrays: Params, layout: Layout, argument: str) -> Arena:
    """Return ``arrays`` as they lie in ``layout``, copied only where they lie otherwise."""
    if isinstance(arrays, Arena) and are_alike([arrays.layout], [layout]):
        return arrays
    if nbytes([layout]) <= COPIED_AT_ONCE:
        return _written(arrays, layout, argument)
    return await in_thread(_written, arrays, layout, argument)


def _written(arrays: Params, layout: Layout, argument: str) -> Arena:
    arena = layout.empty()
    write(arrays, arena, argument)
    return arena
