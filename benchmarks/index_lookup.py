"""Look-up and ingest: the native index beside the reference and a plain dictionary, in one run. JSON lines.

    .venv/bin/python benchmarks/index_lookup.py --endpoints 32 --prompts 200 --tokens 8192

`dict` is the least a look-up could be: block key -> set of endpoints, walked in Python until nobody is left. It knows
neither tiers nor groups nor removals by engine key.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kvindex.events.model import EventBatch, Stored
from kvindex.index.native import NativeIndex, chain_keys
from kvindex.index.protocol import BlockIndex, Namespace, Publisher
from kvindex.index.reference import ReferenceIndex


class DictIndex:
    """Only what a look-up cannot do without."""

    def __init__(self) -> None:
        self.held: dict[int, set[int]] = {}

    def store(self, endpoint: int, keys: list[int]) -> None:
        for key in keys:
            self.held.setdefault(key, set()).add(endpoint)

    def score(self, keys: list[int]) -> dict[int, int]:
        found: dict[int, int] = {}
        alive: set[int] | None = None
        for depth, key in enumerate(keys):
            here = self.held.get(key)
            alive = (set(here) if alive is None else alive & here) if here else set()
            if not alive:
                break
            for endpoint in alive:
                found[endpoint] = depth + 1
        return found


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoints", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shared", type=float, default=0.5, help="the part of a prompt that all begin with")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--holders", type=int, default=4, help="endpoints that hold a prompt")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    random_ = random.Random(args.seed)
    size, prefix = args.block_size, int(args.tokens * args.shared) // args.block_size * args.block_size
    numpy_ = np.random.default_rng(args.seed)
    shared = numpy_.integers(0, 128_000, prefix, np.uint32)
    prompts = [
        np.concatenate([shared, numpy_.integers(0, 128_000, args.tokens - prefix, np.uint32)])
        for _ in range(args.prompts)
    ]
    told: list[tuple[int, Stored]] = []
    for prompt in prompts:
        keys = tuple(chain_keys(prompt, size, Namespace()).tolist())  # as good as an engine's own
        event = Stored(keys, None, prompt[: len(keys) * size], size)
        told += [
            (endpoint, event) for endpoint in random_.sample(range(args.endpoints), min(args.holders, args.endpoints))
        ]
    blocks = sum(len(event.engine_keys) for _, event in told)

    def ingest(index: BlockIndex) -> None:
        for endpoint in range(args.endpoints):
            index.open(Publisher(endpoint=f"pod-{endpoint:04}", key_domain="one"))
        for at, (endpoint, event) in enumerate(told):
            index.apply(endpoint, EventBatch(0.0, (event,)), at)

    def look_up(index: BlockIndex) -> None:
        for prompt in prompts:
            index.score(index.keys(prompt, Namespace()), None, None)

    def ingest_dict() -> None:
        for endpoint, event in told:
            plain.store(endpoint, chain_keys(event.token_ids, size, Namespace()).tolist())

    def look_up_dict() -> None:
        for prompt in prompts:
            plain.score(chain_keys(prompt, size, Namespace()).tolist())

    plain, native, reference = DictIndex(), NativeIndex(), ReferenceIndex()
    took: dict[str, dict[str, float]] = {
        "dict": {"ingest": seconds(ingest_dict), "look_up": seconds(look_up_dict)},
        "native": {"ingest": seconds(lambda: ingest(native)), "look_up": seconds(lambda: look_up(native))},
        "reference": {"ingest": seconds(lambda: ingest(reference)), "look_up": seconds(lambda: look_up(reference))},
    }
    print(json.dumps({"machine": platform.processor() or platform.machine(), **vars(args), "stored_blocks": blocks}))
    for name, times in took.items():
        for what, spent in times.items():
            units = blocks if what == "ingest" else len(prompts)
            line = {
                "index": name,
                "what": what,
                "seconds": round(spent, 4),
                "microseconds_each": round(spent / units * 1e6, 3),
                "each": "block" if what == "ingest" else "prompt",
                "native_is_faster_by": round(spent / took["native"][what], 2),
            }
            print(json.dumps(line))


if __name__ == "__main__":
    main()
