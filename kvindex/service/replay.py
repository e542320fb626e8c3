"""`kvindex replay`: feed captures to a fresh index, print what became of the publishers and how prompts score."""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from kvindex.errors import UsageError
from kvindex.events.recording import CaptureReader, Record
from kvindex.index.config import IndexConfig, PublisherOverride
from kvindex.index.facade import Index
from kvindex.index.streams import PublisherStatus


class Prompt(msgspec.Struct, frozen=True):
    """One line of a prompts file. `after`: score it when that many messages have been taken; None: after all."""

    id: str | int
    token_ids: list[int]
    model: str | None = None
    lora: str | None = None
    cache_salt: str | None = None
    mm: list[dict[str, Any]] = []
    after: int | None = None


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "replay",
        help="feed captures to a fresh index, print publishers and scores",
        description="Feeds captures of KV events (see `kvindex record`) to a fresh index, in the order in which they were "
        "received, and prints each publisher's state and, with --prompts, which endpoint holds how much of each prompt.",
        epilog='A prompts file has one JSON object a line: {"id": "a", "model": "m", "token_ids": [1, 2, 3]}, optionally '
        'with "lora", "cache_salt", "mm": [{"hash", "offset", "length"}], and "after": n to be scored when n messages '
        "have been taken.",
    )
    parser.add_argument("captures", nargs="+", metavar="F", help="capture file; several are merged by time received")
    parser.add_argument("--prompts", metavar="P", help="JSON lines of prompts to score; - for standard input")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--reference", action="store_true", help="use the plain Python index, the oracle")
    parser.add_argument("--eagle", action="append", default=[], metavar="SOURCE", help="this source's engine drafts")
    parser.add_argument(
        "--persistent", action="append", default=[], metavar="SOURCE=TIER", help="a tier that survives engine restarts"
    )


def run(args: argparse.Namespace) -> int:
    index = Index(reference=args.reference, config=_config(args.eagle, args.persistent))
    prompts = _prompts(args.prompts) if args.prompts else []
    readers = [CaptureReader(path) for path in args.captures]
    scores: dict[int, dict[str, Any]] = {}
    waiting = sorted(((p.after, i) for i, p in enumerate(prompts) if p.after is not None), reverse=True)
    taken = 0
    for record in _merged(readers):
        while waiting and waiting[-1][0] <= taken:
            i = waiting.pop()[1]
            scores[i] = _score(index, prompts[i])
        index.ingest(record.source, record.frames, record.replay)
        taken += 1
    for i, prompt in enumerate(prompts):
        if i not in scores:
            scores[i] = _score(index, prompt)
    for reader in readers:
        if reader.cut:
            print(f"kvindex: warning: {reader.cut}", file=sys.stderr)
    late = [p.id for p in prompts if p.after is not None and p.after > taken]
    if late:
        print(
            f"kvindex: warning: {len(late)} prompts ask for more than the {taken} messages there are", file=sys.stderr
        )
    answer = {"publishers": _publishers(index.publishers()), "scores": [scores[i] for i in range(len(prompts))]}
    if args.json:
        print(json.dumps(answer, indent=2))
    else:
        _tables(answer, taken)
    return 0


def _merged(readers: list[CaptureReader]) -> Iterator[Record]:
    """One file is taken as it lies; several by the time their messages were received."""
    return iter(readers[0]) if len(readers) == 1 else heapq.merge(*readers, key=lambda record: record.received)


def _config(eagle: list[str], persistent: list[str]) -> IndexConfig:
    tiers: dict[str, set[str]] = {source: set() for source in eagle}
    for word in persistent:
        source, _, tier = word.rpartition("=")
        if not source:
            raise UsageError(f"--persistent: {word!r} is not SOURCE=TIER")
        tiers.setdefault(source, set()).add(tier)
    return IndexConfig(
        publishers=tuple(
            PublisherOverride(source, eagle=source in eagle, persistent_tiers=frozenset(kept))
            for source, kept in tiers.items()
        )
    )


def _prompts(path: str) -> list[Prompt]:
    decode = msgspec.json.Decoder(Prompt).decode
    prompts = []
    with sys.stdin if path == "-" else open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    prompts.append(decode(line))
                except msgspec.MsgspecError as error:
                    raise UsageError(f"{path}: line {number}: {error}") from None
    return prompts


def _score(index: Index, prompt: Prompt) -> dict[str, Any]:
    try:
        rows = index.score(
            prompt.token_ids, prompt.model, lora=prompt.lora, cache_salt=prompt.cache_salt, mm=prompt.mm
        ).rows()
    except UsageError as error:
        raise UsageError(f"prompt {prompt.id}: {error}") from None
    return {
        "id": prompt.id,
        "endpoints": {
            row.endpoint: {"blocks": row.blocks, "tokens": row.tokens, "score": row.score, "tiers": row.tiers}
            for row in rows
        },
    }


def _publishers(statuses: list[PublisherStatus]) -> dict[str, dict[str, Any]]:
    """By source; where several publishers share a socket, the others by source#topic#dpN."""
    found: dict[str, dict[str, Any]] = {}
    for s in statuses:
        name = s.source if s.source not in found else f"{s.source}#{s.topic}#dp{s.rank}"
        found[name] = {
            "topic": s.topic,
            "dp_rank": s.rank,
            "endpoint": s.endpoint,
            "model": s.model,
            "incarnation": s.incarnation,
            "last_seq": s.last_sequence,
            "gaps": s.gaps,
            "missing": s.missing,
            "state": s.state,
            "messages": s.messages,
            "events": s.events,
            "skipped": s.skipped,
        }
    return found


def _tables(answer: dict[str, Any], taken: int) -> None:
    console = Console()
    shown = Table(title=f"publishers, after {taken} messages", title_justify="left")
    columns = ("endpoint", "state", "incarnation", "last_seq", "gaps", "events", "skipped")
    for column in ("source", *columns):
        shown.add_column(column)
    for name, publisher in answer["publishers"].items():
        shown.add_row(name, *(str(publisher[column]) for column in columns))
    console.print(shown)
    if answer["scores"]:
        scores = Table(title="scores", title_justify="left")
        for column in ("prompt", "endpoint", "tokens", "blocks", "score", "tiers"):
            scores.add_column(column)
        for score in answer["scores"]:
            for name, row in score["endpoints"].items() or [("nobody", {})]:
                tiers = " ".join(f"{tier}:{n}" for tier, n in row.get("tiers", {}).items())
                score_text = f"{row['score']:.1f}" if row else "0"
                scores.add_row(
                    str(score["id"]), name, str(row.get("tokens", 0)), str(row.get("blocks", 0)), score_text, tiers
                )
        console.print(scores)
