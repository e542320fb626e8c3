"""kvindex in front of real engines: a daemon that listens to them and a router that asks it, as processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from kvindex.service.pb import index_pb2
from tests.vllm.servers import Answer, Engine, call, free_ports, kvindex, wait_for


class Fleet:
    """Configures, starts and asks. Endpoints are named like their engines."""

    def __init__(self, engines: Sequence[Engine], models: Path, folder: Path) -> None:
        self.engines = list(engines)
        grpc_port, self.http_port, self.router_port = free_ports(3)
        node = {
            "listen": {"grpc": f"127.0.0.1:{grpc_port}", "http": f"127.0.0.1:{self.http_port}"},
            "engines": [{"url": f"http://127.0.0.1:{e.port}", "name": e.name, "model": e.name} for e in engines],
            "probe_interval_seconds": 1.0,
        }
        router = {
            "listen": f"127.0.0.1:{self.router_port}",
            "endpoints": [{"name": e.name, "url": f"http://127.0.0.1:{e.port}", "model": e.name} for e in engines],
            "tokenizers": {e.name: str(models / e.name) for e in engines},
            "index": {"grpc": f"127.0.0.1:{grpc_port}", "timeout_seconds": 5.0},
        }
        (folder / "node.yaml").write_text(json.dumps(node))
        (folder / "router.yaml").write_text(json.dumps(router))
        self.daemon = kvindex("daemon", ["daemon", "-c", str(folder / "node.yaml")], folder)
        self.router = kvindex("router", ["router", "-c", str(folder / "router.yaml")], folder)
        self._channel = grpc.insecure_channel(f"127.0.0.1:{grpc_port}")

    def wait(self) -> None:
        self.daemon.wait_until_healthy(self.http_port, "/metrics", 60)
        self.router.wait_until_healthy(self.router_port, "/health", 60)
        wait_for("the daemon connected to every engine", self._connected, 60)

    def close(self) -> None:
        self._channel.close()
        for process in (self.router, self.daemon):
            process.kill()

    def predict(self, engine: Engine, tokens: Sequence[int], salt: str | None) -> int:
        """How many tokens the daemon says that this endpoint has of the prompt."""
        packed = np.asarray(tokens, "<u4").tobytes()
        request = index_pb2.ScoreRequest(token_ids=packed, model=engine.name, cache_salt=salt)
        scores = self._ask("Score", request, index_pb2.ScoreResponse)
        return int(dict(zip(scores.endpoints, scores.tokens, strict=True)).get(engine.name, 0))

    def publisher(self, engine: Engine) -> Any | None:
        """What the daemon knows of this engine's stream."""
        response = self._ask("Publishers", index_pb2.PublishersRequest(), index_pb2.PublishersResponse)
        return next((p for p in response.publishers if p.endpoint == engine.name), None)

    def caught_up(self, engine: Engine, sequence: int, seconds: float = 20.0) -> None:
        """Wait until the daemon has taken this message of the engine."""

        def check() -> bool:
            known = self.publisher(engine)
            return known is not None and known.HasField("last_sequence") and known.last_sequence >= sequence

        wait_for(f"the daemon took message {sequence} of {engine.name}", check, seconds, pause=0.01)

    def send(self, path: str, body: dict[str, Any], seconds: float = 120.0) -> Answer:
        return call(self.router_port, path, body, seconds)

    def _connected(self) -> bool:
        response = self._ask("Publishers", index_pb2.PublishersRequest(), index_pb2.PublishersResponse)
        return sum(source.state == "connected" for source in response.sources) >= len(self.engines)

    def _ask(self, method: str, request: Any, response: Any) -> Any:
        ask = self._channel.unary_unary(
            f"/kvindex.v1.IndexService/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        return ask(request, timeout=20.0, wait_for_ready=True)
