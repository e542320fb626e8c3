"""The client's side of a connection: requests in, one answer at a time out.

A request is handed on when its body is complete, because routing needs the prompt. Requests that arrive while an
earlier one is still being answered wait in order; past a few, reading stops until they are done. A client that closes
its side, even half, counts as gone: what runs for it is cancelled.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Literal, Protocol, cast

import httptools

from kvindex.router import wire
from kvindex.router.wire import Refusal

if TYPE_CHECKING:
    from kvindex.router.config import Limits, Timeouts

MAX_PIPELINED = 8
LINGER_SECONDS = 2.0  # how long a refused upload is read and thrown away, so that the refusal reaches the client


class Request:
    """One whole request. `headers` have lower-case names; `dropped` names those that end at this hop."""

    __slots__ = ("body", "dropped", "has_body", "headers", "keep_alive", "method", "target", "version")

    def __init__(self, method: bytes, target: bytes, version: str, headers: wire.Headers) -> None:
        self.method = method
        self.target = target
        self.version = version
        self.headers = headers
        self.dropped: frozenset[bytes] = frozenset()
        self.body = b""
        self.has_body = False
        self.keep_alive = True

    @property
    def path(self) -> bytes:
        return self.target.split(b"?", 1)[0]

    def header(self, name: bytes) -> bytes | None:
        for key, value in self.headers:
            if key == name:
                return value
        return None


class Work(Protocol):
    """What answers a request. It ends by calling `ClientConnection.finished`, or by closing the connection."""

    def start(self) -> None: ...
    def cancel(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def check(self, now: float) -> None: ...


Role = Literal["both", "clients", "admin"]  # what a listener is for


class Host(Protocol):
    """What a connection needs of the router around it."""

    limits: Limits
    timeouts: Timeouts
    loop: asyncio.AbstractEventLoop
    connections: set[ClientConnection]
    buffered_bytes: int
    draining: bool

    def work(self, connection: ClientConnection, request: Request) -> Work: ...
    def refused(self, reason: str) -> None: ...


class ClientConnection(asyncio.Protocol):
    def __init__(self, host: Host, role: Role = "both") -> None:
        self._host = host
        self.role = role
        self._limits = host.limits
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[Request | Refusal] = deque()
        self._work: Work | None = None
        self._pumping = False
        self._reading_paused = False
        self._ignore_input = False  # after a refusal, or when closing
        self._continue_owed = False
        self._begun = False  # a request has begun to arrive and is not complete
        self._deadline = 0.0  # of that request, or of the silence between two
        self._stalled_at: float | None = None
        self._refusal: Refusal | None = None  # raised inside a parser callback
        self._request: Request | None = None
        self._head_bytes = 0
        self._target = b""
        self._headers: wire.Headers = []
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._held_bytes = 0  # of the router's budget for request bodies

    # the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        self._deadline = self._host.loop.time() + self._host.timeouts.keepalive_seconds
        if len(self._host.connections) >= self._limits.max_connections:
            self._ignore_input = True
            self._queue.append(Refusal(503, "too_many_connections", "the router's connection limit is reached"))
            self._host.connections.add(self)
            self._pump()
            return
        self._host.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._ignore_input:
            return
        if not self._begun or self._request is None:
            self._head_bytes += len(data)
        while data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # We stay with HTTP/1.1, which a server may; the parser, however, is spent.
                self._parser = httptools.HttpRequestParser(self)
                data = data[upgrade.args[0] :]
                continue
            except httptools.HttpParserError as error:
                if not self._ignore_input:  # else: bytes after a request that said it was the last
                    self._refuse(self._refusal or Refusal(400, "bad_request", f"not HTTP/1.1: {error}"))
            break
        if self._begun and self._request is None and self._head_bytes > self._limits.max_header_bytes:
            self._refuse(self._too_long())
        self._pump()

    def eof_received(self) -> bool | None:
        self._ignore_input = True
        self._cancel()
        return None  # the transport closes itself

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._host.connections.discard(self)
        self._ignore_input = True
        self._cancel()
        self._queue.clear()
        self._body = []
        self._hold(-self._held_bytes)

    def pause_writing(self) -> None:
        self._stalled_at = self._host.loop.time()
        if self._work is not None:
            self._work.pause()

    def resume_writing(self) -> None:
        self._stalled_at = None
        if self._work is not None:
            self._work.resume()

    # the parser's side

    def on_message_begin(self) -> None:
        self._begun = True
        self._request = None
        self._target = b""
        self._headers = []
        self._deadline = self._host.loop.time() + self._host.timeouts.request_seconds

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._request is None:  # else a trailer, which ends here
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        request = Request(parser.get_method(), self._target, parser.get_http_version(), self._headers)
        size = len(self._target) + sum(len(name) + len(value) + 4 for name, value in self._headers)
        if size > self._limits.max_header_bytes or len(self._headers) > self._limits.max_headers:
            self._raise(self._too_long())
        framing = wire.request_framing(self._headers, request.version)
        if isinstance(framing, Refusal):
            self._raise(framing)
            return
        if request.method == b"CONNECT":
            self._raise(Refusal(501, "bad_method", "CONNECT is not served here"))
        if framing.content_length is not None and framing.content_length > self._limits.max_body_bytes:
            self._raise(self._too_large())
        request.dropped = framing.dropped
        request.keep_alive = parser.should_keep_alive()
        request.has_body = framing.chunked or framing.content_length is not None
        self._request = request
        self._body_bytes = 0
        if framing.expects_continue and framing.content_length != 0:
            self._continue_owed = True

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._body_bytes += len(body)
        self._hold(len(body))
        if self._body_bytes > self._limits.max_body_bytes:
            self._raise(self._too_large())
        if self._host.buffered_bytes > self._limits.max_buffered_bytes:
            self._raise(Refusal(503, "too_much_buffered", "the router holds as many request bodies as it may"))

    def on_message_complete(self) -> None:
        request = self._request
        assert request is not None
        request.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        self._body_bytes = 0
        self._request = None
        self._begun = False
        self._continue_owed = False
        self._head_bytes = 0
        self._ignore_input = not request.keep_alive
        self._queue.append(request)

    # the router's side

    @property
    def is_closing(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def finished(self, request: Request, keep_alive: bool) -> None:
        """The work is done and its whole answer written."""
        self._hold(-len(request.body))
        self._work = None
        if not keep_alive or self._host.draining:
            self._ignore_input = True
            self._queue.clear()
            self._close()
            return
        self._deadline = self._host.loop.time() + (
            self._host.timeouts.request_seconds if self._begun else self._host.timeouts.keepalive_seconds
        )
        if not self._pumping:
            self._pump()

    def broken(self) -> None:
        """The answer cannot be completed and has begun: the client must see that, so the connection is reset."""
        self._work = None
        self._ignore_input = True
        if self._transport is not None:
            self._transport.abort()

    def drain(self) -> None:
        """No further request; what is being answered may finish."""
        if self._work is None and not self._queue:
            self._ignore_input = True
            self._close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def check(self, now: float) -> None:
        """Called a few times a second: end what has waited too long."""
        if self._stalled_at is not None and now - self._stalled_at > self._host.timeouts.client_stall_seconds:
            self._host.refused("client_stalled")
            self.abort()
        elif self._work is not None:
            self._work.check(now)
        elif now > self._deadline:
            if self._begun and not self._ignore_input:
                self._refuse(Refusal(408, "request_timeout", "the request took too long to arrive"))
                self._pump()
            else:
                self._close()

    # inside

    def _pump(self) -> None:
        self._pumping = True
        while self._work is None and self._queue:
            item = self._queue.popleft()
            if isinstance(item, Refusal):
                self._answer_refusal(item)
                break
            self._work = self._host.work(self, item)
            if self._stalled_at is not None:
                self._work.pause()
            self._work.start()
        self._pumping = False
        if self._continue_owed and self._work is None and not self._ignore_input:
            self._continue_owed = False
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._transport is None or self._transport.is_closing():
            return
        if len(self._queue) >= MAX_PIPELINED and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()
        elif self._reading_paused and not self._queue:
            self._reading_paused = False
            self._transport.resume_reading()

    def _raise(self, refusal: Refusal) -> None:
        self._refusal = refusal
        raise ValueError(refusal.reason)  # httptools turns it into an HttpParserError and stops

    def _refuse(self, refusal: Refusal) -> None:
        self._ignore_input = True
        self._begun = False
        self._hold(-self._body_bytes)
        self._body_bytes = 0
        self._body = []
        self._queue.append(refusal)

    def _answer_refusal(self, refusal: Refusal) -> None:
        self._host.refused(refusal.reason)
        body = wire.error_body(refusal.status, refusal.reason, refusal.message)
        self.write(wire.own_answer(refusal.status, body, keep_alive=False))
        if self._transport is not None and self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()
            self._deadline = self._host.loop.time() + LINGER_SECONDS
        else:
            self._close()

    def _too_long(self) -> Refusal:
        return Refusal(
            431, "head_too_large", f"the head is over {self._limits.max_header_bytes} bytes or too many headers"
        )

    def _too_large(self) -> Refusal:
        return Refusal(413, "body_too_large", f"the body is over {self._limits.max_body_bytes} bytes")

    def _hold(self, size: int) -> None:
        self._held_bytes += size
        self._host.buffered_bytes += size

    def _cancel(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.cancel()

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()
