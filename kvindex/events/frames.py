"""What a ZMQ message of an event stream is made of: topic, sequence number, payload.

Protocol facts (vLLM's and SGLang's publishers):
* live, from a PUB socket: `[topic, sequence, payload]`; the sequence is 8 bytes big-endian, from 0 per process;
* answers of the replay socket, as a DEALER sees them: `[b"", topic, sequence, payload]`, and `[b"", sequence, payload]`
  from vLLM up to 0.24 and from SGLang, so they are read from the end of the list;
* the last answer has sequence ff*8 and no payload.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import xxhash

from kvindex.errors import UsageError
from kvindex.events.model import Skip

END_SEQUENCE = (1 << 64) - 1
MAX_TOPIC = 1024  # bytes; publishers are told apart by topic, so it is kept


class Message(NamedTuple):
    """`topic` is None when the message carries none. `is_end`: a replay's last answer, which has no events."""

    topic: str | None
    sequence: int
    payload: bytes
    is_end: bool = False


class Topic(NamedTuple):
    """`kv@pod@model`, llm-d's convention. The model may itself contain '@'."""

    pod: str
    model: str | None


def split(frames: Sequence[bytes], *, replay: bool = False) -> Message | Skip:
    """The parts of a message, or why it has none.

    Raises UsageError for what no publisher can be blamed for: frames that are not bytes, or no payload frame.
    """
    if isinstance(frames, bytes | str) or len(frames) < 2:
        raise UsageError("frames: a message is a list of [topic, sequence, payload] or [sequence, payload]")
    if not all(isinstance(frame, bytes) for frame in frames):
        if not all(isinstance(frame, bytes | bytearray | memoryview) for frame in frames):
            raise UsageError(f"frames: {[type(frame).__name__ for frame in frames]} are not all bytes")
        frames = [bytes(frame) for frame in frames]
    if len(frames) > 4:
        return Skip("bad_frames", f"{len(frames)} frames, at most 4 are expected")
    sequence, payload = frames[-2], frames[-1]
    if len(sequence) != 8:
        return Skip("bad_frames", f"the sequence number has {len(sequence)} bytes, 8 are expected")
    number = int.from_bytes(sequence, "big")
    # A replay's answer begins with a delimiter: only the fourth frame from the end's side is a topic.
    named = len(frames) == 4 or (len(frames) == 3 and not replay)
    topic = frames[-3] if named else None
    if topic is not None and len(topic) > MAX_TOPIC:
        return Skip("bad_frames", f"a topic of {len(topic)} bytes, at most {MAX_TOPIC} are expected")
    text = None if topic is None else topic.decode("utf-8", "backslashreplace")
    return Message(text, number, payload, replay and number == END_SEQUENCE)


def split_topic(topic: str | None) -> Topic | None:
    """Pod and model of a topic that follows the convention, None for free text."""
    parts = (topic or "").split("@", 2)
    if len(parts) != 3 or not parts[1]:
        return None
    return Topic(parts[1], parts[2] or None)


def digest(payload: bytes) -> int:
    """64 bits that tell two payloads of one sequence number apart. Guards against restarts, not against forgers."""
    return xxhash.xxh3_64_intdigest(payload)


def replay_request(start: int) -> list[bytes]:
    """What a DEALER sends to a replay socket: everything from `start` on that is still kept."""
    return [b"", start.to_bytes(8, "big")]
