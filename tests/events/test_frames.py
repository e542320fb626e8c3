"""Which frame is what, live and in replay answers."""

from __future__ import annotations

import pytest

from kvindex.errors import UsageError
from kvindex.events.frames import END_SEQUENCE, MAX_TOPIC, Message, Topic, digest, replay_request, split, split_topic
from kvindex.events.model import Skip

SEQ = (7).to_bytes(8, "big")
END = b"\xff" * 8


def test_live() -> None:
    assert split([b"kv@a@m", SEQ, b"p"]) == Message("kv@a@m", 7, b"p")
    assert split([b"", SEQ, b"p"]) == Message("", 7, b"p")
    assert split([SEQ, b"p"]) == Message(None, 7, b"p")


def test_replay_answers_are_read_from_the_end() -> None:
    assert split([b"", b"kv@a@m", SEQ, b"p"], replay=True) == Message("kv@a@m", 7, b"p")
    assert split([b"", SEQ, b"p"], replay=True) == Message(None, 7, b"p")
    assert split([SEQ, b"p"], replay=True) == Message(None, 7, b"p")


def test_end_marker_in_both_forms_and_only_in_replays() -> None:
    for frames in ([b"", b"", END, b""], [b"", END, b""]):
        message = split(frames, replay=True)
        assert isinstance(message, Message)
        assert message.is_end
    live = split([b"", END, b""])
    assert isinstance(live, Message)
    assert (live.is_end, live.sequence) == (False, END_SEQUENCE)


@pytest.mark.parametrize(
    "frames", [[b"t", b"", b"p"], [b"t", SEQ + b"x", b"p"], [b"t"] * 5, [b"t" * (MAX_TOPIC + 1), SEQ, b"p"]]
)
def test_what_a_publisher_did_wrong_is_a_skip(frames: list[bytes]) -> None:
    skip = split(frames)
    assert isinstance(skip, Skip)
    assert skip.reason == "bad_frames"


@pytest.mark.parametrize("frames", [[], [b"p"], b"payload", "text", ["t", "s", "p"], [b"t", SEQ, None]])
def test_what_the_caller_did_wrong_raises(frames: list[bytes]) -> None:
    with pytest.raises(UsageError, match="frames: "):
        split(frames)


def test_a_topic_that_is_not_text_stays_distinct_and_printable() -> None:
    one, two = split([b"\xff", SEQ, b""]), split([b"\xfe", SEQ, b""])
    assert isinstance(one, Message)
    assert isinstance(two, Message)
    assert (one.topic, two.topic) == ("\\xff", "\\xfe")


@pytest.mark.parametrize(
    ("topic", "parts"),
    [
        ("kv@pod-0@tiny", Topic("pod-0", "tiny")),
        ("kv@127.0.0.1:8000@org/model@v2", Topic("127.0.0.1:8000", "org/model@v2")),
        ("kv@pod@", Topic("pod", None)),
        ("kv@@model", None),
        ("kv@pod", None),
        ("free text", None),
        ("", None),
        (None, None),
    ],
)
def test_topics(topic: str | None, parts: Topic | None) -> None:
    assert split_topic(topic) == parts


def test_request_and_digest() -> None:
    assert replay_request(7) == [b"", SEQ]
    assert digest(b"a") != digest(b"b")
    assert 0 <= digest(b"a") < 1 << 64
