"""What `kvindex score` and `kvindex explain` share: how to reach a daemon, and which prompts to ask about."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from kvindex.errors import UsageError
from kvindex.service.client import About, IndexClient
from kvindex.service.config import Listen, environment_token, read_token


class Question(msgspec.Struct, frozen=True):
    """One prompt, as a line of a prompts file says it: token_ids or prompt, and the rest where it matters."""

    id: str | int | None = None
    model: str | None = None
    token_ids: list[int] | None = None
    prompt: str | None = None
    lora: str | None = None
    cache_salt: str | None = None
    mm: list[dict[str, Any]] = []

    def about(self, endpoints: list[str] | None) -> About:
        return {
            "prompt": self.prompt,
            "lora": self.lora,
            "cache_salt": self.cache_salt,
            "mm": self.mm,
            "endpoints": endpoints,
        }


def add_arguments(parser: argparse.ArgumentParser, *, many: bool) -> None:
    reach = parser.add_argument_group("the daemon")
    reach.add_argument("--address", default=Listen().grpc, help="its gRPC address (default: %(default)s)")
    reach.add_argument("--ca", metavar="PEM", help="talk TLS, and trust this authority")
    reach.add_argument("--cert", metavar="PEM", help="our certificate, where it asks for one")
    reach.add_argument("--key", metavar="PEM", help="and its key")
    reach.add_argument("--token-file", metavar="FILE", help="bearer token (or set KVINDEX_TOKEN)")
    reach.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="(default: %(default)s)")

    asked = parser.add_argument_group("the prompt")
    asked.add_argument("--model", help="only endpoints of this model; names the tokenizer of --prompt")
    source = asked.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the daemon tokenises it; needs its `tokenizers` setting")
    source.add_argument("--token-ids", metavar="IDS", help="1,2,3 or [1, 2, 3], or @FILE that holds such a list")
    if many:
        source.add_argument("--prompts", metavar="FILE", help="JSON lines of prompts; - reads standard input")
    asked.add_argument("--lora", metavar="NAME", help="the adapter's name")
    asked.add_argument("--cache-salt", metavar="TEXT")
    asked.add_argument("--endpoint", action="append", metavar="NAME", help="only this one (repeatable)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def client(args: argparse.Namespace) -> IndexClient:
    token = read_token(None, args.token_file) if args.token_file else environment_token()
    return IndexClient(args.address, ca=args.ca, cert=args.cert, key=args.key, token=token, timeout=args.timeout)


def questions(args: argparse.Namespace) -> list[Question]:
    """Raises UsageError that names the flag or the line."""
    if getattr(args, "prompts", None):
        return [_with_defaults(q, args) for q in _read_lines(args.prompts)]
    token_ids = _token_ids(args.token_ids) if args.token_ids is not None else None
    return [
        Question(model=args.model, token_ids=token_ids, prompt=args.prompt, lora=args.lora, cache_salt=args.cache_salt)
    ]


def _with_defaults(question: Question, args: argparse.Namespace) -> Question:
    """A flag holds for the lines that do not say."""
    return msgspec.structs.replace(
        question,
        model=question.model or args.model,
        lora=question.lora or args.lora,
        cache_salt=question.cache_salt or args.cache_salt,
    )


def _read_lines(path: str) -> list[Question]:
    found = []
    for number, line in enumerate(_read("--prompts", path).splitlines(), 1):
        if line.strip():
            try:
                question = msgspec.json.decode(line, type=Question)
            except (msgspec.DecodeError, RecursionError) as failure:
                raise UsageError(f"{path}:{number}: {failure}") from None
            if (question.token_ids is None) == (question.prompt is None):
                raise UsageError(f"{path}:{number}: needs token_ids or prompt, one of them")
            found.append(question if question.id is not None else msgspec.structs.replace(question, id=number))
    return found


def _token_ids(text: str) -> list[int]:
    if text.startswith("@"):
        text = _read("--token-ids", text[1:])
    text = text.strip()
    try:
        ids = json.loads(text if text.startswith("[") else f"[{text}]")
    except (json.JSONDecodeError, RecursionError):
        ids = None
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < 1 << 32 for i in ids):
        raise UsageError("--token-ids: must be integers from 0 to 4294967295, as 1,2,3 or [1, 2, 3]")
    return ids


def _read(flag: str, path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise UsageError(f"{flag}: {path} cannot be read: {failure}") from None


def aligned(rows: list[list[str]]) -> str:
    """Columns under each other, the last one ragged."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
