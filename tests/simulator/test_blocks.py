"""The block pool against a list that is obviously right, and the rules of vLLM's cache one by one."""

from __future__ import annotations

import random

import pytest

from kvindex.errors import IntegrityError
from kvindex.simulator.blocks import BlockPool


class ListPool:
    """The same rules with one plain list as the free queue and linear searches."""

    def __init__(self, num_blocks: int) -> None:
        self.free = list(range(1, num_blocks))
        self.references = dict.fromkeys(self.free, 0)
        self.keys: dict[int, int] = {}  # block -> key, in the order of storing

    def lookup(self, keys: list[int]) -> list[int]:
        hit: list[int] = []
        for key in keys:
            holders = [block for block, held in self.keys.items() if held == key]
            if not holders:
                break
            hit.append(holders[0])
        return hit

    def hold(self, blocks: list[int]) -> None:
        for block in blocks:
            if self.references[block] == 0:
                self.free.remove(block)
            self.references[block] += 1

    def allocate(self, count: int) -> tuple[list[int], list[int]]:
        taken, self.free = self.free[:count], self.free[count:]
        for block in taken:
            self.references[block] = 1
        return taken, [self.keys.pop(block) for block in taken if block in self.keys]

    def store(self, block: int, key: int) -> None:
        self.keys[block] = key

    def release(self, blocks: list[int]) -> None:
        freed = []
        for block in blocks:
            self.references[block] -= 1
            if self.references[block] == 0:
                freed.append(block)
        plain = [block for block in freed if block not in self.keys]
        cached = [block for block in freed if block in self.keys]
        self.free = plain + self.free + cached

    def clear(self) -> bool:
        if any(self.references.values()):
            return False
        self.keys.clear()
        return True


@pytest.mark.parametrize("seed", range(8))
def test_random_actions_agree_with_a_plain_list(seed: int) -> None:
    print(f"seed {seed}")
    random_ = random.Random(seed)
    num_blocks = random_.choice([2, 5, 17, 40])
    pool, oracle = BlockPool(num_blocks), ListPool(num_blocks)
    held: list[list[int]] = []
    for _ in range(600):
        action = random_.choices(["request", "release", "clear"], [6, 5, 1])[0]
        if action == "request":
            # A chain of keys out of few: repeats, shared heads and second copies all occur.
            keys = [random_.randrange(3) * 1000 + depth for depth in range(random_.randrange(1, 8))]
            hit = pool.lookup(keys)
            assert hit == oracle.lookup(keys)
            hit = hit[: random_.randrange(len(hit) + 1)]
            idle = pool.idle(hit)
            new = len(keys) - len(hit)
            if new + idle > pool.free_blocks:
                continue
            pool.hold(hit)
            oracle.hold(hit)
            taken = pool.allocate(new)
            assert taken == oracle.allocate(new)
            full = random_.randrange(new + 1)
            for block, key in zip(taken[0][:full], keys[len(hit) :], strict=False):
                pool.store(block, key)
                oracle.store(block, key)
            held.append(hit + taken[0])
        elif action == "release" and held:
            blocks = held.pop(random_.randrange(len(held)))[::-1]
            pool.release(blocks)
            oracle.release(blocks)
        elif action == "clear":
            assert pool.clear() == oracle.clear()
        pool.check()
        assert pool.free_blocks == len(oracle.free)
        assert pool.cached_keys == len(set(oracle.keys.values()))


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(5)
    blocks, _ = pool.allocate(4)
    assert sorted(blocks) == [1, 2, 3, 4]
    assert pool.free_blocks == 0
    assert pool.usage == 1.0
    with pytest.raises(IntegrityError, match="1 blocks asked, 0 are free"):
        pool.allocate(1)


def test_content_stays_until_its_block_is_taken_again_tail_first() -> None:
    pool = BlockPool(5)
    blocks, _ = pool.allocate(3)
    for key, block in enumerate(blocks):
        pool.store(block, key)
    pool.release(reversed(blocks))
    assert pool.lookup([0, 1, 2]) == blocks
    assert pool.allocate(1)[1] == []  # the one that never had content
    assert pool.allocate(1)[1] == [2]
    assert pool.allocate(2)[1] == [1, 0]


def test_a_hit_takes_a_block_out_of_the_queue() -> None:
    pool = BlockPool(4)
    blocks, _ = pool.allocate(3)
    for key, block in enumerate(blocks):
        pool.store(block, key)
    pool.release(reversed(blocks))
    pool.hold(blocks[:1])
    assert pool.free_blocks == 2
    assert pool.allocate(2)[1] == [2, 1]
    assert pool.lookup([0]) == blocks[:1]


def test_a_second_copy_keeps_the_key_alive() -> None:
    pool = BlockPool(3)
    (first, second), _ = pool.allocate(2)
    pool.store(first, 7)
    pool.store(second, 7)
    pool.release([first])
    pool.release([second])
    assert pool.lookup([7]) == [first]
    assert pool.allocate(1) == ([first], [7])
    assert pool.lookup([7]) == [second]
    pool.check()


def test_a_pool_in_use_is_not_cleared() -> None:
    pool = BlockPool(4)
    blocks, _ = pool.allocate(1)
    pool.store(blocks[0], 1)
    assert not pool.clear()
    pool.release(blocks)
    assert pool.clear()
    assert pool.lookup([1]) == []
