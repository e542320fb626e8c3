"""Where a daemon finds publishers, what it does when they change, and when there is too much of them."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import msgspec
import pytest

from kvindex.service.audit import Audit, Observation
from tests.service.process import Daemon, wait_for
from tests.simulator.process import sim
from tests.support.publisher import Publisher, stored

pytestmark = pytest.mark.e2e

PROMPT = list(range(100, 132))


def entry(publisher: Publisher, **more: object) -> dict[str, object]:
    return {"source": publisher.endpoint, "replay": publisher.replay_endpoint, **more}


def test_engines_are_asked_and_named(tmp_path: pathlib.Path) -> None:
    """The topic names the endpoint, else config does, else it is the address; and what was predicted is found."""
    with sim("--topic", "", "--dp-size", "2") as unnamed, sim() as named:
        engines = [unnamed.ready["url"], {"url": named.ready["url"], "name": "b", "model": "sim"}]
        with Daemon(tmp_path, {"engines": engines}) as daemon, daemon.client() as client:
            wait_for("ready", lambda: daemon.get("/readyz").status == 200)
            address = unnamed.ready["url"].removeprefix("http://")
            prompt = [7 + i % 90 for i in range(100)]
            for engine, headers in ((unnamed, {"X_data_parallel_rank": "1"}), (named, {})):
                answer = engine.call("/v1/completions", {"model": "sim", "prompt": prompt, "max_tokens": 2}, **headers)
                assert answer.status == 200
            for name in (f"{address}:dp1", "b"):
                daemon.caught_up(name, 0)
                row = client.score(prompt).of(name)
                assert row is not None
                assert row.tokens == 96
            assert named.cached(prompt) == 96
            assert daemon.metric("kvindex_publishers_without_endpoint") == 0
            assert daemon.metric("kvindex_endpoints_without_publisher") == 0


def test_an_engine_that_publishes_nothing_is_named(tmp_path: pathlib.Path) -> None:
    with sim("--no-kv-events") as engine:
        url = engine.ready["url"]
        with Daemon(tmp_path, {"engines": [url], "connect_deadline_seconds": 0.5}) as daemon:
            said = daemon.wait_log("engine has no publisher", about=[url])
            assert "publishes no KV events" in said["why"]
            assert daemon.metric("kvindex_endpoints_without_publisher") == 1
            debug = daemon.get("/debug/publishers").json()
            assert debug["sources"][0]["source"] == url


def test_a_watched_file_adds_and_removes_publishers(tmp_path: pathlib.Path) -> None:
    first, second = Publisher(topic=b"one"), Publisher(topic=b"two")
    file = tmp_path / "publishers.yaml"
    file.write_text(json.dumps({"publishers": [entry(first, endpoint="a", model="m")]}))
    with Daemon(tmp_path, {"publishers_file": "publishers.yaml"}) as daemon, daemon.client() as client:
        first.publish(stored(1, PROMPT[:16]))
        daemon.caught_up("a", 0)
        file.write_text("publishers: [{sauce: x}]")
        said = daemon.wait_log("sources cannot be read")
        assert "publishers[0].sauce: unknown field; did you mean `source`?" in said["error"]
        assert client.score(PROMPT, "m").endpoints == ["a"]
        file.write_text(json.dumps({"publishers": [entry(second, endpoint="b", model="m")]}))
        second.publish(stored(1, PROMPT[:16]))
        wait_for("b instead of a", lambda: client.score(PROMPT, "m").endpoints == ["b"])
        assert [p.endpoint for p in client.publishers().publishers] == ["b"]
    first.close()
    second.close()


def test_a_bound_socket_takes_many_publishers(tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, {"publishers": [{"source": "tcp://127.0.0.1:17557", "bind": True}]}) as daemon:
        both = [Publisher("tcp://127.0.0.1:17557", None, topic, bind=False) for topic in (b"kv@x@m", b"kv@y@m")]
        for publisher in both:
            wait_for("subscribed", lambda p=publisher: p.subscribers)
            publisher.publish(stored(1, PROMPT[:16]))
        for name in ("x", "y"):
            daemon.caught_up(name, 0)
        with daemon.client() as client:
            assert sorted(client.score(PROMPT, "m").endpoints) == ["x", "y"]
        for publisher in both:
            publisher.close()


def test_publishers_without_a_name_or_with_the_same_one_are_errors(tmp_path: pathlib.Path) -> None:
    nameless, twins = Publisher(topic=b""), [Publisher(topic=b"kv-events"), Publisher(topic=b"kv-events")]
    body = {"publishers": [entry(p) for p in (nameless, *twins)], "connect_deadline_seconds": 0.5}
    with Daemon(tmp_path, body) as daemon:
        for publisher in (nameless, *twins):
            publisher.publish(stored(1, PROMPT[:16]))
        assert "kv@POD@MODEL" in daemon.wait_log("publisher has no endpoint", about=[nameless.endpoint])["fix"]
        sources = sorted(p.endpoint for p in twins)
        daemon.wait_log("publishers share an endpoint", about=["kv-events", *sources])
        assert daemon.metric("kvindex_publishers_without_endpoint") == 1
    for publisher in (nameless, *twins):
        publisher.close()


def test_lasting_over_prediction_rebuilds_from_the_replay(tmp_path: pathlib.Path) -> None:
    publisher = Publisher(topic=b"kv@pod@m")
    with Daemon(tmp_path, {"publishers": [entry(publisher)]}) as daemon, daemon.client() as client:
        daemon.caught_up("pod", publisher.publish(stored(1, PROMPT[:16])))
        wrong = [("pod", 16, 0, 32)] * 20
        client.report(wrong[:-1])
        assert client.publishers().publishers[0].restarts == 0
        client.report(wrong[-1:])
        wait_for("rebuilt", lambda: client.publishers().publishers[0].restarts == 1)
        wait_for("scored again", lambda: client.score(PROMPT, "m").tokens.tolist() == [16])
        assert daemon.wait_log("predictions too high, rebuilding")["replayed"] is True
        # without a replay socket there is nothing to rebuild from: gone until it speaks again
    publisher.close()
    silent = Publisher(topic=b"kv@pod@m", replay_endpoint=None)
    with Daemon(tmp_path, {"publishers": [entry(silent)]}) as daemon, daemon.client() as client:
        wait_for("subscribed", lambda: silent.subscribers)
        daemon.caught_up("pod", silent.publish(stored(1, PROMPT[:16])))
        client.report(wrong)
        wait_for("fenced", lambda: client.publishers().publishers[0].state == "fenced")
        assert client.score(PROMPT, "m").endpoints == []
    silent.close()


def test_the_audit_needs_a_lasting_difference_and_only_over_credit() -> None:
    audit = Audit(window=4, threshold=0.5)
    assert not any(audit.observe(Observation("a", 0, 64)) for _ in range(50))
    assert not any(audit.observe(Observation("b", 16 * (i % 2), 0)) for i in range(0, 100, 2))
    answers = [audit.observe(Observation("c", 16, 16 if i % 2 else 0)) for i in range(50)]
    assert not any(answers)
    assert [audit.observe(Observation("d", 16, 0)) for _ in range(8)] == [False, False, False, True] * 2


def test_a_flood_is_bounded_counted_and_healed(tmp_path: pathlib.Path) -> None:
    """More messages than the queue may hold: memory stays bounded, what was dropped is said and then replayed."""
    publisher = Publisher(topic=b"kv@pod@m", buffer_steps=100_000)
    events: list[Any] = [stored(1, PROMPT[:16]), {"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU"}]
    payload = msgspec.msgpack.encode([time.time(), events * 50, 0])
    last_payload = msgspec.msgpack.encode([time.time(), events[:1], 0])
    body = {"publishers": [entry(publisher)], "queue": {"max_messages": 8}, "probe_interval_seconds": 0.2}
    with Daemon(tmp_path, body) as daemon, daemon.client() as client:
        wait_for("subscribed", lambda: publisher.subscribers)
        for _ in range(500):
            publisher.send(payload)
        last = publisher.send(last_payload)
        daemon.caught_up("pod", last)
        assert client.score(PROMPT, "m").tokens.tolist() == [16]
        overflow = daemon.metric("kvindex_queue_overflow_total")
        assert overflow > 0, "the queue of 8 was never full"
        said = daemon.publisher("pod")
        assert said is not None
        assert said.state == "live"
        assert said.missing == 0
        assert daemon.metric("kvindex_lost_messages_total") == 0
        rss = int(pathlib.Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1]) * 4096
        assert rss < 400 << 20
    publisher.close()


def test_hostile_frames_change_nothing_and_the_next_good_one_counts(tmp_path: pathlib.Path) -> None:
    publisher = Publisher(topic=b"kv@pod@m")
    good = msgspec.msgpack.encode([1.0, [stored(1, PROMPT[:16])], 0])
    with Daemon(tmp_path, {"publishers": [entry(publisher)]}) as daemon, daemon.client() as client:
        for cut in range(0, len(good), 7):
            publisher.send(good[:cut])
        for byte in range(0, len(good), 11):
            publisher.send(good[:byte] + b"\xc1" + good[byte + 1 :])
        publisher.send(b"\x93\xcb" + b"\xff" * 64)
        publisher.publish({"type": "AllBlocksCleared"})
        daemon.caught_up("pod", publisher.send(good))
        assert client.score(PROMPT, "m").tokens.tolist() == [16]
        assert daemon.metric("kvindex_skipped_total", reason="undecodable") > 5
        skipped = [line for line in daemon.log if line["event"].startswith("skipped")]
        assert len(skipped) <= 6, "one line a reason, not one a message"
        assert daemon.process.poll() is None
    publisher.close()
