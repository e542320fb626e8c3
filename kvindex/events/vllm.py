"""vLLM's wire events -> the event model.

Protocol facts, read from the wheels of the versions named and checked on captures of 0.32:
* 0.24 and later: an event is a map with a `type` key, defaults omitted; fields go by name, unknown ones are ignored.
* 0.23 and earlier: an array `[type, fields...]` in the order of `LegacyStored`, shorter in still older versions.
* Stored events of sparse groups have fewer hashes than tokens make blocks; placeholders have no tokens at all.
"""

from __future__ import annotations

import msgspec

from kvindex.events import fields
from kvindex.events.extras import NIL, extras
from kvindex.events.fields import BadEventError, Hash, bad
from kvindex.events.model import Cleared, Kind, Removed, Stored

KIND_OF_SPEC = {
    "full_attention": Kind.FULL,
    "mla_attention": Kind.FULL,
    "sink_full_attention": Kind.FULL,
    "unknown": Kind.FULL,
    # The chunk size is not announced. Asking for all blocks may be too strict, never too generous.
    "chunked_local_attention": Kind.FULL,
    "sliding_window": Kind.WINDOW,
    "sliding_window_mla": Kind.WINDOW,
    "mamba": Kind.STATE,
    "encoder_only_attention": Kind.IGNORED,
    "cross_attention": Kind.IGNORED,
}
_MAX_WINDOW = 1 << 31


class CoreStored(msgspec.Struct, tag="BlockStored", tag_field="type", gc=False):
    """The fields that decide what is credited. Asked for on their own when an informative field has an odd type."""

    block_hashes: list[Hash]
    token_ids: list[int]
    block_size: int
    parent_block_hash: Hash | None = None
    lora_id: int | str | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: msgspec.Raw = NIL
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class WireStored(CoreStored, tag="BlockStored", tag_field="type", gc=False):
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class WireRemoved(msgspec.Struct, tag="BlockRemoved", tag_field="type", gc=False):
    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None


class WireCleared(msgspec.Struct, tag="AllBlocksCleared", tag_field="type", gc=False):
    pass


class LegacyStored(msgspec.Struct, tag="BlockStored", array_like=True, gc=False):
    """Order of 0.22.1; what an older version does not send yet is at the end."""

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | str | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: msgspec.Raw = NIL
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class LegacyRemoved(msgspec.Struct, tag="BlockRemoved", array_like=True, gc=False):
    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None


class LegacyCleared(msgspec.Struct, tag="AllBlocksCleared", array_like=True, gc=False):
    pass


MapEvent = WireStored | WireRemoved | WireCleared
CoreEvent = CoreStored | WireRemoved | WireCleared
LegacyEvent = LegacyStored | LegacyRemoved | LegacyCleared


def stored(wire: CoreStored | LegacyStored) -> Stored:
    """Raises BadEventError for values that no engine sends."""
    token_ids = fields.tokens(wire.token_ids)
    keys = fields.engine_keys(wire.block_hashes)
    kind, window = _kind(wire.kv_cache_spec_kind, wire.kv_cache_spec_sliding_window)
    lora = fields.lora(wire.lora_name, wire.lora_id)
    at_root = wire.parent_block_hash is None
    full = wire if isinstance(wire, WireStored) else None
    return Stored(
        engine_keys=keys,
        parent=None if wire.parent_block_hash is None else fields.engine_key(wire.parent_block_hash),
        token_ids=token_ids,
        block_size=fields.block_size(wire.block_size, len(keys), len(token_ids)),
        tier=fields.tier(wire.medium),
        group=fields.group(wire.group_idx),
        kind=kind,
        window=window,
        lora=lora,
        extras=extras(wire.extra_keys, len(keys), at_root=at_root, lora_name=wire.lora_name, lora_id=wire.lora_id),
        locality=full.locality if full else None,
        ownership=full.ownership if full else None,
        session_id=full.session_id if full else None,
    )


def removed(wire: WireRemoved | LegacyRemoved) -> Removed:
    """Raises BadEventError for values that no engine sends."""
    return Removed(fields.engine_keys(wire.block_hashes), fields.tier(wire.medium), fields.group(wire.group_idx))


def to_event(wire: object) -> Stored | Removed | Cleared:
    """Raises BadEventError for values that no engine sends."""
    match wire:
        case CoreStored() | LegacyStored():
            return stored(wire)
        case WireRemoved() | LegacyRemoved():
            return removed(wire)
        case WireCleared() | LegacyCleared():
            return Cleared()
    raise BadEventError("unknown_type", f"{type(wire).__name__} is not a vLLM event")


def _kind(spec: str | None, window: int | None) -> tuple[Kind | None, int | None]:
    """A window group that does not say its window counts as full attention, which asks for more blocks, never fewer."""
    if window is not None and not 0 <= window <= _MAX_WINDOW:
        raise bad("kv_cache_spec_sliding_window", window, f"in 0..{_MAX_WINDOW}")
    kind = None if spec is None else KIND_OF_SPEC.get(spec, Kind.FULL)
    if kind is not Kind.WINDOW:
        return kind, None
    return (Kind.WINDOW, window) if window else (Kind.FULL, None)
