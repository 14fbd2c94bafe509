"""A session on a Dask cluster. Dask's scheduler decides who computes what; here is what it does not look after."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import overload

from distributed import Client

from asynctrain._aio import ServingGroup, in_thread
from asynctrain.arena import Arena, Array
from asynctrain.errors import ClosedError
from asynctrain.executors import remote
from asynctrain.executors.base import Tell
from asynctrain.executors.dask.errand import Errands
from asynctrain.executors.dask.link import Link
from asynctrain.executors.dask.parameters import Parameters
from asynctrain.executors.dask.roster import Roster, Worker
from asynctrain.executors.dask.worker import Edition, Failed, Packed, Summed, aligned
from asynctrain.executors.ledger import Patience
from asynctrain.executors.local import GRACE
from asynctrain.executors.process import importable
from asynctrain.nn.layers.base import modules_of
from asynctrain.nn.model import Model
from asynctrain.types import ForwardResult, ForwardWork, GradientResult, GradientWork, Params, Program

QUICK = 2**20  # bytes: what is larger is copied off the loop


class DaskSession:
    """One program on one cluster, by a client of its own.

    Args:
        address: of the executor, for messages.
        client: connected.
        program: to be computed.
        tell: hears of workers that come and go, and of work that is computed twice.
        tasks: what the session does by itself.
        worker_wait: seconds that work waits while there is no worker.
        patience: how long a result is waited for before another worker computes it too.
    """

    def __init__(
        self,
        address: str,
        client: Client,
        program: Program,
        tell: Tell,
        tasks: ServingGroup,
        worker_wait: float,
        patience: Patience,
    ) -> None:
        modules = importable(modules_of(program.architecture))
        self._program = json.dumps({"modules": modules, "program": program.to_json()})
        model = Model.from_json(program.architecture)
        self._layouts = model.layout(program.dtype), model.statistics_layout
        self._link = Link(address, client, worker_wait)
        self._roster = Roster(self._link, self._program, tell, self._joined, tasks)
        self._parameters = Parameters(self._link, self._roster, patience, tasks)
        self._errands = Errands(self._link, self._roster, self._parameters, patience, tell)

    async def begin(self) -> None:
        """Learn which workers there are; raises as ``DaskExecutor.open`` does."""
        await self._roster.begin()

    def _joined(self, worker: Worker) -> None:
        self._parameters.send_to(worker)

    @property
    def slots(self) -> int:
        """How many microbatches are computed at once by workers that are not in doubt."""
        return sum(worker.slots for worker in self._roster.usable())

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """The numeric fingerprint that all workers have in common."""
        return self._roster.fingerprint

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        """Send the parameters to all workers; who has not taken them in time is not waited for."""
        self._link.require_open()
        self._link.require_connection()
        await self._roster.somebody()
        packed = Packed.of(params), Packed.of(model_state)
        edition = Edition(self._link.session, self._program, self.fingerprint, *packed)
        await self._parameters.publish(version, edition)

    @overload
    async def compute(self, work: GradientWork, version: int) -> GradientResult: ...
    @overload
    async def compute(self, work: ForwardWork, version: int) -> ForwardResult: ...
    async def compute(self, work: GradientWork | ForwardWork, version: int) -> GradientResult | ForwardResult:
        """Return the result of ``work``, whichever worker has it first."""
        self._parameters.require(version)
        outcome = await self._errands.outcome(work, version)
        match outcome.value:
            case Failed(telling):
                raise remote.rebuilt(telling, outcome.address)
            case Summed() as summed if summed.gradients.nbytes > QUICK:
                return await in_thread(self._gradients, summed)
            case Summed() as summed:
                return self._gradients(summed)
            case ForwardResult() as result:
                return result
        raise ClosedError(f"the session on {self._link.address} was closed while this was computed")

    def _gradients(self, summed: Summed) -> GradientResult:
        gradients, statistics = self._layouts
        return GradientResult(
            Arena(gradients, _own(summed.gradients)), summed.sums, Arena(statistics, _own(summed.statistics))
        )

    async def aclose(self, grace: float = GRACE) -> None:
        """Stop what the workers compute for it and wait for that, at most ``grace`` seconds; let go of the cluster."""
        if self._link.closed:
            return
        self._link.close()
        client = self._link.client
        if self._link.is_up:
            with suppress(ValueError):  # it has not begun
                client.unsubscribe_topic("all")  # or the scheduler would tell a closed client that it has gone
            await self._errands.cancel(grace)
            self._parameters.release()
            await self._roster.leave(grace)
            await self._link.settle(grace)
        await client.close(grace)

    def __repr__(self) -> str:
        version = self._parameters.version
        return (
            f"<{type(self).__name__} on {self._link.address}, {len(self._roster.workers)} workers, version {version}>"
        )


def _own(vector: Array) -> Array:
    """Return ``vector``, copied where it may not be written, as a step adds to it, or begins where kernels are slow."""
    return aligned(vector if vector.flags.writeable else vector.copy())
