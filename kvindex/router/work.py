"""One request on its way: parsed, tokenised, matched, picked, forwarded, accounted for."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING

from kvindex.errors import ServiceError, TokenizerError, UsageError
from kvindex.events.model import Tokens
from kvindex.router import body as bodies
from kvindex.router import wire
from kvindex.router.client import ClientConnection, Request
from kvindex.router.lookup import NO_MATCHES, Matches, Query
from kvindex.router.schedule import Decision, PickRequest
from kvindex.router.upstream import Answer, UpstreamConnection
from kvindex.router.usage import StreamUsage, TailUsage, Usage

if TYPE_CHECKING:
    from kvindex.router.app import Router

COMPLETIONS = {b"/v1/completions": False, b"/v1/chat/completions": True}  # path -> is it a chat
BYTES_PER_TOKEN = 4  # of a prompt whose tokens are not known


class Immediate:
    """An answer that the router makes itself, at once."""

    def __init__(self, connection: ClientConnection, request: Request, status: int, body: bytes, kind: bytes) -> None:
        self._connection, self._request = connection, request
        self._answer = wire.own_answer(
            status, body, content_type=kind, keep_alive=request.keep_alive, head_only=request.method == b"HEAD"
        )

    def start(self) -> None:
        self._connection.write(self._answer)
        self._connection.finished(self._request, self._request.keep_alive)

    def cancel(self) -> None:
        """Nothing is going on."""

    pause = resume = cancel

    def check(self, now: float) -> None:
        del now


class _Lost(Exception):
    """The engine's connection ended before its answer began. `again`: it was a kept-alive one, so a fresh one may
    do."""

    def __init__(self, why: str, again: bool) -> None:
        super().__init__(why)
        self.again = again


class Forward:
    """A request that an engine answers. It is its own upstream sink, and the client connection's work."""

    def __init__(self, router: Router, connection: ClientConnection, request: Request, request_id: str) -> None:
        self._router, self._connection, self._request = router, connection, request
        self.id = request_id
        self._chat = COMPLETIONS.get(request.path) if request.method == b"POST" else None
        self._decision: Decision | None = None
        self._upstream: UpstreamConnection | None = None
        self._answered: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._began = router.loop.time()
        self._deadline: float | None = None
        self._paused = False
        self._chunked = False
        self._keep_alive = request.keep_alive
        self._reader: StreamUsage | TailUsage | None = None
        self._remove_usage = False
        self._degraded = ""
        self._compared = False  # whether the prediction means something

    # the client connection's side

    def start(self) -> None:
        self._task = self._router.loop.create_task(self._run(), name=f"request {self.id}")

    def cancel(self) -> None:
        """The client has gone: the engine notices by its closed connection."""
        if self._task is not None:
            self._task.cancel()
        self._let_go()

    def pause(self) -> None:
        self._paused = True
        if self._upstream is not None:
            self._upstream.pause()

    def resume(self) -> None:
        self._paused = False
        if self._upstream is not None:
            self._upstream.resume()

    def check(self, now: float) -> None:
        if self._deadline is None or now < self._deadline or self._paused:
            return
        self._deadline = None
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(asyncio.TimeoutError())
        else:
            self._router.metrics.refused.labels("upstream_stalled").inc()
            self._let_go()
            self._connection.broken()

    # the work

    async def _run(self) -> None:
        try:
            await self._route()
        except asyncio.CancelledError:
            self._let_go()
            raise
        except Exception:  # a bug must not leave a client without an answer
            self._router.log.exception("request failed", request=self.id)
            self._fail(500, "internal", "the router failed on this request; see its log")

    async def _route(self) -> None:
        request, body = self._request, self._request.body
        model: str | None = None
        picking = PickRequest(0, False, NO_MATCHES)
        if self._chat is not None:
            parsed = bodies.parse(body)
            if isinstance(parsed, wire.Refusal):
                return self._fail(parsed.status, parsed.reason, parsed.message)
            model = parsed.model
            picking = await self._look_up(parsed)
            if parsed.stream:
                changed = bodies.with_usage(body, parsed)
                self._remove_usage = changed is not None
                body = changed if changed is not None else body
                self._reader = StreamUsage(self._remove_usage)
            else:
                self._reader = TailUsage()
        await self._send(request, body, model, picking)
        return None

    async def _look_up(self, parsed: bodies.Body) -> PickRequest:
        """Tokens and who holds them. What fails costs the request its prefix, visibly, and nothing else."""
        router = self._router
        estimate = len(self._request.body) // BYTES_PER_TOKEN
        if not router.uses_prefix:
            return PickRequest(estimate, False, NO_MATCHES)
        base, lora = router.table.base_model(parsed.model)
        try:
            tokens: Tokens = await router.prompts.tokens(parsed, base, bool(self._chat))
        except TokenizerError as error:
            self._degrade(str(error))
            return PickRequest(estimate, False, NO_MATCHES)
        try:
            answer = router.lookup.match(Query(tokens, lora, parsed.cache_salt))
            matches: Matches = await answer if inspect.isawaitable(answer) else answer
        except (ServiceError, UsageError) as error:
            self._degrade("index_unavailable" if isinstance(error, ServiceError) else "index_refused")
            return PickRequest(len(tokens), True, NO_MATCHES)
        self._compared = True
        return PickRequest(len(tokens), True, matches)

    def _degrade(self, why: str) -> None:
        slug = why.split(":", 1)[0].replace(" ", "_")
        self._degraded = slug
        self._router.metrics.degraded.labels(slug).inc()

    async def _send(self, request: Request, body: bytes, model: str | None, picking: PickRequest) -> None:
        router, tried = self._router, set()
        last = ""
        for _ in range(router.config.retry.max_attempts):
            now = router.loop.time()
            targets = [t for t in router.table.serving(model) if t.name not in tried and t.endpoint.available(now)]
            decision = router.scheduler.pick(targets, picking)  # picked and accounted for in one step, without a pause
            if decision is None:
                break
            self._decision = decision
            router.remember(self.id, decision, self._degraded)
            target = decision.target
            router.metrics.picks.labels(target.name).inc()
            try:
                await self._exchange(request, body, decision)
            except (OSError, asyncio.TimeoutError) as error:
                last = f"{target.name}: {error or type(error).__name__}"
                self._let_go()
                target.endpoint.refused(router.loop.time(), last)
                router.metrics.retries.labels(target.name).inc()
                router.log.warning("endpoint refused", endpoint=target.name, request=self.id, error=last)
                tried.add(target.name)
                continue
            except _Lost as error:
                self._let_go()
                target.endpoint.refused(router.loop.time(), str(error))
                return self._fail(502, "upstream_lost", f"{target.name} {error}")
            except _TooLate:
                self._let_go()
                return self._fail(504, "upstream_timeout", f"{target.name} did not begin to answer in time")
            target.endpoint.answered()
            return None
        names = ", ".join(f"{e.id} ({e.state(router.loop.time())})" for e in router.table.by_id.values()) or "none"
        why = f"no endpoint can take the request; endpoints: {names}" + (f"; last: {last}" if last else "")
        return self._fail(503, "no_endpoint", why)

    async def _exchange(self, request: Request, body: bytes, decision: Decision) -> None:
        """Send the request and wait until its answer has begun; the rest comes through `on_answer`."""
        router, target = self._router, decision.target
        extra = b"x-request-id: %b\r\n" % self.id.encode() if request.header(b"x-request-id") is None else b""
        dropped = request.dropped
        if len(target.endpoint.targets) > 1:
            extra += b"x-data-parallel-rank: %d\r\n" % target.rank
            dropped |= {b"x-data-parallel-rank"}  # the rank is the router's pick
        length = len(body) if request.has_body else None
        head = wire.upstream_head(request.method, request.target, request.headers, dropped, length, extra)
        pool = target.endpoint.pool
        while True:
            connection = pool.take() or await pool.connect(router.config.timeouts.connect_seconds)
            self._upstream = connection
            self._answered = router.loop.create_future()
            self._deadline = router.loop.time() + router.config.timeouts.first_byte_seconds
            connection.send(self, head, body, request.method == b"HEAD")
            if self._paused:
                connection.pause()
            try:
                await self._answered
                return
            except asyncio.TimeoutError:
                raise _TooLate from None
            except _Lost as error:
                if not error.again:
                    raise

    # the upstream connection's side

    def on_answer(self, answer: Answer | None, body: bytes, end: bool) -> None:
        if answer is not None:
            self._begin(answer)
        if body and self._reader is not None:
            body = self._reader.pass_on(body)
        if end and self._reader is not None:
            body += self._reader.end()
        if body:
            self._write(body)
        if end:
            self._end()
        else:
            self._deadline = self._router.loop.time() + self._router.config.timeouts.idle_seconds

    def on_lost(self, why: str, reused: bool) -> None:
        self._upstream = None
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(_Lost(why, reused))
            return
        self._router.metrics.refused.labels("upstream_broke").inc()
        self._router.log.warning("endpoint broke off its answer", request=self.id, error=why)
        self._let_go()
        self._connection.broken()

    def _begin(self, answer: Answer) -> None:
        router, decision = self._router, self._decision
        assert decision is not None
        decision.first_output()
        router.metrics.first_output.observe(router.loop.time() - self._began)
        router.metrics.requests.labels(f"{answer.status // 100}xx").inc()
        if answer.status != 200:
            self._reader = None
        is_stream = any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in answer.headers)
        if isinstance(self._reader, StreamUsage) and not is_stream:
            self._reader = TailUsage()
        framing = b""
        no_body = self._request.method == b"HEAD" or answer.status in (204, 304)
        if answer.length is not None and not isinstance(self._reader, StreamUsage):
            framing = b"content-length: %d\r\n" % answer.length
        elif no_body:
            framing = b""
        elif self._request.version == "1.1":
            self._chunked = True
            framing = b"transfer-encoding: chunked\r\n"
        else:
            self._keep_alive = False
        if not self._keep_alive or router.draining:
            self._keep_alive = False
            framing += b"connection: close\r\n"
        self._connection.write(
            wire.downstream_head(answer.status, answer.reason, answer.headers, framing, self._our_headers(decision))
        )
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)

    def _our_headers(self, decision: Decision) -> bytes:
        lines = [b"x-kvindex-endpoint: %b\r\n" % decision.target.name_bytes]
        if self._chat is not None:
            lines.append(b"x-kvindex-matched-tokens: %d\r\n" % decision.matched_tokens)
            lines.append(b"x-kvindex-request-id: %b\r\n" % self.id.encode())
        if self._degraded:
            lines.append(b"x-kvindex-degraded: %b\r\n" % self._degraded.encode("ascii", "replace"))
        if self._request.header(b"x-kvindex-explain"):
            lines.append(b"x-kvindex-explained: %b\r\n" % self._router.explain_line(decision))
        return b"".join(lines)

    def _write(self, data: bytes) -> None:
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._connection.write(data)

    def _end(self) -> None:
        self._deadline = None
        self._upstream = None
        if self._chunked:
            self._connection.write(b"0\r\n\r\n")
        decision = self._decision
        if decision is not None:
            decision.release()
            usage = self._reader.usage if self._reader is not None else None
            if usage is not None:
                self._account(decision, usage)
        self._connection.finished(self._request, self._keep_alive)

    def _account(self, decision: Decision, usage: Usage) -> None:
        """Compare what was predicted with what the engine says it found."""
        router, name = self._router, decision.target.name
        router.metrics.tokens.labels("all").inc(usage.prompt_tokens)
        if usage.cached_tokens is None:
            return
        router.metrics.tokens.labels("cached").inc(usage.cached_tokens)
        if not self._compared or not router.lookup.follows(name):
            return
        predicted = decision.matched_tokens
        difference = predicted - usage.cached_tokens
        outcome = "exact" if difference == 0 else "over" if difference > 0 else "under"
        router.metrics.predictions.labels(name, outcome).inc()
        router.metrics.prediction_error.labels(name).observe(abs(difference))
        router.lookup.report(name, predicted, usage.cached_tokens, usage.prompt_tokens)

    # ends

    def _let_go(self) -> None:
        self._deadline = None
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abandon()
        decision, self._decision = self._decision, None
        if decision is not None:
            decision.release()

    def _fail(self, status: int, reason: str, message: str) -> None:
        router = self._router
        router.metrics.requests.labels(f"{status // 100}xx").inc()
        router.metrics.refused.labels(reason).inc()
        body = wire.error_body(status, reason, message)
        extra = b"x-kvindex-request-id: %b\r\n" % self.id.encode()
        self._connection.write(
            wire.own_answer(
                status, body, extra=extra, keep_alive=self._keep_alive, head_only=self._request.method == b"HEAD"
            )
        )
        self._connection.finished(self._request, self._keep_alive)


class _TooLate(Exception):
    """The engine did not begin to answer in time."""
