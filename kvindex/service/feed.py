"""Between the sockets and the index: which sources there are, what they are called, what became of each message."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from kvindex.events.intake import Intake
from kvindex.events.sources import EngineSources, Finder, Source, StaticSources, WatchedFile
from kvindex.events.subscriber import SourceConfig
from kvindex.index.facade import Index, Ingested
from kvindex.service import log, yamlfile
from kvindex.service.config import EngineConfig, NodeConfig, PublisherConfig, PublishersFile
from kvindex.service.status import SourceStatus


class Feed:
    """The daemon's sink: hands messages to the index and counts. Subscribers call it from their own threads, the event
    loop asks it for its counts; the index has its own lock, the tallies have this one."""

    def __init__(self, config: NodeConfig, index: Index, session: aiohttp.ClientSession) -> None:
        self._config, self._index = config, index
        self._lock = threading.Lock()
        self.messages: Counter[str] = Counter()
        self.changes: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self._log = log.get("feed")
        self._deadline = time.monotonic() + config.connect_deadline_seconds
        self._engines = config.all_engines
        self.intake = Intake(self._finders(session), self, prepare=self._prepare)

    # ------------------------------------------------------------------ sources

    def _finders(self, session: aiohttp.ClientSession) -> list[Finder]:
        found: list[Finder] = []
        if self._config.publishers:
            found.append(StaticSources(self._sources_of(self._config.publishers), "publishers"))
        if self._config.publishers_file:
            found.append(WatchedFile(self._config.publishers_file, self._read_file))
        for engine in self._engines:
            fallback = self._socket(engine.fallback) if engine.fallback else None
            found.append(EngineSources(engine.url, session, template=self._socket(""), fallback=fallback, about=engine))
        return found

    def _read_file(self, path: Path) -> Iterable[Source]:
        return self._sources_of(yamlfile.load(str(path), PublishersFile).publishers)

    def _sources_of(self, publishers: Iterable[PublisherConfig]) -> list[Source]:
        return [Source(self._socket(p.source, p), about=p) for p in publishers]

    def _socket(self, source: str, publisher: PublisherConfig | None = None) -> SourceConfig:
        return SourceConfig(
            source=source,
            replay=publisher.replay if publisher else None,
            bind=bool(publisher and publisher.bind),
            topic=publisher.topic if publisher else "",
            max_messages=self._config.queue.max_messages,
            max_bytes=self._config.queue.max_bytes,
            probe_seconds=self._config.probe_interval_seconds,
        )

    def _prepare(self, source: Source) -> None:
        """Tell the index what config says of a source, before its first message."""
        about, name = source.about, source.socket.source
        if isinstance(about, PublisherConfig):
            self._index.expect(about.override(name, about.endpoint))
        elif isinstance(about, EngineConfig):
            self._index.expect(about.override(name, about.name, urlsplit(about.url).netloc))

    # ------------------------------------------------------------------ messages (subscribers' threads)

    def ingest(self, source: str, frames: Sequence[bytes], replay: bool = False) -> Ingested:
        result = self._index.ingest(source, frames, replay=replay)
        with self._lock:
            self.messages[result.status] += 1
            for skip in result.skipped:
                self.skipped[skip.reason] += 1
            if result.applied is not None:
                applied = result.applied
                for kind in ("stored", "removed", "orphans", "unplaced", "cleared"):
                    self.changes[kind] += getattr(applied, kind)
        if result.status in ("gap", "restart"):
            self._log.warning(
                "messages are missing" if result.status == "gap" else "publisher restarted",
                source=source,
                endpoint=result.publisher,
                sequence=result.sequence,
                missing=result.missing,
            )
        for skip in result.skipped[:1]:
            self._log.warning("skipped", source=source, reason=skip.reason, detail=skip.detail, n=len(result.skipped))
        return result

    def replay_begun(self, source: str) -> None:
        self._index.replay_begun(source)

    def replay_ended(self, source: str, complete: bool) -> None:
        self._index.replay_ended(source, complete)
        if not complete:
            self._log.error(
                "lost messages could not be replayed", source=source, then=self._config.index.on_lost_messages
            )

    def restarted(self, source: str) -> None:
        self._index.restarted(source)
        self._log.warning("publisher restarted", source=source)

    def close_publisher(self, source: str) -> int:
        return self._index.close_publisher(source)

    # ------------------------------------------------------------------ what there is to say (event loop)

    def sources(self) -> list[SourceStatus]:
        said = [SourceStatus(s.source, s.state, s.detail) for s in self.intake.subscribers()]
        said += [SourceStatus(source, "failed", why) for source, why in self.intake.failed().items()]
        said += [SourceStatus(f.where, "connecting", f.error) for f in self.intake.finders() if f.error and not f.found]
        return said

    def source_states(self) -> list[tuple[str, str]]:
        return [(s.source, s.state) for s in self.sources()]

    def waiting_for(self) -> list[str]:
        """Sources that are not connected yet; none once their deadline has passed."""
        if time.monotonic() > self._deadline:
            return []
        waiting = [s.source for s in self.sources() if s.state == "connecting"]
        looked = {f.where for f in self.intake.finders() if f.found or f.error}
        return waiting + [e.url for e in self._engines if e.url.rstrip("/") not in looked]

    def unmatched(self) -> tuple[int, int]:
        """(publishers whose endpoint nobody named, engines of which no publisher is known)."""
        unnamed = sum(p.endpoint == p.source for p in self._index.publishers())
        return unnamed, len(self.engines_without_publisher())

    def engines_without_publisher(self) -> list[str]:
        silent = {f.where for f in self.intake.finders() if not f.found}
        return [e.url for e in self._engines if e.url.rstrip("/") in silent]

    def complain(self) -> None:
        """Once, when the deadline has passed: name what has no partner."""
        for url in self.engines_without_publisher():
            error = next((f.error for f in self.intake.finders() if f.where == url.rstrip("/")), None)
            self._log.error("engine has no publisher", engine=url, why=error, fix=f"run: kvindex doctor {url}")
        for status in self.intake.subscribers():
            if status.state != "connected":
                self._log.error("publisher is not connected", source=status.source, state=status.state)
        for publisher in self._index.publishers():
            if publisher.endpoint == publisher.source:
                self._log.error(
                    "publisher has no endpoint", source=publisher.source, topic=publisher.topic, fix="set its endpoint"
                )

    @property
    def overflow(self) -> int:
        return sum(s.overflow for s in self.intake.subscribers())

    @property
    def waiting(self) -> int:
        return sum(s.waiting for s in self.intake.subscribers())

    @property
    def lost(self) -> int:
        return sum(s.lost for s in self.intake.subscribers())
