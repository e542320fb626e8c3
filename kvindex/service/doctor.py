"""`kvindex doctor`: looks at engines and a config, and says how to fix what is wrong."""

from __future__ import annotations

import argparse
import asyncio
import json
import textwrap
from typing import Any

import aiohttp
import msgspec

from kvindex.errors import ConfigError, UsageError
from kvindex.service import config as node
from kvindex.service import doctor_config, doctor_engine
from kvindex.service.config import EngineConfig, NodeConfig
from kvindex.service.engine_facts import Engine, Facts
from kvindex.service.findings import Finding, Findings

EXAMPLES = """\
examples:
  kvindex doctor                             the engine at http://127.0.0.1:8000
  kvindex doctor http://10.0.0.7:8000        another one
  kvindex doctor -c node.yaml                every engine and publisher of a config, and the daemon that runs with it
  kvindex doctor --json | jq '.findings[] | select(.level != "ok")'

It sends one small completion twice to each engine, to see events come and whether the index predicts what the engine
finds cached; --no-requests leaves that out. Exit status: 0 all is well or there are only warnings, 1 there are errors.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check an engine and a config; say how to fix what is wrong",
        description="Check that engines can be followed, and that a config fits them. Says how to fix what is wrong.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", nargs="?", metavar="URL", help="an engine (default: those of the config)")
    parser.add_argument("-c", "--config", metavar="FILE", help="node.yaml of the daemon")
    parser.add_argument("--api-key-file", metavar="FILE", help="what the engine wants as a bearer token")
    parser.add_argument("--no-requests", action="store_true", help="send no completions")
    parser.add_argument(
        "--timeout", type=float, default=10.0, metavar="SECONDS", help="per call (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    api_key = node.read_token(None, args.api_key_file) if args.api_key_file else None
    found = asyncio.run(_examine(args, api_key))
    errors, warnings = (sum(f.level == level for f in found) for level in ("error", "warning"))
    if args.json:
        plain = [msgspec.to_builtins(f) for f in found]
        print(json.dumps({"findings": plain, "errors": errors, "warnings": warnings}))
    else:
        print(_report(found))
        print(f"\n{_count(errors, 'error')}, {_count(warnings, 'warning')}")
    return 1 if errors else 0


async def _examine(args: argparse.Namespace, api_key: str | None) -> list[Finding]:
    about_config = Findings(args.config or "config (defaults)")
    try:
        config = node.load(args.config)
    except ConfigError as error:
        about_config.error("config", str(error).removeprefix(f"{args.config}: "), "see: kvindex config example daemon")
        config = NodeConfig()
        if args.url is None:
            return about_config.all
    engines = config.all_engines
    if args.url is not None:
        try:
            asked = EngineConfig(args.url if "://" in args.url else f"http://{args.url}")
        except ValueError as error:
            raise UsageError(str(error)) from None
        engines = tuple(e for e in engines if e.url.rstrip("/") == asked.url.rstrip("/")) or (asked,)
    async with aiohttp.ClientSession() as session:
        clients = [Engine(e.url, session, api_key=api_key, timeout_seconds=args.timeout) for e in engines]
        findings = [Findings(e.url) for e in engines]
        facts = await asyncio.gather(
            *(
                doctor_engine.examine(client, said, name=e.name, send_requests=not args.no_requests)
                for e, client, said in zip(engines, clients, findings, strict=True)
            )
        )
        known: dict[str, tuple[EngineConfig, Engine, Facts | None]] = {
            e.url: (e, client, fact) for e, client, fact in zip(engines, clients, facts, strict=True)
        }
        await doctor_config.examine(config, known, about_config)
    return [finding for said in [*findings, about_config] for finding in said.all]


def _report(found: list[Finding]) -> str:
    lines: list[str] = []
    about = None
    width = max(len(f.check) for f in found)
    for f in found:
        if f.about != about:
            about = f.about
            lines += ["", about] if lines else [about]
        lines.append(f"  {f.level:7}  {f.check:{width}}  {f.text}")
        if f.fix and f.level != "ok":
            lines += textwrap.wrap(
                f"fix: {f.fix}", 118, initial_indent=" " * 11, subsequent_indent=" " * 16, break_long_words=False
            )
    return "\n".join(lines)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
