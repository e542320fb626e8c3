"""What may wait between a socket and its consumer: bounded in messages and in bytes.

What does not fit is dropped, newest first, and counted: the hole it leaves in the sequence numbers is then found and
asked for again like any other loss.
"""

from __future__ import annotations

import threading
from collections import deque

Frames = list[bytes]


class Inbox:
    """One producer, one consumer; thread-safe."""

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[Frames, int]] = deque()
        self._ready = threading.Condition()
        self._nudged = False
        self.bytes = 0
        self.overflow = 0  # messages dropped, ever
        self.received = 0  # messages offered, ever

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, frames: Frames) -> bool:
        """False when it was dropped. Never blocks: a socket that is not read loses messages without counting them."""
        size = sum(map(len, frames))
        with self._ready:
            self.received += 1
            # A message larger than the whole bound still gets in when it is alone, or it would never be read.
            full = len(self._waiting) >= self._max_messages or self.bytes + size > self._max_bytes
            if full and self._waiting:
                self.overflow += 1
                return False
            self._waiting.append((frames, size))
            self.bytes += size
            self._ready.notify()
            return True

    def nudge(self) -> None:
        """Make a waiting `get` return at once, with nothing if there is nothing."""
        with self._ready:
            self._nudged = True
            self._ready.notify()

    def get(self, timeout: float) -> Frames | None:
        """The oldest message, or None after `timeout` seconds or a nudge."""
        with self._ready:
            if not self._waiting and not self._nudged:
                self._ready.wait(timeout)
            self._nudged = False
            if not self._waiting:
                return None
            frames, size = self._waiting.popleft()
            self.bytes -= size
            return frames
