"""`kvindex record`: an engine's raw KV-event frames into a capture file, until told to stop.

Messages are written in the order in which an index would have to take them: what was lost on the wire and replayed
stands before the message that showed the loss, marked `replay`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import aiohttp
import zmq

from kvindex.errors import ServiceError, UsageError
from kvindex.events.recording import CaptureWriter, Record
from kvindex.events.sources import EngineSources
from kvindex.events.subscriber import SourceConfig, Subscriber
from kvindex.service import log
from kvindex.service.config import LogConfig

EXAMPLES = """\
examples:
  kvindex record tcp://127.0.0.1:5557 -o engine.capture
  kvindex record tcp://127.0.0.1:5557 --replay-endpoint tcp://127.0.0.1:5657 -o engine.capture --seconds 60
  kvindex record http://127.0.0.1:8000 -o engine.capture      ask the engine where it publishes, all ranks
  kvindex record 'tcp://*:5557' --bind -o fleet.capture       engines connect to us

Ctrl-C ends it; `kvindex replay` reads the file.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "record",
        help="capture an engine's raw KV-event frames into a file",
        description="Write the frames of KV-event sockets to a capture file, verbatim, with their time and source.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("endpoints", nargs="+", metavar="ENDPOINT", help="tcp://, ipc://, or an engine's http:// URL")
    parser.add_argument("--output", "-o", required=True, metavar="F", help="the capture file to write")
    parser.add_argument("--force", action="store_true", help="overwrite F if it exists")
    parser.add_argument(
        "--replay-endpoint",
        action="append",
        default=[],
        metavar="ENDPOINT",
        help="replay socket of the first, second, ... socket ENDPOINT; lost messages are then replayed",
    )
    parser.add_argument("--bind", action="store_true", help="listen on the endpoints; engines connect to us")
    parser.add_argument("--topic", default="", help="keep only topics that begin with this")
    parser.add_argument("--seconds", type=_positive_float, metavar="N", help="stop after N seconds")
    parser.add_argument("--messages", type=_positive_int, metavar="N", help="stop after N messages")
    parser.add_argument("--json", action="store_true", help="print a summary as one JSON object at the end")


def run(args: argparse.Namespace) -> int:
    log.configure(LogConfig(level="warning"))
    sources = resolve(args.endpoints, args.replay_endpoint, bind=args.bind, topic=args.topic)
    path = Path(args.output)
    if path.exists() and path.stat().st_size and not args.force:
        raise UsageError(f"{path}: exists; --force overwrites it")
    stopping = threading.Event()
    with path.open("wb") as file, _until_signal(stopping):
        recorder = Recorder(CaptureWriter(file), stopping, args.messages)
        summary = _record(sources, recorder, stopping, args.seconds)
    summary["file"] = str(path)
    if args.json:
        print(json.dumps(summary))
    else:
        print(f"{path}: {summary['messages']} messages, {summary['bytes']} bytes in {summary['seconds']} s")
    for name, told in summary["sources"].items():
        if not told["connects"]:
            print(f"kvindex: warning: {name}: nobody was there", file=sys.stderr)
        if told["lost"]:
            print(f"kvindex: warning: {name}: {told['lost']} messages were lost", file=sys.stderr)
    return 0 if any(told["connects"] for told in summary["sources"].values()) else 1


class Recorder:
    """A sink that writes everything down. Thread-safe: every source has its own thread."""

    def __init__(self, writer: CaptureWriter, stopping: threading.Event, limit: int | None = None) -> None:
        self.writer = writer
        self.failure: OSError | None = None
        self._stopping = stopping
        self._limit = limit
        self._lock = threading.Lock()
        self._restarted: set[str] = set()

    def ingest(self, source: str, frames: Sequence[bytes], replay: bool = False) -> None:
        with self._lock:
            if self._limit is not None and self.writer.records >= self._limit:
                return
            if source in self._restarted:
                self._restarted.discard(source)
                if replay and len(frames) == 4 and frames[-1]:
                    # A restart that only its replay showed. Unmarked, its number goes back, and that tells a reader.
                    frames, replay = frames[1:], False
            try:
                self.writer.write(Record(time.time(), source, list(frames), replay))
            except OSError as failure:  # the disk is full: a recorder that goes on would only look as if it did
                self.failure = failure
                self._stopping.set()
                return
            if self.writer.records == self._limit:
                self._stopping.set()

    def replay_begun(self, source: str) -> None:
        """The records say it."""

    def replay_ended(self, source: str, complete: bool) -> None:
        """The records say it."""

    def restarted(self, source: str) -> None:
        with self._lock:
            self._restarted.add(source)


def resolve(endpoints: Sequence[str], replays: Sequence[str], *, bind: bool, topic: str) -> list[SourceConfig]:
    """The sockets to read. Raises ServiceError when an engine does not tell where it publishes."""
    sockets = [endpoint for endpoint in endpoints if "://" in endpoint and not endpoint.startswith("http")]
    for endpoint in endpoints:
        if "://" not in endpoint:
            raise UsageError(f"{endpoint!r} is not tcp://host:port, ipc://path or an engine's http:// URL")
    if len(replays) > len(sockets):
        raise UsageError(f"--replay-endpoint: {len(replays)} given for {len(sockets)} event sockets")
    pairs = [*replays, *[None] * (len(sockets) - len(replays))]
    found = [SourceConfig(source=s, replay=r, bind=bind, topic=topic) for s, r in zip(sockets, pairs, strict=True)]
    engines = [endpoint for endpoint in endpoints if endpoint.startswith("http")]
    return found + (asyncio.run(_asked(engines, topic)) if engines else [])


async def _asked(urls: Sequence[str], topic: str) -> list[SourceConfig]:
    found: list[SourceConfig] = []
    async with aiohttp.ClientSession() as session:
        for url in urls:
            engine = EngineSources(url, session, template=SourceConfig(source="", topic=topic))
            found += [source.socket for source in await engine.look()]
            if engine.error is not None:
                raise ServiceError(engine.error)
    return found


def _record(
    sources: Sequence[SourceConfig], recorder: Recorder, stopping: threading.Event, seconds: float | None
) -> dict[str, Any]:
    began = time.monotonic()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with ExitStack() as stack:
        stack.callback(context.destroy, linger=0)
        subscribers = [Subscriber(source, recorder, context) for source in sources]
        for subscriber in subscribers:
            stack.callback(subscriber.stop)
            subscriber.start()
        progress = _Progress(recorder.writer, began)
        while not stopping.wait(progress.interval(began, seconds)):
            recorder.writer.flush()
            if seconds is not None and time.monotonic() - began >= seconds:
                break
            progress.show()
        progress.end()
        told = [subscriber.status() for subscriber in subscribers]
    if recorder.failure is not None:
        raise recorder.failure
    recorder.writer.flush()
    names = ("connects", "received", "overflow", "lost", "replays", "restarts", "malformed", "last_sequence")
    return {
        "messages": recorder.writer.records,
        "bytes": recorder.writer.bytes,
        "seconds": round(time.monotonic() - began, 3),
        "sources": {status.source: {name: getattr(status, name) for name in names} for status in told},
    }


class _Progress:
    """One line on a terminal's stderr, rewritten; a line every ten seconds elsewhere."""

    def __init__(self, writer: CaptureWriter, began: float) -> None:
        self._writer = writer
        self._began = began
        self._terminal = sys.stderr.isatty()
        self._next = began + (0 if self._terminal else 10)

    def interval(self, began: float, seconds: float | None) -> float:
        wait = 0.5 if self._terminal else 1.0
        return wait if seconds is None else max(0.0, min(wait, began + seconds - time.monotonic()))

    def show(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (0 if self._terminal else 10)
        line = f"{self._writer.records} messages, {self._writer.bytes} bytes, {now - self._began:.0f} s"
        print(f"\r{line} " if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._terminal:
            print(file=sys.stderr)


@contextmanager
def _until_signal(stopping: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set the event instead of ending the process; the handlers are put back afterwards."""

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    ours = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, stop) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _positive_float(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value
