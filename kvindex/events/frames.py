"""ZMQ messages taken apart, before anything in them is decoded.

Live messages of a SUB socket are [topic, sequence, payload]. Answers of a replay socket (ROUTER, read through a DEALER)
are [empty, topic, sequence, payload], or without the topic from vLLM 0.24 and earlier; the answer ends with the sequence
2**64 - 1 and an empty payload. So sequence and payload are taken from the end of the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvindex.errors import UsageError

END_OF_REPLAY = (1 << 64) - 1


class Message(NamedTuple):
    """One message; `topic` None when the frames carry none. `sequence` None: the frame is not eight bytes long."""

    topic: str | None
    sequence: int | None
    payload: bytes


def split_frames(frames: Sequence[bytes], replay: bool = False) -> Message:
    """UsageError only for a wrong call: something that is not bytes, or no payload frame."""
    if len(frames) < 1 or not all(isinstance(frame, (bytes, bytearray, memoryview)) for frame in frames):
        raise UsageError("frames: expected a list of bytes with at least a payload frame")
    parts = [bytes(frame) for frame in frames]
    if replay and len(parts) > 1 and parts[0] == b"":
        parts = parts[1:]
    if len(parts) < 2:
        raise UsageError(f"frames: {len(parts)} frame(s), expected topic, sequence and payload")
    raw, payload = parts[-2], parts[-1]
    topic = parts[-3].decode("utf-8", "replace") if len(parts) > 2 else None
    return Message(topic, int.from_bytes(raw, "big") if len(raw) == 8 else None, payload)


def split_topic(topic: str) -> tuple[str, str]:
    """(pod, model) of a topic `kv@pod@model`, split at its first two '@'; two empty strings for any other text."""
    parts = topic.split("@", 2)
    return (parts[1], parts[2]) if len(parts) == 3 and parts[0] == "kv" else ("", "")
