"""Sequence numbers: gaps, replays, duplicates and restarts, one by one and against an obvious model."""

from __future__ import annotations

import random

import pytest

from kvindex.events.sequence import MAX_HOLES, REMEMBERED, Decision, SequenceTracker, Verdict

APPLY, GAP, FILLED, DUPLICATE, RESTART = (
    Decision(verdict) for verdict in (Verdict.APPLY, Verdict.GAP, Verdict.FILLED, Verdict.DUPLICATE, Verdict.RESTART)
)
LAST = (1 << 64) - 1


def after(*numbers: int) -> SequenceTracker:
    """A tracker that took these live messages; a message's digest is its number + 1000."""
    tracker = SequenceTracker()
    for number in numbers:
        tracker.offer(number, (number + 1000) & LAST)
    return tracker


def test_a_stream_joined_in_the_middle_is_neither_gap_nor_restart() -> None:
    tracker = after()
    assert tracker.offer(41, 1) == APPLY
    assert tracker.offer(42, 2) == APPLY
    assert (tracker.incarnation, tracker.holes, tracker.last_sequence) == (0, [], 42)


def test_the_same_number_with_the_same_payload_is_a_duplicate() -> None:
    tracker = after(0, 1, 2)
    for number in (2, 1, 0):
        assert tracker.offer(number, number + 1000) == DUPLICATE
        assert tracker.offer(number, number + 1000, replay=True) == DUPLICATE
    assert tracker.last_sequence == 2


@pytest.mark.parametrize("replay", [False, True])
def test_the_same_number_with_another_payload_is_a_restart_that_overtook(replay: bool) -> None:
    tracker = after(0, 1, 2)
    assert tracker.offer(2, 7, replay) == Decision(Verdict.RESTART, (0, 2))
    assert (tracker.incarnation, tracker.last_sequence, tracker.holes) == (1, 2, [(0, 2)])


def test_an_engine_that_had_sent_one_message_and_restarted() -> None:
    tracker = after(0)
    assert tracker.offer(0, 7) == RESTART
    assert (tracker.incarnation, tracker.holes) == (1, [])
    assert tracker.offer(1, 8) == APPLY


def test_a_number_that_goes_back_is_a_restart() -> None:
    tracker = after(*range(10))
    assert tracker.offer(0, 1) == RESTART
    assert tracker.offer(1, 2) == APPLY
    # What the old incarnation sent is forgotten: its digests must not make the new one's messages duplicates.
    assert tracker.offer(2, 1002) == APPLY
    assert tracker.incarnation == 1


def test_a_restart_whose_first_messages_were_lost() -> None:
    tracker = after(*range(10))
    assert tracker.offer(3, 1) == Decision(Verdict.RESTART, (0, 3))
    assert [tracker.offer(n, n, replay=True) for n in range(4)] == [
        FILLED,
        FILLED,
        FILLED,
        RESTART._replace(missing=(0, 3)),
    ]
    tracker = after(*range(10))
    tracker.offer(3, 3)
    assert [tracker.offer(n, n, replay=True) for n in range(4)] == [FILLED, FILLED, FILLED, DUPLICATE]
    assert tracker.holes == []


def test_a_live_number_inside_a_hole_is_a_restart_too() -> None:
    """ZMQ does not reorder. Taking it for a late message would keep the blocks of a process that is gone."""
    tracker = after(0, 1, 9)
    assert tracker.offer(5, 1005) == Decision(Verdict.RESTART, (0, 5))


def test_a_gap_and_its_replay_from_the_last_message_seen() -> None:
    tracker = after(0, 1)
    assert tracker.peek(5) == (2, 5)
    assert tracker.offer(5, 1005) == Decision(Verdict.GAP, (2, 5))
    assert (tracker.holes, tracker.missing) == ([(2, 5)], 3)
    assert tracker.offer(1, 1001, replay=True) == DUPLICATE
    assert tracker.offer(3, 1003, replay=True) == FILLED
    assert tracker.holes == [(2, 3), (4, 5)]
    assert tracker.offer(3, 1003, replay=True) == DUPLICATE
    assert tracker.offer(2, 1002, replay=True) == FILLED
    assert tracker.offer(4, 1004, replay=True) == FILLED
    assert tracker.offer(5, 1005, replay=True) == DUPLICATE
    assert tracker.offer(6, 1006, replay=True) == APPLY
    assert (tracker.holes, tracker.missing, tracker.incarnation) == ([], 0, 0)


def test_a_replay_in_order_needs_no_filling() -> None:
    tracker = after(0, 1)
    assert tracker.judge(5, 1005) == Decision(Verdict.GAP, (2, 5))
    assert [tracker.offer(n, n + 1000, replay=True) for n in range(1, 7)] == [DUPLICATE, *[APPLY] * 5]
    assert tracker.offer(5, 1005) == DUPLICATE
    assert tracker.holes == []


def test_a_replay_that_begins_too_late_leaves_a_hole() -> None:
    tracker = after(0, 1)
    assert tracker.offer(4, 1004, replay=True) == Decision(Verdict.GAP, (2, 4))
    assert tracker.missing == 2
    tracker.forget_holes()
    assert tracker.missing == 0
    assert tracker.offer(2, 1002, replay=True) == DUPLICATE  # too late: the consequence was drawn
    assert tracker.offer(5, 1005) == APPLY


def test_a_replay_of_what_was_before_the_join_is_not_applied() -> None:
    tracker = after(5, 6)
    assert tracker.offer(4, 1004, replay=True) == DUPLICATE


def test_restarted_by_other_evidence() -> None:
    tracker = after(0, 1, 5)
    tracker.restarted()
    assert (tracker.incarnation, tracker.last_sequence, tracker.holes) == (1, None, [])
    assert tracker.offer(0, 1000) == APPLY


def test_judging_changes_nothing() -> None:
    tracker = after(0, 1, 5)
    for number in (0, 1, 3, 5, 6, 9, LAST):
        for digest in (number + 1000, 7):
            for replay in (False, True):
                tracker.judge(number, digest, replay)
    assert (tracker.last_sequence, tracker.holes, tracker.incarnation) == (5, [(2, 5)], 0)
    assert tracker.offer(6, 1006) == APPLY


def test_hostile_numbers() -> None:
    tracker = after(0)
    assert tracker.offer(LAST, 1) == Decision(Verdict.GAP, (1, LAST))
    assert tracker.missing == LAST - 1
    assert tracker.offer(1, 1001) == Decision(Verdict.RESTART, (0, 1))  # the true stream goes on: one restart too many
    assert tracker.offer(2, 1002) == APPLY
    first = after(LAST)
    assert first.offer(0, 1) == RESTART


def test_a_duplicate_too_old_to_compare() -> None:
    tracker = after(*range(REMEMBERED + 10))
    assert tracker.offer(5, 1005, replay=True) == DUPLICATE
    assert tracker.offer(5, 1005) == Decision(Verdict.RESTART, (0, 5))


def test_filling_an_old_hole_does_not_forget_recent_messages() -> None:
    far = 10 * REMEMBERED
    tracker = after(0, far)
    for number in range(1, far):
        assert tracker.offer(number, number + 1000, replay=True) == FILLED
    assert tracker.holes == []
    assert tracker.offer(far, far + 1000) == DUPLICATE


def test_holes_are_bounded_and_nothing_is_applied_twice() -> None:
    numbers = list(range(0, 4 * MAX_HOLES, 2))
    tracker = after(*numbers)
    assert len(tracker.holes) == MAX_HOLES
    first, end = tracker.holes[0]
    for number in range(first, end):
        assert tracker.offer(number, number + 1000, replay=True) == DUPLICATE  # which of them was seen is forgotten
    for number in range(end, numbers[-1]):
        expected = FILLED if number % 2 else DUPLICATE
        assert tracker.offer(number, number + 1000, replay=True) == expected
    assert tracker.holes == [(first, end)]


class Model:
    """The same rules with unbounded memory and sets instead of ranges."""

    def __init__(self) -> None:
        self.incarnation = 0
        self.seen: dict[int, int] = {}
        self.first = 0  # numbers below are from before the join

    def offer(self, number: int, digest: int, replay: bool) -> Verdict:
        if not self.seen:
            self.seen[number] = digest
            self.first = number
            return Verdict.APPLY
        last = max(self.seen)
        known = self.seen.get(number)
        if number > last:
            self.seen[number] = digest
            return Verdict.APPLY if number == last + 1 else Verdict.GAP
        if known == digest:
            return Verdict.DUPLICATE
        if known is None and replay:
            if number < self.first:
                return Verdict.DUPLICATE
            self.seen[number] = digest
            return Verdict.FILLED
        self.incarnation += 1
        self.seen = {number: digest}
        self.first = 0
        return Verdict.RESTART

    def missing(self) -> set[int]:
        return set(range(self.first, max(self.seen))) - set(self.seen) if self.seen else set()


def test_random_streams_agree_with_the_model() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(300):
        tracker, model = SequenceTracker(), Model()
        engine, head = 0, rng.choice([0, 0, 17])
        for _ in range(rng.randint(1, 120)):
            action = rng.random()
            if action < 0.03:
                engine, head = engine + 1, 0
            replay = action > 0.7
            if action < 0.6:
                number = head
                head += 1 if action < 0.5 else rng.randint(1, 4)
            else:
                number = rng.randint(0, head + 1)
            digest = engine << 32 | number
            judged = tracker.judge(number, digest, replay)
            decision = tracker.offer(number, digest, replay)
            assert decision == judged
            assert decision.verdict is model.offer(number, digest, replay)
            assert tracker.incarnation == model.incarnation
            assert tracker.last_sequence == max(model.seen)
            holes = {n for first, end in tracker.holes for n in range(first, end)}
            assert holes == model.missing()
            assert tracker.missing == len(holes)
            assert tracker.holes == sorted(tracker.holes)
