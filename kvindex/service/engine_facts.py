"""What an engine says of itself over HTTP, gathered once. Anything it does not say is None."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from kvindex.errors import ServiceError

MAX_ANSWER_BYTES = 8 << 20


class EventSource(msgspec.Struct, frozen=True):
    """One rank of `GET /kv_event_sources`, as far as it matters here."""

    endpoint: str | None = None
    replay_endpoint: str | None = None
    topic: str = ""
    enable_kv_cache_events: bool = True


class Model(msgspec.Struct, frozen=True):
    """One entry of /v1/models. An adapter has a parent."""

    id: str
    parent: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[Model] = []


class Facts(msgspec.Struct, kw_only=True):
    """`sources` None: no such path (vLLM before 0.31, another engine). `cache`: labels of vllm:cache_config_info."""

    version: str | None = None
    models: list[Model] = []
    models_status: int = 200
    sources: dict[int, EventSource] | None = None
    cache: dict[str, str] = {}
    server_info: dict[str, Any] | None = None

    @property
    def base_model(self) -> Model | None:
        return next((m for m in self.models if m.parent is None), None)

    @property
    def release(self) -> tuple[int, int] | None:
        match = re.match(r"v?(\d+)\.(\d+)", self.version or "")
        return (int(match[1]), int(match[2])) if match else None

    @property
    def block_size(self) -> int | None:
        text = self.cache.get("block_size", "")
        return int(text) if text.isdecimal() and int(text) else None


class Engine:
    """One engine's HTTP side. Every call ends within `timeout_seconds`; failures are ServiceErrors."""

    def __init__(
        self, url: str, session: aiohttp.ClientSession, *, api_key: str | None = None, timeout_seconds: float = 10.0
    ) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)

    async def ask(self, path: str, json: object = None, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        method = "GET" if json is None else "POST"
        try:
            async with self._session.request(
                method, self.url + path, json=json, headers={**self._headers, **(headers or {})}, timeout=self._timeout
            ) as answer:
                body = bytearray()
                async for piece in answer.content.iter_chunked(1 << 16):
                    body += piece
                    if len(body) > MAX_ANSWER_BYTES:
                        raise ServiceError(f"{self.url}{path}: the answer is larger than {MAX_ANSWER_BYTES} bytes")
                return answer.status, bytes(body)
        except aiohttp.ClientConnectorError as failure:
            why = os.strerror(failure.os_error.errno) if failure.os_error.errno else str(failure.os_error)
            raise ServiceError(f"{self.url}: cannot connect: {why}") from None
        except (aiohttp.ClientError, OSError, ValueError, asyncio.TimeoutError, TimeoutError) as failure:
            raise ServiceError(f"{self.url}{path}: {str(failure) or 'no answer in time'}") from None

    async def facts(self) -> Facts:
        """Everything that can be asked without changing anything."""
        facts = Facts()
        facts.version = await self._version()
        facts.models_status, models = await self._json("/v1/models", _Models)
        facts.models = models.data if models else []
        status, sources = await self._json("/kv_event_sources", dict[int, EventSource | None])
        facts.sources = {r: s for r, s in (sources or {}).items() if s is not None} if status == 200 else None
        facts.cache = await self._cache_config()
        _, facts.server_info = await self._json("/server_info?config_format=json", dict[str, Any])
        return facts

    async def _version(self) -> str | None:
        _, said = await self._json("/version", dict[str, Any])
        return str(said["version"]) if said and "version" in said else None

    async def _json(self, path: str, kind: Any) -> tuple[int, Any]:
        """(status, decoded answer or None)."""
        status, body = await self.ask(path)
        if status != 200:
            return status, None
        try:
            return status, msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, RecursionError):
            return status, None

    async def _cache_config(self) -> dict[str, str]:
        status, body = await self.ask("/metrics")
        if status != 200:
            return {}
        try:
            for family in text_string_to_metric_families(body.decode("utf-8", "replace")):
                if family.name == "vllm:cache_config_info":
                    return next((dict(sample.labels) for sample in family.samples), {})
        except ValueError:
            pass
        return {}
