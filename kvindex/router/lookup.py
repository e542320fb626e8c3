"""What the router asks an index, whoever answers: one in this process, a daemon over gRPC, or nobody."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import NamedTuple, Protocol

from kvindex.events.model import Tokens


class Match(NamedTuple):
    """What one endpoint holds of a prompt, and how fresh that knowledge is."""

    tokens: int
    seconds_saved: float
    state: str
    lag_seconds: float


class Query(NamedTuple):
    """One prompt. The model is the router's business: it asks about the targets that serve it."""

    tokens: Tokens
    lora: str | None
    cache_salt: str | None


Matches = Mapping[str, Match]
NO_MATCHES: Matches = {}


class Lookup(Protocol):
    mode: str  # `embedded`, `grpc` or `none`

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def match(self, query: Query) -> Matches | Awaitable[Matches]:
        """Per endpoint name; who is absent holds nothing. Raises (or the awaitable does) ServiceError when nobody
        answers."""

    def follows(self, endpoint: str) -> bool:
        """Whether the index hears this endpoint at all, so that "holds nothing" is a prediction and not ignorance."""

    def report(self, endpoint: str, predicted: int, cached: int, prompt: int) -> None:
        """Tell the index what an engine found cached. Never blocks."""

    def describe(self) -> dict[str, object]:
        """For /readyz."""


class NoLookup:
    """No index: everything is a miss, and routing goes by load."""

    mode = "none"

    async def start(self) -> None:
        return

    async def close(self) -> None:
        return

    def match(self, query: Query) -> Matches:
        del query
        return NO_MATCHES

    def follows(self, endpoint: str) -> bool:
        del endpoint
        return False

    def report(self, endpoint: str, predicted: int, cached: int, prompt: int) -> None:
        return

    def describe(self) -> dict[str, object]:
        return {"mode": self.mode, "note": "no index: requests are routed by load alone"}
