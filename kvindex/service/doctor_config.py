"""Checks of a daemon's config, and of the daemon that runs with it, against the engines that were looked at."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from kvindex.errors import KvindexError, ServiceError
from kvindex.service import tokenizing
from kvindex.service.client import IndexClient
from kvindex.service.config import EngineConfig, NodeConfig, address, read_token
from kvindex.service.engine_facts import Engine, Facts
from kvindex.service.findings import Findings
from kvindex.service.listening import can_connect, replay_answers
from kvindex.service.pb import index_pb2 as pb
from kvindex.service.status import pod_of

SAMPLE = "The quick brown fox jumps over the lazy dog. 123 äöü\n"


async def examine(
    config: NodeConfig, engines: Mapping[str, tuple[EngineConfig, Engine, Facts | None]], findings: Findings
) -> None:
    _models(engines, findings)
    _names(config, findings)
    await _tokenizers(config, engines, findings)
    await _publishers(config, findings)
    await _daemon(config, findings)


def _models(engines: Mapping[str, tuple[EngineConfig, Engine, Facts | None]], findings: Findings) -> None:
    for url, (about, _, facts) in engines.items():
        served = facts.base_model.id if facts and facts.base_model else None
        if about.model is not None and served is not None and about.model != served:
            findings.error(
                "model name",
                f"engines: {url} has model {about.model!r}, but it serves {served!r}",
                f"set model: {served}, or leave it out",
            )


def _names(config: NodeConfig, findings: Findings) -> None:
    named = [e.name for e in config.all_engines if e.name] + [p.endpoint for p in config.publishers if p.endpoint]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        findings.error(
            "endpoint names",
            f"{', '.join(twice)} is given more than once: their caches would be taken for one",
            "give each engine a name of its own",
        )


async def _tokenizers(
    config: NodeConfig, engines: Mapping[str, tuple[EngineConfig, Engine, Facts | None]], findings: Findings
) -> None:
    served = {f.base_model.id: engine for _, engine, f in engines.values() if f and f.base_model}
    for model, folder in config.tokenizers.items():
        try:
            tokenizer = await asyncio.to_thread(tokenizing.load, model, folder)
        except KvindexError as error:
            findings.error("tokenizer", str(error), "name the folder that holds the model's tokenizer.json")
            continue
        ours = tokenizer.encode(SAMPLE).ids
        theirs = await _tokens_of(served[model], model) if model in served else None
        if theirs is not None and theirs != ours:
            findings.error(
                "tokenizer",
                f"of {model!r} makes other token ids than the engine: plain prompts would find nothing",
                f"use the folder that the engine loads, not {folder}",
            )
        else:
            findings.ok("tokenizer", f"of {model!r}" + (": the same token ids as the engine" if theirs else " loads"))
    for model in sorted(served.keys() - config.tokenizers.keys()):
        findings.warning(
            "tokenizer",
            f"none for {model!r}: plain prompts (GetPodScores, kvindex score --prompt) are refused; token ids work",
            f"tokenizers: {{{model}: FOLDER}}",
        )


async def _tokens_of(engine: Engine, model: str) -> list[int] | None:
    try:
        status, body = await engine.ask("/tokenize", {"model": model, "prompt": SAMPLE})
        tokens = json.loads(body)["tokens"] if status == 200 else None
    except (ServiceError, ValueError, KeyError, TypeError):
        return None
    return tokens if isinstance(tokens, list) else None


async def _publishers(config: NodeConfig, findings: Findings) -> None:
    for i, publisher in enumerate(config.publishers):
        name = f"publishers[{i}]"
        if publisher.bind:
            continue
        why = await can_connect(publisher.source)
        if why is not None:
            findings.error(
                "event port", f"{name}: {publisher.source}: {why}", "start the engine, or correct the source"
            )
        else:
            findings.ok("event port", f"{name}: {publisher.source}")
        if publisher.replay is None:
            findings.warning(
                "replay socket", f"{name} has none: a lost message makes all before it unusable", "set replay"
            )
        elif (why := await replay_answers(publisher.replay)) is not None:
            findings.error("replay port", f"{name}: {why}", "correct replay")
        else:
            findings.ok("replay port", f"{name}: {publisher.replay} answers")


async def _daemon(config: NodeConfig, findings: Findings) -> None:
    where = address(config.listen.grpc)
    if where.port == 0 or await can_connect(f"tcp://{where}") is not None:
        findings.warning(
            "daemon", f"none is running at {where}", "kvindex daemon, with -c and the config if there is one"
        )
        return
    if config.tls is not None:
        findings.ok("daemon", f"something listens at {where} (with TLS, so it was not asked)")
        return
    try:
        token = read_token(config.token, config.token_file)
        said = await asyncio.to_thread(_ask_daemon, str(where), token)
    except KvindexError as error:
        findings.error("daemon", str(error), "is it a kvindex daemon with this config?")
        return
    following = sorted({p.endpoint for p in said.publishers})
    findings.ok("daemon", f"runs at {where}; follows {', '.join(following) or 'nobody yet'}")
    for source in said.sources:
        if source.state != "connected":
            findings.error(
                "daemon", f"{source.source} is {source.state}: {source.detail}", "see the checks of that engine"
            )
    for p in said.publishers:
        if pod_of(p.endpoint) == p.source:
            findings.error(
                "endpoint names",
                f"nobody named the endpoint of {p.source} (topic {p.topic!r}), so no router can know it",
                "set its endpoint in publishers, or a topic kv@NAME@MODEL",
            )
        if p.state != "live":
            findings.warning("daemon", f"{p.endpoint} is {p.state} ({p.missing} messages missing)", "see its log")


def _ask_daemon(where: str, token: str | None) -> pb.PublishersResponse:
    with IndexClient(where, token=token, timeout=5.0) as client:
        return client.publishers()
