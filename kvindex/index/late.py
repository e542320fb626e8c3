"""A replayed message is applied after later ones were. This puts the effect right.

While messages are missing, what the later ones removed is remembered. A late store of something that a later message
removed must not bring it back: it still tells which block a key means, so it is applied and then withdrawn. Where the
order cannot be told exactly the answer is too low, never too high.
"""

from __future__ import annotations

from kvindex.events.model import Cleared, Event, EventBatch, Removed, Stored

MAX_REMEMBERED = 1_000_000


class LateFill:
    """One publisher's later removals, while it has holes. `overflowed`: too many to remember, so late stores are not
    believed at all."""

    def __init__(self) -> None:
        self._removed: dict[tuple[str, int, int], int] = {}
        self._cleared = -1
        self.overflowed = False

    def remember(self, batch: EventBatch, sequence: int) -> None:
        for event in batch.events:
            if isinstance(event, Cleared):
                self._cleared = sequence
            elif isinstance(event, Removed):
                for key in event.engine_keys:
                    self._removed[event.tier, event.group, key] = sequence
        if len(self._removed) > MAX_REMEMBERED:
            self._removed.clear()
            self.overflowed = True

    def reorder(self, batch: EventBatch, sequence: int) -> EventBatch:
        """The late batch, followed by the removals that overtook it."""
        events: list[Event] = list(batch.events)
        for event in batch.events:
            if isinstance(event, Stored):
                cleared = event.tier == "hbm" and self._cleared > sequence
                gone = tuple(
                    key
                    for key in event.engine_keys
                    if cleared or self.overflowed or self._removed.get((event.tier, event.group, key), -1) > sequence
                )
                if gone:
                    events.append(Removed(gone, event.tier, event.group))
        return EventBatch(batch.timestamp, tuple(events), batch.rank, batch.skipped)

    def forget(self) -> None:
        self._removed.clear()
        self._cleared = -1
        self.overflowed = False
