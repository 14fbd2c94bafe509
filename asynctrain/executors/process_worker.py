"""The main program of a worker process: ``python -m asynctrain.executors.process_worker SOCKET PULSE PARENT``.

One thread reads what is to be done and does it, what came first first. Another has a socket of its own, the pulse: it
sends back whatever comes, while the first computes too, and ends the process in the instant in which the parent's end
closes, whatever is going on.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
from collections import deque
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from asynctrain._aio import step_back
from asynctrain.executors.blas import find_blas, one_blas_thread
from asynctrain.executors.fingerprint import numeric_fingerprint
from asynctrain.executors.messages import Inbox, Message, encoded
from asynctrain.executors.remote import told
from asynctrain.executors.shared_memory import Block, Board, Piece, Places, Slot
from asynctrain.executors.worker import GradientWorker, Sheet, Stopped
from asynctrain.types import ForwardWork, GradientWork, Program, Sums

RECEIVED_AT_ONCE = 2**16  # bytes
DESCRIPTORS_AT_ONCE = 64

_PR_SET_PDEATHSIG = 1


def main() -> NoReturn:
    """Serve the parent that started this process, until it goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal: the parent decides
    descriptor, pulse, parent = (int(argument) for argument in sys.argv[1:])
    die_with(parent)
    threading.Thread(target=_beat, args=[socket.socket(fileno=pulse)], name="asynctrain-pulse", daemon=True).start()
    step_back()  # the computing thread; the other keeps the priority that it was born with
    with one_blas_thread(find_blas()):
        _Worker(socket.socket(fileno=descriptor)).serve()


def _beat(pulse: socket.socket) -> NoReturn:
    """Send back what the parent sends, until it goes."""
    with suppress(OSError):
        while data := pulse.recv(RECEIVED_AT_ONCE):
            pulse.sendall(data)
    os._exit(0)


def die_with(parent: int) -> None:
    """Have the system kill this process when the thread that started it ends; only Linux can.

    The end of the socket tells the same to a process that runs; one that is stopped (SIGSTOP) would stay for ever.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it was gone before that call
            os._exit(0)


class _Session:
    """One program: its worker, and the boards and slots that were met."""

    def __init__(self, program: Program, blocks: dict[int, Block]) -> None:
        self.places = Places(program)
        self.worker = GradientWorker(program)
        self.worker.warm_up()
        self._blocks = blocks
        self._boards: dict[int, Board] = {}
        self._slots: dict[int, Slot] = {}

    def board(self, number: int) -> Board:
        if number not in self._boards:
            self._boards[number] = Board(self.places, self._blocks[number])
        return self._boards[number]

    def slot(self, number: int) -> Slot:
        if number not in self._slots:
            self._slots[number] = Slot(self.places, self._blocks[number])
        return self._slots[number]

    def forget(self, number: int) -> None:
        self._boards.pop(number, None)
        self._slots.pop(number, None)


class _Worker:
    """Does what the messages say. Requests carry an ``id``, and so does the one answer that each of them gets."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received: deque[int] = deque()  # descriptors whose messages are yet to be read
        self._blocks: dict[int, Block] = {}
        self._sessions: dict[int, _Session] = {}

    def serve(self) -> NoReturn:
        """Do one thing after the other, until the parent goes."""
        inbox = Inbox()
        self._send({"hello": os.getpid()})
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._connection, RECEIVED_AT_ONCE, DESCRIPTORS_AT_ONCE)
            except OSError:
                data, descriptors = b"", []
            if not data:
                os._exit(0)
            self._received += descriptors
            for message in inbox.feed(data):
                answer = self._answer(message)
                if "id" in message:
                    self._send({"id": message["id"], **answer})

    def _send(self, message: Message) -> None:
        try:
            self._connection.sendall(encoded(message))
        except OSError:
            os._exit(0)

    def _answer(self, message: Message) -> Message:
        try:
            return _DEEDS[message["do"]](self, message)
        except Stopped:
            return {"stopped": True}
        except Exception as error:
            return {"error": told(error)}

    def _map(self, message: Message) -> Message:
        block = Block(self._received.popleft(), message["size"], writable=message["writable"])
        block.close()
        self._blocks[message["block"]] = block
        return {}

    def _unmap(self, message: Message) -> Message:
        number = message["block"]
        del self._blocks[number]
        for session in self._sessions.values():
            session.forget(number)
        return {}

    def _open(self, message: Message) -> Message:
        for module in message["modules"]:
            import_module(module)
        text = Piece.from_json(message["program"]).of(self._blocks[message["block"]]).tobytes()
        program = Program.from_json(json.loads(text))
        self._sessions[message["session"]] = _Session(program, self._blocks)
        return {"fingerprint": numeric_fingerprint(program.kernels)}

    def _close(self, message: Message) -> Message:
        self._sessions.pop(message["session"], None)
        return {}

    def _gradients(self, message: Message) -> Message:
        session = self._sessions[message["session"]]
        board, slot = session.board(message["board"]), session.slot(message["slot"])
        images, labels, weights = _inputs(message, slot)
        work = GradientWork(message["step"], message["microbatch"], message["of"], images, labels, weights)
        into = Sheet(slot.gradients, slot.statistics)
        return {"sums": sums_to_json(session.worker.gradients(board.params, work, slot.stop, into=into).sums)}

    def _forward(self, message: Message) -> Message:
        session = self._sessions[message["session"]]
        board, slot = session.board(message["board"]), session.slot(message["slot"])
        images, labels, weights = _inputs(message, slot)
        state = board.model_state if message["state"] else {}
        result = session.worker.forward(board.params, state, ForwardWork(images, labels, weights), slot.stop)
        Piece.from_json(message["outputs"]).of(slot.block)[...] = result.outputs
        return {"sums": sums_to_json(result.sums)}


_DEEDS = {
    "map": _Worker._map,
    "unmap": _Worker._unmap,
    "open": _Worker._open,
    "close": _Worker._close,
    "gradients": _Worker._gradients,
    "forward": _Worker._forward,
}


def _inputs(message: Message, slot: Slot) -> list[Any]:  # images and labels are there, where they must be
    return [None if piece is None else Piece.from_json(piece).of(slot.block) for piece in message["inputs"]]


def sums_to_json(sums: Sums) -> list[object]:
    """Return the sums as JSON values, of which every bit survives."""
    counts = {name: float(value) for name, value in sums.counts.items()}
    return [float(sums.loss), float(sums.weight), int(sums.samples), counts]


if __name__ == "__main__":
    main()
