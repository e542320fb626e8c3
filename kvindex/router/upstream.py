"""The engine's side: one HTTP/1.1 connection at a time per answer, and a bounded pool of kept-alive ones per
endpoint."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple, Protocol, cast

import httptools

from kvindex.router.wire import Headers

MAX_HEAD_BYTES = 64 << 10
JOIN_BELOW_BYTES = 64 << 10  # a small body goes out with its head in one write


class Answer(NamedTuple):
    """An engine's response head. `length` None and not `chunked`: the body ends with the connection, or there is
    none."""

    status: int
    reason: bytes
    headers: Headers
    length: int | None
    chunked: bool


class Sink(Protocol):
    """Who asked. `lost` comes instead of an `end`, never after it."""

    def on_answer(self, answer: Answer | None, body: bytes, end: bool) -> None: ...
    def on_lost(self, why: str, reused: bool) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._sink: Sink | None = None
        self._head_only = False
        self._served = 0
        self.idle_since = 0.0
        self._new_parser()

    def _new_parser(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._reset()

    def _reset(self) -> None:
        self._reason = b""
        self._headers: Headers = []
        self._head_bytes = 0
        self._answer: Answer | None = None
        self._answer_passed = False
        self._until_close = False
        self._pieces: list[bytes] = []
        self._complete = False
        self._keep_alive = False

    @property
    def is_usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, sink: Sink, head: bytes, body: bytes, head_only: bool) -> None:
        """Send one request; `sink` hears the answer. Call only on a connection that is taken from the pool."""
        assert self._transport is not None
        self._sink = sink
        self._head_only = head_only
        if len(body) < JOIN_BELOW_BYTES:
            self._transport.write(head + body if body else head)
        else:
            self._transport.writelines((head, body))

    def pause(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def abandon(self) -> None:
        """The answer is not wanted any more: the engine notices by the closed connection and stops."""
        self._sink = None
        if self._transport is not None:
            self._transport.abort()

    # the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        self._pool.open += 1

    def data_received(self, data: bytes) -> None:
        sink = self._sink
        if sink is None:  # an engine must not speak unasked
            self.abandon()
            return
        if self._answer is None:
            self._head_bytes += len(data)
        error: str | None = None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            error = "switched protocols although nobody asked"
        except httptools.HttpParserError as failure:
            error = f"answered something that is not HTTP/1.1: {failure}"
        if self._answer is None and self._head_bytes > MAX_HEAD_BYTES:
            error = "sent a head that is too long"
        answer = None
        if self._answer is not None and not self._answer_passed:
            answer, self._answer_passed = self._answer, True
        pieces, self._pieces = self._pieces, []
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if self._complete:
            self._finish(sink, answer, body, reusable=error is None and self._keep_alive)
        elif error is not None:
            self.abandon()
            sink.on_lost(error, False)
        elif answer is not None or body:
            sink.on_answer(answer, body, False)

    def _finish(self, sink: Sink, answer: Answer | None, body: bytes, reusable: bool) -> None:
        # The connection is back in the pool before the client reads its answer and may ask again.
        self._sink = None
        self._served += 1
        if self._head_only:
            self._new_parser()
        else:
            self._reset()
        if reusable:
            self._pool.give(self)
        elif self._transport is not None:
            self._transport.close()
        sink.on_answer(answer, body, True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.open -= 1
        self._pool.forget(self)
        sink, self._sink = self._sink, None
        if sink is None:
            return
        if self._until_close and exc is None:
            sink.on_answer(None, b"", True)
        else:
            sink.on_lost("closed the connection" if exc is None else f"broke the connection: {exc}", self._served > 0)

    # the parser's side

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("a second answer to one request")

    def on_status(self, status: bytes) -> None:
        self._reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer is None:  # else a trailer, which ends here
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 100 and 103 are between the engine and us
            self._reason, self._headers = b"", []
            return
        length: int | None = None
        chunked = False
        for name, value in self._headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                chunked = value.lower().endswith(b"chunked")
        self._answer = Answer(status, self._reason, self._headers, length, chunked)
        if self._head_only or status in (204, 304):
            self._complete = True  # llhttp does not know that a HEAD was asked
            self._keep_alive = self._parser.should_keep_alive()
        elif length is None and not chunked:
            self._until_close = True

    def on_body(self, body: bytes) -> None:
        if not self._head_only:
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        if self._answer is not None:
            self._complete = True
            self._keep_alive = self._parser.should_keep_alive()  # llhttp forgets it after this callback


class Pool:
    """Connections to one endpoint. Idle ones are taken newest first, so that what is not needed ages out."""

    def __init__(self, host: str, port: int, max_idle: int, loop: asyncio.AbstractEventLoop) -> None:
        self.host, self.port = host, port
        self.open = 0
        self._max_idle = max_idle
        self._loop = loop
        self._idle: deque[UpstreamConnection] = deque()
        self._closed = False

    @property
    def idle(self) -> int:
        return len(self._idle)

    def take(self) -> UpstreamConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
        return None

    async def connect(self, timeout: float) -> UpstreamConnection:
        """Raises OSError or TimeoutError."""
        _, protocol = await asyncio.wait_for(
            self._loop.create_connection(lambda: UpstreamConnection(self), self.host, self.port), timeout
        )
        return protocol

    def give(self, connection: UpstreamConnection) -> None:
        if self._closed or len(self._idle) >= self._max_idle or not connection.is_usable:
            connection.abandon()
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    def expire(self, before: float) -> None:
        """Close what has been idle since before that time."""
        while self._idle and self._idle[0].idle_since < before:
            self._idle.popleft().abandon()

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.popleft().abandon()
