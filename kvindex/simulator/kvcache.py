"""The prefix cache of one engine: finds what a request's prompt has cached, gives it blocks, and says what changed."""

from __future__ import annotations

from kvindex.simulator.blocks import BlockPool
from kvindex.simulator.config import EngineConfig
from kvindex.simulator.request import Request, root_key
from kvindex.simulator.wire import MEDIUM_HBM, AllBlocksCleared, BlockRemoved, BlockStored, Event

_GROUP = 0
_KIND = "full_attention"


class PrefixCache:
    def __init__(self, config: EngineConfig) -> None:
        self.block_size = config.block_size
        self.pool = BlockPool(config.num_blocks)
        self._root = root_key(config.hash_seed)
        self._report = config.report_events
        self._events: list[Event] = []

    def find(self, request: Request) -> list[int]:
        """Blocks that hold the request's leading tokens. At most all but its last token: the model needs one token to
        compute, so a fully cached prompt recomputes its last block into a block of its own."""
        request.extend_keys(self.block_size, self._root)
        return self.pool.lookup(request.keys[: (len(request.tokens) - 1) // self.block_size])

    def admit(self, request: Request, hit: list[int], new_tokens: int) -> bool:
        """Adopt `hit` and give blocks for `new_tokens` more; False, and nothing is done, unless all tokens known so far
        would fit."""
        missing = self._blocks_for(len(request.tokens)) - len(hit)
        if missing + self.pool.idle(hit) > self.pool.free_blocks:
            return False
        self.pool.hold(hit)
        request.blocks = list(hit)
        request.announced = len(hit)
        request.computed = len(hit) * self.block_size
        return self.grow(request, new_tokens)

    def grow(self, request: Request, new_tokens: int) -> bool:
        """Give a request blocks for `new_tokens` more computed tokens and announce those that this fills; False, and
        nothing is done, when there are not enough. Blocks count as cached from here on, as in vLLM: a request scheduled
        in the same step may share them."""
        end = request.computed + new_tokens
        count = self._blocks_for(end) - len(request.blocks)
        if count > self.pool.free_blocks:
            return False
        if count > 0:
            blocks, evicted = self.pool.allocate(count)
            request.blocks += blocks
            if self._report:
                self._events += [BlockRemoved([key], MEDIUM_HBM, _GROUP) for key in evicted]
        full = min(end, len(request.tokens)) // self.block_size
        if full > request.announced:
            self._store(request, full)
        return True

    def _store(self, request: Request, full: int) -> None:
        request.extend_keys(self.block_size, self._root)
        first, keys = request.announced, request.keys
        for index in range(first, full):
            self.pool.store(request.blocks[index], keys[index])
        request.announced = full
        if not self._report:
            return
        self._events.append(
            BlockStored(
                block_hashes=keys[first:full],
                parent_block_hash=keys[first - 1] if first else None,
                token_ids=request.tokens[first * self.block_size : full * self.block_size].tolist(),
                block_size=self.block_size,
                lora_id=request.lora_id,
                medium=MEDIUM_HBM,
                lora_name=request.lora,
                extra_keys=[request.extra_keys(index) for index in range(first, full)],
                group_idx=_GROUP,
                kv_cache_spec_kind=_KIND,
                session_id=request.session_id,
            )
        )

    def free(self, request: Request) -> None:
        """Let go of a request's blocks, its last one first, so that the tail of a chain is evicted before its head."""
        self.pool.release(reversed(request.blocks))
        request.blocks = []
        request.announced = 0
        request.computed = 0

    def reset(self) -> bool:
        """Forget everything cached; False while a request holds blocks."""
        if not self.pool.clear():
            return False
        if self._report:
            self._events.append(AllBlocksCleared())
        return True

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
