"""Checks of single wire fields, shared by all decoders. What fails here is one bad event, never a whole batch.

The limits are not the engines': they are what no engine comes near, so that a hostile message cannot make anything
that is kept (names, tiers, tokens) grow without bound.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from kvindex.events.model import MASK64, Tokens
from kvindex.events.tiers import tier_of

MAX_BLOCK_SIZE = 1 << 20
MAX_GROUP = 1023
MAX_KEYS = 1 << 20  # per event
MAX_TOKENS = 1 << 24  # per event
MAX_NAME = 1024  # characters of a LoRA name, salt or media hash
MAX_MEDIUM = 64
MAX_DIGEST = 256  # bytes of one engine key

Hash = int | bytes


class BadEventError(Exception):
    """Internal to the decoders: this event is skipped with `reason` and `detail`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def bad(field: str, value: object, right: str) -> BadEventError:
    """The error for a field that decoded but holds what no engine sends."""
    return BadEventError("bad_field", f"{field}: {str(value)[:80]!r} is not {right}")


def engine_key(value: Hash) -> int:
    """Any spelling of an engine's hash as the unsigned 64 bits that vLLM sends by default (facts: its digest's last
    eight bytes); SGLang's are the same width, signed."""
    if isinstance(value, int):
        return value & MASK64
    if not 0 < len(value) <= MAX_DIGEST:
        raise bad("block_hashes", f"{len(value)} bytes", f"1..{MAX_DIGEST} bytes")
    return int.from_bytes(value[-8:], "big")


def engine_keys(values: Sequence[Hash]) -> tuple[int, ...]:
    if len(values) > MAX_KEYS:
        raise bad("block_hashes", f"{len(values)} entries", f"at most {MAX_KEYS}")
    return tuple([engine_key(value) for value in values])


def tokens(values: list[int]) -> Tokens:
    """Token ids as a uint32 array; the range check is the array's own."""
    if len(values) > MAX_TOKENS:
        raise bad("token_ids", f"{len(values)} entries", f"at most {MAX_TOKENS}")
    try:
        return np.frombuffer(array("I", values), dtype=np.uint32) if values else np.empty(0, np.uint32)
    except OverflowError:
        wrong = next(value for value in values if not 0 <= value < 1 << 32)
        raise bad("token_ids", wrong, "in 0..2^32-1") from None


def block_size(value: int, n_keys: int, n_tokens: int) -> int:
    """The block size when it, the keys and the tokens can belong together.

    Fewer keys than tokens make blocks is a sparse store; more keys than that is nothing an engine sends. A placeholder
    (facts: offload events of groups that cannot describe themselves) has neither tokens nor a block size.
    """
    if n_tokens == 0 and value == 0:
        return 0
    if not 1 <= value <= MAX_BLOCK_SIZE:
        raise bad("block_size", value, f"in 1..{MAX_BLOCK_SIZE}")
    if n_keys * value > n_tokens:
        raise bad("token_ids", f"{n_tokens} entries", f"enough for {n_keys} blocks of {value}")
    return value


def group(value: int | None) -> int:
    if value is None:
        return 0
    if not 0 <= value <= MAX_GROUP:
        raise bad("group_idx", value, f"in 0..{MAX_GROUP}")
    return value


def tier(medium: str | None) -> str:
    if medium is not None and len(medium) > MAX_MEDIUM:
        raise bad("medium", medium, f"at most {MAX_MEDIUM} characters")
    return tier_of(medium)


def name(field: str, value: str | None) -> str | None:
    """A name that the index keeps. Empty counts as absent: engines send both for "none"."""
    if value is not None and len(value) > MAX_NAME:
        raise bad(field, value, f"at most {MAX_NAME} characters")
    return value or None


def lora(lora_name: str | None, lora_id: int | str | None) -> str | None:
    """The adapter's name. An engine that sends only a number still must not be taken for the base model, so the number
    becomes a name that no prompt asks for by accident."""
    named = name("lora_name", lora_name)
    if named is None and lora_id is not None:
        return name("lora_id", f"lora_id:{lora_id}")
    return named
