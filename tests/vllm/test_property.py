"""The index against vLLM's own KVCacheManager: thousands of random requests over every layout of KV-cache groups.

For each prompt the index, fed with nothing but the messages, must name exactly the tokens that the engine would find
cached; where the engine announces too little for that (`layouts.py` says which and why), never more, or rarely. Read
from the middle of the stream it must never name a token too many either.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvindex import Index
from kvindex.index.config import IndexConfig, PublisherOverride
from tests.vllm.layouts import LAYOUTS, Bound
from tests.vllm.stream import records

SEEDS = (1, 2)
REQUESTS = 120  # arrivals per seed and layout: about 300 questions
ORACLE = Path(__file__).with_name("oracle.py")

Streams = dict[int, Path]


def play(python: str, folder: Path, seeds: tuple[int, ...], requests: int) -> Streams:
    """Run the oracle over all layouts, once per seed, the seeds side by side."""

    def one(seed: int) -> Path:
        made = folder / str(seed)
        made.mkdir()
        command = [python, str(ORACLE), "--seed", str(seed), "--requests", str(requests), "--folder", str(made)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return made

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(seeds, pool.map(one, seeds), strict=True))


@pytest.fixture(scope="module")
def streams(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Streams:
    return play(vllm_python, tmp_path_factory.mktemp("oracle"), SEEDS, REQUESTS)


@pytest.fixture(params=["reference", "native"])
def reference(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "reference")


class Answer(NamedTuple):
    id: str
    bound: Bound | str
    predicted: int
    found: int


def answers(stream: Path, reference: bool, skip_messages: int = 0) -> Iterator[Answer]:
    """What the index says to every question of one layout, and what the engine found."""
    index: Index | None = None
    about: dict[str, Any] = {}
    seen = 0
    for record in records(stream.read_bytes()):
        match record:
            case ["layout", description]:
                about, index = description, fresh_index(description, reference)
            case ["message", source, frames]:
                seen += 1
                if seen > skip_messages:
                    assert index is not None
                    taken = index.ingest(source, frames)
                    assert not taken.skipped, f"{about['name']}, message {seen}: {taken.skipped}"
            case ["ask", question, found] if seen > skip_messages:
                assert index is not None
                yield Answer(question["id"], question["bound"], predicted_tokens(index, about, question), found)


def fresh_index(about: dict[str, Any], reference: bool) -> Index:
    sources = [f"tcp://127.0.0.1:{5557 + rank}" for rank in range(about["ranks"])]
    publishers = tuple(PublisherOverride(source=source, eagle=about["eagle"]) for source in sources)
    return Index(reference=reference, config=IndexConfig(publishers=publishers))


def predicted_tokens(index: Index, about: dict[str, Any], question: dict[str, Any]) -> int:
    pod, rank = about["topic"].split("@")[1], question["rank"]
    scores = index.score(
        question["token_ids"],
        model=question["model"],
        lora=question["lora"],
        cache_salt=question["cache_salt"],
        mm=question["mm"],
    )
    tokens = dict(zip(scores.endpoints, scores.tokens, strict=True))
    return int(tokens.get(pod if rank == 0 else f"{pod}:dp{rank}", 0))


def wrong(answer: Answer, from_the_middle: bool) -> bool:
    if answer.bound == "none":
        return False
    if answer.bound != "exact" or from_the_middle:
        return answer.predicted > answer.found
    return answer.predicted != answer.found


def tolerated(given: list[Answer], from_the_middle: bool) -> float:
    """How many answers may be too high: none, but where the wire does not tell a report from a second copy."""
    if any(answer.bound == "mostly" for answer in given):
        return len(given) * (0.05 if from_the_middle else 0.01) + 2
    return 0


def check(stream: Path, reference: bool, skip_messages: int = 0) -> int:
    """All questions of one stream; the first wrong answers make the message. Returns how many were asked."""
    given = list(answers(stream, reference, skip_messages))
    bad = [answer for answer in given if wrong(answer, skip_messages > 0)]
    shown = "\n".join(f"  {a.id}: predicted {a.predicted}, the engine found {a.found} ({a.bound})" for a in bad[:5])
    assert len(bad) <= tolerated(given, skip_messages > 0), (
        f"{stream.parent.name}/{stream.name}: {len(bad)} of {len(given)} wrong\n{shown}"
    )
    if not skip_messages:  # a bound alone would also hold for an index that knows nothing
        right = sum(answer.predicted == answer.found for answer in given)
        assert right >= 0.3 * len(given), f"{stream.name}: only {right} of {len(given)} answers are the engine's own"
    return len(given)


@pytest.mark.vllm
@pytest.mark.parametrize("layout", LAYOUTS)
def test_predicts_what_the_engine_finds(streams: Streams, reference: bool, layout: str) -> None:
    asked = sum(check(folder / layout, reference) for folder in streams.values())
    assert asked > len(SEEDS) * REQUESTS


@pytest.mark.vllm
@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_the_middle_of_a_stream_never_a_token_too_many(streams: Streams, reference: bool, layout: str) -> None:
    for seed, folder in streams.items():
        for skip in random.Random(f"{seed}/{layout}").sample(range(1, 60), 2):
            check(folder / layout, reference, skip)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_predicts_what_the_engine_finds_for_long(vllm_python: str, tmp_path: Path, reference: bool) -> None:
    """Fresh seeds every time; KVINDEX_SOAK_SEED repeats a run."""
    seed = int(os.environ.get("KVINDEX_SOAK_SEED") or random.SystemRandom().randrange(1 << 30))
    streams = play(vllm_python, tmp_path, (seed, seed + 1), 1500)
    asked = sum(check(folder / layout, reference) for folder in streams.values() for layout in LAYOUTS)
    print(f"seed {seed}: {asked} questions, every answer right")
