"""The reference index: plain Python dictionaries, obviously right, the oracle for the native one.

What is resident is kept per publisher as the engine says it: (tier, group, engine key). What an engine key means is
kept apart, in `chains`: in its key domain it names one prefix. An endpoint holds a block when one of the block's names
is resident at one of the endpoint's publishers. So re-ordered, repeated and late announcements need no repair: naming
a block credits whatever was resident under that name all along.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from kvindex.errors import IntegrityError
from kvindex.events.model import Cleared, Event, EventBatch, Kind, Removed, Skip, Stored, Tokens
from kvindex.index.chains import Block, Domain, Forest
from kvindex.index.keys import chain, chain_keys, root_key
from kvindex.index.placing import Placing, plain_chain
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
from kvindex.scoring import hybrid

HBM = "hbm"
MAX_SIZES = 64  # block sizes in use at once; more is a hostile stream
MAX_TIERS = 16


class _Stream:
    """What one publisher said. `resident` counts copies per (tier, group, engine key): in HBM every physical copy is
    announced and removed by itself, below it a claim is made once."""

    def __init__(self, number: int, publisher: Publisher, domain: Domain) -> None:
        self.number = number
        self.publisher = publisher
        self.domain = domain
        self.hidden = False
        self.generation = 0
        self.cleared_at: int | None = None
        self.reports_hits = False  # kv_cache_report_mode=full was seen
        self.resident: dict[tuple[str, int, int], list[Any]] = {}  # -> [copies, domain]
        self.doubtful: Counter[tuple[str, int, int]] = Counter()  # copies that may have been reports of a hit
        self.kinds: dict[int, tuple[Kind, int]] = {}
        self.sizes: dict[int, set[int]] = {}
        self.lower_sizes: dict[int, int] = {}
        self.tiers: set[str] = set()

    def groups(self) -> list[hybrid.Group]:
        """Groups whose block size is known; those seen below HBM only count with the size they had there."""
        found = []
        for number, (kind, window) in sorted(self.kinds.items()):
            sizes = self.sizes.get(number) or {self.lower_sizes.get(number, 0)}
            if max(sizes) > 0:
                found.append(hybrid.Group(number, kind, max(sizes), window, frozenset(sizes)))
        return found

    def tiers_of(self, group: int, block: Block) -> set[str]:
        """The tiers in which this publisher's endpoint holds `block` for `group`."""
        named = set(self.tiers_of_names(group, block.names))
        return named | {t for t in self.tiers_of_names(group, block.covered_by) if t != HBM}

    def tiers_of_names(self, group: int, names: set[tuple[Domain, int]]) -> Iterator[str]:
        for domain, key in names:
            for tier in self.tiers:
                entry = self.resident.get((tier, group, key))
                if entry is not None and entry[1] is domain:
                    yield tier


class _New:
    """What one batch stored that a request in the same step could not have hit: what its own earlier groups stored just
    now (a request's stores come in one run of rising group numbers), and states, which are ready after the step
    only."""

    def __init__(self) -> None:
        self._run: set[tuple[str, int, int]] = set()
        self._batch: set[tuple[str, int, int]] = set()
        self._group = -1

    def next_event(self, event: Stored) -> None:
        if event.tier != HBM or event.group <= self._group:
            self._run.clear()
        self._group = event.group if event.tier == HBM else -1

    def add(self, key: tuple[str, int, int]) -> None:
        self._run.add(key)
        self._batch.add(key)

    def hides(self, group: int, engine_key: int, is_state: bool) -> bool:
        return (HBM, group, engine_key) in (self._batch if is_state else self._run)


class ReferenceIndex:
    """Implements `BlockIndex`; see the protocol for what each call promises."""

    def __init__(self, weights: dict[str, float] | None = None, max_forgotten_blocks: int = 1_000_000) -> None:
        self._weights = dict(DEFAULT_WEIGHTS if weights is None else weights)
        self._forest = Forest(max_forgotten_blocks)
        self._streams: dict[int, _Stream] = {}
        self._stated: dict[str, Domain] = {}
        self._domains = 0
        self._next = 0
        self._tiers = [HBM]
        self._sizes: set[int] = set()

    # ------------------------------------------------------------------ publishers

    def open(self, publisher: Publisher) -> int:
        number = self._next
        self._next += 1
        self._streams[number] = _Stream(number, publisher, self._domain(publisher))
        return number

    def close(self, number: int) -> None:
        stream = self._streams[number]
        self._withdraw(stream, lambda tier: True)
        self._leave(stream)
        del self._streams[number]

    def drop(self, number: int, *, restart: bool) -> None:
        stream = self._streams[number]
        keep = stream.publisher.persistent_tiers if restart else frozenset[str]()
        stream.generation += 1
        self._withdraw(stream, lambda tier: tier not in keep)
        if restart:
            if stream.resident:  # kept claims still speak of the old domain
                stream.domain.members += 1
            self._leave(stream)
            stream.domain = self._domain(stream.publisher)
            stream.kinds.clear()
            stream.sizes.clear()
            stream.lower_sizes.clear()
            stream.reports_hits = False
            stream.cleared_at = None

    def hide(self, number: int, hidden: bool) -> None:
        self._streams[number].hidden = hidden

    def _domain(self, publisher: Publisher) -> Domain:
        label = publisher.key_domain
        self._domains += 1
        made = Domain(self._domains, label)
        domain = made if label is None else self._stated.setdefault(label, made)
        domain.members += 1
        return domain

    def _leave(self, stream: _Stream) -> None:
        stream.domain.members -= 1
        if stream.domain.members == 0 and stream.domain.label is None:
            self._forest.forget_domain(stream.domain)

    def _withdraw(self, stream: _Stream, which: Callable[[str], bool]) -> int:
        gone = [key for key in stream.resident if which(key[0])]
        for key in gone:
            self._forget(stream, key)
        return len(gone)

    # ------------------------------------------------------------------ events

    def apply(self, number: int, batch: EventBatch, at: int = 0) -> Applied:
        stream = self._streams[number]
        skipped = list(batch.skipped)
        events: list[Event] = []
        for event in batch.events:
            wrong = self._wrong(event)
            if wrong is None:
                events.append(event)
                self._learn_group(stream, event)
            else:
                skipped.append(wrong)
        orphans_before = self._forest.orphans
        placing = Placing(self._forest, stream.domain, stream.groups(), stream.publisher.offload_chunk_tokens)
        unplaced = placing.place(events)
        self._learn_domain(stream, placing.named)
        new = _New()
        stored = removed = cleared = 0
        for event in events:
            if isinstance(event, Stored):
                stored += self._store(stream, event, at, new)
            elif isinstance(event, Removed):
                removed += self._remove(stream, event, at)
            elif isinstance(event, Cleared):
                stream.cleared_at = at
                cleared += self._withdraw(stream, lambda tier: tier == HBM)
        self._forest.settle()
        orphans = max(0, self._forest.orphans - orphans_before)
        return Applied(stored, removed, orphans, unplaced, cleared, tuple(skipped))

    def _wrong(self, event: Event) -> Skip | None:
        """Why an event cannot be applied, though it was well formed on the wire."""
        if isinstance(event, Cleared):
            return None
        if event.tier not in self._tiers:
            if len(self._tiers) >= MAX_TIERS:
                return Skip("too_many_tiers", f"tier {event.tier!r} would be number {MAX_TIERS + 1}")
            self._tiers.append(event.tier)
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

    def _learn_group(self, stream: _Stream, event: Event) -> None:
        if not isinstance(event, Stored) or event.is_placeholder:
            return
        kind, window = stream.kinds.get(event.group, (None, 0))
        stream.kinds[event.group] = (event.kind or kind or Kind.FULL, event.window or window)
        if len(event.token_ids):
            if event.tier == HBM:
                stream.sizes.setdefault(event.group, set()).add(event.block_size)
            else:
                known = stream.lower_sizes.get(event.group, event.block_size)
                stream.lower_sizes[event.group] = min(known, event.block_size)

    def _learn_domain(self, stream: _Stream, named: list[tuple[int, Block]]) -> None:
        """Join the domain in which a block just named already has the same engine key; once another key is seen for it,
        or the domain was stated, there is nothing left to learn."""
        domain = stream.domain
        if domain.settled:
            return
        for engine_key, block in named:
            others = [(other, key) for other, key in block.names if other is not domain]
            if not others:
                continue
            match = min((o for o, key in others if key == engine_key), key=lambda o: o.serial, default=None)
            domain.settled = True
            if match is not None and domain.members == 1:
                match.settled = True
                self._join(stream, match)
            return

    def _join(self, stream: _Stream, domain: Domain) -> None:
        old, stream.domain = stream.domain, domain
        domain.members += 1
        for entry in stream.resident.values():
            if entry[1] is old:
                entry[1] = domain
        self._forest.absorb(old, domain)

    def _store(self, stream: _Stream, event: Stored, at: int, new: _New) -> int:
        doubtful = False
        new.next_event(event)
        if event.tier == HBM and event.parent is None and event.is_dense and len(event.token_ids) and not event.gone:
            repeats = self._repeats_hit(stream, event, new)
            if repeats == "surely" or (repeats == "perhaps" and stream.reports_hits):
                self._forget_doubtful(stream)
                return 0
            doubtful = repeats == "perhaps"
        credited = [key for key in event.engine_keys if key not in event.gone]
        for engine_key in credited:
            key = (event.tier, event.group, engine_key)
            if doubtful:
                stream.doubtful[key] += 1
            entry = stream.resident.get(key)
            if entry is None:
                stream.resident[key] = [1, stream.domain]
                stream.tiers.add(event.tier)
                new.add(key)
                references = stream.domain.references
                references[engine_key] = references.get(engine_key, 0) + 1
            else:
                entry[0] = entry[0] + 1 if event.tier == HBM else 1
            self._note(stream, event.group, engine_key, "stored", at)
        return len(credited)

    def _remove(self, stream: _Stream, event: Removed, at: int) -> int:
        count = 0
        for engine_key in event.engine_keys:
            key = (event.tier, event.group, engine_key)
            entry = stream.resident.get(key)
            if entry is None:
                continue
            entry[0] -= 1
            count += 1
            if entry[0] == 0:
                self._note(stream, event.group, engine_key, "removed", at)
                self._forget(stream, key)
            elif key in stream.doubtful:
                stream.doubtful[key] = min(stream.doubtful[key], entry[0])
        return count

    def _forget(self, stream: _Stream, key: tuple[str, int, int]) -> None:
        _, domain = stream.resident.pop(key)
        stream.doubtful.pop(key, None)
        references = domain.references
        references[key[2]] -= 1
        if references[key[2]] == 0:
            del references[key[2]]
            for block in list(domain.names.get(key[2], {}).values()):
                self._forest.release(block)

    def _note(self, stream: _Stream, group: int, engine_key: int, status: str, at: int) -> None:
        for block in stream.domain.names.get(engine_key, {}).values():
            block.history[stream.number, group] = (status, at, stream.generation)

    def _forget_doubtful(self, stream: _Stream) -> None:
        """The engine does report hits: copies that may have been reports were."""
        stream.reports_hits = True
        for key, copies in list(stream.doubtful.items()):
            entry = stream.resident.get(key)
            if entry is not None:
                entry[0] -= copies
                if entry[0] < 1:
                    self._forget(stream, key)
        stream.doubtful.clear()

    def _repeats_hit(self, stream: _Stream, event: Stored, new: _New) -> str:
        """Does this event announce a usable prefix again, `surely` or `perhaps`? Empty: no, it is a second copy.

        `kv_cache_report_mode=full` looks like a store, from the first token, of blocks that are held already. An engine
        that could have used a part of that prefix would not have computed this group's first block; but no shorter hit
        may have been there for a prompt that ends with the prefix.
        """
        length = len(event.token_ids)
        groups = stream.groups()
        unit = hybrid.alignment(groups).tokens
        if length % unit:
            return ""
        states = {group.number for group in groups if group.kind is Kind.STATE}
        blocks = {size: self._blocks_of(event, size) for group in groups for size in group.sizes}

        def held(group: int, size: int, index: int) -> bool:
            chain_ = blocks.get(size, [])  # the unit may be no size of its own
            block = chain_[index] if index < len(chain_) else None
            return block is not None and any(
                (HBM, group, key) in stream.resident and not new.hides(group, key, group in states)
                for domain, key in block.names
                if domain is stream.domain
            )

        eagle = stream.publisher.eagle
        if hybrid.usable_tokens(groups, length + 1, held, eagle) != length:
            return ""
        return "surely" if hybrid.usable_tokens(groups, length, held, eagle) >= event.block_size else "perhaps"

    def _blocks_of(self, event: Stored, size: int) -> list[Block | None]:
        """The known blocks, at another block size, of the prefix that a parentless event tells."""
        locals_ = plain_chain(event, size)
        if locals_ is None:
            return []
        salt = event.extras[0].cache_salt if event.extras else None
        key = root_key(size, event.lora, salt)
        found = []
        for local, _ in locals_:
            key = chain(key, local)
            found.append(self._forest.by_key.get(key))
        return found

    # ------------------------------------------------------------------ questions

    def keys(self, token_ids: Tokens, namespace: Namespace) -> Keys:
        chains = {size: chain_keys(token_ids, size, namespace) for size in sorted(self._sizes)}
        return Keys(len(token_ids), chains, token_ids, namespace)

    def _block_of(self, keys: Keys, size: int, index: int) -> Block | None:
        if size not in keys.chains:  # a block size that was learnt after the prompt was hashed
            keys.chains[size] = chain_keys(keys.tokens, size, keys.namespace)
        chain_ = keys.chains[size]
        return self._forest.by_key.get(int(chain_[index])) if index < len(chain_) else None

    def _endpoints(self, model: str | None, wanted: frozenset[str] | None) -> dict[str, list[_Stream]]:
        found: dict[str, list[_Stream]] = {}
        for stream in self._streams.values():
            publisher = stream.publisher
            if stream.hidden or (wanted is not None and publisher.endpoint not in wanted):
                continue
            if model is None or publisher.model is None or publisher.model == model:
                found.setdefault(publisher.endpoint, []).append(stream)
        return found

    def score(
        self, keys: Keys, model: str | None, endpoints: frozenset[str] | None, out: Columns | None = None
    ) -> Columns:
        rows = []
        for name, streams in sorted(self._endpoints(model, endpoints).items()):
            row = self._score_endpoint(keys, streams)
            if row.blocks or row.tokens:
                rows.append((name, row))
        tiers = [t for t in self._tiers if any(t in row.tiers for _, row in rows)]
        loads = [t for t in self._tiers if any(t in row.load_tokens for _, row in rows)]
        return Columns(
            [name for name, _ in rows],
            np.array([row.blocks for _, row in rows], np.int64),
            np.array([row.tokens for _, row in rows], np.int64),
            np.array([row.hbm_tokens for _, row in rows], np.int64),
            np.array([row.score for _, row in rows], np.float64),
            {t: np.array([row.tiers.get(t, 0) for _, row in rows], np.int64) for t in tiers},
            {t: np.array([row.load_tokens.get(t, 0) for _, row in rows], np.int64) for t in loads},
        )

    def _score_endpoint(self, keys: Keys, streams: list[_Stream]) -> _Row:
        groups = {group.number: group for stream in streams for group in stream.groups()}
        ordered = [groups[number] for number in sorted(groups)]
        eagle = any(stream.publisher.eagle for stream in streams)
        chunk = next((s.publisher.offload_chunk_tokens for s in streams if s.publisher.offload_chunk_tokens), None)

        def tiers(group: int, size: int, index: int) -> set[str]:
            block = self._block_of(keys, size, index)
            return set() if block is None else {t for s in streams for t in s.tiers_of(group, block)}

        hbm_tokens = hybrid.usable_tokens(ordered, keys.length, lambda *at: HBM in tiers(*at), eagle)
        tokens = hbm_tokens
        if any(s.tiers - {HBM} for s in streams):
            tokens = hybrid.extend_from_lower_tiers(
                ordered, keys.length, hbm_tokens, lambda *at: bool(tiers(*at) - {HBM}), chunk
            )
        full = [g for g in ordered if g.kind is Kind.FULL]
        if not full:
            return _Row(0, tokens, hbm_tokens, 0.0, {}, {})
        counts = [hybrid.leading_blocks(g, keys.length, lambda *at: bool(tiers(*at))) * g.block_size for g in full]
        first = full[0]
        best = [self._best(tiers(first.number, first.block_size, i)) for i in range(min(counts) // first.block_size)]
        loaded = [
            self._best(tiers(first.number, first.block_size, i) - {HBM})
            for i in range(hbm_tokens // first.block_size, tokens // first.block_size)
        ]
        return _Row(
            len(best),
            tokens,
            hbm_tokens,
            float(sum(self._weight(t) for t in best)),
            dict(Counter(best)),
            {t: n * first.block_size for t, n in Counter(loaded).items()},
        )

    def _weight(self, tier: str) -> float:
        return self._weights.get(tier, OTHER_TIER_WEIGHT)

    def _best(self, tiers: set[str]) -> str:
        return max(tiers, key=lambda tier: (self._weight(tier), -self._tiers.index(tier)))

    def explain(self, keys: Keys, model: str | None, endpoints: frozenset[str] | None) -> list[BlockView]:
        views = []
        by_endpoint = self._endpoints(model, endpoints)
        for stream in self._streams.values():  # hidden ones too: people ask why an endpoint is absent
            if stream.hidden and (endpoints is None or stream.publisher.endpoint in endpoints):
                by_endpoint.setdefault(stream.publisher.endpoint, []).append(stream)
        full = {
            (name, g.number): g.block_size
            for name, streams in by_endpoint.items()
            for s in streams
            for g in s.groups()
            if g.kind is Kind.FULL
        }
        for size in sorted(set(full.values()) or self._sizes):
            for index in range(keys.length // size):
                block = self._block_of(keys, size, index)
                holders = tuple(
                    self._holder_view(name, group, by_endpoint[name], block)
                    for (name, group), group_size in sorted(full.items())
                    if group_size == size
                )
                known_in = () if block is not None else self._known_in(keys, size, index)
                key = int(keys.chains[size][index]) if block is None or block.key is None else block.key
                views.append(BlockView(index, index * size, size, key, holders, known_in))
        return views

    def _holder_view(self, endpoint: str, group: int, streams: list[_Stream], block: Block | None) -> HolderView:
        said = None
        for stream in streams if block is not None else []:
            assert block is not None
            status, at, generation = block.history.get((stream.number, group), ("", 0, 0))
            tiers = stream.tiers_of(group, block)
            if tiers and not stream.hidden:
                return HolderView(endpoint, group, "held", self._best(tiers), at)
            if stream.hidden or (status and generation != stream.generation):
                said = HolderView(endpoint, group, "fenced", None, at)
            elif status == "removed":
                said = HolderView(endpoint, group, "removed", None, at)
            elif status:
                said = HolderView(endpoint, group, "cleared", None, stream.cleared_at)
        return said or HolderView(endpoint, group, "never_stored", None, None)

    def _known_in(self, keys: Keys, size: int, index: int) -> tuple[str, ...]:
        """Other namespaces in which the same tokens at this position are known."""
        found = []
        for (root_size, lora, salt), _ in self._forest.roots.items():
            if root_size == size and (lora, salt) != (keys.namespace.lora, keys.namespace.cache_salt):
                other = chain_keys(keys.tokens[: (index + 1) * size], size, Namespace(lora, salt, keys.namespace.mm))
                if int(other[-1]) in self._forest.by_key:
                    found.append(
                        ", ".join(f"{k}={v}" for k, v in (("lora", lora), ("cache_salt", salt)) if v) or "none"
                    )
        return tuple(sorted(found))

    def groups(self, number: int) -> list[dict[str, Any]]:
        return [
            {"group": g.number, "kind": g.kind.value, "block_size": g.block_size, "window": g.window}
            for g in self._streams[number].groups()
        ]

    def stats(self) -> dict[str, int]:
        held = sum(self._forest.is_held(block) for block in self._forest.by_key.values())
        return {
            "blocks": held,
            "forgotten": len(self._forest.by_key) - held,
            "entries": sum(len(stream.resident) for stream in self._streams.values()),
            "orphans": self._forest.orphans,
            "publishers": len(self._streams),
            "bytes": 0,
        }

    def check(self) -> None:
        self._forest.check()
        expected: Counter[tuple[Domain, int]] = Counter()
        for stream in self._streams.values():
            for (tier, group, key), (copies, domain) in stream.resident.items():
                if copies < 1 or (tier != HBM and copies != 1):
                    raise IntegrityError(f"publisher {stream.number} holds {copies} copies of {key} in {tier}/{group}")
                expected[domain, key] += 1
        for (domain, key), count in expected.items():
            if domain.references.get(key) != count:
                raise IntegrityError(f"engine key {key}: {domain.references.get(key)} references, {count} residencies")


class _Row(NamedTuple):
    """One endpoint's line of `Columns`."""

    blocks: int
    tokens: int
    hbm_tokens: int
    score: float
    tiers: dict[str, int]
    load_tokens: dict[str, int]
