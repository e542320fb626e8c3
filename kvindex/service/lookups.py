"""The answers themselves, without gRPC: checked questions in, messages out, everything counted.

The index is called in the event loop's thread: a look-up takes less time than handing it to another thread would.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

from kvindex.errors import UsageError
from kvindex.events.model import Tokens
from kvindex.service import log, wire
from kvindex.service.audit import Audit, Observation
from kvindex.service.metrics import Metrics
from kvindex.service.pb import index_pb2 as pb
from kvindex.service.status import pod_of
from kvindex.service.tokenizing import Tokenizers

MAX_UNKNOWN = 1000
APIS = ("score", "score_stream", "pod_scores")


class Lookups:
    """`rebuild` is called with an endpoint whose predictions have been too high for long."""

    def __init__(
        self,
        index: Any,
        tokenizers: Tokenizers,
        metrics: Metrics,
        max_prompt_tokens: int,
        rebuild: Callable[[str], object],
    ) -> None:
        self._index, self._tokenizers, self._metrics = index, tokenizers, metrics
        self._max_tokens = max_prompt_tokens
        self._rebuild = rebuild
        self._audit = Audit()
        self._unknown: set[str] = set()
        self._counters = {api: (metrics.lookups.labels(api), metrics.lookup_hits.labels(api)) for api in APIS}
        self._log = log.get("lookups")

    async def score(self, request: pb.ScoreRequest, api: str) -> pb.ScoreResponse:
        """Raises UsageError and TokenizerError."""
        asked = wire.question(request, self._max_tokens)
        tokens = asked.token_ids
        if tokens is None:
            tokens = await self._tokenize(asked.model, asked.prompt)
        scores = self._score(api, tokens, asked.model, asked.lora, asked.cache_salt, asked.mm, asked.endpoints)
        return wire.score_response(scores, request.id, len(tokens))

    async def explain(self, request: pb.ExplainRequest) -> pb.ExplainResponse:
        asked = wire.question(request, self._max_tokens)
        tokens = asked.token_ids
        if tokens is None:
            tokens = await self._tokenize(asked.model, asked.prompt)
        # slow: it must not keep look-ups waiting
        views = await asyncio.to_thread(
            self._index.explain,
            tokens,
            model=asked.model,
            lora=asked.lora,
            cache_salt=asked.cache_salt,
            mm=asked.mm,
            endpoints=asked.endpoints,
        )
        return wire.explain_response(views, len(tokens))

    async def pod_scores(self, model: str, prompt: str, pods: Iterable[str]) -> list[tuple[str, float]]:
        """llm-d's question: best first, a pod's score is its best rank's."""
        if not model:
            raise UsageError("model_name: is empty")
        if not prompt:
            raise UsageError("prompt: is empty")
        wanted = frozenset(pods)
        tokens = await self._tokenize(model, prompt)
        # llm-d's gateways name a LoRA adapter where the model's name belongs
        is_adapter = all(e.model not in (None, model) for e in self._index.endpoints())
        asked_model, lora = (None, model) if is_adapter else (model, None)
        scores = self._score("pod_scores", tokens, asked_model, lora, None, (), None)
        best: dict[str, float] = {}
        for endpoint, score in zip(scores.endpoints, scores.score.tolist(), strict=True):
            pod = pod_of(endpoint)
            if not wanted or pod in wanted:
                best[pod] = max(score, best.get(pod, 0.0))
        return sorted(best.items(), key=lambda item: (-item[1], item[0]))

    def report(self, observations: Iterable[Observation]) -> list[str]:
        """Count, audit; returns the endpoints that the index does not know."""
        known = {e.name for e in self._index.endpoints()}
        unknown = set()
        for seen in observations:
            if seen.endpoint not in known:
                unknown.add(seen.endpoint)
                continue
            outcome = seen.outcome
            difference = abs(seen.predicted_tokens - seen.cached_tokens)
            self._metrics.predictions.labels(seen.endpoint, outcome).inc()
            self._metrics.prediction_error.labels(outcome).observe(difference)
            if self._audit.observe(seen):
                self._rebuild(seen.endpoint)
        for endpoint in sorted(unknown - self._unknown)[: MAX_UNKNOWN - len(self._unknown)]:
            self._unknown.add(endpoint)
            self._log.error("a router sends requests to an endpoint that no publisher speaks for", endpoint=endpoint)
        self._metrics.unknown_endpoints.set(len(self._unknown - known))
        return sorted(unknown)

    async def _tokenize(self, model: str | None, prompt: str) -> Tokens:
        if model is None:
            raise UsageError("model: must be set with a prompt, because it names the tokenizer")
        with self._metrics.tokenize_seconds.time():
            tokens = await self._tokenizers.encode(model, prompt)
        if len(tokens) > self._max_tokens:
            raise UsageError(f"prompt: {len(tokens)} tokens is more than limits.max_prompt_tokens, {self._max_tokens}")
        return tokens

    def _score(self, api: str, tokens: Tokens, model: Any, lora: Any, salt: Any, mm: Any, endpoints: Any) -> Any:
        metrics = self._metrics
        start = time.perf_counter()
        scores = self._index.score(tokens, model=model, lora=lora, cache_salt=salt, mm=mm, endpoints=endpoints)
        metrics.lookup_seconds.observe(time.perf_counter() - start)
        asked, hits = self._counters[api]
        asked.inc()
        metrics.lookup_tokens.inc(len(tokens))
        if len(scores.endpoints):
            matched = int(scores.tokens.max())
            if matched:
                hits.inc()
                metrics.lookup_matched_tokens.inc(matched)
        return scores
