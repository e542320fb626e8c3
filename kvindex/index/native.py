"""The native index: `reference` ported to C++. This half keeps names (tiers, models, endpoints, key domains) and says
what is wrong with an event; blocks, residency and scores are in `cython_ext/block_index.hpp`."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from cython_ext.block_index import Core
from cython_ext.keys import chain_keys as native_chain_keys
from cython_ext.keys import xxh3_64
from kvindex.events.model import Cleared, Event, EventBatch, Skip, Stored, Tokens
from kvindex.index.keys import encode_extra, extra_at, root_key
from kvindex.index.protocol import (
    DEFAULT_WEIGHTS,
    OTHER_TIER_WEIGHT,
    Applied,
    BlockView,
    Columns,
    HolderView,
    Keys,
    Namespace,
    Publisher,
)

HBM = "hbm"
MAX_SIZES = 64  # block sizes in use at once; more is a hostile stream
MAX_TIERS = 16
_UNKNOWN_MODEL = -2  # matches only publishers that state no model
_LARGEST = (1 << 62) - 1


def chain_keys(tokens: Tokens, block_size: int, namespace: Namespace) -> npt.NDArray[np.uint64]:
    """Keys of all full blocks of a prompt: `kvindex.index.keys.chain_keys`, in one call to C++."""
    root = root_key(block_size, namespace.lora, namespace.cache_salt)
    seeds = None
    if namespace.mm:
        seeds = np.zeros(len(tokens) // block_size, np.uint64)
        mm = sorted(namespace.mm, key=lambda item: item.offset)
        for i in range(len(seeds)):
            raw = encode_extra(extra_at(mm, i * block_size, (i + 1) * block_size))
            if raw:
                seeds[i] = xxh3_64(raw)
    return native_chain_keys(tokens, block_size, root, seeds)


class NativeIndex:
    """Implements `BlockIndex`; see the protocol for what each call promises."""

    def __init__(self, weights: dict[str, float] | None = None, max_forgotten_blocks: int = 1_000_000) -> None:
        self._weights = dict(DEFAULT_WEIGHTS if weights is None else weights)
        self._core = Core(max_forgotten_blocks)
        self._publishers: dict[int, Publisher] = {}
        self._hidden: set[int] = set()
        self._labels: dict[str, int] = {}
        self._models: dict[str, int] = {}
        self._tiers: list[str] = []
        self._sizes: set[int] = set()
        self._endpoints: list[str] = []  # sorted: the order of answers
        self._members: list[list[int]] = []  # of each endpoint, in the order of opening
        self._add_tier(HBM)

    # ------------------------------------------------------------------ publishers

    def open(self, publisher: Publisher) -> int:
        model = -1 if publisher.model is None else self._models.setdefault(publisher.model, len(self._models))
        chunk = min(publisher.offload_chunk_tokens or 0, _LARGEST)
        number = self._core.open(self._label(publisher), publisher.eagle, chunk, model)
        self._publishers[number] = publisher
        self._list_endpoints()
        return number

    def close(self, number: int) -> None:
        self._core.close(number)
        del self._publishers[number]
        self._hidden.discard(number)
        self._list_endpoints()

    def drop(self, number: int, *, restart: bool) -> None:
        publisher = self._publishers[number]
        kept = publisher.persistent_tiers if restart else frozenset[str]()
        keep = sum(1 << i for i, tier in enumerate(self._tiers) if tier in kept)
        self._core.drop(number, restart, keep, self._label(publisher))

    def hide(self, number: int, hidden: bool) -> None:
        self._core.hide(number, hidden)
        (self._hidden.add if hidden else self._hidden.discard)(number)

    def _label(self, publisher: Publisher) -> int:
        label = publisher.key_domain
        return -1 if label is None else self._labels.setdefault(label, len(self._labels))

    def _list_endpoints(self) -> None:
        found: dict[str, list[int]] = {}
        for number, publisher in self._publishers.items():
            found.setdefault(publisher.endpoint, []).append(number)
        self._endpoints = sorted(found)
        self._members = [found[name] for name in self._endpoints]
        self._core.set_endpoints(self._members)

    def _add_tier(self, tier: str) -> None:
        self._tiers.append(tier)
        self._core.add_tier(self._weights.get(tier, OTHER_TIER_WEIGHT))

    # ------------------------------------------------------------------ events

    def apply(self, number: int, batch: EventBatch, at: int = 0) -> Applied:
        skipped = list(batch.skipped)
        events: list[Event] = []
        tiers: list[int] = []
        for event in batch.events:
            wrong = self._wrong(event)
            if wrong is None:
                events.append(event)
                tiers.append(0 if isinstance(event, Cleared) else self._tiers.index(event.tier))
            else:
                skipped.append(wrong)
        at = max(-_LARGEST, min(at, _LARGEST))
        stored, removed, orphans, unplaced, cleared = self._core.apply(number, events, tiers, at)
        return Applied(stored, removed, orphans, unplaced, cleared, tuple(skipped))

    def _wrong(self, event: Event) -> Skip | None:
        """Why an event cannot be applied, though it was well formed on the wire."""
        if isinstance(event, Cleared):
            return None
        if event.tier not in self._tiers:
            if len(self._tiers) >= MAX_TIERS:
                return Skip("too_many_tiers", f"tier {event.tier!r} would be number {MAX_TIERS + 1}")
            self._add_tier(event.tier)
        if isinstance(event, Stored) and len(event.token_ids):
            size = event.block_size
            if size < 1 or len(event.token_ids) % size:
                return Skip("bad_shape", f"{len(event.token_ids)} tokens are no whole blocks of {size}")
            if len(event.engine_keys) * size > len(event.token_ids):
                return Skip("bad_shape", f"{len(event.engine_keys)} keys for {len(event.token_ids)} tokens of {size}")
            if event.extras and len(event.extras) != len(event.engine_keys):
                return Skip("bad_shape", f"{len(event.extras)} extra_keys for {len(event.engine_keys)} keys")
            if size not in self._sizes:
                if len(self._sizes) >= MAX_SIZES:
                    return Skip("too_many_block_sizes", f"block size {size} would be number {MAX_SIZES + 1}")
                self._sizes.add(size)
        return None

    # ------------------------------------------------------------------ questions

    def keys(self, token_ids: Tokens, namespace: Namespace) -> Keys:
        chains = {size: chain_keys(token_ids, size, namespace) for size in sorted(self._sizes)}
        return Keys(len(token_ids), chains, token_ids, namespace)

    def _complete(self, keys: Keys) -> None:
        """Hash for the block sizes that were learnt after the prompt was hashed."""
        if len(keys.chains) < len(self._sizes):
            for size in self._sizes - keys.chains.keys():
                keys.chains[size] = chain_keys(keys.tokens, size, keys.namespace)

    def score(
        self, keys: Keys, model: str | None, endpoints: frozenset[str] | None, out: Columns | None = None
    ) -> Columns:
        self._complete(keys)
        wanted = [] if endpoints is None else [i for i, name in enumerate(self._endpoints) if name in endpoints]
        number = -1 if model is None else self._models.get(model, _UNKNOWN_MODEL)
        positions, blocks, tokens, hbm_tokens, score, tiers, load_tokens = self._core.score(
            keys.chains, keys.length, number, endpoints is not None, wanted, len(self._tiers)
        )
        return Columns(
            [self._endpoints[i] for i in positions],
            blocks,
            tokens,
            hbm_tokens,
            score,
            {name: column for name, column in zip(self._tiers, tiers, strict=True) if column.any()},
            {name: column for name, column in zip(self._tiers, load_tokens, strict=True) if column.any()},
        )

    def groups(self, number: int) -> list[dict[str, Any]]:
        return [
            {"group": group, "kind": kind, "block_size": block_size, "window": window}
            for group, kind, block_size, window in self._core.groups(number)
        ]

    def stats(self) -> dict[str, int]:
        return self._core.stats()

    def check(self) -> None:
        self._core.check()

    # ------------------------------------------------------------------ explain

    def explain(self, keys: Keys, model: str | None, endpoints: frozenset[str] | None) -> list[BlockView]:
        self._complete(keys)
        asked = self._asked(model, endpoints)
        full = {
            (name, group): block_size
            for name, numbers in asked.items()
            for number in numbers
            for group, kind, block_size, _ in self._core.groups(number)
            if kind == "full"
        }
        views = []
        for size in sorted(set(full.values()) or self._sizes):
            for position in range(keys.length // size):
                key = int(keys.chains[size][position])
                known = self._core.knows(key)
                holders = tuple(
                    self._holder_view(name, group, asked[name], key, known)
                    for (name, group), group_size in sorted(full.items())
                    if group_size == size
                )
                known_in = () if known else self._known_in(keys, size, position)
                views.append(BlockView(position, position * size, size, key, holders, known_in))
        return views

    def _asked(self, model: str | None, endpoints: frozenset[str] | None) -> dict[str, list[int]]:
        """Publishers by endpoint; hidden ones too, whatever their model: people ask why an endpoint is absent."""
        found: dict[str, list[int]] = {}
        for number, publisher in self._publishers.items():
            if endpoints is not None and publisher.endpoint not in endpoints:
                continue
            if number not in self._hidden and (model is None or publisher.model in (None, model)):
                found.setdefault(publisher.endpoint, []).append(number)
        for number, publisher in self._publishers.items():
            if number in self._hidden and (endpoints is None or publisher.endpoint in endpoints):
                found.setdefault(publisher.endpoint, []).append(number)
        return found

    def _holder_view(self, endpoint: str, group: int, numbers: list[int], key: int, known: bool) -> HolderView:
        said = None
        for number in numbers if known else []:
            tier, status, at, current = self._core.word(number, group, key)
            hidden = number in self._hidden
            if tier >= 0 and not hidden:
                return HolderView(endpoint, group, "held", self._tiers[tier], at)
            if hidden or (status and not current):
                said = HolderView(endpoint, group, "fenced", None, at)
            elif status == "removed":
                said = HolderView(endpoint, group, "removed", None, at)
            elif status:
                said = HolderView(endpoint, group, "cleared", None, self._core.cleared_at(number))
        return said or HolderView(endpoint, group, "never_stored", None, None)

    def _known_in(self, keys: Keys, size: int, position: int) -> tuple[str, ...]:
        """Other namespaces in which the same tokens at this position are known."""
        found = []
        for root_size, text in self._core.roots():
            lora, salt = _names(text)
            if root_size == size and (lora, salt) != (keys.namespace.lora, keys.namespace.cache_salt):
                other = chain_keys(keys.tokens[: (position + 1) * size], size, Namespace(lora, salt, keys.namespace.mm))
                if self._core.knows(int(other[-1])):
                    found.append(
                        ", ".join(f"{k}={v}" for k, v in (("lora", lora), ("cache_salt", salt)) if v) or "none"
                    )
        return tuple(sorted(found))


def _names(text: bytes) -> tuple[str | None, str | None]:
    """LoRA name and salt from their encoding (see `kvindex.index.keys`)."""
    found: list[str | None] = []
    while text:
        (length,) = struct.unpack_from("<I", text)
        if length == 0xFFFFFFFF:
            found.append(None)
            text = text[4:]
        else:
            found.append(text[4 : 4 + length].decode("utf-8", "surrogatepass"))
            text = text[4 + length :]
    return found[0], found[1]
