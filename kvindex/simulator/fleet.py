"""The data-parallel ranks of one simulated server: engines, their drivers and their publishers."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

from kvindex.errors import ConfigError
from kvindex.simulator.config import EngineConfig
from kvindex.simulator.driver import Clock, Driver
from kvindex.simulator.engine import Engine
from kvindex.simulator.metrics import EngineMetrics
from kvindex.simulator.publisher import Publisher, endpoint_of_rank


class EventsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where a server's ranks publish; `endpoint` None turns events off."""

    endpoint: str | None = "tcp://127.0.0.1:0"
    replay_endpoint: str | None = "tcp://127.0.0.1:0"
    topic: str = ""
    buffer_steps: int = 10_000
    bind: bool | None = True


class Fleet:
    """Made and used inside one asyncio loop; `close` ends its tasks, threads and sockets."""

    def __init__(
        self,
        config: EngineConfig,
        events: EventsConfig,
        *,
        dp_size: int = 1,
        vocabulary: list[int] | range = range(256),
        clock: Clock | None = None,
    ) -> None:
        if dp_size < 1:
            raise ConfigError(f"dp_size: {dp_size} is not at least 1")
        self.config = config
        engines = [Engine(config, vocabulary) for _ in range(dp_size)]
        self.metrics = EngineMetrics(config.model, engines)
        self.drivers: list[Driver] = []
        self._next_rank = 0
        self._tasks: list[asyncio.Task[None]] = []
        shared = clock or Clock()
        try:
            for rank, engine in enumerate(engines):
                publisher = _publisher(events, rank)
                self.drivers.append(Driver(engine, publisher, shared, self.metrics.rank(rank)))
        except ConfigError:
            self._close_publishers()
            raise

    def start(self) -> None:
        for rank, driver in enumerate(self.drivers):
            self._tasks.append(asyncio.create_task(driver.run(), name=f"engine-{rank}"))

    def pick(self, rank: int | None) -> Driver:
        """The driver of `rank`, or of the least loaded rank, taking turns among equals."""
        if rank is not None:
            return self.drivers[rank]
        count = len(self.drivers)
        order = [(self._next_rank + step) % count for step in range(count)]
        best = min(order, key=lambda index: self.drivers[index].load)
        self._next_rank = (best + 1) % count
        return self.drivers[best]

    def sources(self) -> dict[str, object]:
        """The answer of `GET /kv_event_sources`."""
        publishers = [(rank, driver.publisher) for rank, driver in enumerate(self.drivers)]
        return {str(rank): msgspec.to_builtins(p.source) for rank, p in publishers if p is not None}

    def reset_prefix_cache(self, reset_running: bool) -> bool:
        # Every rank is reset, also after one that could not be.
        results = [driver.engine.reset_prefix_cache(reset_running) for driver in self.drivers]
        return all(results)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._close_publishers()

    def _close_publishers(self) -> None:
        for driver in self.drivers:
            if driver.publisher is not None:
                driver.publisher.close()


def _publisher(events: EventsConfig, rank: int) -> Publisher | None:
    endpoint = endpoint_of_rank(events.endpoint, rank)
    if endpoint is None:
        return None
    return Publisher(
        rank=rank,
        topic=events.topic,
        endpoint=endpoint,
        replay_endpoint=endpoint_of_rank(events.replay_endpoint, rank),
        bind=events.bind,
        buffer_steps=events.buffer_steps,
    )
