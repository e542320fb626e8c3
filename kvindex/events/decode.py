"""One payload -> one EventBatch.

The fast path decodes the whole batch into typed structs. Only when that fails is every event decoded on its own, so
that one bad event is skipped and counted and the rest of its batch still counts. Nothing here raises for what came over
the wire.

A batch is the array `[timestamp, events, data_parallel_rank]` in every released vLLM and SGLang read so far; vLLM's
main branch has also had it as a map with the same fields, which is read too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from kvindex.errors import UsageError
from kvindex.events import sglang, vllm
from kvindex.events.extras import NIL, array_header
from kvindex.events.fields import BadEventError
from kvindex.events.model import Event, EventBatch, Skip

MAX_EVENTS = 1 << 18  # per batch; the slow path makes an object per event before it looks at any
MAX_RANK = 65_535
_DETAILS = 32  # skips of one batch that carry a detail of their own

_FAILURES = (msgspec.DecodeError, ValueError, RecursionError, MemoryError)  # ValueError: a string that is not UTF-8


class _Loose(msgspec.Struct, array_like=True):
    ts: msgspec.Raw
    events: msgspec.Raw
    rank: msgspec.Raw = NIL


class _LooseMap(msgspec.Struct):
    events: msgspec.Raw
    ts: msgspec.Raw = NIL
    data_parallel_rank: msgspec.Raw = NIL


class _Tag(msgspec.Struct):
    type: str


class _ArrayTag(msgspec.Struct, array_like=True):
    type: str


class _Engine(NamedTuple):
    """What is needed to read one engine's payloads: whole-batch decoders first, then decoders of a single event."""

    batches: tuple[msgspec.msgpack.Decoder[Any], ...]
    map_events: tuple[msgspec.msgpack.Decoder[Any], ...]
    array_event: msgspec.msgpack.Decoder[Any]
    to_event: Callable[[object], Event]


def _engine(map_event: Any, core_event: Any, to_event: Callable[[object], Event]) -> _Engine:
    def batch(event: Any, array_like: bool) -> msgspec.msgpack.Decoder[Any]:
        layout: list[Any] = [("ts", float), ("events", list[event]), ("data_parallel_rank", int | None, None)]
        return msgspec.msgpack.Decoder(msgspec.defstruct("Batch", layout, array_like=array_like))

    return _Engine(
        (batch(map_event, True), batch(vllm.LegacyEvent, True), batch(map_event, False)),
        (msgspec.msgpack.Decoder(map_event), msgspec.msgpack.Decoder(core_event)),
        msgspec.msgpack.Decoder(vllm.LegacyEvent),
        to_event,
    )


_SGLANG = _engine(sglang.MapEvent, sglang.CoreEvent, sglang.to_event)
_ENGINES = {
    "auto": _SGLANG,  # SGLang's structs are a superset of vLLM's, and nothing on the wire names the engine
    "vllm": _engine(vllm.MapEvent, vllm.CoreEvent, vllm.to_event),
    "sglang": _SGLANG,
}
_TYPES = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})
_TAG = msgspec.msgpack.Decoder(_Tag)
_ARRAY_TAG = msgspec.msgpack.Decoder(_ArrayTag)
_LOOSE = msgspec.msgpack.Decoder(_Loose)
_LOOSE_MAP = msgspec.msgpack.Decoder(_LooseMap)
_RAWS = msgspec.msgpack.Decoder(list[msgspec.Raw])
_FLOAT = msgspec.msgpack.Decoder(float)
_RANK = msgspec.msgpack.Decoder(int | None)


def decode(payload: bytes, engine: str = "auto") -> EventBatch:
    """Never raises for content: what cannot be read is in `skipped`. Raises UsageError for an unknown engine."""
    try:
        reader = _ENGINES[engine]
    except KeyError:
        raise UsageError(f"engine: {engine!r} is not one of {', '.join(sorted(_ENGINES))}") from None
    for decoder in reader.batches:
        try:
            batch = decoder.decode(payload)
        except _FAILURES:
            continue
        if len(batch.events) > MAX_EVENTS:
            return _nothing(f"{len(batch.events)} events in one batch, at most {MAX_EVENTS} are read")
        return _assemble(batch.ts, batch.data_parallel_rank, batch.events, reader.to_event)
    return _event_by_event(payload, reader)


def _event_by_event(payload: bytes, reader: _Engine) -> EventBatch:
    try:
        if payload[:1] and (payload[0] >> 4 == 8 or payload[0] in (0xDE, 0xDF)):
            loose_map = _LOOSE_MAP.decode(payload)
            ts, events, rank = loose_map.ts, loose_map.events, loose_map.data_parallel_rank
        else:
            loose = _LOOSE.decode(payload)
            ts, events, rank = loose.ts, loose.events, loose.rank
        count, _ = array_header(bytes(memoryview(events)[:5]))
        if count is not None and count > MAX_EVENTS:
            return _nothing(f"{count} events in one batch, at most {MAX_EVENTS} are read")
        raws = _RAWS.decode(events)
        of_rank = _RANK.decode(rank)
    except _FAILURES as failure:
        return _nothing(str(failure) or type(failure).__name__)
    try:
        timestamp = _FLOAT.decode(ts)
    except _FAILURES:
        timestamp = 0.0
    return _assemble(timestamp, of_rank, raws, lambda raw: _one(raw, reader))


def _one(raw: Any, reader: _Engine) -> Event:
    first = memoryview(raw)[0]
    is_array = first >> 4 == 9 or first in (0xDC, 0xDD)
    failure: Exception | None = None
    for decoder in (reader.array_event,) if is_array else reader.map_events:
        try:
            return reader.to_event(decoder.decode(raw))
        except _FAILURES as caught:
            failure = failure or caught
    try:
        kind = (_ARRAY_TAG if is_array else _TAG).decode(raw).type
    except _FAILURES:
        raise BadEventError("bad_event", "neither a map with a `type` nor an array that begins with one") from None
    if kind not in _TYPES:
        raise BadEventError("unknown_type", f"event type {kind[:80]!r} is not one of {', '.join(sorted(_TYPES))}")
    raise sglang.explain(raw) or BadEventError("bad_field", f"{kind}: {str(failure)[:200]}")


def _assemble(ts: float, rank: int | None, wires: list[Any], to_event: Callable[[Any], Event]) -> EventBatch:
    if rank is not None and not 0 <= rank <= MAX_RANK:
        return _nothing(f"data_parallel_rank: {rank} is not in 0..{MAX_RANK}")
    events: list[Event] = []
    skipped: list[Skip] = []
    for wire in wires:
        try:
            events.append(to_event(wire))
        except BadEventError as bad:
            skipped.append(Skip(bad.reason, bad.detail if len(skipped) < _DETAILS else ""))
    return EventBatch(ts if math.isfinite(ts) else 0.0, tuple(events), rank or 0, tuple(skipped))


def _nothing(detail: str) -> EventBatch:
    return EventBatch(0.0, (), 0, (Skip("undecodable", detail[:200]),))
