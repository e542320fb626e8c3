"""TLS and the bearer token, for the gRPC and the HTTP listener alike.

Probes carry neither token nor client certificate, so the health service and /healthz, /readyz need none.
"""

from __future__ import annotations

import hmac
import pathlib
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from aiohttp import web

from kvindex.errors import ConfigError
from kvindex.service.config import Tls

OPEN_METHODS = ("/grpc.health.v1.Health/",)
OPEN_PATHS = frozenset({"/healthz", "/readyz"})


def bearer(token: str) -> str:
    return f"Bearer {token}"


def is_authorized(header: str | None, token: str) -> bool:
    """Constant time in what the header holds."""
    return hmac.compare_digest((header or "").encode(), bearer(token).encode())


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    authority = _read("tls.client_ca", tls.client_ca) if tls.client_ca else None
    pair = (_read("tls.key", tls.key), _read("tls.cert", tls.cert))
    ssl_context(tls)  # grpcio reports a bad pair only in its log; this raises
    return grpc.ssl_server_credentials([pair], root_certificates=authority, require_client_auth=authority is not None)


def ssl_context(tls: Tls) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _read("tls.cert", tls.cert)
    _read("tls.key", tls.key)
    try:
        context.load_cert_chain(tls.cert, tls.key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(f"tls: {tls.cert} and {tls.key} are not a certificate and its key: {error}") from None
    if tls.client_ca:
        _read("tls.client_ca", tls.client_ca)
        try:
            context.load_verify_locations(tls.client_ca)
        except ssl.SSLError as error:
            raise ConfigError(f"tls.client_ca: {tls.client_ca} holds no certificates: {error}") from None
        context.verify_mode = ssl.CERT_OPTIONAL  # `http_guard` asks for it, except on the probes' paths
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted; kvindex has no way to ask for its password")


def _read(field: str, path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{field}: {path} cannot be read: {error.strerror}") from None


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without the token as UNAUTHENTICATED."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith(OPEN_METHODS):
            return handler
        given = next((v for k, v in details.invocation_metadata if k == "authorization"), None)
        if isinstance(given, str) and is_authorized(given, self._token):
            return handler
        return _refusal(handler)


def _refusal(handler: Any) -> Any:
    message = "this server wants metadata `authorization: Bearer <token>`, and the call has none or another one"

    async def unary(request: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)

    async def stream(request: Any, context: grpc.aio.ServicerContext) -> Any:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)
        yield  # makes it a generator, which the kind of method asks for

    if handler.request_streaming:
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
    else:
        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
    return make(
        stream if handler.response_streaming else unary, handler.request_deserializer, handler.response_serializer
    )


def http_guard(token: str | None, *, client_certificates: bool) -> Any:
    """An aiohttp middleware with the same rules."""

    @web.middleware
    async def guard(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path not in OPEN_PATHS:
            transport = request.transport
            if client_certificates and not (transport and transport.get_extra_info("peercert")):
                return web.json_response({"error": "a client certificate is required here"}, status=401)
            if token is not None and not is_authorized(request.headers.get("Authorization"), token):
                return web.json_response(
                    {"error": "send `Authorization: Bearer <token>`"},
                    status=401,
                    headers={"WWW-Authenticate": "Bearer"},
                )
        return await handler(request)

    return guard
