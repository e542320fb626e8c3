"""Asking a publisher's replay socket: everything it still keeps from one sequence number on.

A DEALER per question, so that a late answer to an earlier question can never be taken for one to this. vLLM and SGLang
serve replays between two waits of their publisher thread (up to 100 ms), and a ROUTER drops what its peer does not take
in time: the high-water mark here is larger than the engines' buffers (10,000 batches by default).
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Generator

import msgspec
import zmq

from kvindex.errors import ServiceError
from kvindex.events.frames import END_SEQUENCE, replay_request

_HWM = 200_000
_SLICE = 0.1  # seconds between two looks at the stop flag
_END = END_SEQUENCE.to_bytes(8, "big")


class Answer(enum.Enum):
    """How reading an answer ended."""

    WHOLE = "whole"  # up to its end marker
    BROKEN = "broken"  # it did not end, or lost messages on the way
    RESTARTED = "restarted"  # it is another process's: ask again from the beginning
    DOUBTFUL = "doubtful"  # the last message seen is not in it, and maybe this publisher keeps none at all
    UNNAMED = "unnamed"  # it does not say the topic, and no live message has yet


class ReplayError(ServiceError):
    """No answer, or one that did not end. What came before it is good."""


class ReplayLimits(msgspec.Struct, frozen=True, kw_only=True):
    """`patience_seconds` bounds the wait for each answer, `total_seconds` the whole conversation."""

    patience_seconds: float = 2.0
    total_seconds: float = 60.0
    max_message_bytes: int = 64 << 20


def ask(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: str,
    start: int,
    limits: ReplayLimits,
    stopping: threading.Event,
) -> Generator[list[bytes], None, None]:
    """The answers, the end marker last. Close the iterator if it is not read to its end: it owns a socket.

    Raises ReplayError when an answer does not come in time, and when `stopping` is set.
    """
    socket = context.socket(zmq.DEALER)
    try:
        socket.linger = 0
        socket.set_hwm(_HWM)
        socket.setsockopt(zmq.MAXMSGSIZE, limits.max_message_bytes)
        socket.setsockopt(zmq.IPV6, 1)
        try:
            socket.connect(endpoint)
            socket.send_multipart(replay_request(start), zmq.NOBLOCK)
        except zmq.ZMQError as failure:
            raise ReplayError(f"{endpoint}: {failure}") from None
        deadline = time.monotonic() + limits.total_seconds
        while True:
            _wait(socket, endpoint, min(time.monotonic() + limits.patience_seconds, deadline), stopping)
            frames = socket.recv_multipart(zmq.NOBLOCK)
            yield frames
            if len(frames) >= 2 and frames[-2] == _END:
                return
            if time.monotonic() > deadline:
                raise ReplayError(f"{endpoint}: the answer did not end within {limits.total_seconds} s")
    finally:
        socket.close(linger=0)


def _wait(socket: zmq.Socket[bytes], endpoint: str, until: float, stopping: threading.Event) -> None:
    while not socket.poll(int(_SLICE * 1000)):
        if stopping.is_set():
            raise ReplayError(f"{endpoint}: stopped while waiting for an answer")
        if time.monotonic() > until:
            raise ReplayError(f"{endpoint}: no answer in time")
