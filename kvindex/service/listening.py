"""Short looks at an engine's sockets, for the doctor: is the port open, does the replay answer, do events come?"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from types import TracebackType
from urllib.parse import urlsplit

import zmq
import zmq.asyncio

from kvindex.errors import ServiceError
from kvindex.events.replaying import ReplayLimits, ask
from kvindex.index.facade import Index

CONNECT_SECONDS = 3.0
_LAST = (1 << 63) - 1  # a sequence that nobody reaches: the answer is the end marker alone


async def can_connect(address: str) -> str | None:
    """None when somebody listens on this tcp:// address, else why not. Other transports are not judged."""
    parts = urlsplit(address)
    if parts.scheme != "tcp":
        return None
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(parts.hostname, parts.port), CONNECT_SECONDS)
    except (asyncio.TimeoutError, TimeoutError):
        return f"nobody answers within {CONNECT_SECONDS:g} s"
    except (OSError, ValueError) as failure:
        return str(failure)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return None


async def replay_answers(address: str) -> str | None:
    """None when the replay socket speaks the protocol, else why not."""
    refused = await can_connect(address)
    if refused is not None:
        return f"{address}: {refused}"
    return await asyncio.to_thread(_replay_answers, address)


def _replay_answers(address: str) -> str | None:
    limits = ReplayLimits(patience_seconds=CONNECT_SECONDS, total_seconds=CONNECT_SECONDS)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        for _ in ask(context, address, _LAST, limits, threading.Event()):
            pass
    except ServiceError as failure:
        return str(failure)
    finally:
        context.destroy(linger=0)
    return None


class Listening:
    """Subscribed to some publishers for as long as the `with` lasts."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._context: zmq.asyncio.Context = zmq.asyncio.Context()
        self._sockets: dict[str, zmq.asyncio.Socket] = {}

    def __enter__(self) -> Listening:
        for address in self._addresses:
            socket = self._context.socket(zmq.SUB)
            socket.setsockopt(zmq.LINGER, 0)
            socket.subscribe(b"")
            socket.connect(address)
            self._sockets[address] = socket
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(linger=0)

    async def ready(self) -> None:
        """A subscription takes a moment to reach its publisher, and nothing tells when it has."""
        await asyncio.sleep(0.5 if self._sockets else 0)

    async def first(self, seconds: float, index: Index) -> bool:
        """Feed what comes to the index; True when something came. Ends a moment after the first message, because one
        request's events can be several."""
        deadline = asyncio.get_running_loop().time() + seconds
        heard = False
        poller = zmq.asyncio.Poller()
        for socket in self._sockets.values():
            poller.register(socket, zmq.POLLIN)
        while (left := deadline - asyncio.get_running_loop().time()) > 0:
            ready = dict(await poller.poll(1000 * left))
            for address, socket in self._sockets.items():
                if socket in ready:
                    index.ingest(address, await socket.recv_multipart())
                    if not heard:
                        heard, deadline = True, asyncio.get_running_loop().time() + 0.5
        return heard
