"""Who takes the messages of a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Sink(Protocol):
    """`kvindex.Index` is one; a recorder is another.

    `ingest` may return something with a `status`; `"gap"` says that messages are missing. `replay_begun` and
    `replay_ended` bracket replayed messages; `complete` False: what is missing is lost for good. `restarted`: the
    publisher is another process now, what it said is void, and its next message is its first.
    """

    def ingest(self, source: str, frames: Sequence[bytes], replay: bool = False) -> object: ...
    def replay_begun(self, source: str) -> object: ...
    def replay_ended(self, source: str, complete: bool) -> object: ...
    def restarted(self, source: str) -> object: ...


class IndexSink(Sink, Protocol):
    """A sink that can also forget a source that is gone."""

    def close_publisher(self, source: str) -> object: ...
