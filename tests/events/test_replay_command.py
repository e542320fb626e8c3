"""`kvindex replay`: what it prints, when it scores, and that it says what the engines found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvindex.events.recording import CaptureReader, CaptureWriter, Record
from kvindex.service.cli import main
from tests.support.publisher import stored

CAPTURES = Path(__file__).parent.parent / "data" / "captures"


def message(sequence: int, *events: Any, rank: int = 0, topic: bytes = b"kv@pod@m") -> list[bytes]:
    return [topic, sequence.to_bytes(8, "big"), msgspec.msgpack.encode([1.0, list(events), rank])]


def block(n: int) -> dict[str, Any]:
    """Block n of one chain of 4-token blocks."""
    return stored(1000 + n, [4 * n + i for i in range(4)], None if n == 0 else 999 + n)


def capture(path: Path, *records: Record) -> str:
    with path.open("wb") as file:
        writer = CaptureWriter(file)
        for record in records:
            writer.write(record)
    return str(path)


def prompts(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(params=["native", "reference"])
def replay(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Any:
    which = ["--reference"] if request.param == "reference" else []

    def _replay(*args: str, status: int = 0) -> Any:
        assert main(["replay", *args, *which, "--json"]) == status
        out, _replay.err = capsys.readouterr()  # type: ignore[attr-defined]
        return json.loads(out)

    return _replay


def asked(name: str) -> list[tuple[dict[str, Any], int, bool]]:
    """(prompt, what the engine found cached, whether events can tell) of a capture's requests."""
    truth = json.loads((CAPTURES / f"{name}.json").read_text())
    found, after_reset = [], False
    for i, step in enumerate(truth["steps"]):
        if step["op"] != "generate":
            after_reset = True  # announced only with the next step
            continue
        salt, lora = step.get("cache_salt"), step.get("lora")
        prompt = {"id": i, "token_ids": step["prompt_token_ids"], "cache_salt": salt, "after": step["frames"][0]}
        prompt["lora"] = lora[0] if isinstance(lora, list) else lora
        found.append((prompt, step["num_cached_tokens"], not after_reset))
        after_reset = False
    return found


@pytest.mark.parametrize(
    "name",
    ["llama-sha256cbor", "llama-sha256-default", "llama-xxhashcbor", "gemma3-swa", "gemma3-swa-dense", "lfm2-hybrid"],
)
def test_tokens_equal_what_the_engine_found(name: str, tmp_path: Path, replay: Any) -> None:
    truth = asked(name)
    path = prompts(tmp_path / "p", *[prompt for prompt, _, _ in truth])
    answer = replay(str(CAPTURES / f"{name}.capture"), "--prompts", path)
    predicted = [max((row["tokens"] for row in s["endpoints"].values()), default=0) for s in answer["scores"]]
    assert [got for got, (_, _, can_tell) in zip(predicted, truth, strict=True) if can_tell] == [
        cached for _, cached, can_tell in truth if can_tell
    ]
    assert sum(not can_tell for _, _, can_tell in truth) == 1
    assert any(predicted)


def test_publishers_of_one_source_and_their_endpoints(tmp_path: Path, replay: Any) -> None:
    path = capture(
        tmp_path / "c",
        Record(1.0, "tcp://a:1", message(0, block(0))),
        Record(2.0, "tcp://a:1", message(0, block(0), rank=1)),
        Record(3.0, "tcp://b:1", message(4, block(0), {"type": "Odd"}, topic=b"free text")),
        Record(4.0, "tcp://b:1", message(6, block(1), topic=b"free text")),
    )
    answer = replay(path, "--prompts", prompts(tmp_path / "p", {"token_ids": list(range(9))}))
    assert list(answer["publishers"]) == ["tcp://a:1", "tcp://a:1#kv@pod@m#dp1", "tcp://b:1"]
    first, _, last = answer["publishers"].values()
    expected = {"topic": "kv@pod@m", "dp_rank": 0, "incarnation": 0, "last_seq": 0, "gaps": 0, "state": "live"}
    assert first.items() >= (expected | {"events": 1, "skipped": 0}).items()
    assert (last["last_seq"], last["gaps"], last["state"], last["skipped"]) == (6, 1, "gap", 1)
    (score,) = answer["scores"]
    assert score["id"] == 1  # the line, where a prompt has no id
    assert score["endpoints"] == {
        "pod": {"blocks": 1, "tokens": 4, "score": 1.0, "tiers": {"hbm": 1}},
        "pod:dp1": {"blocks": 1, "tokens": 4, "score": 1.0, "tiers": {"hbm": 1}},
        "free text": {"blocks": 2, "tokens": 8, "score": 2.0, "tiers": {"hbm": 2}},
    }


def test_prompts_are_scored_at_their_time_and_answered_in_their_order(tmp_path: Path, replay: Any) -> None:
    path = capture(tmp_path / "c", *[Record(float(n), "s", message(n, block(n))) for n in range(3)])
    tokens = list(range(13))
    lines = [{"id": f"after {n}", "token_ids": tokens, "after": n} for n in (2, 0, 3, 1, 99)]
    answer = replay(path, "--prompts", prompts(tmp_path / "p", *lines, {"id": "end", "token_ids": tokens}))
    blocks = {s["id"]: s["endpoints"].get("pod", {"blocks": 0})["blocks"] for s in answer["scores"]}
    assert blocks == {"after 2": 2, "after 0": 0, "after 3": 3, "after 1": 1, "after 99": 3, "end": 3}
    assert list(blocks) == ["after 2", "after 0", "after 3", "after 1", "after 99", "end"]
    assert "the capture has 3 messages; scored at its end: ['after 99']" in replay.err


def test_captures_are_merged_by_receive_time(tmp_path: Path, replay: Any) -> None:
    one = capture(tmp_path / "1", *[Record(float(t), "s", message(t, block(t))) for t in (0, 2)])
    two = capture(tmp_path / "2", Record(1.0, "s", message(1, block(1))))
    answer = replay(one, two)
    assert (answer["publishers"]["s"]["gaps"], answer["publishers"]["s"]["incarnation"]) == (0, 0)
    back = capture(
        tmp_path / "3", Record(9.0, "s", message(0)), Record(1.0, "s", message(1)), Record(2.0, "s", message(2))
    )
    other = capture(tmp_path / "4", Record(0.0, "t", message(0, topic=b"t")))
    publishers = replay(back, other)["publishers"]
    assert publishers["s"] | {"topic": ""} == publishers["s"] | {
        "topic": "",
        "gaps": 0,
        "incarnation": 0,
        "last_seq": 2,
    }


def test_replayed_messages_fill_a_gap(tmp_path: Path, replay: Any) -> None:
    answers = [[b"", *message(n, block(n))] for n in (0, 1, 2)]
    path = capture(
        tmp_path / "c",
        Record(0.0, "s", message(0, block(0))),
        Record(1.0, "s", message(2, block(2))),
        *[Record(2.0, "s", frames, True) for frames in answers],
        Record(2.0, "s", [b"", b"", b"\xff" * 8, b""], True),
    )
    lines = [{"id": n, "token_ids": list(range(13)), "after": n} for n in (2, 6)]
    answer = replay(path, "--prompts", prompts(tmp_path / "p", *lines))
    assert [s["endpoints"]["pod"]["blocks"] for s in answer["scores"]] == [1, 3]
    publisher = answer["publishers"]["s"]
    assert (publisher["gaps"], publisher["missing"], publisher["state"], publisher["last_seq"]) == (1, 0, "live", 2)


def test_a_cut_capture_is_used_as_far_as_it_is_whole(tmp_path: Path, replay: Any) -> None:
    path = Path(capture(tmp_path / "c", *[Record(float(n), "s", message(n, block(n))) for n in range(3)]))
    path.write_bytes(path.read_bytes()[:-5])
    assert replay(str(path))["publishers"]["s"]["last_seq"] == 1
    assert "ends inside record 3" in replay.err


def test_damage_ends_one_capture_not_the_others_and_is_an_error(tmp_path: Path, replay: Any) -> None:
    bad = Path(capture(tmp_path / "1", Record(0.0, "s", message(0, block(0)))))
    bad.write_bytes(bad.read_bytes() + b"junk")
    good = capture(tmp_path / "2", Record(1.0, "t", message(0, block(0))))
    assert list(replay(str(bad), good, status=1)["publishers"]) == ["s", "t"]
    assert "record 2, which begins at byte" in replay.err
    replay(str(tmp_path / "absent"), status=1)
    assert "No such file" in replay.err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", ":2: "),
        ('{"id": 1}', ":2: Object missing required field `token_ids`"),
        ('{"token_ids": [1, -1]}', ":2: token_ids: -1 is not in"),
        ('{"token_ids": [4294967296]}', ":2: token_ids: 4294967296 is not in"),
        ('{"token_ids": [], "after": -1}', ":2: after: -1 is negative"),
    ],
)
def test_a_wrong_prompt_names_its_line(line: str, says: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "p").write_text('{"token_ids": [1]}\n' + line)
    path = capture(tmp_path / "c")
    assert main(["replay", path, "--prompts", str(tmp_path / "p"), "--reference"]) == 2
    assert says in capsys.readouterr().err


def test_the_readable_table(capsys: Any, tmp_path: Path) -> None:
    path = capture(tmp_path / "c", Record(0.0, "tcp://a:1", message(0, block(0))), Record(1.0, "x", [b"no payload"]))
    lines = prompts(tmp_path / "p", {"id": "yes", "token_ids": [0, 1, 2, 3, 9]}, {"id": "no", "token_ids": [7] * 5})
    assert main(["replay", path, "--prompts", lines, "--reference"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:3] == ["SOURCE", "ENDPOINT", "TOPIC"]
    assert out[1].split() == ["tcp://a:1", "pod", "kv@pod@m", "0", "live", "0", "0", "0", "0", "1", "0"]
    assert out[4].split() == ["yes", "pod", "4", "1", "1", "hbm:1"]
    assert out[5].split() == ["no", "nobody", "0", "0", "0"]


def test_hostile_frames_in_a_capture_end_nothing(tmp_path: Path, replay: Any) -> None:
    good = [record.frames for record in CaptureReader(CAPTURES / "llama-sha256cbor.capture")]
    records = []
    for n, frames in enumerate(good):
        topic, sequence, payload = frames
        records += [
            Record(float(n), "evil", [topic, sequence, payload[: len(payload) // 2]]),
            Record(float(n), "evil", [topic, b"short", payload]),
            Record(float(n), "evil", [payload]),
            Record(float(n), "evil", []),
            Record(float(n), "good", frames),
        ]
    answer = replay(capture(tmp_path / "c", *records))
    assert answer["publishers"]["good"]["last_seq"] == len(good) - 1
    assert answer["publishers"]["good"]["skipped"] == 0
