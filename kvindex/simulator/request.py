"""One generation as the engine sees it, and the chain of engine keys over its tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import xxhash

from kvindex.simulator.wire import ExtraKeys

# array's typecode for exactly four bytes; 'I' is that on every platform we run on.
TOKEN = "I"
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def root_key(hash_seed: str) -> int:
    return int(xxhash.xxh3_64_intdigest(hash_seed.encode()))


def weyl(seed: int, first: int, count: int) -> list[int]:
    """`count` numbers below 2**31 from position `first` of a sequence that `seed` names."""
    start = seed + first * _GOLDEN
    return [((start + index * _GOLDEN) & _MASK) >> 33 for index in range(count)]


def mix(value: int) -> int:
    """splitmix64's finaliser: a well-spread 64-bit number out of any integer."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Request:
    """A prompt and how much is wanted of it; the engine writes the rest.

    `tokens` is the prompt followed by the output so far. `computed` tokens have their KV in `blocks`; the keys of their
    full blocks are announced up to `announced`.
    """

    __slots__ = (
        "announced",
        "arrival",
        "blocks",
        "cache_salt",
        "cached_tokens",
        "computed",
        "finished_at",
        "first_token_at",
        "id",
        "keys",
        "lora",
        "lora_id",
        "max_tokens",
        "preemptions",
        "prompt_tokens",
        "sample_seed",
        "scheduled_at",
        "session_id",
        "tokens",
    )

    def __init__(
        self,
        id: str,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        lora: str | None = None,
        cache_salt: str | None = None,
        session_id: str | None = None,
        sample_seed: int = 0,
        arrival: float = 0.0,
    ) -> None:
        self.id = id
        self.tokens = array(TOKEN, prompt)
        self.prompt_tokens = len(self.tokens)
        self.max_tokens = max_tokens
        self.lora = lora
        self.lora_id: int | None = None
        self.cache_salt = cache_salt or None
        self.session_id = session_id
        self.sample_seed = sample_seed
        self.arrival = arrival

        self.keys: list[int] = []
        self.blocks: list[int] = []
        self.computed = 0
        self.announced = 0
        self.preemptions = 0
        self.cached_tokens: int | None = None  # found cached when first scheduled: what `usage` reports
        self.scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.finished_at: float | None = None

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def is_complete(self) -> bool:
        return self.output_tokens >= self.max_tokens

    def extend_keys(self, block_size: int, root: int) -> None:
        """Chain engine keys over every full block of `tokens` that has none yet."""
        first = len(self.keys)
        last = len(self.tokens) // block_size
        if first == last:
            return
        data = self.tokens[first * block_size : last * block_size].tobytes()
        stride = block_size * self.tokens.itemsize
        adapter = f"\x00lora={self.lora}".encode() if self.lora else b""
        key = self.keys[-1] if self.keys else root
        for index in range(last - first):
            content = data[index * stride : (index + 1) * stride]
            if adapter:
                content += adapter
            if first + index == 0 and self.cache_salt:
                content += f"\x00salt={self.cache_salt}".encode()
            key = xxhash.xxh3_64_intdigest(content, key)
            self.keys.append(key)

    def extra_keys(self, block: int) -> ExtraKeys:
        """What besides its tokens is in the key of `block`, in the untagged form of vLLM's events."""
        keys: tuple[str, ...] = (self.lora,) if self.lora else ()
        if block == 0 and self.cache_salt:
            keys += (self.cache_salt,)
        return keys or None
