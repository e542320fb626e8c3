"""How many tokens would the engine itself find cached? The rules that reproduce vLLM's answer, stated plainly.

Everything here is a pure function over "does this endpoint hold block i of group g", so that the rules can be read
beside vLLM's `find_longest_cache_hit` (v1/core/kv_cache_coordinator.py) and are shared by nothing that could hide a
bug: the native index has its own copy, held equal by tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvindex.events.model import Kind


class Group(NamedTuple):
    """One KV-cache group as learnt from events. `sizes` are all block sizes seen in its HBM events, partial entries
    included; `block_size` is the largest of them. `window` in tokens, for WINDOW groups."""

    number: int
    kind: Kind
    block_size: int
    window: int
    sizes: frozenset[int]


Held = Callable[[int, int, int], bool]
"""held(group number, block size, index): is the block that ends at (index + 1) * block size held?"""


class Alignment(NamedTuple):
    """Hits are multiples of `tokens`. `fine`: a state group's blocks are larger than the hash unit, so that hits may
    end inside a block (vLLM's partial hash hits)."""

    tokens: int
    unit: int
    fine: bool


def alignment(groups: Sequence[Group]) -> Alignment:
    unit = math.gcd(*(size for group in groups for size in group.sizes))
    fine = any(g.kind is Kind.STATE and g.block_size > unit for g in groups) and all(
        g.kind in (Kind.FULL, Kind.STATE) or g.block_size == unit for g in groups
    )
    return Alignment(unit if fine else math.lcm(*(g.block_size for g in groups)), unit, fine)


def leading_blocks(group: Group, limit_tokens: int, held: Held) -> int:
    """Blocks of a full-attention group held without a hole from the start, at most those that end by `limit_tokens`."""
    count = 0
    while (count + 1) * group.block_size <= limit_tokens and held(group.number, group.block_size, count):
        count += 1
    return count


def full_reach(group: Group, limit_tokens: int, align: Alignment, held: Held) -> int:
    """Tokens that a full-attention group covers: whole blocks, and with fine alignment the largest interior boundary
    held in the first missing block."""
    blocks = leading_blocks(group, limit_tokens, held)
    reach = blocks * group.block_size
    if align.fine and group.block_size > align.unit:
        top = min(reach + group.block_size - align.unit, limit_tokens // align.unit * align.unit)
        for boundary in range(top, reach, -align.unit):
            if held(group.number, align.unit, boundary // align.unit - 1):
                return boundary
    return reach


def window_blocks(group: Group) -> int:
    """Blocks a sliding window needs before a hit's end."""
    return max(1, -(-(group.window - 1) // group.block_size))


def window_valid(group: Group, length: int, held: Held, eagle: bool) -> bool:
    end = length // group.block_size + eagle
    start = max(0, end - window_blocks(group) - eagle)
    return all(held(group.number, group.block_size, i) for i in range(start, end))


def state_valid(group: Group, length: int, align: Alignment, held: Held) -> bool:
    """The state at exactly `length`, whether announced as a whole block or as a partial entry."""
    if length % group.block_size == 0 and held(group.number, group.block_size, length // group.block_size - 1):
        return True
    return align.fine and held(group.number, align.unit, length // align.unit - 1)


def usable_tokens(groups: Sequence[Group], prompt_tokens: int, held: Held, eagle: bool = False) -> int:
    """The longest prefix, in tokens, that the engine would take from HBM for a prompt of `prompt_tokens` tokens.

    The last token is always computed, so the answer is below `prompt_tokens`. Validity of a length depends on that
    length alone, so the largest valid one is the answer.
    """
    groups = [g for g in groups if g.kind is not Kind.IGNORED]
    if not groups or prompt_tokens < 1:
        return 0
    align = alignment(groups)
    limit = prompt_tokens - 1
    margin = max(g.block_size for g in groups) if eagle else 0
    if eagle:  # one more block must be matched, then is given up; with several groups it may be the prompt's last
        whole = prompt_tokens if len(groups) > 1 else limit
        limit = min(limit, whole // align.unit * align.unit - margin)
    reach = min(
        (full_reach(g, limit + margin, align, held) - margin for g in groups if g.kind is Kind.FULL), default=limit
    )
    for length in range(min(limit, reach) // align.tokens * align.tokens, 0, -align.tokens):
        if all(
            window_valid(g, length, held, eagle) if g.kind is Kind.WINDOW else state_valid(g, length, align, held)
            for g in groups
            if g.kind is not Kind.FULL
        ):
            return length
    return 0


def extend_from_lower_tiers(
    groups: Sequence[Group], prompt_tokens: int, start: int, held: Held, chunk_tokens: int | None
) -> int:
    """How far the engine's own lower tiers carry on from `start` tokens found in HBM: for full attention every block of
    [start, L), for a window the chunks that cover it, for a state group the state at L. `held` asks the lower tiers
    only. `chunk_tokens` None: a chunk is a block.
    """
    groups = [g for g in groups if g.kind is not Kind.IGNORED]
    if not groups:
        return start
    step = math.lcm(chunk_tokens or 1, *(g.block_size for g in groups))
    best = (prompt_tokens - 1) // step * step
    for length in range(best, start, -step):
        if all(_lower_valid(g, start, length, held, chunk_tokens or g.block_size) for g in groups):
            return length
    return start


def _lower_valid(group: Group, start: int, length: int, held: Held, chunk: int) -> bool:
    size = group.block_size
    if group.kind is Kind.FULL:
        first = start // size
    elif group.kind is Kind.WINDOW:
        first = max(0, length - -(-group.window // chunk) * chunk) // size
    else:
        first = length // size - 1
    return all(held(group.number, size, i) for i in range(first, length // size))
