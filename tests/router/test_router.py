"""The router as its clients see it: a real process before real simulated engines and backends that misbehave."""

from __future__ import annotations

import json
import pathlib
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from kvindex.errors import ConfigError
from kvindex.router.config import EXAMPLE, RouterConfig
from kvindex.router.config import load as load_config
from tests.router.process import Backend, RouterProcess, free_port, read_all, read_request
from tests.simulator.process import Sim

pytestmark = pytest.mark.e2e
FAST = ("--prefill-tokens-per-second", "200000", "--seconds-per-output-token", "0.001")
WORDS = "the quick brown fox jumps over the lazy dog and runs away from the river into the green forest " * 6


def sim(name: str, *more: str) -> Sim:
    return Sim("--port", "0", "--topic", f"kv@{name}@sim", *FAST, *more)


def stop(engine: Sim) -> None:
    engine.process.terminate()
    engine.process.communicate(timeout=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from kvindex.simulator.tokenizer import export

    folder = tmp_path_factory.mktemp("model")
    export(folder)
    return str(folder)


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Sim]]:
    found = [sim("a"), sim("b")]
    yield found
    for engine in found:
        stop(engine)


@pytest.fixture(scope="module")
def router(engines: list[Sim], model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    endpoints = [{"name": n, "url": e.ready["url"]} for n, e in zip("ab", engines, strict=True)]
    with RouterProcess(tmp_path_factory.mktemp("router"), endpoints=endpoints, tokenizers={"sim": model}) as process:
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            index = json.loads(process.get("/readyz")[2])["index"]
            if [s["state"] for s in index["sources"]] == ["connected", "connected"]:
                break
            time.sleep(0.1)
        yield process


def complete(router: RouterProcess, prompt: object, **fields: object) -> tuple[dict[str, str], dict[str, object]]:
    body = {"model": "sim", "prompt": prompt, "max_tokens": 4, **fields}
    status, headers, raw = router.call("/v1/completions", body, content_type="application/json")
    assert status == 200, raw
    return headers, json.loads(raw)


def cached(answer: dict[str, object]) -> int:
    usage = answer["usage"]
    assert isinstance(usage, dict)
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def followed(router: RouterProcess, prompt: object, tokens: int) -> tuple[dict[str, str], dict[str, object]]:
    """Ask until the index has heard of what was stored (events take a moment)."""
    deadline = time.monotonic() + 10
    while True:
        headers, answer = complete(router, prompt)
        if int(headers["x-kvindex-matched-tokens"]) >= tokens or time.monotonic() > deadline:
            return headers, answer


def test_a_repeated_prompt_goes_where_its_prefix_is_and_the_prediction_is_exact(router: RouterProcess) -> None:
    first, _ = complete(router, f"alpha {WORDS}")
    headers, answer = followed(router, f"alpha {WORDS}", 16)
    assert headers["x-kvindex-endpoint"] == first["x-kvindex-endpoint"]
    assert int(headers["x-kvindex-matched-tokens"]) == cached(answer) > 0


def test_token_ids_need_no_tokenizer(router: RouterProcess) -> None:
    tokens = list(range(10, 90))
    complete(router, tokens)
    headers, answer = followed(router, tokens, 16)
    assert int(headers["x-kvindex-matched-tokens"]) == cached(answer) == 64


def test_a_cache_salt_is_a_namespace(router: RouterProcess) -> None:
    tokens = list(range(1000, 1090))
    complete(router, tokens)
    followed(router, tokens, 16)
    headers, answer = complete(router, tokens, cache_salt="tenant-a")
    assert int(headers["x-kvindex-matched-tokens"]) == cached(answer) == 0


def test_chat_is_templated_and_tokenised_as_the_engine_does(router: RouterProcess) -> None:
    body = {"model": "sim", "messages": [{"role": "user", "content": f"chat {WORDS}"}], "max_tokens": 3}
    deadline = time.monotonic() + 10
    while True:
        _, headers, raw = router.call("/v1/chat/completions", body)
        if int(headers["x-kvindex-matched-tokens"]) or time.monotonic() > deadline:
            break
    assert int(headers["x-kvindex-matched-tokens"]) == cached(json.loads(raw)) > 0


def test_a_stream_passes_and_the_usage_nobody_asked_for_is_taken_out(router: RouterProcess) -> None:
    before = router.metric("kvindex_router_predictions_total")
    body = {"model": "sim", "prompt": f"stream {WORDS}", "max_tokens": 5, "stream": True}
    status, headers, raw = router.call("/v1/completions", body)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    events = [e for e in raw.decode().split("\n\n") if e]
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(e.removeprefix("data: ")) for e in events[:-1]]
    assert all(chunk["choices"] for chunk in chunks)
    assert not any(chunk.get("usage") for chunk in chunks)
    assert router.metric("kvindex_router_predictions_total") == before + 1


def test_a_stream_keeps_the_usage_that_was_asked_for(router: RouterProcess) -> None:
    options = {"include_usage": True}
    body = {"model": "sim", "prompt": "usage", "max_tokens": 3, "stream": True, "stream_options": options}
    events = [e for e in router.call("/v1/completions", body)[2].decode().split("\n\n") if e]
    last = json.loads(events[-2].removeprefix("data: "))
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


def test_a_pick_can_be_explained(router: RouterProcess) -> None:
    _, headers, _ = router.call(
        "/v1/completions", {"model": "sim", "prompt": "why", "max_tokens": 1}, x_request_id="q1"
    )
    said = json.loads(router.get("/debug/explain/q1")[2])
    assert said["endpoint"] == headers["x-kvindex-endpoint"]
    assert {c["endpoint"] for c in said["candidates"]} == {"a", "b"}
    assert router.get("/debug/explain/never")[0] == 404


def test_other_paths_are_forwarded(router: RouterProcess) -> None:
    status, _, raw = router.get("/v1/models")
    assert status == 200
    assert json.loads(raw)["data"][0]["id"] == "sim"
    assert router.call("/tokenize", {"model": "sim", "prompt": "hello"})[0] == 200


def test_the_engines_own_error_passes(router: RouterProcess) -> None:
    status, headers, raw = router.call("/v1/completions", {"model": "sim", "prompt": "x", "max_tokens": -1})
    assert status == 400
    assert "x-kvindex-endpoint" in headers
    assert json.loads(raw)["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": 3}', b"\xff"])
def test_a_body_that_is_none_is_refused(router: RouterProcess, body: bytes) -> None:
    status, _, raw = router.call("/v1/completions", body)
    assert status == 400
    assert json.loads(raw)["error"]["code"] == "bad_body"


SMUGGLED = {
    "length and chunked": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n"
    b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    "signed length": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: +1\r\n\r\na",
    "chunked twice": b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "unknown coding": b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "bare newline": b"GET / HTTP/1.1\nhost: x\n\n",
    "folded header": b"GET / HTTP/1.1\r\nhost: x\r\na: b\r\n c\r\n\r\n",
    "space before colon": b"GET / HTTP/1.1\r\nhost : x\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
    "not http": b"hello there\r\n\r\n",
    "huge header": b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"b" * 70_000 + b"\r\n\r\n",
    "chunk size overflow": b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_what_two_parsers_could_read_differently_is_refused(router: RouterProcess, name: str) -> None:
    answer = router.raw(SMUGGLED[name])
    assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501")), answer[:200]
    assert answer.count(b"HTTP/1.1 ") == 1
    assert router.get("/healthz")[0] == 200


def test_chunked_uploads_keep_alive_head_and_continue(router: RouterProcess) -> None:
    body = json.dumps({"model": "sim", "prompt": "chunked", "max_tokens": 1}).encode()
    chunked = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (10, body[:10], len(body) - 10, body[10:])
    with socket.create_connection(("127.0.0.1", router.port), timeout=10) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(chunked)
        answer, _ = read_request(client)  # an answer with a Content-Length reads like a request
        assert answer.startswith(b"HTTP/1.1 200 ")
        client.sendall(b"HEAD /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        head = read_all(client, 5)
        assert head.startswith(b"HTTP/1.1 200 ")
        assert head.endswith(b"\r\n\r\n")


def test_a_megabyte_body_passes(router: RouterProcess) -> None:
    tokens = [i % 500 for i in range(200_000)]
    status, _, raw = router.call("/v1/completions", {"model": "sim", "prompt": tokens, "max_tokens": 1})
    assert status == 400  # longer than the engine's context: the engine itself says so
    assert b"context" in raw


def test_a_client_that_leaves_cancels_the_engine(engines: list[Sim], router: RouterProcess) -> None:
    body = json.dumps({"model": "sim", "prompt": "leave", "max_tokens": 20_000, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", router.port), timeout=10) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        assert client.recv(12) == b"HTTP/1.1 200"
    deadline = time.monotonic() + 10

    def running() -> float:
        texts = [e.call("/metrics").text for e in engines]
        lines = [line for t in texts for line in t.splitlines() if line.startswith("vllm:num_requests_running")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    while running() > 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running() == 0


def test_a_refusing_endpoint_is_retried_elsewhere_and_none_left_is_503(tmp_path: pathlib.Path) -> None:
    engine = sim("only")
    try:
        dead = {"name": "dead", "url": f"http://127.0.0.1:{free_port()}", "model": "sim"}
        live = {"name": "only", "url": engine.ready["url"]}
        with RouterProcess(tmp_path, endpoints=[dead, live], index="none", scoring={"policy": "round-robin"}) as router:
            for _ in range(4):
                headers, _ = complete(router, "retry")
                assert headers["x-kvindex-endpoint"] == "only"
            assert router.metric("kvindex_router_retries_total") >= 1
            stop(engine)
            status, _, raw = router.call("/v1/completions", {"model": "sim", "prompt": "x"})
            assert status in (502, 503)
            status, _, raw = router.call("/v1/completions", {"model": "sim", "prompt": "x"})
            assert status == 503
            assert "dead" in json.loads(raw)["error"]["message"]
    finally:
        if engine.process.poll() is None:
            stop(engine)


def test_an_engine_that_breaks_off_is_reported(tmp_path: pathlib.Path) -> None:
    def half(connection: socket.socket) -> None:
        head, _ = read_request(connection)
        if head.startswith(b"POST"):
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")

    def nothing(connection: socket.socket) -> None:
        read_request(connection)

    for serve, expected in ((half, b"half"), (nothing, b"502")):
        backend = Backend(serve)
        folder = tmp_path / expected.decode()
        folder.mkdir()
        endpoint = {"name": "bad", "url": f"http://127.0.0.1:{backend.port}", "model": "m"}
        with RouterProcess(folder, endpoints=[endpoint], index="none") as router:
            body = b'{"model":"m","prompt":"x"}'
            answer = router.raw(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body), 5
            )
            assert expected in answer
            if serve is half:
                assert answer.endswith(b"half")  # cut short, and the connection reset: never a whole answer
        backend.close()


def test_a_slow_client_holds_the_engine_back(tmp_path: pathlib.Path) -> None:
    sent = [0]
    done = threading.Event()

    def flood(connection: socket.socket) -> None:
        head, _ = read_request(connection)
        if not head.startswith(b"POST"):
            return
        connection.settimeout(1.0)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
        try:
            while sent[0] < 1_000_000_000:
                sent[0] += connection.send(b"x" * 65536)
        except TimeoutError:
            done.set()

    backend = Backend(flood)
    endpoint = {"name": "flood", "url": f"http://127.0.0.1:{backend.port}", "model": "m"}
    with RouterProcess(tmp_path, endpoints=[endpoint], index="none") as router:
        body = b'{"model":"m","prompt":"x"}'
        with socket.create_connection(("127.0.0.1", router.port), timeout=10) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
            )
            assert done.wait(15)
            assert sent[0] < 64 << 20
    backend.close()


def test_endpoints_come_from_a_watched_file(engines: list[Sim], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "endpoints.yaml"

    def entry(name: str, engine: Sim) -> str:
        return f"- {{name: {name}, address: 127.0.0.1, port: '{engine.ready['port']}'}}\n"

    path.write_text("endpoints:\n" + entry("a", engines[0]))
    with RouterProcess(tmp_path, endpoints_file=str(path), index="none") as router:

        def names() -> set[str]:
            return set(json.loads(router.get("/readyz")[2])["endpoints"])

        assert names() == {"a"}
        path.write_text("endpoints:\n" + entry("a", engines[0]) + entry("b", engines[1]))
        deadline = time.monotonic() + 5
        while names() != {"a", "b"} and time.monotonic() < deadline:
            time.sleep(0.05)
        assert names() == {"a", "b"}
        path.write_text("endpoints: [{name: c}]\n")
        while "the old endpoints stay" not in router.log() and time.monotonic() < deadline + 5:
            time.sleep(0.05)
        assert "url" in router.log()
        assert names() == {"a", "b"}


def test_without_an_index_it_says_so(engines: list[Sim], tmp_path: pathlib.Path) -> None:
    endpoint = {"name": "a", "url": engines[0].ready["url"]}
    with RouterProcess(tmp_path, endpoints=[endpoint], index="none") as router:
        assert "routed by load alone" in router.log()
        assert json.loads(router.get("/readyz")[2])["index"]["mode"] == "none"
        assert complete(router, "x")[0]["x-kvindex-matched-tokens"] == "0"


def test_a_prompt_that_cannot_be_tokenised_is_routed_and_marked(engines: list[Sim], tmp_path: pathlib.Path) -> None:
    endpoint = {"name": "a", "url": engines[0].ready["url"]}
    with RouterProcess(tmp_path, endpoints=[endpoint]) as router:
        headers, _ = complete(router, "no tokenizer is configured")
        assert headers["x-kvindex-degraded"] == "no_tokenizer"
        assert router.metric("kvindex_router_degraded_total") == 1


def test_a_daemon_that_is_not_there_costs_the_prefix_only(
    engines: list[Sim], model: str, tmp_path: pathlib.Path
) -> None:
    endpoint = {"name": "a", "url": engines[0].ready["url"]}
    grpc = {"grpc": f"127.0.0.1:{free_port()}"}
    with RouterProcess(tmp_path, endpoints=[endpoint], index=grpc, tokenizers={"sim": model}) as router:
        headers, _ = complete(router, "daemon")
        assert headers["x-kvindex-degraded"] == "index_unavailable"


def test_sigterm_finishes_what_is_in_flight(tmp_path: pathlib.Path) -> None:
    engine = Sim("--port", "0", "--seconds-per-output-token", "0.05")
    try:
        with RouterProcess(tmp_path, endpoints=[{"name": "a", "url": engine.ready["url"]}], index="none") as router:
            answers: list[int] = []
            body = {"model": "sim", "prompt": "slow", "max_tokens": 20}
            asking = threading.Thread(target=lambda: answers.append(router.call("/v1/completions", body)[0]))
            asking.start()
            time.sleep(0.4)
            router.process.send_signal(signal.SIGTERM)
            asking.join(15)
            assert answers == [200]
            assert router.process.wait(15) == 0
    finally:
        stop(engine)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("endpoints: []", "endpoints: give a list"),
        ("endpoints: [{name: a, url: 'ftp://x'}]", "endpoints[0].url"),
        ("endpoints: [{name: a, url: 'http://x:1'}]\nlisten: 99", "listen"),
        ("endpoints: [{name: a, url: 'http://x:1'}]\nscorring: {}", "scoring"),
        ("endpoints: [{name: a, url: 'http://x:1'}, {name: a, url: 'http://y:1'}]", "twice"),
        ("endpoints: [{name: a, url: 'http://x:1'}]\ntokenizers: {m: /nowhere}", "tokenizers.m"),
    ],
)
def test_a_wrong_config_is_named(text: str, said: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert said in str(error.value)


def test_the_example_is_valid_and_at_the_defaults(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(EXAMPLE)
    loaded = load_config(path)
    assert loaded == RouterConfig(endpoints=loaded.endpoints)


def test_the_admin_listener_and_the_token_keep_things_apart(engines: list[Sim], tmp_path: pathlib.Path) -> None:
    admin = free_port()
    (tmp_path / "token").write_text("secret\n")
    config = {"token_file": str(tmp_path / "token"), "admin": f"127.0.0.1:{admin}", "index": "none"}
    with RouterProcess(tmp_path, endpoints=[{"name": "a", "url": engines[0].ready["url"]}], **config) as router:
        body = {"model": "sim", "prompt": "x", "max_tokens": 1}
        assert router.get("/readyz")[0] == 200
        assert router.call("/v1/completions", body)[0] == 401
        assert router.call("/v1/completions", body, authorization="Bearer wrong")[0] == 401
        assert router.call("/v1/completions", body, authorization="Bearer secret")[0] == 200
        assert router.call("/metrics", authorization="Bearer secret")[0] == 404
        router.url = f"http://127.0.0.1:{admin}"
        assert router.call("/metrics", authorization="Bearer secret")[0] == 200
        assert router.call("/v1/completions", body, authorization="Bearer secret")[0] == 404
