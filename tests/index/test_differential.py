"""Random streams, hostile ones among them, into both indexes: whatever one answers the other must answer too."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest

from kvindex.events.model import Cleared, Event, EventBatch, Extra, Kind, MultiModal, Removed, Stored
from kvindex.index.native import NativeIndex
from kvindex.index.protocol import Columns, MultiModalItem, Namespace, Publisher
from kvindex.index.reference import ReferenceIndex

TIERS = ["hbm", "hbm", "hbm", "hbm", "dram", "filesystem", "odd"]
LAYOUTS = [
    [(0, None, None, 4)],
    [(0, Kind.FULL, None, 4), (1, Kind.WINDOW, 9, 4)],
    [(0, Kind.FULL, None, 8), (1, Kind.WINDOW, 6, 2)],
    [(0, Kind.FULL, None, 4), (1, Kind.STATE, None, 8)],
    [(0, Kind.FULL, None, 12), (1, Kind.STATE, None, 8), (2, Kind.IGNORED, None, 4)],
    [(0, Kind.WINDOW, 5, 4)],
]
NAMESPACES = [(None, None), (None, None), (None, "salt"), ("lora", None)]


class Traffic:
    """Events as a forgetful engine might send them, and some that none would."""

    def __init__(self, random_: random.Random) -> None:
        self.random = random_
        self.layout = random_.choice(LAYOUTS)
        self.prompts = [[random_.randrange(3) for _ in range(random_.randrange(1, 40))] for _ in range(4)]
        self.key_of: dict[Any, int] = {}

    def prompt(self) -> list[int]:
        tokens = self.random.choice(self.prompts)
        if self.random.random() < 0.3:
            tokens = tokens[: self.random.randrange(len(tokens) + 1)] + [
                self.random.randrange(3) for _ in range(self.random.randrange(12))
            ]
            self.prompts.append(tokens)
        return tokens

    def key(self, domain: int, tokens: list[int], end: int, space: Any) -> int:
        if self.random.random() < 0.02:
            return self.random.randrange(6)  # a key that means something else elsewhere
        return self.key_of.setdefault((domain, tuple(tokens[:end]), space), self.random.getrandbits(64))

    def stored(self, domain: int) -> list[Event]:
        tokens, (lora, salt) = self.prompt(), self.random.choice(NAMESPACES)
        media = self.random.random() < 0.1
        step = max(size for *_, size in self.layout)
        begin = self.random.choice([0, 0, 0, step, 2 * step])
        groups = list(self.layout)
        if self.random.random() < 0.2:
            self.random.shuffle(groups)
        tier = self.random.choice(TIERS)
        return [
            event
            for number, kind, window, size in groups
            if self.random.random() < 0.9
            and (event := self._one(domain, tokens, lora, salt, media, begin, tier, number, kind, window, size))
            is not None
        ]

    def _one(
        self,
        domain: int,
        tokens: list[int],
        lora: str | None,
        salt: str | None,
        media: bool,
        begin: int,
        tier: str,
        number: int,
        kind: Kind | None,
        window: int | None,
        size: int,
    ) -> Stored | None:
        random_ = self.random
        if random_.random() < 0.1:
            size = random_.choice([1, 2, 4, 8])
        if tier != "hbm" and random_.random() < 0.3:
            size *= 2
        space = (lora, salt, media)
        ends = list(range(begin + size, len(tokens) + 1, size))
        if not ends:
            return None
        kept = ends
        if kind not in (None, Kind.FULL) and random_.random() < 0.7:
            kept = [end for end in ends if random_.random() < 0.4]
        keys = tuple(self.key(domain, tokens, end, space) for end in kept)
        if tier != "hbm" and random_.random() < 0.3:
            return Stored(keys, None, np.empty(0, np.uint32), 0, tier=tier, group=number)
        extras: tuple[Extra, ...] = ()
        if tier == "hbm" and (salt or media):
            extras = tuple(
                Extra(salt if end == size else None, (MultiModal("image", None),) if media and end <= 8 else ())
                for end in kept
            )
        parent = None if begin == 0 else self.key(domain, tokens, begin, space)
        told = np.array(tokens[begin : ends[-1]], np.uint32)
        gone = frozenset(key for key in keys if random_.random() < 0.5) if random_.random() < 0.03 else frozenset()
        return Stored(keys, parent, told, size, tier, number, kind, window, lora, extras, gone=gone)

    def removed(self, domain: int) -> Event:
        known = [key for (d, *_), key in self.key_of.items() if d == domain] or [1]
        keys = tuple(self.random.choice(known) for _ in range(self.random.randrange(1, 6)))
        return Removed(keys, self.random.choice(TIERS), self.random.choice(self.layout)[0])

    def batch(self, domain: int) -> EventBatch:
        events: list[Event] = []
        for _ in range(self.random.randrange(1, 4)):
            roll = self.random.random()
            if roll < 0.7:
                events += self.stored(domain)
            elif roll < 0.97:
                events.append(self.removed(domain))
            elif roll < 0.985:
                events.append(Cleared())
            else:
                events.append(Stored((1, 2), None, np.arange(3, dtype=np.uint32), 2))
        return EventBatch(0.0, tuple(events))


def same_columns(a: Columns, b: Columns) -> None:
    assert a.endpoints == b.endpoints
    for name in ("blocks", "tokens", "hbm_tokens"):
        assert getattr(a, name).tolist() == getattr(b, name).tolist(), name
    assert a.score.tolist() == pytest.approx(b.score.tolist())
    for name in ("tiers", "load_tokens"):
        assert {t: c.tolist() for t, c in getattr(a, name).items()} == {
            t: c.tolist() for t, c in getattr(b, name).items()
        }, name


def run(seed: int, steps: int) -> None:
    random_ = random.Random(seed)
    traffic = Traffic(random_)
    bound = random_.choice([0, 3, 20, 1000])
    both = [ReferenceIndex(None, bound), NativeIndex(None, bound)]
    open_: dict[int, int] = {}
    domains = random_.choice([1, 2])

    def add() -> None:
        domain = random_.randrange(domains)
        publisher = Publisher(
            endpoint=random_.choice("abc"),
            model=random_.choice([None, "m", "n"]),
            key_domain=f"domain{domain}" if random_.random() < 0.4 else None,
            eagle=random_.random() < 0.1,
            persistent_tiers=frozenset(["dram"]) if random_.random() < 0.5 else frozenset(),
            offload_chunk_tokens=random_.choice([None, None, 8, 16]),
        )
        numbers = [index.open(publisher) for index in both]
        assert numbers[0] == numbers[1]
        open_[numbers[0]] = domain

    add()
    add()
    for step in range(steps):
        number = random_.choice(list(open_))
        roll = random_.random()
        if roll < 0.9:
            batch = traffic.batch(open_[number])
            applied = [index.apply(number, batch, step) for index in both]
            assert applied[0] == applied[1]
        elif roll < 0.93:
            restart = random_.random() < 0.5
            for index in both:
                index.drop(number, restart=restart)
        elif roll < 0.96:
            hidden = random_.random() < 0.3
            for index in both:
                index.hide(number, hidden)
        elif roll < 0.97 and len(open_) > 1:
            for index in both:
                index.close(number)
            del open_[number]
        elif len(open_) < 5:
            add()
        for index in both:
            index.check()
        stats = [index.stats() for index in both]
        assert {**stats[0], "bytes": 0} == {**stats[1], "bytes": 0}
        assert [both[0].groups(n) for n in open_] == [both[1].groups(n) for n in open_]
        tokens = np.array(traffic.prompt(), np.uint32)
        lora, salt = random_.choice(NAMESPACES)
        media = (MultiModalItem("image", 0, 8),) if random_.random() < 0.1 else ()
        model = random_.choice([None, "m", "n", "x"])
        wanted = random_.choice([None, None, frozenset("ab"), frozenset("z")])
        keys = [index.keys(tokens, Namespace(lora, salt, media)) for index in both]
        assert {s: k.tolist() for s, k in keys[0].chains.items()} == {s: k.tolist() for s, k in keys[1].chains.items()}
        same_columns(*(index.score(k, model, wanted) for index, k in zip(both, keys, strict=True)))
        if step % 4 == 0:
            views = [index.explain(k, model, wanted) for index, k in zip(both, keys, strict=True)]
            assert views[0] == views[1]


@pytest.mark.parametrize("block", range(10))
def test_both_answer_alike(block: int) -> None:
    runs = int(os.environ.get("KVINDEX_DIFFERENTIAL_RUNS", "6"))
    for seed in range(block * runs, (block + 1) * runs):
        try:
            run(seed, 60)
        except BaseException as error:
            error.args = (
                (f"seed {seed}: {error}",) if not error.args else (f"seed {seed}: {error.args[0]}", *error.args[1:])
            )
            print(f"seed {seed}")
            raise
