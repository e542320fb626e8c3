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
from kvindex.service.status import SourceStatus, pod_of

MAX_SAID = 1000


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
        self._said: set[tuple[str, ...]] = set()
        self._complaints: set[tuple[str, ...]] = set()
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
        if result.status == "restart":
            self._log.warning("publisher restarted", source=source, endpoint=result.publisher, sequence=result.sequence)
        for skip in result.skipped:
            if self._is_news("skipped", source, skip.reason):
                self._log.warning(
                    "skipped; counted from here on", source=source, reason=skip.reason, detail=skip.detail[:500]
                )
        return result

    def _is_news(self, *what: str) -> bool:
        """A flood of one kind is one line and a counter."""
        with self._lock:
            if what in self._said or len(self._said) >= MAX_SAID:
                return False
            self._said.add(what)
            return True

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

    def close_publisher(self, source: str) -> int:
        return self._index.close_publisher(source)

    def rebuild(self, endpoint: str) -> None:
        """Predictions for this endpoint have been too high for long: what is known of it is not believed any more."""
        self._index.mark_suspect(endpoint)
        for source in {p.source for p in self._index.publishers() if p.endpoint == endpoint}:
            replayed = self.intake.renew(source)
            if not replayed:
                self._index.fence(source, "predictions were too high, and there is no replay socket")
            self._log.error("predictions too high, rebuilding", endpoint=endpoint, source=source, replayed=replayed)

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
        unnamed = sum(pod_of(p.endpoint) == p.source for p in self._index.publishers())
        return unnamed, len(self._engines_without_publisher())

    def _engines_without_publisher(self) -> list[str]:
        silent = {f.where for f in self.intake.finders() if not f.found}
        return [e.url for e in self._engines if e.url.rstrip("/") in silent]

    def complain(self) -> None:
        """Name what has no partner, each once until it has had one."""
        now: dict[tuple[str, ...], dict[str, object]] = {}
        errors = {f.where: f.error for f in self.intake.finders()}
        for url in self._engines_without_publisher():
            now["engine has no publisher", url] = {"why": errors.get(url.rstrip("/")), "fix": f"kvindex doctor {url}"}
        for s in self.intake.subscribers():
            if s.state != "connected":
                now["publisher is not connected", s.source] = {"state": s.state, "why": s.detail}
        sources: dict[tuple[str, str], set[str]] = {}
        for p in self._index.publishers():
            sources.setdefault((p.endpoint, p.topic), set()).add(p.source)
            if pod_of(p.endpoint) == p.source:
                now["publisher has no endpoint", p.source] = {
                    "topic": p.topic,
                    "fix": "set its endpoint in the config, or give the engine a topic kv@POD@MODEL",
                }
        for (endpoint, topic), shared in sources.items():
            if len(shared) > 1:
                now[("publishers share an endpoint", endpoint, *sorted(shared))] = {
                    "topic": topic,
                    "fix": "set the endpoint of each in the config, if they are different engines",
                }
        for what, details in now.items():
            if what not in self._complaints:
                self._log.error(what[0], about=what[1:], **details)
        for what in self._complaints - now.keys():
            self._log.info("solved: " + what[0], about=what[1:])
        self._complaints = set(now)

    @property
    def overflow(self) -> int:
        return sum(s.overflow for s in self.intake.subscribers())

    @property
    def waiting(self) -> int:
        return sum(s.waiting for s in self.intake.subscribers())

    @property
    def lost(self) -> int:
        return sum(s.lost for s in self.intake.subscribers())
