"""What the index knows of each publisher's stream: who it is, how far it has been read, and whether to believe it."""

from __future__ import annotations

import msgspec

from kvindex.events.frames import split_topic
from kvindex.events.sequence import SequenceTracker
from kvindex.index.config import PublisherOverride
from kvindex.index.protocol import Publisher

HIDDEN_STATES = frozenset({"fenced", "suspect"})


class PublisherStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One publisher, for people and metrics. `state` is `live`, `replaying`, `gap`, `suspect` or `fenced`."""

    source: str
    topic: str
    rank: int
    endpoint: str
    model: str | None
    incarnation: int
    last_sequence: int | None
    state: str
    gaps: int
    missing: int
    replays: int
    restarts: int
    messages: int
    events: int
    skipped: int
    lag_seconds: float
    seconds_since_message: float


class EndpointStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint: something a request can be sent to."""

    name: str
    model: str | None
    state: str
    lag_seconds: float
    groups: tuple[dict[str, object], ...]


class Stream:
    """One publisher's reading state. The index's lock guards it."""

    def __init__(self, source: str, topic: str, rank: int, publisher: Publisher, number: int, now: float) -> None:
        self.source = source
        self.topic = topic
        self.rank = rank
        self.publisher = publisher
        self.number = number
        self.tracker = SequenceTracker()
        self.state = "live"
        self.gaps = 0
        self.missing = 0
        self.replays = 0
        self.restarts = 0
        self.messages = 0
        self.events = 0
        self.skipped = 0
        self.lag_seconds = 0.0
        self.last_message = now
        self.fence_reason = ""

    def status(self, now: float) -> PublisherStatus:
        return PublisherStatus(
            source=self.source,
            topic=self.topic,
            rank=self.rank,
            endpoint=self.publisher.endpoint,
            model=self.publisher.model,
            incarnation=self.tracker.incarnation,
            last_sequence=self.tracker.last_sequence,
            state=self.state,
            gaps=self.gaps,
            missing=self.missing,
            replays=self.replays,
            restarts=self.restarts,
            messages=self.messages,
            events=self.events,
            skipped=self.skipped,
            lag_seconds=self.lag_seconds,
            seconds_since_message=now - self.last_message,
        )


def describe(source: str, topic: str, rank: int, overrides: tuple[PublisherOverride, ...]) -> Publisher:
    """Who publishes: what config says, else the topic `kv@pod@model`, else the whole topic, else the socket."""
    said = next((o for o in overrides if o.source == source and o.topic in (None, topic)), PublisherOverride(source))
    named = split_topic(topic)
    name = said.endpoint or (named.pod if named else None) or said.default_endpoint or topic or source
    return Publisher(
        endpoint=name if rank == 0 else f"{name}:dp{rank}",
        model=said.model or (named.model if named else None) or said.default_model,
        key_domain=said.key_domain,
        eagle=said.eagle,
        persistent_tiers=said.persistent_tiers,
        offload_chunk_tokens=said.offload_chunk_tokens,
    )
