"""From a validated body to tokens and back: fans a call out into requests, gathers or streams what they produce."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple

from aiohttp import web
from tokenizers.decoders import DecodeStream

from kvindex.simulator.fleet import Fleet
from kvindex.simulator.openai import STREAM_END, ApiError, ChatBody, Form, GenerationBody, usage
from kvindex.simulator.request import Request, mix
from kvindex.simulator.results import Output
from kvindex.simulator.tokenizer import ChatModel

# OpenAI's default for /v1/completions.
_COMPLETION_TOKENS = 16
# A chat without a limit ends when the model has said enough; the simulator's models say about this much.
_CHAT_TOKENS = 64
_MAX_CHOICES = 128


class Piece(NamedTuple):
    """A token of one choice, as text."""

    choice: int
    request: Request
    token: int
    text: str
    finish: str | None


class Generations:
    def __init__(self, fleet: Fleet, chat: ChatModel, report_cached_tokens: bool) -> None:
        self._fleet = fleet
        self._chat = chat
        self._report_cached_tokens = report_cached_tokens

    async def answer(
        self, http: web.Request, body: GenerationBody, prompts: list[list[int]], *, chat: bool
    ) -> web.StreamResponse:
        request_id = http.headers.get("X-Request-Id") or body.request_id or uuid.uuid4().hex
        rank = self._rank(http.headers.get("X-data-parallel-rank"))
        requests = self._requests(body, prompts, request_id)
        form = Form(chat, request_id, body.model or self._fleet.config.model)
        headers = {"X-Request-Id": request_id}
        pieces = self._pieces(requests, rank)
        # Closed also when the client went away: the generators' own clean-up aborts the requests.
        async with aclosing(pieces):
            if body.stream:
                return await self._stream(http, body, requests, form, headers, pieces)
            return await self._whole(body, requests, form, headers, pieces)

    def _rank(self, header: str | None) -> int | None:
        if header is None:
            return None
        size = len(self._fleet.drivers)
        if not header.isdigit() or int(header) >= size:
            raise ApiError(400, f"data_parallel_rank {header} is out of range [0, {size}).")
        return int(header)

    def _requests(self, body: GenerationBody, prompts: list[list[int]], request_id: str) -> list[Request]:
        config = self._fleet.config
        lora = body.model if body.model in config.loras else None
        if body.model not in (None, config.model) and lora is None:
            raise ApiError(404, f"The model `{body.model}` does not exist.", "NotFoundError", "model")
        if not 1 <= body.n <= _MAX_CHOICES:
            raise ApiError(400, f"n: {body.n} is not in [1, {_MAX_CHOICES}]", param="n")
        requests: list[Request] = []
        for prompt in prompts:
            limit = self._limit(body, prompt)
            for choice in range(body.n):
                seed = mix((body.seed or 0) & ((1 << 64) - 1)) + choice if body.seed is not None or choice else 0
                requests.append(
                    Request(
                        f"{request_id}-{len(requests)}-{uuid.uuid4().hex[:8]}",
                        prompt,
                        limit,
                        lora=lora,
                        cache_salt=body.cache_salt,
                        session_id=body.session_id,
                        sample_seed=seed,
                    )
                )
        if not requests:
            raise ApiError(400, "prompt: the list is empty", param="prompt")
        return requests

    def _limit(self, body: GenerationBody, prompt: list[int]) -> int:
        """How many tokens to generate; the errors are vLLM's."""
        context = self._fleet.config.context_tokens
        if not prompt:
            raise ApiError(400, "the prompt has no tokens", param="prompt")
        if min(prompt) < 0 or max(prompt) >= 1 << 32:
            raise ApiError(400, "prompt: token ids are whole numbers below 2**32", param="prompt")
        asked = body.max_tokens
        if isinstance(body, ChatBody):
            asked = body.max_completion_tokens or asked
        if asked is not None and asked < 1:
            raise ApiError(400, f"max_tokens must be at least 1, got {asked}.", param="max_tokens")
        needed = len(prompt) + (asked or 1)
        if needed > context:
            raise ApiError(
                400,
                f"This model's maximum context length is {context} tokens. However, you requested {needed} tokens "
                f"({len(prompt)} in the prompt, {asked or 1} in the completion).",
            )
        if asked is not None:
            return asked
        default = _COMPLETION_TOKENS
        if isinstance(body, ChatBody):
            default = 1 + mix(len(prompt) * 0x10001 + prompt[-1]) % (2 * _CHAT_TOKENS)
        return min(default, context - len(prompt))

    async def _pieces(self, requests: list[Request], rank: int | None) -> AsyncGenerator[Piece, None]:
        """The tokens of all requests in the order in which they come. Closing it aborts what is unfinished."""
        if len(requests) == 1:
            stream = DecodeStream(skip_special_tokens=True)
            async with aclosing(self._fleet.pick(rank).generate(requests[0])) as outputs:
                async for output in outputs:
                    yield self._piece(0, output, stream)
            return
        queue: asyncio.Queue[Piece | None] = asyncio.Queue()

        async def feed(choice: int, request: Request) -> None:
            stream = DecodeStream(skip_special_tokens=True)
            try:
                async with aclosing(self._fleet.pick(rank).generate(request)) as outputs:
                    async for output in outputs:
                        queue.put_nowait(self._piece(choice, output, stream))
            finally:
                queue.put_nowait(None)

        tasks = [asyncio.create_task(feed(choice, request)) for choice, request in enumerate(requests)]
        try:
            unfinished = len(tasks)
            while unfinished:
                piece = await queue.get()
                if piece is None:
                    unfinished -= 1
                else:
                    yield piece
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _piece(self, choice: int, output: Output, stream: DecodeStream) -> Piece:
        text = stream.step(self._chat.tokenizer, output.token) or ""
        finish = output.finish.value if output.finish is not None else None
        return Piece(choice, output.request, output.token, text, finish)

    def _usage(self, requests: list[Request], n: int, *, details: bool = True) -> dict[str, object]:
        """Each prompt counts once, however many choices it has; what was cached is that of its first choice."""
        firsts = requests[::n]
        cached = sum(request.cached_tokens or 0 for request in firsts)
        return usage(
            sum(request.prompt_tokens for request in firsts),
            sum(request.output_tokens for request in requests),
            cached if details and self._report_cached_tokens else None,
        )

    async def _whole(
        self,
        body: GenerationBody,
        requests: list[Request],
        form: Form,
        headers: dict[str, str],
        pieces: AsyncGenerator[Piece, None],
    ) -> web.Response:
        texts = [""] * len(requests)
        async for piece in pieces:
            texts[piece.choice] += piece.text
        choices = []
        for index, request in enumerate(requests):
            ids = request.tokens.tolist() if body.return_token_ids else None
            prompt_ids = ids[: request.prompt_tokens] if ids is not None else None
            output_ids = ids[request.prompt_tokens :] if ids is not None else None
            choices.append(form.choice(index, texts[index], "length", prompt_ids, output_ids))
        first_prompt = requests[0].tokens[: requests[0].prompt_tokens].tolist() if body.return_token_ids else None
        content = form.response(choices, self._usage(requests, body.n), first_prompt)
        return web.Response(body=content, content_type="application/json", headers=headers)

    async def _stream(
        self,
        http: web.Request,
        body: GenerationBody,
        requests: list[Request],
        form: Form,
        headers: dict[str, str],
        pieces: AsyncGenerator[Piece, None],
    ) -> web.StreamResponse:
        options = body.stream_options
        response = web.StreamResponse(headers={**headers, "Content-Type": "text/event-stream; charset=utf-8"})
        response.headers["Cache-Control"] = "no-cache"
        opened: set[int] = set()
        async for piece in pieces:
            if not response.prepared:
                # Only now, so that a request that cannot be served is still answered with its own status.
                await response.prepare(http)
            prompt_ids = None
            data = b""
            if piece.choice not in opened:
                opened.add(piece.choice)
                if body.return_token_ids:
                    prompt_ids = piece.request.tokens[: piece.request.prompt_tokens].tolist()
                data = form.opening(piece.choice, prompt_ids) or b""
            ids = [piece.token] if body.return_token_ids else None
            continuous = options is not None and options.continuous_usage_stats
            use = self._usage([piece.request], 1, details=False) if continuous else None
            await response.write(data + form.delta(piece.choice, piece.text, piece.finish, prompt_ids, ids, use))
        if options is not None and options.include_usage:
            await response.write(form.final_usage(self._usage(requests, body.n)))
        await response.write(STREAM_END)
        await response.write_eof()
        return response
