"""Which blocks do a batch's engine keys mean? Names blocks; knows nothing of who holds what.

Dense stores say it themselves: tokens, in order, after a known parent. Sparse stores (sliding windows, states) list
fewer keys than their tokens would fill, so they are placed after all dense ones of the batch: by key, because the same
engine key is the same prefix in every group, and those left over run backwards from the next one placed. What no
anchor places stays without a name and is credited to nothing. An engine key that is known already wins over the tokens
beside it: offload events carry no salt and no media, so their tokens alone would name the plain prompt's block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from kvindex.events.model import NO_EXTRA, Event, Extra, Stored
from kvindex.index.chains import Block, Domain, Forest
from kvindex.index.keys import local_hash, root_key
from kvindex.scoring.hybrid import Group

_UNKNOWN: Final = object()


class Placing:
    """Places one batch for one key domain. `named` lists (engine key, block) in the order they were named."""

    def __init__(self, forest: Forest, domain: Domain, groups: Sequence[Group], chunk_tokens: int | None) -> None:
        self._forest = forest
        self._domain = domain
        self._block_size = {group.number: group.block_size for group in groups}
        self._sizes = sorted({size for group in groups for size in group.sizes})
        self._chunk_tokens = chunk_tokens
        self.named: list[tuple[int, Block]] = []

    def place(self, events: Sequence[Event]) -> int:
        """Name what can be named; returns how many keys of sparse stores were left without a place."""
        told = [e for e in events if isinstance(e, Stored)]
        stores = [e for e in told if e.engine_keys]
        dense = [e for e in stores if e.is_dense]
        for event in sorted(dense, key=lambda e: e.tier != "hbm"):  # HBM events are the authority on what a key means
            self._dense(event)
        if len(self._sizes) > 1:
            for event in told:
                if event.tier == "hbm" and len(event.token_ids):
                    self._twins(event, dense)
        unplaced = 0
        for event in stores:
            if len(event.token_ids) == 0:
                unplaced += self._placeholder(event)
            elif not event.is_dense:
                unplaced += self._sparse(event)
        return unplaced

    # ------------------------------------------------------------------ dense

    def _dense(self, event: Stored) -> None:
        size = self._size_to_use(event)
        per_key = event.block_size // size  # more than one only for offloaded chunks
        provisional = event.tier != "hbm"
        block = self._base(event, size)
        known = self._known(event.engine_keys[0], size) if block.key is None and per_key == 1 else None
        if known is not None and known.parent is not None and known.parent.key is not None and not known.parent.is_top:
            # the parent was unknown, but its child is known in its place: so is the parent
            self._forest.name(self._domain, event.parent or 0, known.parent, provisional)
            block = self._base(event, size)
        for i, engine_key in enumerate(event.engine_keys):
            known = self._known(engine_key, size)
            if known is not None and (provisional or (engine_key, size) not in self._domain.provisional):
                block = known
                self._cover(engine_key, block, per_key)
                continue
            extra = event.extras[i] if event.extras else NO_EXTRA
            for part in range(i * per_key, (i + 1) * per_key):
                tokens = event.token_ids[part * size : (part + 1) * size]
                extra = extra if per_key == 1 else NO_EXTRA
                block = self._forest.child(block, local_hash(tokens, extra), extra)
            self._name(engine_key, block, provisional)
            self._cover(engine_key, block, per_key)

    def _size_to_use(self, event: Stored) -> int:
        """The group's own block size where an offload event's blocks are whole chunks of it."""
        size = self._block_size.get(event.group, event.block_size)
        return size if event.tier != "hbm" and event.block_size % size == 0 else event.block_size

    def _base(self, event: Stored, size: int) -> Block:
        """The block before the event's first, a root, or a stub for a parent that is not known."""
        if event.parent is not None:
            return self._known(event.parent, size) or self._forest.stub(self._domain, event.parent, size)
        return self._root(size, event.lora, event.extras[0].cache_salt if event.extras else None)

    def _root(self, size: int, lora: str | None, salt: str | None) -> Block:
        return self._forest.root(size, lora, salt, root_key(size, lora, salt))

    def _known(self, engine_key: int, size: int) -> Block | None:
        return self._domain.names.get(engine_key, {}).get(size)

    def _name(self, engine_key: int, block: Block, provisional: bool) -> None:
        self._forest.name(self._domain, engine_key, block, provisional)
        self.named.append((engine_key, block))

    # ------------------------------------------------------------------ several block sizes

    def _twins(self, event: Stored, dense: Sequence[Stored]) -> None:
        """Groups of different block sizes share engine keys where their blocks end together. Follow the event's tokens
        in the chain of every size whose start is known; what is named in one chain is so in the others too. Without
        this, a child whose parent was announced under another block size would have no place."""
        if any(extra.mm or extra.embeds is not None for extra in event.extras):
            return  # a medium's end inside a larger block is not announced: finer chains are uncertain
        salt = self._salt_of(event, dense)
        if salt is _UNKNOWN:
            return
        ends: dict[int, list[Block]] = {}
        for size in self._sizes:
            base = self._known(event.parent, size) if event.parent is not None else self._root(size, event.lora, salt)
            if base is None or _has_media(base):
                continue
            for start in range(0, len(event.token_ids) - size + 1, size):
                base = self._forest.child(base, local_hash(event.token_ids[start : start + size]), NO_EXTRA)
                ends.setdefault(start + size, []).append(base)
        for twins in ends.values():
            if len(twins) > 1:
                keys = {key for block in twins for domain, key in block.names if domain is self._domain}
                for block in twins:
                    for key in sorted(keys):
                        if self._known(key, block.size) is None:
                            self._name(key, block, provisional=False)

    def _salt_of(self, event: Stored, dense: Sequence[Stored]) -> Any:
        """The salt of an event from the first token: its own block 0 says it, else a dense sibling of the same
        tokens."""
        if event.parent is not None or event.is_dense:
            return event.extras[0].cache_salt if event.extras else None
        salts = set()
        for other in dense:
            common = min(len(other.token_ids), len(event.token_ids))
            alike = other.parent is None and other.lora == event.lora and other.tier == event.tier
            if alike and np.array_equal(other.token_ids[:common], event.token_ids[:common]):
                if any(extra.mm or extra.embeds is not None for extra in other.extras):
                    return _UNKNOWN
                salts.add(other.extras[0].cache_salt if other.extras else None)
        return salts.pop() if len(salts) == 1 else _UNKNOWN

    # ------------------------------------------------------------------ chunks and placeholders

    def _cover(self, engine_key: int, block: Block, blocks: int) -> None:
        """An offloaded chunk is named by its last block only, and holds all of them."""
        part: Block | None = block if blocks > 1 else None
        for _ in range(blocks):
            if part is None or part.is_top:
                return
            self._forest.cover(self._domain, engine_key, part)
            part = part.parent

    def _placeholder(self, event: Stored) -> int:
        unplaced = 0
        size = self._block_size.get(event.group, 0)
        for engine_key in event.engine_keys:
            block = self._known(engine_key, size)
            if block is not None and self._chunk_tokens:
                self._cover(engine_key, block, self._chunk_tokens // size)
            unplaced += engine_key not in self._domain.names
        return unplaced

    # ------------------------------------------------------------------ sparse

    def _sparse(self, event: Stored) -> int:
        """See the module's docstring."""
        size, keys = event.block_size, event.engine_keys
        blocks = [self._known(key, size) for key in keys]
        if not all(block is not None and block.key is not None for block in blocks):
            own = self._own_chain(event) if any(key in self._domain.names for key in keys) else []
            index_of = {block: i for i, block in enumerate(own)}
            at = [index_of.get(blocks[i]) for i in range(len(keys))]  # type: ignore[arg-type]
            at = [self._index_in(event, key) if at[i] is None and own else at[i] for i, key in enumerate(keys)]
            for i in range(len(keys) - 1, -1, -1):
                before = at[i + 1] if i + 1 < len(keys) else None
                if at[i] is None and before:
                    at[i] = before - 1
                where = at[i]
                if where is not None:
                    self._attach(blocks[i], own, where)
                    blocks[i] = self._known(keys[i], size) or own[where]
        for i in range(len(keys) - 2, -1, -1):  # without a chain of its own, the next key's parents lead back
            after = blocks[i + 1]
            if blocks[i] is None and after is not None and after.parent is not None and not after.parent.is_top:
                blocks[i] = after.parent
        for key, block in zip(keys, blocks, strict=True):
            if block is not None and self._known(key, size) is None:
                self._name(key, block, provisional=False)
        return sum(block is None for block in blocks)

    def _attach(self, orphan: Block | None, own: Sequence[Block], where: int) -> None:
        """`orphan` turned out to be `own[where]`, so what its stub stands for is known too."""
        if orphan is None or orphan.key is not None or own[where].key is None:
            return
        stub, before = orphan.top.stub, where - orphan.end // orphan.size
        if stub is not None and before >= 0 and self._known(stub[1], orphan.size) is None:
            self._name(stub[1], own[before], provisional=False)

    def _index_in(self, event: Stored, engine_key: int) -> int | None:
        """Which block of the event ends where `engine_key`, known in a chain of another block size, ends."""
        start = self._position(event.parent)
        for known in self._domain.names.get(engine_key, {}).values():
            top, end = self._place_of(known)
            if start is None:  # the parent is unknown everywhere: both hang from a stub of the same name
                offset = end if top == ("stub", event.parent) else None
            else:
                offset = end - start[1] if top == start[0] else None
            if offset is not None and 0 < offset <= len(event.token_ids) and offset % event.block_size == 0:
                return offset // event.block_size - 1
        return None

    def _position(self, parent: int | None) -> tuple[object, int] | None:
        if parent is None:
            return ("root", None), 0
        for known in self._domain.names.get(parent, {}).values():
            return self._place_of(known)
        return None

    @staticmethod
    def _place_of(block: Block) -> tuple[object, int]:
        stub = block.top.stub
        return (("root", None) if stub is None else ("stub", stub[1])), block.end

    def _own_chain(self, event: Stored) -> list[Block]:
        """All blocks the event's tokens make at its block size. Empty when their identity is not certain: media may
        lie in blocks that the event does not list."""
        siblings = [b for key in event.engine_keys for b in self._domain.names.get(key, {}).values()]
        if any(extra.mm or extra.embeds is not None for extra in event.extras) or any(map(_has_media, siblings)):
            return []
        if event.parent is None:
            # a salt shows in block 0 only, which may not be listed: the sibling in another group knows it
            lora, salt = siblings[0].namespace if siblings[0].top.stub is None else (event.lora, None)
            block = self._root(event.block_size, lora, salt)
        else:
            block = self._base(event, event.block_size)
        chain = []
        for i in range(len(event.token_ids) // event.block_size):
            tokens = event.token_ids[i * event.block_size : (i + 1) * event.block_size]
            block = self._forest.child(block, local_hash(tokens), NO_EXTRA)
            chain.append(block)
        return chain


def _has_media(block: Block) -> bool:
    at: Block | None = block
    while at is not None:
        if at.extra.mm or at.extra.embeds is not None:
            return True
        at = at.parent
    return False


def plain_chain(event: Stored, size: int) -> list[tuple[int, Extra]] | None:
    """(local hash, extra) of each block of `size` that a dense event's tokens fill, None where media make it
    uncertain."""
    if size != event.block_size and any(extra.mm or extra.embeds is not None for extra in event.extras):
        return None
    extras = event.extras if size == event.block_size and event.extras else ()
    return [
        (local_hash(event.token_ids[i * size : (i + 1) * size], extra), extra)
        for i in range(len(event.token_ids) // size)
        for extra in (extras[i] if extras else NO_EXTRA,)
    ]
