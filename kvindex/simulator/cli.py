"""`kvindex sim`: start one simulated engine and serve until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

from aiohttp import web

from kvindex.errors import KvindexError, ServiceError
from kvindex.simulator import tokenizer
from kvindex.simulator.config import EngineConfig, LatencyModel
from kvindex.simulator.driver import Clock
from kvindex.simulator.fleet import EventsConfig, Fleet
from kvindex.simulator.server import Server

_ACCEPT_SECONDS = 0.02
_DESCRIPTION = """\
An engine without a GPU that speaks vLLM's language: the OpenAI API with cached-token counts, vLLM's metrics, and real
KV events over ZMQ with replay. Blocks are paged, cached and evicted in vLLM's order; only the numbers are made up.

When it is ready it prints one line (JSON with --json, else text) that names every port it got.
"""
_EPILOG = """\
examples:
  kvindex sim                                       one engine on a free port
  kvindex sim --port 8000 --kv-events-port 5557     the ports vLLM's documentation uses
  kvindex sim --dp-size 2 --lora sql --lora chat    two data-parallel ranks, two adapters
  kvindex sim --num-blocks 64 --time-scale 10       small cache, ten times faster than life
  kvindex sim --export-model ./sim-model            write the tokenizer and chat template, then exit

try it:
  curl localhost:8000/v1/completions -d '{"model": "sim", "prompt": "hello there", "max_tokens": 5}'
  curl localhost:8000/kv_event_sources              where its events and their replay are
  curl -X POST 'localhost:8000/sim/withhold_events?batches=2'    lose two messages, to see a gap being found
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "sim",
        help="an engine without a GPU, with real KV events",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    http = parser.add_argument_group("server")
    http.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    http.add_argument("--port", type=int, default=0, help="HTTP port; 0 lets the OS choose (default: 0)")
    http.add_argument("--drain-seconds", type=float, default=30.0, help="after SIGTERM, wait this long for requests")
    http.add_argument("--no-prompt-tokens-details", action="store_true", help="do not report cached tokens in usage")
    http.add_argument("--json", action="store_true", help="print the ready line as JSON")

    model = parser.add_argument_group("model")
    model.add_argument("--model", default="sim", help="the name it is served under (default: sim)")
    model.add_argument("--model-path", type=Path, metavar="DIR", help="folder with tokenizer.json; default: built in")
    model.add_argument("--export-model", type=Path, metavar="DIR", help="write the built-in model's folder and exit")
    model.add_argument("--max-model-len", type=int, default=0, help="context length; 0: what fits into the cache")
    model.add_argument("--lora", action="append", default=[], metavar="NAME", help="adapter it serves (repeatable)")
    model.add_argument("--max-loras", type=int, default=0, help="adapters in one batch; 0: all")
    model.add_argument("--seed", type=int, default=0, help="engines with equal seeds give equal answers")

    cache = parser.add_argument_group("cache and scheduling")
    cache.add_argument("--block-size", type=int, default=16, help="tokens per block (default: 16)")
    cache.add_argument("--num-blocks", type=int, default=2048, help="blocks in the cache (default: 2048)")
    cache.add_argument("--max-num-seqs", type=int, default=16, help="requests in one batch (default: 16)")
    cache.add_argument("--max-num-batched-tokens", type=int, default=2048, help="tokens in one step (default: 2048)")
    cache.add_argument("--dp-size", type=int, default=1, help="data-parallel ranks, each with its own cache")

    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--prefill-tokens-per-second", type=float, default=8000.0, help="uncached tokens (default: 8000)"
    )
    speed.add_argument("--seconds-per-output-token", type=float, default=0.01, help="(default: 0.01)")
    speed.add_argument("--load-factor", type=float, default=2.0, help="slowdown at --max-num-seqs (default: 2)")
    speed.add_argument("--time-scale", type=float, default=1.0, help="run this many times faster (default: 1)")

    events = parser.add_argument_group("events")
    events.add_argument("--kv-events-port", type=int, default=0, help="rank r uses port + r; 0: the OS chooses")
    events.add_argument("--kv-replay-port", type=int, default=0, help="as above; -1: no replay socket")
    events.add_argument("--no-kv-events", action="store_true", help="publish nothing, as vLLM does by default")
    events.add_argument("--topic", default="auto", help="auto: kv@HOST:PORT@MODEL (default: auto)")
    events.add_argument("--buffer-steps", type=int, default=10_000, help="messages kept for replay (default: 10000)")
    events.add_argument("--hash-seed", default="vllm-none-hash", help="engines with equal seeds share engine keys")


def run(args: argparse.Namespace) -> int:
    if args.export_model is not None:
        tokenizer.export(args.export_model)
        print(json.dumps({"model": str(args.export_model)}) if args.json else f"wrote {args.export_model}")
        return 0
    asyncio.run(_serve(args))
    return 0


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        model=args.model,
        block_size=args.block_size,
        num_blocks=args.num_blocks,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len,
        loras=tuple(args.lora),
        max_loras=args.max_loras,
        seed=args.seed,
        hash_seed=args.hash_seed,
        report_events=not args.no_kv_events,
        latency=LatencyModel(
            prefill_tokens_per_second=args.prefill_tokens_per_second,
            seconds_per_output_token=args.seconds_per_output_token,
            load_factor=args.load_factor,
        ),
    )


def _events_config(args: argparse.Namespace, port: int) -> EventsConfig:
    address = f"tcp://{args.host}"
    return EventsConfig(
        endpoint=None if args.no_kv_events else f"{address}:{args.kv_events_port}",
        replay_endpoint=None if args.kv_replay_port < 0 else f"{address}:{args.kv_replay_port}",
        topic=f"kv@{args.host}:{port}@{args.model}" if args.topic == "auto" else args.topic,
        buffer_steps=args.buffer_steps,
    )


async def _serve(args: argparse.Namespace) -> None:
    config = _engine_config(args)
    chat = tokenizer.ChatModel.load(args.model_path) if args.model_path else tokenizer.ChatModel.builtin()
    # Bound before the engines exist: their topic carries the port.
    try:
        listener = socket.create_server((args.host, args.port), backlog=1024)
    except OSError as error:
        raise ServiceError(f"cannot listen on {args.host}:{args.port}: {error.strerror or error}") from error
    port = listener.getsockname()[1]
    try:
        fleet = Fleet(
            config,
            _events_config(args, port),
            dp_size=args.dp_size,
            vocabulary=chat.vocabulary,
            clock=Clock(args.time_scale),
        )
    except KvindexError:
        listener.close()
        raise
    server = Server(fleet, chat, report_cached_tokens=not args.no_prompt_tokens_details)
    # A client that goes away cancels its handler, which aborts its requests.
    runner = web.AppRunner(
        server.app(), access_log=None, handler_cancellation=True, shutdown_timeout=args.drain_seconds
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await runner.setup()
    fleet.start()
    try:
        await web.SockSite(runner, listener).start()
        _announce(args, config, fleet, port)
        await stop.wait()
        # asyncio leaks a connection that is accepted in the turn in which its server closes: stop accepting first, and
        # let those that were accepted become known.
        loop.remove_reader(listener.fileno())
        await asyncio.sleep(_ACCEPT_SECONDS)
    finally:
        # Refuses new connections, lets running requests finish, then ends the engines under them.
        await runner.cleanup()
        await fleet.close()


def _announce(args: argparse.Namespace, config: EngineConfig, fleet: Fleet, port: int) -> None:
    ready: dict[str, Any] = {
        "event": "ready",
        "url": f"http://{args.host}:{port}",
        "host": args.host,
        "port": port,
        "pid": os.getpid(),
        "model": config.model,
        "loras": list(config.loras),
        "block_size": config.block_size,
        "num_blocks": config.num_blocks,
        "max_model_len": config.context_tokens,
        "dp_size": args.dp_size,
        "kv_event_sources": fleet.sources(),
    }
    if args.json:
        print(json.dumps(ready), flush=True)
        return
    print(f"ready: {ready['url']} serves {config.model!r}, {config.num_blocks} blocks of {config.block_size}", end="")
    for rank, source in fleet.sources().items():
        assert isinstance(source, dict)
        print(f"; rank {rank} events {source['endpoint']} replay {source['replay_endpoint']}", end="")
    print(flush=True)
