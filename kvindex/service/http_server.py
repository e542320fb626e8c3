"""The HTTP listener: /metrics, /healthz, /readyz, /debug/publishers, POST /v1/feedback."""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec
from aiohttp import web
from google.protobuf.json_format import MessageToDict

from kvindex.errors import ConfigError, ServiceError
from kvindex.service import auth, yamlfile
from kvindex.service.audit import Observation
from kvindex.service.config import LimitsConfig, Tls, address
from kvindex.service.lookups import Lookups
from kvindex.service.metrics import Metrics
from kvindex.service.status import Status

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TokenCount = Annotated[int, msgspec.Meta(ge=0)]


class Reported(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of what /v1/feedback takes."""

    endpoint: str
    predicted_tokens: TokenCount
    cached_tokens: TokenCount
    prompt_tokens: TokenCount = 0


class Feedback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    observations: tuple[Reported, ...]


class HttpServer:
    def __init__(
        self,
        lookups: Lookups,
        status: Status,
        metrics: Metrics,
        limits: LimitsConfig,
        *,
        listen: str,
        tls: Tls | None,
        token: str | None,
    ) -> None:
        self._lookups, self._status, self._metrics = lookups, status, metrics
        self._address = address(listen)
        self._ssl = auth.ssl_context(tls) if tls else None
        guard = auth.http_guard(token, client_certificates=bool(tls and tls.client_ca))
        app = web.Application(middlewares=[guard], client_max_size=limits.max_request_bytes)
        app.add_routes(
            [
                web.get("/metrics", self._scrape),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/debug/publishers", self._publishers),
                web.post("/v1/feedback", self._feedback),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        self._stopping = False
        self.port = 0

    async def start(self) -> None:
        """Raises ServiceError when the address cannot be had."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._address.host, self._address.port, ssl_context=self._ssl)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise ServiceError(f"listen.http: cannot listen on {self._address}: {error.strerror or error}") from None
        self.port = self._runner.addresses[0][1]

    def drain(self) -> None:
        """From now on /readyz says no, so that balancers look elsewhere."""
        self._stopping = True

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _scrape(self, request: web.Request) -> web.Response:
        del request
        return web.Response(body=self._metrics.scrape(), headers={"Content-Type": METRICS_TYPE})

    async def _healthz(self, request: web.Request) -> web.Response:
        del request
        return web.json_response({"status": "ok"})

    async def _readyz(self, request: web.Request) -> web.Response:
        del request
        waiting = self._status.waiting_for()
        ready = not self._stopping and not waiting
        return web.json_response(
            {"ready": ready, "stopping": self._stopping, "waiting_for": waiting}, status=200 if ready else 503
        )

    async def _publishers(self, request: web.Request) -> web.Response:
        del request
        publishers = MessageToDict(
            self._status.publishers_response(),
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
        endpoints = MessageToDict(
            self._status.endpoints_response(),
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
        return _pretty({**publishers, "endpoints": endpoints["endpoints"]})

    async def _feedback(self, request: web.Request) -> web.Response:
        try:
            feedback = yamlfile.convert(msgspec.json.decode(await request.read()), Feedback)
        except (msgspec.DecodeError, ConfigError) as error:
            return web.json_response({"error": str(error)}, status=400)
        unknown = self._lookups.report(
            Observation(o.endpoint, o.predicted_tokens, o.cached_tokens, o.prompt_tokens) for o in feedback.observations
        )
        return web.json_response({"unknown": unknown})


def _pretty(document: dict[str, Any]) -> web.Response:
    return web.json_response(text=json.dumps(document, indent=2) + "\n")
