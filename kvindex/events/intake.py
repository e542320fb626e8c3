"""Keeps one subscriber for every source that the finders find, and none for what they no longer do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec
import structlog
import zmq

from kvindex.errors import ServiceError
from kvindex.events.receiver import Context
from kvindex.events.sink import IndexSink
from kvindex.events.sources import Finder, Source
from kvindex.events.subscriber import Subscriber, SubscriberStatus

_RETRY_SECONDS = 5.0  # between two tries to open a socket that could not be


class FinderStatus(msgspec.Struct, frozen=True):
    """`found` sources; `error`: why the last look failed, while what was found before stays."""

    where: str
    found: int
    error: str | None


class Intake:
    """Runs in one event loop; subscribers have their own threads and call the sink from them.

    `prepare` is called with each source just before its subscriber starts: the time to tell an index what config says
    of it. Two finders that name one address: the first wins.
    """

    def __init__(
        self,
        finders: Sequence[Finder],
        sink: IndexSink,
        *,
        prepare: Callable[[Source], object] | None = None,
        stop_seconds: float = 5.0,
    ) -> None:
        self._finders = list(finders)
        self._sink = sink
        self._prepare = prepare
        self._stop_seconds = stop_seconds
        self._context: Context = zmq.Context()
        self._found: dict[int, tuple[Source, ...]] = {}
        self._due = [0.0] * len(self._finders)
        self._running: dict[str, tuple[Source, Subscriber]] = {}
        self._failed: dict[str, str] = {}  # source -> why its subscriber did not start
        self._log = structlog.get_logger().bind(component="intake")

    async def run(self) -> None:
        """Look and follow until cancelled."""
        while True:
            await self.poll()
            wait = min(self._due, default=time.monotonic() + 60) - time.monotonic()
            await asyncio.sleep(max(0.05, min(wait, _RETRY_SECONDS) if self._failed else wait))

    async def poll(self) -> None:
        """One look at every finder that is due, then start and stop what changed."""
        due = [i for i, at in enumerate(self._due) if at <= time.monotonic()]
        before = {i: self._finders[i].error for i in due}
        for i, found in zip(due, await asyncio.gather(*[self._finders[i].look() for i in due]), strict=True):
            finder = self._finders[i]
            self._found[i] = found
            self._due[i] = time.monotonic() + finder.interval_seconds
            if finder.error is not None and finder.error != before[i]:
                self._log.warning("sources cannot be read", where=finder.where, error=finder.error, kept=len(found))
        await self._follow()

    async def stop(self) -> bool:
        """End all subscribers; the sink keeps what it knows. True when all ended in time."""
        stopping = [asyncio.to_thread(subscriber.stop, self._stop_seconds) for _, subscriber in self._running.values()]
        ended = all(await asyncio.gather(*stopping))
        self._running.clear()
        if ended:
            self._context.destroy(linger=0)
        return ended

    def renew(self, source: str) -> bool:
        """What is known of a source is doubted: have it forgotten and replayed from the beginning, soon. False when
        there is no such source, or no replay socket. May be called from any thread."""
        running = self._running.get(source)
        return running is not None and running[1].renew()

    def subscribers(self) -> list[SubscriberStatus]:
        return [subscriber.status() for _, subscriber in self._running.values()]

    def sources(self) -> list[Source]:
        return [source for source, _ in self._running.values()]

    def finders(self) -> list[FinderStatus]:
        return [FinderStatus(f.where, len(self._found.get(i, ())), f.error) for i, f in enumerate(self._finders)]

    def failed(self) -> dict[str, str]:
        """Sources whose socket could not be opened, and why. Tried again at every look."""
        return dict(self._failed)

    async def _follow(self) -> None:
        wanted: dict[str, Source] = {}
        for i in range(len(self._finders)):
            for source in self._found.get(i, ()):
                wanted.setdefault(source.socket.source, source)
        for name, (running, subscriber) in list(self._running.items()):
            if wanted.get(name) != running:
                await asyncio.to_thread(subscriber.stop, self._stop_seconds)
                del self._running[name]
                if name not in wanted:
                    self._sink.close_publisher(name)
                elif wanted[name].socket.replay:
                    # The new subscriber replays everything from the start; to the index that has to be new.
                    self._sink.restarted(name)
                self._log.info("source stopped", source=name, gone=name not in wanted)
        self._failed = {name: why for name, why in self._failed.items() if name in wanted}
        for name, source in wanted.items():
            if name not in self._running:
                self._start(name, source)

    def _start(self, name: str, source: Source) -> None:
        if self._prepare is not None:
            self._prepare(source)
        subscriber = Subscriber(source.socket, self._sink, self._context)
        try:
            subscriber.start()
        except ServiceError as failure:
            if self._failed.get(name) != str(failure):
                self._log.error("source cannot be read", source=name, error=str(failure))
            self._failed[name] = str(failure)
            return
        self._failed.pop(name, None)
        self._running[name] = (source, subscriber)
        self._log.info("source started", source=name, engine=source.engine, replay=source.socket.replay)
