"""Real processes for the end-to-end test: engines, daemon, router. Started in groups of their own, always killed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

MAX_MODEL_LEN = 512
BLOCK_SIZE = 32

# Runs a command that the kernel kills when the thread that started it ends: a test run that is killed itself leaves
# nothing behind. (1 is PR_SET_PDEATHSIG, 9 is SIGKILL; an exec keeps the setting.)
_LEASH = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(what: str, check: Callable[[], T | None], seconds: float, pause: float = 0.05) -> T:
    """The first thing that `check` returns that is not None or False, or an error when the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not after {seconds:.0f} s")
        time.sleep(pause)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any


def call(port: int, path: str, body: Any = None, seconds: float = 60.0) -> Answer:
    """One HTTP request, on a connection of its own. A body is sent as JSON; an answer that is JSON is decoded."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        payload = None if body is None else json.dumps(body)
        method = "GET" if body is None else "POST"
        connection.request(method, path, payload, {"content-type": "application/json"} if payload else {})
        response = connection.getresponse()
        raw = response.read()
        headers = {name.lower(): value for name, value in response.getheaders()}
        is_json = headers.get("content-type", "").startswith("application/json")
        return Answer(response.status, headers, json.loads(raw) if is_json else raw)
    finally:
        connection.close()


def answers(port: int, path: str) -> bool:
    try:
        return call(port, path, seconds=5.0).status == 200
    except (OSError, http.client.HTTPException):
        return False


class Process:
    """One process and its children. Its output goes to a file that is shown when something is wrong."""

    def __init__(self, name: str, command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-c", _LEASH, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def wait_until_healthy(self, port: int, path: str, seconds: float) -> None:
        def check() -> bool:
            if not self.running:
                raise RuntimeError(f"{self.name} ended with {self._popen.returncode}:\n{self.tail()}")
            return answers(port, path)

        try:
            wait_for(f"{self.name} on port {port}", check, seconds, pause=0.5)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.tail()}") from None

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def kill(self) -> None:
        """kill -9 for the whole group, then reap."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(timeout=30)

    def terminate(self, seconds: float = 20.0) -> int:
        """SIGTERM and its exit status; what is left of the group afterwards is killed."""
        self._popen.terminate()
        try:
            return self._popen.wait(timeout=seconds)
        finally:
            self.kill()


class Engine:
    """One vLLM OpenAI server on CPU. It keeps its ports over a restart, like a pod that keeps its name."""

    def __init__(self, python: str, model: Path, blocks: int, folder: Path) -> None:
        self.name = model.name
        self.port, self.events_port, self.replay_port = free_ports(3)
        self._folder, self._restarts = folder, 0
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{self.events_port}",
            "replay_endpoint": f"tcp://*:{self.replay_port}",
            "topic": f"kv@{self.name}@{self.name}",
        }
        self._command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        self._command += ["--served-model-name", self.name, "--host", "127.0.0.1", "--port", str(self.port)]
        self._command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN)]
        self._command += ["--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(blocks)]
        self._command += ["--max-num-seqs", "8", "--enable-prompt-tokens-details"]
        self._command += ["--kv-events-config", json.dumps(events)]
        self.process: Process | None = None

    def start(self) -> None:
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        environment = {**quiet, **small, "VLLM_SERVER_DEV_MODE": "1"}  # dev mode: /reset_prefix_cache
        self.process = Process(f"engine-{self.name}-{self._restarts}", self._command, self._folder, environment)
        self._restarts += 1

    def wait(self, seconds: float = 180.0) -> None:
        assert self.process is not None
        self.process.wait_until_healthy(self.port, "/health", seconds)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()


def kvindex(name: str, arguments: list[str], folder: Path) -> Process:
    return Process(name, [sys.executable, "-m", "kvindex.service.cli", *arguments], folder)
