"""Knowing that an engine has published everything it had to say, from its own replay socket."""

from __future__ import annotations

import time
from typing import NamedTuple

import zmq

_END = (-1).to_bytes(8, "big", signed=True)


class Message(NamedTuple):
    sequence: int
    payload: bytes


class ReplayProbe:
    """Asks one engine for the messages since the last time.

    vLLM's publisher thread serves a replay request, then sends at most one message of its queue, and so on. So two
    answers in a row with nothing new mean that the queue was empty in between: everything is out. A step's events are
    queued before its output is returned, so that after a response this covers all the response's events.
    """

    def __init__(self, port: int) -> None:
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self.next_sequence = 0

    def close(self) -> None:
        self._socket.close()

    def drain(self, seconds: float = 20.0) -> list[Message]:
        """Everything published since the last call, once there is no more to come."""
        deadline = time.monotonic() + seconds
        new: list[Message] = []
        quiet = 0
        while quiet < 2:
            answer = self._ask(deadline)
            quiet = 0 if answer else quiet + 1
            new += answer
        return new

    def _ask(self, deadline: float) -> list[Message]:
        self._socket.send_multipart([b"", self.next_sequence.to_bytes(8, "big")])
        found = []
        while self._socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            *_, sequence, payload = self._socket.recv_multipart()
            if sequence == _END:
                return found
            found.append(Message(int.from_bytes(sequence, "big"), payload))
            self.next_sequence = found[-1].sequence + 1
        raise TimeoutError("the engine's replay socket did not answer")
