"""Where publishers are: watched files, engines that tell, and subscribers that come and go with them."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from kvindex.errors import ConfigError
from kvindex.events.intake import Intake
from kvindex.events.sources import EngineSources, Source, StaticSources, WatchedFile, at_host
from kvindex.events.subscriber import SourceConfig
from tests.support.publisher import Publisher


def decode(path: Path) -> list[Source]:
    try:
        return [Source(SourceConfig(source=name)) for name in json.loads(path.read_text())]
    except ValueError as failure:
        raise ConfigError(f"{path}: {failure}") from None


def names(sources: Sequence[Source]) -> list[str]:
    return [source.socket.source for source in sources]


class Sink:
    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.closed: list[str] = []
        self.restarts: list[str] = []

    def ingest(self, source: str, frames: Sequence[bytes], replay: bool = False) -> object:
        if frames[-1]:
            self.messages.append((source, frames[-1]))
        return None

    def replay_begun(self, source: str) -> None: ...
    def replay_ended(self, source: str, complete: bool) -> None: ...
    def restarted(self, source: str) -> None:
        self.restarts.append(source)

    def close_publisher(self, source: str) -> None:
        self.closed.append(source)


async def until(condition: Callable[[], object], step: Callable[[], Awaitable[object]] | None = None) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        if step is not None:
            await step()
        await asyncio.sleep(0.01)


@asynccontextmanager
async def engine(answer: Callable[[], Any], status: int = 200) -> AsyncIterator[str]:
    """An HTTP server with nothing but /kv_event_sources."""

    async def sources(_: web.Request) -> web.Response:
        body = answer()
        return web.Response(status=status, body=body if isinstance(body, bytes) else json.dumps(body).encode())

    app = web.Application()
    app.router.add_get("/kv_event_sources", sources)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


def test_a_watched_file_follows_good_edits_and_keeps_the_last_one_through_bad_ones(tmp_path: Path) -> None:
    path = tmp_path / "publishers.json"
    file = WatchedFile(path, decode)

    def look() -> list[str]:
        return names(asyncio.run(file.look()))

    assert look() == []
    assert file.error == f"{path}: No such file or directory"
    path.write_text('["tcp://a:1"]')
    assert (look(), file.error) == (["tcp://a:1"], None)
    path.write_text('["tcp://a:1", ')
    assert look() == ["tcp://a:1"]
    assert "Expecting value" in str(file.error)
    signature = path.stat()
    path.write_text('["tcp://a:2"]')
    os.utime(path, ns=(signature.st_atime_ns, signature.st_mtime_ns))  # even when the clock did not move
    assert (look(), file.error) == (["tcp://a:2"], None)
    path.unlink()
    assert look() == ["tcp://a:2"]
    assert file.error is not None
    link = tmp_path / "other.json"
    link.write_text('["tcp://a:3"]')
    path.symlink_to(link)  # how a mounted ConfigMap changes
    assert (look(), file.error) == (["tcp://a:3"], None)


def test_a_watched_file_that_did_not_change_is_not_decoded_again(tmp_path: Path) -> None:
    calls = []

    def counted(path: Path) -> list[Source]:
        calls.append(path)
        return decode(path)

    (tmp_path / "f").write_text("[]")
    file = WatchedFile(tmp_path / "f", counted)
    for _ in range(3):
        asyncio.run(file.look())
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("endpoint", "host", "reached"),
    [
        ("tcp://*:5557", "10.0.0.7", "tcp://10.0.0.7:5557"),
        ("tcp://0.0.0.0:5557", "pod-7.ns", "tcp://pod-7.ns:5557"),
        ("tcp://[::]:5557", "fd00::7", "tcp://[fd00::7]:5557"),
        ("tcp://10.0.0.9:5557", "10.0.0.7", "tcp://10.0.0.9:5557"),
        ("ipc:///tmp/kv", "10.0.0.7", "ipc:///tmp/kv"),
    ],
)
def test_wildcards_become_the_engines_host(endpoint: str, host: str, reached: str) -> None:
    assert at_host(endpoint, host) == reached


async def ask(url: str, **options: Any) -> tuple[EngineSources, tuple[Source, ...]]:
    async with aiohttp.ClientSession() as session:
        finder = EngineSources(url, session, **options)
        return finder, await finder.look()


def test_an_engine_tells_its_sources_per_rank() -> None:
    answer = {
        "1": {"endpoint": "tcp://*:15758", "replay_endpoint": None, "topic": "t", "hwm": 1},
        "0": {"endpoint": "tcp://*:15757", "replay_endpoint": "tcp://*:15857", "publisher": "zmq"},
        "2": {"endpoint": "tcp://*:1", "enable_kv_cache_events": False},
    }

    async def run() -> None:
        async with engine(lambda: answer) as url:
            template = SourceConfig(source="", max_messages=7)
            finder, found = await ask(url, template=template, about="mine")
            host = "tcp://127.0.0.1"
            first = SourceConfig(source=f"{host}:15757", replay=f"{host}:15857", max_messages=7)
            second = SourceConfig(source=f"{host}:15758", max_messages=7)
            where = url.rstrip("/")
            assert found == (Source(first, where, 0, "mine"), Source(second, where, 1, "mine"))
            assert finder.error is None

    asyncio.run(run())


def test_an_engine_that_calls_us_makes_us_listen_unless_somebody_does() -> None:
    publisher = Publisher()
    answer = {"0": {"endpoint": publisher.endpoint}, "1": {"endpoint": "tcp://127.0.0.1:1"}}

    async def run() -> None:
        async with engine(lambda: answer) as url:
            _, found = await ask(url)
            assert [source.socket.bind for source in found] == [False, True]

    asyncio.run(run())
    publisher.close()


@pytest.mark.parametrize(
    ("answer", "status", "says"),
    [
        (b"", 404, "GET /kv_event_sources answered 404"),
        (b"<html>", 200, "is not understood"),
        ({"x": {}}, 200, "is not understood"),
        ({"0": {"endpoint": 5}}, 200, "is not understood"),
        ([1], 200, "is not understood"),
        (b"[" * 100_000, 200, "is not understood"),
        ({}, 200, "publishes no KV events"),
        ({"0": {"endpoint": None}}, 200, "publishes no KV events"),
        ({str(n): {"endpoint": "tcp://*:5557"} for n in range(5000)}, 200, "lists 5000 ranks"),
        (b" " * (2 << 20), 200, "is larger than"),
    ],
)
def test_an_engine_that_cannot_tell_leaves_the_fallback_and_a_reason(answer: Any, status: int, says: str) -> None:
    async def run() -> None:
        async with engine(lambda: answer, status) as url:
            finder, found = await ask(url, fallback=SourceConfig(source="tcp://h:5557"))
            assert says in str(finder.error)
            assert names(found) == ([] if "publishes no" in says else ["tcp://h:5557"])

    asyncio.run(run())


def test_an_engine_that_is_away_keeps_what_it_said() -> None:
    async def run() -> None:
        async with aiohttp.ClientSession() as session:
            async with engine(lambda: {"0": {"endpoint": "tcp://*:5557"}}) as url:
                finder = EngineSources(url, session)
                assert names(await finder.look()) == ["tcp://127.0.0.1:5557"]
            assert names(await finder.look()) == ["tcp://127.0.0.1:5557"]
            assert finder.error is not None

    asyncio.run(run())


def test_subscribers_come_and_go_with_the_sources(tmp_path: Path) -> None:
    one, two = Publisher(), Publisher()
    path = tmp_path / "publishers.json"
    path.write_text(json.dumps([one.endpoint]))
    sink = Sink()
    prepared: list[str] = []

    async def run() -> None:
        finder = WatchedFile(path, decode, interval_seconds=0.0)
        intake = Intake([finder], sink, prepare=lambda source: prepared.append(source.socket.source))
        await intake.poll()
        await until(lambda: one.subscribers)
        one.send(b"1")
        await until(lambda: sink.messages == [(one.endpoint, b"1")])
        path.write_text(json.dumps([one.endpoint, two.endpoint]))
        await until(lambda: two.subscribers, intake.poll)
        path.write_text("broken")
        await intake.poll()
        assert names(intake.sources()) == [one.endpoint, two.endpoint]
        assert "Expecting value" in str(intake.finders()[0].error)
        path.write_text(json.dumps([two.endpoint]))
        await until(lambda: sink.closed == [one.endpoint], intake.poll)
        assert [status.source for status in intake.subscribers()] == [two.endpoint]
        assert not intake.renew(one.endpoint)
        assert not intake.renew(two.endpoint)  # no replay socket
        assert await intake.stop()

    asyncio.run(run())
    assert prepared == [one.endpoint, two.endpoint]
    for publisher in (one, two):
        publisher.close()


def test_a_changed_source_is_read_anew() -> None:
    publisher = Publisher()
    sink = Sink()

    class Changing(StaticSources):
        async def look(self) -> tuple[Source, ...]:
            return self._sources

    async def run() -> None:
        finder = Changing([Source(SourceConfig(source=publisher.endpoint))])
        finder.interval_seconds = 0.0
        intake = Intake([finder], sink)
        await intake.poll()
        finder._sources = (Source(SourceConfig(source=publisher.endpoint, replay=publisher.replay_endpoint)),)
        publisher.send(b"0")
        await until(lambda: sink.messages, intake.poll)
        assert sink.restarts == [publisher.endpoint]
        assert sink.closed == []
        assert await intake.stop()

    asyncio.run(run())
    publisher.close()


def test_a_source_that_cannot_be_opened_says_why_and_is_tried_again() -> None:
    blocker = Publisher(replay_endpoint=None)

    async def run() -> None:
        listen = Source(SourceConfig(source=blocker.endpoint, bind=True))
        good = Source(SourceConfig(source="tcp://127.0.0.1:1"))
        intake = Intake([StaticSources([listen, good]), StaticSources([good], "again")], Sink())
        await intake.poll()
        assert "cannot listen on it" in intake.failed()[blocker.endpoint]
        assert names(intake.sources()) == ["tcp://127.0.0.1:1"]
        await asyncio.to_thread(blocker.close)
        await until(lambda: not intake.failed(), intake.poll)
        assert await intake.stop()

    asyncio.run(run())


def test_running_follows_by_itself(tmp_path: Path) -> None:
    publisher = Publisher()
    path = tmp_path / "p"
    path.write_text("[]")
    sink = Sink()

    async def run() -> None:
        intake = Intake([WatchedFile(path, decode, interval_seconds=0.05)], sink)
        task = asyncio.create_task(intake.run())
        await asyncio.sleep(0.1)
        path.write_text(json.dumps([publisher.endpoint]))
        await until(lambda: publisher.subscribers)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await intake.stop()

    asyncio.run(run())
    publisher.close()
