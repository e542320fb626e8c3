"""One publisher's sequence numbers: what is next, what is missing, and when it is another process that speaks.

vLLM numbers its messages from 0 and says nothing when it restarts; ZMQ keeps their order. So a live number that goes
back, or any number that comes again with another payload, is a new incarnation. A pure state machine: no clock, no
sockets, bounded memory.
"""

from __future__ import annotations

import enum
from array import array
from typing import NamedTuple

REMEMBERED = 1024  # payload digests kept, to tell a duplicate from a restart
MAX_HOLES = 64

_NOTHING = (
    1 << 64
) - 1  # an unused slot; a message with this number is remembered nowhere, which costs a replay at most


class Verdict(enum.Enum):
    APPLY = "apply"  # the next message, or the first
    GAP = "gap"  # apply it, but `missing` messages before it were lost
    FILLED = "filled"  # a replayed message that was missing: apply it, knowing that later ones were applied already
    DUPLICATE = "duplicate"  # seen before: ignore
    RESTART = "restart"  # another incarnation: forget what the last one said, then apply


class Decision(NamedTuple):
    """`missing`: [first, last) of the messages that this one shows to be lost, None when none are."""

    verdict: Verdict
    missing: tuple[int, int] | None = None


class SequenceTracker:
    """`incarnation` counts restarts seen. `holes` are [first, end) ranges of what is missing in this incarnation,
    oldest first, at most MAX_HOLES of them."""

    def __init__(self) -> None:
        self.incarnation = 0
        self.last_sequence: int | None = None
        self.holes: list[tuple[int, int]] = []
        self._lost_below = 0  # holes below were merged: what in them was seen and what was not is forgotten
        # Slot n % REMEMBERED holds the digest of message n. Arrays, because there is one of these per publisher.
        self._numbers = array("Q")
        self._digests = array("Q")
        self._forget_digests()

    @property
    def missing(self) -> int:
        return sum(end - first for first, end in self.holes)

    def peek(self, sequence: int) -> tuple[int, int] | None:
        """The range that a live message with this number would show to be lost; nothing is changed."""
        last = self.last_sequence
        return (last + 1, sequence) if last is not None and sequence > last + 1 else None

    def judge(self, sequence: int, digest: int, replay: bool = False) -> Decision:
        """What `offer` would decide; nothing is changed."""
        last = self.last_sequence
        if last is None or sequence == last + 1:
            return Decision(Verdict.APPLY)
        if sequence > last + 1:
            return Decision(Verdict.GAP, (last + 1, sequence))
        slot = sequence % REMEMBERED
        if self._numbers[slot] == sequence and sequence != _NOTHING:
            if self._digests[slot] == digest:
                return Decision(Verdict.DUPLICATE)
        elif replay:
            # What is in no hole was seen too long ago to compare, or before the stream was joined: applied now, it
            # would be in the wrong order.
            return Decision(Verdict.FILLED if self._hole_of(sequence) is not None else Verdict.DUPLICATE)
        # A live number that goes back, even into a hole, is taken for a restart: ZMQ does not reorder, and believing
        # a new incarnation's message to be a late one would keep the old one's blocks.
        return Decision(Verdict.RESTART, (0, sequence) if sequence else None)

    def offer(self, sequence: int, digest: int, replay: bool = False) -> Decision:
        """Decide about a message and remember it. `digest` has 64 bits; `replay`: it came from the replay socket."""
        decision = self.judge(sequence, digest, replay)
        if decision.verdict is Verdict.DUPLICATE:
            return decision
        if decision.verdict is Verdict.FILLED:
            self._fill(sequence)
        else:
            if decision.verdict is Verdict.RESTART:
                self.restarted()
            if decision.missing is not None:
                self._add_hole(*decision.missing)
            self.last_sequence = sequence
        self._remember(sequence, digest)
        return decision

    def restarted(self) -> None:
        """The publisher is another process by other evidence than a message: the next message is its first."""
        self.incarnation += 1
        self.last_sequence = None
        self.forget_holes()
        self._forget_digests()

    def forget_holes(self) -> None:
        """What is missing will not come; whoever calls this has drawn the consequence."""
        self.holes.clear()
        self._lost_below = 0

    def _forget_digests(self) -> None:
        self._numbers = array("Q", [_NOTHING]) * REMEMBERED
        self._digests = array("Q", [0]) * REMEMBERED

    def _remember(self, sequence: int, digest: int) -> None:
        slot = sequence % REMEMBERED
        known = self._numbers[slot]
        if known == _NOTHING or known < sequence:  # a filled old number must not push out a recent one
            self._numbers[slot] = sequence
            self._digests[slot] = digest

    def _add_hole(self, first: int, end: int) -> None:
        self.holes.append((first, end))
        if len(self.holes) > MAX_HOLES:
            # The two oldest become one. It can no longer be filled, or what lies between would be applied twice.
            self.holes[:2] = [(self.holes[0][0], self.holes[1][1])]
            self._lost_below = self.holes[0][1]

    def _hole_of(self, sequence: int) -> int | None:
        if sequence < self._lost_below:
            return None
        return next((i for i, (first, end) in enumerate(self.holes) if first <= sequence < end), None)

    def _fill(self, sequence: int) -> None:
        i = self._hole_of(sequence)
        if i is not None:
            first, end = self.holes[i]
            self.holes[i : i + 1] = [hole for hole in ((first, sequence), (sequence + 1, end)) if hole[0] < hole[1]]
