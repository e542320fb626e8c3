"""The HTTP face of a simulated engine: vLLM's OpenAI-compatible server, as far as a router or a daemon uses it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from aiohttp import web

from kvindex.errors import KvindexError
from kvindex.simulator.fleet import Fleet
from kvindex.simulator.generation import Generations
from kvindex.simulator.openai import ApiError, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from kvindex.simulator.tokenizer import ChatModel

VERSION = "0.32.0+kvindex.sim"
_MAX_BODY_BYTES = 64 << 20
_LONG_TEXT = 16_384
Body = TypeVar("Body")


class Server:
    def __init__(self, fleet: Fleet, chat: ChatModel, *, report_cached_tokens: bool = True) -> None:
        self._fleet = fleet
        self._chat = chat
        self._started = int(time.time())
        self._generations = Generations(fleet, chat, report_cached_tokens)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_errors])
        app.add_routes(
            [
                web.post("/v1/completions", self.completions),
                web.post("/v1/chat/completions", self.chat_completions),
                web.post("/tokenize", self.tokenize),
                web.post("/detokenize", self.detokenize),
                web.get("/v1/models", self.models),
                web.get("/health", self.health),
                web.get("/ping", self.health),
                web.get("/version", self.version),
                web.get("/load", self.load),
                web.get("/metrics", self.metrics),
                web.get("/kv_event_sources", self.kv_event_sources),
                web.post("/reset_prefix_cache", self.reset_prefix_cache),
                web.post("/sim/withhold_events", self.withhold_events),
            ]
        )
        return app

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await _decode(request, CompletionBody)
        prompts = [await self._encode(item, True) if isinstance(item, str) else item for item in body.prompts()]
        return await self._generations.answer(request, body, prompts, chat=False)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        body = await _decode(request, ChatBody)
        text = self._chat.render(
            body.messages, body.add_generation_prompt, tools=body.tools, **body.chat_template_kwargs
        )
        # The template writes the special tokens itself.
        prompt = await self._encode(text, False)
        return await self._generations.answer(request, body, [prompt], chat=True)

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await _decode(request, TokenizeBody)
        if body.messages is not None:
            text = self._chat.render(
                body.messages, body.add_generation_prompt, tools=body.tools, **body.chat_template_kwargs
            )
            ids = await self._encode(text, bool(body.add_special_tokens))
        elif body.prompt is not None:
            ids = await self._encode(body.prompt, body.add_special_tokens is not False)
        else:
            raise ApiError(400, "either prompt or messages is needed")
        strings = [self._chat.tokenizer.id_to_token(token) for token in ids] if body.return_token_strs else None
        limit = self._fleet.config.context_tokens
        return _json({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": strings})

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await _decode(request, DetokenizeBody)
        return _json({"prompt": self._chat.decode(body.tokens)})

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) < _LONG_TEXT:
            return self._chat.encode(text, add_special_tokens)
        # Tens of milliseconds in which the engine would stand still.
        return await asyncio.to_thread(self._chat.encode, text, add_special_tokens)

    async def models(self, _: web.Request) -> web.Response:
        config = self._fleet.config
        cards = [(config.model, None), *((lora, config.model) for lora in config.loras)]
        data = [
            {
                "id": name,
                "object": "model",
                "created": self._started,
                "owned_by": "kvindex-sim",
                "root": name,
                "parent": parent,
                "max_model_len": config.context_tokens if parent is None else None,
            }
            for name, parent in cards
        ]
        return _json({"object": "list", "data": data})

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def version(self, _: web.Request) -> web.Response:
        return _json({"version": VERSION})

    async def load(self, _: web.Request) -> web.Response:
        engines = [driver.engine for driver in self._fleet.drivers]
        return _json({"server_load": sum(len(engine.running) + len(engine.waiting) for engine in engines)})

    async def metrics(self, _: web.Request) -> web.Response:
        body = self._fleet.metrics.render()
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def kv_event_sources(self, _: web.Request) -> web.Response:
        return _json(self._fleet.sources())

    async def reset_prefix_cache(self, request: web.Request) -> web.Response:
        running = request.query.get("reset_running_requests", "").lower() in ("1", "true")
        return _json({"success": self._fleet.reset_prefix_cache(running)})

    async def withhold_events(self, request: web.Request) -> web.Response:
        """Not in vLLM: lose the next `batches` messages of `rank` on the wire, to see a subscriber find the gap."""
        batches, rank = (
            _integer(request.query.get(name, default)) for name, default in (("batches", "1"), ("rank", "0"))
        )
        drivers = self._fleet.drivers
        publisher = drivers[rank].publisher if rank < len(drivers) else None
        if publisher is None:
            raise ApiError(400, f"rank {rank} publishes no events")
        publisher.withhold(batches)
        return _json({"withheld": batches, "next_sequence": publisher.sequence})


def _integer(text: str) -> int:
    if not text.isdigit():
        raise ApiError(400, f"{text!r} is not a whole number")
    return int(text)


async def _decode(request: web.Request, kind: type[Body]) -> Body:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid: {error}") from error


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json", status=status)


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return _json(error.body(), error.status)
    except KvindexError as error:
        return _json(ApiError(400, str(error)).body(), 400)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        kind = "NotFoundError" if error.status == 404 else "BadRequestError"
        return _json(ApiError(error.status, error.reason, kind).body(), error.status)
