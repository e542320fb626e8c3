"""Predictions against what engines report as cached.

Engines announce late, so a single difference means little. An endpoint that is over-credited again and again has lost a
removal somewhere: it becomes suspect and is rebuilt.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


class Observation(NamedTuple):
    endpoint: str
    predicted_tokens: int
    cached_tokens: int
    prompt_tokens: int = 0

    @property
    def outcome(self) -> str:
        if self.predicted_tokens == self.cached_tokens:
            return "exact"
        return "over" if self.predicted_tokens > self.cached_tokens else "under"


class Audit:
    """Pure: no clock, no I/O; `observe` says whether the difference has lasted.

    Only over-credit counts: too low a prediction costs a little affinity, too high a one sends requests astray. An
    exact answer for a prompt that hit nothing proves nothing and is left out.
    """

    def __init__(self, window: int = 20, threshold: float = 0.5) -> None:
        self._window, self._threshold = window, threshold
        self._recent: dict[str, deque[bool]] = {}

    def observe(self, observation: Observation) -> bool:
        """True when the endpoint should be rebuilt; its history then starts anew."""
        if observation.predicted_tokens == observation.cached_tokens == 0:
            return False
        recent = self._recent.setdefault(observation.endpoint, deque(maxlen=self._window))
        recent.append(observation.outcome == "over")
        if len(recent) == self._window and sum(recent) > self._threshold * self._window:
            recent.clear()
            return True
        return False

    def forget(self, endpoint: str) -> None:
        self._recent.pop(endpoint, None)
