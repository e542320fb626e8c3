"""The index, fed with nothing but a simulated engine's messages, says for every request what the engine then finds."""

from __future__ import annotations

import random

import pytest

from kvindex import Index
from kvindex.simulator import Engine
from kvindex.simulator.wire import frames
from tests.simulator.engines import config, request, serve


class Stream:
    """An engine's publisher, into an index."""

    def __init__(self, index: Index, pod: str) -> None:
        self._index = index
        self._topic = f"kv@{pod}@sim"
        self._pod = pod
        self._sequence = 0

    def deliver(self, batches: list[list[object]]) -> None:
        for events in batches:
            message = frames(self._topic, self._sequence, 0.0, events)  # type: ignore[arg-type]
            outcome = self._index.ingest(self._pod, message)
            assert outcome.status == "applied", outcome
            assert outcome.applied is not None
            assert outcome.skipped == ()
            self._sequence += 1


@pytest.mark.parametrize("seed", range(6))
def test_every_request_asked_one_at_a_time_is_predicted_exactly(seed: int) -> None:
    print(f"seed {seed}")
    random_ = random.Random(seed)
    block_size = random_.choice([1, 3, 4, 16])
    pods = ["a", "b"]
    engines = {
        pod: Engine(config(block_size=block_size, num_blocks=random_.randrange(20, 60), loras=("sql",))) for pod in pods
    }
    index = Index(reference=True)
    streams = {pod: Stream(index, pod) for pod in pods}
    limit = min(engine.config.context_tokens for engine in engines.values())
    chats: list[list[int]] = []
    unannounced: set[str] = set()
    hits = 0
    for _ in range(300):
        if chats and random_.random() < 0.7:
            prompt = random_.choice(chats) + [random_.randrange(9) for _ in range(random_.randrange(2 * block_size))]
        else:
            prompt = [random_.randrange(9) for _ in range(random_.randrange(1, 6 * block_size))]
        prompt = (prompt or [1])[: limit - 8]
        if len(prompt) > 1 and random_.random() < 0.3:
            prompt = prompt[: random_.randrange(1, len(prompt))]
        lora, salt = random_.choice([None, None, "sql"]), random_.choice([None, None, "tenant"])
        pod = random_.choice(pods)
        row = index.score(prompt, model="sim", lora=lora, cache_salt=salt).of(pod)
        predicted = row.tokens if row is not None else 0
        asked = request(prompt, random_.randrange(1, 8), lora=lora, cache_salt=salt)
        streams[pod].deliver(serve(engines[pod], asked).batches)  # type: ignore[arg-type]
        if pod in unannounced:
            # The one thing no stream can tell: an idle engine's reset is announced with this very step.
            unannounced.remove(pod)
            assert asked.cached_tokens == 0
        else:
            assert predicted == asked.cached_tokens, (pod, prompt, lora, salt)
        hits += bool(asked.cached_tokens)
        chats.append(asked.tokens.tolist())
        if random_.random() < 0.03:
            assert engines[pod].reset_prefix_cache()
            unannounced.add(pod)
    index.check()
    assert hits > 20
