"""Checks of one engine: can kvindex follow it, and is it set up to be followed well?"""

from __future__ import annotations

from urllib.parse import urlsplit

import msgspec

from kvindex.errors import ServiceError
from kvindex.events.frames import split_topic
from kvindex.events.sources import at_host
from kvindex.service import doctor_predict
from kvindex.service.engine_facts import Engine, EventSource, Facts
from kvindex.service.findings import Findings
from kvindex.service.listening import can_connect, replay_answers


async def examine(engine: Engine, findings: Findings, *, name: str | None, send_requests: bool) -> Facts | None:
    """All checks, in the order in which their failure explains the next ones. `name` is what config calls it. None:
    nobody answers."""
    try:
        status, _ = await engine.ask("/health")
    except ServiceError as error:
        findings.error(
            "reachable",
            str(error),
            "start the engine, or name the right one: kvindex doctor http://HOST:PORT",
        )
        return None
    if status != 200:
        findings.error(
            "health", f"GET /health answers {status}", "wait until the engine has started, or look at its log"
        )
        return None
    findings.ok("reachable", "GET /health answers 200")
    try:
        facts = await engine.facts()
    except ServiceError as error:
        findings.error("reachable", str(error), "it answers /health but not this; look at its log")
        return None
    _version(facts, findings)
    _model(facts, findings)
    _cache(facts, findings)
    sources = _events(engine, facts, name, findings)
    await _sockets(engine, sources, findings)
    if send_requests and facts.base_model is not None:
        await doctor_predict.examine(engine, facts.base_model, facts.block_size, sources, findings)
    return facts


def events_flag(url: str, model: str) -> str:
    parts = urlsplit(url)
    settings = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "tcp://*:5557",
        "replay_endpoint": "tcp://*:5657",
        "topic": f"kv@{parts.netloc}@{model}",
    }
    return f"--kv-events-config '{msgspec.json.encode(settings).decode()}'"


def _version(facts: Facts, findings: Findings) -> None:
    if facts.version is None:
        findings.warning("version", "the engine does not say its version (GET /version)", "only vLLM is known to work")
    elif facts.release is not None and facts.release < (0, 19):
        findings.warning("version", f"vLLM {facts.version} is older than what was tested", "use 0.19 or later")
    else:
        findings.ok("version", facts.version)


def _model(facts: Facts, findings: Findings) -> None:
    if facts.models_status == 401:
        findings.warning("model", "GET /v1/models wants an API key", "give it with --api-key-file")
    elif facts.base_model is None:
        findings.error("model", "GET /v1/models lists no model", "is this an OpenAI-compatible engine?")
    else:
        adapters = [m.id for m in facts.models if m.parent is not None]
        also = f", adapters {', '.join(adapters)}" if adapters else ""
        findings.ok("model", f"{facts.base_model.id}{also}")


def _cache(facts: Facts, findings: Findings) -> None:
    if not facts.cache:
        findings.warning("cache", "no vllm:cache_config_info in /metrics", "see for yourself that prefix caching is on")
        return
    if facts.cache.get("enable_prefix_caching", "True") != "True":
        findings.error(
            "prefix caching", "is off, so nothing is ever found cached", "start vLLM with --enable-prefix-caching"
        )
    else:
        findings.ok("prefix caching", "on")
    blocks = facts.cache.get("num_gpu_blocks", "?")
    findings.ok("block size", f"{facts.block_size or '?'} tokens, {blocks} blocks")
    algorithm = facts.cache.get("prefix_caching_hash_algo")
    if algorithm in (None, "None"):
        return
    seeded = algorithm.startswith("sha256") and (facts.release is None or facts.release >= (0, 29))
    if seeded:
        findings.ok("hash seed", f"{algorithm}, the same in every engine")
    else:
        findings.ok(
            "hash seed",
            f"{algorithm}, random in each process unless PYTHONHASHSEED is set: fine for kvindex, but engines cannot "
            "load each other's offloaded blocks",
        )


def _events(engine: Engine, facts: Facts, name: str | None, findings: Findings) -> dict[int, EventSource]:
    model = facts.base_model.id if facts.base_model else "MODEL"
    fix = f"start vLLM with {events_flag(engine.url, model)}"
    if facts.sources is None:
        old = facts.release is not None and facts.release < (0, 31)
        findings.warning(
            "events",
            "the engine cannot be asked where it publishes (GET /kv_event_sources, vLLM 0.31 and later)",
            f"{'' if old else 'if this is vLLM 0.31 or later, ' + fix + '; otherwise '}name the socket in node.yaml: "
            "publishers: [{source: tcp://HOST:5557, replay: tcp://HOST:5657, endpoint: NAME}]",
        )
        return {}
    on = {rank: s for rank, s in facts.sources.items() if s.endpoint and s.enable_kv_cache_events}
    if not on:
        findings.error("events", "are off: the engine publishes nothing", fix)
        return {}
    findings.ok("events", ", ".join(f"rank {rank} at {s.endpoint}" for rank, s in sorted(on.items())))
    silent = sorted(rank for rank, s in on.items() if not s.replay_endpoint)
    if silent:
        findings.warning(
            "replay socket",
            f"rank {', '.join(map(str, silent))} has none: a lost message makes all that it said before unusable",
            'add "replay_endpoint": "tcp://*:5657" to --kv-events-config',
        )
    else:
        findings.ok("replay socket", ", ".join(f"rank {rank} at {s.replay_endpoint}" for rank, s in sorted(on.items())))
    _topics(on, model, engine, name, findings)
    return on


def _topics(sources: dict[int, EventSource], model: str, engine: Engine, name: str | None, findings: Findings) -> None:
    address = urlsplit(engine.url).netloc
    for topic in sorted({s.topic for s in sources.values()}):
        named = split_topic(topic)
        if named is None and name is not None:
            findings.ok("topic", f"{topic!r}; node.yaml calls the endpoint {name}")
        elif named is None:
            findings.warning(
                "topic",
                f"{topic!r} does not say whose events these are; the endpoint will be called {address}",
                f'in node.yaml: engines: [{{url: {engine.url}, name: NAME}}]; or use "topic": "kv@NAME@{model}"',
            )
        elif named.model not in (None, model):
            findings.error(
                "topic",
                f"says model {named.model!r}, but the engine serves {model!r}: asked for that, it would have nothing",
                f'use "topic": "kv@{named.pod}@{model}", or set model: {model} in node.yaml',
            )
        else:
            findings.ok("topic", f"{topic}: the endpoint is called {name or named.pod}")


async def _sockets(engine: Engine, sources: dict[int, EventSource], findings: Findings) -> None:
    host = urlsplit(engine.url).hostname or "127.0.0.1"
    for rank, source in sorted(sources.items()):
        assert source.endpoint is not None
        where = at_host(source.endpoint, host)
        why = await can_connect(where)
        if why is not None:
            calls_out = where == source.endpoint
            findings.error(
                "event port",
                f"rank {rank}: {where}: {why}",
                "let the engine listen on tcp://*:PORT, or, as it calls out to this address, set bind: true for it in "
                "node.yaml's publishers"
                if calls_out
                else "open the port between the engine and this host",
            )
        else:
            findings.ok("event port", f"rank {rank}: {where}")
        if source.replay_endpoint:
            replay = at_host(source.replay_endpoint, host)
            why = await replay_answers(replay)
            if why is None:
                findings.ok("replay port", f"rank {rank}: {replay} answers")
            else:
                findings.error("replay port", f"rank {rank}: {why}", "open the port, or correct replay_endpoint")
