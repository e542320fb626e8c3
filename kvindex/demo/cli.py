"""`kvindex demo`: start everything, route the same chats twice, say what scoring was worth."""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvindex.demo import report, workload
from kvindex.demo.fleet import Engine, Fleet, get
from kvindex.demo.workload import Measured, Shape
from kvindex.errors import ServiceError

SAMPLES = 3


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="engines, daemon and router in one go: see requests follow their prefix",
        description="Starts three simulated engines, a daemon and a router; plays multi-turn chats with shared system "
        "prompts once round-robin and once by score; prints what it was worth. Ends by itself in under a minute and "
        "leaves no process behind. Exit status 1 when scoring did not beat round-robin (more found cached, and a lower "
        "mean time to first token).",
    )
    parser.add_argument("--keep", action="store_true", help="leave everything running until Ctrl-C, to play with")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo-out"), help="folder of the picture")
    parser.add_argument("--engines", type=int, default=3, help="simulated engines (default: 3)")
    parser.add_argument("--seed", type=int, default=7, help="of the chats (default: 7)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, nothing else")


def run(args: argparse.Namespace) -> int:
    console = Console(stderr=args.json)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="kvindex-demo-") as folder, Fleet(pathlib.Path(folder)) as fleet:
        console.print(f"starting {args.engines} simulated engines, a daemon and two routers ...")
        model = pathlib.Path(folder) / "model"
        subprocess.run(
            [sys.executable, "-m", "kvindex.service.cli", "sim", "--export-model", str(model)],
            check=True,
            timeout=30,
            stdout=subprocess.DEVNULL,
        )
        options = ["--num-blocks", "1600", "--prefill-tokens-per-second", "5000", "--seconds-per-output-token", "0.004"]
        engines = [fleet.engine(f"engine-{i}", options) for i in range(1, args.engines + 1)]
        grpc, http = fleet.daemon(engines, model)
        round_robin = fleet.router("round-robin", engines, model, "none", "round-robin")
        scoring = fleet.router("router", engines, model, {"grpc": grpc}, "score")

        runs: dict[str, list[Measured]] = {}
        for name, url, marker in (("round-robin", round_robin, "rr"), ("by score", scoring, "kv")):
            _forget(engines)
            played = _play(url, name, marker, args.seed, console)
            # a router without an index predicts nothing, so its zeros are no predictions
            runs[name] = played if marker == "kv" else [m._replace(predicted=None) for m in played]
        summaries = [report.summarise(name, measured) for name, measured in runs.items()]
        won = summaries[1].hit_rate > summaries[0].hit_rate and summaries[1].ttft_mean < summaries[0].ttft_mean
        args.out.mkdir(parents=True, exist_ok=True)
        drawn = report.picture(runs, summaries, args.out / "demo.svg")
        if args.json:
            print(json.dumps({"runs": [report.as_json(s) for s in summaries], "scoring_won": won}, indent=2))
        else:
            report.table(summaries, console)
            console.print("\nThree picks, explained:")
            _explain(scoring, runs["by score"], console)
        console.print(f"\npicture: {args.out / 'demo.svg'}" if drawn else "\nno picture: pip install 'kvindex\\[plot]'")
        console.print("scoring beat round-robin" if won else "[bold red]scoring did not beat round-robin[/bold red]")
        if args.keep:
            _keep(console, scoring, http, grpc, engines, folder, stop)
    return 0 if won else 1


def _forget(engines: list[Engine]) -> None:
    """Empty every engine's cache, so that no run profits from the one before."""
    for engine in engines:
        get(f"{engine.url}/reset_prefix_cache", method="POST")


def _play(url: str, name: str, marker: str, seed: int, console: Console) -> list[Measured]:
    shape = Shape()
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=shape.chats * shape.turns)
        return asyncio.run(workload.run(url, shape, marker, seed, lambda: progress.advance(task)))


def _explain(url: str, measured: list[Measured], console: Console) -> None:
    """A cold first turn, a turn that found its chat, and the one that found most."""
    cold = min(measured, key=lambda m: m.cached_tokens)
    best = max(measured, key=lambda m: m.cached_tokens)
    middle = sorted(measured, key=lambda m: m.cached_tokens)[len(measured) // 2]
    for request in (cold, middle, best)[:SAMPLES]:
        try:
            explained = json.loads(get(f"{url}/debug/explain/{request.id}"))
        except ServiceError as error:
            console.print(f"  {request.id}: {error}")
            continue
        report.explanation(
            f"{request.id} ({request.prompt_tokens} tokens, {request.cached_tokens} found cached)", explained, console
        )


def _keep(
    console: Console, url: str, http: str, grpc: str, engines: list[Engine], folder: str, stop: threading.Event
) -> None:
    console.print(
        f"""
still running (Ctrl-C ends it), configs and logs in {folder}
  router    {url}     curl {url}/v1/completions -d '{{"model":"sim","prompt":"hello","max_tokens":8}}' -i
  daemon    {http}/metrics     kvindex score --address {grpc} --model sim --prompt hello
  engines   {" ".join(engine.url for engine in engines)}""",
        highlight=False,
    )
    try:
        stop.wait()
    except KeyboardInterrupt:
        console.print("stopping")
