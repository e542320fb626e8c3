"""Capture files: an engine's raw frames, as they came, with the time and the socket.

A stream of MessagePack arrays `[recv_seconds, source, frames]`, one per message, frames verbatim as bin; an optional
fourth element `"replay"` marks answers of a replay socket. Records are appended and flushed, never rewritten: a
recorder that is killed leaves a file that is good up to its last record.

The reader takes one record at a time from a file of any size and believes no length that it has not read.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, NamedTuple

import msgspec

from kvindex.errors import CaptureError

MAX_FRAME_BYTES = 256 << 20
MAX_FRAMES = 16
MAX_SOURCE_BYTES = 4096
_CHUNK = 1 << 20

# first byte -> bytes of the length that follows, for each family that a record uses
_ARRAYS = {0xDC: 2, 0xDD: 4}
_STRINGS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BINS = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}


class Record(NamedTuple):
    """One message. `frames` is what `Index.ingest` takes."""

    received: float
    source: str
    frames: list[bytes]
    replay: bool = False


class CaptureWriter:
    """Appends records to a file. Thread-safe, so that several sockets can share it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._encode = msgspec.msgpack.Encoder().encode
        self._lock = threading.Lock()
        self.records = 0
        self.bytes = 0

    def write(self, record: Record) -> None:
        """Raises OSError when the disk does."""
        fields: list[object] = [record.received, record.source, record.frames]
        if record.replay:
            fields.append("replay")
        data = self._encode(fields)
        with self._lock:
            self._file.write(data)
            self.records += 1
            self.bytes += len(data)

    def flush(self) -> None:
        with self._lock:
            self._file.flush()


class _Cut(Exception):
    """The file ends inside a record."""


class CaptureReader:
    """Iterates over the records of a capture.

    A file that ends inside a record (its recorder was killed) yields all whole records; `cut` then says where. Anything
    else that is no record raises CaptureError naming the byte, after the records before it were yielded.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.cut: str | None = None
        self.records = 0

    def __iter__(self) -> Iterator[Record]:
        self.cut, self.records = None, 0
        try:
            with self.path.open("rb", buffering=_CHUNK) as opened:
                assert isinstance(opened, BufferedReader)  # what a buffered binary open returns; typed as less
                yield from self._records(opened)
        except OSError as failure:
            raise CaptureError(f"{self.path}: {failure.strerror or failure}") from failure

    def _records(self, file: BufferedReader) -> Iterator[Record]:
        before = 0.0
        while file.peek(1):
            start = file.tell()
            try:
                record = _record(file, before)
            except _Cut:
                self.cut = f"{self.path}: ends inside record {self.records + 1}, which begins at byte {start}"
                return
            except ValueError as failure:
                where = f"record {self.records + 1}, which begins at byte {start}"
                raise CaptureError(f"{self.path}: {where}: {failure}") from None
            self.records += 1
            before = record.received
            yield record


def _record(file: BufferedReader, before: float) -> Record:
    n = _length(file, _ARRAYS, 0x90, "an array of 3 or 4 elements")
    if n not in (3, 4):
        raise ValueError(f"an array of {n} elements is not [recv_seconds, source, frames] with an optional mark")
    received = _number(file)
    source = _text(file, "the source")
    n_frames = _length(file, _ARRAYS, 0x90, "an array of frames")
    if n_frames > MAX_FRAMES:
        raise ValueError(f"{n_frames} frames in one message, at most {MAX_FRAMES} are read")
    frames = [_frame(file) for _ in range(n_frames)]
    mark = _text(file, "the mark") if n == 4 else ""
    if mark not in ("", "replay"):
        raise ValueError(f"the mark {mark!r} is not 'replay'")
    return Record(received if math.isfinite(received) else before, source, frames, mark == "replay")


def _take(file: BufferedReader, n: int) -> bytes:
    """Exactly n bytes, in pieces: a length that the file does not hold allocates one piece, not the length."""
    data = file.read(min(n, _CHUNK))
    if len(data) == n:
        return data
    pieces = [data]
    missing = n - len(data)
    while missing and data:
        data = file.read(min(missing, _CHUNK))
        pieces.append(data)
        missing -= len(data)
    if missing:
        raise _Cut
    return b"".join(pieces)


def _length(file: BufferedReader, wide: dict[int, int], fixed: int, what: str, mask: int = 0x0F) -> int:
    """The length of an array, string or bin. `fixed` is the family's first one-byte form, 0 for none."""
    first = _take(file, 1)[0]
    if fixed and first & ~mask & 0xFF == fixed:
        return first & mask
    if first not in wide:
        raise ValueError(f"byte {first:#04x} does not begin {what}")
    return int.from_bytes(_take(file, wide[first]), "big")


def _number(file: BufferedReader) -> float:
    first = _take(file, 1)[0]
    if first < 0x80:
        return float(first)
    if first not in _NUMBERS:
        raise ValueError(f"byte {first:#04x} does not begin a time in seconds")
    layout = _NUMBERS[first]
    return float(struct.unpack(layout, _take(file, struct.calcsize(layout)))[0])


def _text(file: BufferedReader, what: str) -> str:
    n = _length(file, _STRINGS | _BINS, 0xA0, f"{what} as a string", mask=0x1F)
    if n > MAX_SOURCE_BYTES:
        raise ValueError(f"{what} has {n} bytes, at most {MAX_SOURCE_BYTES} are read")
    return _take(file, n).decode("utf-8", "backslashreplace")


def _frame(file: BufferedReader) -> bytes:
    # Strings too: writers in languages without a bin type use them for bytes.
    n = _length(file, _BINS | _STRINGS, 0xA0, "a frame as bin", mask=0x1F)
    if n > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {n} bytes, at most {MAX_FRAME_BYTES} are read")
    return _take(file, n)
