"""Checks and fakes for tests of your own parts."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import prod
from random import Random
from typing import Self, overload

import numpy as np

from asynctrain._aio import ServingGroup
from asynctrain.arena import Arena, Array, Layout, Shape
from asynctrain.errors import ClosedError, StaleParametersError, WorkerLostError
from asynctrain.executors.base import Executor, Session, Tell, nobody
from asynctrain.executors.blas import find_blas, one_blas_thread
from asynctrain.executors.crew import WORKER_WAIT, Crew
from asynctrain.executors.fingerprint import numeric_fingerprint
from asynctrain.executors.ledger import Patience
from asynctrain.executors.local import InlineExecutor
from asynctrain.executors.worker import GradientWorker, StopFlag
from asynctrain.nn import initializers
from asynctrain.nn.kernels import choice
from asynctrain.nn.layers import Dense, Dropout, Flatten, Layer, ReLU
from asynctrain.nn.layers.containers import Within
from asynctrain.nn.model import Model
from asynctrain.nn.scope import Scope, Workspace
from asynctrain.randomness import Purpose, generator
from asynctrain.types import ForwardResult, ForwardWork, GradientResult, GradientWork, Params, Program


def check_gradients(
    layer: Layer,
    input_shape: Shape,
    *,
    batch: int = 2,
    seed: int = 0,
    train: bool = True,
    step: float = 1e-5,
    tolerance: float = 1e-7,
    kernels: str = "numpy",
) -> None:
    """Hold a layer's input and weight gradients against central differences in float64, element by element.

    The scalar that is differentiated is sum(r y) for random r. The inputs are a shuffled row of evenly spaced numbers
    without 0, so that none lies near a tie or a kink.

    Args:
        layer: any layer, composite ones too.
        input_shape: without the batch axis; keep it small, as each element takes two forward passes.
        batch: N, at least 1.
        seed: of inputs, parameters and r.
        train: whether the pass is one of training.
        step: by which each element is moved either way.
        tolerance: the largest error permitted, relative to the largest gradient or 1, whichever is larger.
        kernels: of the layers, ``numpy`` or ``numba``.

    Raises:
        AssertionError: a gradient is wrong; the message says which, and by how much.
    """
    rng = np.random.default_rng(seed)
    x = _apart((batch, *input_shape), rng)
    params = _random_params(layer, input_shape, rng)
    gradients = params.layout.empty()
    # An emitted gradient must be written, not added: leftovers would show.
    gradients.vector.fill(np.nan)
    model = Model([layer], input_shape)
    (name,) = model.root.children
    scope = Scope(
        Workspace(),
        train=train,
        rng=partial(generator, seed, Purpose.DROPOUT),
        gradients=gradients,
        state=Within(model.init_state(), name),
        statistics=Within(model.statistics_layout.empty(), name),
        kernels=choice.get(kernels),
    )
    r = rng.standard_normal((batch, *layer.output_shape(input_shape)))

    def value() -> float:
        return float(np.sum(r * layer.forward(params, x, scope)[0]))

    _, saved = layer.forward(params, x, scope)
    dx = layer.backward(params, saved, r.copy(), scope)
    if dx is None:
        raise AssertionError("the input gradient is missing: backward returned None")
    found = {"x": dx.copy(), **{name: gradients[name].copy() for name in params}}
    for name, array in {"x": x, **params}.items():
        expected = _central_differences(value, array, step)
        error = np.abs(found[name] - expected).max() / max(1.0, np.abs(expected).max())
        if not error <= tolerance:
            raise AssertionError(
                f"the gradient of {name} is wrong by {error:.2g}, {tolerance:.2g} is permitted: {layer}"
            )


def _apart(shape: Shape, rng: np.random.Generator) -> Array:
    """Return evenly spaced numbers between -1 and 1 in random order, none of them 0."""
    count = prod(shape)
    return rng.permutation((np.arange(count) + 0.25) / count * 2 - 1).reshape(shape)


def _random_params(layer: Layer, input_shape: Shape, rng: np.random.Generator) -> Arena:
    """Return parameters as they begin, moved a little, so that those which begin at zero count too."""
    wanted = layer.parameters(input_shape)
    arena = Layout({name: parameter.shape for name, parameter in wanted.items()}, np.dtype(np.float64)).empty()
    for name, (shape, initializer) in wanted.items():
        arena[name][...] = initializers.get(initializer)(shape, rng) + 0.1 * rng.standard_normal(shape)
    return arena


def _central_differences(value: Callable[[], float], array: Array, step: float) -> Array:
    """Return (value(a + step) - value(a - step)) / (2 step) for each element a of ``array``, which is put back."""
    differences = np.empty_like(array)
    for place in np.ndindex(array.shape):
        kept = array[place]
        array[place] = kept + step
        above = value()
        array[place] = kept - step
        below = value()
        array[place] = kept
        differences[place] = (above - below) / (2 * step)
    return differences


# Executors

HEARTBEAT = 10.0  # seconds without one, after which the supervisor of simulated workers gives one up


async def check_executor(make: Callable[[], Executor]) -> None:
    """Hold an executor of your own against what training relies on.

    Gradients have the bits of the inline executor, retries of the same work too; two sessions do not see each other; a
    version that was not broadcast last is refused; a cancelled computation leaves the session usable; what is closed
    says so, to those that wait for a computation as well, and may be closed again.

    Args:
        make: returns an executor; it is called twice.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    model = Model([Flatten(), Dense(8), ReLU(), Dropout(0.5), Dense(3)], (4, 4, 1))
    program, first, second = Program(model.to_json(), seed=1), model.init(0), model.init(1)
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), dtype=np.uint8)
    work = GradientWork(0, 1, 2, images, np.arange(6) % 3)

    async def bits(session: Session, version: int = 0) -> bytes:
        result = await session.compute(work, version)
        vector = result.gradients.vector.tobytes()
        result.release()
        return vector

    async with InlineExecutor() as reference, reference.open(program) as session:
        await session.broadcast(first, {}, 0)
        expected = await bits(session)
    executor = make()
    async with executor.open(program) as session, executor.open(program) as other:
        await session.broadcast(first, {}, 0)
        await other.broadcast(second, {}, 0)
        _require(await bits(session) == expected, "the gradients have other bits than those of the inline executor")
        _require(await bits(other) != expected, "two sessions share their parameters")
        task = asyncio.create_task(bits(session))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        _require(await bits(session) == expected, "after a cancelled computation the gradients have other bits")
        await _require_error(StaleParametersError, bits(session, 1), "a version that was not broadcast is accepted")
    await _require_error(ClosedError, bits(session), "a session that was left computes")
    await executor.aclose()
    await executor.aclose()
    async with make() as closed, closed.open(program) as session:
        await session.broadcast(first, {}, 0)
        under_way = [asyncio.create_task(bits(session)) for _ in range(2 * session.slots + 1)]
        await asyncio.sleep(0)
        await closed.aclose()
        ends = await asyncio.gather(*under_way, return_exceptions=True)
        for end in ends:
            told = repr(end) if isinstance(end, BaseException) else "other bits"
            ended = end == expected or isinstance(end, ClosedError)
            _require(ended, f"a computation that the executor was closed amid ends in {told}")
    await _require_error(ClosedError, _opened(closed, program), "an executor that was closed opens a session")


async def _opened(executor: Executor, program: Program) -> None:
    async with executor.open(program):
        pass


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


async def _require_error(kind: type[Exception], doing: Awaitable[object], message: str) -> None:
    try:
        await doing
    except kind:
        return
    raise AssertionError(f"{message}; {kind.__name__} was expected")


class _Hooked(ABC):
    """An executor that does something before each computation of another one, which it owns."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    @asynccontextmanager
    async def open(self, program: Program, tell: Tell = nobody) -> AsyncIterator[Session]:
        """Open a session of the other executor."""
        async with self._executor.open(program, tell) as session:
            yield _HookedSession(session, self._before)

    @abstractmethod
    async def _before(self, work: GradientWork | ForwardWork) -> None: ...

    async def aclose(self, grace: float = 10.0) -> None:
        """Close the other executor."""
        await self._executor.aclose(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} around {self._executor!r}>"


class _HookedSession:
    def __init__(self, session: Session, before: Callable[[GradientWork | ForwardWork], Awaitable[None]]) -> None:
        self._session = session
        self._before = before
        self.broadcast = session.broadcast

    @property
    def slots(self) -> int:
        return self._session.slots

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return self._session.fingerprint

    @overload
    async def compute(self, work: GradientWork, version: int) -> GradientResult: ...
    @overload
    async def compute(self, work: ForwardWork, version: int) -> ForwardResult: ...
    async def compute(self, work: GradientWork | ForwardWork, version: int) -> GradientResult | ForwardResult:
        await self._before(work)
        return await self._session.compute(work, version)


class GatedExecutor(_Hooked):
    """Lets each computation wait at a gate, so that a test knows what is under way.

        >>> async with GatedExecutor(at.InlineExecutor()) as executor, trainer.start(loader, epochs=1) as run:
        ...     await executor.arrived(1)      # a microbatch waits
        ...     ...
        ...     executor.open_gate()

    Args:
        executor: that computes what was let through; it is closed with this one.
    """

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self._gate = asyncio.Event()
        self._queue = asyncio.Condition()
        self.waiting = 0

    def open_gate(self) -> None:
        """Let through what waits, and what comes."""
        self._gate.set()

    def close_gate(self) -> None:
        """Let what comes wait, as at the beginning."""
        self._gate.clear()

    async def arrived(self, number: int) -> None:
        """Wait until at least ``number`` computations are at the gate."""
        async with self._queue:
            await self._queue.wait_for(lambda: self.waiting >= number)

    async def _before(self, work: GradientWork | ForwardWork) -> None:
        self.waiting += 1
        try:
            async with self._queue:
                self._queue.notify_all()
            await self._gate.wait()
        finally:
            self.waiting -= 1


class FailingExecutor(_Hooked):
    """Raises an error in the place of some computations, which are counted from 0.

    Args:
        executor: that computes the others; it is closed with this one.
        errors: what is raised, by the number of the computation.
    """

    def __init__(self, executor: Executor, errors: Mapping[int, Exception]) -> None:
        super().__init__(executor)
        self._errors = errors
        self._numbers = count()

    async def _before(self, work: GradientWork | ForwardWork) -> None:
        error = self._errors.get(next(self._numbers))
        if error is not None:
            raise error


@dataclass(frozen=True, slots=True)
class Faults:
    """How often what befalls a simulated worker, at each of the four moments of its work: a probability each.

    The moments: amid and after receiving parameters, before and after computing.

    Attributes:
        seed: of what is drawn.
        kill: it is gone; whether its connection breaks or it is missed by a supervisor is drawn too.
        freeze: it stands still for 1 to 20 seconds; a supervisor gives it up after 10.
        slow: it takes up to 1 second longer.
        late: it returns what it has computed although it was told to stop.
        hire: seconds until another takes the place of one that is gone, from and to.
    """

    seed: int
    kill: float = 0.05
    freeze: float = 0.05
    slow: float = 0.2
    late: float = 0.2
    hire: tuple[float, float] = (0.0, 3.0)


class SimulatedExecutor:
    """A home whose workers compute in the caller's thread and suffer ``faults``; not a ``concurrent.futures.Executor``.

    The workers take the time of the loop, so on one whose clock jumps ahead when nothing is to be done a day of
    accidents is over in a moment. Each has parameters of its own, received in two halves with a pause between them.

    Args:
        workers: how many, at least 1.
        faults: what befalls them.
        worker_wait: seconds that work waits while no worker is there.
        patience: how long a result is waited for before another worker computes it too.
    """

    def __init__(
        self,
        workers: int,
        faults: Faults,
        *,
        worker_wait: float = WORKER_WAIT,
        patience: Patience = Patience(),  # noqa: B008 - it is frozen
    ) -> None:
        self._workers = workers
        self._faults = faults
        self._worker_wait = worker_wait
        self._patience = patience
        self._sessions: set[Crew] = set()
        self._closed = False

    @property
    def crews(self) -> list[Crew]:
        """The open sessions; ``crew.lose("worker-0", "it was killed")`` is an accident at a moment of one's choice."""
        return list(self._sessions)

    @asynccontextmanager
    async def open(self, program: Program, tell: Tell = nobody) -> AsyncIterator[Session]:
        """Open a session on workers of its own."""
        if self._closed:
            raise ClosedError(f"the executor {self!r} is closed")
        with one_blas_thread(find_blas()):
            crew = Crew("simulated", worker_wait=self._worker_wait, patience=self._patience, tell=tell)
            async with ServingGroup() as tasks, crew:
                home = _SimulatedHome(crew, tasks, GradientWorker(program), program.kernels, self._faults)
                for _ in range(self._workers):
                    home.hire()
                self._sessions.add(crew)
                try:
                    yield crew
                finally:
                    self._sessions.discard(crew)

    async def aclose(self, grace: float = 10.0) -> None:
        """Refuse further sessions and end the work of those that are open."""
        self._closed = True
        for crew in self._sessions:
            crew.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._workers} workers, {'closed' if self._closed else self._faults}>"


class _SimulatedHome:
    """The workers of one session, and what is drawn for them."""

    def __init__(
        self, crew: Crew, tasks: ServingGroup, computing: GradientWorker, kernels: str, faults: Faults
    ) -> None:
        self.crew = crew
        self.computing = computing
        self.fingerprint = numeric_fingerprint(kernels)
        self.faults = faults
        self.random = Random(faults.seed)  # noqa: S311 - accidents, not secrets
        self._tasks = tasks
        self._numbers = count()

    def hire(self) -> None:
        address = f"worker-{next(self._numbers)}"
        self.crew.join(_SimulatedWorker(self, address), address)

    def replace(self) -> None:
        self._tasks.create_task(self._hire_later(self.random.uniform(*self.faults.hire)), name="hire")

    async def freeze(self, address: str, seconds: float) -> None:
        missed = self._tasks.create_task(self._miss(address), name="supervise")
        await asyncio.sleep(seconds)
        missed.cancel()

    async def _miss(self, address: str) -> None:
        await asyncio.sleep(HEARTBEAT)
        self.crew.lose(address, f"no heartbeat for {HEARTBEAT:g} s")

    async def _hire_later(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.hire()


class _SimulatedWorker:
    slots = 1

    def __init__(self, home: _SimulatedHome, address: str) -> None:
        self.fingerprint = home.fingerprint
        self._home = home
        self._address = address
        self._params: Params = {}
        self._model_state: Params = {}
        self._version: int | None = None
        self._is_alive = True

    def kill(self) -> None:
        if self._is_alive:
            self._is_alive = False
            self._home.replace()

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        received = Arena.of(params)
        half = len(received.vector) // 2
        received.vector[half:] = np.nan
        await self._suffer()
        received.vector[half:] = Arena.of(params).vector[half:]
        self._params, self._model_state, self._version = received, Arena.of(model_state), version
        await self._suffer()

    @overload
    async def compute(self, work: GradientWork, version: int) -> GradientResult: ...
    @overload
    async def compute(self, work: ForwardWork, version: int) -> ForwardResult: ...
    async def compute(self, work: GradientWork | ForwardWork, version: int) -> GradientResult | ForwardResult:
        if version != self._version:
            raise StaleParametersError(self._address, self._version, version)
        is_late = self._happens(self._home.faults.late)
        try:
            await self._suffer()
            result = self._computed(work)
            await self._suffer()
        except asyncio.CancelledError:
            if not is_late:
                raise
            result = self._computed(work)
        return result

    def _computed(self, work: GradientWork | ForwardWork) -> GradientResult | ForwardResult:
        computing = self._home.computing
        if isinstance(work, ForwardWork):
            return computing.forward(self._params, self._model_state, work, StopFlag())
        return computing.gradients(self._params, work, StopFlag())

    async def _suffer(self) -> None:
        faults, random = self._home.faults, self._home.random
        await asyncio.sleep(0)
        if self._happens(faults.slow):
            await asyncio.sleep(random.uniform(0, 1))
        if self._happens(faults.freeze):
            await self._home.freeze(self._address, random.uniform(1, 20))
        if self._happens(faults.kill):
            self.kill()
            if self._happens(0.5):
                self._home.crew.lose(self._address, "it was killed")
            raise WorkerLostError(self._address, "its connection broke")

    def _happens(self, probability: float) -> bool:
        return self._home.random.random() < probability
