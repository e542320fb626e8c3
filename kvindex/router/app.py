"""The router as a whole: one listener, one table of endpoints, one scheduler, and the paths that it answers itself."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import pathlib
import ssl
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import aiohttp
import msgspec
import structlog

from kvindex.errors import ConfigError, ServiceError
from kvindex.router import lookup_live, schedule, wire
from kvindex.router.client import ClientConnection, Request, Role, Work
from kvindex.router.config import EndpointConfig, RouterConfig
from kvindex.router.endpoints import EndpointTable
from kvindex.router.metrics import Metrics
from kvindex.router.prompts import Prompts
from kvindex.router.schedule import Decision
from kvindex.router.scrape import Scraper
from kvindex.router.work import Forward, Immediate
from kvindex.service import auth, yamlfile
from kvindex.service.config import address, read_token

CHECK_SECONDS = 0.25
OPEN_PATHS = (b"/healthz", b"/health", b"/readyz")  # what probes ask, without a token and on every listener
JSON, TEXT = b"application/json", b"text/plain; version=0.0.4; charset=utf-8"


class EndpointsFile(msgspec.Struct, frozen=True):
    """The file-discovery form: a list of endpoints, in YAML or JSON."""

    endpoints: tuple[EndpointConfig, ...] = ()


class Router:
    """The `Host` of client connections. Lives in one event loop."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.limits, self.timeouts = config.limits, config.timeouts
        self.loop = asyncio.get_running_loop()
        self.connections: set[ClientConnection] = set()
        self.buffered_bytes = 0
        self.draining = False
        self.log = structlog.get_logger().bind(component="router")
        self.metrics = Metrics()
        self.table = EndpointTable(config.limits, config.retry, self.loop)
        self.scheduler = schedule.build(config.scoring, self.loop.time)
        self.prompts = Prompts(config.tokenizers, config.limits.max_tokenizing, config.timeouts.tokenize_seconds)
        self.uses_prefix = config.index != "none" and config.scoring.policy == "score"
        self._token = read_token(None, config.token_file)
        self._recent: OrderedDict[str, tuple[Decision, str]] = OrderedDict()
        self._numbers = 0
        self._prefix = os.urandom(6).hex()
        self._file_seen: tuple[int, int, int] | None = None
        self._file_error = ""
        self._servers: list[asyncio.AbstractServer] = []
        self.port = 0

    # ------------------------------------------------------------------ life

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises ConfigError and ServiceError for what keeps it from starting."""
        self.table.replace((*self.config.endpoints, *self._file_endpoints(first=True)))
        async with aiohttp.ClientSession() as session:
            self.lookup = lookup_live.build(self.config, self.table, session)
            self.metrics.watch(self.table, self.lookup.mode, self.loop.time)
            scraper = Scraper(self.table, session, self.config.scrape_interval_seconds, self.loop.time)
            await self._listen()
            self._announce()
            await asyncio.gather(scraper.once(), self.lookup.start())
            tasks = [
                asyncio.create_task(scraper.run(), name="scrape"),
                asyncio.create_task(self._tick(), name="tick"),
                asyncio.create_task(stop.wait(), name="stop"),
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                await self._drain()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self.lookup.close()
                self.prompts.close()

    async def _listen(self) -> None:
        tls = auth.ssl_context(self.config.tls) if self.config.tls else None
        if tls is not None and self.config.tls and self.config.tls.client_ca:
            tls.verify_mode = ssl.CERT_REQUIRED
        clients: Role = "both" if self.config.admin is None else "clients"
        roles: tuple[tuple[str, str | None, Role], ...] = (
            ("listen", self.config.listen, clients),
            ("admin", self.config.admin, "admin"),
        )
        for field, where, role in roles:
            if where is None:
                continue
            at = address(where)
            try:
                server = await self.loop.create_server(
                    functools.partial(ClientConnection, self, role), at.host, at.port, ssl=tls, reuse_address=True
                )
            except OSError as error:
                raise ServiceError(f"{field}: cannot listen on {where}: {error.strerror or error}") from None
            self._servers.append(server)
            self.port = self.port or server.sockets[0].getsockname()[1]

    def _announce(self) -> None:
        names = [endpoint.id for endpoint in self.table.by_id.values()]
        self.log.info("listening", port=self.port, policy=self.config.scoring.policy, endpoints=names)
        if self.config.scoring.policy == "score" and self.lookup.mode == "none":
            self.log.warning("no index is configured: requests are routed by load alone")
        elif self.uses_prefix and not self.config.tokenizers:
            self.log.warning("no tokenizers are configured: only prompts of token ids are routed by their prefix")

    async def _drain(self) -> None:
        self.draining = True
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            connection.drain()
        deadline = self.loop.time() + self.timeouts.drain_seconds
        while self.connections and self.loop.time() < deadline:
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.abort()
        for endpoint in self.table.by_id.values():
            endpoint.pool.close()
        await asyncio.sleep(0)
        self.log.info("stopped")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            now = self.loop.time()
            for connection in list(self.connections):
                connection.check(now)
            for endpoint in self.table.by_id.values():
                endpoint.pool.expire(now - self.timeouts.upstream_keepalive_seconds)
            self._watch_file()

    # ------------------------------------------------------------------ endpoints from a file

    def _watch_file(self) -> None:
        if self.config.endpoints_file is None:
            return
        with contextlib.suppress(OSError):
            found = pathlib.Path(self.config.endpoints_file).stat()
            if (found.st_mtime_ns, found.st_size, found.st_ino) == self._file_seen:
                return
        try:
            added, removed = self.table.replace((*self.config.endpoints, *self._file_endpoints(first=False)))
        except ConfigError as error:
            if str(error) != self._file_error:
                self.log.error("endpoints_file cannot be read; the old endpoints stay", error=str(error))
            self._file_error = str(error)
        else:
            self._file_error = ""
            if added or removed:
                self.log.info("endpoints changed", added=added, removed=removed)

    def _file_endpoints(self, first: bool) -> Iterable[EndpointConfig]:
        path = self.config.endpoints_file
        if path is None:
            return ()
        try:
            found = pathlib.Path(path).stat()
            self._file_seen = (found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError as error:
            if first:
                raise ConfigError(f"endpoints_file: {path} cannot be read: {error.strerror}") from None
            if self._file_seen is None:
                raise ConfigError(f"{path}: {error.strerror}") from None
            self._file_seen = None
            raise ConfigError(f"{path}: {error.strerror}") from None
        endpoints = yamlfile.load(path, EndpointsFile).endpoints
        names = [endpoint.id for endpoint in endpoints]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ConfigError(f"{path}: endpoints: {sorted(twice)} are given twice")
        return endpoints

    # ------------------------------------------------------------------ requests

    def work(self, connection: ClientConnection, request: Request) -> Work:
        path = request.path
        if self._token is not None and path not in OPEN_PATHS:
            header = request.header(b"authorization")
            if not auth.is_authorized(header.decode("latin-1") if header else None, self._token):
                return self._own(connection, request, 401, wire.error_body(401, "unauthorized", "a token is needed"))
        if request.method in (b"GET", b"HEAD") and (connection.role != "clients" or path in OPEN_PATHS):
            answer = self._admin(path)
            if answer is not None:
                return self._own(connection, request, *answer)
        if connection.role == "clients" and (path == b"/metrics" or path.startswith(b"/debug/")):
            return self._own(
                connection, request, 404, wire.error_body(404, "not_found", "this is on the admin listener")
            )
        if connection.role == "admin":
            return self._own(connection, request, 404, wire.error_body(404, "not_found", "this is the admin listener"))
        given = request.header(b"x-request-id")
        request_id = given.decode("latin-1")[:128] if given else self._next_id()
        return Forward(self, connection, request, request_id if request_id.isprintable() else self._next_id())

    def _next_id(self) -> str:
        self._numbers += 1
        return f"{self._prefix}-{self._numbers}"

    @staticmethod
    def _own(connection: ClientConnection, request: Request, status: int, body: bytes, kind: bytes = JSON) -> Work:
        return Immediate(connection, request, status, body, kind)

    def _admin(self, path: bytes) -> tuple[int, bytes, bytes] | tuple[int, bytes] | None:
        if path == b"/metrics":
            return 200, self.metrics.scrape(), TEXT
        if path in (b"/healthz", b"/health"):
            return 200, b'{"status":"ok"}'
        if path == b"/readyz":
            ready, said = self._ready()
            return 200 if ready else 503, json.dumps(said, indent=2).encode() + b"\n"
        if path.startswith(b"/debug/explain/"):
            request_id = path.removeprefix(b"/debug/explain/").decode("latin-1")
            found = self._recent.get(request_id)
            if found is None:
                message = f"request {request_id!r} is not among the last {self.config.explain_requests}"
                return 404, wire.error_body(404, "unknown_request", message)
            decision, degraded = found
            said = {"request": request_id, "degraded": degraded or None, **decision.explain()}
            return 200, json.dumps(said, indent=2).encode() + b"\n"
        return None

    def _ready(self) -> tuple[bool, dict[str, Any]]:
        now = self.loop.time()
        states = {endpoint.id: endpoint.state(now) for endpoint in self.table.by_id.values()}
        up = any(endpoint.available(now) for endpoint in self.table.by_id.values())
        ready = up and not self.draining
        return ready, {
            "ready": ready,
            "policy": self.config.scoring.policy,
            "index": self.lookup.describe(),
            "endpoints": states,
        }

    def refused(self, reason: str) -> None:
        self.metrics.refused.labels(reason).inc()

    def remember(self, request_id: str, decision: Decision, degraded: str) -> None:
        """Keep a pick for /debug/explain; the oldest goes."""
        self._recent[request_id] = (decision, degraded)
        while len(self._recent) > self.config.explain_requests:
            self._recent.popitem(last=False)

    @staticmethod
    def explain_line(decision: Decision) -> bytes:
        """A pick as one header line of JSON."""
        return json.dumps(decision.explain(), separators=(",", ":")).encode("ascii")
