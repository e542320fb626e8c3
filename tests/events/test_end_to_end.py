"""A publisher that loses messages and dies, a subscriber, an index: in the end it knows what it would without that."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

from kvindex import Index
from kvindex.events.replaying import ReplayLimits
from kvindex.events.subscriber import SourceConfig, Subscriber
from tests.events.wire import batch
from tests.support.publisher import Publisher, stored

SIZE = 4


def frames_of(publisher: Publisher, sequence: int, events: list[object]) -> list[bytes]:
    return [publisher.topic, sequence.to_bytes(8, "big"), batch(*events)]


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


class Engine:
    """A prefix cache of 4-token blocks: prompts are chains, eviction takes any leaf."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.held: dict[int, int | None] = {}  # key -> parent

    def step(self) -> list[object]:
        events: list[object] = []
        for _ in range(self._rng.randint(1, 3)):
            action = self._rng.random()
            leaves = [key for key in self.held if key not in self.held.values()]
            if action < 0.6:
                parent = self._rng.choice([None, *self.held])
                depth_token = self._rng.randrange(3)
                key = hash((parent, depth_token)) & (1 << 63) - 1
                if key not in self.held:
                    self.held[key] = parent
                    events.append(stored(key, [depth_token] * SIZE, parent))
            elif leaves and action < 0.97:
                gone = self._rng.choice(leaves)
                del self.held[gone]
                events.append({"type": "BlockRemoved", "block_hashes": [gone], "medium": "GPU"})
            elif action >= 0.97:
                self.held.clear()
                events.append({"type": "AllBlocksCleared"})
        return events


def test_losses_restarts_and_silence_leave_no_trace() -> None:
    seed = int(os.environ.get("KVINDEX_SEED", random.randrange(1 << 32)))
    print(f"KVINDEX_SEED={seed}")
    rng = random.Random(seed)
    publisher = Publisher()
    where = publisher.endpoint, publisher.replay_endpoint
    index, truth = Index(reference=True), Index(reference=True)
    subscriber = Subscriber(
        SourceConfig(
            source=publisher.endpoint,
            replay=publisher.replay_endpoint,
            probe_seconds=0.2,
            replay_limits=ReplayLimits(patience_seconds=0.5),
        ),
        index,
    )
    subscriber.start()
    engine, sent = Engine(rng), 0
    for round_ in range(4):
        if round_:
            publisher.kill()
            publisher = Publisher(*where)
            truth.restarted("truth")
            engine, sent = Engine(rng), 0
        for _ in range(60):
            events = engine.step()
            if rng.random() < 0.15:
                publisher.lose(rng.randint(1, 3))
            publisher.publish(*events)
            assert truth.ingest("truth", frames_of(publisher, sent, events)).status in ("applied", "skipped")
            sent += 1
            if rng.random() < 0.05:
                time.sleep(0.02)
        expected = [(round_, sent - 1, "live")]
        until(
            lambda expected=expected: (  # type: ignore[misc]
                [(p.incarnation, p.last_sequence, p.state) for p in index.publishers()] == expected
            )
        )
        for _ in range(200):
            tokens = [token for _ in range(6) for token in [rng.randrange(3)] * SIZE] + [9]
            one, two = index.score(tokens).of("pod"), truth.score(tokens).of("pod")
            assert (one and (one.blocks, one.tokens)) == (two and (two.blocks, two.tokens))
        index.check()
    status = subscriber.status()
    assert status.lost == 0
    assert status.restarts >= 3
    assert subscriber.stop()
    publisher.close()
