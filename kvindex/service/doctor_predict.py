"""The doctor's proof: a new prompt is sent twice. Do events come, and do they predict what the second one finds?"""

from __future__ import annotations

import random
from typing import Any
from urllib.parse import urlsplit

import msgspec

from kvindex.errors import ServiceError
from kvindex.events.sources import at_host
from kvindex.index.facade import Index
from kvindex.service.engine_facts import Engine, EventSource, Model
from kvindex.service.findings import Findings
from kvindex.service.listening import Listening

EVENT_SECONDS = 5.0


async def examine(
    engine: Engine, model: Model, block_size: int | None, sources: dict[int, EventSource], findings: Findings
) -> None:
    """`block_size` None: not known, so the prompt is long enough for most."""
    wanted = 2 * (block_size or 64) + 1
    length = min(wanted, (model.max_model_len or wanted + 1) - 1)
    prompt = [random.randrange(10, 200) for _ in range(length)]
    body = {"model": model.id, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    headers = {"X-data-parallel-rank": "0"} if len(sources) > 1 else {}  # both to the same cache
    host = urlsplit(engine.url).hostname or "127.0.0.1"
    index = Index()
    with Listening([at_host(s.endpoint, host) for s in sources.values() if s.endpoint]) as listening:
        await listening.ready()
        try:
            status, answer = await engine.ask("/v1/completions", body, headers)
            if status != 200:
                findings.warning("completion", f"POST /v1/completions answers {status}: {answer[:200]!r}", "")
                return
            heard = await listening.first(EVENT_SECONDS, index) if sources else False
            predicted = max(index.score(prompt).tokens.tolist(), default=0)
            _, answer = await engine.ask("/v1/completions", body, headers)
        except ServiceError as error:
            findings.error("completion", str(error), "look at the engine's log")
            return
    if sources:
        _heard(heard, index, findings)
    cached = _cached_tokens(answer)
    if cached is None:
        findings.warning(
            "cached-token report",
            "usage has no prompt_tokens_details.cached_tokens: predictions cannot be compared with what happened",
            "start vLLM with --enable-prompt-tokens-details",
        )
        return
    findings.ok("cached-token report", f"the second of two equal prompts of {length} tokens found {cached} cached")
    if heard and predicted == cached:
        findings.ok("prediction", f"the index predicted {predicted} from the events, exactly")
    elif heard:
        findings.warning(
            "prediction",
            f"the index predicted {predicted} from the events, the engine found {cached}",
            "under load this can happen; else record what it sends (kvindex record) and report it",
        )


def _heard(heard: bool, index: Index, findings: Findings) -> None:
    if not heard:
        findings.error(
            "events arrive",
            f"a completion was sent, and no event came within {EVENT_SECONDS:g} s",
            "check that the port is the engine's and not another process's, and that prefix caching is on",
        )
        return
    (first, *_) = index.endpoints()
    groups = ", ".join(f"{g['kind']} of {g['block_size']}" for g in first.groups) or "no blocks yet"
    skipped = sum(p.skipped for p in index.publishers())
    if skipped:
        findings.warning("events arrive", f"but {skipped} could not be used", "kvindex record them, and report it")
    else:
        findings.ok("events arrive", f"cache groups: {groups}")


def _cached_tokens(answer: bytes) -> int | None:
    try:
        usage: Any = msgspec.json.decode(answer)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return None
