"""Every metric of the router, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvindex.router.endpoints import EndpointTable

ERROR_BUCKETS = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "kvindex_router_requests", "Requests answered, by status class.", ["status"], registry=registry
        )
        self.picks = Counter("kvindex_router_picks", "Requests sent to an endpoint.", ["endpoint"], registry=registry)
        self.retries = Counter(
            "kvindex_router_retries", "Picks that did not take the connection.", ["endpoint"], registry=registry
        )
        self.refused = Counter(
            "kvindex_router_refused", "Requests refused by the router itself.", ["reason"], registry=registry
        )
        self.degraded = Counter(
            "kvindex_router_degraded", "Requests routed without knowing their prefix.", ["reason"], registry=registry
        )
        self.predictions = Counter(
            "kvindex_router_predictions",
            "Predicted cached tokens compared with what the engine reported.",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self.prediction_error = Histogram(
            "kvindex_router_prediction_error_tokens",
            "How far the prediction was off; 0 is exact.",
            ["endpoint"],
            buckets=ERROR_BUCKETS,
            registry=registry,
        )
        self.first_output = Histogram(
            "kvindex_router_first_output_seconds",
            "From a request's last byte to the first byte of its answer.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.tokens = Counter(
            "kvindex_router_prompt_tokens", "Prompt tokens, by what engines said of them.", ["kind"], registry=registry
        )

    def watch(self, table: EndpointTable, mode: str, clock: Callable[[], float]) -> None:
        self.registry.register(_Endpoints(table, mode, clock))

    def scrape(self) -> bytes:
        return generate_latest(self.registry)


class _Endpoints(Collector):
    def __init__(self, table: EndpointTable, mode: str, clock: Callable[[], float]) -> None:
        self._table, self._mode, self._clock = table, mode, clock

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        mode = GaugeMetricFamily("kvindex_router_index_mode", "1 for the kind of index in use.", labels=["mode"])
        mode.add_metric([self._mode], 1)
        yield mode
        now = self._clock()
        families = {
            name: GaugeMetricFamily(f"kvindex_router_endpoint_{name}", text, labels=["endpoint"])
            for name, text in (
                ("up", "1 unless it rests after refusing connections."),
                ("inflight", "Requests of this router that it is answering."),
                ("pending_tokens", "Uncached tokens sent there without a first output yet."),
                ("metrics_age_seconds", "Age of what was scraped; -1: never."),
            )
        }
        for target in self._table.targets:
            families["up"].add_metric([target.name], float(target.endpoint.available(now)))
            families["inflight"].add_metric([target.name], target.inflight)
            families["pending_tokens"].add_metric([target.name], target.pending_tokens)
            age = -1.0 if target.scraped_at is None else now - target.scraped_at
            families["metrics_age_seconds"].add_metric([target.name], age)
        yield from families.values()
