"""Clients of a daemon: `AsyncIndexClient` for the router, `IndexClient` for commands and scripts.

Every call has a deadline. Both answer as `kvindex.Index` does; they raise UsageError for a question that the daemon
refuses, TokenizerError where it has no tokenizer, and ServiceError when it cannot be reached, is too late, or failed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypedDict

import grpc
import grpc.aio
import numpy as np

from kvindex.errors import ConfigError, ServiceError, TokenizerError, UsageError
from kvindex.events.model import Tokens
from kvindex.index.protocol import BlockView, MultiModalItem
from kvindex.scoring.result import Scores
from kvindex.service import auth, wire
from kvindex.service.pb import index_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", 256 << 20),
    # a daemon that was away is tried again soon: gRPC's own back-off goes up to two minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]

TokenIds = Tokens | Sequence[int]


class About(TypedDict, total=False):
    """What besides its tokens says which prompt it is. `prompt` instead of token ids: the daemon tokenises."""

    prompt: str | None
    lora: str | None
    cache_salt: str | None
    mm: Iterable[Mapping[str, Any] | MultiModalItem]
    endpoints: Iterable[str] | None


class _Method(NamedTuple):
    request: Any
    response: Any


_METHODS = {
    "Score": _Method(pb.ScoreRequest, pb.ScoreResponse),
    "Explain": _Method(pb.ExplainRequest, pb.ExplainResponse),
    "Endpoints": _Method(pb.EndpointsRequest, pb.EndpointsResponse),
    "Publishers": _Method(pb.PublishersRequest, pb.PublishersResponse),
    "Report": _Method(pb.ReportRequest, pb.ReportResponse),
}


def scores(response: pb.ScoreResponse) -> Scores:
    """A Score answer as the columns that an embedded index gives."""
    return Scores(
        list(response.endpoints),
        np.array(response.blocks, np.int64),
        np.array(response.tokens, np.int64),
        np.array(response.score, np.float64),
        np.array(response.seconds_saved, np.float64),
        list(response.state),
        np.array(response.lag_seconds, np.float64),
        {tier.name: np.array(tier.blocks, np.int64) for tier in response.tiers},
    )


class _Client:
    """Stubs, metadata and errors. `ca` (a PEM file) turns TLS on; `cert` and `key` are for daemons that ask for one;
    `server_name` replaces the address in the check of the daemon's certificate."""

    def __init__(
        self,
        grpc_module: Any,
        address: str,
        ca: str | None,
        token: str | None,
        cert: str | None,
        key: str | None,
        server_name: str | None,
    ) -> None:
        self.address = address
        named = [("grpc.ssl_target_name_override", server_name)] if server_name else []
        credentials = _credentials(ca, cert, key)
        self._channel = (
            grpc_module.insecure_channel(address, options=_OPTIONS)
            if credentials is None
            else grpc_module.secure_channel(address, credentials, options=[*_OPTIONS, *named])
        )
        self._metadata = (("authorization", auth.bearer(token)),) if token else ()
        self._calls = {
            name: self._channel.unary_unary(
                f"/{wire.SERVICE}/{name}",
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
            for name, method in _METHODS.items()
        }

    def _fail(self, error: Any) -> NoReturn:
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            raise UsageError(details) from None
        if code is grpc.StatusCode.FAILED_PRECONDITION and "tokenizer" in details:
            raise TokenizerError(details) from None
        raise ServiceError(f"daemon at {self.address}: {code.name}: {details}") from None


class AsyncIndexClient(_Client):
    """Lives in one event loop; any number of calls at once share one connection."""

    def __init__(
        self,
        address: str,
        *,
        ca: str | None = None,
        token: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        server_name: str | None = None,
    ) -> None:
        super().__init__(grpc.aio, address, ca, token, cert, key, server_name)

    async def call(self, name: str, request: Any, timeout: float) -> Any:
        try:
            return await self._calls[name](request, timeout=timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            self._fail(error)

    async def score(
        self,
        token_ids: TokenIds | None = None,
        model: str | None = None,
        *,
        timeout: float = 1.0,
        **about: Unpack[About],
    ) -> Scores:
        return scores(await self.call("Score", wire.fill(pb.ScoreRequest(), token_ids, model, **about), timeout))

    async def endpoints(self, timeout: float = 1.0) -> list[str]:
        response = await self.call("Endpoints", pb.EndpointsRequest(protocol=wire.PROTOCOL), timeout)
        return [endpoint.name for endpoint in response.endpoints]

    async def report(self, seen: Iterable[tuple[str, int, int, int]], timeout: float = 1.0) -> list[str]:
        """(endpoint, predicted, cached, prompt tokens) of answered requests; returns the endpoints that are unknown."""
        return list((await self.call("Report", _report(seen), timeout)).unknown)

    async def close(self) -> None:
        await self._channel.close()


class IndexClient(_Client):
    """Blocking and thread-safe. A context manager."""

    def __init__(
        self,
        address: str,
        *,
        ca: str | None = None,
        token: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        server_name: str | None = None,
        timeout: float = 10.0,
    ) -> None:
        super().__init__(grpc, address, ca, token, cert, key, server_name)
        self._timeout = timeout

    def __enter__(self) -> IndexClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def call(self, name: str, request: Any) -> Any:
        try:
            return self._calls[name](request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            self._fail(error)

    def score(self, token_ids: TokenIds | None = None, model: str | None = None, **about: Unpack[About]) -> Scores:
        return scores(self.call("Score", wire.fill(pb.ScoreRequest(), token_ids, model, **about)))

    def explain(
        self, token_ids: TokenIds | None = None, model: str | None = None, **about: Unpack[About]
    ) -> list[BlockView]:
        return wire.block_views(self.call("Explain", wire.fill(pb.ExplainRequest(), token_ids, model, **about)))

    def endpoints(self) -> pb.EndpointsResponse:
        response: pb.EndpointsResponse = self.call("Endpoints", pb.EndpointsRequest(protocol=wire.PROTOCOL))
        return response

    def publishers(self) -> pb.PublishersResponse:
        response: pb.PublishersResponse = self.call("Publishers", pb.PublishersRequest(protocol=wire.PROTOCOL))
        return response

    def report(self, seen: Iterable[tuple[str, int, int, int]]) -> list[str]:
        """As AsyncIndexClient.report."""
        return list(self.call("Report", _report(seen)).unknown)


def _report(seen: Iterable[tuple[str, int, int, int]]) -> pb.ReportRequest:
    request = pb.ReportRequest(protocol=wire.PROTOCOL)
    for endpoint, predicted, cached, prompt in seen:
        request.observations.add(
            endpoint=endpoint, predicted_tokens=predicted, cached_tokens=cached, prompt_tokens=prompt
        )
    return request


def _credentials(ca: str | None, cert: str | None, key: str | None) -> grpc.ChannelCredentials | None:
    if ca is None and (cert or key):
        raise ConfigError("cert, key: only make sense together with ca")
    if (cert is None) != (key is None):
        raise ConfigError("cert, key: one of them is missing")
    if ca is None:
        return None
    return grpc.ssl_channel_credentials(_read("ca", ca), key and _read("key", key), cert and _read("cert", cert))


def _read(field: str, path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{field}: {path} cannot be read: {error.strerror or error}") from None
