"""Events as vLLM's publisher puts them on the wire: three frames, the payload a MessagePack batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

_encode = msgspec.msgpack.Encoder().encode

# The array form that vLLM had up to 0.23: the tag, then the fields in this order, defaults at the end left out.
_STORED = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name")
_STORED += ("extra_keys", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window")
_REMOVED = ("block_hashes", "medium", "group_idx")
_REQUIRED = {"BlockStored": 8, "BlockRemoved": 3, "AllBlocksCleared": 1}


def as_array(event: BlockStored | BlockRemoved | AllBlocksCleared) -> list[Any]:
    tag = type(event).__name__
    names = {"BlockStored": _STORED, "BlockRemoved": _REMOVED, "AllBlocksCleared": ()}[tag]
    fields = [tag, *(getattr(event, name) for name in names)]
    while len(fields) > _REQUIRED[tag] and fields[-1] is None:
        fields.pop()
    return fields


class Publisher:
    """One ZMQ publisher: a source address, a topic, and sequence numbers from 0."""

    def __init__(self, source: str, topic: str, rank: int, wire: str) -> None:
        self.source, self.topic, self.rank, self.wire = source, topic.encode(), rank, wire
        self._sequence = itertools.count()

    def message(self, events: Sequence[Any]) -> list[Any]:
        """The frames of one batch, with a clock that only counts, so that a seed gives the same bytes."""
        number = next(self._sequence)
        if self.wire == "array":
            payload = _encode([float(number), [as_array(event) for event in events], self.rank])
        else:
            payload = _encode(KVEventBatch(ts=float(number), events=list(events), data_parallel_rank=self.rank))
        return [self.topic, number.to_bytes(8, "big"), payload]
