"""Reading the oracle's stream: MessagePack objects one after the other, with nothing between them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

# First byte -> (bytes of the length field, bytes per unit of that length) for what carries a length; scalars below.
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_ARRAYS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
_SCALARS = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_SCALARS |= {0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_LENGTH = {1: ">B", 2: ">H", 4: ">I"}


def end_of_object(data: bytes, at: int) -> int:
    """Where the object that begins at `at` ends."""
    left = 1
    while left:
        left -= 1
        first = data[at]
        at += 1
        if first < 0x80 or first >= 0xE0:
            continue
        if first in _SCALARS:
            at += _SCALARS[first]
        elif first < 0x90:
            left += 2 * (first & 0x0F)
        elif first < 0xA0:
            left += first & 0x0F
        elif first < 0xC0:
            at += first & 0x1F
        elif first in _SIZED:
            width = _SIZED[first]
            at += width + struct.unpack_from(_LENGTH[width], data, at)[0]
        elif first in _ARRAYS:
            width, each = _ARRAYS[first]
            left += each * struct.unpack_from(_LENGTH[width], data, at)[0]
            at += width
        else:
            raise ValueError(f"byte 0x{first:02x} at {at - 1} begins nothing that the oracle writes")
    return at


def records(data: bytes) -> Iterator[list[Any]]:
    decode = msgspec.msgpack.Decoder().decode
    at = 0
    view = memoryview(data)
    while at < len(data):
        end = end_of_object(data, at)
        yield decode(view[at:end])
        at = end
