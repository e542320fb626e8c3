"""`Index`: a block index with streams around it. Raw frames in, scores out, in one process and without a network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvindex.errors import UsageError
from kvindex.events.decode import decode
from kvindex.events.frames import digest, split
from kvindex.events.model import EventBatch, Skip, Tokens
from kvindex.events.sequence import Verdict
from kvindex.index.config import IndexConfig, PublisherOverride
from kvindex.index.keys import as_tokens
from kvindex.index.late import LateFill
from kvindex.index.protocol import Applied, BlockIndex, BlockView, Columns, Keys, MultiModalItem, Namespace
from kvindex.index.streams import HIDDEN_STATES, EndpointStatus, PublisherStatus, Stream, describe
from kvindex.scoring.result import Scores, seconds_saved


class Ingested(NamedTuple):
    """What one message did. `status`: `applied`, `filled` (a replayed one that was missing), `duplicate`, `gap`
    (applied, or held back, but messages before it are missing), `restart` (applied, and the publisher's earlier word
    forgotten), `replay_end`, `skipped` (nothing of it could be used)."""

    status: str
    publisher: str | None = None
    sequence: int | None = None
    applied: Applied | None = None
    skipped: tuple[Skip, ...] = ()
    missing: tuple[int, int] | None = None


def make_block_index(config: IndexConfig, reference: bool) -> BlockIndex:
    """The one place that chooses an implementation."""
    if reference:
        from kvindex.index.reference import ReferenceIndex

        return ReferenceIndex(config.weights, config.max_forgotten_blocks)
    from kvindex.index.native import NativeIndex

    return NativeIndex(config.weights, config.max_forgotten_blocks)


class Index:
    """Embedded index. Every call is synchronous and thread-safe (one lock); `ingest` never raises for what came over
    the wire, only for a wrong call (UsageError)."""

    def __init__(
        self,
        *,
        reference: bool = False,
        config: IndexConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config or IndexConfig()
        self._blocks = make_block_index(self.config, reference)
        self._clock = clock
        self._wall_clock = wall_clock
        self._lock = threading.RLock()
        self._overrides = {(o.source, o.topic): o for o in self.config.publishers}
        self._streams: dict[tuple[str, str, int], Stream] = {}
        self._late: dict[int, LateFill] = {}
        self._topics: dict[str, str] = {}  # source -> the last topic seen, for replay answers that carry none

    # ------------------------------------------------------------------ events in

    def ingest(self, source: str, frames: Sequence[bytes], replay: bool = False) -> Ingested:
        """Take one message, verbatim; `replay`: it is an answer of the replay socket. The next `score` sees it."""
        message = split(frames, replay=replay)
        if isinstance(message, Skip):
            return Ingested("skipped", skipped=(message,))
        if message.is_end:
            return Ingested("replay_end")
        batch = decode(message.payload)
        with self._lock:
            topic = message.topic if message.topic is not None else self._topics.get(source, "")
            self._topics[source] = topic
            stream = self._stream_for(source, topic, batch)
            if stream is None:
                skip = Skip("too_many_publishers", f"{len(self._streams)} publishers are open")
                return Ingested("skipped", sequence=message.sequence, skipped=(skip,))
            return self._take(stream, message.sequence, message.payload, batch, replay)

    def _take(self, stream: Stream, sequence: int, payload: bytes, batch: EventBatch, replay: bool) -> Ingested:
        endpoint = stream.publisher.endpoint
        decision = stream.tracker.offer(sequence, digest(payload), replay)
        now = self._clock()
        stream.last_message = now
        if decision.verdict is Verdict.DUPLICATE:
            return Ingested("duplicate", endpoint, sequence)
        late = self._late.setdefault(stream.number, LateFill())
        if decision.verdict is Verdict.RESTART:
            self._restart(stream)
        elif decision.verdict is Verdict.GAP and decision.missing:
            stream.gaps += 1
        if decision.verdict is Verdict.FILLED:
            batch = late.reorder(batch, sequence)
        elif stream.tracker.holes:
            late.remember(batch, sequence)
        applied = self._blocks.apply(stream.number, batch, sequence)
        stream.messages += 1
        stream.events += len(batch.events)
        stream.skipped += len(applied.skipped)
        stream.missing = stream.tracker.missing
        if batch.timestamp > 0:
            stream.lag_seconds = max(0.0, self._wall_clock() - batch.timestamp)
        if not stream.tracker.holes:
            late.forget()
        self._settle(stream)
        status = {Verdict.APPLY: "applied", Verdict.GAP: "gap", Verdict.FILLED: "filled", Verdict.RESTART: "restart"}
        if not batch.events and applied.skipped:
            return Ingested("skipped", endpoint, sequence, applied, applied.skipped, decision.missing)
        return Ingested(status[decision.verdict], endpoint, sequence, applied, applied.skipped, decision.missing)

    def _stream_for(self, source: str, topic: str, batch: EventBatch) -> Stream | None:
        """The stream a message belongs to. A payload that cannot be read names no rank: it counts for the only stream
        of its socket and topic, when there is one."""
        rank = batch.rank
        if not batch.events and batch.skipped:
            known = [key for key in self._streams if key[:2] == (source, topic)]
            if len(known) == 1:
                return self._streams[known[0]]
        found = self._streams.get((source, topic, rank))
        if found is None and self._may_open(source):
            publisher = describe(source, topic, rank, tuple(self._overrides.values()))
            number = self._blocks.open(publisher)
            found = Stream(source, topic, rank, publisher, number, self._clock())
            self._streams[source, topic, rank] = found
        return found

    def _may_open(self, source: str) -> bool:
        if len(self._streams) >= self.config.max_publishers:
            return False
        return sum(key[0] == source for key in self._streams) < self.config.max_publishers_per_source

    def _settle(self, stream: Stream, state: str | None = None) -> None:
        stream.state = state or ("gap" if stream.tracker.holes else "live")
        self._blocks.hide(stream.number, stream.state in HIDDEN_STATES)

    def expect(self, override: PublisherOverride) -> None:
        """Say what is known of a publisher before it speaks, for sources that are found at run time. Replaces what was
        said of the same source and topic; a publisher that has spoken already keeps what it was opened with."""
        with self._lock:
            self._overrides[override.source, override.topic] = override

    # ------------------------------------------------------------------ what the reader of a socket tells

    def _of(self, source: str) -> list[Stream]:
        return [s for s in self._streams.values() if s.source == source]

    def replay_begun(self, source: str) -> None:
        """The source's replay socket was asked."""
        with self._lock:
            for stream in self._of(source):
                stream.replays += 1
                if stream.state in ("live", "gap"):
                    self._settle(stream, "replaying")

    def replay_ended(self, source: str, complete: bool) -> None:
        """The answer ended, or did not come. What is still missing then is lost for good: `on_lost_messages`
        decides."""
        with self._lock:
            for stream in self._of(source):
                if stream.tracker.holes and self.config.on_lost_messages == "fence":
                    self._fence(stream, f"{stream.tracker.missing} lost messages could not be replayed")
                elif stream.state == "replaying":
                    self._settle(stream)

    def restarted(self, source: str) -> None:
        """The source's process is another one now, by other evidence than a message: what it said is void."""
        with self._lock:
            for stream in self._of(source):
                stream.tracker.restarted()
                self._restart(stream)

    def _restart(self, stream: Stream) -> None:
        stream.restarts += 1
        self._blocks.drop(stream.number, restart=True)
        self._late.setdefault(stream.number, LateFill()).forget()

    def fence(self, source: str, reason: str = "") -> int:
        """Forget what a source's publishers said; they are absent from scores until they speak again."""
        with self._lock:
            for stream in (found := self._of(source)):
                self._fence(stream, reason)
            return len(found)

    def _fence(self, stream: Stream, reason: str) -> None:
        self._blocks.drop(stream.number, restart=False)
        stream.tracker.forget_holes()
        self._late.pop(stream.number, None)
        stream.missing = 0
        stream.fence_reason = reason
        self._settle(stream, "fenced")

    def mark_suspect(self, endpoint: str) -> None:
        """Predictions for this endpoint have been wrong for long: leave it out of scores until it is rebuilt."""
        with self._lock:
            for stream in self._streams.values():
                if stream.publisher.endpoint == endpoint:
                    self._settle(stream, "suspect")

    def close_publisher(self, source: str) -> int:
        """A source is gone: forget its publishers and all they said. Returns how many there were."""
        with self._lock:
            gone = self._of(source)
            for stream in gone:
                self._blocks.close(stream.number)
                self._late.pop(stream.number, None)
                del self._streams[stream.source, stream.topic, stream.rank]
            self._topics.pop(source, None)
            return len(gone)

    # ------------------------------------------------------------------ questions

    def keys(
        self,
        token_ids: Sequence[int] | Tokens,
        *,
        lora: str | None = None,
        cache_salt: str | None = None,
        mm: Iterable[Mapping[str, Any] | MultiModalItem] = (),
    ) -> Keys:
        """Hash a prompt once, to ask with often. Opaque; one array per block size known now."""
        tokens = as_tokens(token_ids)
        namespace = Namespace(lora, cache_salt, _media(mm))
        with self._lock:
            return self._blocks.keys(tokens, namespace)

    def score(
        self,
        token_ids: Sequence[int] | Tokens,
        model: str | None = None,
        *,
        lora: str | None = None,
        cache_salt: str | None = None,
        mm: Iterable[Mapping[str, Any] | MultiModalItem] = (),
        endpoints: Iterable[str] | None = None,
    ) -> Scores:
        """Who holds how much of this prompt. `model` None asks every endpoint under its own model."""
        return self.score_keys(
            self.keys(token_ids, lora=lora, cache_salt=cache_salt, mm=mm), model, endpoints=endpoints
        )

    def score_keys(
        self,
        keys: Keys,
        model: str | None = None,
        *,
        endpoints: Iterable[str] | None = None,
        out: Columns | None = None,
    ) -> Scores:
        """`score` for a prompt hashed before. `out` may be reused by the implementation for its answer."""
        wanted = None if endpoints is None else frozenset(endpoints)
        with self._lock:
            columns = self._blocks.score(keys, model, wanted, out)
            by_endpoint: dict[str, list[Stream]] = {}
            for stream in self._streams.values():
                by_endpoint.setdefault(stream.publisher.endpoint, []).append(stream)
            streams = [by_endpoint[name] for name in columns.endpoints]
            return Scores(
                columns.endpoints,
                columns.blocks,
                columns.tokens,
                columns.score,
                seconds_saved(columns, self.config.cost),
                [_worst(found) for found in streams],
                np.array([max(s.lag_seconds for s in found) for found in streams], np.float64),
                columns.tiers,
            )

    def explain(
        self,
        token_ids: Sequence[int] | Tokens,
        model: str | None = None,
        *,
        lora: str | None = None,
        cache_salt: str | None = None,
        mm: Iterable[Mapping[str, Any] | MultiModalItem] = (),
        endpoints: Iterable[str] | None = None,
    ) -> list[BlockView]:
        """Block by block, who has it, and if not, why not."""
        keys = self.keys(token_ids, lora=lora, cache_salt=cache_salt, mm=mm)
        with self._lock:
            return self._blocks.explain(keys, model, None if endpoints is None else frozenset(endpoints))

    def publishers(self) -> list[PublisherStatus]:
        with self._lock:
            now = self._clock()
            return [stream.status(now) for stream in self._streams.values()]

    def endpoints(self) -> list[EndpointStatus]:
        with self._lock:
            found: dict[str, list[Stream]] = {}
            for stream in self._streams.values():
                found.setdefault(stream.publisher.endpoint, []).append(stream)
            return [
                EndpointStatus(
                    name=name,
                    model=next((s.publisher.model for s in streams if s.publisher.model), None),
                    state=_worst(streams),
                    lag_seconds=max(s.lag_seconds for s in streams),
                    groups=tuple(group for s in streams for group in self._blocks.groups(s.number)),
                )
                for name, streams in sorted(found.items())
            ]

    def stats(self) -> dict[str, int]:
        with self._lock:
            return self._blocks.stats()

    def check(self) -> None:
        """Audit the block index; raises IntegrityError naming the invariant that is violated."""
        with self._lock:
            self._blocks.check()


_BY_DOUBT = ("live", "replaying", "gap", "suspect", "fenced")


def _worst(streams: list[Stream]) -> str:
    return max((s.state for s in streams), key=_BY_DOUBT.index)


def _media(items: Iterable[Mapping[str, Any] | MultiModalItem]) -> tuple[MultiModalItem, ...]:
    try:
        return tuple(
            item
            if isinstance(item, MultiModalItem)
            else MultiModalItem(str(item["hash"]), int(item["offset"]), int(item["length"]))
            for item in items
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f'mm: every item needs "hash", "offset" and "length": {error}') from error
