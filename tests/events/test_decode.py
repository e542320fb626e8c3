"""Payload in, event model out: both wire forms of vLLM, SGLang, and what is skipped."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from kvindex.errors import UsageError
from kvindex.events.decode import decode
from kvindex.events.model import Cleared, Extra, Kind, MultiModal, Removed, Stored
from tests.events.wire import CLEARED, batch, encode, removed, stored

TOKENS = list(range(100, 108))


def only(payload: bytes, engine: str = "auto") -> Stored:
    decoded = decode(payload, engine)
    assert decoded.skipped == ()
    (event,) = decoded.events
    assert isinstance(event, Stored)
    return event


def reasons(payload: bytes, engine: str = "auto") -> list[str]:
    return [skip.reason for skip in decode(payload, engine).skipped]


@pytest.mark.parametrize("engine", ["auto", "vllm", "sglang"])
def test_map_form(engine: str) -> None:
    decoded = decode(
        batch(
            stored([1, 2**64 - 1], TOKENS, parent_block_hash=2**63 + 5, group_idx=3, kv_cache_spec_kind="mamba"),
            removed([7], group_idx=2),
            CLEARED,
            rank=4,
        ),
        engine,
    )
    store, remove, clear = decoded.events
    assert isinstance(store, Stored)
    assert (decoded.timestamp, decoded.rank, decoded.skipped) == (1.5, 4, ())
    assert store.engine_keys == (1, 2**64 - 1)
    assert store.parent == 2**63 + 5
    assert store.token_ids.dtype == np.uint32
    assert store.token_ids.tolist() == TOKENS
    assert (store.block_size, store.tier, store.group, store.kind) == (4, "hbm", 3, Kind.STATE)
    assert store.is_dense
    assert remove == Removed((7,), "hbm", 2)
    assert clear == Cleared()


def test_array_form_in_the_order_of_0_22() -> None:
    full = ["BlockStored", [1, 2], 9, TOKENS, 4, None, "CPU", None, [None, [["h", 1]]], 2, "sliding_window", 64]
    decoded = decode(batch(full, ["BlockRemoved", [7], "GPU", 2], ["AllBlocksCleared"]))
    store, remove, clear = decoded.events
    assert isinstance(store, Stored)
    assert (store.parent, store.tier, store.group, store.kind, store.window) == (9, "dram", 2, Kind.WINDOW, 64)
    assert remove == Removed((7,), "hbm", 2)
    assert clear == Cleared()


def test_array_form_of_older_and_newer_versions() -> None:
    short = only(batch(["BlockStored", [1, 2], None, TOKENS, 4]))
    assert (short.tier, short.group, short.kind, short.lora) == ("hbm", 0, None, None)
    longer = ["BlockStored", [1, 2], None, TOKENS, 4, None, None, None, None, 0, "full_attention", None, "new", 3]
    assert only(batch(longer)).kind is Kind.FULL
    assert decode(batch(["BlockRemoved", [7]])).events == (Removed((7,)),)


def test_both_forms_in_one_batch() -> None:
    decoded = decode(batch(stored([1, 2], TOKENS), ["BlockRemoved", [7]], CLEARED, ["AllBlocksCleared"]))
    assert [type(event).__name__ for event in decoded.events] == ["Stored", "Removed", "Cleared", "Cleared"]
    assert decoded.skipped == ()


def test_batch_as_a_map() -> None:
    payload = encode({"ts": 2.0, "events": [CLEARED, {"type": "Odd"}]})
    decoded = decode(payload)
    assert (decoded.timestamp, decoded.events, decoded.rank) == (2.0, (Cleared(),), 0)
    assert reasons(payload) == ["unknown_type"]
    whole = encode({"ts": 2.0, "events": [CLEARED], "data_parallel_rank": 1, "new": [1]})
    assert decode(whole).rank == 1


def test_rank_and_timestamp_forms() -> None:
    assert decode(encode([1.0, [CLEARED]])).rank == 0
    assert decode(batch(CLEARED, rank=None)).rank == 0  # SGLang sends nil without data parallelism
    assert decode(batch(CLEARED, ts=3)).timestamp == 3.0
    for odd in (math.nan, math.inf, -math.inf, None, "now"):
        decoded = decode(batch(CLEARED, ts=odd))
        assert (decoded.timestamp, decoded.events) == (0.0, (Cleared(),))
    for rank in (-1, 65_536, True, "0", 2**63):
        assert reasons(batch(CLEARED, rank=rank)) == ["undecodable"]


def test_hash_spellings() -> None:
    digest = bytes(range(1, 33))
    store = only(batch(stored([digest, b"\x01", -2], list(range(12)), parent_block_hash=-1)))
    assert store.engine_keys == (int.from_bytes(digest[-8:], "big"), 1, 2**64 - 2)
    assert store.parent == 2**64 - 1


@pytest.mark.parametrize(
    ("spec", "window", "kind"),
    [
        ("full_attention", None, Kind.FULL),
        ("mla_attention", None, Kind.FULL),
        ("sink_full_attention", None, Kind.FULL),
        ("unknown", None, Kind.FULL),
        ("chunked_local_attention", 128, Kind.FULL),
        ("something_new", None, Kind.FULL),
        ("sliding_window", 64, Kind.WINDOW),
        ("sliding_window_mla", 64, Kind.WINDOW),
        ("sliding_window", None, Kind.FULL),  # no size: asking for everything is too strict, never too generous
        ("mamba", None, Kind.STATE),
        ("encoder_only_attention", None, Kind.IGNORED),
        ("cross_attention", None, Kind.IGNORED),
        (None, None, None),
    ],
)
def test_kinds(spec: str | None, window: int | None, kind: Kind | None) -> None:
    fields = {"kv_cache_spec_kind": spec, "kv_cache_spec_sliding_window": window}
    store = only(batch(stored([1, 2], TOKENS, **fields)))
    assert store.kind is kind
    assert store.window == (window if kind is Kind.WINDOW else None)


@pytest.mark.parametrize(
    ("medium", "tier"),
    [(None, "hbm"), ("GPU", "hbm"), ("CPU_PINNED", "dram"), ("cpu", "dram"), ("DISK", "filesystem"), ("Tape", "tape")],
)
def test_mediums(medium: str | None, tier: str) -> None:
    assert only(batch(stored([1, 2], TOKENS, medium=medium))).tier == tier
    assert decode(batch(removed([1], medium))).events == (Removed((1,), tier),)


def test_sparse_empty_and_placeholder_stores() -> None:
    sparse = only(batch(stored([5], TOKENS, group_idx=1)))
    assert not sparse.is_dense
    assert not sparse.is_placeholder
    empty = only(batch(stored([], TOKENS)))
    assert (empty.engine_keys, len(empty.token_ids)) == ((), 8)
    placeholder = only(batch(stored([5], [], 0, medium="CPU")))
    assert placeholder.is_placeholder
    assert placeholder.tier == "dram"


def test_unknown_fields_are_ignored_and_odd_informative_ones_dropped() -> None:
    store = only(batch(stored([1, 2], TOKENS, locality="LOCAL", session_id="s", brand_new={"a": [1]})))
    assert (store.locality, store.session_id) == ("LOCAL", "s")
    odd = only(batch(stored([1, 2], TOKENS, locality={"zone": 3}, ownership=[1])))
    assert (odd.engine_keys, odd.locality, odd.ownership) == ((1, 2), None, None)


@pytest.mark.parametrize(
    "event",
    [
        stored([1], [1, 2, 2**32, 4]),
        stored([1], [1, 2, -1, 4]),
        stored([1], [1, 2, 3.0, 4]),
        stored([1], [1, 2, True, 4]),
        stored([1], [1, 2, None, 4]),
        stored([1], TOKENS, 0),
        stored([1], TOKENS, -4),
        stored([1], TOKENS, (1 << 20) + 1),
        stored([1], TOKENS, True),
        stored([1, 2, 3], TOKENS),  # keys for more blocks than there are tokens
        stored([1], [], 4),
        stored([b""], TOKENS),
        stored([b"x" * 300], TOKENS),
        stored(["1"], TOKENS),
        stored([1.0], TOKENS),
        stored([True], TOKENS),
        stored([1], TOKENS, group_idx=-1),
        stored([1], TOKENS, group_idx=1024),
        stored([1], TOKENS, medium=3),
        stored([1], TOKENS, medium="m" * 65),
        stored([1], TOKENS, lora_name="l" * 2000),
        stored([1], TOKENS, kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=-1),
        stored([1, 2], TOKENS, extra_keys=[["a"]]),
        stored([1, 2], TOKENS, extra_keys=[["a"], 3]),
        {"type": "BlockStored"},
        removed([1, "x"]),
        removed([1], group_idx="0"),
        {"type": "BlockRemoved", "block_hashes": None},
        ["BlockStored", [1]],
        ["BlockRemoved"],
    ],
)
def test_a_bad_event_is_skipped_and_the_rest_applied(event: object) -> None:
    decoded = decode(batch(removed([8]), event, CLEARED))
    assert decoded.events == (Removed((8,)), Cleared())
    (skip,) = decoded.skipped
    assert skip.reason == "bad_field"
    assert skip.detail


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ({"type": "BlockMoved"}, "unknown_type"),
        (["BlockMoved", 1], "unknown_type"),
        ({"kind": "BlockStored"}, "bad_event"),
        ({"type": 5}, "bad_event"),
        ([], "bad_event"),
        ([5], "bad_event"),
        (None, "bad_event"),
        (5, "bad_event"),
        ("BlockStored", "bad_event"),
        (stored([1, 2], TOKENS, extra_keys=[["a", 3], None]), "bad_extra_keys"),
    ],
)
def test_reasons(event: object, reason: str) -> None:
    decoded = decode(batch(event, CLEARED))
    assert decoded.events == (Cleared(),)
    assert [skip.reason for skip in decoded.skipped] == [reason]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00",
        b"\xc1",
        b"\x90",
        b"\x91\x01",
        b"hello",
        encode({"a": 1}),
        encode([1.0, None]),
        encode([1.0, {}, 0]),
    ],
)
def test_undecodable(payload: bytes) -> None:
    decoded = decode(payload)
    assert decoded.events == ()
    assert [skip.reason for skip in decoded.skipped] == ["undecodable"]


def test_every_skip_is_counted_but_details_are_bounded() -> None:
    decoded = decode(batch(*[{"type": "Odd"}] * 1000, CLEARED))
    assert len(decoded.skipped) == 1000
    assert sum(1 for skip in decoded.skipped if skip.detail) == 32
    assert decoded.events == (Cleared(),)


def test_unknown_engine_is_the_callers_error() -> None:
    with pytest.raises(UsageError, match="'trt' is not one of auto, sglang, vllm"):
        decode(b"", "trt")


def test_sglang_salt_and_adapter_are_fields() -> None:
    event = stored([-1, -2], TOKENS, cache_salt="tenant", lora_name="ad", session_id="s", medium="CPU_PINNED")
    store = only(batch(event, rank=None), "sglang")
    assert store.engine_keys == (2**64 - 1, 2**64 - 2)
    assert (store.lora, store.tier, store.session_id) == ("ad", "dram", "s")
    assert store.extras == (Extra("tenant"), Extra())
    later = only(batch(stored([-3], TOKENS[:4], cache_salt="tenant", parent_block_hash=-2)), "sglang")
    assert later.extras == ()  # the salt roots the chain, once
    assert later.parent == 2**64 - 2


def test_sglang_short_last_page() -> None:
    store = only(batch(stored([-1], [1, 2, 3], 3)), "sglang")
    assert store.is_dense
    assert store.block_size == 3


def test_sglang_bigrams_are_skipped_with_their_own_reason() -> None:
    pairs = stored([-1], [(1, 2), (2, 3), (3, 4), (4, 5)])
    decoded = decode(batch(pairs, removed([-9], None)), "sglang")
    assert [skip.reason for skip in decoded.skipped] == ["bigram_tokens"]
    assert decoded.events == (Removed((2**64 - 9,)),)


def test_adapter_known_only_by_number_is_not_the_base_model() -> None:
    assert only(batch(["BlockStored", [1, 2], None, TOKENS, 4, 3])).lora == "lora_id:3"
    assert only(batch(stored([1, 2], TOKENS, lora_id=3, lora_name="ad"))).lora == "ad"


class TestExtras:
    """engine_truth rule 7: LoRA, media, salt, embeds, told apart by type and place."""

    def of(self, *per_block: object, **fields: object) -> tuple[Extra, ...]:
        return only(batch(stored([1, 2], TOKENS, extra_keys=list(per_block), **fields))).extras

    def test_nothing(self) -> None:
        assert self.of(None, None) == ()
        assert self.of([], None) == ()
        assert self.of(["ad"], ["ad"], lora_name="ad", lora_id=1) == ()

    def test_salt_only_in_the_block_that_roots_the_chain(self) -> None:
        assert self.of(["tenant"], None) == (Extra("tenant"), Extra())
        old_media = Extra(mm=(MultiModal("tenant", None),))
        assert self.of(None, ["tenant"]) == (Extra(), old_media)
        assert self.of(["tenant"], None, parent_block_hash=9) == (old_media, Extra())

    def test_an_adapters_name_is_never_a_salt_or_an_image(self) -> None:
        assert self.of(["ad", "ad"], ["ad"], lora_name="ad") == (Extra("ad"), Extra())
        assert self.of([1, "t"], [1], lora_id=1) == (Extra("t"), Extra())

    def test_everything_in_its_order(self) -> None:
        first = ["ad", ["img", 3], ["vid", -5], "tenant", b"digest"]
        expected = Extra("tenant", (MultiModal("img", 3), MultiModal("vid", -5)), b"digest")
        assert self.of(first, ["ad"], lora_name="ad") == (expected, Extra())

    def test_media_without_offset_before_the_salt(self) -> None:
        assert self.of(["img", "tenant"], None)[0] == Extra("tenant", (MultiModal("img", None),))
        assert self.of(None, [["img", None]])[1] == Extra(mm=(MultiModal("img", None),))

    @pytest.mark.parametrize("part", [7, ["img"], ["img", "x"], [3, "img"], ["a", 1, 2], ["img", 2**40]])
    def test_a_part_that_fits_nothing_makes_the_event_bad(self, part: object) -> None:
        assert reasons(batch(stored([1, 2], TOKENS, extra_keys=[[part], None]))) == ["bad_extra_keys"]

    def test_sizes_are_bounded(self) -> None:
        for part in ("s" * 2000, b"e" * 300, ["h" * 2000, 1]):
            assert reasons(batch(stored([1, 2], TOKENS, extra_keys=[[part], None]))) == ["bad_field"]


def test_too_many_events_are_refused_before_any_is_made() -> None:
    payload = b"\x92" + msgspec.msgpack.encode(1.0) + b"\xdd" + (1 << 19).to_bytes(4, "big") + b"\xc0" * (1 << 19)
    (skip,) = decode(payload).skipped
    assert skip.reason == "undecodable"
    assert "524288 events" in skip.detail
