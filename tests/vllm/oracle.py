"""What the engine itself would find cached: vLLM's own KVCacheManager under random load, as a stream of MessagePack.

    VLLM_PYTHON tests/vllm/oracle.py --seed 1 --requests 1000 --layouts all > stream

Runs in vLLM's environment and imports nothing of kvindex. The stream is a sequence of arrays:

    ["layout", {...}]                    a fresh engine begins, described; so should a fresh index
    ["message", source, frames]          one message exactly as ZMQ would deliver it
    ["ask", {...}, tokens]               the engine, asked at this point, would find so many of its tokens cached

An ask is to be answered from the messages before it. `predictable` says whether the answer follows from them; if not,
`why` says what was not announced, and `bound` is `at_most` where a prediction must still never be higher, `mostly`
where it rarely is, else `none`.
The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["PYTHONHASHSEED"] = "0"  # the seed of vLLM's hash chain, also for algorithms that would draw it at random

import msgspec
from engine import Engine, pool_blocks
from layouts import Layout, chosen
from traffic import Prompt, Traffic
from wire import Publisher

MODEL = "tiny"
UNANNOUNCED = "an idle engine's reset is announced with its next step"


class Run:
    """One layout: its engines (one per rank), their publishers and the traffic."""

    def __init__(self, layout: Layout, seed: int, requests: int) -> None:
        self.layout, self.requests = layout, requests
        self.rng = random.Random(f"{seed}/{layout.name}")
        step = max(group.block_size for group in layout.groups)
        longest = step * self.rng.choice((6, 9, 14))
        chunk = self.rng.choice((step, 3 * step, 100 * step))
        blocks = pool_blocks(layout, longest, self.rng.choice((1.2, 2.0, 4.0)))
        os.environ["VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES"] = "0" if layout.hashes == "bytes" else "1"
        self.engines = [Engine(layout, blocks, longest, chunk) for _ in range(layout.ranks)]
        self.topic = f"kv@pod-{layout.name}@{MODEL}"
        self.publishers = [
            Publisher(f"tcp://127.0.0.1:{5557 + rank}", self.topic, rank, layout.wire) for rank in range(layout.ranks)
        ]
        self.traffic = Traffic(self.rng, step, longest, layout.lora, layout.salt, layout.media)
        self.asked = 0

    def stream(self) -> Iterator[list[Any]]:
        yield ["layout", self._description()]
        sent = 0
        busy = self.rng.random  # how much the load overlaps changes in spells
        overlap = 0.5
        while sent < self.requests or any(engine.busy for engine in self.engines):
            if busy() < 0.02:
                overlap = self.rng.choice((0.0, 0.3, 0.8))
            for rank, engine in enumerate(self.engines):
                if sent < self.requests and (not engine.busy or self.rng.random() < overlap):
                    yield from self._arrivals(rank, self.rng.choice((1, 1, 2, 3)) if overlap else 1)
                    sent += 1
                if self.rng.random() < 0.1:
                    yield self._ask(rank, self.traffic.probe())
                yield from self._step(rank)
                if not engine.busy and self.rng.random() < 0.01 and engine.reset():
                    yield self._ask(rank, self.traffic.probe())

    def _arrivals(self, rank: int, count: int) -> Iterator[list[Any]]:
        for _ in range(count):
            prompt = self.traffic.prompt()
            yield self._ask(rank, prompt)
            outputs = self.rng.choice((1, 1, 3, 20))
            self.engines[rank].submit(prompt, self.traffic.words(outputs))

    def _step(self, rank: int) -> Iterator[list[Any]]:
        events, finished = self.engines[rank].step()
        for job in finished:
            tokens = tuple(job.request.all_token_ids)[: self.traffic.longest]
            self.traffic.remember(Prompt(tokens, job.prompt.lora, job.prompt.salt, job.prompt.media))
        if events:
            yield ["message", self.publishers[rank].source, self.publishers[rank].message(events)]

    def _ask(self, rank: int, prompt: Prompt) -> list[Any]:
        engine, layout = self.engines[rank], self.layout
        self.asked += 1
        bound, why = ("none", UNANNOUNCED) if engine.unannounced else (layout.bound, layout.why)
        question = {
            "id": f"{layout.name}/{self.asked}",
            "model": MODEL,
            "token_ids": prompt.tokens,
            "lora": prompt.lora,
            "cache_salt": prompt.salt,
            "mm": [asdict(item) for item in prompt.media],
            "rank": rank,
            "predictable": bound == "exact",
            "bound": bound,
            "why": why,
        }
        return ["ask", question, engine.ask(prompt)]

    def _description(self) -> dict[str, Any]:
        groups = self.engines[0].manager.kv_cache_event_metadata
        return {
            "name": self.layout.name,
            "groups": [
                {"kind": kind, "block_size": group.block_size, "sliding_window": window}
                for group, (kind, window) in zip(self.layout.groups, groups, strict=True)
            ],
            "hash_block_size": self.engines[0].hash_block_size,
            "block_size": self.engines[0].block_size,
            "retention": self.layout.retention,
            "topic": self.topic,
            "model": MODEL,
            "wire": self.layout.wire,
            "eagle": self.layout.eagle,
            "ranks": self.layout.ranks,
            "predictable_note": self.layout.why,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=300, help="arrivals per layout")
    parser.add_argument("--layouts", default="all", help="comma-separated names, or all")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-o", "--output", type=Path, help="file; standard output by default")
    where.add_argument("--folder", type=Path, help="a file per layout, named after it")
    options = parser.parse_args()
    encoder = msgspec.msgpack.Encoder()
    with contextlib.ExitStack() as files:
        out = files.enter_context(options.output.open("wb")) if options.output else sys.stdout.buffer
        for layout in chosen(options.layouts):
            if options.folder:
                out = files.enter_context((options.folder / layout.name).open("wb"))
            for record in Run(layout, options.seed, options.requests).stream():
                out.write(encoder.encode(record))


if __name__ == "__main__":
    main()
