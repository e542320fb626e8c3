"""`extra_keys` of a vLLM event -> one `Extra` per block (facts: engine truth, rule 7).

vLLM lists, per block, what besides tokens went into its hash, in the order LoRA, multi-modal, cache salt, prompt
embeds, and sends the parts untagged: what a part means follows from its type and place.

    "name"          the LoRA adapter when it comes first and equals `lora_name`
    ["hash", 3]     a piece of media that starts at token 3 of this block, negative: it began in an earlier block
    "tenant-a"      the cache salt, only in block 0 of a chain and after all media
    b"..."          digest of the prompt embeddings
    "hash"          anywhere else: media as older engines sent it, without its offset

A part that fits nothing makes the event bad: it separates this block from the plain prompt in a way we do not know.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kvindex.events.fields import MAX_DIGEST, MAX_NAME, BadEventError, bad
from kvindex.events.model import NO_EXTRA, Extra, MultiModal

NIL = msgspec.Raw(b"\xc0")

_MAX_OFFSET = 1 << 31
_MAX_BLOCK_BYTES = 1 << 16  # of one block's parts: many images end in one block, but not megabytes of them

_PER_BLOCK = msgspec.msgpack.Decoder(list[msgspec.Raw])
_PARTS = msgspec.msgpack.Decoder(list[Any] | None)


def extras(
    extra_keys: msgspec.Raw, n_keys: int, *, at_root: bool, lora_name: str | None, lora_id: int | str | None = None
) -> tuple[Extra, ...]:
    """One entry per engine key, or `()` when no block has any. `at_root`: the event's first block starts a chain.

    The field arrives undecoded: almost always it is nil or a list of nils, which one scan of its bytes tells, and a
    type for its parts (str or bytes or int or list) is beyond msgspec's unions. Raises BadEventError.
    """
    raw = bytes(extra_keys)
    if raw == b"\xc0":
        return ()
    length, header = array_header(raw)
    if length is None:
        raise bad("extra_keys", raw[:16], "a list")
    if raw.count(b"\xc0", header) == len(raw) - header:
        return ()
    if length != n_keys:
        raise bad("extra_keys", f"{length} entries", f"one per block hash ({n_keys})")
    found = tuple(
        [_of_block(block, at_root and i == 0, lora_name, lora_id) for i, block in enumerate(_PER_BLOCK.decode(raw))]
    )
    return found if any(extra is not NO_EXTRA for extra in found) else ()


def array_header(raw: bytes) -> tuple[int | None, int]:
    """What an array's header claims, read without making any of its items: (length, header's bytes); length is None
    for anything that is no array."""
    first = raw[0] if raw else 0xC0
    if first >> 4 == 9:
        return first & 15, 1
    if first in (0xDC, 0xDD):
        end = 3 if first == 0xDC else 5
        return int.from_bytes(raw[1:end], "big"), end
    return None, 0


def _of_block(block: msgspec.Raw, first: bool, lora_name: str | None, lora_id: int | str | None) -> Extra:
    raw = bytes(block)
    if raw == b"\xc0":
        return NO_EXTRA
    if len(raw) > _MAX_BLOCK_BYTES:
        raise bad("extra_keys", f"{len(raw)} bytes for one block", f"at most {_MAX_BLOCK_BYTES}")
    try:
        parts = _PARTS.decode(raw) or []
    except (msgspec.DecodeError, ValueError, RecursionError) as failure:
        raise bad("extra_keys", failure, "a list of parts") from None
    if parts and ((lora_name and parts[0] == lora_name) or (lora_id is not None and parts[0] == lora_id)):
        parts = parts[1:]  # the adapter, which the event names itself; older engines put its number here
    embeds = None
    if parts and isinstance(parts[-1], bytes):
        embeds, parts = _digest(parts[-1]), parts[:-1]
    salt = None
    if first and parts and isinstance(parts[-1], str):
        salt, parts = _text(parts[-1]), parts[:-1]
    if not parts and salt is None and embeds is None:
        return NO_EXTRA
    return Extra(salt, tuple(map(_media, parts)), embeds)


def _media(part: object) -> MultiModal:
    match part:
        case str():
            return MultiModal(_text(part), None)
        case [str() as hashed, None]:
            return MultiModal(_text(hashed), None)
        case [str() as hashed, int() as offset] if type(offset) is int and abs(offset) <= _MAX_OFFSET:
            return MultiModal(_text(hashed), offset)
    raise BadEventError("bad_extra_keys", f"extra_keys: {str(part)[:80]!r} is no LoRA name, media, salt or digest")


def _text(value: str) -> str:
    if len(value) > MAX_NAME:
        raise bad("extra_keys", value, f"at most {MAX_NAME} characters")
    return value


def _digest(value: bytes) -> bytes:
    if len(value) > MAX_DIGEST:
        raise bad("extra_keys", f"{len(value)} bytes", f"at most {MAX_DIGEST}")
    return value
