"""Captures of real engines: what the index predicts is what the engine reported, request by request."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import msgspec
import pytest

from kvindex import Index
from kvindex.events.recording import CaptureReader

FOLDER = pathlib.Path(__file__).parent.parent / "data" / "captures"
STEPPED = [
    "llama-sha256cbor",
    "llama-sha256-default",
    "llama-xxhashcbor",
    "gemma3-swa",
    "gemma3-swa-dense",
    "lfm2-hybrid",
]
ARRAYS = ["SYNTHETIC-legacy-array-gemma3-swa", "SYNTHETIC-legacy-array-llama-sha256cbor"]


class Ask(NamedTuple):
    """A prompt, the message before which the engine saw it, what it found; `after_reset`: nobody could know yet."""

    label: str
    messages: int
    tokens: list[int]
    lora: str | None
    salt: str | None
    cached: int
    after_reset: bool


def asks(name: str) -> list[Ask]:
    found, after_reset = [], False
    for step in json.loads((FOLDER / f"{name}.json").read_text())["steps"]:
        if step["op"] == "reset_prefix_cache":
            after_reset = True
        elif step["op"] == "generate":
            found.append(
                Ask(
                    step["label"],
                    step["frames"][0],
                    step["prompt_token_ids"],
                    step["lora"][0] if step["lora"] else None,
                    step["cache_salt"],
                    step["num_cached_tokens"],
                    after_reset,
                )
            )
            after_reset = False
    return found


def predicted(index: Index, ask: Ask) -> int:
    rows = index.score(ask.tokens, lora=ask.lora, cache_salt=ask.salt).rows()
    assert len(rows) < 2
    return rows[0].tokens if rows else 0


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "native"])
@pytest.mark.parametrize("name", STEPPED + ARRAYS)
def test_predictions_equal_what_the_engine_found(name: str, reference: bool) -> None:
    messages = list(CaptureReader(FOLDER / f"{name}.capture"))
    index, taken, compared = Index(reference=reference), 0, 0
    for ask in asks(name.removeprefix("SYNTHETIC-legacy-array-")):
        for message in messages[taken : ask.messages]:
            index.ingest(message.source, message.frames)
        taken = ask.messages
        index.check()
        if not ask.after_reset:  # an idle engine announces a reset with its next step only
            assert predicted(index, ask) == ask.cached, ask.label
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "native"])
def test_lora_and_salt_over_http(reference: bool) -> None:
    """Requests through the OpenAI server: an adapter, a cache salt, `kv_cache_report_mode=full`."""
    side = json.loads((FOLDER / "http-llama-lora.json").read_text())
    messages = list(CaptureReader(FOLDER / "http-llama-lora.capture"))
    index, taken, compared, reset = Index(reference=reference), 0, 0, False
    for step in side["steps"]:
        for message in messages[taken : step["frames"][0]]:
            index.ingest(message.source, message.frames)
        taken = max(taken, step["frames"][0])
        if step["op"] == "reset_prefix_cache":
            reset = True
        usage = (step["response"] or {}).get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        prompt = step["body"].get("prompt")
        if cached is None or not isinstance(prompt, list):
            continue
        lora = "ad1" if step["body"]["model"] == "ad1" else None
        row = index.score(prompt, model="tiny", lora=lora, cache_salt=step["body"].get("cache_salt"))
        got = row_tokens(row.of("127.0.0.1:18000"))
        if not reset:
            assert got == cached, step["op"]
            compared += 1
        reset = False
    index.check()
    assert compared >= 5


def row_tokens(row: Any) -> int:
    return row.tokens if row else 0


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "native"])
def test_ranks_do_not_mix(reference: bool) -> None:
    index = Index(reference=reference)
    for message in CaptureReader(FOLDER / "dp2-llama.capture"):
        index.ingest(message.source, message.frames)
    index.check()
    ranks = {status.rank: status.endpoint for status in index.publishers()}
    assert sorted(ranks) == [0, 1]
    assert ranks[1] == f"{ranks[0]}:dp1"


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "native"])
@pytest.mark.parametrize("name", STEPPED)
def test_a_replay_heals_what_was_lost(name: str, reference: bool) -> None:
    """Messages 2.. are lost but for the last; the replay socket's real answer brings them; all is as if none was
    lost."""
    messages = list(CaptureReader(FOLDER / f"{name}.capture"))
    whole, healed = Index(reference=reference), Index(reference=reference)
    for message in messages:
        whole.ingest(message.source, message.frames)
    for message in [*messages[:2], messages[-1]]:
        healed.ingest(message.source, message.frames)
    source = messages[0].source
    assert healed.publishers()[0].state == "gap"
    healed.replay_begun(source)
    answers = msgspec.msgpack.decode((FOLDER / f"{name}.replay.msgpack").read_bytes())
    for frames in answers:
        healed.ingest(source, frames, replay=True)
    healed.replay_ended(source, complete=True)
    healed.check()
    assert healed.publishers()[0].state == "live"
    for ask in asks(name):
        assert predicted(healed, ask) <= predicted(whole, ask), ask.label
    last = asks(name)[-1]
    assert predicted(healed, last) == predicted(whole, last)


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "native"])
@pytest.mark.parametrize("name", ["offload-llama-w-save", "offload-gemma3-w-save"])
def test_offloaded_blocks_are_seen_below_hbm(name: str, reference: bool) -> None:
    messages = list(CaptureReader(FOLDER / f"{name}.capture"))
    prompts = json.loads((FOLDER / f"{name}.json").read_text())["prompts"]
    index = Index(reference=reference)
    for message in messages:
        index.ingest(message.source, message.frames)
    index.check()
    row = index.score(prompts[-1]["prompt_token_ids"]).of("pod-0")
    assert row is not None
    assert row.tokens >= prompts[-1]["cached"]
    index.fence(messages[0].source)
    assert index.score(prompts[-1]["prompt_token_ids"]).of("pod-0") is None
