"""The two indexes that a router can ask: one in its own process, or a daemon's over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import structlog

from kvindex.errors import ServiceError
from kvindex.events.intake import Intake
from kvindex.events.sources import EngineSources, Finder, Source, StaticSources
from kvindex.events.subscriber import SourceConfig
from kvindex.index.config import PublisherOverride
from kvindex.index.facade import Index
from kvindex.router.config import IndexSource, RouterConfig
from kvindex.router.endpoints import Endpoint, EndpointTable
from kvindex.router.lookup import Lookup, Match, Matches, NoLookup, Query
from kvindex.scoring.result import Scores
from kvindex.service.audit import Audit, Observation
from kvindex.service.client import AsyncIndexClient
from kvindex.service.config import PublisherConfig, read_token

REFRESH_SECONDS = 0.5
MAX_REPORTS = 10_000


def _matches(scores: Scores) -> Matches:
    columns = zip(
        scores.endpoints,
        scores.tokens.tolist(),
        scores.seconds_saved.tolist(),
        scores.state,
        scores.lag_seconds.tolist(),
        strict=True,
    )
    return {name: Match(tokens, saved, state, lag) for name, tokens, saved, state, lag in columns}


class _TableSources:
    """A finder over the endpoints that are in the table now: each is asked where it publishes."""

    def __init__(self, table: EndpointTable, session: aiohttp.ClientSession) -> None:
        self.where = "endpoints"
        self.error: str | None = None
        self.interval_seconds = 1.0
        self._table, self._session = table, session
        self._engines: dict[str, tuple[Endpoint, EngineSources]] = {}

    async def look(self) -> tuple[Source, ...]:
        for name, endpoint in self._table.by_id.items():
            if name not in self._engines or self._engines[name][0] is not endpoint:
                self._engines[name] = (endpoint, EngineSources(endpoint.url, self._session, about=endpoint))
        for name in self._engines.keys() - self._table.by_id.keys():
            del self._engines[name]
        engines = [engine for _, engine in self._engines.values()]
        found = await asyncio.gather(*(engine.look() for engine in engines))
        errors = [engine.error for engine in engines if engine.error]
        self.error = "; ".join(errors) or None
        return tuple(source for sources in found for source in sources)


class EmbeddedLookup:
    """An index in this process, fed by subscribers of its own."""

    mode = "embedded"

    def __init__(self, config: RouterConfig, table: EndpointTable, session: aiohttp.ClientSession) -> None:
        self._index = Index(config=config.index_settings)
        finders: list[Finder] = [_TableSources(table, session)]
        if config.publishers:
            told = [
                Source(SourceConfig(source=p.source, replay=p.replay, bind=p.bind, topic=p.topic), about=p)
                for p in config.publishers
            ]
            finders.append(StaticSources(told, "publishers"))
        self._intake = Intake(finders, self._index, prepare=self._prepare)
        self._audit = Audit()
        self._known: frozenset[str] = frozenset()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self._intake.poll()
        self._tasks = [
            asyncio.create_task(self._intake.run(), name="intake"),
            asyncio.create_task(_every(REFRESH_SECONDS, self._refresh), name="followed"),
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._intake.stop()

    def match(self, query: Query) -> Matches:
        return _matches(self._index.score(query.tokens, lora=query.lora, cache_salt=query.cache_salt))

    def follows(self, endpoint: str) -> bool:
        if endpoint not in self._known:  # it may have spoken for the first time just now
            self._known = frozenset(p.endpoint for p in self._index.publishers())
        return endpoint in self._known

    def report(self, endpoint: str, predicted: int, cached: int, prompt: int) -> None:
        if self._audit.observe(Observation(endpoint, predicted, cached, prompt)):
            self._index.mark_suspect(endpoint)

    def describe(self) -> dict[str, object]:
        return {
            "mode": self.mode,
            "endpoints_followed": sorted(self._known),
            "sources": [{"source": s.source, "state": s.state} for s in self._intake.subscribers()],
            "errors": [f.error for f in self._intake.finders() if f.error],
        }

    async def _refresh(self) -> None:
        self._known = frozenset(p.endpoint for p in self._index.publishers())

    def _prepare(self, source: Source) -> None:
        about = source.about
        name, model = None, None
        if isinstance(about, Endpoint):
            name, model = about.id, about.config.model
        elif isinstance(about, PublisherConfig):
            name, model = about.endpoint, about.model
        self._index.expect(
            PublisherOverride(
                source.socket.source,
                endpoint=name,
                default_model=model,
                eagle=isinstance(about, PublisherConfig) and about.eagle,
            )
        )


class DaemonLookup:
    """A daemon's index. It is asked per request; what it follows and what was seen is exchanged beside."""

    mode = "grpc"

    def __init__(self, source: IndexSource) -> None:
        self._timeout = source.timeout_seconds
        self._client = AsyncIndexClient(source.grpc, ca=source.ca, token=read_token(None, source.token_file))
        self._known: frozenset[str] = frozenset()
        self._reports: list[tuple[str, int, int, int]] = []
        self._error: str | None = "not asked yet"
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger().bind(component="lookup", daemon=source.grpc)

    async def start(self) -> None:
        await self._exchange()
        self._task = asyncio.create_task(_every(REFRESH_SECONDS, self._exchange), name="daemon")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._client.close()

    async def match(self, query: Query) -> Matches:
        return _matches(
            await self._client.score(query.tokens, lora=query.lora, cache_salt=query.cache_salt, timeout=self._timeout)
        )

    def follows(self, endpoint: str) -> bool:
        return endpoint in self._known

    def report(self, endpoint: str, predicted: int, cached: int, prompt: int) -> None:
        if len(self._reports) < MAX_REPORTS:
            self._reports.append((endpoint, predicted, cached, prompt))

    def describe(self) -> dict[str, object]:
        return {
            "mode": self.mode,
            "daemon": self._client.address,
            "endpoints_followed": sorted(self._known),
            "error": self._error,
        }

    async def _exchange(self) -> None:
        try:
            self._known = frozenset(await self._client.endpoints())
            reports, self._reports = self._reports, []
            if reports:
                try:
                    await self._client.report(reports)
                except ServiceError:
                    self._reports = (reports + self._reports)[:MAX_REPORTS]
                    raise
        except ServiceError as error:
            if self._error is None or self._error == "not asked yet":
                self._log.error("the daemon does not answer; routing goes by load", error=str(error))
            self._error = str(error)
        else:
            if self._error is not None:
                self._log.info("the daemon answers", endpoints=sorted(self._known))
            self._error = None


def build(config: RouterConfig, table: EndpointTable, session: aiohttp.ClientSession) -> Lookup:
    """The lookup of the config's one `index` line."""
    if config.index == "none":
        return NoLookup()
    if config.index == "embedded":
        return EmbeddedLookup(config, table, session)
    assert isinstance(config.index, IndexSource)
    return DaemonLookup(config.index)


async def _every(seconds: float, work: Callable[[], Any]) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Exception:  # noqa: BLE001 - the exchange must outlive one failure; it is logged
            structlog.get_logger().exception("a background exchange failed")
