"""A small publisher that behaves on the wire like vLLM's: PUB with a sequence from 0, ROUTER that replays a buffer.

Written from the protocol's description and not from our simulator, so that tests of the subscriber do not share its
mistakes. It can lose messages, die without a word, and come back on the same addresses.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from typing import Any

import msgspec
import zmq

END = b"\xff" * 8


def stored(key: int, tokens: list[int], parent: int | None = None, size: int | None = None) -> dict[str, Any]:
    """One dense block of vLLM's map form."""
    return {
        "type": "BlockStored",
        "block_hashes": [key],
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": size or len(tokens),
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }


class Publisher:
    """One process's worth of a publisher. All sockets belong to its thread, as in vLLM.

    `endpoint` may end in `:0`; `endpoint` and `replay_endpoint` are then what the OS chose. `answers_with_topic` False
    is vLLM up to 0.24.
    """

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:0",
        replay_endpoint: str | None = "tcp://127.0.0.1:0",
        topic: bytes = b"kv@pod@model",
        *,
        bind: bool = True,
        rank: int = 0,
        buffer_steps: int = 10_000,
        answers_with_topic: bool = True,
    ) -> None:
        self.endpoint = endpoint
        self.replay_endpoint = replay_endpoint
        self.topic = topic
        self.sequence = 0
        self.questions: list[int] = []
        self.on_the_wire = 0  # messages that have left the queue
        self.subscribers = 0  # an XPUB is a PUB that tells; what is sent before the first one is heard by nobody
        self._bind = bind
        self._rank = rank
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=buffer_steps)
        self._with_topic = answers_with_topic
        self._queue: queue.Queue[tuple[bytes, bool] | None] = queue.Queue()
        self._lose = 0
        self._linger = 200
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="test-publisher", daemon=True)
        self._thread.start()
        assert self._ready.wait(5), "the publisher did not start"

    def publish(self, *events: Any, timestamp: float | None = None) -> int:
        """Send one batch; returns its sequence number."""
        batch = [time.time() if timestamp is None else timestamp, list(events), self._rank]
        return self.send(msgspec.msgpack.encode(batch))

    def send(self, payload: bytes) -> int:
        lost, self._lose = self._lose > 0, max(0, self._lose - 1)
        self._queue.put((payload, lost))
        self.sequence += 1
        return self.sequence - 1

    def lose(self, messages: int) -> None:
        """The next messages get a number and a place in the replay buffer, but never reach the wire."""
        self._lose += messages

    def close(self) -> None:
        """End in an orderly way: what was sent is delivered."""
        self._queue.put(None)
        self._thread.join(5)
        assert not self._thread.is_alive()

    def kill(self) -> None:
        """End like a killed process: what the sockets still hold is gone."""
        self._linger = 0
        self.close()

    def _run(self) -> None:
        context = zmq.Context()
        pub, replay = context.socket(zmq.XPUB), context.socket(zmq.ROUTER)
        pub.set_hwm(100_000)
        pub.setsockopt(zmq.XPUB_VERBOSER, 1)
        try:
            if self._bind:
                pub.bind(self.endpoint)
                self.endpoint = pub.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]
            else:
                pub.connect(self.endpoint)
            if self.replay_endpoint is not None:
                replay.bind(self.replay_endpoint)
                bound = replay.getsockopt(zmq.LAST_ENDPOINT)
                self.replay_endpoint = bound.rstrip(b"\0").decode()  # type: ignore[union-attr]
            self._ready.set()
            number = 0
            while True:
                if replay.poll(0):
                    self._answer(replay)
                while pub.poll(0):
                    self.subscribers += 1 if pub.recv()[:1] == b"\1" else -1
                try:
                    item = self._queue.get(timeout=0.01)
                except queue.Empty:
                    continue
                if item is None:
                    return
                payload, lost = item
                sequence = number.to_bytes(8, "big")
                number += 1
                if not lost:
                    pub.send_multipart([self.topic, sequence, payload])
                self._buffer.append((sequence, payload))
                self.on_the_wire = number
        finally:
            pub.close(linger=self._linger)
            replay.close(linger=self._linger)
            context.term()

    def _answer(self, replay: zmq.Socket[bytes]) -> None:
        client, empty, start = replay.recv_multipart()
        assert (empty, len(start)) == (b"", 8)
        self.questions.append(int.from_bytes(start, "big"))
        topic = [self.topic] if self._with_topic else []
        for sequence, payload in list(self._buffer):
            if sequence >= start:
                replay.send_multipart([client, b"", *topic, sequence, payload])
        replay.send_multipart([client, b"", *([b""] if self._with_topic else []), END, b""])
