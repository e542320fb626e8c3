"""The thread that reads one event socket and never waits for anybody else.

A SUB socket that is read slowly makes the publisher drop messages; so this thread only moves messages into an inbox,
and watches the connection through a socket monitor. Reconnecting, with back-off, is ZMQ's own; except that ZMQ gives a
connection up for good after what it calls a protocol error (a message over the limit, a peer that is no ZMQ socket),
so a source that stays away is connected anew.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import structlog
import zmq
from zmq.utils.monitor import parse_monitor_message

from kvindex.errors import ServiceError
from kvindex.events.inbox import Inbox

Context = zmq.Context[zmq.Socket[bytes]]

_HWM = 10_000  # messages that ZMQ may hold; this thread empties it faster than a network fills it
_RECONNECT_MS, _RECONNECT_MAX_MS = 100, 5_000
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 10_000, 30_000  # finds a peer that is gone without a word
_UP = zmq.EVENT_HANDSHAKE_SUCCEEDED
_DOWN = zmq.EVENT_DISCONNECTED


class Receiver:
    """`on_connect` is called from the thread whenever a peer came (back): messages may have been lost meanwhile."""

    def __init__(
        self,
        context: Context,
        endpoint: str,
        inbox: Inbox,
        *,
        bind: bool,
        max_message_bytes: int,
        renew_seconds: float,
        on_connect: Callable[[], None],
    ) -> None:
        self.endpoint = endpoint
        self.peers = 0  # connections that are up
        self.connects = 0  # ever
        self._context = context
        self._inbox = inbox
        self._bind = bind
        self._max_message_bytes = max_message_bytes
        self._renew_seconds = renew_seconds
        self._on_connect = on_connect
        self._thread: threading.Thread | None = None
        self._wake: zmq.Socket[bytes] | None = None
        self._log = structlog.get_logger().bind(component="events", source=endpoint)

    def start(self) -> str:
        """Open the socket and begin to read. Returns the address (a bound port 0 is resolved).

        Raises ServiceError when the address cannot be used.
        """
        socket = self._context.socket(zmq.SUB)
        # Before connecting, or a quick peer's arrival would go unseen.
        monitor = socket.get_monitor_socket(_UP | _DOWN)
        try:
            address = self._open(socket)
            # The peer of the wake-up pair is created here, because inproc wants it bound before it is connected.
            stopped, self._wake = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
            name = f"inproc://kvindex-receiver-{id(self)}"
            stopped.bind(name)
            self._wake.connect(name)
        except zmq.ZMQError as failure:
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=0)
            verb = "listen on" if self._bind else "connect to"
            raise ServiceError(f"{self.endpoint}: cannot {verb} it: {failure}") from None
        self._thread = threading.Thread(
            target=self._read, args=(socket, monitor, stopped), name=f"kvindex-receive {self.endpoint}", daemon=True
        )
        self._thread.start()
        return address

    def stop(self, timeout: float) -> bool:
        """True when the thread has ended and its sockets are closed. May be called again."""
        if self._thread is None:
            return True
        if self._wake is not None:
            self._wake.send(b"", zmq.NOBLOCK)
            self._wake.close(linger=100)
            self._wake = None
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _open(self, socket: zmq.Socket[bytes]) -> str:
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.RCVHWM, _HWM),
            (zmq.MAXMSGSIZE, self._max_message_bytes),
            (zmq.RECONNECT_IVL, _RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS),
            (zmq.IPV6, 1),
        ):
            socket.setsockopt(option, value)
        # Everything: a subscription by topic would make the others' messages look like losses.
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        if not self._bind:
            socket.connect(self.endpoint)
            return self.endpoint
        socket.bind(self.endpoint)
        bound = socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        return bound.rstrip(b"\0").decode()

    def _read(self, socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes], stopped: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        for each in (socket, monitor, stopped):
            poller.register(each, zmq.POLLIN)
        renew_at = time.monotonic() + self._renew_seconds
        try:
            while True:
                away = not self._bind and not self.peers
                patience_ms = int(max(0.0, renew_at - time.monotonic()) * 1000) + 1 if away else None
                ready = dict(poller.poll(patience_ms))
                if stopped in ready:
                    return
                if monitor in ready:
                    self._watch(monitor)
                if socket in ready:
                    self._drain(socket)
                if not away:
                    renew_at = time.monotonic() + self._renew_seconds
                elif time.monotonic() >= renew_at:
                    renew_at = time.monotonic() + self._renew_seconds
                    with contextlib.suppress(zmq.ZMQError):  # given up already: there is nothing to disconnect
                        socket.disconnect(self.endpoint)
                    socket.connect(self.endpoint)
        except zmq.ContextTerminated:
            pass  # the owner ended the context before us
        finally:
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=0)
            stopped.close(linger=0)

    def _drain(self, socket: zmq.Socket[bytes]) -> None:
        for _ in range(1000):  # then look at the other sockets again
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if not self._inbox.put(frames) and self._inbox.overflow & (self._inbox.overflow - 1) == 0:
                self._log.warning(
                    "queue is full, messages are dropped", dropped=self._inbox.overflow
                )  # at 1, 2, 4, ...

    def _watch(self, monitor: zmq.Socket[bytes]) -> None:
        event = parse_monitor_message(monitor.recv_multipart())["event"]
        if event == _UP:
            self.peers += 1
            self.connects += 1
            self._log.info("connected", peers=self.peers)
            self._on_connect()
        elif event == _DOWN:
            self.peers = max(0, self.peers - 1)
            self._log.info("disconnected", peers=self.peers)
