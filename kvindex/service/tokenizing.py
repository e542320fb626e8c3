"""Plain prompts to token ids, with the `tokenizers` library and tokenizer.json from local folders."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tokenizers import Tokenizer

from kvindex.errors import ConfigError, TokenizerError
from kvindex.events.model import Tokens


class Tokenizers:
    """One tokenizer a model, loaded at start so that a wrong folder is found then. Encoding runs in threads of its
    own, without the GIL."""

    def __init__(self, folders: Mapping[str, str], threads: int = 2) -> None:
        self._by_model = {model: load(model, folder) for model, folder in folders.items()}
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")

    @property
    def models(self) -> list[str]:
        return sorted(self._by_model)

    async def encode(self, model: str, prompt: str) -> Tokens:
        """Raises TokenizerError: `NoTokenizer` when config has none for the model."""
        tokenizer = self._by_model.get(model)
        if tokenizer is None:
            known = f"; configured: {', '.join(self.models)}" if self._by_model else ""
            raise NoTokenizer(
                f"no tokenizer is configured for model {model!r}: set tokenizers.{model} in the daemon's config to a "
                f"folder with tokenizer.json, or send token_ids{known}"
            )
        return await asyncio.get_running_loop().run_in_executor(self._executor, _encode, model, tokenizer, prompt)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


class NoTokenizer(TokenizerError):
    """Nothing is configured for the model: the caller's set-up, not the prompt, has to change."""


def load(model: str, folder: str) -> Tokenizer:
    path = pathlib.Path(folder)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"tokenizers.{model}: {folder} is no folder with a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        raise ConfigError(f"tokenizers.{model}: {file} cannot be loaded: {error}") from None
    # some files carry their training's truncation; an engine does not cut prompts by it
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode(model: str, tokenizer: Tokenizer, prompt: str) -> Tokens:
    try:
        # encode_batch_fast releases the GIL, encode does not
        (encoded,) = tokenizer.encode_batch_fast([prompt])
        return np.array(encoded.ids, dtype=np.uint32)
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        raise TokenizerError(f"the tokenizer of model {model!r} failed: {error}") from None
