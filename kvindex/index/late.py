"""A replayed message is applied after later ones were. This puts the effect right.

While messages are missing, what the later ones removed is remembered. A late store of something that a later message
removed must not bring it back, though it still tells which block a key means. Where the order cannot be told exactly
the answer is too low, never too high.
"""

from __future__ import annotations

import msgspec

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
        """The late batch without what later messages undid: stores of it become names only, and what was evicted before
        a later reset is gone with it (taken away once more, it would hit what was stored since)."""
        cleared = self._cleared > sequence
        events: list[Event] = []
        for event in batch.events:
            if isinstance(event, Stored):
                event = msgspec.structs.replace(event, gone=self._gone(event, sequence, cleared))
            elif cleared and isinstance(event, Removed) and event.tier == "hbm":
                continue
            events.append(event)
        return msgspec.structs.replace(batch, events=tuple(events))

    def _gone(self, event: Stored, sequence: int, cleared: bool) -> frozenset[int]:
        if self.overflowed or (cleared and event.tier == "hbm"):
            return frozenset(event.engine_keys)
        later = self._removed
        return frozenset(k for k in event.engine_keys if later.get((event.tier, event.group, k), -1) > sequence)

    def forget(self) -> None:
        self._removed.clear()
        self._cleared = -1
        self.overflowed = False
