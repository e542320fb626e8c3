"""The demo does what the README says, ends by itself, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

DEMO = [sys.executable, "-m", "kvindex.service.cli", "demo"]


def children_of(marker: object) -> list[str]:
    """Command lines of live processes whose session or parent chain was the demo's: they carry its marker."""
    found = []
    for folder in pathlib.Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                environ = (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if f"KVINDEX_TEST_DEMO={marker}".encode() in environ and command:
                found.append(command)
    return found


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_scoring_beats_round_robin_and_nothing_stays(tmp_path: pathlib.Path) -> None:
    marker = os.getpid()
    done = subprocess.run(
        [*DEMO, "--json", "--out", str(tmp_path)],
        env={**os.environ, "KVINDEX_TEST_DEMO": str(marker)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    assert answer["scoring_won"]
    by_score = answer["runs"][1]
    assert by_score["requests"] == 120
    assert by_score["exact"] is not None
    assert (tmp_path / "demo.svg").read_text().startswith("<?xml")
    assert children_of(marker) == []


@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_sigterm_in_the_middle_leaves_nothing(tmp_path: pathlib.Path) -> None:
    marker = f"{os.getpid()}-term"
    demo = subprocess.Popen(
        [*DEMO, "--out", str(tmp_path)],
        env={**os.environ, "KVINDEX_TEST_DEMO": marker},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while len(children_of(marker)) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    demo.send_signal(signal.SIGTERM)
    assert demo.wait(30) != 0
    deadline = time.monotonic() + 10
    while children_of(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert children_of(marker) == []
