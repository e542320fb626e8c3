"""SGLang's wire events -> the event model (facts: kv_events.py and mem_cache/events.py of 0.5.23).

Like vLLM's map form, with these differences: hashes are signed 64-bit integers; the cache salt and the adapter are
fields of the event instead of `extra_keys`; there are no groups; a last page may be shorter and then says so in
`block_size`; and with EAGLE the token ids are pairs (token, next token).
"""

from __future__ import annotations

import msgspec

from kvindex.events import fields, vllm
from kvindex.events.fields import BadEventError, Hash
from kvindex.events.model import NO_EXTRA, Cleared, Extra, Removed, Stored


class WireStored(vllm.WireStored, tag="BlockStored", tag_field="type", gc=False):
    """A superset of vLLM's, so that one struct reads both when nobody says which engine it is."""

    cache_salt: str | None = None


class CoreStored(vllm.CoreStored, tag="BlockStored", tag_field="type", gc=False):
    cache_salt: str | None = None


class _Pairs(msgspec.Struct):
    token_ids: list[tuple[int, int]]


_PAIRS = msgspec.msgpack.Decoder(_Pairs)

MapEvent = WireStored | vllm.WireRemoved | vllm.WireCleared
CoreEvent = CoreStored | vllm.WireRemoved | vllm.WireCleared


def to_event(wire: object) -> Stored | Removed | Cleared:
    """Raises BadEventError for values that no engine sends."""
    event = vllm.to_event(wire)
    if isinstance(wire, WireStored | CoreStored) and wire.cache_salt and isinstance(event, Stored):
        return _salted(event, wire.cache_salt, wire.parent_block_hash)
    return event


def _salted(event: Stored, salt: str, parent: Hash | None) -> Stored:
    """SGLang repeats the salt in every event; the model has it once, in the block that roots the chain."""
    fields.name("cache_salt", salt)
    if parent is not None or not event.engine_keys:
        return event
    first, *rest = event.extras or (NO_EXTRA,) * len(event.engine_keys)
    return msgspec.structs.replace(event, extras=(Extra(salt, first.mm, first.embeds), *rest))


def explain(raw: msgspec.Raw) -> BadEventError | None:
    """Why an event that did not decode is bad, where SGLang has a reason of its own."""
    try:
        pairs = _PAIRS.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError, MemoryError):
        return None
    if not pairs.token_ids:
        return None
    return BadEventError(
        "bigram_tokens",
        "token_ids are pairs (EAGLE): the second token of a page's last pair belongs to the next page, so the page's "
        "key cannot be checked against a prompt",
    )
