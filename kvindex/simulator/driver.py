"""Drives one engine in real time inside an asyncio loop, and publishes what it announces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from kvindex.errors import ConfigError
from kvindex.simulator.engine import Engine
from kvindex.simulator.metrics import RankMetrics
from kvindex.simulator.publisher import Publisher
from kvindex.simulator.request import Request
from kvindex.simulator.results import Output

# Behind by more than this (a busy machine), the engine's time jumps instead of catching up.
_MAX_LAG_SECONDS = 0.5


class Clock:
    """Engine seconds: real ones times `scale`."""

    def __init__(self, scale: float = 1.0) -> None:
        if not scale > 0:
            raise ConfigError(f"time_scale: {scale} is not above 0")
        self.scale = scale
        self._start = time.monotonic()

    def now(self) -> float:
        return (time.monotonic() - self._start) * self.scale


class Driver:
    """Owns an engine: nobody else may call it. All methods run in the loop's thread."""

    def __init__(self, engine: Engine, publisher: Publisher | None, clock: Clock, metrics: RankMetrics) -> None:
        self.engine = engine
        self.publisher = publisher
        self._clock = clock
        self._metrics = metrics
        self._queues: dict[str, asyncio.Queue[Output]] = {}
        self._wake = asyncio.Event()

    @property
    def load(self) -> int:
        """vLLM's own measure for spreading requests over ranks: waiting ones weigh four times."""
        return len(self.engine.running) + 4 * len(self.engine.waiting)

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """The request's tokens as they come; leaving early aborts it. Raises UsageError when it cannot be served."""
        self.engine.add(request, self._clock.now())
        # Bounded by the request's own max_tokens.
        queue: asyncio.Queue[Output] = asyncio.Queue()
        self._queues[request.id] = queue
        self._wake.set()
        finished = False
        try:
            while not finished:
                output = await queue.get()
                finished = output.finish is not None
                yield output
        finally:
            del self._queues[request.id]
            if not finished:
                self.engine.abort(request.id)
                self._metrics.aborted(request.id)

    async def run(self) -> None:
        """Step for ever; cancel to stop."""
        due: float | None = None
        while True:
            now = self._clock.now()
            if due is not None and now < due:
                await asyncio.sleep((due - now) / self._clock.scale)
            elif due is None and self.engine.is_idle:
                self._wake.clear()
                await self._wake.wait()
            else:
                await asyncio.sleep(0)
            # A step begins when the one before it was due, so that late wake-ups do not slow the engine down.
            now = self._clock.now()
            if due is not None and now - due < _MAX_LAG_SECONDS * self._clock.scale:
                now = due
            due = self._step(now)

    def _step(self, now: float) -> float | None:
        result = self.engine.step(now)
        # Events leave before answers do: who has the answer may find the event on its way already.
        if result.events and self.publisher is not None:
            self.publisher.publish(result.events, time.time())
        for output in result.outputs:
            self._metrics.observe(output, now)
            queue = self._queues.get(output.request.id)
            if queue is not None:
                queue.put_nowait(output)
        return result.next_time
