"""Every metric of the daemon, in a registry of its own. Names and help texts are here, beside what feeds them.

Counters of look-ups are instruments; what the index and the event feed already count is read from them at each scrape.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PUBLISHER_STATES = ("live", "replaying", "gap", "suspect", "fenced")
LOOKUP_BUCKETS = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0)
ERROR_BUCKETS = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)


class Indexed(Protocol):
    """What is read of an index."""

    def stats(self) -> dict[str, int]: ...
    def publishers(self) -> list[Any]: ...
    def endpoints(self) -> list[Any]: ...


class Fed(Protocol):
    """What is read of the event feed."""

    messages: Tally[str]
    changes: Tally[str]
    skipped: Tally[str]

    @property
    def overflow(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def lost(self) -> int: ...
    def source_states(self) -> list[tuple[str, str]]: ...
    def unmatched(self) -> tuple[int, int]: ...


class Metrics:
    """`scrape()` gives the text; the rest are instruments."""

    def __init__(self, version: str) -> None:
        self.registry = registry = CollectorRegistry()
        Gauge("kvindex_build_info", "Always 1; the version is a label.", ["version"], registry=registry).labels(
            version
        ).set(1)
        self.lookups = Counter("kvindex_lookups", "Prompts that were scored.", ["api"], registry=registry)
        self.lookup_hits = Counter(
            "kvindex_lookup_hits", "Scored prompts of which some endpoint held a token.", ["api"], registry=registry
        )
        self.lookup_tokens = Counter("kvindex_lookup_tokens", "Tokens of scored prompts.", registry=registry)
        self.lookup_matched_tokens = Counter(
            "kvindex_lookup_matched_tokens", "Tokens that the best endpoint of each prompt held.", registry=registry
        )
        self.lookup_seconds = Histogram(
            "kvindex_lookup_seconds",
            "Time in the index for one prompt, hashing included.",
            buckets=LOOKUP_BUCKETS,
            registry=registry,
        )
        self.tokenize_seconds = Histogram(
            "kvindex_tokenize_seconds", "Time to tokenise a plain prompt, waiting included.", registry=registry
        )
        self.refused = Counter(
            "kvindex_requests_refused", "Requests answered with an error.", ["code"], registry=registry
        )
        self.prediction_error = Histogram(
            "kvindex_prediction_error_tokens",
            "How far the predicted cached tokens were from what the engine reported; 0 is exact.",
            ["direction"],
            buckets=ERROR_BUCKETS,
            registry=registry,
        )
        self.predictions = Counter(
            "kvindex_predictions",
            "Predictions compared with the engine's report.",
            ["endpoint", "outcome"],
            registry=registry,
        )

        self.unknown_endpoints = Gauge(
            "kvindex_reported_endpoints_unknown",
            "Endpoints that routers report on and no publisher speaks for.",
            registry=registry,
        )

    def watch(self, index: Indexed, feed: Fed) -> None:
        self.registry.register(_Watched(index, feed))

    def scrape(self) -> bytes:
        return generate_latest(self.registry)


class _Watched(Collector):
    def __init__(self, index: Indexed, feed: Fed) -> None:
        self._index, self._feed = index, feed

    def describe(self) -> Iterable[Metric]:
        return []  # else registering would collect once, before anything runs

    def collect(self) -> Iterable[Metric]:
        yield from self._of_index()
        yield from self._of_publishers()
        yield from self._of_feed()

    def _of_index(self) -> Iterable[Metric]:
        helps = {
            "blocks": "Distinct blocks known.",
            "entries": "(endpoint, group, tier, block) residencies.",
            "bytes": "Memory of the index.",
            "orphans": "Blocks that wait for their parent.",
            "publishers": "Publishers known to the index.",
        }
        for name, value in sorted(self._index.stats().items()):
            yield GaugeMetricFamily(f"kvindex_index_{name}", helps.get(name, f"{name} of the index."), value)

    def _of_publishers(self) -> Iterable[Metric]:
        labels = ["source", "topic", "endpoint"]
        lag = GaugeMetricFamily("kvindex_publisher_lag_seconds", "Age of what is known of a publisher.", labels=labels)
        state = GaugeMetricFamily("kvindex_publisher_state", "1 for the state it is in.", labels=[*labels, "state"])
        counters = {
            name: CounterMetricFamily(f"kvindex_publisher_{name}", text, labels=labels)
            for name, text in (
                ("events", "Events applied."),
                ("gaps", "Times that messages were missing."),
                ("missing", "Messages that were missing."),
                ("replays", "Replays asked for."),
                ("restarts", "Times that the publisher started anew."),
                ("skipped", "Events and messages that were not applied."),
            )
        }
        for p in self._index.publishers():
            who = [p.source, p.topic or "", p.endpoint]
            lag.add_metric(who, p.lag_seconds)
            for name in PUBLISHER_STATES:
                state.add_metric([*who, name], float(p.state == name))
            for name, family in counters.items():
                family.add_metric(who, getattr(p, name))
        yield lag
        yield state
        yield from counters.values()

    def _of_feed(self) -> Iterable[Metric]:
        feed = self._feed
        for name, label, text, tally in (
            ("kvindex_messages", "status", "Messages taken from publishers, by what became of them.", feed.messages),
            (
                "kvindex_events",
                "kind",
                "Block residencies credited, withdrawn, orphaned, unplaced; clears.",
                feed.changes,
            ),
            ("kvindex_skipped", "reason", "Events and messages that were not applied.", feed.skipped),
        ):
            family = CounterMetricFamily(name, text, labels=[label])
            for key, value in sorted(tally.items()):
                family.add_metric([key], value)
            yield family
        yield CounterMetricFamily(
            "kvindex_queue_overflow", "Messages dropped because the queue was full.", feed.overflow
        )
        yield CounterMetricFamily("kvindex_lost_messages", "Messages that no replay could bring back.", feed.lost)
        yield GaugeMetricFamily("kvindex_queue_messages", "Messages between the sockets and the index.", feed.waiting)
        sources = GaugeMetricFamily("kvindex_sources", "Configured and found sockets, by state.", labels=["state"])
        for state, count in sorted(Tally(s for _, s in feed.source_states()).items()):
            sources.add_metric([state], count)
        yield sources
        without_endpoint, without_publisher = feed.unmatched()
        text = "Publishers whose endpoint nobody named."
        yield GaugeMetricFamily("kvindex_publishers_without_endpoint", text, without_endpoint)
        text = "Endpoints for which no publisher was found."
        yield GaugeMetricFamily("kvindex_endpoints_without_publisher", text, without_publisher)
