"""Capture files: round trip, real files, cut files, hostile files."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import msgspec
import pytest

from kvindex.errors import CaptureError
from kvindex.events.decode import decode
from kvindex.events.frames import Message, split
from kvindex.events.model import Stored
from kvindex.events.recording import CaptureReader, CaptureWriter, Record

CAPTURES = Path(__file__).parent.parent / "data" / "captures"
pack = msgspec.msgpack.encode

RECORDS = [
    Record(1.5, "tcp://a:1", [b"t", b"\0" * 8, b"p" * 300]),
    Record(2.5, "ipc:///tmp/x", [b"", b"t", b"\0" * 8, b""], True),
    Record(2.0, "", []),
    Record(3.0, "s" * 300, [b"x" * 70_000, b""]),
]


def write(path: Path, records: list[Record]) -> bytes:
    with path.open("wb") as file:
        writer = CaptureWriter(file)
        for record in records:
            writer.write(record)
    assert (writer.records, writer.bytes) == (len(records), path.stat().st_size)
    return path.read_bytes()


def test_round_trip_in_the_documented_form(tmp_path: Path) -> None:
    path = tmp_path / "c"
    data = write(path, RECORDS)
    first = pack([1.5, "tcp://a:1", [b"t", b"\0" * 8, b"p" * 300]])
    second = pack([2.5, "ipc:///tmp/x", [b"", b"t", b"\0" * 8, b""], "replay"])
    assert data.startswith(first + second)
    reader = CaptureReader(path)
    assert list(reader) == RECORDS
    assert list(reader) == RECORDS  # a reader can be iterated again
    assert (reader.cut, reader.records) == (None, 4)


@pytest.mark.parametrize("path", sorted(CAPTURES.glob("*.capture")), ids=lambda path: path.stem)
def test_captures_of_real_engines_decode_without_a_skip(path: Path) -> None:
    tokens = 0
    for record in CaptureReader(path):
        message = split(record.frames)
        assert isinstance(message, Message)
        for engine in ("auto", "vllm"):
            batch = decode(message.payload, engine)
            assert batch.skipped == ()
            assert batch.events
            tokens += sum(len(event.token_ids) for event in batch.events if isinstance(event, Stored))
    assert tokens > 0


@pytest.mark.parametrize("name", ["llama-sha256cbor", "gemma3-swa"])
def test_the_array_form_says_what_the_map_form_says(name: str) -> None:
    new = [decode(record.frames[2]) for record in CaptureReader(CAPTURES / f"{name}.capture")]
    old = [decode(record.frames[2]) for record in CaptureReader(CAPTURES / f"SYNTHETIC-legacy-array-{name}.capture")]
    assert repr(new) == repr(old)  # arrays inside: == is elementwise


@pytest.mark.parametrize("path", sorted(CAPTURES.glob("*.replay.msgpack")), ids=lambda path: path.name)
def test_replay_answers_equal_the_live_messages(path: Path) -> None:
    live = [record.frames for record in CaptureReader(CAPTURES / path.name.replace(".replay.msgpack", ".capture"))]
    answers = [split(frames, replay=True) for frames in msgspec.msgpack.decode(path.read_bytes())]
    assert answers[:-1] == [split(frames) for frames in live[2:]]
    end = answers[-1]
    assert isinstance(end, Message)
    assert end.is_end


def test_a_file_cut_anywhere_keeps_its_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "c"
    data = write(path, RECORDS[:3])
    ends = [0]
    for record in RECORDS[:3]:
        ends.append(ends[-1] + len(pack([*record[:3], "replay"] if record.replay else list(record[:3]))))
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        reader = CaptureReader(path)
        whole = sum(1 for end in ends[1:] if end <= cut)
        assert list(reader) == RECORDS[:whole]
        assert (reader.cut is None) == (cut in ends)
        if reader.cut:
            assert f"record {whole + 1}, which begins at byte {ends[whole]}" in reader.cut


@pytest.mark.parametrize(
    ("junk", "says"),
    [
        (b"hello world", "byte 0x68 does not begin an array"),
        (pack({"a": 1}), "does not begin an array"),
        (pack([1.0, "s"]), "an array of 2 elements"),
        (pack(["now", "s", []]), "does not begin a time"),
        (pack([1.0, 5, []]), "does not begin the source"),
        (pack([1.0, "s", {}]), "does not begin an array of frames"),
        (pack([1.0, "s", [1]]), "does not begin a frame"),
        (pack([1.0, "s", [b""] * 17]), "17 frames"),
        (pack([1.0, "s" * 5000, []]), "5000 bytes"),
        (pack([1.0, "s", [], "live"]), "the mark 'live'"),
        (b"\x93\x01\xa1s\x91\xc6\xff\xff\xff\xff", "a frame of 4294967295 bytes"),
        (b"\x93\x01\xa1s\xdd\xff\xff\xff\xff", "4294967295 frames"),
    ],
)
def test_what_is_no_record_names_the_byte(tmp_path: Path, junk: bytes, says: str) -> None:
    path = tmp_path / "c"
    good = write(path, RECORDS[:1])
    path.write_bytes(good + junk)
    got = []
    with pytest.raises(CaptureError, match=says) as caught:
        got.extend(CaptureReader(path))
    assert f"byte {len(good)}" in str(caught.value)


def test_a_missing_file_is_a_capture_error(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="No such file"):
        list(CaptureReader(tmp_path / "absent"))


def test_lengths_that_the_file_does_not_hold_cost_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(b"\x93\x01\xa1s\x91\xc6" + (200 << 20).to_bytes(4, "big") + b"few")
    tracemalloc.start()
    reader = CaptureReader(path)
    assert list(reader) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reader.cut
    assert peak < 8 << 20


def test_a_long_file_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "c"
    write(path, [Record(float(i), "s", [b"t", b"\0" * 8, b"p" * 20_000]) for i in range(1000)])
    tracemalloc.start()
    assert sum(1 for _ in CaptureReader(path)) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_random_damage_never_escapes_the_error_tree(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    path = tmp_path / "c"
    data = write(path, RECORDS[:3])
    for _ in range(1500):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            records = list(CaptureReader(path))
        except CaptureError:
            continue
        assert all(isinstance(frame, bytes) for record in records for frame in record.frames)
