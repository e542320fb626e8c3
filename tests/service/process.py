"""A `kvindex daemon` process as its users see it."""

from __future__ import annotations

import json
import pathlib
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from kvindex.service.client import IndexClient

DEADLINE_SECONDS = 20.0


class Answer(NamedTuple):
    status: int
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


def wait_for(what: str, condition: Callable[[], object], seconds: float = DEADLINE_SECONDS) -> Any:
    """Poll until the condition holds; returns its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {seconds} s")


class Daemon:
    """Started on free ports with `config`; its log is read as it comes. `grpc` and `http` are where it listens."""

    def __init__(self, folder: pathlib.Path, config: dict[str, Any] | None, *, scheme: str = "http") -> None:
        arguments: list[str] = []
        self._token: str | None = (config or {}).get("token")
        if config is not None:
            config = {"listen": {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0"}, **config}
            (folder / "node.yaml").write_text(json.dumps(config))
            arguments = ["-c", str(folder / "node.yaml")]
        # Warnings are errors in the process too.
        command = [sys.executable, "-W", "error", "-m", "kvindex.service.cli", "daemon", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.log: list[dict[str, Any]] = []
        self.raw: list[str] = []
        self._scheme = scheme
        self._reader = threading.Thread(target=self._read, name="daemon-log", daemon=True)
        self._reader.start()
        listening = self.wait_log("listening")
        self.grpc = f"127.0.0.1:{listening['grpc_port']}"
        self.http = f"{scheme}://127.0.0.1:{listening['http_port']}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.raw.append(line)
            if line.startswith("{"):
                self.log.append(json.loads(line))

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            assert self.stop() == 0
        assert not [line for line in self.raw if not line.startswith("{")], "only log lines on stderr"

    def stop(self) -> int:
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        try:
            status = self.process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self._reader.join(DEADLINE_SECONDS)
            assert self.process.stderr is not None
            self.process.stderr.close()
        return status

    def find_log(self, event: str, **fields: Any) -> dict[str, Any] | None:
        for line in list(self.log):
            if line["event"] == event and all(line.get(k) == v for k, v in fields.items()):
                return line
        return None

    def wait_log(self, event: str, **fields: Any) -> dict[str, Any]:
        def look() -> Any:
            found = self.find_log(event, **fields)
            assert found or self.process.poll() is None, "".join(self.raw)
            return found

        found: dict[str, Any] = wait_for(f"log line {event!r} {fields}", look)
        return found

    def client(self, **access: Any) -> IndexClient:
        return IndexClient(self.grpc, **{"timeout": DEADLINE_SECONDS, "token": self._token, **access})

    def get(
        self,
        path: str,
        *,
        token: str | None = None,
        body: object = None,
        context: ssl.SSLContext | None = None,
    ) -> Answer:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = Request(self.http + path, data=data, headers=headers)
        try:
            with urlopen(request, timeout=DEADLINE_SECONDS, context=context) as response:
                return Answer(response.status, response.read().decode())
        except HTTPError as error:
            with error:
                return Answer(error.code, error.read().decode())

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample; 0 when it is not there."""
        for line in self.get("/metrics").text.splitlines():
            head, _, value = line.rpartition(" ")
            if head.partition("{")[0] == name and all(f'{k}="{v}"' in head for k, v in labels.items()):
                return float(value)
        return 0.0

    def wait_metric(self, value: float, name: str, **labels: str) -> None:
        wait_for(f"{name} {labels} is {value}", lambda: self.metric(name, **labels) == value)

    def publisher(self, endpoint: str) -> Any | None:
        with self.client() as client:
            return next((p for p in client.publishers().publishers if p.endpoint == endpoint), None)

    def caught_up(self, endpoint: str, sequence: int) -> Any:
        """Wait until this message of the endpoint's publisher was taken; returns the publisher's status."""

        def check() -> Any:
            p = self.publisher(endpoint)
            return p is not None and p.HasField("last_sequence") and p.last_sequence >= sequence and p

        return wait_for(f"message {sequence} of {endpoint}", check)
