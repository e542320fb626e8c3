"""`kvindex explain`: block by block, who has a prompt and in which tier, or since when and why not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from kvindex.index.protocol import BlockView, HolderView
from kvindex.service import asking

EXAMPLES = """\
examples:
  kvindex explain --model m --prompt "You are a helpful assistant."
  kvindex explain --token-ids @ids.json --endpoint pod-7
  kvindex explain --token-ids 1,2,3 --every         one line a block, also where neighbours are alike

what the words mean:
  hbm, dram, filesystem, object   held, in this tier (the best, if in several)
  removed at n     the engine said so in message n of its stream
  cleared at n     the engine emptied its cache
  fenced           known once, not believed any more: messages were lost, or predictions were wrong
  never stored     no publisher of this endpoint ever said so
  known in ...     the same tokens are known under another adapter or cache salt, which is another cache
"""


class Cell(NamedTuple):
    """What a table shows of one endpoint's word. Equal for neighbours that can share a line."""

    endpoint: str
    said: str


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "explain",
        help="ask a daemon, block by block, who has it and if not, why not",
        description="Ask a daemon, block by block, who has a prompt and in which tier, or since when and why not.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    asking.add_arguments(parser, many=False)
    parser.add_argument("--every", action="store_true", help="one line a block; otherwise equal neighbours share one")


def run(args: argparse.Namespace) -> int:
    (question,) = asking.questions(args)
    with asking.client(args) as client:
        views = client.explain(question.token_ids, question.model, **question.about(args.endpoint))
    print(json.dumps({"blocks": [_plain(view) for view in views]}) if args.json else table(views, every=args.every))
    return 0


def _plain(view: BlockView) -> dict[str, Any]:
    return {
        **view._asdict(),
        "key": f"{view.key:016x}",
        "holders": [holder._asdict() for holder in view.holders],
        "known_in": list(view.known_in),
    }


def table(views: Sequence[BlockView], *, every: bool) -> str:
    if not views:
        return "no full block: the prompt is shorter than one block of every endpoint, or no endpoint is known"
    parts = []
    for size in sorted({view.block_size for view in views}):
        of_size = [view for view in views if view.block_size == size]
        endpoints = sorted({h.endpoint for view in of_size for h in view.holders})
        rows = [["BLOCKS", "TOKENS", *endpoints, ""]]
        for first, last in _runs(of_size, every):
            said = {cell.endpoint: cell.said for cell in _cells(first)}
            blocks = str(first.position) if first is last else f"{first.position}-{last.position}"
            tokens = f"{first.first_token}-{last.first_token + size - 1}"
            known = "known in " + "; ".join(first.known_in) if first.known_in else ""
            rows.append([blocks, tokens, *(said.get(e, "-") for e in endpoints), known])
        parts.append(f"block size {size}\n{asking.aligned(rows)}")
    return "\n\n".join(parts)


def _runs(views: Sequence[BlockView], every: bool) -> Iterable[tuple[BlockView, BlockView]]:
    """(first, last) of neighbours about which the same is said."""
    first = last = views[0]
    for view in views[1:]:
        if every or _cells(view) != _cells(first) or view.known_in != first.known_in:
            yield first, last
            first = view
        last = view
    yield first, last


def _cells(view: BlockView) -> list[Cell]:
    """One endpoint's word on a block; groups that say the same are not told apart."""
    by_endpoint: dict[str, dict[str, list[int]]] = {}
    for holder in view.holders:
        by_endpoint.setdefault(holder.endpoint, {}).setdefault(_word(holder), []).append(holder.group)
    cells = []
    for endpoint, said in sorted(by_endpoint.items()):
        if len(said) == 1:
            cells.append(Cell(endpoint, next(iter(said))))
        else:
            parts = (f"{word} (group {', '.join(map(str, groups))})" for word, groups in said.items())
            cells.append(Cell(endpoint, ", ".join(parts)))
    return cells


def _word(holder: HolderView) -> str:
    at = "" if holder.sequence is None else f" at {holder.sequence}"
    if holder.status == "held":
        return str(holder.tier)
    if holder.status == "fenced":
        return "fenced"
    return holder.status.replace("_", " ") + at
