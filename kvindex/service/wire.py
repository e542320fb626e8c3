"""Between protobuf messages and the index's own values. Shared by server and client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from kvindex.errors import UsageError
from kvindex.events.model import Tokens
from kvindex.index.protocol import BlockView, HolderView, MultiModalItem
from kvindex.service.pb import index_pb2 as pb

PROTOCOL = 1  # what this release speaks; see proto/kvindex/v1/index.proto

SERVICE = "kvindex.v1.IndexService"
M = TypeVar("M", pb.ScoreRequest, pb.ExplainRequest)


class Question(NamedTuple):
    """The part that Score and Explain have in common, checked."""

    token_ids: Tokens | None
    prompt: str
    model: str | None
    lora: str | None
    cache_salt: str | None
    mm: tuple[MultiModalItem, ...]
    endpoints: frozenset[str] | None


def pack_tokens(token_ids: Tokens | Sequence[int]) -> bytes:
    """Raises UsageError for what is not a list of token ids."""
    if isinstance(token_ids, np.ndarray) and token_ids.dtype == np.uint32 and token_ids.ndim == 1:
        return token_ids.astype("<u4", copy=False).tobytes()
    try:
        wide = np.asarray(token_ids)
        if wide.ndim != 1 or (len(wide) and (wide.dtype.kind not in "iu" or wide.min() < 0 or wide.max() > 0xFFFFFFFF)):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise UsageError("token_ids: must be a flat list of integers from 0 to 4294967295") from None
    return wide.astype("<u4").tobytes()


def unpack_tokens(data: bytes, max_tokens: int) -> Tokens:
    """Raises UsageError."""
    if len(data) % 4:
        raise UsageError(f"token_ids: {len(data)} bytes is no multiple of 4; send packed little-endian uint32")
    if len(data) > 4 * max_tokens:
        raise UsageError(f"token_ids: {len(data) // 4} tokens is more than limits.max_prompt_tokens, {max_tokens}")
    return np.frombuffer(data, dtype="<u4").astype(np.uint32, copy=False)


def question(request: pb.ScoreRequest | pb.ExplainRequest, max_tokens: int) -> Question:
    """Raises UsageError with the field's name."""
    packed = request.token_ids  # every access copies
    tokens = unpack_tokens(packed, max_tokens) if packed else None
    if tokens is None and not request.prompt:
        raise UsageError("token_ids: is empty, and so is prompt; send one of them")
    if tokens is not None and request.prompt:
        raise UsageError("prompt: is set, and so is token_ids; send one of them")
    items = []
    for i, item in enumerate(request.mm):
        if not item.hash or not item.length:
            raise UsageError(f"mm[{i}]: needs a hash and a length of at least 1")
        if tokens is not None and item.offset + item.length > len(tokens):
            raise UsageError(f"mm[{i}]: tokens {item.offset} to {item.offset + item.length} are not in {len(tokens)}")
        items.append(MultiModalItem(item.hash, item.offset, item.length))
    return Question(
        tokens,
        request.prompt,
        request.model if request.HasField("model") else None,
        request.lora if request.HasField("lora") else None,
        request.cache_salt if request.HasField("cache_salt") else None,
        tuple(items),
        frozenset(request.endpoints) if request.endpoints else None,
    )


def fill(
    request: M,
    token_ids: Tokens | Sequence[int] | None,
    model: str | None,
    *,
    prompt: str | None = None,
    lora: str | None = None,
    cache_salt: str | None = None,
    mm: Iterable[Mapping[str, Any] | MultiModalItem] = (),
    endpoints: Iterable[str] | None = None,
) -> M:
    """The client's side of `question`. Optional fields stay unset when None, which is not the same as empty."""
    request.protocol = PROTOCOL
    if (token_ids is None) == (prompt is None):
        raise UsageError("give token_ids or prompt, one of them")
    if token_ids is not None:
        request.token_ids = pack_tokens(token_ids)
    if prompt is not None:
        request.prompt = prompt
    if model is not None:
        request.model = model
    if lora is not None:
        request.lora = lora
    if cache_salt is not None:
        request.cache_salt = cache_salt
    for item in mm:
        plain = item._asdict() if isinstance(item, MultiModalItem) else item
        try:
            request.mm.add(hash=plain["hash"], offset=plain["offset"], length=plain["length"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f'mm: every item needs "hash", "offset" and "length": {error}') from None
    if endpoints is not None:
        request.endpoints.extend(endpoints)
    return request


def score_response(scores: Any, request_id: int, prompt_tokens: int) -> pb.ScoreResponse:
    response = pb.ScoreResponse(
        protocol=PROTOCOL,
        id=request_id,
        endpoints=scores.endpoints,
        blocks=_plain(scores.blocks),
        tokens=_plain(scores.tokens),
        score=_plain(scores.score),
        seconds_saved=_plain(scores.seconds_saved),
        state=scores.state,
        lag_seconds=_plain(scores.lag_seconds),
        prompt_tokens=prompt_tokens,
    )
    for name, blocks in scores.tiers.items():
        response.tiers.add(name=name, blocks=_plain(blocks))
    return response


def _plain(column: npt.NDArray[Any]) -> list[Any]:
    plain: list[Any] = column.tolist()
    return plain


def explain_response(views: Iterable[BlockView], prompt_tokens: int) -> pb.ExplainResponse:
    response = pb.ExplainResponse(protocol=PROTOCOL, prompt_tokens=prompt_tokens)
    for view in views:
        block = response.blocks.add(
            index=view.position,
            first_token=view.first_token,
            block_size=view.block_size,
            key=view.key,
            known_in=view.known_in,
        )
        for holder in view.holders:
            added = block.holders.add(endpoint=holder.endpoint, group=holder.group, status=holder.status)
            if holder.tier is not None:
                added.tier = holder.tier
            if holder.sequence is not None:
                added.sequence = holder.sequence
    return response


def block_views(response: pb.ExplainResponse) -> list[BlockView]:
    return [
        BlockView(
            b.index,
            b.first_token,
            b.block_size,
            b.key,
            tuple(
                HolderView(
                    h.endpoint,
                    h.group,
                    h.status,
                    h.tier if h.HasField("tier") else None,
                    h.sequence if h.HasField("sequence") else None,
                )
                for h in b.holders
            ),
            tuple(b.known_in),
        )
        for b in response.blocks
    ]
