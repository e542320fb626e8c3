"""What an engine says it found cached, read from an answer as it passes; streams also lose what the client did not ask
for."""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec

TAIL_BYTES = 8 << 10
MAX_HELD_BYTES = 256 << 10  # of one server-sent event; a longer one is passed on unread

_PROMPT = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')
_EVENT = re.compile(rb".*?(?:\r\n\r\n|\n\n)", re.DOTALL)
_CACHED = re.compile(rb'"cached_tokens"\s*:\s*(\d+)')


class Usage(NamedTuple):
    prompt_tokens: int
    cached_tokens: int | None  # None: the engine does not say (vLLM without --enable-prompt-tokens-details)


def _read(raw: bytes) -> Usage | None:
    prompt = _PROMPT.findall(raw)
    cached = _CACHED.findall(raw)
    return Usage(int(prompt[-1]), int(cached[-1]) if cached else None) if prompt else None


class TailUsage:
    """Of an answer in one piece: its last kilobytes hold the usage, the body is not parsed."""

    def __init__(self) -> None:
        self._tail = b""

    def pass_on(self, data: bytes) -> bytes:
        self._tail = (self._tail + data)[-TAIL_BYTES:] if len(data) < TAIL_BYTES else data[-TAIL_BYTES:]
        return data

    def end(self) -> bytes:
        return b""

    @property
    def usage(self) -> Usage | None:
        return _read(self._tail)


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw] = []


class StreamUsage:
    """Of a stream of server-sent events. With `remove`, the last chunk, which has usage and no choices, is taken out:
    the router asked for it, the client did not."""

    def __init__(self, remove: bool) -> None:
        self._remove = remove
        self._held = b""
        self.usage: Usage | None = None

    def pass_on(self, data: bytes) -> bytes:
        """What can be forwarded now; an event that is not complete yet waits for its end."""
        data = self._held + data
        end = max(data.rfind(mark) + len(mark) if mark in data else 0 for mark in (b"\n\n", b"\r\n\r\n"))
        if end == 0:
            if len(data) > MAX_HELD_BYTES:
                self._held = b""
                return data
            self._held = data
            return b""
        self._held = data[end:]
        ready = data[:end]
        if b'"prompt_tokens"' not in ready:
            return ready
        return b"".join(event for event in _events(ready) if not self._is_usage(event))

    def end(self) -> bytes:
        left, self._held = self._held, b""
        return left

    def _is_usage(self, event: bytes) -> bool:
        """Read an event's usage; True when the event is to be taken out."""
        if b'"prompt_tokens"' not in event or not event.startswith(b"data:"):
            return False
        found = _read(event)
        if found is not None:
            self.usage = found
        try:
            only_usage = not msgspec.json.decode(event[5:].strip(), type=_Chunk).choices
        except msgspec.MsgspecError:
            return False
        return only_usage and self._remove and found is not None


def _events(data: bytes) -> list[bytes]:
    return _EVENT.findall(data)
