"""One publisher's sequence numbers: what is next, what is missing, and when it is another process that speaks.

vLLM numbers its messages from 0 and says nothing when it restarts; ZMQ keeps their order. So a number that goes back, or
comes again with another payload, is a new incarnation. A pure state machine: no clock, no sockets.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from typing import NamedTuple

REMEMBERED = 1024  # payload digests kept, to tell a duplicate from a restart
MAX_HOLES = 64


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
    """`incarnation` counts restarts seen. `holes` are [first, last) ranges, oldest first, at most MAX_HOLES of them."""

    def __init__(self) -> None:
        self.incarnation = 0
        self.last_sequence: int | None = None
        self.holes: list[tuple[int, int]] = []
        self._digests: OrderedDict[int, int] = OrderedDict()

    @property
    def missing(self) -> int:
        return sum(end - first for first, end in self.holes)

    def peek(self, sequence: int) -> tuple[int, int] | None:
        """The range that a live message with this number would show to be lost; nothing is changed."""
        last = self.last_sequence
        return (last + 1, sequence) if last is not None and sequence > last + 1 else None

    def offer(self, sequence: int, digest: int, replay: bool = False) -> Decision:
        last = self.last_sequence
        if last is None or sequence == last + 1:
            return self._advance(sequence, digest, Verdict.APPLY)
        if sequence > last + 1:
            self._add_hole(last + 1, sequence)
            return self._advance(sequence, digest, Verdict.GAP, (last + 1, sequence))
        if self._digests.get(sequence) == digest:
            return Decision(Verdict.DUPLICATE)
        if replay and sequence not in self._digests:
            if self._fill(sequence):
                self._remember(sequence, digest)
                return Decision(Verdict.FILLED)
            return Decision(Verdict.DUPLICATE)  # older than what is remembered, or before the stream was joined
        self.incarnation += 1
        self.holes = [(0, sequence)] if sequence else []
        self._digests.clear()
        return self._advance(sequence, digest, Verdict.RESTART, (0, sequence) if sequence else None)

    def forget_holes(self) -> None:
        """What is missing will not come; whoever calls this has drawn the consequence."""
        self.holes.clear()

    def _advance(
        self, sequence: int, digest: int, verdict: Verdict, missing: tuple[int, int] | None = None
    ) -> Decision:
        self.last_sequence = sequence
        self._remember(sequence, digest)
        return Decision(verdict, missing)

    def _remember(self, sequence: int, digest: int) -> None:
        self._digests[sequence] = digest
        while len(self._digests) > REMEMBERED:
            self._digests.popitem(last=False)

    def _add_hole(self, first: int, end: int) -> None:
        self.holes.append((first, end))
        if len(self.holes) > MAX_HOLES:  # the two oldest become one: what lies between counts as missing too
            self.holes[:2] = [(self.holes[0][0], self.holes[1][1])]

    def _fill(self, sequence: int) -> bool:
        for i, (first, end) in enumerate(self.holes):
            if first <= sequence < end:
                self.holes[i : i + 1] = [h for h in ((first, sequence), (sequence + 1, end)) if h[0] < h[1]]
                return True
        return False
