"""node.yaml: everything that can be set about a daemon. Defaults are here and in `kvindex.index.config` only."""

from __future__ import annotations

import ipaddress
import os
import pathlib
import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from kvindex.errors import ConfigError
from kvindex.index.config import IndexConfig, PublisherOverride
from kvindex.service import yamlfile

DEFAULT_ENGINE = "http://127.0.0.1:8000"
DEFAULT_SOURCE = "tcp://127.0.0.1:5557"  # where vLLM publishes when nobody says otherwise

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
_ZMQ = re.compile(r"^(tcp://(\[[^\]]+\]|[^:/\s]+):\d{1,5}|ipc://.+|inproc://.+)$")


class Address(msgspec.Struct, frozen=True):
    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address(text: str) -> Address:
    """`host:port` or `[v6]:port`; raises ValueError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: write an IPv6 address in brackets, [::1]:{port}")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not host:port")
    return Address(host, int(port))


class Listen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Loopback unless set otherwise. Port 0 takes any free port; the log says which."""

    grpc: str = "127.0.0.1:50151"
    http: str = "127.0.0.1:9151"

    def __post_init__(self) -> None:
        for field in ("grpc", "http"):
            try:
                address(getattr(self, field))
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from None


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PEM files. With `client_ca`, gRPC and HTTP clients must show a certificate that it signed."""

    cert: str
    key: str
    client_ca: str | None = None


class Unsaid(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What nothing on the wire says of a publisher; see `kvindex.index.protocol.Publisher`."""

    model: str | None = None
    eagle: bool = False
    key_domain: str | None = None
    persistent_tiers: frozenset[str] = frozenset()
    offload_chunk_tokens: Count | None = None

    def override(self, source: str, endpoint: str | None, default_endpoint: str | None = None) -> PublisherOverride:
        return PublisherOverride(
            source=source,
            endpoint=endpoint,
            default_endpoint=default_endpoint,
            model=self.model,
            eagle=self.eagle,
            key_domain=self.key_domain,
            persistent_tiers=self.persistent_tiers,
            offload_chunk_tokens=self.offload_chunk_tokens,
        )


class PublisherConfig(Unsaid, frozen=True, forbid_unknown_fields=True):
    """One ZMQ socket that publishes KV events. With `bind` the daemon binds and engines connect to it."""

    source: str
    replay: str | None = None
    topic: str = ""
    bind: bool = False
    endpoint: str | None = None

    def __post_init__(self) -> None:
        for field in ("source", "replay"):
            value = getattr(self, field)
            if value is not None and not _ZMQ.match(value):
                raise ValueError(f"{field}: {value!r} is not tcp://host:port or ipc://path")
        if "*" in self.source and not self.bind:
            raise ValueError(f"source: {self.source!r} names no host to connect to; name one, or set bind: true")


class EngineConfig(Unsaid, frozen=True, forbid_unknown_fields=True):
    """One inference server; where it publishes is asked of it (`GET /kv_event_sources`)."""

    url: str
    name: str | None = None
    fallback: str | None = None  # the source to take when the engine does not tell

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url: {self.url!r} is not http://host:port")
        if self.fallback is not None and not _ZMQ.match(self.fallback):
            raise ValueError(f"fallback: {self.fallback!r} is not tcp://host:port or ipc://path")


class PublishersFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `publishers_file` holds: the same entries as in node.yaml, read again whenever the file changes."""

    publishers: tuple[PublisherConfig, ...] = ()


class QueueConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may wait between the sockets and the index. What does not fit is dropped, counted and asked for again."""

    max_messages: Count = 20_000
    max_bytes: Count = 256 << 20


class LimitsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`max_request_bytes` bounds one gRPC message or HTTP body, `max_prompt_tokens` one prompt."""

    max_request_bytes: Count = 16 << 20
    max_prompt_tokens: Count = 2_000_000
    max_streams: Count = 1_000


class LogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`auto`: JSON lines unless stderr is a terminal."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    listen: Listen = msgspec.field(default_factory=Listen)
    tls: Tls | None = None
    token: str | None = None
    token_file: str | None = None
    allow_insecure: bool = False
    publishers: tuple[PublisherConfig, ...] = ()
    publishers_file: str | None = None
    engines: tuple[str | EngineConfig, ...] = ()
    tokenizers: dict[str, str] = {}
    index: IndexConfig = msgspec.field(default_factory=IndexConfig)
    queue: QueueConfig = msgspec.field(default_factory=QueueConfig)
    limits: LimitsConfig = msgspec.field(default_factory=LimitsConfig)
    probe_interval_seconds: Seconds = 5.0
    connect_deadline_seconds: Seconds = 30.0
    drain_deadline_seconds: Seconds = 10.0
    log: LogConfig = msgspec.field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.token is not None and self.token_file is not None:
            raise ValueError("token_file: is set, and so is token; keep one of them")
        for i, engine in enumerate(self.engines):
            if isinstance(engine, str):
                try:
                    EngineConfig(engine)
                except ValueError as error:
                    raise ValueError(f"engines[{i}]: {str(error).removeprefix('url: ')}") from None
        sources = [p.source for p in self.publishers]
        for i, source in enumerate(sources):
            if source in sources[:i] and self.publishers[i].topic == self.publishers[sources.index(source)].topic:
                raise ValueError(f"publishers[{i}]: source {source} is already publishers[{sources.index(source)}]")
        if not (self.tls or self.token or self.token_file or self.allow_insecure):
            for field in ("grpc", "http"):
                where = getattr(self.listen, field)
                if not address(where).is_loopback:
                    raise ValueError(
                        f"listen.{field}: {where} can be reached from other hosts, and neither tls "
                        "nor token is set; set one of them, or allow_insecure: true if the network itself is trusted"
                    )

    @property
    def all_engines(self) -> tuple[EngineConfig, ...]:
        """The engines to ask. With nothing configured at all: the vLLM on this host."""
        if not (self.engines or self.publishers or self.publishers_file):
            return (EngineConfig(DEFAULT_ENGINE, fallback=DEFAULT_SOURCE),)
        return tuple(EngineConfig(e) if isinstance(e, str) else e for e in self.engines)


def load(path: str | None) -> NodeConfig:
    """The config of a file, or the defaults. Paths in it are relative to the file."""
    if path is None:
        return NodeConfig()
    config = yamlfile.load(path, NodeConfig)
    base = pathlib.Path(path).resolve().parent
    tls = config.tls and msgspec.structs.replace(
        config.tls,
        cert=_beside(base, config.tls.cert),
        key=_beside(base, config.tls.key),
        client_ca=config.tls.client_ca and _beside(base, config.tls.client_ca),
    )
    return msgspec.structs.replace(
        config,
        tls=tls,
        token_file=config.token_file and _beside(base, config.token_file),
        publishers_file=config.publishers_file and _beside(base, config.publishers_file),
        tokenizers={model: _beside(base, folder) for model, folder in config.tokenizers.items()},
    )


def read_token(token: str | None, token_file: str | None) -> str | None:
    """The token itself; a file may end with a newline. Raises ConfigError when it cannot be used."""
    if token_file is not None:
        try:
            token = pathlib.Path(token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"token_file: {token_file} cannot be read: {error}") from None
    if token is not None and (not token or not token.isascii() or not token.isprintable()):
        raise ConfigError(f"{'token_file' if token_file else 'token'}: must be printable ASCII and not empty")
    return token


def environment_token() -> str | None:
    """What clients use when no flag names a token: it keeps the secret out of the process list."""
    return os.environ.get("KVINDEX_TOKEN") or None


def _beside(base: pathlib.Path, path: str) -> str:
    return str(base / pathlib.Path(path).expanduser())
