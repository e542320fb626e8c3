"""What a step of the engine works on and gives back: plain values."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from kvindex.simulator.request import Request
from kvindex.simulator.wire import Event


class Finish(enum.Enum):
    LENGTH = "length"
    ABORT = "abort"


class Output(NamedTuple):
    """One token of one request; `finish` is set on its last."""

    request: Request
    token: int
    finish: Finish | None


class StepResult(NamedTuple):
    outputs: list[Output]
    events: list[Event]  # one message: what the step that ended announces
    next_time: float | None  # when the step that began now will end; None: idle


class Scheduled(NamedTuple):
    request: Request
    tokens: int


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was made; tokens unless named otherwise."""

    prompt: int = 0
    generated: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    steps: int = 0
    finished_requests: int = 0
    aborted_requests: int = 0
