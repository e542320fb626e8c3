"""Builders of wire payloads, so that a test states only the field it is about."""

from __future__ import annotations

from typing import Any

import msgspec

encode = msgspec.msgpack.encode


def stored(hashes: list[Any], tokens: list[Any], size: int = 4, **fields: Any) -> dict[str, Any]:
    """vLLM's map form as 0.24 and later send it: what is required is always there, the rest by name."""
    event = {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": None,
        "token_ids": tokens,
        "block_size": size,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }
    return event | fields


def removed(hashes: list[Any], medium: str | None = "GPU", **fields: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": medium} | fields


CLEARED = {"type": "AllBlocksCleared"}


def batch(*events: Any, ts: Any = 1.5, rank: Any = 0) -> bytes:
    return encode([ts, list(events), rank])
