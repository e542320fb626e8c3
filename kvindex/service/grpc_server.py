"""The gRPC listener: kvindex.v1.IndexService, llm-d's indexer.v1.IndexerService, health and reflection.

Only messages are generated from proto/; methods are registered by hand, which needs no generator plug-in.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvindex.errors import ServiceError, TokenizerError, UsageError
from kvindex.service import auth, wire
from kvindex.service.audit import Observation
from kvindex.service.config import LimitsConfig, Tls, address
from kvindex.service.lookups import Lookups
from kvindex.service.metrics import Metrics
from kvindex.service.pb import index_pb2, indexer_pb2
from kvindex.service.status import Status
from kvindex.service.tokenizing import NoTokenizer

INDEXER_SERVICE = "indexer.v1.IndexerService"
SETTLE_SECONDS = 0.05
SERVICES = (wire.SERVICE, INDEXER_SERVICE)

T = TypeVar("T")
Code = grpc.StatusCode
Context: TypeAlias = grpc.aio.ServicerContext


class GrpcServer:
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
        self._server = grpc.aio.server(
            interceptors=[auth.TokenInterceptor(token)] if token else [],
            maximum_concurrent_rpcs=limits.max_streams,
            options=[
                ("grpc.max_receive_message_length", limits.max_request_bytes),
                ("grpc.so_reuseport", 0),  # a second daemon on the port must fail, not take half of the calls
            ],
        )
        self._server.add_generic_rpc_handlers((self._index_handlers(), self._indexer_handlers()))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._listen, self._credentials = listen, auth.server_credentials(tls) if tls else None
        self.port = 0
        self._busy = 0  # calls and stream messages that are being answered

    async def start(self) -> None:
        """Raises ServiceError when the address cannot be had."""
        try:
            if self._credentials is not None:
                self.port = self._server.add_secure_port(self._listen, self._credentials)
            else:
                self.port = self._server.add_insecure_port(self._listen)
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise ServiceError(f"listen.grpc: cannot listen on {self._listen}: {_why_not(self._listen)}")
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()

    async def serving(self, ready: bool) -> None:
        """What the health service says of every service."""
        state = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *SERVICES):
            await self._health.set(service, state)

    async def stop(self, deadline_seconds: float) -> None:
        """Refuse new calls, let those in flight end, cut them at the deadline. A stream that waits for its client's
        next question is not in flight."""
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.create_task(self._server.stop(deadline_seconds))
        idle = 0
        while idle < 2 and not stopping.done():  # twice, so that the last answer has left
            await asyncio.sleep(SETTLE_SECONDS)
            idle = 0 if self._busy else idle + 1
        await self._server.stop(0)
        await stopping

    # -- kvindex.v1.IndexService

    def _index_handlers(self) -> grpc.GenericRpcHandler:
        pb = index_pb2
        return grpc.method_handlers_generic_handler(
            wire.SERVICE,
            {
                "Score": _unary(self._score_call, pb.ScoreRequest, pb.ScoreResponse),
                "ScoreStream": grpc.stream_stream_rpc_method_handler(
                    self._score_stream, pb.ScoreRequest.FromString, pb.ScoreResponse.SerializeToString
                ),
                "Explain": _unary(self._explain, pb.ExplainRequest, pb.ExplainResponse),
                "Endpoints": _unary(self._endpoints, pb.EndpointsRequest, pb.EndpointsResponse),
                "Publishers": _unary(self._publishers, pb.PublishersRequest, pb.PublishersResponse),
                "Report": _unary(self._report, pb.ReportRequest, pb.ReportResponse),
            },
        )

    async def _score_call(self, request: index_pb2.ScoreRequest, context: Context) -> index_pb2.ScoreResponse:
        await self._check(request, context)
        return await self._answer(context, self._lookups.score(request, "score"))

    async def _score_stream(
        self, requests: AsyncIterator[index_pb2.ScoreRequest], context: Context
    ) -> AsyncIterator[index_pb2.ScoreResponse]:
        async for request in requests:
            self._busy += 1
            try:
                yield await self._stream_answer(request)
            finally:
                self._busy -= 1

    async def _stream_answer(self, request: index_pb2.ScoreRequest) -> index_pb2.ScoreResponse:
        try:
            _check_protocol(request)
            return await self._lookups.score(request, "score_stream")
        except (UsageError, TokenizerError) as error:
            code = _code_of(error)
            self._metrics.refused.labels(code.name).inc()
            return index_pb2.ScoreResponse(
                protocol=wire.PROTOCOL, id=request.id, error=index_pb2.Error(code=code.value[0], message=str(error))
            )

    async def _explain(self, request: index_pb2.ExplainRequest, context: Context) -> index_pb2.ExplainResponse:
        await self._check(request, context)
        return await self._answer(context, self._lookups.explain(request))

    async def _endpoints(self, request: index_pb2.EndpointsRequest, context: Context) -> index_pb2.EndpointsResponse:
        await self._check(request, context)
        return self._status.endpoints_response()

    async def _publishers(self, request: index_pb2.PublishersRequest, context: Context) -> index_pb2.PublishersResponse:
        await self._check(request, context)
        return self._status.publishers_response()

    async def _report(self, request: index_pb2.ReportRequest, context: Context) -> index_pb2.ReportResponse:
        await self._check(request, context)
        unknown = self._lookups.report(
            Observation(o.endpoint, o.predicted_tokens, o.cached_tokens, o.prompt_tokens) for o in request.observations
        )
        return index_pb2.ReportResponse(protocol=wire.PROTOCOL, unknown=unknown)

    # -- indexer.v1.IndexerService

    def _indexer_handlers(self) -> grpc.GenericRpcHandler:
        pb = indexer_pb2
        return grpc.method_handlers_generic_handler(
            INDEXER_SERVICE,
            {"GetPodScores": _unary(self._pod_scores, pb.GetPodScoresRequest, pb.GetPodScoresResponse)},
        )

    async def _pod_scores(
        self, request: indexer_pb2.GetPodScoresRequest, context: Context
    ) -> indexer_pb2.GetPodScoresResponse:
        pairs = await self._answer(
            context, self._lookups.pod_scores(request.model_name, request.prompt, request.pod_identifiers)
        )
        response = indexer_pb2.GetPodScoresResponse()
        for pod, score in pairs:
            response.scores.add(pod=pod, score=score)
        return response

    # -- errors

    async def _check(self, request: Any, context: Context) -> None:
        try:
            _check_protocol(request)
        except _WrongProtocol as error:
            await self._abort(context, Code.FAILED_PRECONDITION, str(error))

    async def _answer(self, context: Context, work: Awaitable[T]) -> T:
        """Await within the caller's deadline; expected errors become their status code."""
        left = context.time_remaining()
        self._busy += 1
        try:
            return await (work if left is None else asyncio.wait_for(work, max(left, 0)))
        except asyncio.TimeoutError:
            await self._abort(context, Code.DEADLINE_EXCEEDED, "the deadline passed before the answer was there")
        except (UsageError, TokenizerError) as error:
            await self._abort(context, _code_of(error), str(error))
        finally:
            self._busy -= 1

    async def _abort(self, context: Context, code: grpc.StatusCode, message: str) -> NoReturn:
        self._metrics.refused.labels(code.name).inc()
        await context.abort(code, message)
        raise AssertionError("abort raises")


def _why_not(listen: str) -> str:
    """gRPC keeps the reason to itself, so ask the system again."""
    where = address(listen)
    try:
        socket.create_server(
            (where.host, where.port), family=socket.AF_INET6 if ":" in where.host else socket.AF_INET
        ).close()
    except OSError as error:
        return error.strerror or str(error)
    return "gRPC refused the address"


class _WrongProtocol(UsageError):
    pass


def _check_protocol(request: Any) -> None:
    if request.protocol > wire.PROTOCOL:
        raise _WrongProtocol(
            f"protocol: the call needs level {request.protocol}, this server speaks 1 to {wire.PROTOCOL}"
        )


def _code_of(error: Exception) -> grpc.StatusCode:
    if isinstance(error, NoTokenizer | _WrongProtocol):
        return Code.FAILED_PRECONDITION
    return Code.INVALID_ARGUMENT if isinstance(error, UsageError) else Code.INTERNAL


def _unary(method: Callable[..., Any], request: Any, response: Any) -> grpc.RpcMethodHandler:
    return grpc.unary_unary_rpc_method_handler(method, request.FromString, response.SerializeToString)
