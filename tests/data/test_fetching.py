from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from asynctrain.data.fetching import Connections, Patience
from asynctrain.errors import ReadError

PLENTY = 100


def passing(error: Exception) -> bool:
    return isinstance(error, OSError)


class Attempts:
    """A read that raises each error in turn, and then returns."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self) -> bytes:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return b"content"


async def test_what_may_pass_is_tried_again_and_the_last_cause_is_kept() -> None:
    patience = Patience(retries=2, backoff=0)
    attempts = Attempts(OSError("one"), OSError("two"))
    assert await patience.read(attempts, "url", passing, asyncio.Semaphore(1)) == b"content"
    assert attempts.calls == 3
    last = ConnectionResetError("three")
    with pytest.raises(ReadError, match=r"^url: cannot be read, tried 3 times: ConnectionResetError: three$") as caught:
        await patience.read(Attempts(OSError("one"), OSError("two"), last), "url", passing, asyncio.Semaphore(1))
    assert caught.value.__cause__ is last


async def test_what_will_not_pass_is_raised_at_once() -> None:
    attempts = Attempts(KeyError("no"))
    with pytest.raises(ReadError, match=r"^url: cannot be read: KeyError: 'no'$"):
        await Patience().read(attempts, "url", passing, asyncio.Semaphore(1))
    assert attempts.calls == 1


async def test_each_try_has_its_deadline() -> None:
    calls = 0

    async def silence() -> bytes:
        nonlocal calls
        calls += 1
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(ReadError, match=r"tried 2 times: no answer within 0\.02 s"):
        await Patience(timeout=0.02, retries=1, backoff=0).read(silence, "url", passing, asyncio.Semaphore(1))
    assert calls == 2


async def test_the_wait_for_a_place_does_not_count_and_a_pause_gives_the_place_away() -> None:
    places = asyncio.Semaphore(1)
    pausing = asyncio.ensure_future(Patience(backoff=PLENTY).read(Attempts(OSError("one")), "url", passing, places))
    assert await Patience(timeout=1).read(Attempts(), "url", passing, places) == b"content"
    pausing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pausing
    await places.acquire()
    waiting = asyncio.ensure_future(Patience(timeout=0.01).read(Attempts(), "url", passing, places))
    await asyncio.sleep(0.03)  # longer than its deadline, had that begun
    places.release()
    assert await waiting == b"content"


def test_pauses_double_up_to_ten_seconds_and_differ_by_name_the_same_every_time() -> None:
    patience = Patience(backoff=0.1)
    for failures, longest in [(1, 0.1), (2, 0.2), (3, 0.4), (7, 6.4), (8, 10), (5000, 10)]:
        pauses = [patience.pause(f"url {number}", failures) for number in range(200)]
        assert all(longest / 2 <= pause <= longest for pause in pauses)
        assert len(set(pauses)) == 200
        assert pauses == [Patience(backoff=0.1).pause(f"url {number}", failures) for number in range(200)]


@pytest.mark.parametrize(
    ("name", "value"), [("timeout", 0.0), ("timeout", float("nan")), ("retries", -1), ("backoff", -0.1)]
)
def test_wrong_patience_is_told(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        Patience(**{name: value})  # type: ignore[arg-type]


class Gated:
    """A source whose connection opens when the test says so, and keeps a log."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.gate = asyncio.Event()
        self.connection = self.connect()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[None]:
        self.log.append("opening")
        await self.gate.wait()
        self.log.append("open")
        yield
        self.log.append("closed")

    def read(self) -> bytes:
        raise AssertionError

    async def fetch(self) -> bytes:
        self.log.append("fetch")
        return b"content"


async def test_a_connection_is_opened_once_and_kept_open_to_the_end_of_the_block() -> None:
    log: list[str] = []
    source = Gated(log)
    async with Connections() as connections:
        first = asyncio.ensure_future(connections.fetch(source))
        await asyncio.sleep(0)
        assert await connections.fetch(source) == b"content"  # does not wait for who is opening it
        source.gate.set()
        assert await first == b"content"
        assert await connections.fetch(source) == b"content"
    assert log == ["opening", "fetch", "open", "fetch", "fetch", "closed"]
