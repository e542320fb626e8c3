"""`kvindex record`, from sockets to a file that `kvindex replay` reads, ended by count, by time and by Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kvindex import Index
from kvindex.events.recording import CaptureReader, CaptureWriter
from kvindex.service.cli import main
from kvindex.service.record import Recorder
from tests.events.test_replay_command import block, message
from tests.events.test_sources import engine
from tests.support.publisher import Publisher


def feed(publisher: Publisher, payloads: list[bytes]) -> threading.Thread:
    """Send from the background as soon as somebody listens."""

    def _send() -> None:
        deadline = time.monotonic() + 10
        while not (publisher.subscribers and (publisher.questions or not publisher.replay_endpoint)):
            if time.monotonic() > deadline:
                return
            time.sleep(0.005)
        for payload in payloads:
            publisher.send(payload)

    thread = threading.Thread(target=_send)
    thread.start()
    return thread


def test_frames_are_written_verbatim_with_their_source(tmp_path: Path, capsys: Any) -> None:
    publisher = Publisher(replay_endpoint=None)
    sender = feed(publisher, [b"%d" % i for i in range(10)])
    path = tmp_path / "c"
    before = time.time()
    assert main(["record", publisher.endpoint, "-o", str(path), "--messages", "5", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["messages"], summary["file"], summary["bytes"]) == (5, str(path), path.stat().st_size)
    records = list(CaptureReader(path))
    assert [record.frames for record in records] == [
        [b"kv@pod@model", n.to_bytes(8, "big"), b"%d" % n] for n in range(5)
    ]
    assert {record.source for record in records} == {publisher.endpoint}
    assert all(before <= record.received <= time.time() for record in records)
    sender.join()
    publisher.close()


def test_what_was_lost_stands_in_its_place_marked_as_replayed(tmp_path: Path, capsys: Any) -> None:
    publisher = Publisher()
    sent = [block(n) for n in range(6)]

    def events() -> None:
        deadline = time.monotonic() + 10
        while not (publisher.subscribers and publisher.questions) and time.monotonic() < deadline:
            time.sleep(0.005)
        publisher.publish(sent[0])
        publisher.lose(2)
        for event in sent[1:]:
            publisher.publish(event)

    thread = threading.Thread(target=events)
    thread.start()
    path = tmp_path / "c"
    # At least the two lost ones come from the replay; how many of the next ones too depends on timing.
    command = ["record", publisher.endpoint, "--replay-endpoint", publisher.replay_endpoint or "", "-o", str(path)]
    assert main([*command, "--seconds", "1.5"]) == 0
    thread.join()
    records = list(CaptureReader(path))
    numbers = [int.from_bytes(r.frames[-2], "big") for r in records if r.frames[-1]]
    assert numbers == list(range(6))
    assert [r.replay for r in records][:3] == [False, True, True]
    index = Index(reference=True)
    for record in records:
        assert index.ingest(record.source, record.frames, record.replay).status in (
            "applied",
            "replay_end",
            "duplicate",
        )
    row = index.score(list(range(25))).of("pod")
    assert row is not None
    assert row.blocks == 6
    assert f"{path}: " in capsys.readouterr().out
    publisher.close()


def test_a_restart_that_only_its_replay_showed_is_one_for_a_reader_too(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with path.open("wb") as file:
        recorder = Recorder(CaptureWriter(file), threading.Event())
        for n in range(1100):  # more than any reader remembers payloads of
            recorder.ingest("s", message(n, block(n)))
        recorder.restarted("s")
        for n in range(2):
            recorder.ingest("s", [b"", *message(n, block(5))], replay=True)
        recorder.ingest("s", [b"", b"", b"\xff" * 8, b""], replay=True)
    index = Index(reference=True)
    for record in CaptureReader(path):
        index.ingest(record.source, record.frames, record.replay)
    (publisher,) = index.publishers()
    assert (publisher.incarnation, publisher.last_sequence, publisher.state) == (1, 1, "live")


def test_an_engines_url_finds_all_its_ranks(tmp_path: Path, capsys: Any) -> None:
    publishers = [Publisher(replay_endpoint=None, rank=rank) for rank in range(2)]
    answer = {str(p): {"endpoint": publisher.endpoint} for p, publisher in enumerate(publishers)}
    senders = [feed(publisher, [b"x"]) for publisher in publishers]

    async def run() -> int:
        async with engine(lambda: answer) as url:
            arguments = ["record", url, "-o", str(tmp_path / "c"), "--messages", "2", "--seconds", "15"]
            return await asyncio.to_thread(main, arguments)

    assert asyncio.run(run()) == 0
    assert {record.source for record in CaptureReader(tmp_path / "c")} == {p.endpoint for p in publishers}
    for thread in senders:
        thread.join()
    for publisher in publishers:
        publisher.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    publisher = Publisher(replay_endpoint=None)
    path = tmp_path / "c"
    process = subprocess.Popen(
        [sys.executable, "-m", "kvindex.service.cli", "record", publisher.endpoint, "-o", str(path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        feed(publisher, [b"%d" % i for i in range(3)]).join()
        deadline = time.monotonic() + 15
        while publisher.on_the_wire < 3 or not path.exists() or path.stat().st_size == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=15)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert summary["messages"] == 3
    assert summary["sources"][publisher.endpoint]["lost"] == 0
    reader = CaptureReader(path)
    assert len(list(reader)) == 3
    assert reader.cut is None
    publisher.close()


def test_what_is_refused(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "c"
    path.write_bytes(b"somebody's work")

    def refused(*args: str, status: int = 2) -> str:
        assert main(["record", *args]) == status
        return str(capsys.readouterr().err)

    assert "exists; --force overwrites it" in refused("tcp://127.0.0.1:1", "-o", str(path))
    assert "is not tcp://host:port" in refused("127.0.0.1:1", "-o", str(path))
    assert "1 given for 0 event sockets" in refused("http://h", "--replay-endpoint", "tcp://h:1", "-o", str(path))
    assert "http://127.0.0.1:1: " in refused("http://127.0.0.1:1", "-o", str(path), status=1)
    assert "cannot connect" in refused("nonsense://x", "-o", str(tmp_path / "d"), status=1)
    nobody = refused("tcp://127.0.0.1:1", "-o", str(tmp_path / "e"), "--seconds", "0.1", status=1)
    assert "tcp://127.0.0.1:1: nobody was there" in nobody
    assert path.read_bytes() == b"somebody's work"


def test_a_full_disk_ends_it_with_the_reason() -> None:
    publisher = Publisher(replay_endpoint=None)
    sender = feed(publisher, [b"x" * 100_000] * 50)
    command = [sys.executable, "-m", "kvindex.service.cli", "record", publisher.endpoint, "-o", "/dev/full"]
    done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr
    sender.join()
    publisher.close()
