"""vLLM's own KVCacheManager, driven the way vLLM's scheduler drives it, with no model behind it.

Follows `Scheduler.schedule` and `update_from_output` of vLLM 0.32 for what touches the cache: running requests first,
preemption of the newest when the pool is empty, admission of waiting ones after a prefix look-up, chunked prefill,
Mamba's aligned chunks (vLLM's own function), copy-on-write blocks kept until the step has run, then one event batch.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from layouts import Group, Layout
from traffic import Prompt
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1 import kv_cache_interface as specs
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

LORA_IDS = {"adapter-a": 1, "adapter-b": 2, "image-1": 3}


def make_spec(group: Group) -> specs.KVCacheSpec:
    heads: dict[str, Any] = {"num_kv_heads": 1, "head_size": 16, "dtype": torch.float32}
    if group.kind == "full":
        return specs.FullAttentionSpec(block_size=group.block_size, **heads)
    if group.kind == "mla":
        return specs.MLAAttentionSpec(block_size=group.block_size, **heads)
    if group.kind == "window":
        return specs.SlidingWindowSpec(block_size=group.block_size, sliding_window=group.span, **heads)
    if group.kind == "chunked":
        return specs.ChunkedLocalAttentionSpec(block_size=group.block_size, attention_chunk_size=group.span, **heads)
    return specs.MambaSpec(
        block_size=group.block_size, shapes=((1, 16),), dtypes=(torch.float32,), mamba_cache_mode="align"
    )


@dataclass
class Job:
    """A request and the tokens that it will sample."""

    request: Request
    prompt: Prompt
    outputs: deque[int]


class Engine:
    """One engine core (one data-parallel rank)."""

    def __init__(self, layout: Layout, num_blocks: int, longest: int, chunk_tokens: int) -> None:
        self.layout = layout
        groups = [
            specs.KVCacheGroupSpec([f"layer{i}"], make_spec(group), is_eagle_group=False)
            for i, group in enumerate(layout.groups)
        ]
        config = specs.KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=groups,
            prefix_cache_retention_interval=layout.retention,
        )
        state_blocks = [group.block_size for group in layout.groups if group.kind == "mamba"]
        block_size = max(state_blocks, default=layout.groups[0].block_size)
        cache = SimpleNamespace(
            block_size=block_size, prefix_match_unit=layout.unit, enable_prefix_caching=True, mamba_cache_mode="align"
        )
        settings = SimpleNamespace(
            cache_config=cache,
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            kv_transfer_config=None,
        )
        self.block_size, self.hash_block_size = kv_cache_utils.resolve_kv_cache_block_sizes(config, settings)
        config.hash_block_size = self.hash_block_size
        self.manager = KVCacheManager(
            kv_cache_config=config,
            max_model_len=longest + 64,
            scheduler_block_size=self.block_size,
            hash_block_size=self.hash_block_size,
            max_in_flight_tokens=chunk_tokens,
            enable_caching=True,
            use_eagle=layout.eagle,
            enable_kv_cache_events=True,
        )
        self.chunk_tokens = chunk_tokens
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self._retained: list[Any] = []
        self._ids = itertools.count()
        kv_cache_utils.init_none_hash(sha256)
        self._hasher = kv_cache_utils.get_request_block_hasher(self.hash_block_size, sha256)
        self._split = SimpleNamespace(
            cache_config=cache,
            mamba_partial_cache_hit=bool(state_blocks)
            and self.hash_block_size < self.block_size
            and self.manager.coordinator.enable_partial_hash_hits,
            hash_block_size=self.hash_block_size,
            block_size=self.block_size,
            use_eagle_block_drop=layout.eagle,
            mamba_has_prefill_checkpoint_blocks=False,
            mamba_prefill_checkpoint_alignment=None,
            max_num_scheduled_tokens=chunk_tokens,
            scheduler_config=SimpleNamespace(long_prefill_token_threshold=0),
            mamba_shared_prefix_checkpoint=False,
        )
        self._aligned = bool(state_blocks)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def unannounced(self) -> bool:
        """Has the cache changed since the last batch of events (a reset while idle)?"""
        return bool(self.manager.block_pool.kv_event_queue)

    def ask(self, prompt: Prompt) -> int:
        """How many tokens of this prompt a request arriving now would find cached. Changes nothing."""
        return int(self.manager.get_computed_blocks(self._request(prompt, report=False))[1])

    def submit(self, prompt: Prompt, outputs: list[int]) -> None:
        self.waiting.append(Job(self._request(prompt, report=self.layout.report_full), prompt, deque(outputs)))

    def reset(self) -> bool:
        return bool(self.manager.reset_prefix_cache())

    def step(self) -> tuple[list[Any], list[Job]]:
        """One scheduler step: the events it publishes and the requests that it finished."""
        self.manager.new_step_starts()
        scheduled: dict[str, tuple[Job, int]] = {}
        preempted = self._schedule_running(scheduled)
        if not preempted:
            self._schedule_waiting(scheduled)
        self._drain()
        finished = self._sample(scheduled)
        if not scheduled and not preempted and not finished and not self.running and self.waiting:
            finished.append(self.waiting.popleft())  # can never fit: what a real engine would have refused
        self.manager.block_pool.free_blocks(self._retained)
        self._retained = []
        return self.manager.take_events(), finished

    def _schedule_running(self, scheduled: dict[str, tuple[Job, int]]) -> bool:
        preempted = False
        for job in list(self.running):
            if job not in self.running:
                continue
            request, budget = job.request, self._budget(scheduled)
            count = self._aligned_count(request, min(request.num_tokens - request.num_computed_tokens, budget))
            if count <= 0:
                continue
            while self.manager.allocate_slots(request, count) is None:
                victim = self.running.pop()
                preempted = True
                self._preempt(victim)
                scheduled.pop(victim.request.request_id, None)
                if victim is job:
                    break
            else:
                scheduled[request.request_id] = (job, count)
        return preempted

    def _schedule_waiting(self, scheduled: dict[str, tuple[Job, int]]) -> None:
        while self.waiting and len(self.running) < 8:
            job = self.waiting[0]
            request, budget = job.request, self._budget(scheduled)
            if budget <= 0:
                return
            blocks, cached, request.shared_prefix_boundary = self.manager.get_computed_blocks(request)
            count = self._aligned_count(request, min(request.num_tokens - cached, budget), cached)
            if count <= 0:
                return
            new = self.manager.allocate_slots(
                request,
                count,
                num_new_computed_tokens=cached,
                new_computed_blocks=blocks,
                full_sequence_must_fit=True,
                has_scheduled_reqs=bool(self.running),
            )
            if new is None:
                return
            self.waiting.popleft()
            self.running.append(job)
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = cached
            scheduled[request.request_id] = (job, count)

    def _sample(self, scheduled: dict[str, tuple[Job, int]]) -> list[Job]:
        finished = []
        for job, count in scheduled.values():
            request = job.request
            request.num_computed_tokens += count
            if request.num_computed_tokens < request.num_tokens:
                continue
            request.append_output_token_ids(job.outputs.popleft())
            if not job.outputs:
                self.running.remove(job)
                self.manager.free(request)
                finished.append(job)
        return finished

    def _preempt(self, job: Job) -> None:
        self.manager.free(job.request)
        job.request.status = RequestStatus.PREEMPTED
        job.request.num_computed_tokens = 0
        job.request.num_preemptions += 1
        self.waiting.appendleft(job)

    def _drain(self) -> None:
        self._retained = self.manager.take_kv_cache_block_copies()[1]
        self.manager.take_boundary_state_offloads()
        self.manager.take_new_block_ids()

    def _budget(self, scheduled: dict[str, tuple[Job, int]]) -> int:
        return self.chunk_tokens - sum(count for _, count in scheduled.values())

    def _aligned_count(self, request: Request, count: int, cached: int = 0) -> int:
        if self._aligned and count > 0:
            return int(Scheduler._mamba_block_aligned_split(self._split, request, count, cached))
        return count

    def _request(self, prompt: Prompt, report: bool) -> Request:
        lora = prompt.lora and LoRARequest(prompt.lora, LORA_IDS[prompt.lora], f"/adapters/{prompt.lora}")
        extra = {"kv_cache_report_mode": "full"} if report else None
        return Request(
            request_id=str(next(self._ids)),
            prompt_token_ids=list(prompt.tokens),
            sampling_params=SamplingParams(max_tokens=1_000, extra_args=extra),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=lora or None,
            cache_salt=prompt.salt,
            mm_features=[
                MultiModalFeatureSpec(None, "image", item.hash, PlaceholderRange(item.offset, item.length))
                for item in prompt.media
            ],
            block_hasher=self._hasher,
        )


def pool_blocks(layout: Layout, longest: int, factor: float) -> int:
    """Blocks for `factor` requests of the longest kind at once, and the null block."""
    one = sum(math.ceil((longest + 64) / group.block_size) for group in layout.groups)
    return math.ceil(one * factor) + 3
