"""Seeded prompts that make a prefix cache work: shared system prompts, growing chats, repeats, cuts at and beside block
boundaries, the same tokens under another adapter, salt or image. Pure Python, the same for every engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

IMAGE_TOKEN = 7
VOCABULARY = range(100, 30_000)


@dataclass(frozen=True)
class Media:
    """One media item: `hash` names its content, the placeholder tokens are [offset, offset + length)."""

    hash: str
    offset: int
    length: int


@dataclass(frozen=True)
class Prompt:
    tokens: tuple[int, ...]
    lora: str | None = None
    salt: str | None = None
    media: tuple[Media, ...] = ()

    def cut(self, length: int) -> Prompt:
        """The first `length` tokens; fewer where that would split a media item."""
        for item in self.media:
            if item.offset < length < item.offset + item.length:
                length = item.offset
        kept = tuple(item for item in self.media if item.offset + item.length <= length)
        return replace(self, tokens=self.tokens[:length], media=kept)


@dataclass
class Traffic:
    """Hands out prompts of at most `longest` tokens. `step` is the alignment around which lengths are chosen."""

    rng: random.Random
    step: int
    longest: int
    lora: bool = False
    salt: bool = False
    media: bool = False
    memory: int = 40
    vocabulary: Sequence[int] = VOCABULARY
    _system: list[tuple[int, ...]] = field(default_factory=list)
    _seen: list[Prompt] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._system = [self._words(self._length(self.longest // 3)) for _ in range(4)]

    def prompt(self) -> Prompt:
        made = self._made()
        if len(made.tokens) > self.longest:
            made = made.cut(self.longest)
        if not made.tokens:
            made = replace(made, tokens=self._words(3), media=())
        self.remember(made)
        return made

    def remember(self, prompt: Prompt) -> None:
        """Later prompts may repeat, grow, cut or fork this one: an engine calls it with what a request ended as."""
        if len(self._seen) >= self.memory:
            self._seen[self.rng.randrange(self.memory)] = prompt
        else:
            self._seen.append(prompt)

    def probe(self) -> Prompt:
        """A prompt to ask about without sending it."""
        made = self._fork(self._near(self.rng.choice(self._seen))) if self._seen else self._fresh()
        return made if made.tokens and len(made.tokens) <= self.longest else self._fresh()

    def words(self, count: int) -> list[int]:
        return list(self._words(count))

    def _made(self) -> Prompt:
        way = self.rng.random()
        if not self._seen or way < 0.2:
            return self._fresh()
        old = self.rng.choice(self._seen[-10:] if self.rng.random() < 0.7 else self._seen)
        if way < 0.35:
            return old
        if way < 0.65:
            return self._grown(old)
        if way < 0.8:
            return self._near(old)
        if way < 0.92:
            return self._grown(self._near(old))
        return self._fork(old)

    def _fresh(self) -> Prompt:
        start = self.rng.choice(self._system) if self.rng.random() < 0.6 else ()
        return self._grown(self._fork(Prompt(start)))

    def _grown(self, old: Prompt) -> Prompt:
        tokens, media = old.tokens, old.media
        if self.media and self.rng.random() < 0.5:
            tokens += self._words(self.rng.randrange(self.step))
            item = Media(f"image-{self.rng.randrange(6)}", len(tokens), self.rng.randrange(1, 3 * self.step))
            tokens += (IMAGE_TOKEN,) * item.length
            media += (item,)
        room = max(self.longest - len(tokens), 1)
        return replace(old, tokens=tokens + self._words(min(self._length(self.longest // 2), room)), media=media)

    def _near(self, old: Prompt) -> Prompt:
        """Cut at a block boundary, or one token beside it, or anywhere."""
        anywhere = self.rng.randrange(len(old.tokens)) + 1
        boundary = anywhere // self.step * self.step + self.rng.choice((-1, 0, 0, 1))
        return old.cut(max(1, min(boundary if self.rng.random() < 0.7 else anywhere, len(old.tokens))))

    def _fork(self, old: Prompt) -> Prompt:
        """The same tokens in another namespace, where this traffic has any."""
        made = old
        if self.lora and self.rng.random() < 0.7:
            made = replace(made, lora=self.rng.choice((None, "adapter-a", "adapter-b", "image-1")))
        if self.salt and self.rng.random() < 0.7:
            made = replace(made, salt=self.rng.choice((None, "tenant-1", "tenant-2", "adapter-a")))
        if made.media and self.rng.random() < 0.5:
            at = self.rng.randrange(len(made.media))
            other = replace(made.media[at], hash=f"image-{self.rng.randrange(6)}")
            made = replace(made, media=(*made.media[:at], other, *made.media[at + 1 :]))
        return made

    def _length(self, most: int) -> int:
        length = self.rng.randrange(1, max(most, 2))
        if self.rng.random() < 0.4:
            length = max(1, length // self.step * self.step + self.rng.choice((-1, 0, 0, 1)))
        return length

    def _words(self, count: int) -> tuple[int, ...]:
        return tuple(self.rng.choice(self.vocabulary) for _ in range(count))
