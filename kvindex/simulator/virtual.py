"""A fleet of simulated engines under a virtual clock: time jumps from one event to the next, so that an hour of
requests takes seconds. Nothing here is random: equal inputs give equal reports."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from kvindex.errors import UsageError
from kvindex.simulator.engine import Engine
from kvindex.simulator.request import Request
from kvindex.simulator.results import StepResult
from kvindex.simulator.wire import frames


class TimedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request of a trace, at `at` seconds."""

    at: float
    id: str
    prompt: Sequence[int]
    output_tokens: int
    lora: str | None = None
    cache_salt: str | None = None
    session_id: str | None = None


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request, in seconds of virtual time."""

    id: str
    endpoint: str
    at: float
    queue_seconds: float
    first_token_seconds: float
    total_seconds: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


# Picks the endpoint for a request; sees the engines as they are at that moment.
Choose = Callable[[TimedRequest, Mapping[str, Engine]], str]
# Takes one message of a publisher, as a subscriber would: (source, frames). `Index.ingest` fits.
Deliver = Callable[[str, list[bytes]], object]


@dataclass
class Report:
    """The outcome of a simulation."""

    served: list[Served] = field(default_factory=list)
    end: float = 0.0
    messages: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were found cached."""
        prompt = sum(item.prompt_tokens for item in self.served)
        return sum(item.cached_tokens for item in self.served) / prompt if prompt else 0.0

    def first_token_seconds(self, percentile: float) -> float:
        return self._percentile("first_token_seconds", percentile)

    def total_seconds(self, percentile: float) -> float:
        return self._percentile("total_seconds", percentile)

    def _percentile(self, name: str, percentile: float) -> float:
        values = [getattr(item, name) for item in self.served]
        return float(np.percentile(values, percentile)) if values else float("nan")


def simulate(
    engines: Mapping[str, Engine], requests: Iterable[TimedRequest], choose: Choose, deliver: Deliver | None = None
) -> Report:
    """Run `requests` (in order of time; a generator is fine) to their end.

    `deliver` gets every message an engine would publish, at the moment it would leave. Engines that nobody listens to
    are fastest with `report_events=False`.
    """
    report = Report()
    topics = {name: f"kv@{name}@{engine.config.model}" for name, engine in engines.items()}
    sequences = dict.fromkeys(engines, 0)
    due: list[tuple[float, str]] = []
    busy: set[str] = set()

    def step(name: str, now: float) -> None:
        result = engines[name].step(now)
        if result.events and deliver is not None:
            deliver(name, frames(topics[name], sequences[name], now, result.events))
            sequences[name] += 1
            report.messages += 1
        _collect(report, name, result, now)
        if result.next_time is None:
            busy.discard(name)
        else:
            busy.add(name)
            heapq.heappush(due, (result.next_time, name))

    def run_until(moment: float) -> None:
        while due and due[0][0] <= moment:
            at, name = heapq.heappop(due)
            # Engines do not see each other: between two arrivals each may run ahead on its own.
            later = engines[name].coast(moment)
            assert later is not None
            if later > at:
                heapq.heappush(due, (later, name))
                continue
            report.end = at
            step(name, at)

    last = float("-inf")
    for timed in requests:
        if timed.at < last:
            raise UsageError(f"request {timed.id!r} at {timed.at} comes after one at {last}: sort the trace by time")
        last = timed.at
        # What is due at the very moment of an arrival ends before it.
        run_until(timed.at)
        name = choose(timed, engines)
        if name not in engines:
            raise UsageError(f"the router chose {name!r}, which is not one of {list(engines)}")
        engines[name].add(_request(timed), timed.at)
        if name not in busy:
            step(name, timed.at)
    run_until(float("inf"))
    return report


def _request(timed: TimedRequest) -> Request:
    return Request(
        timed.id,
        timed.prompt,
        timed.output_tokens,
        lora=timed.lora,
        cache_salt=timed.cache_salt,
        session_id=timed.session_id,
    )


def _collect(report: Report, endpoint: str, result: StepResult, now: float) -> None:
    for request, _, finish in result.outputs:
        if finish is None:
            continue
        first, scheduled = request.first_token_at, request.scheduled_at
        assert first is not None
        assert scheduled is not None
        report.served.append(
            Served(
                id=request.id,
                endpoint=endpoint,
                at=request.arrival,
                queue_seconds=scheduled - request.arrival,
                first_token_seconds=first - request.arrival,
                total_seconds=now - request.arrival,
                prompt_tokens=request.prompt_tokens,
                cached_tokens=request.cached_tokens or 0,
                output_tokens=request.output_tokens,
            )
        )
