"""`Index` around a block index: sequence numbers, gaps, replays, restarts, names. Runs on every implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvindex import Index
from kvindex.errors import UsageError
from kvindex.index.config import IndexConfig, PublisherOverride
from tests.events.wire import CLEARED, batch, removed, stored

SOURCE = "tcp://127.0.0.1:5557"
TOPIC = b"kv@pod-1@m"
TOKENS = list(range(100, 112))  # three blocks of four


@pytest.fixture(params=[True, False], ids=["reference", "native"])
def make(request: pytest.FixtureRequest) -> Callable[..., Index]:
    def build(**settings: Any) -> Index:
        return Index(reference=request.param, config=IndexConfig(**settings))

    return build


@pytest.fixture
def index(make: Callable[..., Index]) -> Index:
    return make()


def send(index: Index, number: int, *events: Any, replay: bool = False, topic: bytes = TOPIC, **more: Any) -> str:
    frames = [topic, number.to_bytes(8, "big"), batch(*events, **more)]
    return index.ingest(SOURCE, [b"", *frames] if replay else frames, replay=replay).status


def tokens(index: Index, endpoint: str = "pod-1", prompt: list[int] | None = None) -> int:
    row = index.score([*(prompt or TOKENS), 1], model="m").of(endpoint)
    index.check()
    return row.tokens if row else 0


def state(index: Index) -> str:
    return index.publishers()[0].state


WHOLE = stored([1, 2, 3], TOKENS)


def test_the_next_score_sees_a_message(index: Index) -> None:
    assert send(index, 0, WHOLE) == "applied"
    row = index.score([*TOKENS, 1], model="m").of("pod-1")
    assert row is not None
    assert (row.blocks, row.tokens, row.score, row.tiers, row.state) == (3, 12, 3.0, {"hbm": 3}, "live")
    assert row.seconds_saved == pytest.approx(12 / 8000)


def test_the_last_token_is_always_computed(index: Index) -> None:
    send(index, 0, WHOLE)
    row = index.score(TOKENS, model="m").of("pod-1")
    assert row is not None
    assert (row.blocks, row.tokens) == (3, 8)


def test_a_stream_joined_in_the_middle_is_neither_gap_nor_restart(index: Index) -> None:
    assert send(index, 500, WHOLE) == "applied"
    status = index.publishers()[0]
    assert (status.state, status.gaps, status.incarnation, status.last_sequence) == ("live", 0, 0, 500)


def test_the_same_message_twice_counts_once(index: Index) -> None:
    send(index, 0, WHOLE)
    assert send(index, 0, WHOLE) == "duplicate"
    send(index, 1, removed([3]))
    assert tokens(index) == 8


def test_the_same_number_with_another_payload_is_a_restart(index: Index) -> None:
    send(index, 0, WHOLE)
    assert send(index, 0, stored([9], [7, 7, 7, 7])) == "restart"
    assert tokens(index) == 0
    assert tokens(index, prompt=[7, 7, 7, 7]) == 4
    assert index.publishers()[0].incarnation == 1


def test_a_number_that_goes_back_is_a_restart(index: Index) -> None:
    for number in range(3):
        send(index, number, WHOLE if number == 0 else stored([40 + number], [number] * 4))
    assert send(index, 0, stored([9], [7, 7, 7, 7])) == "restart"
    assert tokens(index) == 0
    assert index.publishers()[0].restarts == 1


def test_a_gap_is_marked_and_what_is_known_kept(index: Index) -> None:
    send(index, 0, WHOLE)
    assert send(index, 5, stored([9], [7, 7, 7, 7])) == "gap"
    status = index.publishers()[0]
    assert (status.state, status.gaps, status.missing) == ("gap", 1, 4)
    assert tokens(index) == 12


def test_a_replay_fills_a_gap(index: Index) -> None:
    send(index, 0, stored([1], TOKENS[:4]))
    send(index, 3, stored([3], TOKENS[8:], parent_block_hash=2))
    assert tokens(index) == 4
    index.replay_begun(SOURCE)
    assert state(index) == "replaying"
    assert send(index, 0, stored([1], TOKENS[:4]), replay=True) == "duplicate"
    assert send(index, 1, stored([8], [7, 7, 7, 7]), replay=True) == "filled"
    assert send(index, 2, stored([2], TOKENS[4:8], parent_block_hash=1), replay=True) == "filled"
    index.replay_ended(SOURCE, complete=True)
    assert (tokens(index), state(index)) == (12, "live")


def test_a_late_store_does_not_bring_back_what_a_later_message_removed(index: Index) -> None:
    send(index, 0, stored([1], TOKENS[:4]))
    send(index, 2, removed([2]))
    send(index, 1, stored([2], TOKENS[4:8], parent_block_hash=1), replay=True)
    assert tokens(index) == 4


def test_a_late_store_does_not_survive_a_later_reset(index: Index) -> None:
    send(index, 0, stored([9], [7, 7, 7, 7]))
    send(index, 2, CLEARED)
    send(index, 1, WHOLE, replay=True)
    assert tokens(index) == 0


def test_what_cannot_be_replayed_fences_the_publisher_until_it_speaks_again(index: Index) -> None:
    send(index, 0, WHOLE)
    send(index, 5, stored([9], [7, 7, 7, 7]))
    index.replay_begun(SOURCE)
    index.replay_ended(SOURCE, complete=False)
    assert (state(index), tokens(index)) == ("fenced", 0)
    send(index, 6, stored([4], [5, 5, 5, 5]))
    assert (state(index), tokens(index), tokens(index, prompt=[5, 5, 5, 5])) == ("live", 0, 4)


def test_lost_messages_may_be_kept_by_config(make: Callable[..., Index]) -> None:
    index = make(on_lost_messages="keep")
    send(index, 0, WHOLE)
    send(index, 5, stored([9], [7, 7, 7, 7]))
    index.replay_ended(SOURCE, complete=False)
    assert (state(index), tokens(index)) == ("gap", 12)


def test_after_a_fence_children_still_attach(index: Index) -> None:
    send(index, 0, WHOLE)
    index.fence(SOURCE)
    send(index, 1, stored([1, 2], TOKENS[:8]))
    send(index, 2, stored([3], TOKENS[8:], parent_block_hash=2))
    assert tokens(index) == 12


def test_another_process_by_other_evidence(index: Index) -> None:
    send(index, 4, WHOLE)
    index.restarted(SOURCE)
    assert tokens(index) == 0
    assert send(index, 0, WHOLE) == "applied"
    assert index.publishers()[0].incarnation == 1


def test_a_suspect_endpoint_is_absent_until_its_next_message(index: Index) -> None:
    send(index, 0, WHOLE)
    index.mark_suspect("pod-1")
    assert (tokens(index), state(index)) == (0, "suspect")


def test_a_closed_publisher_is_forgotten(index: Index) -> None:
    send(index, 0, WHOLE)
    assert index.close_publisher(SOURCE) == 1
    assert index.publishers() == []
    assert tokens(index) == 0


def test_ranks_are_endpoints_of_their_own(index: Index) -> None:
    send(index, 0, WHOLE, rank=0)
    send(index, 0, WHOLE, rank=1)
    send(index, 1, removed([3]), rank=1)
    assert (tokens(index, "pod-1"), tokens(index, "pod-1:dp1")) == (12, 8)


@pytest.mark.parametrize(
    ("topic", "endpoint", "model"),
    [
        (b"kv@pod-1@m", "pod-1", "m"),
        (b"kv@10.0.0.1:8000@org/m@v2", "10.0.0.1:8000", "org/m@v2"),
        (b"anything", "anything", None),
        (b"", SOURCE, None),
    ],
)
def test_names_come_from_the_topic(index: Index, topic: bytes, endpoint: str, model: str | None) -> None:
    send(index, 0, WHOLE, topic=topic)
    status = index.publishers()[0]
    assert (status.endpoint, status.model) == (endpoint, model)


def test_config_names_a_publisher(make: Callable[..., Index]) -> None:
    index = make(publishers=(PublisherOverride(SOURCE, endpoint="a", model="x"),))
    send(index, 0, WHOLE)
    assert index.score([*TOKENS, 1], model="x").endpoints == ["a"]
    assert index.score([*TOKENS, 1], model="m").endpoints == []


def test_an_undecodable_payload_is_skipped_and_the_stream_goes_on(index: Index) -> None:
    send(index, 0, WHOLE)
    result = index.ingest(SOURCE, [TOPIC, (1).to_bytes(8, "big"), b"\xc1"])
    assert result.status == "skipped"
    assert result.skipped
    assert send(index, 2, removed([3])) == "applied"
    assert (tokens(index), index.publishers()[0].gaps, index.publishers()[0].skipped) == (8, 0, 1)


def test_publishers_are_bounded(make: Callable[..., Index]) -> None:
    index = make(max_publishers=2)
    statuses = [send(index, 0, WHOLE, topic=f"kv@pod-{i}@m".encode()) for i in range(3)]
    assert statuses == ["applied", "applied", "skipped"]


def test_one_source_cannot_take_all(make: Callable[..., Index]) -> None:
    index = make(max_publishers=10, max_publishers_per_source=2)
    statuses = [send(index, 0, WHOLE, rank=rank) for rank in range(3)]
    other = index.ingest("tcp://127.0.0.1:9", [TOPIC, bytes(8), batch(WHOLE)]).status
    assert [*statuses, other] == ["applied", "applied", "skipped", "applied"]


@pytest.mark.parametrize("frames", [[], [b"only"], ["text", b"", b""], b"raw"])
def test_a_wrong_call_is_an_error_of_ours(index: Index, frames: Any) -> None:
    with pytest.raises(UsageError):
        index.ingest(SOURCE, frames)


@pytest.mark.parametrize("wrong", [[1.5], [-1], [1 << 32], ["a"], [[1, 2]]])
def test_wrong_token_ids_are_an_error_of_ours(index: Index, wrong: Any) -> None:
    with pytest.raises(UsageError):
        index.score(wrong)


def test_hash_once_ask_often(index: Index) -> None:
    send(index, 0, WHOLE)
    keys = index.keys(np.array([*TOKENS, 1], np.uint32))
    assert index.score_keys(keys, "m").tokens.tolist() == [12]
    send(index, 1, removed([3]))
    assert index.score_keys(keys, "m").tokens.tolist() == [8]
    assert index.score_keys(keys, "m", endpoints=["other"]).endpoints == []


def test_keys_made_before_a_block_size_was_known_still_score(index: Index) -> None:
    keys = index.keys([*TOKENS, 1])
    send(index, 0, WHOLE)
    assert index.score_keys(keys, "m").tokens.tolist() == [12]


def test_explain_says_why(index: Index) -> None:
    send(index, 0, stored([1, 2], TOKENS[:8]))
    send(index, 7, removed([2]))
    views = index.explain([*TOKENS, 1], model="m")
    said = [(v.holders[0].status, v.holders[0].tier, v.holders[0].sequence) for v in views]
    assert said == [("held", "hbm", 0), ("removed", None, 7), ("never_stored", None, None)]
    index.fence(SOURCE)
    assert [v.holders[0].status for v in index.explain(TOKENS, model="m")] == ["fenced", "fenced", "never_stored"]


def test_explain_knows_other_namespaces(index: Index) -> None:
    send(index, 0, stored([1], TOKENS[:4], extra_keys=[["tenant"]]))
    assert tokens(index) == 0
    assert index.explain(TOKENS[:4], model="m")[0].known_in == ("cache_salt=tenant",)
