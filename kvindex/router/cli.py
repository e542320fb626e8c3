"""`kvindex router`: read the config, set the process up, serve until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import signal
import sys
from typing import Any

from kvindex.router import config as settings
from kvindex.router.app import Router
from kvindex.service import log
from kvindex.service.config import LogConfig

# glibc, malloc.h: keep large request bodies on the heap instead of mapping and unmapping each
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "router",
        help="reverse proxy for the OpenAI paths that routes by prefix and load",
        description="Sends each request to the engine that will answer first: where most of its prefix is cached, "
        "unless others are that much less busy. Every answer says where it went (x-kvindex-endpoint) and what was "
        "predicted (x-kvindex-matched-tokens); GET /debug/explain/<request-id> says why.",
        epilog="A commented config to start from: kvindex config example router",
    )
    parser.add_argument("-c", "--config", metavar="FILE", required=True, help="router.yaml")


def run(args: argparse.Namespace) -> int:
    config = settings.load(args.config)
    log.configure(LogConfig(level=config.log))
    _tune_malloc()
    runner = asyncio.run
    if sys.platform != "win32":
        import uvloop

        runner = uvloop.run
    runner(_serve(config))
    return 0


async def _serve(config: settings.RouterConfig) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await Router(config).run(stop)


def _tune_malloc() -> None:
    """Three times the throughput for 400 KB bodies; nothing where there is no glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 512 << 20), (_M_TOP_PAD, 16 << 20)):
        mallopt(option, value)
