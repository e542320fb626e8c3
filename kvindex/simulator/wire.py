"""What an engine says about its blocks, in the form that vLLM >= 0.24 puts on the wire (maps with a `type` key).

The structs are both the engine's events and their wire form: encoding one with msgspec gives vLLM's bytes, field order
and omitted defaults included.
"""

from __future__ import annotations

import msgspec

MEDIUM_HBM = "GPU"
END_OF_REPLAY = b"\xff" * 8

ExtraKeys = tuple[str, ...] | None


class BlockStored(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[ExtraKeys] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    pass


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True, array_like=True):
    ts: float
    events: list[Event]
    data_parallel_rank: int


def frames(topic: str, sequence: int, timestamp: float, events: list[Event], rank: int = 0) -> list[bytes]:
    """One message as it arrives at a subscriber."""
    payload = msgspec.msgpack.encode(EventBatch(timestamp, events, rank))
    return [topic.encode(), sequence.to_bytes(8, "big"), payload]


class EventSource(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's entry in the answer of `GET /kv_event_sources`."""

    enable_kv_cache_events: bool = True
    publisher: str = "zmq"
    endpoint: str
    replay_endpoint: str | None
    buffer_steps: int
    hwm: int
    max_queue_size: int
    topic: str
