"""A daemon, real publishers, real channels: what goes in comes out, and what goes wrong is said."""

from __future__ import annotations

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvindex.errors import ServiceError, UsageError
from kvindex.service import wire
from kvindex.service.pb import index_pb2 as pb
from tests.service.process import Daemon, wait_for
from tests.support.publisher import Publisher, stored

pytestmark = pytest.mark.e2e

PROMPT = list(range(100, 164))  # four blocks of 16
OTHER = list(range(500, 532))


def block(i: int, prompt: list[int] = PROMPT, **fields: object) -> dict[str, object]:
    """The i-th block of a prompt; its key is i + 1."""
    return {**stored(i + 1, prompt[16 * i : 16 * i + 16], i or None), **fields}


def config(*publishers: Publisher, **more: object) -> dict[str, object]:
    sources = [{"source": p.endpoint, "replay": p.replay_endpoint} for p in publishers]
    return {"publishers": sources, "probe_interval_seconds": 0.2, **more}


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    one = Publisher(topic=b"kv@pod-1@m")
    yield one
    one.close()


def test_scores_follow_events(publisher: Publisher, tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, config(publisher)) as daemon, daemon.client() as client:
        last = publisher.publish(block(0), block(1), block(2))
        daemon.caught_up("pod-1", last)
        scores = client.score(PROMPT, "m")
        row = scores.of("pod-1")
        assert row is not None
        assert (row.blocks, row.tokens, row.score, row.state, row.tiers) == (3, 48, 3.0, "live", {"hbm": 3})
        assert row.seconds_saved == pytest.approx(48 / 8000)
        assert client.score(PROMPT, "another").endpoints == []
        assert client.score(PROMPT, "m", endpoints=["pod-2"]).endpoints == []
        assert client.score(PROMPT, "m", cache_salt="s").endpoints == []
        assert client.score(PROMPT, "m", lora="l").endpoints == []
        assert client.score(PROMPT).endpoints == ["pod-1"]

        publisher.publish({"type": "BlockRemoved", "block_hashes": [3], "medium": "GPU"})
        last = publisher.publish(block(3, medium="CPU"))
        daemon.caught_up("pod-1", last)
        assert client.score(PROMPT, "m").tokens.tolist() == [32]

        (endpoint,) = client.endpoints().endpoints
        assert (endpoint.name, endpoint.model, endpoint.block_size, endpoint.state) == ("pod-1", "m", 16, "live")
        assert [(g.group, g.kind, g.block_size) for g in endpoint.groups] == [(0, "full", 16)]
        (said,) = client.publishers().publishers
        assert (said.source, said.topic, said.last_sequence, said.state) == (
            publisher.endpoint,
            "kv@pod-1@m",
            2,
            "live",
        )


def test_explain_gives_a_reason_for_every_block(publisher: Publisher, tmp_path: pathlib.Path) -> None:
    other = Publisher(topic=b"kv@pod-2@m")
    with Daemon(tmp_path, config(publisher, other)) as daemon, daemon.client() as client:
        publisher.publish(block(0), block(1, medium="CPU"), block(2))
        last = publisher.publish({"type": "BlockRemoved", "block_hashes": [3], "medium": "GPU"})
        daemon.caught_up("pod-1", last)
        other.publish(block(0))
        other.publish({"type": "AllBlocksCleared"})
        salted = {**stored(99, OTHER[:16]), "extra_keys": [["tenant-a"]]}
        daemon.caught_up("pod-2", other.publish(salted))

        views = client.explain(PROMPT, "m")
        assert [v.first_token for v in views] == [0, 16, 32, 48]
        said = [{h.endpoint: (h.status, h.tier, h.sequence) for h in v.holders} for v in views]
        assert said[0]["pod-1"] == ("held", "hbm", 0)
        assert said[0]["pod-2"][0] == "cleared"
        assert said[1]["pod-1"] == ("held", "dram", 0)
        assert said[1]["pod-2"] == ("never_stored", None, None)
        assert said[2]["pod-1"] == ("removed", None, 1)
        assert said[3]["pod-1"] == ("never_stored", None, None)
        (view, _) = client.explain(OTHER, "m")
        assert {h.status for h in view.holders} == {"never_stored"}
        assert view.known_in == ("cache_salt=tenant-a",)
        (view, _) = client.explain(OTHER, "m", cache_salt="tenant-a", endpoints=["pod-2"])
        assert [(h.endpoint, h.status) for h in view.holders] == [("pod-2", "held")]
    other.close()


def test_lost_messages_are_replayed_and_a_restart_is_noticed(publisher: Publisher, tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, config(publisher)) as daemon, daemon.client() as client:
        daemon.caught_up("pod-1", publisher.publish(block(0)))
        publisher.lose(1)
        publisher.publish(block(1))
        daemon.caught_up("pod-1", publisher.publish(block(2)))
        assert client.score(PROMPT, "m").blocks.tolist() == [3]

        publisher.kill()
        again = Publisher(publisher.endpoint, publisher.replay_endpoint, topic=b"kv@pod-1@m")
        again.publish(block(0))
        wait_for("the restart emptied it", lambda: client.score(PROMPT, "m").blocks.tolist() == [1])
        p = daemon.publisher("pod-1")
        assert p is not None
        assert p.restarts == 1
        again.close()


@pytest.mark.parametrize(("policy", "blocks"), [("fence", [1]), ("keep", [2])])
def test_what_cannot_be_replayed_is_fenced_or_kept(policy: str, blocks: list[int], tmp_path: pathlib.Path) -> None:
    silent = Publisher(topic=b"kv@pod-1@m", replay_endpoint=None)
    with Daemon(tmp_path, config(silent, index={"on_lost_messages": policy})) as daemon, daemon.client() as client:
        wait_for("subscribed", lambda: silent.subscribers)
        daemon.caught_up("pod-1", silent.publish(block(0)))
        silent.lose(1)
        silent.publish(block(2))
        last = silent.publish(block(1))
        daemon.caught_up("pod-1", last)
        if policy == "fence":
            # what came before the gap is gone from scores, what came after it counts again
            assert client.score(PROMPT, "m").blocks.tolist() in ([], [0])
            daemon.caught_up("pod-1", silent.publish({"type": "AllBlocksCleared"}, block(0)))
            assert client.score(PROMPT, "m").blocks.tolist() == blocks
        else:
            assert client.score(PROMPT, "m").blocks.tolist() == blocks
        assert daemon.find_log("lost messages could not be replayed", source=silent.endpoint, then=policy)
        daemon.wait_metric(1, "kvindex_lost_messages_total")
    silent.close()


def test_metrics_answer_the_operators_questions(publisher: Publisher, tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, config(publisher)) as daemon, daemon.client() as client:
        publisher.publish(block(0), block(1), {"type": "Nonsense"})
        last = publisher.send(b"not msgpack \xc1")
        daemon.caught_up("pod-1", last - 1)
        client.score(PROMPT, "m")
        client.score([7] * 32, "m")
        with pytest.raises(UsageError):
            client.score([], "m")
        assert client.report([("pod-1", 32, 32, 64), ("pod-1", 48, 16, 64), ("nobody", 1, 1, 1)]) == ["nobody"]
        answer = daemon.get(
            "/v1/feedback", body={"observations": [{"endpoint": "pod-1", "predicted_tokens": 0, "cached_tokens": 9}]}
        )
        assert (answer.status, answer.json()) == (200, {"unknown": []})

        expected = {
            "kvindex_index_blocks": 2,
            "kvindex_index_entries": 2,
            "kvindex_index_publishers": 1,
            'kvindex_events_total{kind="stored"}': 2,
            'kvindex_skipped_total{reason="unknown_type"}': 1,
            'kvindex_skipped_total{reason="undecodable"}': 1,
            'kvindex_lookups_total{api="score"}': 2,
            'kvindex_lookup_hits_total{api="score"}': 1,
            "kvindex_lookup_seconds_count": 2,
            "kvindex_lookup_matched_tokens_total": 32,
            'kvindex_requests_refused_total{code="INVALID_ARGUMENT"}': 1,
            'kvindex_predictions_total{endpoint="pod-1",outcome="exact"}': 1,
            'kvindex_predictions_total{endpoint="pod-1",outcome="over"}': 1,
            'kvindex_predictions_total{endpoint="pod-1",outcome="under"}': 1,
            'kvindex_prediction_error_tokens_sum{direction="over"}': 32,
            "kvindex_reported_endpoints_unknown": 1,
            "kvindex_queue_overflow_total": 0,
            "kvindex_lost_messages_total": 0,
            'kvindex_sources{state="connected"}': 1,
            "kvindex_publishers_without_endpoint": 0,
            "kvindex_endpoints_without_publisher": 0,
        }
        text = daemon.get("/metrics").text
        samples = {
            name: float(value) for name, _, value in (x.rpartition(" ") for x in text.splitlines() if x[:1] != "#")
        }
        assert {name: samples.get(name) for name in expected} == expected
        assert samples["kvindex_index_bytes"] > 0
        state = [name for name, value in samples.items() if name.startswith("kvindex_publisher_state") and value == 1]
        assert [name for name in state if 'state="live"' in name] == state
        assert any(name.startswith("kvindex_publisher_lag_seconds") for name in samples)
        assert daemon.find_log("a router sends requests to an endpoint that no publisher speaks for", endpoint="nobody")


def test_probes_and_debug(publisher: Publisher, tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, config(publisher)) as daemon:
        assert daemon.get("/healthz").json() == {"status": "ok"}
        wait_for("ready", lambda: daemon.get("/readyz").status == 200)
        daemon.caught_up("pod-1", publisher.publish(block(0)))
        debug = daemon.get("/debug/publishers").json()
        assert debug["publishers"][0]["endpoint"] == "pod-1"
        assert debug["sources"] == [{"source": publisher.endpoint, "state": "connected", "detail": ""}]
        assert debug["endpoints"][0]["groups"][0]["block_size"] == 16
        assert daemon.get("/nowhere").status == 404
        assert daemon.get("/v1/feedback", body=b"{").status == 400
        answer = daemon.get("/v1/feedback", body={"observations": [{"endpont": "x"}]})
        assert answer.status == 400
        assert answer.json()["error"].startswith("observations[0].endpont: unknown field; did you mean `endpoint`?")


def test_not_ready_until_connected_or_the_deadline_passed(tmp_path: pathlib.Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        dead = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    body = {"publishers": [{"source": dead}], "engines": [url], "connect_deadline_seconds": 1.0}
    with Daemon(tmp_path, body) as daemon, grpc.insecure_channel(daemon.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        waiting = daemon.get("/readyz")
        assert waiting.status == 503
        assert waiting.json()["waiting_for"] == [dead, url]
        service = health_pb2.HealthCheckRequest(service=wire.SERVICE)
        assert health.Check(service, timeout=5).status == health_pb2.HealthCheckResponse.NOT_SERVING
        wait_for("the deadline", lambda: daemon.get("/readyz").status == 200)
        wait_for("serving", lambda: health.Check(service, timeout=5).status == health_pb2.HealthCheckResponse.SERVING)
        said = daemon.wait_log("engine has no publisher")
        assert said["fix"] == f"kvindex doctor {url}"
        daemon.wait_log("publisher is not connected", about=[dead])
        daemon.wait_metric(1, "kvindex_endpoints_without_publisher")


def test_health_and_reflection(publisher: Publisher, tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, config(publisher)) as daemon, grpc.insecure_channel(daemon.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", wire.SERVICE, "indexer.v1.IndexerService"):
            request = health_pb2.HealthCheckRequest(service=service)
            wait_for(
                service, lambda r=request: health.Check(r, timeout=5).status == health_pb2.HealthCheckResponse.SERVING
            )
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([asked]), timeout=5)
        assert {s.name for s in answer.list_services_response.service} >= {
            "kvindex.v1.IndexService",
            "indexer.v1.IndexerService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        by_symbol = reflection_pb2.ServerReflectionRequest(file_containing_symbol="kvindex.v1.IndexService")
        (answer,) = stub.ServerReflectionInfo(iter([by_symbol]), timeout=5)
        assert b"ScoreRequest" in answer.file_descriptor_response.file_descriptor_proto[0]


def score_stream(channel: grpc.Channel) -> grpc.StreamStreamMultiCallable:
    return channel.stream_stream(
        f"/{wire.SERVICE}/ScoreStream",
        request_serializer=pb.ScoreRequest.SerializeToString,
        response_deserializer=pb.ScoreResponse.FromString,
    )


def test_a_stream_answers_each_request_and_survives_bad_ones(publisher: Publisher, tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, config(publisher)) as daemon, grpc.insecure_channel(daemon.grpc) as channel:
        daemon.caught_up("pod-1", publisher.publish(block(0), block(1)))
        packed = wire.pack_tokens(PROMPT)
        requests = [
            pb.ScoreRequest(id=1, token_ids=packed),
            pb.ScoreRequest(id=2, token_ids=b"123"),
            pb.ScoreRequest(id=3, prompt="hello", model="m"),
            pb.ScoreRequest(id=4, token_ids=packed, protocol=99),
            pb.ScoreRequest(id=5, token_ids=packed, model="m"),
        ]
        answers = list(score_stream(channel)(iter(requests), timeout=10))
        assert [a.id for a in answers] == [1, 2, 3, 4, 5]
        assert list(answers[0].tokens) == list(answers[4].tokens) == [32]
        assert answers[0].prompt_tokens == 64
        codes = [a.error.code for a in answers]
        assert codes == [
            0,
            grpc.StatusCode.INVALID_ARGUMENT.value[0],
            *[grpc.StatusCode.FAILED_PRECONDITION.value[0]] * 2,
            0,
        ]
        assert "3 bytes is no multiple of 4" in answers[1].error.message
        assert "needs level 99, this server speaks 1 to 1" in answers[3].error.message


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.ScoreRequest(), "token_ids: is empty, and so is prompt; send one of them"),
        (pb.ScoreRequest(token_ids=b"12345"), "token_ids: 5 bytes is no multiple of 4"),
        (pb.ScoreRequest(token_ids=b"1234", prompt="p"), "prompt: is set, and so is token_ids"),
        (pb.ScoreRequest(token_ids=bytes(4 * 65)), "token_ids: 65 tokens is more than limits.max_prompt_tokens, 64"),
        (pb.ScoreRequest(prompt="p"), "model: must be set with a prompt"),
        (
            pb.ScoreRequest(token_ids=bytes(8), mm=[pb.MultiModalItem(hash="h", offset=1, length=2)]),
            "mm[0]: tokens 1 to 3 are",
        ),
        (
            pb.ScoreRequest(token_ids=bytes(8), mm=[pb.MultiModalItem(offset=1, length=1)]),
            "mm[0]: needs a hash and a length",
        ),
    ],
)
def test_invalid_questions_are_refused_with_the_reason(quiet: Daemon, request_: pb.ScoreRequest, message: str) -> None:
    with grpc.insecure_channel(quiet.grpc) as channel:
        score = channel.unary_unary(
            f"/{wire.SERVICE}/Score",
            request_serializer=pb.ScoreRequest.SerializeToString,
            response_deserializer=pb.ScoreResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as refused:
            score(request_, timeout=5)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.value.details().startswith(message)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that nobody publishes to."""
    body = {
        "publishers": [{"source": "tcp://127.0.0.1:0", "bind": True}],
        "limits": {"max_prompt_tokens": 64, "max_request_bytes": 4096},
    }
    with Daemon(tmp_path_factory.mktemp("quiet"), body) as daemon:
        yield daemon


def test_request_size_and_protocol(quiet: Daemon) -> None:
    with quiet.client() as client:
        with pytest.raises(ServiceError, match="RESOURCE_EXHAUSTED"):
            client.call("Score", pb.ScoreRequest(token_ids=bytes(8192)))
        with pytest.raises(ServiceError, match="FAILED_PRECONDITION: protocol: the call needs level 2"):
            client.call("Publishers", pb.PublishersRequest(protocol=2))
    assert quiet.get("/v1/feedback", body=b"x" * 8192).status == 413


def test_sigterm_lets_a_stream_go_and_exits_with_0(publisher: Publisher, tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, config(publisher)) as daemon, grpc.insecure_channel(daemon.grpc) as channel:
        daemon.caught_up("pod-1", publisher.publish(block(0)))

        def requests() -> Iterator[pb.ScoreRequest]:
            yield pb.ScoreRequest(id=1, token_ids=wire.pack_tokens(PROMPT))
            daemon.process.wait(10)

        call = score_stream(channel)(requests())
        assert next(call).id == 1
        begin = time.monotonic()
        daemon.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError):
            next(call)
        assert daemon.wait() == 0
        assert time.monotonic() - begin < 5  # an idle stream does not use up the deadline
        assert daemon.find_log("draining")
        assert daemon.find_log("stopped")


def test_no_config_means_the_engine_on_this_host(tmp_path: pathlib.Path) -> None:
    """Ports are the defaults here, so another daemon on this machine may have them: then that is what it must say."""
    command = [sys.executable, "-m", "kvindex.service.cli", "daemon"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        if line.startswith("{"):
            assert json.loads(line)["grpc_port"] == 50151
            started = next(x for x in map(json.loads, process.stderr) if x["event"] == "source started")
            assert started["source"] == "tcp://127.0.0.1:5557"
            process.terminate()
        else:
            assert line.startswith("kvindex: error: listen.")
        process.stderr.read()
        assert process.wait(20) in (0, 1)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (
            {"listen": {"grpc": "203.0.113.1:0"}, "token": "t"},
            1,
            "listen.grpc: cannot listen on 203.0.113.1:0: Cannot assign",
        ),
        (
            {"listen": {"grpc": "127.0.0.1:0", "http": "203.0.113.1:1"}, "token": "t"},
            1,
            "listen.http: cannot listen on 203.0.113.1:1",
        ),
        ({"listen": {"grpc": "0.0.0.0:0"}}, 2, "node.yaml: listen.grpc: 0.0.0.0:0 can be reached from other hosts"),
        ({"tokenizers": {"m": "nowhere"}}, 2, "tokenizers.m: "),
        ({"token_file": "nowhere"}, 2, "token_file: "),
        ({"tls": {"cert": "nowhere", "key": "nowhere"}}, 2, "tls."),
        ({"lisen": 1}, 2, "node.yaml: lisen: unknown field; did you mean `listen`?"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(
    body: dict[str, object], status: int, message: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "node.yaml").write_text(json.dumps({"listen": {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0"}, **body}))
    command = [sys.executable, "-W", "error", "-m", "kvindex.service.cli", "daemon", "-c", "node.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == status, done.stderr
    last = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(last) == 1, done.stderr
    assert last[0].startswith(f"kvindex: error: {message}")
