"""One source of KV events: its socket, its replay socket, and the thread that feeds a sink in order.

    SUB socket -> receiver thread -> bounded inbox -> consumer thread -> OrderedFeed -> sink
                                                           ^ DEALER <- replay socket

The consumer alone talks to the sink and to the replay socket. While it waits for a replay, messages gather in the
inbox; what does not fit there is dropped, counted, and found again as a gap.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

import msgspec
import structlog
import zmq

from kvindex.events.inbox import Inbox
from kvindex.events.ordered import OrderedFeed
from kvindex.events.receiver import Context, Receiver
from kvindex.events.replaying import ReplayLimits, ask
from kvindex.events.sink import Sink

_SETTLED_SECONDS = 1.0


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where one publisher (or, bound, many) is found, and how much may be kept for it.

    `source` is also the name under which messages reach the sink. With `bind` publishers connect to us. Only topics
    that begin with `topic` reach the sink. Without `replay` what is lost stays lost.
    """

    source: str
    replay: str | None = None
    bind: bool = False
    topic: str = ""
    max_messages: int = 20_000
    max_bytes: int = 256 << 20
    max_message_bytes: int = 64 << 20
    probe_seconds: float = 5.0
    renew_seconds: float = 5.0  # a source that is away this long is connected anew
    replay_limits: ReplayLimits = ReplayLimits()


class SubscriberStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Counts are since start. `lost`: messages that no replay could bring back; `overflow`: dropped by us, most of
    them replayed later; `failures`: replays without a whole answer; `errors`: calls of the sink that raised."""

    source: str
    address: str
    state: str  # connecting, connected, stopped, failed
    detail: str
    connects: int
    received: int
    waiting: int
    overflow: int
    replays: int
    failures: int
    restarts: int
    malformed: int
    lost: int
    errors: int
    last_sequence: int | None


class Subscriber:
    """`start` once, `stop` once. The sink is called from one thread of this subscriber."""

    def __init__(self, config: SourceConfig, sink: Sink, context: Context | None = None) -> None:
        self.config = config
        self._sink = sink
        self._own_context = context is None
        self._context: Context = context or zmq.Context()
        self._stopping = threading.Event()
        self._may_have_missed = threading.Event()
        self._rebuild = threading.Event()
        self._inbox = Inbox(config.max_messages, config.max_bytes)
        self._receiver = Receiver(
            self._context,
            config.source,
            self._inbox,
            bind=config.bind,
            max_message_bytes=config.max_message_bytes,
            renew_seconds=config.renew_seconds,
            on_connect=self._connected,
        )
        self._feed = OrderedFeed(
            config.source,
            sink,
            self._ask if config.replay else None,
            topic_prefix=config.topic,
            pause=lambda seconds: not self._stopping.wait(seconds),
        )
        self._consumer = threading.Thread(target=self._consume, name=f"kvindex-consume {config.source}", daemon=True)
        self._address = config.source
        self._errors = 0
        self._overflow_seen = 0
        self._detail = ""
        self._log = structlog.get_logger().bind(component="events", source=config.source)

    def start(self) -> None:
        """Returns at once; connecting goes on in the background. Raises ServiceError when the address is unusable."""
        try:
            self._address = self._receiver.start()
        except Exception:
            self._end_context()
            raise
        self._consumer.start()

    def stop(self, deadline_seconds: float = 5.0) -> bool:
        """End both threads and close all sockets. What waits in the inbox is not delivered any more.

        False when a thread did not end in time (a sink that blocks); it ends by itself when the sink returns.
        """
        until = time.monotonic() + deadline_seconds
        self._stopping.set()
        self._inbox.nudge()
        ended = self._receiver.stop(deadline_seconds)
        if self._consumer.ident is not None:
            self._consumer.join(max(0.0, until - time.monotonic()))
            ended = ended and not self._consumer.is_alive()
        if ended:
            self._end_context()
        return ended

    def renew(self) -> bool:
        """Have the sink forget this source and replay it from the beginning, soon, in the consumer's thread. False, and
        nothing happens, without a replay socket."""
        if not self.config.replay:
            return False
        self._rebuild.set()
        self._inbox.nudge()
        return True

    def status(self) -> SubscriberStatus:
        detail = self._detail or self._feed.problem
        if self._stopping.is_set():
            return self._status("stopped", detail)
        if self._consumer.ident is not None and not self._consumer.is_alive():
            return self._status("failed", detail)
        if self._receiver.peers:
            return self._status("connected", detail)
        return self._status("connecting", "no publisher has connected yet" if self.config.bind else detail)

    def _status(self, state: str, detail: str) -> SubscriberStatus:
        return SubscriberStatus(
            source=self.config.source,
            address=self._address,
            state=state,
            detail=detail,
            connects=self._receiver.connects,
            received=self._inbox.received,
            waiting=len(self._inbox),
            overflow=self._inbox.overflow,
            replays=self._feed.replays,
            failures=self._feed.failures,
            restarts=self._feed.restarts,
            malformed=self._feed.malformed,
            lost=self._feed.lost,
            errors=self._errors,
            last_sequence=self._feed.last_sequence,
        )

    # ------------------------------------------------------------------ the consumer thread

    def _consume(self) -> None:
        next_probe = time.monotonic() + self.config.probe_seconds
        while not self._stopping.is_set():
            missed = self._may_have_missed.is_set() or self._inbox.overflow > self._overflow_seen
            frames = self._inbox.get(0.0 if missed else max(0.0, next_probe - time.monotonic()))
            try:
                if self._rebuild.is_set():
                    self._rebuild.clear()
                    self._feed.rebuild()
                if frames is not None:
                    self._feed.live(frames)
                    next_probe = time.monotonic() + self.config.probe_seconds
                # What may be missing is asked for only when nothing waits: what waits would show it by itself.
                elif missed or time.monotonic() >= next_probe:
                    next_probe = time.monotonic() + self._sync()
            except Exception as failure:  # noqa: BLE001 - a sink that raises must not end the stream for good
                self._errors += 1
                self._detail = f"{type(failure).__name__}: {failure}"
                self._log.exception("the sink failed on a message")

    def _sync(self) -> float:
        """Ask for what is missing; returns how long to wait before asking again."""
        just_connected = self._may_have_missed.is_set()
        self._may_have_missed.clear()
        self._overflow_seen = self._inbox.overflow
        self._feed.sync()
        # A publisher that we just reached may not have our subscription yet: what it sends until then shows soon.
        return min(_SETTLED_SECONDS, self.config.probe_seconds) if just_connected else self.config.probe_seconds

    def _connected(self) -> None:
        self._may_have_missed.set()
        self._inbox.nudge()

    def _ask(self, start: int) -> Generator[list[bytes], None, None]:
        assert self.config.replay is not None
        yield from ask(self._context, self.config.replay, start, self.config.replay_limits, self._stopping)

    def _end_context(self) -> None:
        if self._own_context:
            self._context.destroy(linger=0)
