"""vLLM's event socket: a PUB socket with a sequence per rank, and a ROUTER socket that replays the last batches."""

from __future__ import annotations

import threading
from collections import deque

import zmq

from kvindex.errors import ConfigError
from kvindex.simulator.wire import END_OF_REPLAY, Event, EventSource, frames


class Publisher:
    """One data-parallel rank's stream. `publish` may be called from one thread; the replay socket has its own.

    The event socket binds or connects as vLLM's does (`binds`) unless `bind` says so; the replay socket always binds.
    Port 0 lets the OS choose: read `source`.
    """

    def __init__(
        self,
        *,
        rank: int,
        topic: str,
        endpoint: str,
        replay_endpoint: str | None,
        bind: bool | None = None,
        buffer_steps: int = 10_000,
        hwm: int = 100_000,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self._context = context or zmq.Context.instance()
        self._rank = rank
        self._topic = topic
        self._sequence = 0
        self._buffer: deque[list[bytes]] = deque(maxlen=buffer_steps)
        self._lock = threading.Lock()  # guards _buffer
        self._withhold = 0

        self._pub = self._context.socket(zmq.PUB)
        self._pub.set_hwm(hwm)
        self._pub.linger = 200
        router: zmq.Socket[bytes] | None = None
        try:
            if binds(endpoint) if bind is None else bind:
                endpoint = _bind(self._pub, endpoint)
            else:
                self._pub.connect(endpoint)
            if replay_endpoint is not None:
                router = self._context.socket(zmq.ROUTER)
                router.linger = 200
                replay_endpoint = _bind(router, replay_endpoint)
        except ConfigError:
            self._pub.close(linger=0)
            if router is not None:
                router.close(linger=0)
            raise

        self._stop: zmq.Socket[bytes] | None = None
        self._thread: threading.Thread | None = None
        if router is not None:
            wake = f"inproc://sim-replay-{id(self)}"
            stopped = self._context.socket(zmq.PAIR)
            stopped.bind(wake)
            self._stop = self._context.socket(zmq.PAIR)
            self._stop.connect(wake)
            self._thread = threading.Thread(
                target=self._serve_replay, args=(router, stopped), name=f"sim-replay-{rank}", daemon=True
            )
            self._thread.start()
        self.source = EventSource(
            endpoint=endpoint,
            replay_endpoint=replay_endpoint,
            buffer_steps=buffer_steps,
            hwm=hwm,
            max_queue_size=hwm,
            topic=topic,
        )

    @property
    def sequence(self) -> int:
        """The number that the next batch gets."""
        return self._sequence

    def withhold(self, batches: int) -> None:
        """Lose the next `batches` on the wire, as a full socket would; the replay socket still has them."""
        self._withhold += batches

    def publish(self, events: list[Event], timestamp: float) -> None:
        message = frames(self._topic, self._sequence, timestamp, events, self._rank)
        self._sequence += 1
        if self._withhold:
            self._withhold -= 1
        else:
            self._pub.send_multipart(message)
        with self._lock:
            self._buffer.append(message)

    def close(self) -> None:
        if self._stop is not None and self._thread is not None:
            self._stop.send(b"")
            self._thread.join(timeout=5.0)
            self._stop.close(linger=0)
        self._pub.close()

    def _serve_replay(self, router: zmq.Socket[bytes], stopped: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(router, zmq.POLLIN)
        poller.register(stopped, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if stopped in ready:
                    return
                asked = router.recv_multipart()
                if len(asked) != 3 or len(asked[2]) != 8:
                    continue  # not a replay request; vLLM logs and drops it too
                client, _, start = asked
                with self._lock:
                    # Eight bytes big-endian compare like the numbers they are.
                    messages = [message for message in self._buffer if message[1] >= start]
                for message in messages:
                    router.send_multipart((client, b"", *message))
                router.send_multipart((client, b"", b"", END_OF_REPLAY, b""))
        finally:
            router.close()
            stopped.close(linger=0)


def binds(endpoint: str) -> bool:
    """vLLM's rule: wildcards and local transports are listened on, anything else is called."""
    return "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))


def endpoint_of_rank(endpoint: str | None, rank: int) -> str | None:
    """vLLM's rule for data-parallel ranks: rank r listens on port + r; port 0 stays 0."""
    if endpoint is None or not endpoint.startswith("tcp://"):
        return endpoint if endpoint is None or rank == 0 else f"{endpoint}_dp{rank}"
    address, _, port = endpoint.rpartition(":")
    if not port.isdigit():
        raise ConfigError(f"event endpoint: {endpoint!r} does not end in :PORT")
    return f"{address}:{int(port) + rank}" if port != "0" else endpoint


def _bind(socket: zmq.Socket[bytes], endpoint: str) -> str:
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(f"event endpoint: cannot listen on {endpoint}: {error}") from error
    if not endpoint.endswith(":0"):
        return endpoint
    bound = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(bound, bytes)
    return bound.rstrip(b"\0").decode()
