"""The doctor, against simulated engines that are set up well and badly."""

from __future__ import annotations

import json
import pathlib
import socket
from typing import Any

import pytest

from kvindex.service import cli
from kvindex.simulator import tokenizer as sim_tokenizer
from tests.service.process import Daemon
from tests.simulator.process import sim

pytestmark = pytest.mark.e2e


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit status, and the last finding of each check."""
    status = cli.main(["doctor", "--json", *arguments])
    answer = json.loads(capsys.readouterr().out)
    assert answer["errors"] == sum(f["level"] == "error" for f in answer["findings"])
    for finding in answer["findings"]:
        assert finding["level"] == "ok" or finding["fix"], "whatever is not well says how to fix it"
    return status, {f["check"]: f for f in answer["findings"]}


def test_a_good_engine(capsys: pytest.CaptureFixture[str]) -> None:
    with sim("--block-size", "32", "--dp-size", "2", "--lora", "ad") as engine:
        status, said = doctor(capsys, engine.ready["url"])
        assert status == 0
        checks = ("reachable", "version", "prefix caching", "events", "replay socket", "topic", "event port")
        for check in (*checks, "replay port", "events arrive", "cached-token report"):
            assert said[check]["level"] == "ok", said[check]
        assert said["model"]["text"] == "sim, adapters ad"
        assert said["block size"]["text"].startswith("32 tokens")
        assert said["events"]["text"].count("rank") == 2
        assert said["events arrive"]["text"] == "cache groups: full of 32"
        assert said["prediction"]["text"] == "the index predicted 64 from the events, exactly"
        assert cli.main(["doctor", engine.ready["url"], "--no-requests"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == engine.ready["url"]
        assert lines[-1] == "0 errors, 2 warnings"


def test_events_off(capsys: pytest.CaptureFixture[str]) -> None:
    with sim("--no-kv-events") as engine:
        status, said = doctor(capsys, engine.ready["url"])
        assert status == 1
        assert said["events"]["text"] == "are off: the engine publishes nothing"
        assert '"replay_endpoint":"tcp://*:5657"' in said["events"]["fix"]
        assert f"kv@127.0.0.1:{engine.ready['port']}@sim" in said["events"]["fix"]
        assert said["cached-token report"]["level"] == "ok"
        assert "prediction" not in said


def test_no_replay_no_names_no_cached_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    with sim("--kv-replay-port", "-1", "--topic", "", "--no-prompt-tokens-details") as engine:
        status, said = doctor(capsys, engine.ready["url"])
        assert status == 0
        warnings = {check for check, finding in said.items() if finding["level"] == "warning"}
        assert warnings == {"replay socket", "topic", "cached-token report", "tokenizer", "daemon"}
        assert "--enable-prompt-tokens-details" in said["cached-token report"]["fix"]
        assert "kv@NAME@sim" in said["topic"]["fix"]
        assert said["events arrive"]["level"] == "ok"


def test_a_topic_with_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    with sim("--topic", "kv@pod@llama") as engine:
        status, said = doctor(capsys, engine.ready["url"], "--no-requests")
        assert status == 1
        assert said["topic"]["text"].startswith("says model 'llama', but the engine serves 'sim'")
        assert said["topic"]["fix"].startswith('use "topic": "kv@pod@sim"')
        assert "prediction" not in said


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    status, said = doctor(capsys, f"127.0.0.1:{port}")
    assert status == 1
    assert said["reachable"]["text"] == f"http://127.0.0.1:{port}: cannot connect: Connection refused"
    assert cli.main(["doctor", "ftp://x"]) == 2
    assert "is not http://host:port" in capsys.readouterr().err


def test_config_and_the_daemon_that_runs_with_it(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    sim_tokenizer.export(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        dead = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    with sim() as engine:
        url = engine.ready["url"]
        with Daemon(tmp_path, {"engines": [url], "tokenizers": {"sim": "model"}, "token": "t"}) as daemon:
            engine.complete("hello again " * 20)
            daemon.caught_up(url.removeprefix("http://"), 0)
            body: dict[str, Any] = {
                "engines": [{"url": url, "name": "a"}],
                "listen": {"grpc": daemon.grpc, "http": "127.0.0.1:0"},
                "tokenizers": {"sim": "model"},
                "token": "t",
            }
            node = tmp_path / "other.yaml"
            node.write_text(json.dumps(body))
            status, said = doctor(capsys, "-c", str(node))
            assert status == 0
            assert said["tokenizer"]["text"] == "of 'sim': the same token ids as the engine"
            assert said["daemon"]["text"] == f"runs at {daemon.grpc}; follows 127.0.0.1:{engine.ready['port']}"
            assert said["topic"]["text"].endswith("the endpoint is called a")

            made = sim_tokenizer.build()
            made.add_tokens(["quick brown"])
            (tmp_path / "wrong").mkdir()
            made.save(str(tmp_path / "wrong" / "tokenizer.json"))
            body["engines"].append({"url": url, "name": "a", "model": "llama"})
            body["publishers"] = [{"source": dead}]
            body |= {"tokenizers": {"sim": "wrong"}, "token": "another"}
            node.write_text(json.dumps(body))
            status, said = doctor(capsys, "-c", str(node), "--no-requests")
            assert status == 1
            assert said["tokenizer"]["text"].startswith("of 'sim' makes other token ids than the engine")
            assert said["model name"]["text"].endswith("has model 'llama', but it serves 'sim'")
            assert said["endpoint names"]["text"].startswith("a is given more than once")
            assert said["event port"]["text"].startswith(f"publishers[0]: {dead}: ")
            assert "UNAUTHENTICATED" in said["daemon"]["text"]
    (tmp_path / "broken.yaml").write_text("engins: []")
    status, said = doctor(capsys, "-c", str(tmp_path / "broken.yaml"))
    assert status == 1
    assert said["config"]["text"].startswith("engins: unknown field; did you mean `engines`?")
