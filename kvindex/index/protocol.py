"""What every block index offers: `reference` (plain Python, the oracle) and `native` (C++) implement it alike.

A block index knows publishers (by small integers that it hands out), blocks and holders. It knows nothing of sockets,
sequence numbers, gaps or clocks: `kvindex.index.Index` puts those around it. Batch in, batch out.

Thread-safety: calls are not synchronised here; the owner serialises writers, and readers against writers where an
implementation says it needs that.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from kvindex.events.model import EventBatch, Skip, Tokens

DEFAULT_WEIGHTS = {"hbm": 1.0, "dram": 0.8, "filesystem": 0.5, "object": 0.3}
OTHER_TIER_WEIGHT = 0.3  # any tier that has no weight of its own


class MultiModalItem(NamedTuple):
    """One media item of a prompt: `hash` as the engine names it, `offset` and `length` in tokens."""

    hash: str
    offset: int
    length: int


class Namespace(NamedTuple):
    """What separates equal tokens. The base model is not in it: it is an attribute of the holder."""

    lora: str | None = None
    cache_salt: str | None = None
    mm: tuple[MultiModalItem, ...] = ()


class Publisher(msgspec.Struct, frozen=True, kw_only=True):
    """One ordered stream as the index sees it.

    `endpoint` holds this publisher's HBM blocks and reaches its lower tiers. `model` None matches any model asked for.
    `key_domain` None: learnt from the first block whose block key is already known. `eagle`: the engine drafts with
    EAGLE/MTP and gives up its last matched block (nothing on the wire says so). `persistent_tiers` survive a restart.
    `offload_chunk_tokens`: what an offloaded chunk holds, for engines whose events name only its last block.
    """

    endpoint: str
    model: str | None = None
    key_domain: str | None = None
    eagle: bool = False
    persistent_tiers: frozenset[str] = frozenset()
    offload_chunk_tokens: int | None = None


class Applied(NamedTuple):
    """What one batch did. `stored`/`removed` count (group, engine key) residencies that were credited or withdrawn,
    `orphans` blocks kept waiting for their parent, `unplaced` sparse keys that no anchor could place."""

    stored: int = 0
    removed: int = 0
    orphans: int = 0
    unplaced: int = 0
    cleared: int = 0
    skipped: tuple[Skip, ...] = ()


class Keys(NamedTuple):
    """A prompt, hashed once. Opaque to callers; valid for indexes of the same implementation and layout version.

    `length` is the prompt's tokens; `chains` maps block size to its block keys (uint64, one per full block).
    `tokens` and `namespace` are kept so that a block size or partial tail that appears later can still be hashed.
    """

    length: int
    chains: dict[int, npt.NDArray[np.uint64]]
    tokens: Tokens
    namespace: Namespace


class Columns(NamedTuple):
    """Scores of the endpoints that hold something, as aligned columns.

    `blocks`: leading blocks of the full-attention group held in any tier the endpoint reaches. `tokens`: what the
    engine would find cached (facts: hybrid groups, alignment, never the whole prompt). `hbm_tokens`: the part of it in
    HBM. `score`: sum over `blocks` of the best tier's weight. `tiers`: each of `blocks` counted once, in its best tier.
    `load_tokens`: per lower tier, the tokens of `tokens` that would be loaded from it.
    """

    endpoints: list[str]
    blocks: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    hbm_tokens: npt.NDArray[np.int64]
    score: npt.NDArray[np.float64]
    tiers: dict[str, npt.NDArray[np.int64]]
    load_tokens: dict[str, npt.NDArray[np.int64]]


class HolderView(NamedTuple):
    """For `explain`: one endpoint's word on one block. `status` is `held`, `removed`, `cleared`, `fenced` or
    `never_stored`; `tier` only when held; `sequence` is when it was last stored or removed (the `at` passed to
    `apply`), None when never."""

    endpoint: str
    group: int
    status: str
    tier: str | None
    sequence: int | None


class BlockView(NamedTuple):
    """For `explain`: one block of the prompt at one block size. `known_in` names other namespaces (lora, cache_salt) in
    which the same tokens at this position are known, which tells "other namespace" from "never stored"."""

    position: int
    first_token: int
    block_size: int
    key: int
    holders: tuple[HolderView, ...]
    known_in: tuple[str, ...]


class BlockIndex(Protocol):
    """See the module's docstring."""

    def open(self, publisher: Publisher) -> int:
        """Register a publisher; returns its number. Opening an endpoint twice (two streams) is allowed."""

    def close(self, number: int) -> None:
        """Forget a publisher and everything it said. Its number is not reused."""

    def apply(self, number: int, batch: EventBatch, at: int = 0) -> Applied:
        """Apply one batch; bad events are counted and skipped, the rest is applied. `at` is the sequence number, kept
        for `explain`. Never raises for content."""

    def drop(self, number: int, *, restart: bool) -> None:
        """Forget a publisher's residencies at once, visible to the next score. A fence (`restart=False`) drops all
        tiers but remembers what engine keys mean, so that later children attach; a restart forgets that, orphans and
        groups too, and keeps the claims on the publisher's persistent tiers."""

    def hide(self, number: int, hidden: bool) -> None:
        """A hidden publisher's endpoint is absent from scores; nothing is forgotten."""

    def keys(self, token_ids: Tokens, namespace: Namespace) -> Keys:
        """Hash a prompt for every block size known now."""

    def score(
        self, keys: Keys, model: str | None, endpoints: frozenset[str] | None, out: Columns | None = None
    ) -> Columns:
        """Score the endpoints of `model` (None: each under its own), restricted to `endpoints` when given."""

    def explain(self, keys: Keys, model: str | None, endpoints: frozenset[str] | None) -> list[BlockView]:
        """Block by block, who has it and if not, why not. Slow path; for people."""

    def groups(self, number: int) -> list[dict[str, Any]]:
        """What was learnt of a publisher's KV-cache groups: group, kind, block_size, window."""

    def stats(self) -> dict[str, int]:
        """Counters and sizes: blocks (distinct), entries (endpoint, group, tier, block), orphans, publishers, bytes."""

    def check(self) -> None:
        """Audit every invariant; raises IntegrityError naming the one that is violated."""
