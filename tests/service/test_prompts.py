"""Plain prompts: llm-d's GetPodScores, the daemon's tokenizers, and the commands that ask."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc
import pytest
from tokenizers import Tokenizer

from kvindex.errors import ConfigError, ServiceError, TokenizerError, UsageError
from kvindex.service import cli, tokenizing
from kvindex.service.pb import index_pb2 as pb2
from kvindex.service.pb import indexer_pb2 as pb
from kvindex.simulator import tokenizer as sim_tokenizer
from tests.service.process import Daemon
from tests.support.publisher import Publisher, stored

TEXT = "the quick brown fox jumps over the lazy dog while it waits for the end of the day and the start of the night"


class World(NamedTuple):
    """pod-1 has two ranks, of which rank 1 holds more; pod-2 holds one block; pod-3 holds it for an adapter."""

    daemon: Daemon
    tokens: list[int]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    sim_tokenizer.export(folder / "model")
    tokens = Tokenizer.from_file(str(folder / "model" / "tokenizer.json")).encode(TEXT).ids
    assert len(tokens) >= 20
    topics = [(b"kv@pod-1@m", 0, 1), (b"kv@pod-1@m", 1, 4), (b"kv@pod-2@m", 0, 1), (b"kv@pod-3@m", 0, 2)]
    publishers = [Publisher(topic=topic, rank=rank) for topic, rank, _ in topics]
    sources = [{"source": p.endpoint, "replay": p.replay_endpoint} for p in publishers]
    body = {"publishers": sources, "tokenizers": {"m": "model", "adapter": "model"}, "probe_interval_seconds": 0.2}
    with Daemon(folder, body) as daemon:
        for publisher, (topic, _, blocks) in zip(publishers, topics, strict=True):
            lora = {"lora_name": "adapter", "lora_id": 1} if b"pod-3" in topic else {}
            events = [{**stored(i + 1, tokens[4 * i : 4 * i + 4], i or None), **lora} for i in range(blocks)]
            publisher.publish(*events)
        for name in ("pod-1", "pod-1:dp1", "pod-2", "pod-3"):
            daemon.caught_up(name, 0)
        yield World(daemon, tokens)
    for publisher in publishers:
        publisher.close()


def pod_scores(daemon: Daemon, prompt: str, model: str, *pods: str) -> dict[str, float]:
    with grpc.insecure_channel(daemon.grpc) as channel:
        ask = channel.unary_unary(
            "/indexer.v1.IndexerService/GetPodScores",
            request_serializer=pb.GetPodScoresRequest.SerializeToString,
            response_deserializer=pb.GetPodScoresResponse.FromString,
        )
        answer = ask(pb.GetPodScoresRequest(prompt=prompt, model_name=model, pod_identifiers=pods), timeout=10)
        return {s.pod: s.score for s in answer.scores}


@pytest.mark.e2e
def test_a_pods_score_is_its_best_ranks(world: World) -> None:
    assert pod_scores(world.daemon, TEXT, "m") == {"pod-1": 4.0, "pod-2": 1.0}
    assert pod_scores(world.daemon, TEXT, "m", "pod-2", "pod-9") == {"pod-2": 1.0}
    assert pod_scores(world.daemon, "something else entirely, and long enough for a block", "m") == {}


@pytest.mark.e2e
def test_an_adapter_may_stand_for_the_model_as_in_llmd(world: World) -> None:
    assert pod_scores(world.daemon, TEXT, "adapter") == {"pod-3": 2.0}


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("prompt", "model", "code", "message"),
    [
        (
            "p",
            "other",
            grpc.StatusCode.FAILED_PRECONDITION,
            "no tokenizer is configured for model 'other': set tokenizers.other",
        ),
        ("p", "", grpc.StatusCode.INVALID_ARGUMENT, "model_name: is empty"),
        ("", "m", grpc.StatusCode.INVALID_ARGUMENT, "prompt: is empty"),
    ],
)
def test_no_tokenizer_is_an_error_and_never_an_empty_score(
    world: World, prompt: str, model: str, code: grpc.StatusCode, message: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        pod_scores(world.daemon, prompt, model)
    assert refused.value.code() is code
    assert refused.value.details().startswith(message)


@pytest.mark.e2e
def test_the_daemon_tokenises_for_score_and_explain_too(world: World) -> None:
    with world.daemon.client() as client:
        by_text = client.score(None, "m", prompt=TEXT)
        by_ids = client.score(world.tokens, "m")
        assert by_text.endpoints == by_ids.endpoints
        assert by_text.tokens.tolist() == by_ids.tokens.tolist()
        assert len(client.explain(None, "m", prompt=TEXT)) == len(world.tokens) // 4
        with pytest.raises(TokenizerError, match=r"configured: adapter, m$"):
            client.score(None, "other", prompt=TEXT)
        with pytest.raises(UsageError, match="give token_ids or prompt, one of them"):
            client.score([1], "m", prompt=TEXT)


@pytest.mark.e2e
def test_a_deadline_ends_a_long_tokenisation_and_nobody_waits_for_it(world: World) -> None:
    long = (TEXT + " ") * 80_000
    with world.daemon.client(timeout=0.1) as hasty, world.daemon.client() as patient:
        with pytest.raises(ServiceError, match="DEADLINE_EXCEEDED"):
            hasty.score(None, "m", prompt=long)
        begin = time.monotonic()
        assert len(patient.score(world.tokens, "m").endpoints) == 2 + 1
        assert time.monotonic() - begin < 1.0


@pytest.mark.e2e
def test_sigterm_waits_for_calls_in_flight(tmp_path: pathlib.Path) -> None:
    sim_tokenizer.export(tmp_path / "model")
    bound = {"source": "tcp://127.0.0.1:0", "bind": True}
    with Daemon(tmp_path, {"publishers": [bound], "tokenizers": {"m": "model"}}) as daemon, daemon.client() as client:
        stub = client._calls["Score"]
        call = stub.future(pb2.ScoreRequest(model="m", prompt=(TEXT + " ") * 20_000), timeout=20)
        time.sleep(0.1)
        assert not call.done()
        assert daemon.stop() == 0
        assert call.result(timeout=5).prompt_tokens > 100_000


@pytest.mark.e2e
def test_score_command(world: World, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = ["--address", world.daemon.grpc]
    assert cli.main(["score", *address, "--model", "m", "--prompt", TEXT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ENDPOINT", "TOKENS", "BLOCKS", "SCORE", "SAVES", "STATE", "LAG", "TIERS"]
    assert lines[1].split()[:4] == ["pod-1:dp1", "16", "4", "4"]

    (tmp_path / "prompts").write_text(
        json.dumps({"id": "a", "model": "m", "token_ids": world.tokens})
        + "\n\n"
        + json.dumps({"prompt": "nothing", "model": "m"})
    )
    assert cli.main(["score", *address, "--json", "--prompts", str(tmp_path / "prompts"), "--endpoint", "pod-2"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    first, second = answer["scores"]
    assert first["id"] == "a"
    assert first["endpoints"]["pod-2"]["tiers"] == {"hbm": 1}
    assert second == {"id": 3, "endpoints": {}}

    ids = tmp_path / "ids"
    ids.write_text(json.dumps(world.tokens))
    assert cli.main(["score", *address, "--token-ids", f"@{ids}", "--lora", "adapter"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["pod-3", "8", "2"]
    assert cli.main(["score", *address, "--token-ids", "7,8,9"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "nobody"


@pytest.mark.e2e
def test_explain_command(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    address = ["--address", world.daemon.grpc]
    assert cli.main(["explain", *address, "--model", "m", "--prompt", TEXT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "block size 4"
    assert lines[1].split() == ["BLOCKS", "TOKENS", "pod-1", "pod-1:dp1", "pod-2", "pod-3"]
    assert lines[2].split() == ["0", "0-3", "hbm", "hbm", "hbm", "never", "stored"]
    assert lines[3].split()[:5] == ["1-3", "4-15", "never", "stored", "hbm"]
    assert cli.main(["explain", *address, "--model", "m", "--prompt", TEXT, "--json", "--endpoint", "pod-2"]) == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    assert blocks[0]["holders"][0] == {"endpoint": "pod-2", "group": 0, "status": "held", "tier": "hbm", "sequence": 0}
    assert cli.main(["explain", *address, "--token-ids", "1,2"]) == 0
    assert "no full block" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--token-ids", "1,x"], 2, "--token-ids: must be integers from 0 to 4294967295"),
        (["--token-ids", "@nowhere"], 2, "--token-ids: nowhere cannot be read"),
        (["--token-ids", "-1"], 2, "--token-ids: must be integers"),
        (["--prompts", "nowhere"], 2, "--prompts: nowhere cannot be read"),
        (["--prompts", "bad"], 2, "bad:1: needs token_ids or prompt, one of them"),
        (["--token-ids", "1", "--cert", "x", "--key", "y"], 2, "cert, key: only make sense together with ca"),
        (["--token-ids", "1", "--token-file", "nowhere"], 2, "token_file: nowhere cannot be read"),
        (["--token-ids", "1", "--address", "127.0.0.1:1", "--timeout", "1"], 1, "daemon at 127.0.0.1:1: "),
    ],
)
def test_wrong_calls_are_one_line(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_text('{"model": "m"}')
    assert cli.main(["score", *arguments]) == status
    assert capsys.readouterr().err.startswith(f"kvindex: error: {message}")


def test_what_is_no_tokenizer_is_said(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizers\.m: .* is no folder with a tokenizer\.json"):
        tokenizing.Tokenizers({"m": str(tmp_path)})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizers\.m: .*tokenizer\.json cannot be loaded"):
        tokenizing.Tokenizers({"m": str(tmp_path)})


def test_a_tokenizers_own_truncation_is_not_applied(tmp_path: pathlib.Path) -> None:
    made = sim_tokenizer.build()
    made.enable_truncation(4)
    made.enable_padding(length=64)
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizing.load("m", str(tmp_path))
    assert 4 < len(loaded.encode(TEXT).ids) < 64


def test_unknown_commands_and_modules_do_not_break_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("kvindex ")
    with pytest.raises(SystemExit) as left:
        cli.main(["skore"])
    assert left.value.code == 2
    assert "invalid choice: 'skore'" in capsys.readouterr().err
    assert cli.main([]) == 2
    assert "kvindex config example daemon" in capsys.readouterr().out
    table = dict(cli.COMMANDS)
    try:
        cli.COMMANDS["demo"] = cli.Command("kvindex.no_such_module", "")
        assert cli.main(["demo"]) == 1
        assert "`kvindex demo` is not part of this installation" in capsys.readouterr().err
        assert cli.main(["config", "example", "daemon"]) == 0
    finally:
        cli.COMMANDS.clear()
        cli.COMMANDS.update(table)
