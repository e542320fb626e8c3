"""The one event model. Every wire format decodes into it; the indexes consume nothing else.

Plain values that import nothing of ours. Engine keys are unsigned 64-bit integers: integers on the wire are taken
modulo 2**64 (SGLang's are signed), digests sent as bytes by their last eight bytes, big-endian, which is what vLLM
itself sends when it sends integers.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint32]

MASK64 = (1 << 64) - 1


class Kind(enum.Enum):
    """What decides which blocks of a group a prefix hit needs (facts: one rule per kind)."""

    FULL = "full"  # full_attention, mla_attention, sink_full_attention, unknown, and engines that name no kind
    WINDOW = "window"  # sliding_window, sliding_window_mla
    STATE = "state"  # mamba and linear attention: one state at exactly the hit's end
    IGNORED = "ignored"  # encoder_only_attention, cross_attention: never part of a prefix hit


class MultiModal(NamedTuple):
    """A piece of an image (or other media) inside a block; `offset` is its start relative to the block's start,
    negative when it began in an earlier block, None when the engine does not say."""

    hash: str
    offset: int | None


class Extra(msgspec.Struct, frozen=True):
    """What besides its tokens goes into one block's identity. LoRA is per event, not here."""

    cache_salt: str | None = None
    mm: tuple[MultiModal, ...] = ()
    embeds: bytes | None = None


NO_EXTRA = Extra()


class Stored(msgspec.Struct, frozen=True, tag=True):
    """Blocks became available. Dense when `len(token_ids) == block_size * len(engine_keys)`, else sparse: which blocks
    the keys name is found by alignment. A placeholder has no tokens and block_size 0.

    `extras` has one entry per engine key (or is empty: none has any). `gone` is never on the wire: keys that a later
    message, applied already, removed; they still tell which block they mean, but are not credited.
    """

    engine_keys: tuple[int, ...]
    parent: int | None
    token_ids: Tokens
    block_size: int
    tier: str = "hbm"
    group: int = 0
    kind: Kind | None = None  # None: the engine did not say, treat as full
    window: int | None = None  # tokens
    lora: str | None = None
    extras: tuple[Extra, ...] = ()
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    gone: frozenset[int] = frozenset()

    @property
    def is_placeholder(self) -> bool:
        return len(self.token_ids) == 0 and self.block_size == 0

    @property
    def is_dense(self) -> bool:
        return self.block_size > 0 and len(self.token_ids) == self.block_size * len(self.engine_keys)


class Removed(msgspec.Struct, frozen=True, tag=True):
    """Blocks left a tier. `group` None (SGLang, old vLLM) means group 0."""

    engine_keys: tuple[int, ...]
    tier: str = "hbm"
    group: int = 0


class Cleared(msgspec.Struct, frozen=True, tag=True):
    """The publisher's HBM pool was emptied. Lower tiers keep their blocks."""


Event = Stored | Removed | Cleared


class Skip(NamedTuple):
    """One event, or one whole message, that was not applied. `reason` is a stable short slug usable as a metric label
    (`undecodable`, `unknown_type`, `bad_field`, ...), `detail` is for people."""

    reason: str
    detail: str


class EventBatch(msgspec.Struct, frozen=True):
    """One message's events, in order, and what was skipped among them."""

    timestamp: float
    events: tuple[Event, ...]
    rank: int = 0
    skipped: tuple[Skip, ...] = ()
