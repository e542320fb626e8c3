"""A `kvindex sim` process as a client sees it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import zmq

DEADLINE_SECONDS = 20.0


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str

    def json(self) -> Any:
        return json.loads(self.text)

    def chunks(self) -> list[Any]:
        """The events of a stream; the end mark must be there and is left out."""
        lines = [line for line in self.text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


class Sim:
    def __init__(self, *arguments: str, ready: bool = True) -> None:
        # Warnings are errors in the process too.
        command = [sys.executable, "-W", "error", "-m", "kvindex.simulator", "--json", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.ready: dict[str, Any] = json.loads(self.process.stdout.readline()) if ready else {}

    def call(self, path: str, body: object = None, **headers: str) -> Answer:
        data = json.dumps(body).encode() if body is not None else None
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            request = HttpRequest(self.ready["url"] + path, data=data, headers=names)
            with urlopen(request, timeout=DEADLINE_SECONDS) as response:
                return Answer(response.status, dict(response.headers), response.read().decode())
        except HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers), error.read().decode())

    def complete(self, prompt: object, max_tokens: int = 2, path: str = "/v1/completions", **fields: Any) -> Any:
        answer = self.call(path, {"prompt": prompt, "max_tokens": max_tokens, **fields})
        assert answer.status == 200, answer
        return answer.json()

    def cached(self, prompt: object, **fields: Any) -> int:
        cached = self.complete(prompt, **fields)["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert isinstance(cached, int)
        return cached

    def metric(self, name: str, engine: int = 0) -> float:
        for line in self.call("/metrics").text.splitlines():
            if line.startswith(name + "{") and f'engine="{engine}"' in line:
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")

    def stop(self, *, kill: bool = False) -> int:
        """End it and return its status; whatever it wrote to stderr fails the test."""
        if kill:
            self.process.kill()
        else:
            self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        _, errors = self.process.communicate(timeout=DEADLINE_SECONDS)
        assert not errors, errors
        return self.process.returncode


@contextlib.contextmanager
def sim(*arguments: str) -> Iterator[Sim]:
    running = Sim(*arguments)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            assert running.stop() == 0


class Listener:
    """A subscriber and a replay client of one rank."""

    def __init__(self, sim: Sim, rank: int = 0) -> None:
        source = sim.call("/kv_event_sources").json()[str(rank)]
        self._context = zmq.Context()
        self.sub = self._context.socket(zmq.SUB)
        self.sub.subscribe(b"")
        self.sub.connect(source["endpoint"])
        self.dealer = self._context.socket(zmq.DEALER)
        self.dealer.connect(source["replay_endpoint"])
        for socket in (self.sub, self.dealer):
            socket.rcvtimeo = int(DEADLINE_SECONDS * 1000)
            socket.linger = 0

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.sub.close()
        self.dealer.close()
        self._context.term()

    def join(self, sim: Sim, prompt_start: int, **headers: str) -> list[list[bytes]]:
        """Send prompts until the subscription is live; returns the messages that came."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            sim.call("/v1/completions", {"prompt": [prompt_start] * 20, "max_tokens": 1}, **headers)
            prompt_start += 1
            if self.sub.poll(50):
                return self.drain()
        raise AssertionError("the subscription never became live")

    def drain(self) -> list[list[bytes]]:
        messages = []
        while self.sub.poll(50):
            messages.append(self.sub.recv_multipart())
        return messages

    def replay(self, start: int) -> list[list[bytes]]:
        self.dealer.send_multipart([b"", start.to_bytes(8, "big")])
        answers = []
        while True:
            frames = self.dealer.recv_multipart()
            if frames[-2] == b"\xff" * 8:
                assert frames == [b"", b"", b"\xff" * 8, b""]
                return answers
            answers.append(frames)
