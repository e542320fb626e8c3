"""The virtual clock: equal to stepping token by token, deterministic, and fast enough for an hour of trace."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from kvindex import Index
from kvindex.errors import CaptureError, UsageError
from kvindex.simulator import Engine, LatencyModel, trace
from kvindex.simulator.virtual import Report, TimedRequest, simulate
from tests.simulator.engines import config


class SteppedEngine(Engine):
    """Never runs ahead."""

    def coast(self, until: float) -> float | None:
        return self._due


def workload(seed: int, count: int, vocabulary: int = 3) -> Iterator[TimedRequest]:
    random_ = random.Random(seed)
    at = 0.0
    for number in range(count):
        at += random_.expovariate(3.0)
        prompt = [random_.randrange(vocabulary) for _ in range(random_.randrange(1, 60))]
        yield TimedRequest(at=at, id=str(number), prompt=prompt, output_tokens=random_.randrange(1, 40))


def round_robin() -> object:
    turn = itertools.count()

    def choose(_: TimedRequest, engines: Mapping[str, Engine]) -> str:
        return list(engines)[next(turn) % len(engines)]

    return choose


def run(kind: type[Engine], seed: int, report_events: bool) -> tuple[Report, list[object], dict[str, object]]:
    settings = config(num_blocks=40, max_num_seqs=4, max_num_batched_tokens=32, report_events=report_events)
    engines = {f"e{number}": kind(settings) for number in range(2)}
    messages: list[object] = []
    report = simulate(engines, workload(seed, 120), round_robin(), lambda *message: messages.append(message))  # type: ignore[arg-type]
    return report, messages, {name: engine.stats for name, engine in engines.items()}


@pytest.mark.parametrize("report_events", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_running_ahead_changes_nothing_that_can_be_seen(seed: int, report_events: bool) -> None:
    print(f"seed {seed}")
    ahead, stepped = run(Engine, seed, report_events), run(SteppedEngine, seed, report_events)
    assert ahead[0].served == stepped[0].served
    assert len(ahead[0].served) == 120
    assert ahead == stepped
    assert bool(ahead[1]) == report_events


def test_first_token_time_counts_queue_and_uncached_prompt() -> None:
    engine = Engine(config(max_num_seqs=1))
    prompt = list(range(1, 21))
    requests = [TimedRequest(at=at, id=str(at), prompt=prompt, output_tokens=1) for at in (0.0, 0.1, 5.0)]
    report = simulate({"only": engine}, requests, lambda *_: "only")
    assert [item.first_token_seconds for item in report.served] == pytest.approx([0.2, 0.1 + 0.04, 0.04])
    assert [item.queue_seconds for item in report.served] == pytest.approx([0, 0.1, 0])
    assert report.hit_rate == pytest.approx(32 / 60)
    assert report.total_seconds(50) == pytest.approx(0.14)
    assert report.end == pytest.approx(5.04)


def test_a_router_that_reads_the_index_beats_taking_turns() -> None:
    def requests() -> Iterator[TimedRequest]:
        random_ = random.Random(5)
        for number in range(300):
            tenant = random_.randrange(12)
            prompt = [tenant * 100 + token for token in range(60)] + [random_.randrange(5000, 9000) for _ in range(8)]
            yield TimedRequest(at=number * 0.7, id=str(number), prompt=prompt, output_tokens=3)

    def engines() -> dict[str, Engine]:
        return {f"e{number}": Engine(config(num_blocks=100)) for number in range(3)}

    index = Index(reference=True)

    def best(timed: TimedRequest, engines: Mapping[str, Engine]) -> str:
        scores = index.score(timed.prompt, model="sim")
        matched = {name: scores.of(name) for name in engines}
        return max(
            engines,
            key=lambda name: ((row.tokens if (row := matched[name]) else 0), -engines[name].stats.finished_requests),
        )

    turns = simulate(engines(), requests(), round_robin())  # type: ignore[arg-type]
    scored = simulate(engines(), requests(), best, index.ingest)
    assert scored.messages > 100
    assert scored.hit_rate > turns.hit_rate + 0.2
    assert scored.first_token_seconds(50) < turns.first_token_seconds(50)


def test_an_hour_of_requests_is_simulated_to_its_end(tmp_path: Path) -> None:
    """A trace in Mooncake's form with growing chats; it runs in about a second, which is why nothing asserts time."""
    random_ = random.Random(11)
    chats = [[random_.randrange(1, 1 << 30) for _ in range(4)] for _ in range(60)]
    path = tmp_path / "trace.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for number in range(2400):
            chat = random_.choice(chats)
            chat.append(random_.randrange(1, 1 << 30))
            row = {
                "timestamp": number * 1500,
                "input_length": 512 * len(chat) - random_.randrange(512),
                "output_length": random_.randrange(1, 400),
                "hash_ids": chat,
            }
            file.write(json.dumps(row) + "\n")
    latency = LatencyModel(prefill_tokens_per_second=30_000, seconds_per_output_token=0.02)
    settings = config(block_size=128, num_blocks=2000, max_num_seqs=32, report_events=False, latency=latency)
    engines = {f"e{number}": Engine(settings) for number in range(4)}
    report = simulate(engines, trace.read(path, max_prompt_tokens=30_000), round_robin())  # type: ignore[arg-type]
    assert len(report.served) == 2400
    assert report.end > 3598
    assert report.hit_rate > 0.1


def test_trace_blocks_are_equal_exactly_where_their_ids_are() -> None:
    first, second = trace.prompt_tokens([5, 6, 7], 1400), trace.prompt_tokens([5, 6, 8], 1536)
    assert len(first) == 1400
    assert first[:1024] == second[:1024]
    assert all(one != other for one, other in zip(first[1024:], second[1024:], strict=False))


@pytest.mark.parametrize("line", ["{", '{"timestamp": 1}', '{"timestamp": 1, "input_length": "x"}'])
def test_a_file_that_is_no_trace_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp":0,"input_length":3,"output_length":1,"hash_ids":[1]}\n' + line + "\n")
    with pytest.raises(CaptureError, match=r"trace\.jsonl:2: not a request"):
        list(trace.read(path))


def test_wrong_use_is_refused() -> None:
    late = [TimedRequest(at=at, id=str(at), prompt=[1], output_tokens=1) for at in (1.0, 0.5)]
    with pytest.raises(UsageError, match="sort the trace"):
        simulate({"a": Engine(config())}, late, lambda *_: "a")
    with pytest.raises(UsageError, match="chose 'b'"):
        simulate({"a": Engine(config())}, late[:1], lambda *_: "b")
