"""The tokenizer and the chat template of a simulated model: a folder with tokenizer.json and tokenizer_config.json.

`build` makes one without any download: bytes, common English words and a few endings, about one token per word, so that
texts have lifelike lengths. The folder is what a router or a daemon loads to get the same token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from kvindex.errors import ConfigError, TokenizerError
from kvindex.simulator.words import ENDINGS, WORDS

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_SPACE = "\u0120"  # how byte-level BPE writes a space


def build() -> Tokenizer:
    """The built-in tokenizer: byte-level BPE whose merges spell out the word list letter by letter."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in [*(_SPACE + word for word in WORDS), *WORDS, *ENDINGS]:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def export(folder: Path, context_tokens: int = 32_768) -> None:
    """Write the built-in model's folder: tokenizer.json, tokenizer_config.json, config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build()
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "model_max_length": context_tokens,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": tokenizer.get_vocab_size(),
            "bos_token_id": tokenizer.token_to_id("<s>"),
            "eos_token_id": tokenizer.token_to_id("</s>"),
            "pad_token_id": tokenizer.token_to_id("<pad>"),
            "max_position_embeddings": context_tokens,
        },
    )


class ChatModel:
    """A tokenizer with its chat template. Thread-safe; encoding a long text takes milliseconds."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, special: Mapping[str, str]) -> None:
        self.tokenizer = tokenizer
        self._special = dict(special)
        self._template: jinja2.Template | None = None
        if template is not None:
            environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            environment.globals["raise_exception"] = _raise_template_error
            environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
            self._template = environment.from_string(template)
        self.vocabulary = _answer_vocabulary(tokenizer)

    @classmethod
    def builtin(cls) -> ChatModel:
        return cls(build(), CHAT_TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"})

    @classmethod
    def load(cls, folder: Path) -> ChatModel:
        """Read tokenizer.json and, if there, tokenizer_config.json and chat_template.jinja of a local model folder."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"model path: {folder} has no tokenizer.json")
        tokenizer = Tokenizer.from_file(str(path))
        config: dict[str, Any] = {}
        if (folder / "tokenizer_config.json").is_file():
            config = json.loads((folder / "tokenizer_config.json").read_text())
        template = config.get("chat_template")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text()
        special = {name: _text(config[name]) for name in config if name.endswith("_token") and config[name]}
        return cls(tokenizer, template if isinstance(template, str) else None, special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **values: Any) -> str:
        """The prompt text of a conversation."""
        if self._template is None:
            raise TokenizerError("this model has no chat template: use /v1/completions, or a folder that has one")
        flat = [{**message, "content": _flatten(message.get("content"))} for message in messages]
        try:
            return self._template.render(
                messages=flat, add_generation_prompt=add_generation_prompt, **self._special, **values
            )
        except jinja2.TemplateError as error:
            raise TokenizerError(f"the chat template failed: {error}") from error


def _answer_vocabulary(tokenizer: Tokenizer) -> list[int]:
    """Tokens to answer with: whole words with their space, so that an answer sent back in the next turn of a chat is
    tokenised into the same ids. All tokens but the special ones where a tokenizer has no such words."""
    tokens = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    known = {_SPACE + word for word in WORDS}
    words = [index for token, index in tokens if token in known]
    if len(words) < 100:
        words = [index for token, index in tokens if re.fullmatch("[\u0120\u2581][a-z]+", token)]
    special = set(tokenizer.get_added_tokens_decoder())
    return words or [index for _, index in tokens if index not in special]


def _flatten(content: object) -> object:
    """OpenAI's list-of-parts form of a message as plain text, the way vLLM does for templates that expect strings."""
    if not isinstance(content, list):
        return content or ""
    parts = [part.get("text", "") if isinstance(part, dict) else str(part) for part in content]
    return "\n".join(parts)


def _text(token: object) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
