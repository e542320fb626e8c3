"""What the daemon knows of publishers and endpoints, for gRPC, /debug/publishers and /readyz."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from kvindex.service import wire
from kvindex.service.pb import index_pb2 as pb


def pod_of(endpoint: str) -> str:
    """The pod of an endpoint: rank N is called `pod:dpN`."""
    pod, separator, rank = endpoint.rpartition(":dp")
    return pod if separator and rank.isdecimal() else endpoint


class SourceStatus(NamedTuple):
    """One socket or engine that is configured or was found, whether or not anything was heard from it."""

    source: str
    state: str  # connecting, connected, failed
    detail: str = ""


class Sources(Protocol):
    def sources(self) -> Sequence[SourceStatus]: ...

    def waiting_for(self) -> list[str]:
        """Configured sources that are not connected and whose deadline has not passed."""


class Status:
    def __init__(self, index: Any, sources: Sources, version: str) -> None:
        self._index, self._sources, self._version = index, sources, version

    def waiting_for(self) -> list[str]:
        return self._sources.waiting_for()

    def publishers_response(self) -> pb.PublishersResponse:
        response = pb.PublishersResponse(protocol=wire.PROTOCOL)
        for p in self._index.publishers():
            added = response.publishers.add(
                source=p.source,
                topic=p.topic or "",
                rank=p.rank,
                endpoint=p.endpoint,
                incarnation=p.incarnation,
                state=p.state,
                gaps=p.gaps,
                missing=p.missing,
                replays=p.replays,
                restarts=p.restarts,
                events=p.events,
                skipped=p.skipped,
                lag_seconds=p.lag_seconds,
            )
            if p.model is not None:
                added.model = p.model
            if p.last_sequence is not None:
                added.last_sequence = p.last_sequence
        for s in self._sources.sources():
            response.sources.add(source=s.source, state=s.state, detail=s.detail)
        return response

    def endpoints_response(self) -> pb.EndpointsResponse:
        response = pb.EndpointsResponse(protocol=wire.PROTOCOL, server_version=self._version)
        for e in self._index.endpoints():
            dense = [int(g["block_size"]) for g in e.groups if g["kind"] == "full"]
            added = response.endpoints.add(
                name=e.name, block_size=max(dense, default=0), state=e.state, lag_seconds=e.lag_seconds
            )
            if e.model is not None:
                added.model = e.model
            for group in e.groups:
                described = added.groups.add(group=group["group"], kind=group["kind"], block_size=group["block_size"])
                if group.get("window") is not None:
                    described.window = group["window"]
        return response
