"""Settings of an embedded index. Decoded by whoever owns a config file; defaults live here only."""

from __future__ import annotations

from typing import Literal

import msgspec

from kvindex.index.protocol import DEFAULT_WEIGHTS


class TierCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What loading from a tier costs: a fixed latency, then a rate. Defaults are assumptions, measured ones replace
    them."""

    latency_seconds: float = 0.0
    tokens_per_second: float = 1_000_000.0


DEFAULT_COSTS = {
    "dram": TierCost(0.0005, 400_000.0),
    "filesystem": TierCost(0.005, 60_000.0),
    "object": TierCost(0.05, 20_000.0),
}
OTHER_COST = TierCost(0.05, 20_000.0)


class CostConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Turns tokens into seconds: prefill seconds avoided minus load seconds."""

    prefill_tokens_per_second: float = 8_000.0
    tiers: dict[str, TierCost] = msgspec.field(default_factory=lambda: dict(DEFAULT_COSTS))


class PublisherOverride(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What config knows of a publisher that the wire does not say. Matched by `source`, and by `topic` when given.
    `default_endpoint` and `default_model` are only used where the topic names none."""

    source: str
    topic: str | None = None
    endpoint: str | None = None
    model: str | None = None
    eagle: bool = False
    key_domain: str | None = None
    persistent_tiers: frozenset[str] = frozenset()
    offload_chunk_tokens: int | None = None
    default_endpoint: str | None = None
    default_model: str | None = None


class IndexConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`on_lost_messages`: what the daemon does with a gap that cannot be replayed (an embedded index only marks it).
    `max_forgotten_blocks`: how many blocks that nobody holds are remembered so that late children attach.
    `max_publishers` bounds what hostile streams can make the index allocate, `max_publishers_per_source` what one
    socket can take from the others."""

    weights: dict[str, float] = msgspec.field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    on_lost_messages: Literal["fence", "keep"] = "fence"
    publishers: tuple[PublisherOverride, ...] = ()
    cost: CostConfig = msgspec.field(default_factory=CostConfig)
    max_forgotten_blocks: int = 1_000_000
    max_publishers: int = 4096
    max_publishers_per_source: int = 1024
