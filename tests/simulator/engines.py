"""Helpers: small engines, and running them dry."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence

from kvindex.simulator import Engine, EngineConfig, LatencyModel, Output, Request
from kvindex.simulator.wire import Event

_ids = itertools.count()


def config(**fields: object) -> EngineConfig:
    """Four-token blocks and a clock that is easy to compute with."""
    settings: dict[str, object] = {
        "block_size": 4,
        "num_blocks": 64,
        "latency": LatencyModel(prefill_tokens_per_second=100, seconds_per_output_token=0.1, load_factor=1),
        **fields,
    }
    return EngineConfig(**settings)  # type: ignore[arg-type]


def request(prompt: Sequence[int] | int, max_tokens: int = 1, **fields: object) -> Request:
    tokens = range(1, prompt + 1) if isinstance(prompt, int) else prompt
    return Request(f"r{next(_ids)}", array("I", tokens), max_tokens, **fields)  # type: ignore[arg-type]


class Run:
    """Everything an engine produced while it was stepped until idle."""

    def __init__(self, engine: Engine, now: float = 0.0) -> None:
        self.outputs: list[Output] = []
        self.batches: list[list[Event]] = []
        self.times: list[float] = []
        result = engine.step(now)
        while True:
            self.outputs += result.outputs
            if result.events:
                self.batches.append(result.events)
            if result.next_time is None:
                break
            self.times.append(result.next_time)
            result = engine.step(result.next_time)
        engine.cache.pool.check()

    @property
    def events(self) -> list[Event]:
        return [event for batch in self.batches for event in batch]


def serve(engine: Engine, *requests: Request, now: float = 0.0) -> Run:
    for item in requests:
        engine.add(item, now)
    return Run(engine, now)
