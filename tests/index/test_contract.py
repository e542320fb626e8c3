"""What every block index promises, rule by rule (docs: truth rules). Each test fails when its rule is broken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvindex.events.model import Cleared, EventBatch, Extra, Kind, MultiModal, Removed, Skip, Stored
from kvindex.index.protocol import BlockIndex, MultiModalItem, Namespace, Publisher
from tests.index.conftest import Make

PROMPT = list(range(100, 117))  # four blocks of 4 and the token that is always computed


def publisher(endpoint: str = "a", **how: Any) -> Publisher:
    return Publisher(endpoint=endpoint, **how)


def stored(keys: list[int], tokens: list[int], parent: int | None = None, size: int = 4, **how: Any) -> Stored:
    return Stored(tuple(keys), parent, np.array(tokens, np.uint32), size, **how)


def tell(index: BlockIndex, number: int, *events: Any, at: int = 0) -> Any:
    applied = index.apply(number, EventBatch(0.0, events), at)
    index.check()
    return applied


def ask(index: BlockIndex, tokens: list[int] = PROMPT, model: str | None = None, **namespace: Any) -> dict[str, tuple]:
    """endpoint -> (blocks, tokens)"""
    columns = index.score(index.keys(np.array(tokens, np.uint32), Namespace(**namespace)), model, None)
    return dict(zip(columns.endpoints, zip(columns.blocks.tolist(), columns.tokens.tolist(), strict=True), strict=True))


def columns(index: BlockIndex, tokens: list[int] = PROMPT) -> Any:
    return index.score(index.keys(np.array(tokens, np.uint32), Namespace()), None, None)


def full(index: BlockIndex, number: int, blocks: int = 4, first_key: int = 1, **how: Any) -> None:
    tell(index, number, stored(list(range(first_key, first_key + blocks)), PROMPT[: 4 * blocks], **how))


# ---------------------------------------------------------------------- blocks and chains


def test_the_last_token_is_never_found_cached(index: BlockIndex) -> None:
    full(index, index.open(publisher()))
    assert ask(index) == {"a": (4, 16)}
    assert ask(index, PROMPT[:16]) == {"a": (4, 12)}


def test_an_orphan_waits_for_its_parent(index: BlockIndex) -> None:
    number = index.open(publisher())
    assert tell(index, number, stored([3, 4], PROMPT[8:16], parent=2)).orphans == 2
    assert ask(index) == {}
    assert index.stats()["orphans"] == 2
    tell(index, number, stored([1, 2], PROMPT[:8]))
    assert ask(index) == {"a": (4, 16)}
    assert index.stats()["orphans"] == 0


def test_orphans_of_a_hostile_block_that_names_its_own_parent(index: BlockIndex) -> None:
    a, b = index.open(publisher()), index.open(publisher("b"))
    tell(index, a, stored([7], PROMPT[:4], parent=7), stored([1], PROMPT[:4]))
    tell(index, b, stored([7], PROMPT[:4], parent=7), stored([1], PROMPT[:4]))
    assert ask(index)["b"] == (1, 4)


def test_a_child_attaches_to_a_parent_that_is_evicted(index: BlockIndex) -> None:
    number = index.open(publisher())
    full(index, number, 2)
    tell(index, number, Removed((1, 2)))
    tell(index, number, stored([3], PROMPT[8:12], parent=2))
    tell(index, number, stored([1, 2], PROMPT[:8]))
    assert ask(index) == {"a": (3, 12)}


def test_forgetting_is_bounded(make: Make) -> None:
    index = make(None, 3)
    number = index.open(publisher())
    for i in range(20):
        tell(index, number, stored([i], [i] * 4), Removed((i,)))
    assert index.stats()["forgotten"] <= 3


@pytest.mark.parametrize("blocks", [50_000])
def test_a_very_long_chain_of_orphans_attaches(index: BlockIndex, blocks: int) -> None:
    number = index.open(publisher())
    tokens = [i % 7 for i in range(blocks)]
    index.apply(number, EventBatch(0.0, (stored(list(range(2, blocks + 1)), tokens[1:], parent=1, size=1),)))
    index.apply(number, EventBatch(0.0, (stored([1], tokens[:1], size=1),)))
    assert ask(index, tokens) == {"a": (blocks, blocks - 1)}


# ---------------------------------------------------------------------- counting


def test_hbm_copies_are_counted(index: BlockIndex) -> None:
    number = index.open(publisher())
    tell(index, number, stored([1], PROMPT[:4]), stored([2], PROMPT[4:8], parent=1))
    tell(index, number, stored([2], PROMPT[4:8], parent=1))
    tell(index, number, Removed((2,)))
    assert ask(index) == {"a": (2, 8)}
    tell(index, number, Removed((2,)))
    assert ask(index) == {"a": (1, 4)}


def test_below_hbm_there_are_claims(index: BlockIndex) -> None:
    number = index.open(publisher())
    for _ in range(3):
        tell(index, number, stored([1], PROMPT[:4], tier="dram"))
    assert tell(index, number, Removed((1,), "dram")).removed == 1
    assert ask(index) == {}


def test_a_removal_of_what_is_not_held_counts_nothing(index: BlockIndex) -> None:
    number = index.open(publisher())
    full(index, number, 1)
    assert tell(index, number, Removed((1,), "dram"), Removed((1,), "hbm", 5), Removed((99,))).removed == 0
    assert ask(index) == {"a": (1, 4)}


def test_ranks_are_apart(index: BlockIndex) -> None:
    zero, one = index.open(publisher("a")), index.open(publisher("a:dp1"))
    full(index, zero)
    full(index, one)
    tell(index, one, Removed((1,)))
    assert ask(index) == {"a": (4, 16)}


# ---------------------------------------------------------------------- key domains


def test_engine_keys_are_apart_by_domain(index: BlockIndex) -> None:
    a, b = index.open(publisher(key_domain="x")), index.open(publisher("b", key_domain="y"))
    full(index, a, 1)
    tell(index, b, stored([1], [9, 9, 9, 9]))
    tell(index, b, stored([2], PROMPT[4:8], parent=1))
    assert ask(index) == {"a": (1, 4)}
    assert ask(index, [9, 9, 9, 9, *PROMPT[4:8], 0]) == {"b": (2, 8)}


def test_a_domain_is_learnt_from_a_key_in_common(index: BlockIndex) -> None:
    a, b = index.open(publisher()), index.open(publisher("b"))
    full(index, a, 3)
    tell(index, b, stored([1], PROMPT[:4]))
    tell(index, b, stored([4], PROMPT[12:16], parent=3))  # only a has said what 3 is
    tell(index, b, stored([2], PROMPT[4:8], parent=1), stored([3], PROMPT[8:12], parent=2))
    assert ask(index)["b"] == (4, 16)
    tell(index, b, Removed((3,)))
    tell(index, b, stored([5], [1, 2, 3, 4], parent=3))
    assert index.stats()["orphans"] == 0


def test_other_keys_for_the_same_block_keep_domains_apart(index: BlockIndex) -> None:
    a, b = index.open(publisher()), index.open(publisher("b"))
    full(index, a, 3)
    tell(index, b, stored([11], PROMPT[:4]))
    tell(index, b, stored([12], PROMPT[12:16], parent=3))
    assert index.stats()["orphans"] == 1  # 3 means nothing in b's domain
    assert ask(index)["b"] == (1, 4)


# ---------------------------------------------------------------------- restart, fence, clear


def test_a_restart_drops_all_but_persistent_tiers(index: BlockIndex) -> None:
    number = index.open(publisher(persistent_tiers=frozenset(["filesystem"])))
    full(index, number)
    full(index, number, tier="dram")
    full(index, number, 2, tier="filesystem")
    index.drop(number, restart=True)
    index.check()
    assert index.groups(number) == []
    tell(index, number, stored([90], [5, 5, 5, 5]))
    assert ask(index) == {"a": (2, 8)}
    assert {tier: n.tolist() for tier, n in columns(index).tiers.items()} == {"filesystem": [2]}


def test_a_restart_forgets_what_keys_meant(index: BlockIndex) -> None:
    number = index.open(publisher())
    full(index, number, 1)
    tell(index, number, stored([50], PROMPT[:4], parent=49))
    index.drop(number, restart=True)
    assert index.stats()["orphans"] == 0
    tell(index, number, stored([2], PROMPT[4:8], parent=1))
    assert index.stats()["orphans"] == 1


def test_a_fence_remembers_names(index: BlockIndex) -> None:
    number = index.open(publisher(persistent_tiers=frozenset(["dram"])))
    full(index, number, 2)
    full(index, number, 2, tier="dram")
    index.drop(number, restart=False)
    index.check()
    assert ask(index) == {}
    assert index.stats()["entries"] == 0
    assert tell(index, number, stored([3], PROMPT[8:12], parent=2)).orphans == 0
    tell(index, number, stored([1, 2], PROMPT[:8]))
    assert ask(index) == {"a": (3, 12)}


def test_cleared_empties_hbm_only(index: BlockIndex) -> None:
    number = index.open(publisher())
    full(index, number)
    full(index, number, 2, tier="dram")
    assert tell(index, number, Cleared()).cleared == 4
    assert ask(index) == {"a": (2, 8)}
    assert columns(index).hbm_tokens.tolist() == [0]


def test_a_closed_publisher_leaves_nothing(index: BlockIndex) -> None:
    number = index.open(publisher())
    full(index, number)
    index.close(number)
    index.check()
    assert ask(index) == {}
    assert index.stats()["publishers"] == 0
    assert index.open(publisher()) != number


def test_hidden_publishers_are_absent(index: BlockIndex) -> None:
    number = index.open(publisher())
    full(index, number)
    index.hide(number, True)
    assert ask(index) == {}
    index.hide(number, False)
    assert ask(index) == {"a": (4, 16)}


# ---------------------------------------------------------------------- groups


def test_a_window_needs_its_trailing_blocks_only(index: BlockIndex) -> None:
    number = index.open(publisher())
    window = {"group": 1, "kind": Kind.WINDOW, "window": 5}  # ceil(4 / 4) = 1 block
    tell(index, number, stored([1, 2, 3, 4], PROMPT[:16]), stored([3], PROMPT[:16], **window))
    assert ask(index) == {"a": (4, 12)}  # nothing of the window at 16, block 3 of it at 12


def test_sparse_window_keys_left_over_run_backwards(index: BlockIndex) -> None:
    number = index.open(publisher())
    window = {"group": 1, "kind": Kind.WINDOW, "window": 9, "size": 2}  # four blocks of 2
    sparse = stored([20, 2, 30, 4], PROMPT[:16], **window)
    applied = tell(index, number, sparse, stored([1, 2, 3, 4], PROMPT[:16]))  # the window's event came first
    assert applied.unplaced == 0
    assert ask(index) == {"a": (4, 0)}
    tell(index, number, stored([40, 3], PROMPT[:12], **window))
    assert ask(index)["a"][1] == 16  # 2-blocks 4..7 end at 10, 12, 14, 16


def test_sparse_keys_without_an_anchor_are_credited_to_nothing(index: BlockIndex) -> None:
    number = index.open(publisher())
    assert tell(index, number, stored([7, 8], PROMPT[:16], kind=Kind.WINDOW, window=5)).unplaced == 2
    assert ask(index) == {}


def test_a_state_is_needed_at_exactly_the_end(index: BlockIndex) -> None:
    number = index.open(publisher())
    state = {"group": 1, "kind": Kind.STATE, "size": 4}
    tell(index, number, stored([1, 2, 3, 4], PROMPT[:16]), stored([2], PROMPT[:8], **state))
    assert ask(index) == {"a": (4, 8)}


def test_hits_are_multiples_of_all_block_sizes(index: BlockIndex) -> None:
    number = index.open(publisher())
    tell(index, number, stored([1, 2, 3, 4], PROMPT[:16]), stored([10], PROMPT[:12], size=12, group=1))
    assert ask(index) == {"a": (3, 12)}
    assert ask(index, PROMPT[:12]) == {"a": (3, 0)}


def test_fine_grained_states_end_inside_a_block(index: BlockIndex) -> None:
    number = index.open(publisher())
    state = {"group": 1, "kind": Kind.STATE}
    tell(index, number, stored([1, 2, 3, 4], PROMPT[:16]), stored([2, 4], PROMPT[:16], size=8, **state))
    assert ask(index, PROMPT[:14]) == {"a": (3, 8)}
    tell(index, number, stored([3], PROMPT[8:12], parent=2, **state))  # a partial entry of 4
    assert ask(index, PROMPT[:14]) == {"a": (3, 12)}


def test_ignored_groups_take_no_part(index: BlockIndex) -> None:
    number = index.open(publisher())
    full(index, number)
    tell(index, number, stored([77], [1] * 12, size=12, group=1, kind=Kind.IGNORED))
    assert ask(index) == {"a": (4, 16)}


def test_eagle_gives_up_its_last_block(index: BlockIndex) -> None:
    full(index, index.open(publisher(eagle=True)))
    assert ask(index) == {"a": (4, 12)}


def test_block_sizes_side_by_side(index: BlockIndex) -> None:
    a, b = index.open(publisher()), index.open(publisher("b"))
    full(index, a)
    tell(index, b, stored([1, 2], PROMPT[:16], size=8))
    assert ask(index) == {"a": (4, 16), "b": (2, 16)}
    assert ask(index, PROMPT[:15]) == {"a": (3, 12), "b": (1, 8)}


def test_absurd_block_sizes_do_not_overflow(index: BlockIndex) -> None:
    number = index.open(publisher())
    for group, size in enumerate([65449, 65479, 65497, 65519, 65521]):
        tell(index, number, stored([group], [1] * size, size=size, group=group))
    assert ask(index, [1] * 70_000)["a"] == (1, 0)


# ---------------------------------------------------------------------- tiers


def test_lower_tiers_carry_on_from_hbm(index: BlockIndex) -> None:
    number = index.open(publisher())
    full(index, number, 2)
    full(index, number, 4, tier="dram")
    got = columns(index)
    assert (got.hbm_tokens.tolist(), got.tokens.tolist()) == ([8], [16])
    assert got.score.tolist() == pytest.approx([1.0 + 1.0 + 0.8 + 0.8])
    assert {t: n.tolist() for t, n in got.tiers.items()} == {"hbm": [2], "dram": [2]}
    assert {t: n.tolist() for t, n in got.load_tokens.items()} == {"dram": [8]}


def test_an_unknown_medium_is_a_tier_of_its_own(index: BlockIndex) -> None:
    number = index.open(publisher())
    full(index, number, 1, tier="tape")
    got = columns(index)
    assert got.hbm_tokens.tolist() == [0]
    assert list(got.tiers) == ["tape"]
    assert got.score.tolist() == pytest.approx([0.3])


def test_a_placeholder_is_credited_by_its_key(index: BlockIndex) -> None:
    number = index.open(publisher())
    full(index, number, 2)
    nothing = np.empty(0, np.uint32)
    assert tell(index, number, Stored((1, 99), None, nothing, 0, tier="dram")).unplaced == 1
    assert len(index.groups(number)) == 1
    tell(index, number, Cleared())
    assert ask(index) == {"a": (1, 4)}


def test_a_chunk_is_credited_whole(index: BlockIndex) -> None:
    number = index.open(publisher(offload_chunk_tokens=8))
    full(index, number)
    tell(index, number, Stored((2, 4), None, np.empty(0, np.uint32), 0, tier="dram"))
    tell(index, number, Cleared())
    assert ask(index) == {"a": (4, 16)}
    tell(index, number, Removed((2,), "dram"))
    assert ask(index) == {}


def test_a_chunk_told_with_tokens_is_credited_whole(index: BlockIndex) -> None:
    number = index.open(publisher())
    full(index, number)
    tell(index, number, stored([2, 4], PROMPT[:16], size=8, tier="dram"), Cleared())
    assert ask(index) == {"a": (4, 16)}


def test_key_identity_wins_over_tokens(index: BlockIndex) -> None:
    number = index.open(publisher())
    tell(index, number, stored([5], PROMPT[:4], extras=(Extra(cache_salt="s"),)))
    tell(index, number, stored([5], PROMPT[:4], tier="dram"))  # offload events carry no salt
    tell(index, number, Cleared())
    assert ask(index) == {}
    assert ask(index, cache_salt="s") == {"a": (1, 4)}


def test_what_hbm_says_replaces_what_an_offload_event_seemed_to_mean(index: BlockIndex) -> None:
    number = index.open(publisher())
    tell(index, number, stored([5], PROMPT[:4], tier="dram"))
    assert ask(index) == {"a": (1, 4)}
    tell(index, number, stored([5], PROMPT[:4], extras=(Extra(cache_salt="s"),)))
    assert ask(index) == {}
    assert ask(index, cache_salt="s") == {"a": (1, 4)}


# ---------------------------------------------------------------------- namespaces and models


def test_namespaces_are_apart(index: BlockIndex) -> None:
    number = index.open(publisher())
    image = Extra(mm=(MultiModal("cat", 1),))
    tell(index, number, stored([1], PROMPT[:4], lora="sql"))
    tell(index, number, stored([2], PROMPT[:4], extras=(Extra(cache_salt="t"),)))
    tell(index, number, stored([3], PROMPT[:4], extras=(image,)))
    assert ask(index) == {}
    assert ask(index, lora="sql") == {"a": (1, 4)}
    assert ask(index, cache_salt="t") == {"a": (1, 4)}
    assert ask(index, cache_salt="sql") == {}
    assert ask(index, mm=(MultiModalItem("cat", 1, 2),)) == {"a": (1, 4)}
    assert ask(index, mm=(MultiModalItem("dog", 1, 2),)) == {}
    assert ask(index, mm=(MultiModalItem("cat", 2, 2),)) == {}


def test_models_are_chosen(index: BlockIndex) -> None:
    for endpoint, model in (("a", "m"), ("b", "n"), ("c", None)):
        full(index, index.open(publisher(endpoint, model=model)))
    assert set(ask(index)) == {"a", "b", "c"}
    assert set(ask(index, model="m")) == {"a", "c"}
    assert set(ask(index, model="unheard of")) == {"c"}


def test_only_the_endpoints_asked_for_answer(index: BlockIndex) -> None:
    for endpoint in "ab":
        full(index, index.open(publisher(endpoint)))
    keys = index.keys(np.array(PROMPT, np.uint32), Namespace())
    assert index.score(keys, None, frozenset("bz")).endpoints == ["b"]


def test_a_block_size_learnt_after_hashing_still_counts(index: BlockIndex) -> None:
    keys = index.keys(np.array(PROMPT, np.uint32), Namespace())
    full(index, index.open(publisher()))
    assert index.score(keys, None, None).blocks.tolist() == [4]


# ---------------------------------------------------------------------- reports of hits, late fills


def test_reported_hits_are_not_counted(index: BlockIndex) -> None:
    number = index.open(publisher())
    full(index, number)
    assert tell(index, number, stored([1, 2, 3, 4], PROMPT[:16])).stored == 0
    tell(index, number, Removed((4,)))
    assert ask(index) == {"a": (3, 12)}


def test_a_doubtful_copy_is_withdrawn_when_reports_are_seen(index: BlockIndex) -> None:
    number = index.open(publisher())
    full(index, number, 1)
    assert tell(index, number, stored([1], PROMPT[:4])).stored == 1  # a prompt of 4 tokens could not have hit it
    tell(index, number, stored([2], PROMPT[4:8], parent=1))
    assert tell(index, number, stored([1, 2], PROMPT[:8])).stored == 0  # surely a report
    tell(index, number, Removed((1,)))
    assert ask(index) == {}


def test_what_is_gone_names_its_block_but_is_not_credited(index: BlockIndex) -> None:
    number = index.open(publisher())
    assert tell(index, number, stored([1, 2], PROMPT[:8], gone=frozenset([2]))).stored == 1
    assert ask(index) == {"a": (1, 4)}
    assert tell(index, number, stored([3], PROMPT[8:12], parent=2)).orphans == 0


# ---------------------------------------------------------------------- hostile input, explain


def test_malformed_events_are_skipped_and_the_rest_applies(index: BlockIndex) -> None:
    number = index.open(publisher())
    bad = [
        stored([8], PROMPT[:5]),
        stored([8, 9, 10], PROMPT[:8]),
        stored([8, 9], PROMPT[:8], extras=(Extra(),)),
        stored([8], PROMPT[:4], size=-4),
    ]
    batch = EventBatch(0.0, (*bad, stored([1], PROMPT[:4])), skipped=(Skip("undecodable", "x"),))
    applied = index.apply(number, batch)
    index.check()
    assert [skip.reason for skip in applied.skipped] == ["undecodable", *["bad_shape"] * 4]
    assert applied.stored == 1
    assert ask(index) == {"a": (1, 4)}


def test_tiers_and_block_sizes_are_bounded(index: BlockIndex) -> None:
    number = index.open(publisher())
    reasons = [
        skip.reason
        for i in range(100)
        for skip in tell(index, number, stored([i], [1] * (i + 1), size=i + 1), Removed((1,), f"tier{i}")).skipped
    ]
    assert reasons.count("too_many_block_sizes") == 36
    assert reasons.count("too_many_tiers") == 85


def test_explain_says_why_not(index: BlockIndex) -> None:
    number = index.open(publisher())
    tell(index, number, stored([1, 2, 3], PROMPT[:12]), at=5)
    tell(index, number, Removed((2,)), at=6)
    tell(index, number, stored([9], PROMPT[:4], lora="sql"), at=7)
    keys = index.keys(np.array(PROMPT, np.uint32), Namespace())

    def said() -> list[tuple[str, int | None]]:
        return [(view.holders[0].status, view.holders[0].sequence) for view in index.explain(keys, None, None)]

    assert said() == [("held", 5), ("removed", 6), ("held", 5), ("never_stored", None)]
    tell(index, number, Cleared(), at=8)
    assert said() == [("cleared", 8), ("removed", 6), ("cleared", 8), ("never_stored", None)]
    index.drop(number, restart=False)
    assert [status for status, _ in said()] == ["fenced", "fenced", "fenced", "never_stored"]
    salted = index.keys(np.array(PROMPT, np.uint32), Namespace(cache_salt="t"))
    assert index.explain(salted, None, None)[0].known_in == ("lora=sql", "none")
