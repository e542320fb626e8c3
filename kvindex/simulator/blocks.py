"""The paged block pool: which physical blocks are free, which hold a full block of a prefix, and what is evicted next.

It reproduces the order of vLLM's pool. One queue holds every free block; blocks are taken from its front. A block that
holds cached content keeps it while it waits in the queue and loses it only when it is taken. Freed cached blocks go to
the back, freed blocks without content to the front.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from kvindex.errors import IntegrityError


class BlockPool:
    """Physical block ids 1..num_blocks-1 (0 is the null block, never handed out) and the engine keys they hold.

    A key may be held by several blocks: a request that has to recompute a block which is cached already fills a block
    of its own and both stay. The first one is used for hits.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._references = [0] * num_blocks
        self._key_of: list[int | None] = [None] * num_blocks
        self._blocks_of: dict[int, list[int]] = {}

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def cached_keys(self) -> int:
        return len(self._blocks_of)

    @property
    def usage(self) -> float:
        return 1.0 - len(self._free) / (self.num_blocks - 1)

    def lookup(self, keys: Iterable[int]) -> list[int]:
        """The blocks that hold the longest leading run of `keys`."""
        hit: list[int] = []
        find = self._blocks_of.get
        for key in keys:
            blocks = find(key)
            if blocks is None:
                break
            hit.append(blocks[0])
        return hit

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are in the free queue, and so are used up by holding them."""
        references = self._references
        return sum(1 for block in blocks if references[block] == 0)

    def hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, count: int) -> tuple[list[int], list[int]]:
        """Take `count` blocks from the front of the queue; also returns the keys lost with them, in eviction order."""
        if count > len(self._free):
            raise IntegrityError(f"{count} blocks asked, {len(self._free)} are free")
        take, key_of, references = self._free.popitem, self._key_of, self._references
        taken = [take(last=False)[0] for _ in range(count)]
        evicted: list[int] = []
        for block in taken:
            references[block] = 1
            key = key_of[block]
            if key is not None:
                self._forget(block, key)
                evicted.append(key)
        return taken, evicted

    def store(self, block: int, key: int) -> None:
        """`block` now holds the full block called `key`."""
        if self._key_of[block] is not None:
            raise IntegrityError(f"block {block} already holds a key")
        self._key_of[block] = key
        blocks = self._blocks_of.get(key)
        if blocks is None:
            self._blocks_of[key] = [block]
        else:
            blocks.append(block)

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one reference to each of `blocks`, given in the order in which they should be evicted."""
        without_key: list[int] = []
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            if self._key_of[block] is None:
                without_key.append(block)
            else:
                self._free[block] = None
        for block in reversed(without_key):
            self._free[block] = None
            self._free.move_to_end(block, last=False)

    def clear(self) -> bool:
        """Forget all cached content; False, and nothing is done, while any block is in use."""
        if len(self._free) != self.num_blocks - 1:
            return False
        self._blocks_of.clear()
        self._key_of = [None] * self.num_blocks
        return True

    def _forget(self, block: int, key: int) -> None:
        self._key_of[block] = None
        blocks = self._blocks_of[key]
        if len(blocks) == 1:
            del self._blocks_of[key]
        else:
            blocks.remove(block)

    def check(self) -> None:
        """Audit the whole pool; raises IntegrityError."""
        for block in range(1, self.num_blocks):
            if (self._references[block] == 0) != (block in self._free):
                raise IntegrityError(f"block {block}: {self._references[block]} references, free={block in self._free}")
            key = self._key_of[block]
            if key is not None and block not in self._blocks_of.get(key, ()):
                raise IntegrityError(f"block {block} holds {key:#x}, which does not list it")
        if 0 in self._free or self._key_of[0] is not None:
            raise IntegrityError("the null block is in use")
        listed = sum(len(blocks) for blocks in self._blocks_of.values())
        held = sum(key is not None for key in self._key_of)
        if listed != held:
            raise IntegrityError(f"{listed} blocks listed under keys, {held} hold one")
