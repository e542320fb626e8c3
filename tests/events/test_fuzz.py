"""Cut, mutated and hostile payloads: no exception, no surprise in memory, and the next good one counts.

Soak runs (`-m soak`) do the same for longer; every failure prints the KVINDEX_FUZZ_SEED that brings it back.
"""

from __future__ import annotations

import os
import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvindex import Index
from kvindex.events import fields
from kvindex.events.decode import decode
from kvindex.events.model import Cleared, EventBatch, Kind, Removed, Stored
from kvindex.events.recording import CaptureReader
from tests.events.wire import CLEARED, batch, encode, removed, stored

CAPTURES = Path(__file__).parent.parent / "data" / "captures"
SECONDS = pytest.mark.parametrize(
    "seconds", [2.0, pytest.param(float(os.environ.get("KVINDEX_FUZZ_SECONDS", "60")), marks=pytest.mark.soak)]
)
NAMES = ("llama-sha256cbor", "gemma3-swa", "lfm2-hybrid", "offload-gemma3-w-save", "SYNTHETIC-legacy-array-gemma3-swa")


def rng_of(request: pytest.FixtureRequest) -> random.Random:
    seed = int(os.environ.get("KVINDEX_FUZZ_SEED", random.randrange(1 << 32)))
    print(f"KVINDEX_FUZZ_SEED={seed}")
    return random.Random(seed)


rng = pytest.fixture(rng_of)


def payloads(*names: str) -> list[bytes]:
    return [record.frames[2] for name in names for record in CaptureReader(CAPTURES / f"{name}.capture")]


def audit(decoded: EventBatch) -> None:
    """What every index may rely on."""
    assert 0 <= decoded.rank <= 65_535
    assert np.isfinite(decoded.timestamp)
    for skip in decoded.skipped:
        assert skip.reason
        assert len(skip.detail) < 1000
    for event in decoded.events:
        if isinstance(event, Cleared):
            continue
        assert isinstance(event, Stored | Removed)
        assert all(type(key) is int and 0 <= key < 1 << 64 for key in event.engine_keys)
        assert 0 <= event.group <= fields.MAX_GROUP
        assert isinstance(event.tier, str)
        assert 0 < len(event.tier) <= fields.MAX_MEDIUM
        if isinstance(event, Removed):
            continue
        assert event.token_ids.dtype == np.uint32
        assert event.parent is None or 0 <= event.parent < 1 << 64
        assert event.is_placeholder or 1 <= event.block_size <= fields.MAX_BLOCK_SIZE
        assert event.is_placeholder or len(event.engine_keys) * event.block_size <= len(event.token_ids)
        assert len(event.extras) in (0, len(event.engine_keys))
        assert (event.kind is Kind.WINDOW) == (event.window is not None)
        for name in (event.lora, event.locality, event.ownership, event.session_id):
            assert name is None or isinstance(name, str)


def mutated(payload: bytes, rng: random.Random) -> bytes:
    data = bytearray(payload)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        at = rng.randrange(len(data)) if data else 0
        match rng.randrange(7):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randint(1, 30)]
            case 2:
                data[at:at] = rng.randbytes(rng.randint(1, 9))
            case 3:
                data[at : at + 8] = struct.pack(">Q", rng.choice((0, 1, 1 << 63, (1 << 64) - 1)))
            case 4:  # a length that is not there
                data[at : at + 5] = bytes([rng.choice((0xC6, 0xDB, 0xDD, 0xDF))]) + b"\xff\xff\xff\xf0"
            case 5:
                data = data[:at]
            case _:
                other = rng.randrange(len(data)) if data else 0
                data[at : at + 16] = data[other : other + 16]
    return bytes(data)


def test_every_cut_of_a_real_payload_is_one_skip() -> None:
    payload = max(payloads("llama-sha256cbor"), key=len)[:600]
    for end in range(len(payload)):
        decoded = decode(payload[:end])
        assert decoded.events == ()
        assert [skip.reason for skip in decoded.skipped] == ["undecodable"]


@SECONDS
def test_mutated_payloads_never_raise_and_never_break_a_rule(seconds: float, rng: random.Random) -> None:
    good = payloads(*NAMES)
    until = time.monotonic() + seconds
    applied = skipped = 0
    while time.monotonic() < until:
        for engine in ("auto", "vllm"):
            decoded = decode(mutated(rng.choice(good), rng), engine)
            audit(decoded)
            applied += len(decoded.events)
            skipped += len(decoded.skipped)
    assert applied
    assert skipped
    assert decode(good[0]).events


ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**32,
    2**63,
    2**64 - 1,
    -(2**63),
    0.5,
    float("nan"),
    float("inf"),
    "",
    "GPU",
    "x" * 5000,
    b"",
    b"\xff" * 400,
    [],
    [[]],
    [None],
    [1, "a"],
    [True],
    {},
    {"type": "BlockStored"},
    [1] * 100,
    ["a", 1],
    [["a", 1]],
    [[["a", 1]]],
    msgspec.msgpack.Ext(5, b"ext"),
)


def test_wrong_types_in_every_field(rng: random.Random) -> None:
    whole = stored(
        [1, 2],
        list(range(8)),
        extra_keys=[None, None],
        group_idx=0,
        kv_cache_spec_kind="sliding_window",
        kv_cache_spec_sliding_window=8,
        locality="LOCAL",
        ownership="o",
        session_id="s",
        cache_salt="t",
    )
    array = ["BlockStored", [1, 2], None, list(range(8)), 4, None, "GPU", None, None, 0, "mamba", None]
    for odd in ODD:
        for field in whole:
            audit(decode(batch(whole | {field: odd}, CLEARED)))
        for field in ("type", "block_hashes", "medium", "group_idx"):
            audit(decode(batch(removed([1]) | {field: odd}, CLEARED)))
        for i in range(len(array)):
            decoded = decode(batch([*array[:i], odd, *array[i + 1 :]], ["AllBlocksCleared"]))
            audit(decoded)
            assert decoded.events[-1:] == (Cleared(),)
        for payload in (encode(odd), encode([odd]), batch(odd), batch(CLEARED, ts=odd), batch(CLEARED, rank=odd)):
            audit(decode(payload))
        audit(decode(encode([1.0, odd, 0])))
        audit(decode(encode({"ts": odd, "events": odd, "data_parallel_rank": odd})))


@pytest.mark.parametrize(
    "payload",
    [
        b"\x91" * 200_000,
        b"\x93\xca\x00\x00\x00\x00" + b"\x91" * 200_000,
        b"\x92\xca\x00\x00\x00\x00\x91" + b"\x81\xa1x" * 100_000,
        b"\x93\xca\x00\x00\x00\x00\x91\x81\xa4type" + b"\x91" * 100_000 + b"\xc0\x00",
        b"\x92\xca\x00\x00\x00\x00\xdd\xff\xff\xff\xff" + b"\xc0" * 1000,
        b"\x92\xca\x00\x00\x00\x00\x91\xdf\xff\xff\xff\xff\xa4type",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x92\xca\x00\x00\x00\x00\x91\x82\xa4type\xabBlockStored\xacblock_hashes\xdd\xff\xff\xff\xf0\x01",
        b"\x92\xca\x00\x00\x00\x00\x91\x82\xa4type\xabBlockStored\xaaextra_keys\xdd\xff\xff\xff\xf0\x01",
        b"\x93\xca\x00\x00\x00\x00\x91\x82\xa4type\xacBlockRemoved\xa6medium\xa2\xff\xfe\x00",
    ],
    ids=lambda payload: payload[:24].hex(),
)
def test_depth_and_lengths_that_are_not_there_cost_nothing(payload: bytes) -> None:
    tracemalloc.start()
    before = time.monotonic()
    decoded = decode(payload)
    seconds = time.monotonic() - before
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    audit(decoded)
    assert decoded.events == ()
    assert decoded.skipped
    assert peak < 16 << 20
    assert seconds < 2


@pytest.mark.parametrize(
    ("what", "payload"),
    [
        ("nothing but nils", b"\x92\xca\x00\x00\x00\x00\xdd" + (20_000).to_bytes(4, "big") + b"\xc0" * 20_000),
        ("empty arrays", b"\x92\xca\x00\x00\x00\x00\xdd" + (20_000).to_bytes(4, "big") + b"\x90" * 20_000),
        ("empty parts", batch(stored([1], [1, 2, 3, 4], extra_keys=[[[]] * 50_000]))),
        ("an unknown field", batch(stored([1], [1, 2, 3, 4], new=[{}] * 100_000))),
        ("an odd informative field", batch(stored([1], [1, 2, 3, 4], locality=[{}] * 100_000))),
        ("many clears", batch(*[CLEARED] * 20_000)),
    ],
)
def test_memory_stays_in_proportion_to_the_message(what: str, payload: bytes) -> None:
    tracemalloc.start()
    audit(decode(payload))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 * len(payload) + (1 << 20), f"{what}: {peak} bytes for a message of {len(payload)}"


@SECONDS
def test_an_index_survives_hostile_frames_and_credits_nothing_that_was_not_stored(
    seconds: float, rng: random.Random
) -> None:
    """Hostile sources beside a good one: the good one's scores are what they are without them."""
    records = [record.frames for record in CaptureReader(CAPTURES / "llama-sha256cbor.capture")]
    prompts = [event.token_ids for frames in records for event in decode(frames[2]).events if isinstance(event, Stored)]
    alone, beside = Index(reference=True), Index(reference=True)
    until = time.monotonic() + seconds
    good = payloads(*NAMES)
    for number, frames in enumerate(records):
        assert alone.ingest("good", frames).status == "applied"
        stop = time.monotonic() + (until - time.monotonic()) / (len(records) - number)
        while time.monotonic() < stop:
            topic = rng.choice((b"kv@evil@m", b"", b"\xff\xfe", b"x" * 3000, b"@@@"))
            sequence = rng.choice((number, 0, (1 << 64) - 1, rng.randrange(1 << 64))).to_bytes(8, "big")
            hostile = [topic, sequence[: rng.choice((8, 8, 8, 3))], mutated(rng.choice(good), rng)]
            beside.ingest("evil", hostile[rng.choice((0, 0, 0, 1)) :], replay=rng.random() < 0.3)
        assert beside.ingest("good", frames).status == "applied"
    beside.check()
    (name,) = {p.endpoint for p in alone.publishers()}
    for tokens in prompts:
        one, two = alone.score(tokens, endpoints=[name]).of(name), beside.score(tokens, endpoints=[name]).of(name)
        assert (one and (one.blocks, one.tokens, one.tiers)) == (two and (two.blocks, two.tokens, two.tiers))
    assert len(beside.publishers()) <= beside.config.max_publishers
