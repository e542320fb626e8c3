"""What can be picked: engines, each with one target per data-parallel rank, their load, health and connections."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from kvindex.router.config import EndpointConfig, Limits, Retry
from kvindex.router.upstream import Pool


class Target:
    """One (engine, rank): what a pick chooses. `inflight` and `pending_tokens` are this router's own, exact at any
    moment; the rest is what the engine said at `scraped_at`."""

    __slots__ = (
        "endpoint",
        "inflight",
        "kv_usage",
        "name",
        "name_bytes",
        "pending_tokens",
        "picks",
        "rank",
        "running",
        "scraped_at",
        "waiting",
    )

    def __init__(self, endpoint: Endpoint, rank: int) -> None:
        self.endpoint = endpoint
        self.rank = rank
        self.name = endpoint.id if rank == 0 else f"{endpoint.id}:dp{rank}"
        self.name_bytes = self.name.encode()
        self.inflight = 0
        self.pending_tokens = 0  # uncached tokens sent there whose first output has not come back
        self.picks = 0
        self.running = 0
        self.waiting = 0
        self.kv_usage = 0.0
        self.scraped_at: float | None = None


class Endpoint:
    """One engine. `models` maps what it serves to the base model (None for a base model itself); None: not known
    yet."""

    def __init__(self, config: EndpointConfig, limits: Limits, retry: Retry, loop: asyncio.AbstractEventLoop) -> None:
        self.config = config
        self.id = config.id
        self.host, self.port = config.host_port
        self.url = f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"
        self.pool = Pool(self.host, self.port, limits.max_idle_per_endpoint, loop)
        self.targets = tuple(Target(self, rank) for rank in range(config.data_parallel_size))
        self.models: dict[str, str | None] | None = None if config.model is None else {config.model: None}
        self.scrape_error: str | None = None
        self.scrape_errors = 0
        self.refusals = 0
        self._retry = retry
        self._backoff_seconds = 0.0  # 0: healthy
        self._resting_until = 0.0
        self.last_refusal = ""

    def available(self, now: float) -> bool:
        return now >= self._resting_until

    def state(self, now: float) -> str:
        if self._backoff_seconds and now < self._resting_until:
            return f"resting {self._resting_until - now:.1f} s after: {self.last_refusal}"
        if self._backoff_seconds:
            return "on probation"
        return "up" if self.scrape_error is None else f"up, metrics unreadable: {self.scrape_error}"

    def picked(self, now: float) -> None:
        """On probation one request at a time may try."""
        if self._backoff_seconds:
            self._resting_until = now + self._backoff_seconds

    def refused(self, now: float, why: str) -> None:
        self.refusals += 1
        self.last_refusal = why
        self._backoff_seconds = min(
            self._backoff_seconds * 2 or self._retry.backoff_seconds, self._retry.max_backoff_seconds
        )
        self._resting_until = now + self._backoff_seconds

    def answered(self) -> None:
        self._backoff_seconds = self._resting_until = 0.0


class EndpointTable:
    """The current set. Replaced as a whole; what is being answered by a removed endpoint runs to its end."""

    def __init__(self, limits: Limits, retry: Retry, loop: asyncio.AbstractEventLoop) -> None:
        self._limits, self._retry, self._loop = limits, retry, loop
        self.by_id: dict[str, Endpoint] = {}
        self.targets: tuple[Target, ...] = ()

    def replace(self, configs: Iterable[EndpointConfig]) -> tuple[list[str], list[str]]:
        """Returns the ids added (or changed) and removed. An entry that did not change keeps its state."""
        wanted = {config.id: config for config in configs}
        current: dict[str, Endpoint] = {}
        added: list[str] = []
        for name, config in sorted(wanted.items()):
            old = self.by_id.get(name)
            if old is not None and old.config == config:
                current[name] = old
            else:
                added.append(name)
                current[name] = Endpoint(config, self._limits, self._retry, self._loop)
        for name, old in self.by_id.items():
            if current.get(name) is not old:
                old.pool.close()
        removed = sorted(self.by_id.keys() - wanted.keys())
        self.by_id = current
        self.targets = tuple(target for endpoint in current.values() for target in endpoint.targets)
        return added, removed

    def serving(self, model: str | None) -> tuple[Target, ...]:
        """The targets that serve a model; all of them where no one is known to (the engine then says so itself)."""
        if model is None:
            return self.targets
        found = tuple(t for t in self.targets if t.endpoint.models is None or model in t.endpoint.models)
        known = any(t.endpoint.models is not None for t in found)
        return found if known or found else self.targets

    def base_model(self, model: str | None) -> tuple[str | None, str | None]:
        """A served name as (base model, LoRA adapter)."""
        for endpoint in self.by_id.values():
            if model is not None and endpoint.models and (parent := endpoint.models.get(model)) is not None:
                return parent, model
        return model, None
