"""What one simulated engine is: sizes, limits and speed. Checked once, when it is made."""

from __future__ import annotations

import msgspec

from kvindex.errors import ConfigError


class LatencyModel(msgspec.Struct, frozen=True, kw_only=True):
    """How long a step takes. `load_factor` is how much slower everything is with `max_num_seqs` requests than with one,
    linear in between."""

    prefill_tokens_per_second: float = 8000.0
    seconds_per_output_token: float = 0.01
    load_factor: float = 2.0
    minimum_step_seconds: float = 0.001

    def step_seconds(self, prefill_tokens: int, decodes: int, running: int, max_running: int) -> float:
        """One batch: `prefill_tokens` prompt tokens computed, and one token for each of `decodes` requests."""
        seconds = prefill_tokens / self.prefill_tokens_per_second
        if decodes:
            seconds += self.seconds_per_output_token
        load = (running - 1) / (max_running - 1) if max_running > 1 else 0.0
        return max(seconds, self.minimum_step_seconds) * (1.0 + (self.load_factor - 1.0) * load)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    model: str = "sim"
    block_size: int = 16
    num_blocks: int = 2048  # block 0 is never used, as in vLLM
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    max_model_len: int = 0  # 0: as much as fits into the pool
    loras: tuple[str, ...] = ()
    max_loras: int = 0  # adapters in one batch; 0: all of them
    seed: int = 0
    hash_seed: str = "vllm-none-hash"  # engines with equal seeds announce equal blocks under equal engine keys
    latency: LatencyModel = LatencyModel()
    report_events: bool = True

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not at least 1")
        if self.num_blocks < 2:
            raise ConfigError(f"num_blocks: {self.num_blocks} is not at least 2 (block 0 is never used)")
        if self.max_model_len > self.capacity_tokens:
            raise ConfigError(
                f"max_model_len: {self.max_model_len} does not fit into the pool, which has "
                f"{self.capacity_tokens} tokens ((num_blocks - 1) * block_size)"
            )
        latency = self.latency
        for name in ("prefill_tokens_per_second", "minimum_step_seconds"):
            if not getattr(latency, name) > 0:
                raise ConfigError(f"{name}: {getattr(latency, name)} is not above 0")
        if latency.seconds_per_output_token < 0:
            raise ConfigError(f"seconds_per_output_token: {latency.seconds_per_output_token} is negative")
        if latency.load_factor < 1:
            raise ConfigError(f"load_factor: {latency.load_factor} is not at least 1")

    @property
    def capacity_tokens(self) -> int:
        return (self.num_blocks - 1) * self.block_size

    @property
    def context_tokens(self) -> int:
        return self.max_model_len or self.capacity_tokens
