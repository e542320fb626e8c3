"""vLLM's own KVCacheManager, told to do what a simulated engine's cache did. Runs in vLLM's environment.

    VLLM_PYTHON tests/simulator/vllm_peer.py < actions.json > answers.json

Reads a list of {"block_size", "num_blocks", "actions": [...]} and answers each action with [result, events]:

    ["admit", id, tokens, lora, salt, count]      -> [cached tokens, admitted]
    ["grow", id, appended tokens, computed, count] -> whether there was room
    ["free", id]   ["reset"]                       -> null, whether it was reset
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import msgspec
import torch
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1 import kv_cache_interface as specs
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request, RequestStatus


class Peer:
    def __init__(self, block_size: int, num_blocks: int) -> None:
        kv_cache_utils.init_none_hash(sha256_cbor)
        self._hasher = kv_cache_utils.get_request_block_hasher(block_size, sha256_cbor)
        spec = specs.FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=16, dtype=torch.float32)
        group = specs.KVCacheGroupSpec(["layer"], spec)
        self._manager = KVCacheManager(
            kv_cache_config=specs.KVCacheConfig(
                num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[group], hash_block_size=block_size
            ),
            max_model_len=block_size * num_blocks,
            scheduler_block_size=block_size,
            hash_block_size=block_size,
            enable_caching=True,
            enable_kv_cache_events=True,
        )
        self._requests: dict[str, Request] = {}

    def act(self, action: list[Any]) -> list[Any]:
        name, *arguments = action
        result = getattr(self, name)(*arguments)
        return [result, msgspec.to_builtins(self._manager.take_events())]

    def admit(self, id: str, tokens: list[int], lora: str | None, salt: str | None, count: int) -> list[Any]:
        request = self._requests.get(id)
        if request is None:
            request = self._requests[id] = Request(
                request_id=id,
                prompt_token_ids=tokens,
                sampling_params=SamplingParams(max_tokens=10_000),
                pooling_params=None,
                lora_request=LoRARequest(lora, 1 if lora == "a" else 2, f"/{lora}") if lora else None,
                cache_salt=salt,
                block_hasher=self._hasher,
            )
        request.append_output_token_ids(tokens[request.num_tokens :])
        blocks, cached, _ = self._manager.get_computed_blocks(request)
        new = self._manager.allocate_slots(
            request,
            count,
            num_new_computed_tokens=cached,
            new_computed_blocks=blocks,
            full_sequence_must_fit=True,
        )
        if new is not None:
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = cached
        return [cached, new is not None]

    def grow(self, id: str, appended: list[int], computed: int, count: int) -> bool:
        request = self._requests[id]
        request.append_output_token_ids(appended)
        request.num_computed_tokens = computed
        return self._manager.allocate_slots(request, count) is not None

    def free(self, id: str) -> None:
        request = self._requests[id]
        self._manager.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0

    def reset(self) -> bool:
        return bool(self._manager.reset_prefix_cache())


def main() -> None:
    answers = []
    for plan in json.load(sys.stdin):
        peer = Peer(plan["block_size"], plan["num_blocks"])
        answers.append([peer.act(action) for action in plan["actions"]])
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
