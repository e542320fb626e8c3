"""Block keys: our own 64-bit chained hash of a block's tokens and of everything before it.

    root(b, lora, salt)   = XXH3-64("kvindex/1", b, lora, salt)         one chain per block size and namespace
    local(tokens, extra)  = XXH3-64(tokens as little-endian uint32, seed = 0 or XXH3-64(media and embeddings))
    key[i]                = XXH3-64(key[i-1] as 8 bytes, local[i] as 8 bytes),  key[-1] = root

A local hash needs no parent, so a block whose parent is unknown costs eight bytes until it can be chained. XXH3 is
specified at https://github.com/Cyan4973/xxHash; this module uses the `xxhash` package and is the plain twin of
`cython_ext/xxh3.hpp`, which tests hold equal to it. The layout is versioned by the text in the root.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from kvindex.errors import UsageError
from kvindex.events.model import NO_EXTRA, Extra, MultiModal, Tokens
from kvindex.index.protocol import MultiModalItem, Namespace

LAYOUT = b"kvindex/1"


def _text(value: str | bytes | None) -> bytes:
    """Length-prefixed, None apart from empty, so that no two namespaces encode alike."""
    if value is None:
        return b"\xff\xff\xff\xff"
    raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return struct.pack("<I", len(raw)) + raw


def encode_root(block_size: int, lora: str | None, cache_salt: str | None) -> bytes:
    return LAYOUT + struct.pack("<I", block_size) + _text(lora) + _text(cache_salt)


def encode_extra(extra: Extra) -> bytes:
    """Media pieces and embeddings of one block; empty when there are none. The salt is in the root, not here."""
    if not extra.mm and extra.embeds is None:
        return b""
    parts = [struct.pack("<I", len(extra.mm))]
    for piece in extra.mm:
        known = piece.offset is not None
        parts.append(_text(piece.hash) + struct.pack("<?q", known, piece.offset or 0))
    parts.append(_text(extra.embeds))
    return b"".join(parts)


def root_key(block_size: int, lora: str | None, cache_salt: str | None) -> int:
    return xxhash.xxh3_64_intdigest(encode_root(block_size, lora, cache_salt))


def local_hash(tokens: Tokens, extra: Extra = NO_EXTRA) -> int:
    raw = encode_extra(extra)
    seed = xxhash.xxh3_64_intdigest(raw) if raw else 0
    return xxhash.xxh3_64_intdigest(tokens.astype("<u4", copy=False).tobytes(), seed)


def chain(parent: int, local: int) -> int:
    return xxhash.xxh3_64_intdigest(struct.pack("<QQ", parent, local))


def extra_at(mm: Sequence[MultiModalItem], start: int, end: int) -> Extra:
    """What a prompt's media put into the block [start, end): every overlapping item, in order of position."""
    pieces = tuple(MultiModal(i.hash, i.offset - start) for i in mm if i.offset < end and i.offset + i.length > start)
    return Extra(mm=pieces) if pieces else NO_EXTRA


def chain_keys(tokens: Tokens, block_size: int, namespace: Namespace) -> npt.NDArray[np.uint64]:
    """Keys of all full blocks of a prompt, in plain Python."""
    key = root_key(block_size, namespace.lora, namespace.cache_salt)
    keys = np.empty(len(tokens) // block_size, np.uint64)
    mm = sorted(namespace.mm, key=lambda item: item.offset)
    for i in range(len(keys)):
        start, end = i * block_size, (i + 1) * block_size
        key = chain(key, local_hash(tokens[start:end], extra_at(mm, start, end) if mm else NO_EXTRA))
        keys[i] = key
    return keys


def as_tokens(token_ids: Sequence[int] | Tokens) -> Tokens:
    """Token ids as a contiguous uint32 array; UsageError when they are not token ids."""
    array = np.asarray(token_ids)
    if array.size == 0:
        return np.empty(0, np.uint32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(f"token_ids: {array.dtype} of shape {array.shape} is not a list of integers")
    if array.dtype != np.uint32 and (int(array.min()) < 0 or int(array.max()) > 0xFFFFFFFF):
        raise UsageError("token_ids: a token id is outside 0..4294967295")
    return np.ascontiguousarray(array, np.uint32)
