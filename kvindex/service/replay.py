"""`kvindex replay`: captures into a fresh index, publishers and scores out.

Several captures are merged by receive time, stable: each keeps its own order, and of equal times the file named first
goes first. A prompt with `"after": n` is scored when n messages of the merged capture have been ingested, any other at
the end.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections.abc import Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec

from kvindex.errors import CaptureError, UsageError
from kvindex.events.recording import CaptureReader, Record
from kvindex.index.config import IndexConfig
from kvindex.index.facade import Index
from kvindex.index.streams import PublisherStatus
from kvindex.service import config

EXAMPLES = """\
examples:
  kvindex replay engine.capture                          who published what
  kvindex replay a.capture b.capture --prompts p.jsonl   and who would have held these prompts, when
  kvindex replay engine.capture --prompts p.jsonl --json | jq '.scores[].endpoints'

A prompts file has one JSON object a line:
  {"id": "a", "model": "m", "token_ids": [1, 2, 3], "lora": null, "cache_salt": null, "mm": [], "after": 12}
Only token_ids is required.
"""


class Prompt(msgspec.Struct, frozen=True):
    """One line of a prompts file. `after`: how many messages are ingested before it is scored; None: all."""

    token_ids: list[int]
    id: str | int | None = None
    model: str | None = None
    lora: str | None = None
    cache_salt: str | None = None
    mm: list[dict[str, Any]] | None = None
    after: int | None = None


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "replay",
        help="feed captures to a fresh index, print publishers and scores",
        description="Feed captures to a fresh index and print what it knows of the publishers, and scores of prompts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("captures", nargs="+", metavar="F", help="files that `kvindex record` wrote")
    parser.add_argument("--prompts", metavar="P", help="JSON lines of prompts to score; - reads standard input")
    parser.add_argument("--config", "-c", metavar="NODE_YAML", help="take the `index` settings of a daemon's config")
    parser.add_argument("--reference", action="store_true", help="use the plain Python index instead of the native one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    prompts = read_prompts(args.prompts) if args.prompts else []
    settings = config.load(args.config).index if args.config else IndexConfig()
    index = Index(reference=args.reference, config=settings)
    readers = [CaptureReader(path) for path in args.captures]
    damage: list[CaptureError] = []
    scores = feed(index, merged(readers, damage), prompts)
    for reader in readers:
        if reader.cut:
            print(f"kvindex: warning: {reader.cut}; what is whole was used", file=sys.stderr)
    answer = {"publishers": publishers(index), "scores": scores}
    print(json.dumps(answer) if args.json else "\n".join(_table(answer, bool(args.prompts))))
    if damage:
        raise damage[0]  # after the output: what came before the damage is good
    return 0


def read_prompts(path: str) -> list[Prompt]:
    """Raises UsageError that names the line."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise UsageError(f"{path}: cannot be read: {failure}") from None
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            prompt = msgspec.json.decode(line, type=Prompt)
        except (msgspec.DecodeError, RecursionError) as failure:
            raise UsageError(f"{path}:{number}: {failure}") from None
        wrong = next((token for token in prompt.token_ids if not 0 <= token < 1 << 32), None)
        if wrong is not None:
            raise UsageError(f"{path}:{number}: token_ids: {wrong} is not in 0..2^32-1")
        if prompt.after is not None and prompt.after < 0:
            raise UsageError(f"{path}:{number}: after: {prompt.after} is negative")
        prompts.append(prompt if prompt.id is not None else msgspec.structs.replace(prompt, id=number))
    return prompts


def merged(readers: Iterable[CaptureReader], damage: list[CaptureError]) -> Iterator[Record]:
    """All records by receive time. A capture whose own times go back keeps its order all the same; one that is damaged
    ends there, the others go on, and `damage` is told."""

    def whole(reader: CaptureReader) -> Iterator[Record]:
        try:
            yield from reader
        except CaptureError as failure:
            damage.append(failure)

    return heapq.merge(*map(whole, readers), key=attrgetter("received"))


def feed(index: Index, records: Iterator[Record], prompts: list[Prompt]) -> list[dict[str, Any]]:
    """Ingest all records and score every prompt at its time; the answers are in the order of the prompts."""
    scores: list[dict[str, Any]] = [{}] * len(prompts)
    waiting = sorted(range(len(prompts)), key=lambda i: _after(prompts[i]))
    ingested = 0

    def score_those_due(until: float) -> None:
        while waiting and _after(prompts[waiting[0]]) <= until:
            i = waiting.pop(0)
            scores[i] = score(index, prompts[i])

    score_those_due(0)
    for record in records:
        if len(record.frames) >= 2:  # anything less carries no payload: nothing to ingest, but it was a message
            index.ingest(record.source, record.frames, record.replay)
        ingested += 1
        score_those_due(ingested)
    late = [prompts[i].id for i in waiting if prompts[i].after is not None]
    if late:
        print(f"kvindex: warning: the capture has {ingested} messages; scored at its end: {late}", file=sys.stderr)
    score_those_due(float("inf"))
    return scores


def _after(prompt: Prompt) -> float:
    return float("inf") if prompt.after is None else prompt.after


def score(index: Index, prompt: Prompt) -> dict[str, Any]:
    found = index.score(
        prompt.token_ids, prompt.model, lora=prompt.lora, cache_salt=prompt.cache_salt, mm=prompt.mm or ()
    )
    return {
        "id": prompt.id,
        "endpoints": {
            row.endpoint: {"blocks": row.blocks, "tokens": row.tokens, "score": row.score, "tiers": row.tiers}
            for row in found.rows()
        },
    }


def publishers(index: Index) -> dict[str, dict[str, Any]]:
    """By source. A source's second publisher is `source#topic#dpN`."""
    answer: dict[str, dict[str, Any]] = {}
    for status in index.publishers():
        key = status.source if status.source not in answer else f"{status.source}#{status.topic}#dp{status.rank}"
        answer[key] = _publisher(status)
    return answer


def _publisher(status: PublisherStatus) -> dict[str, Any]:
    return {
        "topic": status.topic,
        "dp_rank": status.rank,
        "incarnation": status.incarnation,
        "last_seq": status.last_sequence,
        "gaps": status.gaps,
        "state": status.state,
        "events": status.events,
        "skipped": status.skipped,
        "endpoint": status.endpoint,
        "missing": status.missing,
    }


def _table(answer: dict[str, Any], with_scores: bool) -> list[str]:
    rows = [
        ["SOURCE", "ENDPOINT", "TOPIC", "RANK", "STATE", "LAST", "RESTARTS", "GAPS", "MISSING", "EVENTS", "SKIPPED"]
    ]
    order = ("endpoint", "topic", "dp_rank", "state", "last_seq", "incarnation", "gaps", "missing", "events", "skipped")
    rows += [[source, *(str(p[name]) for name in order)] for source, p in answer["publishers"].items()]
    lines = _aligned(rows)
    if with_scores:
        rows = [["PROMPT", "ENDPOINT", "TOKENS", "BLOCKS", "SCORE", "TIERS"]]
        for prompt in answer["scores"]:
            held = sorted(prompt["endpoints"].items(), key=lambda item: (-item[1]["tokens"], item[0]))
            for name, row in held or [("nobody", {"tokens": 0, "blocks": 0, "score": 0.0, "tiers": {}})]:
                tiers = " ".join(f"{tier}:{blocks}" for tier, blocks in row["tiers"].items())
                numbers = [str(row["tokens"]), str(row["blocks"]), f"{row['score']:g}"]
                rows.append([str(prompt["id"]), name, *numbers, tiers])
        lines += ["", *_aligned(rows)]
    return lines


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
