"""The engine's /metrics under vLLM's names, so that scrapers made for vLLM read a simulated engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvindex.simulator.engine import Engine
from kvindex.simulator.results import Finish, Output

_LABELS = ("model_name", "engine")
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_GAUGES: tuple[tuple[str, str, Callable[[Engine], float]], ...] = (
    ("vllm:num_requests_running", "Requests in the running batch", lambda e: len(e.running)),
    ("vllm:num_requests_waiting", "Requests that wait to be scheduled", lambda e: len(e.waiting)),
    ("vllm:kv_cache_usage_perc", "Share of blocks in use, 0 to 1", lambda e: e.cache.pool.usage),
)
_COUNTERS: tuple[tuple[str, str, Callable[[Engine], float]], ...] = (
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", lambda e: e.stats.prefix_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", lambda e: e.stats.prefix_hits),
    ("vllm:num_preemptions", "Times a request lost its blocks and started over", lambda e: e.stats.preemptions),
    ("vllm:prompt_tokens", "Prompt tokens taken in", lambda e: e.stats.prompt),
    ("vllm:generation_tokens", "Tokens generated", lambda e: e.stats.generated),
)


class EngineMetrics(Collector):
    """One registry for all ranks of a server. What an engine counts itself is read when asked for."""

    def __init__(self, model: str, engines: Sequence[Engine]) -> None:
        self._model = model
        self._engines = engines
        self._registry = CollectorRegistry()
        self._histograms = [
            Histogram(name, documentation, _LABELS, buckets=_SECONDS, registry=self._registry)
            for name, documentation in (
                ("vllm:time_to_first_token_seconds", "From arrival to the first token"),
                ("vllm:inter_token_latency_seconds", "Between two tokens of a request"),
                ("vllm:e2e_request_latency_seconds", "From arrival to the last token"),
                ("vllm:request_queue_time_seconds", "From arrival to the first step"),
            )
        ]
        self._registry.register(self)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def rank(self, rank: int) -> RankMetrics:
        return RankMetrics(*(histogram.labels(self._model, str(rank)) for histogram in self._histograms))

    def collect(self) -> Iterable[Metric]:
        ranks = [((self._model, str(rank)), engine) for rank, engine in enumerate(self._engines)]
        for name, documentation, value in _GAUGES:
            gauge = GaugeMetricFamily(name, documentation, labels=_LABELS)
            for labels, engine in ranks:
                gauge.add_metric(labels, value(engine))
            yield gauge
        for name, documentation, value in _COUNTERS:
            counter = CounterMetricFamily(name, documentation, labels=_LABELS)
            for labels, engine in ranks:
                counter.add_metric(labels, value(engine))
            yield counter
        success = CounterMetricFamily("vllm:request_success", "Finished requests", labels=(*_LABELS, "finished_reason"))
        for labels, engine in ranks:
            success.add_metric((*labels, "length"), engine.stats.finished_requests)
            success.add_metric((*labels, "abort"), engine.stats.aborted_requests)
        yield success
        yield self._cache_config()
        if self._engines[0].config.loras:
            yield self._lora_info()

    def _cache_config(self) -> Metric:
        names = ("engine", "block_size", "num_gpu_blocks", "enable_prefix_caching", "kv_cache_size_tokens")
        info = GaugeMetricFamily("vllm:cache_config_info", "Sizes of the KV cache", labels=names)
        for rank, engine in enumerate(self._engines):
            config = engine.config
            values = (rank, config.block_size, config.num_blocks, True, config.capacity_tokens)
            info.add_metric([str(value) for value in values], 1)
        return info

    def _lora_info(self) -> Metric:
        names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        info = GaugeMetricFamily("vllm:lora_requests_info", "Adapters in use; the value is when", labels=names)
        config = self._engines[0].config
        running = sorted({request.lora for engine in self._engines for request in engine.running if request.lora})
        waiting = sorted({request.lora for engine in self._engines for request in engine.waiting if request.lora})
        most = config.max_loras or len(config.loras)
        info.add_metric([str(most), ",".join(running), ",".join(waiting)], time.time())
        return info


class RankMetrics:
    """What one rank's driver observes, in engine seconds."""

    def __init__(self, first_token: Histogram, inter_token: Histogram, total: Histogram, queued: Histogram) -> None:
        self._first_token = first_token
        self._inter_token = inter_token
        self._total = total
        self._queued = queued
        self._previous: dict[str, float] = {}

    def observe(self, output: Output, now: float) -> None:
        request = output.request
        previous = self._previous.get(request.id)
        if previous is None:
            self._first_token.observe(now - request.arrival)
            if request.scheduled_at is not None:
                self._queued.observe(request.scheduled_at - request.arrival)
        else:
            self._inter_token.observe(now - previous)
        if output.finish is None:
            self._previous[request.id] = now
        else:
            self._previous.pop(request.id, None)
            if output.finish is Finish.LENGTH:
                self._total.observe(now - request.arrival)

    def aborted(self, request_id: str) -> None:
        self._previous.pop(request_id, None)
