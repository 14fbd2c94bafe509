"""One worker process as its parent sees it: started, talked to without blocking, watched, killed and buried."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from asynctrain.errors import WorkerLostError
from asynctrain.executors.messages import Inbox, Message, encoded
from asynctrain.executors.remote import rebuilt
from asynctrain.executors.shared_memory import Block

COMMAND = "asynctrain.executors.process_worker"
STANDARD_ERROR = 2  # its descriptor: sys.stderr may be anything
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
RECEIVED_AT_ONCE = 2**16  # bytes


Answered = Callable[[Message | Exception], None]
"""Takes what a request was answered with, or the error that it told of."""


class WorkerProcess:
    """One worker process: what is sent to it and what it answers. Nothing here blocks."""

    def __init__(self, started: Started, heartbeat: float) -> None:
        self.pid = started.process.pid
        self.address = f"process {self.pid}"
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # and why
        self._loop = asyncio.get_running_loop()
        self._process = started.process
        self._connection = started.connection
        self._pulse = started.pulse
        self._numbers = count()
        self._asked: dict[int, Answered] = {}
        self._mapped: set[int] = set()
        self._inbox = Inbox()
        self._unsent: deque[tuple[bytes, list[int]]] = deque()  # with their descriptors
        self._heartbeat = heartbeat
        self._interval = min(heartbeat / 4, 1.0)
        self._silent = 0  # beats in a row
        self._timer: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._connection.fileno(), self._read)
        self._loop.add_reader(self._pulse.fileno(), self._feel)

    def map(self, number: int, block: Block, *, writable: bool) -> None:
        """Let the process see ``block``; the first time only there is something to be sent."""
        if number not in self._mapped:
            self._mapped.add(number)
            message = {"do": "map", "block": number, "size": block.size, "writable": writable}
            self.send(message, [block.descriptor])

    def unmap(self, number: int) -> None:
        """Let the process forget a block, if it has seen it."""
        if number in self._mapped:
            self._mapped.remove(number)
            self.send({"do": "unmap", "block": number})

    async def ask(self, message: Message) -> Message:
        """Return the answer to ``message``; raises what it tells of, or ``WorkerLostError``."""
        answer: asyncio.Future[Message] = self._loop.create_future()
        self.request(message, partial(_set, answer))
        return await answer

    def request(self, message: Message, answered: Answered) -> None:
        """Send ``message`` with an ``id``; ``answered`` is called when the process is through with it, or is gone."""
        if self.gone.done():
            answered(WorkerLostError(self.address, self.gone.result()))
            return
        message["id"] = number = next(self._numbers)
        self._asked[number] = answered
        self.send(message)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message that has no answer, once there is room in the socket; its descriptors may be closed now."""
        if self.gone.done():
            return
        data = encoded(message)
        sent = 0 if self._unsent else self._send_at_once(data, descriptors)
        if sent < len(data):
            self._loop.add_writer(self._connection.fileno(), self._send_rest)
            self._unsent.append((data[sent:], [] if sent else [os.dup(descriptor) for descriptor in descriptors]))

    def _send_rest(self) -> None:
        while self._unsent:
            data, descriptors = self._unsent.popleft()
            sent = self._send_at_once(data, descriptors)
            if sent:
                _close(descriptors)
            if sent < len(data):
                self._unsent.appendleft((data[sent:], [] if sent else descriptors))
                return
        self._loop.remove_writer(self._connection.fileno())

    def _send_at_once(self, data: bytes, descriptors: Sequence[int]) -> int:
        """Return how many of the bytes there was room for; the descriptors go with the first."""
        try:
            if descriptors:
                return socket.send_fds(self._connection, [data], descriptors)
            return self._connection.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)  # it is ending, which the socket tells in a moment

    def lose(self, reason: str) -> None:
        """Kill the process, if it is not gone yet, and tell all who await its answers why."""
        if not self.gone.done():
            self._process.kill()
            self.leave(reason)

    def leave(self, reason: str) -> None:
        """Close the socket, which ends the process unless it is frozen, and tell all who await its answers why."""
        if self.gone.done():
            return
        self.gone.set_result(reason)
        self._loop.remove_writer(self._connection.fileno())
        for end in (self._connection, self._pulse):
            self._loop.remove_reader(end.fileno())
            end.close()
        for _, descriptors in self._unsent:
            _close(descriptors)
        self._unsent.clear()
        if self._timer is not None:
            self._timer.cancel()
        asked, self._asked = self._asked, {}
        for answered in asked.values():
            answered(WorkerLostError(self.address, reason))
        if not self.ready.done():
            self.ready.set_exception(WorkerLostError(self.address, reason))

    def _read(self) -> None:
        for message in self._inbox.feed(self._received(self._connection)):
            self._take(message)

    def _feel(self) -> None:
        if self._received(self._pulse):
            self._silent = 0

    def _received(self, end: socket.socket) -> bytes:
        """Return what there is to be read; where the process has closed its ends, see to it."""
        try:
            data = end.recv(RECEIVED_AT_ONCE)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data and not self.gone.done():
            self._loop.remove_reader(end.fileno())
            self._bury(tries=20)
        return data

    def _take(self, message: Message) -> None:
        if "id" in message:
            answered = self._asked.pop(message["id"], None)
            if answered is not None:  # it was not lost while its messages were read
                answered(rebuilt(message["error"], self.address) if "error" in message else message)
        elif "hello" in message and not self.ready.done():
            self.ready.set_result(None)
            self._beat()

    def _bury(self, tries: int) -> None:
        """Say how the process ended; between the end of its socket and its own pass some microseconds."""
        status = self._process.poll()
        if status is None and tries > 0:
            self._timer_replaced(0.001, partial(self._bury, tries - 1))
        else:
            self.lose(_told(status))

    def _beat(self) -> None:
        """Ping, and count the beats without a word from the process.

        Beats rather than seconds: where the loop itself was held up, the answers may be there, and yet to be read.
        """
        if self._silent * self._interval >= self._heartbeat:
            self.lose(f"it has not answered for {self._heartbeat:g} s")
            return
        self._silent += 1
        with suppress(OSError):  # it is ending, or frozen for long
            self._pulse.send(b".")
        self._timer_replaced(self._interval, self._beat)

    def _timer_replaced(self, seconds: float, function: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, function)


def _set(future: asyncio.Future[Message], answer: Message | Exception) -> None:
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _told(status: int | None) -> str:
    if status is None:
        return "it has closed its socket"
    if status < 0:
        return f"its process was ended by signal {-status} ({signal.strsignal(-status)})"
    return f"its process ended with status {status}"


def leave_interrupts_to_others() -> None:
    """Block Ctrl-C in this thread, and so, from its first instant on, in the processes that the thread starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@dataclass(frozen=True, slots=True)
class Started:
    """A process that was started, and the ends of its sockets that stay here, which do not block.

    connection: for messages. pulse: sends back what is sent, whatever the process is doing.
    """

    process: subprocess.Popen[bytes]
    connection: socket.socket
    pulse: socket.socket

    def end(self, seconds: float) -> None:
        """Close the sockets, which ends the process, and wait for that; kill it where it takes longer."""
        self.connection.close()
        self.pulse.close()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_process() -> Started:
    """Start a worker process. Linux will end it with the thread that calls this."""
    with ExitStack() as until_started:
        ours, theirs = zip(*(map(until_started.enter_context, socket.socketpair()) for _ in range(2)), strict=True)
        passed = [end.fileno() for end in theirs]
        process = subprocess.Popen(  # noqa: S603 - the command is ours
            [sys.executable, "-P", "-m", COMMAND, *map(str, passed), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=STANDARD_ERROR,  # what layers print must not get between what the program prints
            pass_fds=passed,
            env=environment(),
        )
        until_started.pop_all()
    for end in theirs:
        end.close()
    for end in ours:
        end.setblocking(False)
    return Started(process, *ours)


def environment() -> dict[str, str]:
    """Return an environment in which a worker finds the modules that this process finds, and BLAS starts no threads."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, **dict.fromkeys(BLAS_THREADS, "1")}
