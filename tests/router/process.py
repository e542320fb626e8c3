"""A `kvindex router` process, raw sockets to talk to it, and small backends that misbehave on purpose."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import yaml

DEADLINE_SECONDS = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RouterProcess:
    """Context manager: started with a config, ready when it is entered."""

    def __init__(self, folder: pathlib.Path, wait: bool = True, **config: Any) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        path = folder / "router.yaml"
        path.write_text(yaml.safe_dump({"listen": f"127.0.0.1:{self.port}", **config}))
        self._log = (folder / "router.log").open("w+")
        command = [sys.executable, "-W", "error", "-m", "kvindex.service.cli", "router", "-c", str(path)]
        self.process = subprocess.Popen(command, stderr=self._log, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        if wait:
            self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            try:
                if self.get("/healthz")[0] == 200:
                    return
            except (URLError, OSError):
                assert self.process.poll() is None, self.log()
                time.sleep(0.05)
        raise AssertionError(self.log())

    def __enter__(self) -> RouterProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(DEADLINE_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()

    def log(self) -> str:
        self._log.flush()
        return pathlib.Path(self._log.name).read_text()

    def get(self, path: str) -> tuple[int, dict[str, str], bytes]:
        return self.call(path)

    def call(self, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            with urlopen(Request(self.url + path, data=data, headers=names), timeout=DEADLINE_SECONDS) as answer:
                return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
        except HTTPError as error:
            with error:
                return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()

    def raw(self, data: bytes, seconds: float = 5.0) -> bytes:
        """Send bytes as they are; what comes back until the router closes or is silent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            connection.sendall(data)
            return read_all(connection, seconds)

    def metric(self, name: str) -> float:
        """The sum over all labels."""
        lines = self.get("/metrics")[2].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def read_all(connection: socket.socket, seconds: float) -> bytes:
    connection.settimeout(seconds)
    got = b""
    try:
        while piece := connection.recv(1 << 16):
            got += piece
    except (TimeoutError, ConnectionResetError):
        pass
    return got


class Backend:
    """A TCP server that runs one function per connection, in a thread."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self._serve = serve
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection:
            try:
                self._serve(connection)
            except OSError:
                return

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def read_request(connection: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of one request with a Content-Length (or none)."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(1 << 16)
        if not piece:
            raise OSError("closed")
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(h.split(b":")[1]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), 0)
    while len(body) < length:
        body += connection.recv(1 << 16)
    return head, body
