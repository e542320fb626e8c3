"""router.yaml: everything that can be set about a router. Defaults live here (and in `kvindex.index.config`) only."""

from __future__ import annotations

import pathlib
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from kvindex.errors import ConfigError
from kvindex.index.config import IndexConfig
from kvindex.router.config_example import EXAMPLE
from kvindex.service import yamlfile
from kvindex.service.config import PublisherConfig, Tls, address

__all__ = [
    "EXAMPLE",
    "EndpointConfig",
    "IndexSource",
    "Limits",
    "Policy",
    "Retry",
    "RouterConfig",
    "Scoring",
    "Timeouts",
    "load",
]

Seconds = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Policy = Literal["score", "load", "round-robin"]


class EndpointConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine. `url`, or `address` and `port`. `name` is what the index calls it (`pod`; its ranks `pod:dp1`, ...).

    `model` is only needed where the engine has no `/v1/models`. `weight` 2 means twice as fast as weight 1.
    """

    name: str
    url: str | None = None
    address: str | None = None
    port: int | str | None = None
    model: str | None = None
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    data_parallel_size: Count = 1
    namespace: str = "default"  # of the file-discovery form: part of the name when it is not `default`

    def __post_init__(self) -> None:
        if not self.name or not self.name.isascii() or not self.name.isprintable() or " " in self.name:
            raise ValueError(f"name: {self.name!r} is not printable ASCII without spaces")
        if (self.url is None) == (self.address is None):
            raise ValueError("url: give either url, or address and port")
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query:
                raise ValueError(f"url: {self.url!r} is not http://host:port")
            try:
                _ = parts.port
            except ValueError:
                raise ValueError(f"url: {self.url!r} has no port in 1..65535") from None
        elif not str(self.port or "").isdecimal() or not 0 < int(self.port or 0) < 65536:
            raise ValueError(f"port: {self.port!r} is not in 1..65535")

    @property
    def id(self) -> str:
        return self.name if self.namespace == "default" else f"{self.namespace}/{self.name}"

    @property
    def host_port(self) -> tuple[str, int]:
        if self.url is not None:
            parts = urlsplit(self.url)
            return str(parts.hostname), parts.port or 80
        return str(self.address), int(self.port or 0)


class IndexSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`index: {grpc: host:port}`: ask a daemon. `timeout_seconds` is the longest that a request waits for it."""

    grpc: str
    timeout_seconds: Seconds = 0.25
    ca: str | None = None  # PEM file; turns TLS on
    token_file: str | None = None

    def __post_init__(self) -> None:
        try:
            address(self.grpc)
        except ValueError as error:
            raise ValueError(f"grpc: {error}") from None


class Scoring(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a request's time to first token is estimated; the endpoint with the lowest estimate wins.

    estimate = (own uncached tokens + uncached tokens already sent there) / prefill rate
             + requests there x request_cost_seconds + requests waiting there x waiting_cost_seconds
    The prefix saves what the index says it saves, times `prefix_weight`; the rest is multiplied by `load_weight`.
    """

    policy: Policy = "score"
    prefill_tokens_per_second: Annotated[float, msgspec.Meta(gt=0)] = 8_000.0
    request_cost_seconds: NotNegative = 0.01
    waiting_cost_seconds: NotNegative = 0.2
    prefix_weight: NotNegative = 1.0
    load_weight: NotNegative = 1.0


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_header_bytes: Count = 32 << 10
    max_headers: Count = 128
    max_body_bytes: Count = 64 << 20
    max_buffered_bytes: Count = 1 << 30  # all request bodies together; beyond it 503
    max_connections: Count = 20_000
    max_idle_per_endpoint: Count = 256  # kept-alive connections to one endpoint
    max_tokenizing: Count = 64  # prompts waiting for the tokeniser; beyond it a request is routed without its prefix


class Timeouts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every wait has an end. `upstream_keepalive_seconds` must be below the engines' own (vLLM: 5)."""

    request_seconds: Seconds = 120.0  # from a request's first byte to its last
    keepalive_seconds: Seconds = 75.0  # between two requests of a client
    client_stall_seconds: Seconds = 60.0  # a client that reads nothing of its answer
    tokenize_seconds: Seconds = 2.0
    connect_seconds: Seconds = 3.0
    first_byte_seconds: Seconds = 600.0
    idle_seconds: Seconds = 300.0  # between two pieces of an answer
    upstream_keepalive_seconds: Seconds = 4.0
    drain_seconds: Seconds = 30.0


class Retry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An endpoint that refused rests for `backoff_seconds`, doubled each time it refuses again, up to the maximum."""

    max_attempts: Count = 3
    backoff_seconds: Seconds = 0.5
    max_backoff_seconds: Seconds = 8.0


class RouterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    listen: str = "127.0.0.1:8080"
    tls: Tls | None = None
    token_file: str | None = None  # clients then send `Authorization: Bearer <token>`
    admin: str | None = None  # host:port of /metrics and /debug; None: on `listen`
    endpoints: tuple[EndpointConfig, ...] = ()
    endpoints_file: str | None = None
    index: Literal["embedded", "none"] | IndexSource = "embedded"
    index_settings: IndexConfig = msgspec.field(default_factory=IndexConfig)
    publishers: tuple[PublisherConfig, ...] = ()  # for `embedded`: besides those that the endpoints tell of
    tokenizers: dict[str, str] = msgspec.field(default_factory=dict)  # model -> folder with tokenizer.json
    scoring: Scoring = msgspec.field(default_factory=Scoring)
    limits: Limits = msgspec.field(default_factory=Limits)
    timeouts: Timeouts = msgspec.field(default_factory=Timeouts)
    retry: Retry = msgspec.field(default_factory=Retry)
    scrape_interval_seconds: Seconds = 1.0
    explain_requests: Count = 1024  # how many recent picks /debug/explain remembers
    log: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        for field in ("listen", "admin"):
            value = getattr(self, field)
            try:
                _ = value is None or address(value)
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from None
        seen: set[str] = set()
        for position, endpoint in enumerate(self.endpoints):
            if endpoint.id in seen:
                raise ValueError(f"endpoints[{position}].name: {endpoint.id!r} is given twice")
            seen.add(endpoint.id)
        if not self.endpoints and self.endpoints_file is None:
            raise ValueError("endpoints: give a list of endpoints, or an endpoints_file")


def load(path: str | pathlib.Path) -> RouterConfig:
    """Read router.yaml; relative paths in it are relative to it. Raises ConfigError."""
    config = yamlfile.load(path, RouterConfig)
    base = pathlib.Path(path).resolve().parent
    for model, folder in config.tokenizers.items():
        if not (base / folder / "tokenizer.json").is_file():
            raise ConfigError(f"{path}: tokenizers.{model}: {folder!r} is not a folder with a tokenizer.json")

    def resolved(value: str | None) -> str | None:
        return None if value is None else str(base / value)

    return msgspec.structs.replace(
        config,
        endpoints_file=resolved(config.endpoints_file),
        token_file=resolved(config.token_file),
        tokenizers={model: str(base / folder) for model, folder in config.tokenizers.items()},
        tls=config.tls
        and msgspec.structs.replace(
            config.tls,
            cert=str(base / config.tls.cert),
            key=str(base / config.tls.key),
            client_ca=resolved(config.tls.client_ca),
        ),
    )
