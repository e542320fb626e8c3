"""The engine as a pure step function: no clock, no thread, no I/O.

Whoever drives it calls `step(now)`, gets what the step that ended at `now` produced, and calls again at `next_time` (or
after the next `add`, when it is None). A real-time driver sleeps in between, a virtual clock jumps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import xxhash

from kvindex.errors import UsageError
from kvindex.simulator.config import EngineConfig
from kvindex.simulator.kvcache import PrefixCache
from kvindex.simulator.request import Request, mix, weyl
from kvindex.simulator.results import EngineStats, Finish, Output, Scheduled, StepResult


class Engine:
    """Continuous batching over a prefix cache, in vLLM's order: running requests first, each as far as the token budget
    goes (so a long prefill is cut into chunks), then waiting ones first come, first served; when blocks run out, the
    request that joined last is preempted and starts over."""

    def __init__(self, config: EngineConfig, vocabulary: Sequence[int] = range(256)) -> None:
        self.config = config
        self.cache = PrefixCache(config)
        self.stats = EngineStats()
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self._vocabulary = vocabulary
        self._requests: dict[str, Request] = {}
        self._aborted: list[str] = []
        self._batch: list[Scheduled] = []
        self._due: float | None = None
        self._max_loras = config.max_loras or len(config.loras)

    def add(self, request: Request, now: float) -> None:
        """Queue a request; it is looked at when the current step ends. Call `step` when the engine was idle."""
        limit = self.config.context_tokens
        if request.id in self._requests:
            raise UsageError(f"request {request.id!r} is already running")
        if request.prompt_tokens < 1 or request.max_tokens < 1:
            raise UsageError(
                f"request {request.id!r} has {request.prompt_tokens} prompt tokens and asks for "
                f"{request.max_tokens}; both must be at least 1"
            )
        if request.prompt_tokens + request.max_tokens > limit:
            raise UsageError(
                f"request {request.id!r} needs {request.prompt_tokens} + {request.max_tokens} tokens; "
                f"the model's context has {limit}"
            )
        if request.lora is not None:
            if request.lora not in self.config.loras:
                raise UsageError(f"LoRA {request.lora!r} is not one of {list(self.config.loras)}")
            request.lora_id = self.config.loras.index(request.lora) + 1
        content = request.tokens.tobytes() + (request.lora or "").encode()
        request.sample_seed = xxhash.xxh3_64_intdigest(content, mix(self.config.seed ^ mix(request.sample_seed)))
        request.arrival = now
        self._requests[request.id] = request
        self.waiting.append(request)

    def abort(self, request_id: str) -> None:
        """Drop a request at the end of the current step; an id that is not known (any more) is ignored."""
        if request_id in self._requests:
            self._aborted.append(request_id)

    def reset_prefix_cache(self, reset_running: bool = False) -> bool:
        """Forget what is cached; announced with the next step. False while requests run, unless they are preempted."""
        if reset_running:
            while self.running:
                self._preempt(self.running.pop())
            self._batch = []
        return self.cache.reset()

    def step(self, now: float) -> StepResult:
        """End the step that is due at `now`, then begin the next. Early calls change nothing."""
        if self._due is not None and now < self._due:
            return StepResult([], [], self._due)
        self._drop_aborted()
        outputs = self._complete(now)
        # An engine announces only when a step has run: an idle engine's reset waits in the cache for the next one.
        events = self.cache.take_events() if self._due is not None else []
        self._batch = self._schedule(now)
        self._due = now + self._batch_seconds() if self._batch else None
        return StepResult(outputs, events, self._due)

    def coast(self, until: float) -> float | None:
        """Run ahead to `until` through steps in which nothing but decoding happens: no request joins, finishes or is
        preempted, and nothing is announced. Returns when the current step ends, like `step`. Their tokens are written
        into the requests and not returned, so this is for drivers that only look at whole answers; those get exactly
        what stepping gives them."""
        if self._due is None or self._due > until or self.waiting or self._aborted or self.cache.has_events:
            return self._due
        if any(tokens != 1 or not request.output_tokens for request, tokens in self._batch):
            return self._due
        most = self._quiet_steps()
        seconds = self._batch_seconds()
        count = 0
        while count < most and self._due <= until:
            self._due += seconds
            count += 1
        if count:
            for request, _ in self._batch:
                request.tokens.extend(self._sample(request, count))
                request.computed += count
                self.cache.grow(request, 1)
            self.stats.generated += count * len(self._batch)
            self.stats.steps += count
        return self._due

    def _quiet_steps(self) -> int:
        """How many decode steps can end, and be followed by another, before something happens."""
        size = self.config.block_size
        steps = min(request.max_tokens - request.output_tokens for request, _ in self._batch) - 1
        if self.config.report_events:
            # A step whose last token fills a block announces it; the one after takes a block, which may evict.
            fills = ((request.computed + 1) % size for request, _ in self._batch)
            return min(steps, *(size - 1 - fill if fill else 0 for fill in fills))
        needed = sum(-(-(request.computed + 1 + steps) // size) - len(request.blocks) for request, _ in self._batch)
        return steps if needed <= self.cache.pool.free_blocks else 0

    @property
    def is_idle(self) -> bool:
        return not self._requests

    def _drop_aborted(self) -> None:
        for request_id in self._aborted:
            request = self._requests.pop(request_id, None)
            if request is None:
                continue
            if request in self.running:
                self.running.remove(request)
                self.cache.free(request)
            else:
                self.waiting.remove(request)
            self.stats.aborted_requests += 1
        self._aborted.clear()

    def _complete(self, now: float) -> list[Output]:
        outputs: list[Output] = []
        finished = False
        for request, tokens in self._batch:
            if request.id not in self._requests:
                continue
            request.computed += tokens
            if request.computed < len(request.tokens):
                continue  # a chunk of a prefill that goes on
            token = self._sample(request, 1)[0]
            request.tokens.append(token)
            if request.first_token_at is None:
                request.first_token_at = now
            finish = Finish.LENGTH if request.is_complete else None
            if finish is not None:
                finished = True
                request.finished_at = now
                self.cache.free(request)
                del self._requests[request.id]
                self.stats.finished_requests += 1
            outputs.append(Output(request, token, finish))
        if finished:
            self.running = [request for request in self.running if request.finished_at is None]
        self.stats.generated += len(outputs)
        self.stats.steps += bool(self._batch)
        return outputs

    def _sample(self, request: Request, count: int) -> list[int]:
        """The next `count` tokens: equal prompts are answered equally."""
        words, size = self._vocabulary, len(self._vocabulary)
        return [words[number % size] for number in weyl(request.sample_seed, request.output_tokens, count)]

    def _schedule(self, now: float) -> list[Scheduled]:
        batch: list[Scheduled] = []
        budget = self.config.max_num_batched_tokens
        preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            tokens = min(len(request.tokens) - request.computed, budget)
            while not self.cache.grow(request, tokens):
                preempted = True
                victim = self.running.pop()
                self._preempt(victim)
                if victim is request:
                    break
            else:
                batch.append(Scheduled(request, tokens))
                budget -= tokens
            index += 1
        if not preempted:
            self._admit(batch, budget, now)
        return batch

    def _admit(self, batch: list[Scheduled], budget: int, now: float) -> None:
        loras = {item.request.lora for item in batch if item.request.lora}
        skipped: list[Request] = []
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            request = self.waiting[0]
            if request.lora and request.lora not in loras and len(loras) >= self._max_loras:
                skipped.append(self.waiting.popleft())
                continue
            hit = self.cache.find(request)
            cached = len(hit) * self.config.block_size
            tokens = min(len(request.tokens) - cached, budget)
            if not self.cache.admit(request, hit, tokens):
                break
            self.waiting.popleft()
            self.running.append(request)
            if request.lora:
                loras.add(request.lora)
            if request.cached_tokens is None:  # first time, not after a preemption
                request.cached_tokens = cached
                request.scheduled_at = now
                self.stats.prompt += request.prompt_tokens
                self.stats.prefix_queries += len(request.tokens)
                self.stats.prefix_hits += cached
            batch.append(Scheduled(request, tokens))
            budget -= tokens
        self.waiting.extendleft(reversed(skipped))

    def _preempt(self, request: Request) -> None:
        self.cache.free(request)
        request.preemptions += 1
        self.stats.preemptions += 1
        self.waiting.appendleft(request)

    def _batch_seconds(self) -> float:
        prefill = decodes = 0
        for request, tokens in self._batch:
            if request.output_tokens and tokens == 1:
                decodes += 1
            else:
                prefill += tokens
        config = self.config
        return config.latency.step_seconds(prefill, decodes, len(self.running), config.max_num_seqs)
