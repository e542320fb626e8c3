"""The processes of the demo: simulated engines, a daemon, routers. Started in order, stopped whatever happens."""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import IO, Any, NamedTuple

import yaml

from kvindex.errors import ServiceError

PR_SET_PDEATHSIG = 1  # linux/prctl.h: a child gets a signal when its parent dies, even by SIGKILL
START_SECONDS = 30.0
STOP_SECONDS = 5.0


class Engine(NamedTuple):
    name: str
    url: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str, seconds: float = 2.0, method: str = "GET") -> bytes:
    """The body of an answer; ServiceError when there is none."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=seconds) as answer:
            return bytes(answer.read())
    except (urllib.error.URLError, OSError) as error:
        raise ServiceError(f"{url}: {error}") from error


class Fleet:
    """Context manager. Logs and configs lie in `folder`, one file a process, for whoever wants to look."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._processes: list[tuple[str, subprocess.Popen[str]]] = []
        self._logs: list[IO[str]] = []

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: object) -> None:
        for _, process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for _, process in reversed(self._processes):
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for log in self._logs:
            log.close()

    def engine(self, name: str, options: list[str]) -> Engine:
        """Start a simulated engine and wait for the line that tells its address."""
        topic = f"kv@{name}@sim"
        process = self._start(name, ["sim", "--port", "0", "--topic", topic, "--json", *options])
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline() if ready else ""
        if not line:
            raise ServiceError(f"{name} did not start: {self._last_words(name)}")
        return Engine(name, str(json.loads(line)["url"]))

    def daemon(self, engines: list[Engine], model: pathlib.Path) -> tuple[str, str]:
        """Start a daemon that indexes `engines`; returns its gRPC address and its HTTP URL."""
        grpc, http = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        config: dict[str, Any] = {
            "engines": [{"url": engine.url} for engine in engines],
            "listen": {"grpc": grpc, "http": http},
            "tokenizers": {"sim": str(model)},
        }
        self._start("daemon", ["daemon", "-c", self._write("node.yaml", config)])
        self._wait("daemon", f"http://{http}/readyz")
        return grpc, f"http://{http}"

    def router(self, name: str, engines: list[Engine], model: pathlib.Path, index: object, policy: str) -> str:
        """Start a router over `engines`; returns its URL."""
        listen = f"127.0.0.1:{free_port()}"
        config: dict[str, Any] = {
            "listen": listen,
            "endpoints": [{"name": engine.name, "url": engine.url} for engine in engines],
            "index": index,
            "tokenizers": {"sim": str(model)},
            "scoring": {"policy": policy},
        }
        self._start(name, ["router", "-c", self._write(f"{name}.yaml", config)])
        self._wait(name, f"http://{listen}/readyz")
        return f"http://{listen}"

    def _write(self, name: str, config: dict[str, Any]) -> str:
        path = self.folder / name
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return str(path)

    def _start(self, name: str, arguments: list[str]) -> subprocess.Popen[str]:
        log = (self.folder / f"{name}.log").open("w")
        self._logs.append(log)
        process = subprocess.Popen(
            [sys.executable, "-m", "kvindex.service.cli", *arguments],
            stdout=subprocess.PIPE if arguments[0] == "sim" else log,
            stderr=log,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the demo only, which then stops everything in order
            preexec_fn=_die_with_parent,
        )
        self._processes.append((name, process))
        return process

    def _wait(self, name: str, url: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        process = self._processes[-1][1]
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            try:
                get(url)
                return
            except ServiceError:
                time.sleep(0.1)
        raise ServiceError(f"{name} did not become ready: {self._last_words(name)}")

    def _last_words(self, name: str) -> str:
        log = self.folder / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
        return f"see {log}\n" + "\n".join(lines)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1:
            os._exit(1)
