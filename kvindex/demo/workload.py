"""Chats with shared system prompts, several turns each: what prefix caching is made for. Seeded, so that both runs see
the same texts in the same order, and a run's own marker keeps one run from finding what the other left behind."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import aiohttp

_WORDS = """
cache block prefix token engine router index event memory window layer state store load disk bucket request turn answer
question table figure value number order system user agent plan tool search result note page line record
""".split()  # noqa: SIM905


class Shape(NamedTuple):
    """How much work. Sized so that one engine's cache holds its share of the chats, but not all of them."""

    system_prompts: int = 24
    system_words: int = 900
    chats: int = 30
    turns: int = 4
    turn_words: int = 70
    output_tokens: int = 12
    concurrency: int = 8


class Measured(NamedTuple):
    """One request, as its client saw it. `predicted` is the router's word, None when it had no index."""

    id: str
    endpoint: str
    seconds_to_first_token: float
    prompt_tokens: int
    cached_tokens: int
    predicted: int | None


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words))


def chats(shape: Shape, marker: str, seed: int) -> list[list[str]]:
    """Per chat: the system prompt, then the user's turns."""
    rng = random.Random(seed)
    systems = [f"{marker} {i}: {_text(rng, shape.system_words)}" for i in range(shape.system_prompts)]
    return [
        [systems[rng.randrange(len(systems))], *(_text(rng, shape.turn_words) for _ in range(shape.turns))]
        for _ in range(shape.chats)
    ]


async def run(url: str, shape: Shape, marker: str, seed: int, done: Callable[[], None]) -> list[Measured]:
    """Play all chats, `concurrency` at a time; a chat's turns follow each other. `done` is called after each
    request."""
    measured: list[Measured] = []
    slots = asyncio.Semaphore(shape.concurrency)
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def play(number: int, texts: list[str]) -> None:
            async with slots:
                messages = [{"role": "system", "content": texts[0]}]
                for turn, text in enumerate(texts[1:]):
                    messages.append({"role": "user", "content": text})
                    request_id = f"{marker}-{number}-{turn}"
                    result, answer = await _ask(session, url, messages, shape.output_tokens, request_id)
                    messages.append({"role": "assistant", "content": answer})
                    measured.append(result)
                    done()

        async with asyncio.timeout(90) if hasattr(asyncio, "timeout") else _no_limit():
            await asyncio.gather(*(play(i, texts) for i, texts in enumerate(chats(shape, marker, seed))))
    return measured


class _no_limit:  # Python 3.10 has no asyncio.timeout; every request has its own deadline anyway
    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, *_: object) -> None:
        return None


async def _ask(
    session: aiohttp.ClientSession, url: str, messages: list[dict[str, str]], tokens: int, request_id: str
) -> tuple[Measured, str]:
    body: dict[str, Any] = {
        "model": "sim",
        "messages": messages,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first = 0.0
    text: list[str] = []
    usage: dict[str, Any] = {}
    async with session.post(f"{url}/v1/chat/completions", json=body, headers={"x-request-id": request_id}) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{request_id}: HTTP {answer.status}: {(await answer.text())[:300]}")
        async for line in answer.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                piece = choice.get("delta", {}).get("content")
                if piece:
                    first = first or time.perf_counter()
                    text.append(piece)
        predicted = answer.headers.get("x-kvindex-matched-tokens")
        details = usage.get("prompt_tokens_details") or {}
        return (
            Measured(
                request_id,
                answer.headers.get("x-kvindex-endpoint", "?"),
                (first or time.perf_counter()) - started,
                int(usage.get("prompt_tokens", 0)),
                int(details.get("cached_tokens") or 0),
                int(predicted) if predicted is not None and predicted.isdecimal() else None,
            ),
            "".join(text),
        )
