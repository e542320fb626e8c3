"""The simulated cache and vLLM's own, action by action: the same hits, the same room, the same events in order.

A simulated engine serves random traffic while its cache is recorded; vLLM's KVCacheManager then does the same and must
answer the same. Engine keys differ (they are opaque), so both sides' keys are renamed by first appearance.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvindex.simulator import Engine, EngineConfig, Request
from kvindex.simulator.kvcache import PrefixCache
from tests.simulator.engines import config, request

pytestmark = pytest.mark.vllm

SEEDS = 20
PEER = Path(__file__).with_name("vllm_peer.py")


class RecordedCache(PrefixCache):
    """Writes down every action with its result and the events it caused."""

    def __init__(self, settings: EngineConfig) -> None:
        super().__init__(settings)
        self.actions: list[list[Any]] = []
        self.answers: list[list[Any]] = []
        self._known: dict[str, int] = {}
        self._admitting = False

    def _record(self, action: list[Any], result: object, before: int) -> None:
        self.actions.append(action)
        self.answers.append([result, msgspec.to_builtins(self._events[before:])])

    def admit(self, request: Request, hit: list[int], new_tokens: int) -> bool:
        before, self._admitting = len(self._events), True
        admitted = super().admit(request, hit, new_tokens)
        self._admitting = False
        tokens = request.tokens.tolist()
        self._known[request.id] = len(tokens)
        action = ["admit", request.id, tokens, request.lora, request.cache_salt, new_tokens]
        self._record(action, [len(hit) * self.block_size, admitted], before)
        return admitted

    def grow(self, request: Request, new_tokens: int) -> bool:
        before = len(self._events)
        grown = super().grow(request, new_tokens)
        if not self._admitting:
            appended = request.tokens[self._known[request.id] :].tolist()
            self._known[request.id] = len(request.tokens)
            self._record(["grow", request.id, appended, request.computed, new_tokens], grown, before)
        return grown

    def free(self, request: Request) -> None:
        before = len(self._events)
        super().free(request)
        self._record(["free", request.id], None, before)

    def reset(self) -> bool:
        before = len(self._events)
        done = super().reset()
        self._record(["reset"], done, before)
        return done


def traffic(seed: int) -> tuple[EngineConfig, RecordedCache, Engine]:
    random_ = random.Random(seed)
    settings = config(
        block_size=random_.choice([1, 4, 16]),
        num_blocks=random_.randrange(20, 60),
        max_num_seqs=random_.randrange(2, 6),
        loras=("a", "b"),
    )
    size = settings.block_size
    settings = msgspec.structs.replace(settings, max_num_batched_tokens=random_.choice([size, 3 * size, 100 * size]))
    engine = Engine(settings)
    cache = engine.cache = RecordedCache(settings)
    history: list[list[int]] = [[]]
    now = 0.0
    for _ in range(400):
        if random_.random() < 0.4:
            prompt = random_.choice(history) + [random_.randrange(3) for _ in range(random_.randrange(1, 3 * size + 2))]
            if random_.random() < 0.3:
                prompt = prompt[: random_.randrange(1, len(prompt) + 1)]
            lora, salt = random_.choice([None, None, "a", "b"]), random_.choice([None, None, "s", "t"])
            asked = request(
                prompt[: settings.context_tokens - 3 * size - 1],
                random_.randrange(1, 3 * size + 1),
                lora=lora,
                cache_salt=salt,
            )
            history.append(asked.tokens.tolist())
            engine.add(asked, now)
            if random_.random() < 0.1:
                engine.abort(asked.id)
        if random_.random() < 0.02:
            engine.reset_prefix_cache(reset_running=random_.random() < 0.3)
        result = engine.step(now)
        now = result.next_time if result.next_time is not None else now + 1
    return settings, cache, engine


def renamed(answers: list[list[Any]]) -> list[list[Any]]:
    names: dict[int, int] = {}

    def name(key: int | None) -> int | None:
        return None if key is None else names.setdefault(key, len(names))

    def event(fields: dict[str, Any]) -> dict[str, Any]:
        if "block_hashes" in fields:
            fields["block_hashes"] = [name(key) for key in fields["block_hashes"]]
        if "parent_block_hash" in fields:
            fields["parent_block_hash"] = name(fields["parent_block_hash"])
        # JSON has no tuples
        return json.loads(json.dumps(fields))

    return [[result, [event(fields) for fields in events]] for result, events in answers]


def test_vllms_cache_answers_every_action_the_same(vllm_python: str) -> None:
    runs = [traffic(seed) for seed in range(SEEDS)]
    plans = [
        {"block_size": settings.block_size, "num_blocks": settings.num_blocks, "actions": cache.actions}
        for settings, cache, _ in runs
    ]
    done = subprocess.run(
        [vllm_python, PEER], input=json.dumps(plans), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen: Counter[str] = Counter()
    for seed, (answers, (_, cache, engine)) in enumerate(zip(json.loads(done.stdout), runs, strict=True)):
        for number, (ours, theirs) in enumerate(zip(renamed(cache.answers), renamed(answers), strict=True)):
            assert ours == theirs, (seed, number, cache.actions[number])
        seen.update(fields["type"] for _, events in cache.answers for fields in events)
        seen.update(action[0] for action in cache.actions)
        seen["refused"] += sum(answer[0] is False for answer in cache.answers)
        seen["preempted"] += engine.stats.preemptions
        seen["hit"] += engine.stats.prefix_hits
    print(seen)
    for what in ("BlockStored", "BlockRemoved", "AllBlocksCleared", "reset", "refused", "preempted", "hit"):
        assert seen[what] > 0, what
