"""A real `kvindex sim` process: its event sockets, its start, its end and what it does when clients go away."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from kvindex import Index
from kvindex.simulator.tokenizer import ChatModel
from tests.simulator.process import DEADLINE_SECONDS, Listener, Sim, sim

pytestmark = pytest.mark.e2e

SLOW = ("--seconds-per-output-token", "0.05")
FAST = ("--time-scale", "20")
CHAT = {"messages": [{"role": "user", "content": "tell me a story"}]}


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def refuses(engine: Sim) -> bool:
    try:
        socket.create_connection((engine.ready["host"], engine.ready["port"]), timeout=DEADLINE_SECONDS).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    return False


def test_events_on_the_wire_predict_the_next_request() -> None:
    with sim(*FAST, "--dp-size", "2", "--model", "org/m@1") as engine:
        sources = engine.call("/kv_event_sources").json()
        pod = f"127.0.0.1:{engine.ready['port']}"
        assert sources == engine.ready["kv_event_sources"]
        assert {source["topic"] for source in sources.values()} == {f"kv@{pod}@org/m@1"}
        index = Index(reference=True)
        with Listener(engine, 1) as listener:
            messages = listener.join(engine, 5, X_data_parallel_rank="1")
            prompt = list(range(100, 150))
            engine.call("/v1/completions", {"prompt": prompt, "max_tokens": 1}, X_data_parallel_rank="1")
            messages += listener.drain()
            replayed = listener.replay(0)
            first = int.from_bytes(messages[0][1], "big")
            # Replay is the live stream, byte for byte, from its beginning.
            assert [[b"", *message] for message in messages] == replayed[first:]
            assert listener.replay(len(replayed) - 1) == replayed[-1:]
            assert listener.replay(len(replayed)) == []
            for message in messages:
                assert index.ingest("rank1", message).status == "applied"
                assert msgspec.msgpack.decode(message[2])[2] == 1
        row = index.score(prompt, model="org/m@1").of(f"{pod}:dp1")
        assert row is not None
        answer = engine.call("/v1/completions", {"prompt": prompt}, X_data_parallel_rank="1").json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == row.tokens == 48


def test_a_reset_is_announced_with_the_next_step() -> None:
    with sim(*FAST) as engine, Listener(engine) as listener:
        listener.join(engine, 5)
        assert engine.call("/reset_prefix_cache", {}).json() == {"success": True}
        assert listener.drain() == []
        assert engine.cached([5] * 20) == 0
        (message,) = listener.drain()
        kinds = [event["type"] for event in msgspec.msgpack.decode(message[2])[1]]
        assert kinds == ["AllBlocksCleared", "BlockStored"]


def test_withheld_messages_are_a_gap_that_replay_fills() -> None:
    with sim(*FAST) as engine, Listener(engine) as listener:
        before = listener.join(engine, 5)
        last = int.from_bytes(before[-1][1], "big")
        assert engine.call("/sim/withhold_events?batches=2", {}).json() == {"withheld": 2, "next_sequence": last + 1}
        for start in (100, 200, 300):
            engine.complete([start] * 20)
        assert [int.from_bytes(message[1], "big") for message in listener.drain()] == [last + 3]
        assert [int.from_bytes(answer[2], "big") for answer in listener.replay(last)] == [
            last,
            last + 1,
            last + 2,
            last + 3,
        ]


def test_malformed_replay_requests_are_ignored() -> None:
    with sim(*FAST) as engine, Listener(engine) as listener:
        listener.join(engine, 5)
        for frames in ([b""], [b"x"], [b"", b"short"], [b"", b"", b"", b""], [b"", b"\0" * 9]):
            listener.dealer.send_multipart(frames)
        assert len(listener.replay(0)) >= 1


def test_only_the_last_batches_are_kept_for_replay() -> None:
    with sim(*FAST, "--buffer-steps", "2") as engine, Listener(engine) as listener:
        for start in range(4):
            engine.complete([start + 1] * 20, 1)
        assert [int.from_bytes(answer[2], "big") for answer in listener.replay(0)] == [2, 3]


def test_a_client_that_goes_away_frees_its_request() -> None:
    with sim(*SLOW) as engine:
        for stream in (True, False):
            body = json.dumps({"prompt": [9] * 40, "max_tokens": 1000, "stream": stream, "n": 2}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            client = socket.create_connection((engine.ready["host"], engine.ready["port"]), timeout=DEADLINE_SECONDS)
            client.sendall(head + body)
            if stream:
                assert client.recv(64).startswith(b"HTTP/1.1 200 OK")
            eventually(lambda: engine.metric("vllm:num_requests_running") == 2)
            assert engine.metric("vllm:kv_cache_usage_perc") > 0
            client.close()
            eventually(lambda: engine.metric("vllm:num_requests_running") == 0)
        assert engine.metric("vllm:kv_cache_usage_perc") == 0
        aborted = [line for line in engine.call("/metrics").text.splitlines() if 'finished_reason="abort"' in line]
        assert aborted[0].endswith(" 4.0")
        assert engine.call("/load").json() == {"server_load": 0}


def test_terminating_lets_running_requests_finish_and_refuses_new_ones() -> None:
    engine = Sim(*SLOW)
    body = {"prompt": "x", "max_tokens": 20, "stream": True, "stream_options": {"include_usage": True}}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.call, "/v1/completions", body)
        eventually(lambda: engine.metric("vllm:num_requests_running") == 1)
        engine.process.terminate()
        eventually(lambda: refuses(engine))
        assert not running.done()
        assert running.result(DEADLINE_SECONDS).chunks()[-1]["usage"]["completion_tokens"] == 20
    assert engine.wait() == 0


def test_draining_has_a_deadline() -> None:
    engine = Sim(*SLOW, "--drain-seconds", "0.2")
    client = socket.create_connection((engine.ready["host"], engine.ready["port"]), timeout=DEADLINE_SECONDS)
    body = json.dumps({"prompt": "x", "max_tokens": 2000, "stream": True}).encode()
    client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert client.recv(64).startswith(b"HTTP/1.1 200")
    assert engine.stop() == 0
    client.close()


def test_a_killed_engine_comes_back_empty_with_its_sequence_at_zero() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe, socket.create_server(("127.0.0.1", 0)) as events:
        ports = [probe.getsockname()[1], events.getsockname()[1]]
    fixed = (*FAST, "--port", str(ports[0]), "--kv-events-port", str(ports[1]))
    first = Sim(*fixed)
    assert first.ready["port"] == ports[0]
    assert first.cached([3] * 40) == 0
    assert first.cached([3] * 40) == 32
    first.stop(kill=True)
    with sim(*fixed) as second, Listener(second) as listener:
        assert second.ready["kv_event_sources"]["0"]["endpoint"] == f"tcp://127.0.0.1:{ports[1]}"
        assert second.cached([3] * 40) == 0
        assert [int.from_bytes(answer[2], "big") for answer in listener.replay(0)] == [0]


def test_it_can_be_as_quiet_as_a_vllm_with_default_flags() -> None:
    with sim(*FAST, "--no-kv-events", "--no-prompt-tokens-details") as engine:
        assert engine.call("/kv_event_sources").json() == {}
        assert engine.complete("x")["usage"]["prompt_tokens_details"] is None
    with sim(*FAST, "--kv-replay-port", "-1", "--topic", "plain") as engine:
        source = engine.call("/kv_event_sources").json()["0"]
        assert source["replay_endpoint"] is None
        assert source["topic"] == "plain"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--block-size", "0"], 2, "block_size: 0 is not at least 1"),
        (["--dp-size", "0"], 2, "dp_size: 0 is not at least 1"),
        (["--time-scale", "0"], 2, "time_scale: 0.0 is not above 0"),
        (["--model-path", "/nonexistent"], 2, "/nonexistent has no tokenizer.json"),
        (["--port", "TAKEN"], 1, "cannot listen on 127.0.0.1"),
        (["--kv-events-port", "TAKEN"], 2, "cannot listen on tcp://127.0.0.1"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(arguments: list[str], status: int, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        failing = Sim(*(port if argument == "TAKEN" else argument for argument in arguments), ready=False)
        output, errors = failing.process.communicate(timeout=DEADLINE_SECONDS)
    assert failing.process.returncode == status
    assert output == ""
    assert message in errors
    assert errors.count("\n") == 1


def test_an_exported_model_gives_the_server_the_same_tokens(tmp_path: Path) -> None:
    exporting = Sim("--export-model", str(tmp_path))
    exporting.process.communicate(timeout=DEADLINE_SECONDS)
    assert exporting.ready == {"model": str(tmp_path)}
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "config.json"}
    chat = ChatModel.load(tmp_path)
    with sim(*FAST, "--model-path", str(tmp_path)) as engine:
        tokens = engine.call("/tokenize", CHAT).json()["tokens"]
        assert tokens == chat.encode(chat.render(CHAT["messages"]), add_special_tokens=False)
        assert engine.complete("hello there")["choices"][0]["text"]
