"""Prompts to token ids in this process, as the engine would make them. Off the event loop, GIL released, with a
deadline."""

from __future__ import annotations

import asyncio
import json
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
import numpy as np
from tokenizers import Tokenizer

from kvindex.errors import ConfigError, TokenizerError
from kvindex.events.model import Tokens
from kvindex.router.body import Body, Prompt, completion_prompt, has_media


class ChatModel:
    """One local model folder: tokenizer.json, and the chat template of tokenizer_config.json or chat_template.jinja."""

    def __init__(self, model: str, folder: str) -> None:
        self.model = model
        path = pathlib.Path(folder)
        try:
            self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception
            raise ConfigError(f"tokenizers.{model}: {path / 'tokenizer.json'} cannot be loaded: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config: dict[str, Any] = {}
        if (path / "tokenizer_config.json").is_file():
            config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
        source = config.get("chat_template")
        if (path / "chat_template.jinja").is_file():
            source = (path / "chat_template.jinja").read_text(encoding="utf-8")
        self._template = _compile(model, source) if isinstance(source, str) else None
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        self._special = {name: _text(config[name]) for name in names if config.get(name) is not None}

    def encode(self, text: str, special: bool) -> Tokens:
        # encode_batch_fast releases the GIL, encode does not
        encoded = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
        return np.array(encoded[0].ids, np.uint32)

    def render(self, body: Body) -> str:
        if self._template is None:
            raise TokenizerError(f"model {self.model!r} has no chat template")
        return self._template.render(
            messages=[_flat(message) for message in body.messages or ()],
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            **{**self._special, **(body.chat_template_kwargs or {})},
        )


class Prompts:
    """Tokenises for all models. `tokens` raises TokenizerError with a short slug as its message."""

    def __init__(self, folders: Mapping[str, str], max_waiting: int, timeout_seconds: float) -> None:
        self._models = {model: ChatModel(model, folder) for model, folder in folders.items()}
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        self._timeout = timeout_seconds
        self._max_waiting = max_waiting
        self._waiting = 0

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def tokens(self, body: Body, base_model: str | None, chat: bool) -> Tokens:
        prompt = Prompt(None, None, None) if chat else completion_prompt(body)
        if prompt.tokens is not None:
            return prompt.tokens
        if prompt.why:
            raise TokenizerError(prompt.why)
        model = self._models.get(base_model or "")
        if model is None:
            raise TokenizerError("no_tokenizer")
        if chat and (not body.messages or has_media(body) or body.chat_template is not None):
            raise TokenizerError("media" if body.messages and has_media(body) else "no_prompt")
        if self._waiting >= self._max_waiting:
            raise TokenizerError("tokenizer_busy")
        self._waiting += 1
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._executor, _tokenize, model, body, prompt, chat)
        work.add_done_callback(self._done)
        try:
            return await asyncio.wait_for(asyncio.shield(work), self._timeout)
        except (asyncio.TimeoutError, TimeoutError):
            raise TokenizerError("tokenizer_late") from None

    def _done(self, work: asyncio.Future[Tokens]) -> None:
        self._waiting -= 1
        if not work.cancelled():
            work.exception()  # whoever waited has gone; nothing to tell


def _tokenize(model: ChatModel, body: Body, prompt: Prompt, chat: bool) -> Tokens:
    try:
        if chat:
            # the template writes the special tokens itself
            return model.encode(model.render(body), bool(body.add_special_tokens))
        return model.encode(prompt.text or "", prompt.special is not False)
    except TokenizerError:
        raise
    except Exception as error:
        raise TokenizerError("tokenizer_failed") from error


def _compile(model: str, source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ConfigError(f"tokenizers.{model}: the chat template cannot be read: {error}") from None


def _refuse(message: str) -> NoReturn:
    raise TokenizerError(f"chat template: {message}")


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    """Text parts as one string, as vLLM hands them to templates that expect strings."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [part.get("text", "") if isinstance(part, dict) else str(part) for part in content]
    return {**message, "content": "\n".join(texts)}


def _text(token: object) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)
