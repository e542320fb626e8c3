"""What routing needs of a request body: decoded once, for these fields only. The bytes themselves are forwarded."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np

from kvindex.events.model import Tokens
from kvindex.router.wire import Refusal

MAX_TOKEN_ID = 0xFFFFFFFF


class Body(msgspec.Struct):
    """The fields of an OpenAI completion or chat completion that decide where it goes. All others are the engine's."""

    model: str | None = None
    prompt: Any = None
    messages: list[dict[str, Any]] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    cache_salt: str | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class Prompt(NamedTuple):
    """Token ids, or the text that makes them. Both None: the router cannot know (several prompts, media, odd
    bodies)."""

    tokens: Tokens | None
    text: str | None
    special: bool | None  # add special tokens; None: the endpoint's default
    why: str = ""  # why both are None


_DECODER = msgspec.json.Decoder(Body)


def parse(raw: bytes) -> Body | Refusal:
    try:
        return _DECODER.decode(raw)
    except (msgspec.MsgspecError, RecursionError) as error:
        return Refusal(400, "bad_body", f"the body is not what a completion needs: {error}")


def completion_prompt(body: Body) -> Prompt:
    """The prompt of /v1/completions."""
    prompt = body.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return Prompt(None, prompt, body.add_special_tokens)
    if isinstance(prompt, list) and prompt and all(type(t) is int and 0 <= t <= MAX_TOKEN_ID for t in prompt):
        return Prompt(np.array(prompt, np.uint32), None, None)
    return Prompt(None, None, None, "several_prompts" if isinstance(prompt, list) else "no_prompt")


def has_media(body: Body) -> bool:
    """Parts that are not text become placeholder tokens that only the engine knows."""
    return any(
        isinstance(part, dict) and part.get("type") not in ("text", None)
        for message in body.messages or ()
        if isinstance(content := message.get("content"), list)
        for part in content
    )


def with_usage(raw: bytes, body: Body) -> bytes | None:
    """The body asking for the final usage of its stream; None when it does so already."""
    options = body.stream_options
    if options and options.get("include_usage"):
        return None
    if options is None and b'"stream_options"' not in raw:
        start = raw.index(b"{") + 1
        return raw[:start] + b'"stream_options":{"include_usage":true},' + raw[start:]
    whole = msgspec.json.decode(raw)
    whole["stream_options"] = {**(options or {}), "include_usage": True}
    return msgspec.json.encode(whole)
