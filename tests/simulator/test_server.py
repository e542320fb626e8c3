"""A real `kvindex sim` process over HTTP."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.simulator.process import DEADLINE_SECONDS, Sim, sim

pytestmark = pytest.mark.e2e

FAST = ("--time-scale", "20")
CHAT = {"messages": [{"role": "user", "content": "tell me a story"}]}


@pytest.fixture(scope="module")
def shared() -> Iterator[Sim]:
    """One process for the tests that leave no trace; each uses prompts of its own."""
    with sim(*FAST, "--lora", "sql", "--lora", "chat", "--dp-size", "2", "--num-blocks", "128") as running:
        yield running


def test_a_completion_reports_what_was_cached(shared: Sim) -> None:
    ids = list(range(1000, 1040))
    first = shared.complete(ids, 3, return_token_ids=True)
    choice = first["choices"][0]
    assert first["object"] == "text_completion"
    assert choice["prompt_token_ids"] == ids
    assert len(choice["token_ids"]) == 3
    assert choice["finish_reason"] == "length"
    assert first["usage"] == {
        "prompt_tokens": 40,
        "total_tokens": 43,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    # No rank named: the same prompt may go to the other one. Named: it is found.
    body = {"prompt": ids, "max_tokens": 3}
    cached = {}
    for rank in "01":
        shared.call("/v1/completions", body, X_data_parallel_rank=rank)
        answer = shared.call("/v1/completions", body, X_data_parallel_rank=rank).json()
        cached[rank] = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert answer["choices"][0]["text"] == choice["text"]
        assert answer["choices"][0]["token_ids"] is None
    assert cached == {"0": 32, "1": 32}


def test_text_is_tokenised_as_the_tokenize_call_says(shared: Sim) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 3
    tokens = shared.call("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    answer = shared.complete(text, return_token_ids=True)
    assert tokens["tokens"] == answer["choices"][0]["prompt_token_ids"]
    assert tokens["count"] == answer["usage"]["prompt_tokens"] == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 127 * 16
    assert shared.call("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "<s>" + text}
    plain = shared.call("/tokenize", {"prompt": text, "add_special_tokens": False}).json()
    assert plain["tokens"] == tokens["tokens"][1:]


def test_chat_uses_the_template_and_its_next_turn_finds_the_answer_cached(shared: Sim) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there " * 20}]
    body = {"messages": messages, "max_completion_tokens": 40, "return_token_ids": True}
    first = shared.call("/v1/chat/completions", body, X_data_parallel_rank="0").json()
    prompt = shared.call("/tokenize", {"messages": messages}).json()["tokens"]
    assert first["prompt_token_ids"] == prompt
    assert first["object"] == "chat.completion"
    message = first["choices"][0]["message"]
    assert message["role"] == "assistant"
    messages += [message, {"role": "user", "content": [{"type": "text", "text": "go on"}]}]
    second = shared.call("/v1/chat/completions", body, X_data_parallel_rank="0").json()
    computed = first["usage"]["total_tokens"] - 1
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == computed // 16 * 16 > len(prompt)


def test_a_chat_without_a_limit_ends_by_itself(shared: Sim) -> None:
    answer = shared.call("/v1/chat/completions", CHAT).json()
    assert 1 <= answer["usage"]["completion_tokens"] <= 128


def test_streams_carry_the_same_tokens_and_usage_only_when_asked(shared: Sim) -> None:
    body = {"prompt": list(range(2000, 2040)), "max_tokens": 4, "return_token_ids": True}
    whole = shared.call("/v1/completions", body, X_data_parallel_rank="0").json()
    answer = shared.call("/v1/completions", {**body, "stream": True}, X_data_parallel_rank="0")
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    chunks = answer.chunks()
    assert len(chunks) == 4
    assert all("usage" not in chunk and chunk["object"] == "text_completion" for chunk in chunks)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    tokens = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
    assert tokens == whole["choices"][0]["token_ids"]
    assert chunks[0]["choices"][0]["prompt_token_ids"] == body["prompt"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]

    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    *_, last = shared.call("/v1/completions", asked, X_data_parallel_rank="0").chunks()
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}
    asked["stream_options"] = {"continuous_usage_stats": True}
    counts = [chunk["usage"]["completion_tokens"] for chunk in shared.call("/v1/completions", asked).chunks()]
    assert counts == [1, 2, 3, 4]


def test_a_chat_stream_opens_with_the_role(shared: Sim) -> None:
    chunks = shared.call("/v1/chat/completions", {**CHAT, "max_tokens": 2, "stream": True}).chunks()
    assert [chunk["object"] for chunk in chunks] == ["chat.completion.chunk"] * 3
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(set(delta) == {"content"} for delta in deltas[1:])
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_several_choices_and_several_prompts(shared: Sim) -> None:
    answer = shared.complete(["one prompt", [5, 6, 7]], n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in answer["choices"]}) == 4
    assert answer["usage"]["completion_tokens"] == 8
    prompts = shared.call("/tokenize", {"prompt": "one prompt"}).json()["count"] + 3
    assert answer["usage"]["prompt_tokens"] == prompts
    chunks = shared.call("/v1/completions", {"prompt": "x", "n": 3, "max_tokens": 2, "stream": True}).chunks()
    assert sorted(chunk["choices"][0]["index"] for chunk in chunks) == [0, 0, 1, 1, 2, 2]


def test_adapters_are_models_with_a_parent_and_a_cache_of_their_own(shared: Sim) -> None:
    cards = {card["id"]: card["parent"] for card in shared.call("/v1/models").json()["data"]}
    assert cards == {"sim": None, "sql": "sim", "chat": "sim"}
    ids = list(range(3000, 3040))
    for model in ("sim", "sql", None):
        for salt in (None, "tenant"):
            body = {"prompt": ids, "max_tokens": 1, "model": model, "cache_salt": salt}
            if model is None:
                body.pop("model")
            answer = shared.call("/v1/completions", body, X_data_parallel_rank="1").json()
            expected = 32 if model is None else 0
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == expected
            assert answer["model"] == (model or "sim")


def test_the_request_id_comes_back(shared: Sim) -> None:
    answer = shared.call("/v1/completions", {"prompt": "x", "max_tokens": 1}, X_Request_Id="abc-1")
    assert answer.headers["X-Request-Id"] == "abc-1"
    assert answer.json()["id"] == "cmpl-abc-1"
    other = shared.call("/v1/chat/completions", {**CHAT, "max_tokens": 1})
    assert other.json()["id"] == "chatcmpl-" + other.headers["X-Request-Id"]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "message"),
    [
        ("/v1/completions", {"prompt": [1] * 2030, "max_tokens": 10}, {}, 400, "maximum context length is 2032 tokens"),
        ("/v1/completions", {"prompt": [1] * 2032}, {}, 400, "you requested 2033 tokens"),
        ("/v1/completions", {"prompt": "x", "model": "gpt-9"}, {}, 404, "The model `gpt-9` does not exist."),
        ("/v1/completions", {"prompt": "x"}, {"X_data_parallel_rank": "2"}, 400, "2 is out of range [0, 2)"),
        ("/v1/completions", {"prompt": "x"}, {"X_data_parallel_rank": "-1"}, 400, "out of range"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, {}, 400, "max_tokens must be at least 1"),
        ("/v1/completions", {"prompt": "x", "n": 0}, {}, 400, "n: 0"),
        ("/v1/completions", {"prompt": []}, {}, 400, "no tokens"),
        ("/v1/completions", {"prompt": [-1]}, {}, 400, "token ids"),
        ("/v1/completions", {"prompt": [1 << 32]}, {}, 400, "token ids"),
        ("/v1/completions", {"prompt": [1, "x"]}, {}, 400, "not both"),
        ("/v1/completions", {"prompt": 7}, {}, 400, "$.prompt"),
        ("/v1/completions", {}, {}, 400, "prompt"),
        ("/v1/completions", [], {}, 400, "not valid"),
        ("/v1/chat/completions", {"messages": "x"}, {}, 400, "$.messages"),
        ("/tokenize", {}, {}, 400, "either prompt or messages"),
        ("/detokenize", {"tokens": ["x"]}, {}, 400, "$.tokens"),
        ("/v1/nothing", {}, {}, 404, "Not Found"),
        ("/health", {}, {}, 405, "Method Not Allowed"),
        ("/sim/withhold_events?rank=9", {}, {}, 400, "rank 9 publishes no events"),
        ("/sim/withhold_events?batches=x", {}, {}, 400, "not a whole number"),
    ],
)
def test_wrong_requests_are_answered_in_openais_form(
    shared: Sim, path: str, body: object, headers: dict[str, str], status: int, message: str
) -> None:
    answer = shared.call(path, body, **headers)
    error = answer.json()["error"]
    assert (answer.status, error["code"]) == (status, status)
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert shared.call("/health").status == 200


def test_a_body_that_is_not_json_is_a_400(shared: Sim) -> None:
    with socket.create_connection((shared.ready["host"], shared.ready["port"]), timeout=DEADLINE_SECONDS) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n\xff\xfe{}")
        assert client.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_metrics_have_vllms_names_and_labels(shared: Sim) -> None:
    shared.complete(list(range(4000, 4040)))
    families = {family.name: family for family in text_string_to_metric_families(shared.call("/metrics").text)}
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries",
        "vllm:prefix_cache_hits",
        "vllm:num_preemptions",
        "vllm:prompt_tokens",
        "vllm:generation_tokens",
        "vllm:request_success",
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds",
    ):
        labels = {(sample.labels["model_name"], sample.labels["engine"]) for sample in families[name].samples}
        assert labels == {("sim", "0"), ("sim", "1")}, name
    (cache, _) = families["vllm:cache_config_info"].samples
    assert (cache.labels["block_size"], cache.labels["num_gpu_blocks"]) == ("16", "128")
    (lora,) = families["vllm:lora_requests_info"].samples
    assert lora.labels == {"max_lora": "2", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    # two ranks, each counting what it was asked
    assert shared.metric("vllm:prefix_cache_queries_total") > 0


def test_small_answers(shared: Sim) -> None:
    health = shared.call("/health")
    assert (health.status, health.text) == (200, "")
    assert shared.call("/version").json()["version"].startswith("0.32.0+")
    assert shared.call("/load").json() == {"server_load": 0}
