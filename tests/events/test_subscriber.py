"""The subscriber on real ZMQ sockets: losses, restarts, floods, and an end that leaves nothing behind."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import zmq

from kvindex.errors import ServiceError
from kvindex.events.frames import Message, split
from kvindex.events.replaying import ReplayError, ReplayLimits, ask
from kvindex.events.sink import Sink
from kvindex.events.subscriber import SourceConfig, Subscriber
from tests.support.publisher import Publisher


def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


class Log:
    """A sink that writes down the payloads and the calls."""

    def __init__(self, delay: float = 0.0) -> None:
        self.payloads: list[bytes] = []
        self.replayed: list[bytes] = []
        self.calls: list[str] = []
        self.delay = delay
        self.open = threading.Event()
        self.open.set()

    def ingest(self, source: str, frames: Sequence[bytes], replay: bool = False) -> object:
        self.open.wait(30)
        message = split(frames, replay=replay)
        if isinstance(message, Message) and not message.is_end:
            if message.payload == b"poison":
                raise RuntimeError("the sink does not like it")
            self.payloads.append(message.payload)
            if replay:
                self.replayed.append(message.payload)
        return None

    def replay_begun(self, source: str) -> None:
        self.calls.append("begun")

    def replay_ended(self, source: str, complete: bool) -> None:
        self.calls.append("complete" if complete else "incomplete")

    def restarted(self, source: str) -> None:
        self.calls.append("restarted")


Start = Callable[..., Subscriber]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Subscriber] = []

    def _start(publisher: Publisher, sink: Sink, **options: object) -> Subscriber:
        options.setdefault("source", publisher.endpoint)
        options.setdefault("replay", publisher.replay_endpoint)
        options.setdefault("probe_seconds", 30.0)
        options.setdefault("replay_limits", ReplayLimits(patience_seconds=1.0))
        subscriber = Subscriber(SourceConfig(**options), sink)  # type: ignore[arg-type]
        subscriber.start()
        started.append(subscriber)
        return subscriber

    yield _start
    for subscriber in started:
        assert subscriber.stop(5)
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("kvindex-")]


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    publisher = Publisher()
    yield publisher
    publisher.close()


def connected(publisher: Publisher, subscriber: Subscriber) -> None:
    """Subscribed, and asked a first time: from now on nothing is missed."""
    until(lambda: publisher.subscribers and subscriber.status().replays and publisher.questions)


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_messages_arrive_in_order_whenever_it_joins(start: Start, transport: str, tmp_path: Path) -> None:
    where = ("tcp://127.0.0.1:0",) * 2 if transport == "tcp" else (f"ipc://{tmp_path}/e", f"ipc://{tmp_path}/r")
    publisher = Publisher(*where)
    log = Log()
    sent = [b"%d" % i for i in range(20)]
    for payload in sent[:10]:
        publisher.send(payload)
    until(lambda: publisher.on_the_wire == 10)
    subscriber = start(publisher, log)
    until(lambda: len(log.payloads) == 10)
    for payload in sent[10:]:
        publisher.send(payload)
    until(lambda: len(log.payloads) == 20)
    assert log.payloads == sent
    assert log.replayed[:10] == sent[:10]
    status = subscriber.status()
    assert (status.last_sequence, status.lost, status.overflow, status.errors) == (19, 0, 0, 0)
    publisher.close()


def test_lost_messages_are_replayed_in_their_place(start: Start, publisher: Publisher) -> None:
    log = Log()
    subscriber = start(publisher, log)
    connected(publisher, subscriber)
    publisher.send(b"0")
    publisher.lose(2)
    for payload in (b"1", b"2", b"3"):
        publisher.send(payload)
    until(lambda: len(log.payloads) == 4)
    assert log.payloads == [b"0", b"1", b"2", b"3"]
    assert log.replayed[:2] == [b"1", b"2"]
    assert log.calls == ["begun", "complete"]
    assert subscriber.status().lost == 0


def test_answers_of_older_versions_have_no_topic(start: Start) -> None:
    publisher = Publisher(answers_with_topic=False)
    log = Log()
    publisher.send(b"0")
    until(lambda: publisher.on_the_wire == 1)
    subscriber = start(publisher, log)
    connected(publisher, subscriber)
    assert log.payloads == []
    publisher.send(b"1")
    until(lambda: len(log.payloads) == 2)
    assert log.payloads == [b"0", b"1"]
    publisher.close()


def test_a_lost_last_message_is_found_by_a_probe(start: Start, publisher: Publisher) -> None:
    log = Log()
    subscriber = start(publisher, log, probe_seconds=0.2)
    connected(publisher, subscriber)
    publisher.send(b"0")
    publisher.lose(1)
    publisher.send(b"1")
    until(lambda: log.payloads == [b"0", b"1"])
    questions = len(publisher.questions)
    until(lambda: len(publisher.questions) > questions)  # it goes on asking
    assert log.calls == ["begun", "complete"]  # and bothers the sink only when there is something


def test_what_the_publisher_no_longer_keeps_is_lost(start: Start) -> None:
    publisher = Publisher(buffer_steps=2)
    log = Log()
    subscriber = start(publisher, log)
    connected(publisher, subscriber)
    publisher.send(b"0")
    until(lambda: log.payloads == [b"0"])
    publisher.lose(4)
    for i in range(1, 6):
        publisher.send(b"%d" % i)
    until(lambda: len(log.payloads) == 3)
    assert log.payloads == [b"0", b"4", b"5"]
    until(lambda: log.calls == ["begun", "incomplete"])
    assert subscriber.status().lost == 3
    publisher.close()


def test_a_killed_publisher_that_comes_back_is_a_restart(start: Start) -> None:
    first = Publisher()
    log = Log()
    subscriber = start(first, log)
    connected(first, subscriber)
    for payload in (b"a0", b"a1", b"a2"):
        first.send(payload)
    until(lambda: len(log.payloads) == 3)
    first.kill()
    until(lambda: subscriber.status().state == "connecting")
    second = Publisher(first.endpoint, first.replay_endpoint)
    for i in range(5):
        second.send(b"b%d" % i)
    until(lambda: len(log.payloads) == 8)
    assert log.payloads[3:] == [b"b0", b"b1", b"b2", b"b3", b"b4"]
    assert log.calls.count("restarted") == 1
    status = subscriber.status()
    assert (status.restarts, status.lost, status.state, status.connects) == (1, 0, "connected", 2)
    second.close()


def test_a_publisher_that_restarted_and_is_silent(start: Start) -> None:
    first = Publisher()
    log = Log()
    subscriber = start(first, log, probe_seconds=0.1)
    connected(first, subscriber)
    first.send(b"a0")
    until(lambda: len(log.payloads) == 1)
    asked = len(first.questions)
    until(lambda: len(first.questions) > asked + 1)  # it has seen that this replay socket keeps messages
    first.kill()
    second = Publisher(first.endpoint, first.replay_endpoint)
    until(lambda: "restarted" in log.calls)
    assert log.payloads == [b"a0"]
    second.close()


def test_a_publisher_that_starts_later(start: Start) -> None:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0)), two.bind(("127.0.0.1", 0))
        where = [f"tcp://127.0.0.1:{s.getsockname()[1]}" for s in (one, two)]
    log = Log()
    subscriber = Subscriber(SourceConfig(source=where[0], replay=where[1]), log)
    subscriber.start()
    assert subscriber.status().state == "connecting"
    publisher = Publisher(*where)
    publisher.send(b"0")
    until(lambda: log.payloads == [b"0"])
    publisher.close()
    assert subscriber.stop()


def test_many_publishers_connect_to_a_bound_socket(start: Start) -> None:
    log = Log()
    subscriber = Subscriber(SourceConfig(source="tcp://127.0.0.1:0", bind=True), log)
    subscriber.start()
    where = subscriber.status().address
    assert not where.endswith(":0")
    publishers = [Publisher(where, None, b"kv@%d@m" % i, bind=False) for i in range(3)]
    until(lambda: subscriber.status().connects == 3)
    for i, publisher in enumerate(publishers):
        for n in range(5):
            publisher.send(b"%d.%d" % (i, n))
    until(lambda: len(log.payloads) == 15)
    for i in range(3):
        mine = [payload for payload in log.payloads if payload.startswith(b"%d." % i)]
        assert mine == [b"%d.%d" % (i, n) for n in range(5)]
    for publisher in publishers:
        publisher.close()
    assert subscriber.stop()


def test_topics_are_filtered_but_their_numbers_count(start: Start, publisher: Publisher) -> None:
    log = Log()
    subscriber = start(publisher, log, topic="other@")
    connected(publisher, subscriber)
    publisher.send(b"0")
    until(lambda: subscriber.status().last_sequence == 0)
    assert log.payloads == []


def test_an_overflow_is_counted_and_made_good(start: Start, publisher: Publisher) -> None:
    log = Log()
    subscriber = start(publisher, log, max_messages=10)
    connected(publisher, subscriber)
    log.open.clear()  # the sink is busy
    sent = [b"%d" % i for i in range(100)]
    for payload in sent:
        publisher.send(payload)
    until(lambda: subscriber.status().overflow >= 80)
    assert subscriber.status().waiting <= 10
    log.open.set()
    until(lambda: len(log.payloads) == 100)
    assert log.payloads == sent
    assert subscriber.status().lost == 0


def test_a_flood_keeps_memory_bounded(start: Start) -> None:
    publisher = Publisher(replay_endpoint=None)
    log = Log()
    subscriber = start(publisher, log, replay=None, max_bytes=4 << 20)
    until(lambda: publisher.subscribers)
    log.open.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    payload = b"x" * 1_000_000
    for _ in range(20):
        for _ in range(20):
            publisher.send(payload)  # one object: the test's own queue costs nothing
        received = subscriber.status().received
        until(lambda received=received: subscriber.status().received >= received + 10)  # type: ignore[misc]
    status = subscriber.status()
    assert status.waiting <= 5
    assert status.overflow >= 200
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 150 << 20, f"{grown >> 20} MiB for {status.received} MB received"
    log.open.set()
    until(lambda: subscriber.status().waiting == 0)
    publisher.send(b"after")
    until(lambda: log.payloads[-1] == b"after")
    publisher.close()


def test_a_message_over_the_limit_breaks_the_connection_not_the_stream(start: Start, publisher: Publisher) -> None:
    log = Log()
    subscriber = start(publisher, log, max_message_bytes=10_000, renew_seconds=0.2)
    connected(publisher, subscriber)
    publisher.send(b"0")
    until(lambda: log.payloads == [b"0"])
    publisher.send(b"x" * 20_000)
    until(lambda: subscriber.status().connects >= 2)
    until(lambda: publisher.send(b"2") and b"2" in log.payloads, 30)  # after its replay, which has it too, has failed


def test_a_sink_that_raises_does_not_end_the_stream(start: Start, publisher: Publisher) -> None:
    log = Log()
    subscriber = start(publisher, log)
    connected(publisher, subscriber)
    for payload in (b"0", b"poison", b"2"):
        publisher.send(payload)
    until(lambda: log.payloads == [b"0", b"2"])
    status = subscriber.status()
    assert status.errors == 1
    assert "the sink does not like it" in status.detail


def test_a_source_that_is_doubted_is_replayed_from_the_beginning(start: Start, publisher: Publisher) -> None:
    log = Log()
    subscriber = start(publisher, log)
    connected(publisher, subscriber)
    publisher.send(b"0")
    until(lambda: log.payloads == [b"0"])
    assert subscriber.renew()
    until(lambda: log.payloads == [b"0", b"0"])
    until(lambda: log.calls == ["restarted", "begun", "complete"])
    publisher.send(b"1")
    until(lambda: log.payloads == [b"0", b"0", b"1"])
    other = start(publisher, Log(), replay=None)
    assert not other.renew()


def test_garbage_on_the_wire_is_survived(start: Start) -> None:
    context = zmq.Context()
    garbage = context.socket(zmq.PUB)
    port = garbage.bind_to_random_port("tcp://127.0.0.1")
    log = Log()
    subscriber = Subscriber(SourceConfig(source=f"tcp://127.0.0.1:{port}"), log)
    subscriber.start()
    until(lambda: subscriber.status().state == "connected")
    time.sleep(0.1)
    for frames in ([b""], [b"one"], [b"t", b"short", b"p"], [b"a"] * 9, [b"t", b"\xff" * 8, b"p"]):
        garbage.send_multipart(frames)
    garbage.send_multipart([b"t", b"\0" * 8, b"good"])
    until(lambda: log.payloads[-1:] == [b"good"])
    assert subscriber.status().malformed == 2
    assert subscriber.stop()
    context.destroy(linger=0)


def test_an_address_that_cannot_be_used_is_said_at_once() -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    where = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ServiceError, match=f"{where}: cannot listen on it: Address already in use"):
        Subscriber(SourceConfig(source=where, bind=True), Log()).start()
    with pytest.raises(ServiceError, match="cannot connect to it"):
        Subscriber(SourceConfig(source="nonsense"), Log()).start()
    taken.close()


def test_stopping_is_quick_while_a_replay_does_not_answer(start: Start) -> None:
    mute = socket.socket()  # accepts, and never speaks ZMTP
    mute.bind(("127.0.0.1", 0))
    mute.listen()
    publisher = Publisher(replay_endpoint=None)
    subscriber = start(
        publisher,
        Log(),
        replay=f"tcp://127.0.0.1:{mute.getsockname()[1]}",
        replay_limits=ReplayLimits(patience_seconds=20.0),
    )
    until(lambda: subscriber.status().replays == 1)
    before = time.monotonic()
    assert subscriber.stop(5)
    assert time.monotonic() - before < 2
    assert subscriber.status().state == "stopped"
    publisher.close()
    mute.close()


def test_an_endless_answer_has_a_deadline() -> None:
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    stop = threading.Event()

    def serve() -> None:
        client, *_ = router.recv_multipart()
        while not stop.wait(0.001):
            router.send_multipart([client, b"", b"t", b"\0" * 8, b"p"])
        router.close(linger=0)

    thread = threading.Thread(target=serve)
    thread.start()
    limits = ReplayLimits(patience_seconds=1.0, total_seconds=0.3)
    before = time.monotonic()
    with pytest.raises(ReplayError, match=r"did not end within 0\.3 s"):
        for _ in ask(context, f"tcp://127.0.0.1:{port}", 0, limits, threading.Event()):
            pass
    assert time.monotonic() - before < 5
    stop.set()
    thread.join(5)
    context.destroy(linger=0)
