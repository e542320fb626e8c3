"""Where publishers are: told in a config, read from a watched file, or asked of the engine itself.

A finder is looked at again and again. It never raises for what it finds: when a look fails it returns what it found
before and says why in `error`, so that a bad edit or an engine that restarts takes no stream down.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import aiohttp
import msgspec

from kvindex.errors import ConfigError
from kvindex.events.subscriber import SourceConfig

_MAX_ANSWER_BYTES = 1 << 20
_MAX_RANKS = 4096


class Source(msgspec.Struct, frozen=True):
    """One socket to read. `rank` and `engine` (its URL) when an engine told; `about` is whatever the owner attaches,
    for example the config entry that it came from."""

    socket: SourceConfig
    engine: str | None = None
    rank: int | None = None
    about: object = None


class Finder(Protocol):
    """`where` names it for people. `error` is why the last look failed, None when it did not."""

    where: str
    error: str | None
    interval_seconds: float

    async def look(self) -> tuple[Source, ...]: ...


class StaticSources:
    """What a config says. Never changes."""

    def __init__(self, sources: Iterable[Source], where: str = "config") -> None:
        self.where = where
        self.error: str | None = None
        self.interval_seconds = 3600.0
        self._sources = tuple(sources)

    async def look(self) -> tuple[Source, ...]:
        return self._sources


class WatchedFile:
    """A file that is decoded again whenever it changes. `decode` raises ConfigError for a bad one."""

    def __init__(
        self, path: str | Path, decode: Callable[[Path], Iterable[Source]], *, interval_seconds: float = 1.0
    ) -> None:
        self.where = str(path)
        self.error: str | None = None
        self.interval_seconds = interval_seconds
        self._path = Path(path)
        self._decode = decode
        self._good: tuple[int, int, int] | None = None  # the file that `_sources` came from
        self._sources: tuple[Source, ...] = ()

    async def look(self) -> tuple[Source, ...]:
        try:
            found = self._path.stat()
            signature = (found.st_mtime_ns, found.st_size, found.st_ino)
            if signature != self._good or self.error is not None:
                # Decoded again also after a failure: a file that was read half-written may have the same signature.
                self._sources = tuple(self._decode(self._path))
                self._good = signature
            self.error = None
        except ConfigError as failure:
            self.error = str(failure)
        except OSError as failure:
            self.error = f"{self._path}: {failure.strerror or failure}"
        return self._sources


class _Entry(msgspec.Struct):
    """One rank of `GET /kv_event_sources` (vLLM 0.31 and later). Other fields are not ours."""

    endpoint: str | None = None
    replay_endpoint: str | None = None
    enable_kv_cache_events: bool = True


class EngineSources:
    """What a vLLM says of itself. Asked again, because an engine that restarts may choose other ports.

    `fallback` is taken while the engine cannot tell: vLLM before 0.31 and SGLang have no such path.
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        *,
        template: SourceConfig | None = None,
        fallback: SourceConfig | None = None,
        about: object = None,
        interval_seconds: float = 5.0,
        timeout_seconds: float = 3.0,
    ) -> None:
        self.where = url.rstrip("/")
        self.error: str | None = None
        self.interval_seconds = interval_seconds
        self._session = session
        self._template = template or SourceConfig(source="")
        self._about = about
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._host = urlsplit(self.where).hostname or "127.0.0.1"
        self._sources: tuple[Source, ...] = () if fallback is None else (Source(fallback, self.where, None, about),)

    async def look(self) -> tuple[Source, ...]:
        try:
            entries = await self._ask()
            self._sources = tuple([await self._source(rank, entry) for rank, entry in sorted(entries.items())])
            self.error = None if self._sources else f"{self.where}: publishes no KV events (--kv-events-config)"
        except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError, OSError) as failure:
            self.error = f"{self.where}: {str(failure) or type(failure).__name__}"
        except ConfigError as failure:
            self.error = str(failure)
        return self._sources

    async def _ask(self) -> dict[int, _Entry]:
        async with self._session.get(f"{self.where}/kv_event_sources", timeout=self._timeout) as answer:
            if answer.status != 200:
                raise ConfigError(
                    f"{self.where}: GET /kv_event_sources answered {answer.status}; before vLLM 0.31 and "
                    "on other engines name the source in the config"
                )
            body = bytearray()
            async for piece in answer.content.iter_chunked(1 << 16):
                body += piece
                if len(body) > _MAX_ANSWER_BYTES:
                    raise ConfigError(f"{self.where}: /kv_event_sources is larger than {_MAX_ANSWER_BYTES} bytes")
        try:
            entries = msgspec.json.decode(bytes(body), type=dict[int, _Entry])
        except (msgspec.DecodeError, ValueError, RecursionError) as failure:
            raise ConfigError(f"{self.where}: /kv_event_sources is not understood: {failure}") from None
        if len(entries) > _MAX_RANKS:
            raise ConfigError(f"{self.where}: /kv_event_sources lists {len(entries)} ranks, at most {_MAX_RANKS}")
        return {rank: e for rank, e in entries.items() if e.endpoint and e.enable_kv_cache_events}

    async def _source(self, rank: int, entry: _Entry) -> Source:
        assert entry.endpoint is not None
        reachable = at_host(entry.endpoint, self._host)
        socket = msgspec.structs.replace(
            self._template,
            source=reachable,
            replay=entry.replay_endpoint and at_host(entry.replay_endpoint, self._host),
            bind=reachable == entry.endpoint and await _calls_us(entry.endpoint),
        )
        return Source(socket, self.where, rank, self._about)


def at_host(endpoint: str, host: str) -> str:
    """An address that an engine listens on, as others reach it: `tcp://*:5557` on that host."""
    if not endpoint.startswith("tcp://"):
        return endpoint
    where, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if where not in ("*", "0.0.0.0", "[::]", "::", "[*]"):
        return endpoint
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


async def _calls_us(endpoint: str) -> bool:
    """Whether the engine connects to this address instead of listening on it (vLLM does for any without a wildcard).

    Then we have to listen, which we can only on an address of this host, and only where nobody does.
    """
    if not endpoint.startswith("tcp://"):
        return False
    where, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    where = where.strip("[]")
    if not port.isdecimal() or not (where == "localhost" or _is_local(where)):
        return False
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(where, int(port)), 1.0)
    except (OSError, TimeoutError, asyncio.TimeoutError):
        return True
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return False


def _is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == os.uname().nodename
    return address.is_loopback
