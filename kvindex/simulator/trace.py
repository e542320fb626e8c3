"""Request traces in Mooncake's form as input for the virtual clock.

One JSON object a line: `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, where equal ids mean
equal blocks of 512 tokens with equal blocks before them. The texts are not public; tokens are made up from the ids.
"""

from __future__ import annotations

import gzip
from array import array
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from kvindex.errors import CaptureError
from kvindex.simulator.request import TOKEN
from kvindex.simulator.virtual import TimedRequest

TRACE_BLOCK_TOKENS = 512


class _Row(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read(path: Path, *, speed: float = 1.0, max_prompt_tokens: int | None = None) -> Iterator[TimedRequest]:
    """The requests of a trace file (plain or .gz), lazily. Prompts longer than `max_prompt_tokens` are cut to it."""
    decoder = msgspec.json.Decoder(_Row)
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = decoder.decode(line)
            except msgspec.DecodeError as error:
                raise CaptureError(f"{path}:{number}: not a request of a Mooncake trace: {error}") from error
            length = min(row.input_length, max_prompt_tokens or row.input_length)
            yield TimedRequest(
                at=row.timestamp / 1000.0 / speed,
                id=str(number),
                prompt=prompt_tokens(row.hash_ids, length),
                output_tokens=max(1, row.output_length),
            )


def prompt_tokens(hash_ids: list[int], length: int) -> array[int]:
    """Tokens whose blocks of 512 are equal where the ids are, the last one cut short."""
    blocks: npt.NDArray[np.uint32] = np.asarray(hash_ids, dtype=np.uint32)[:, None]
    # Unequal ids differ in every token: a block of any size inside differs too.
    offsets = np.arange(TRACE_BLOCK_TOKENS, dtype=np.uint32)
    tokens = np.add(np.multiply(blocks, 2_654_435_761, dtype=np.uint32), offsets, dtype=np.uint32) >> 1
    return array(TOKEN, tokens.reshape(-1)[:length].tobytes())
