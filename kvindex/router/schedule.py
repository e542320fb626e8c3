"""Which endpoint gets a request: scorers estimate seconds per target, a picker takes one, and the pick is accounted at
once.

Everything here is synchronous, so that nothing can come between looking at the load and adding to it: a thousand
requests that arrive together each see the picks before them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from kvindex.router.config import Policy, Scoring
from kvindex.router.endpoints import Target
from kvindex.router.lookup import Match

TIE_SECONDS = 1e-6


class PickRequest(NamedTuple):
    """What a pick goes by. `prompt_tokens` is an estimate when `tokens_known` is false."""

    prompt_tokens: int
    tokens_known: bool
    matches: Mapping[str, Match]


class Scorer(Protocol):
    """Seconds of waiting that a target would cost this request, one number per target; less is better."""

    name: str

    def seconds(self, targets: Sequence[Target], request: PickRequest) -> list[float]: ...


class Picker(Protocol):
    """Chooses among targets by their total; returns an index and why."""

    def pick(self, targets: Sequence[Target], totals: Sequence[float]) -> tuple[int, str]: ...


class PrefixScorer:
    """The prefill that is left to do: what the index says is saved is not paid again."""

    name = "prefix"

    def __init__(self, scoring: Scoring) -> None:
        self._rate = scoring.prefill_tokens_per_second
        self._weight = scoring.prefix_weight

    def seconds(self, targets: Sequence[Target], request: PickRequest) -> list[float]:
        whole = request.prompt_tokens / self._rate
        matches = request.matches
        result = []
        for target in targets:
            match = matches.get(target.name)
            left = whole if match is None else max(0.0, whole - match.seconds_saved * self._weight)
            result.append(left / target.endpoint.config.weight)
        return result


class LoadScorer:
    """The work already there. Own counts are exact but see only this router's requests, scraped ones see all but late:
    the larger of the two is believed."""

    name = "load"

    def __init__(self, scoring: Scoring) -> None:
        self._scoring = scoring

    def seconds(self, targets: Sequence[Target], request: PickRequest) -> list[float]:
        del request
        rate, each, queued, weight = (
            self._scoring.prefill_tokens_per_second,
            self._scoring.request_cost_seconds,
            self._scoring.waiting_cost_seconds,
            self._scoring.load_weight,
        )
        result = []
        for target in targets:
            requests = max(target.inflight, target.running + target.waiting)
            cost = target.pending_tokens / rate + requests * each + target.waiting * queued
            result.append(weight * cost / target.endpoint.config.weight)
        return result


class LowestPicker:
    """The lowest total; equal ones take turns, in a fixed order."""

    def __init__(self) -> None:
        self._turn = -1

    def pick(self, targets: Sequence[Target], totals: Sequence[float]) -> tuple[int, str]:
        del targets
        limit = min(totals) + TIE_SECONDS
        best = [index for index, total in enumerate(totals) if total <= limit]
        if len(best) == 1:
            return best[0], "lowest estimate"
        self._turn += 1
        return best[self._turn % len(best)], f"turn among {len(best)} equal estimates"


class RoundRobinPicker:
    def __init__(self) -> None:
        self._turn = -1

    def pick(self, targets: Sequence[Target], totals: Sequence[float]) -> tuple[int, str]:
        del totals
        self._turn += 1
        return self._turn % len(targets), "next in turn"


class Load(NamedTuple):
    """A target as it was when the pick was made."""

    target: Target
    inflight: int
    pending_tokens: int
    running: int
    waiting: int
    kv_usage: float
    scraped_at: float | None


class Decision:
    """One pick, accounted. `first_output` and `release` give back what it took, each once."""

    __slots__ = ("_open", "at", "columns", "loads", "match", "request", "target", "totals", "uncached", "why")

    def __init__(self, target: Target, request: PickRequest, why: str, at: float) -> None:
        self.target = target
        self.request = request
        self.why = why
        self.at = at
        self.match = request.matches.get(target.name)
        self.uncached = max(0, request.prompt_tokens - (self.match.tokens if self.match else 0))
        self.loads: list[Load] = []
        self.columns: dict[str, list[float]] = {}
        self.totals: list[float] = []
        self._open = True
        target.inflight += 1
        target.picks += 1
        target.pending_tokens += self.uncached

    @property
    def matched_tokens(self) -> int:
        return self.match.tokens if self.match else 0

    def first_output(self) -> None:
        self.target.pending_tokens -= self.uncached
        self.uncached = 0

    def release(self) -> None:
        if self._open:
            self._open = False
            self.first_output()
            self.target.inflight -= 1

    def explain(self) -> dict[str, Any]:
        """For people: every candidate as the pick saw it."""
        candidates = []
        for index, load in enumerate(self.loads):
            match = self.request.matches.get(load.target.name)
            candidates.append(
                {
                    "endpoint": load.target.name,
                    "picked": load.target is self.target,
                    "matched_tokens": match.tokens if match else 0,
                    "seconds_saved": round(match.seconds_saved, 6) if match else 0.0,
                    "index_state": match.state if match else "nothing held",
                    "index_lag_seconds": round(match.lag_seconds, 3) if match else None,
                    "inflight": load.inflight,
                    "pending_tokens": load.pending_tokens,
                    "running": load.running,
                    "waiting": load.waiting,
                    "kv_usage": load.kv_usage,
                    "metrics_age_seconds": None if load.scraped_at is None else round(self.at - load.scraped_at, 3),
                    "seconds": {name: round(column[index], 6) for name, column in self.columns.items()},
                    "estimate_seconds": round(self.totals[index], 6),
                }
            )
        candidates.sort(key=lambda c: (not c["picked"], c["estimate_seconds"]))
        return {
            "endpoint": self.target.name,
            "why": self.why,
            "prompt_tokens": self.request.prompt_tokens,
            "prompt_tokens_known": self.request.tokens_known,
            "candidates": candidates,
        }


class Scheduler:
    def __init__(self, scorers: Sequence[Scorer], picker: Picker, clock: Callable[[], float]) -> None:
        self._scorers = tuple(scorers)
        self._picker = picker
        self._clock = clock

    def pick(self, targets: Sequence[Target], request: PickRequest) -> Decision | None:
        """Pick one target and account for it; None when there is none. Never suspends."""
        if not targets:
            return None
        now = self._clock()
        columns = {scorer.name: scorer.seconds(targets, request) for scorer in self._scorers}
        totals = [sum(row) for row in zip(*columns.values(), strict=True)] if columns else [0.0] * len(targets)
        index, why = self._picker.pick(targets, totals)
        loads = [Load(t, t.inflight, t.pending_tokens, t.running, t.waiting, t.kv_usage, t.scraped_at) for t in targets]
        decision = Decision(targets[index], request, why, now)
        decision.loads, decision.columns, decision.totals = loads, columns, totals
        targets[index].endpoint.picked(now)
        return decision


def build(scoring: Scoring, clock: Callable[[], float], *, policy: Policy | None = None) -> Scheduler:
    """The scheduler of a policy: `score` (prefix and load), `load`, or `round-robin`."""
    policy = policy or scoring.policy
    scorers: list[Scorer] = []
    if policy == "score":
        scorers.append(PrefixScorer(scoring))
    if policy != "round-robin":
        scorers.append(LoadScorer(scoring))
    return Scheduler(scorers, RoundRobinPicker() if policy == "round-robin" else LowestPicker(), clock)
