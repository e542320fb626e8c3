"""The OpenAI wire forms that the simulator speaks, as vLLM words them: bodies in, responses and stream chunks out."""

from __future__ import annotations

import time
from typing import Any

import msgspec


class ApiError(Exception):
    """A 4xx answer in OpenAI's form."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return {"error": error}


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationBody(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that both generation calls share; anything else a client sends is ignored."""

    model: str | None = None
    max_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    seed: int | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    request_id: str | None = None
    return_token_ids: bool = False


class CompletionBody(GenerationBody, frozen=True, kw_only=True):
    prompt: str | list[int | str | list[int]]

    def prompts(self) -> list[str | list[int]]:
        """A string, a list of token ids, or a list of either."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        if len(ids) == len(self.prompt):
            return [ids]
        if ids:
            raise ApiError(400, "prompt: a list has either token ids or prompts, not both")
        return [item for item in self.prompt if not isinstance(item, int)]


class ChatBody(GenerationBody, frozen=True, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    add_generation_prompt: bool = True
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = {}


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = {}


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    tokens: list[int]


def usage(prompt: int, completion: int, cached: int | None) -> dict[str, Any]:
    details = None if cached is None else {"cached_tokens": cached}
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": details,
    }


class Form:
    """How one of the two calls words its answer; the simulator's logic is the same for both."""

    def __init__(self, chat: bool, request_id: str, model: str) -> None:
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }

    def _object(self, chunk: bool) -> str:
        if not self._chat:
            return "text_completion"
        return "chat.completion.chunk" if chunk else "chat.completion"

    def choice(
        self, index: int, text: str, finish: str | None, prompt_ids: list[int] | None, ids: list[int] | None
    ) -> dict[str, Any]:
        """A whole answer."""
        choice: dict[str, Any] = {"index": index}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice |= {"text": text, "prompt_token_ids": prompt_ids}
        return choice | {"logprobs": None, "finish_reason": finish, "stop_reason": None, "token_ids": ids}

    def response(self, choices: list[dict[str, Any]], use: dict[str, Any], prompt_ids: list[int] | None) -> bytes:
        body: dict[str, Any] = {**self._head, "object": self._object(False), "choices": choices, "usage": use}
        if self._chat:
            body["prompt_token_ids"] = prompt_ids
        return msgspec.json.encode(body | {"kv_transfer_params": None})

    def opening(self, index: int, prompt_ids: list[int] | None) -> bytes | None:
        """What a stream says before the first token; completions say nothing."""
        if not self._chat:
            return None
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        extra = {} if prompt_ids is None else {"prompt_token_ids": prompt_ids}
        return self._event([choice], None, extra)

    def delta(
        self,
        index: int,
        text: str,
        finish: str | None,
        prompt_ids: list[int] | None,
        ids: list[int] | None,
        use: dict[str, Any] | None,
    ) -> bytes:
        """One token of a stream; completions carry the prompt's ids with their first."""
        choice: dict[str, Any] = {"index": index}
        if self._chat:
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": finish, "stop_reason": None}
        if ids is not None:
            choice["token_ids"] = ids
        if prompt_ids is not None and not self._chat:
            choice["prompt_token_ids"] = prompt_ids
        return self._event([choice], use)

    def final_usage(self, use: dict[str, Any]) -> bytes:
        return self._event([], use)

    def _event(
        self, choices: list[dict[str, Any]], use: dict[str, Any] | None, extra: dict[str, Any] | None = None
    ) -> bytes:
        body: dict[str, Any] = {**self._head, "object": self._object(True), "choices": choices, **(extra or {})}
        if use is not None:
            body["usage"] = use
        return b"data: " + msgspec.json.encode(body) + b"\n\n"


STREAM_END = b"data: [DONE]\n\n"
