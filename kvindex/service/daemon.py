"""`kvindex daemon`: publishers in, scores out. This module only wires the parts together and ends them in order."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from importlib import metadata
from typing import Any

import aiohttp

from kvindex.index.facade import Index
from kvindex.service import config as node
from kvindex.service import log
from kvindex.service.config import NodeConfig
from kvindex.service.feed import Feed
from kvindex.service.grpc_server import GrpcServer
from kvindex.service.http_server import HttpServer
from kvindex.service.lookups import Lookups
from kvindex.service.metrics import Metrics
from kvindex.service.status import Status
from kvindex.service.tokenizing import Tokenizers

READY_CHECK_SECONDS = 0.2
COMPLAIN_SECONDS = 5.0


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "daemon",
        help="take engines' KV events in, answer where a prefix is",
        description="Indexes the KV-cache events of engines and answers, over gRPC, which endpoint holds how much of a "
        "prompt. Without a config: the vLLM at http://127.0.0.1:8000. SIGTERM ends it after the calls in flight.",
        epilog="A commented config to start from: kvindex config example daemon",
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="node.yaml")
    parser.add_argument("--reference", action="store_true", help="use the plain Python index, the oracle")


def run(args: argparse.Namespace) -> int:
    config = node.load(args.config)
    log.configure(config.log)
    runner = asyncio.run
    if sys.platform != "win32":
        with contextlib.suppress(ImportError):
            import uvloop

            runner = uvloop.run
    runner(serve(config, reference=args.reference))
    return 0


async def serve(config: NodeConfig, *, reference: bool = False) -> None:
    """Run until SIGTERM or SIGINT. Raises ConfigError and ServiceError for what keeps it from starting."""
    logger = log.get("daemon")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    token = node.read_token(config.token, config.token_file)
    version = metadata.version("kvindex")
    index = Index(reference=reference, config=config.index)
    tokenizers = Tokenizers(config.tokenizers)
    metrics = Metrics(version)
    async with aiohttp.ClientSession() as session:
        feed = Feed(config, index, session)
        status = Status(index, feed, version)
        metrics.watch(index, feed)
        lookups = Lookups(index, tokenizers, metrics, config.limits.max_prompt_tokens, feed.rebuild)
        shared: dict[str, Any] = {"tls": config.tls, "token": token}
        grpc = GrpcServer(lookups, status, metrics, config.limits, listen=config.listen.grpc, **shared)
        http = HttpServer(lookups, status, metrics, config.limits, listen=config.listen.http, **shared)
        await grpc.start()
        try:
            await http.start()
        except BaseException:
            await grpc.stop(0)
            raise
        _warn(config, token)
        logger.info("listening", grpc_port=grpc.port, http_port=http.port, version=version)
        following = asyncio.create_task(feed.intake.run(), name="intake")
        readying = asyncio.create_task(_readiness(feed, grpc, config), name="readiness")
        try:
            await _until(stop, following, readying)
        finally:
            logger.info("draining", deadline_seconds=config.drain_deadline_seconds)
            http.drain()
            await grpc.stop(config.drain_deadline_seconds)
            for task in (following, readying):
                task.cancel()
            await asyncio.gather(following, readying, return_exceptions=True)
            if not await feed.intake.stop():
                logger.error("a subscriber did not stop in time")
            await http.stop()
            tokenizers.close()
    logger.info("stopped")


async def _until(stop: asyncio.Event, *tasks: asyncio.Task[None]) -> None:
    """Wait for the signal; a background task that ends early is a bug, so its error is raised here."""
    stopping = asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    for task in done - {stopping}:
        task.result()


async def _readiness(feed: Feed, grpc: GrpcServer, config: NodeConfig) -> None:
    """Serving as soon as every source is connected or had its time; then say what has no partner."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + config.connect_deadline_seconds
    await asyncio.sleep(READY_CHECK_SECONDS)
    while feed.waiting_for():
        await asyncio.sleep(READY_CHECK_SECONDS)
    await grpc.serving(True)
    log.get("daemon").info("ready", sources=len(feed.sources()))
    await asyncio.sleep(max(0.0, deadline - loop.time()))
    while True:
        feed.complain()
        await asyncio.sleep(COMPLAIN_SECONDS)


def _warn(config: NodeConfig, token: str | None) -> None:
    """Whoever opens a port to other hosts reads here what that means."""
    for listen in (config.listen.grpc, config.listen.http):
        if config.tls is None and not node.address(listen).is_loopback:
            said = (
                "no tls and no token: whoever reaches this address can ask and read along"
                if token is None
                else "the token crosses the network in clear text: set tls too"
            )
            log.get("daemon").warning(said, listen=listen)
