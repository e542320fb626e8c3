"""Each endpoint's own word on its load and its models: GET /metrics and GET /v1/models, off the request path."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec
import structlog
from prometheus_client.parser import text_string_to_metric_families

from kvindex.router.endpoints import Endpoint, EndpointTable

MAX_BYTES = 8 << 20
_FIELDS = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
}


class _Model(msgspec.Struct):
    id: str
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model] = []


class Scraper:
    """`run` scrapes every endpoint each interval until cancelled. A failure is shown in the endpoint's state."""

    def __init__(
        self,
        table: EndpointTable,
        session: aiohttp.ClientSession,
        interval_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._table, self._session, self._clock = table, session, clock
        self._interval = interval_seconds
        self._timeout = aiohttp.ClientTimeout(total=max(interval_seconds, 2.0))
        self._log = structlog.get_logger().bind(component="scrape")

    async def run(self) -> None:
        while True:
            await self.once()
            await asyncio.sleep(self._interval)

    async def once(self) -> None:
        await asyncio.gather(*(self._endpoint(endpoint) for endpoint in self._table.by_id.values()))

    async def _endpoint(self, endpoint: Endpoint) -> None:
        try:
            if endpoint.config.model is None:
                raw = await self._get(f"{endpoint.url}/v1/models")
                endpoint.models = {m.id: m.parent for m in msgspec.json.decode(raw, type=_Models).data}
            _apply(endpoint, (await self._get(f"{endpoint.url}/metrics")).decode("utf-8", "replace"), self._clock())
        except (
            aiohttp.ClientError,
            asyncio.TimeoutError,
            TimeoutError,
            OSError,
            msgspec.MsgspecError,
            ValueError,
        ) as e:
            error = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
            if endpoint.scrape_error is None:
                self._log.warning("endpoint cannot be scraped", endpoint=endpoint.id, error=error)
            endpoint.scrape_error = error
            endpoint.scrape_errors += 1
        else:
            endpoint.scrape_error = None

    async def _get(self, url: str) -> bytes:
        async with self._session.get(url, timeout=self._timeout) as answer:
            if answer.status != 200:
                raise ValueError(f"{url} answered {answer.status}")
            body = await answer.content.read(MAX_BYTES + 1)
            while not answer.content.at_eof() and len(body) <= MAX_BYTES:
                body += await answer.content.read(MAX_BYTES + 1)
            if len(body) > MAX_BYTES:
                raise ValueError(f"{url} answered more than {MAX_BYTES} bytes")
            return body


def _apply(endpoint: Endpoint, text: str, now: float) -> None:
    """Take the gauges that routing uses; the label `engine` is the data-parallel rank."""
    wanted = "\n".join(line for line in text.splitlines() if line.startswith(tuple(_FIELDS)))
    found: dict[tuple[int, str], float] = {}
    for family in text_string_to_metric_families(wanted + "\n"):
        for sample in family.samples:
            field = _FIELDS.get(sample.name)
            if field is not None:
                rank = _rank(sample.labels)
                found[rank, field] = found.get((rank, field), 0.0) + float(sample.value)
    for target in endpoint.targets:
        target.running = int(found.get((target.rank, "running"), 0))
        target.waiting = int(found.get((target.rank, "waiting"), 0))
        target.kv_usage = found.get((target.rank, "kv_usage"), 0.0)
        target.scraped_at = now


def _rank(labels: dict[str, Any]) -> int:
    engine = str(labels.get("engine", "0"))
    return int(engine) if engine.isdecimal() else 0
