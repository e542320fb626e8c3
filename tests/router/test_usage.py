"""Streams cut anywhere: nothing is lost, nothing is held longer than its event, the usage chunk is found."""

from __future__ import annotations

import random

import pytest

from kvindex.router.usage import StreamUsage, TailUsage, Usage

CHUNK = b'data: {"choices":[{"text":"a"}],"usage":null}'
LAST = b'data: {"choices":[],"usage":{"prompt_tokens":70,"prompt_tokens_details":{"cached_tokens":64}}}'


@pytest.mark.parametrize("newline", [b"\n\n", b"\r\n\r\n"])
@pytest.mark.parametrize("remove", [True, False])
def test_any_cut_gives_the_same(newline: bytes, remove: bool) -> None:
    events = [CHUNK, CHUNK, LAST, b"data: [DONE]"]
    stream = b"".join(e + newline for e in events)
    wanted = b"".join(e + newline for e in events if not (remove and e is LAST))
    for seed in range(200):
        rng = random.Random(seed)
        reader, out, at = StreamUsage(remove), b"", 0
        while at < len(stream):
            step = rng.randrange(1, 40)
            out += reader.pass_on(stream[at : at + step])
            at += step
        out += reader.end()
        assert out == wanted, f"seed {seed}"
        assert reader.usage == Usage(70, 64)


@pytest.mark.parametrize("newline", [b"\n\n", b"\r\n\r\n"])
def test_a_whole_event_is_not_held(newline: bytes) -> None:
    assert StreamUsage(True).pass_on(CHUNK + newline) == CHUNK + newline


def test_the_tail_of_a_long_answer_is_enough() -> None:
    reader = TailUsage()
    for _ in range(50):
        reader.pass_on(b"x" * 1000)
    reader.pass_on(b'"usage":{"prompt_tokens": 7, "completion_tokens": 1}}')
    assert reader.usage == Usage(7, None)
