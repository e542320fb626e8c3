"""`kvindex score`: which endpoints hold how much of a prompt."""

from __future__ import annotations

import argparse
import json
from typing import Any

from kvindex.scoring.result import Scores
from kvindex.service import asking

EXAMPLES = """\
examples:
  kvindex score --model m --prompt "You are a helpful assistant."
  kvindex score --token-ids 1,2,3,4 --json
  kvindex score --address 10.0.0.5:50151 --ca ca.pem --token-file token --prompts prompts.jsonl

A prompts file has one JSON object a line, of which token_ids or prompt is required:
  {"id": "a", "model": "m", "token_ids": [1, 2, 3], "lora": null, "cache_salt": null, "mm": []}
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "score",
        help="ask a daemon which endpoints hold a prompt's prefix",
        description="Ask a daemon which endpoints hold a prompt's prefix, best first. Nobody listed: nobody holds it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    asking.add_arguments(parser, many=True)


def run(args: argparse.Namespace) -> int:
    answers: list[tuple[Any, Scores]] = []
    with asking.client(args) as client:
        for question in asking.questions(args):
            scores = client.score(question.token_ids, question.model, **question.about(args.endpoint))
            answers.append((question.id, scores))
    print(json.dumps({"scores": [_plain(*a) for a in answers]}) if args.json else _table(answers))
    return 0


def _plain(prompt: Any, scores: Scores) -> dict[str, Any]:
    rows = {row.endpoint: {k: v for k, v in row._asdict().items() if k != "endpoint"} for row in scores.rows()}
    return {"id": prompt, "endpoints": rows}


def _table(answers: list[tuple[Any, Scores]]) -> str:
    rows = [["PROMPT", "ENDPOINT", "TOKENS", "BLOCKS", "SCORE", "SAVES", "STATE", "LAG", "TIERS"]]
    for prompt, scores in answers:
        name = "-" if prompt is None else str(prompt)
        held = sorted(scores.rows(), key=lambda row: (-row.seconds_saved, -row.tokens, row.endpoint))
        for row in held:
            tiers = " ".join(f"{tier}:{blocks}" for tier, blocks in row.tiers.items())
            numbers = [str(row.tokens), str(row.blocks), f"{row.score:g}", f"{row.seconds_saved:.3f} s"]
            rows.append([name, row.endpoint, *numbers, row.state, f"{row.lag_seconds:.3f} s", tiers])
        if not held:
            rows.append([name, "nobody", "0", "0", "0", "", "", "", ""])
    return asking.aligned(rows if any(p is not None for p, _ in answers) else [row[1:] for row in rows])
