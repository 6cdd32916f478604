"""SystemService: version, the host's fitness, readiness."""

from __future__ import annotations

import asyncio
import os
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeAlias

from stockade.v1 import system_pb2, system_pb2_grpc

from sandbox import doctor
from supervisord.rpc import convert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import grpc

    from supervisord.sinks.feed import SinkState

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class SystemService(system_pb2_grpc.SystemServiceServicer):
    """`health` gives each part's readiness and a word on it."""

    def __init__(
        self,
        *,
        instance: str,
        state_dir: Path,
        started_at_ns: int,
        health: Callable[[], Mapping[str, tuple[bool, str]]],
        sinks: Callable[[], Sequence[SinkState]],
    ) -> None:
        self._instance = instance
        self._host = doctor.Host(state_dir=state_dir)
        self._started_at_ns = started_at_ns
        self._health = health
        self._sinks = sinks

    async def Version(self, _request: system_pb2.VersionRequest, _context: Context) -> system_pb2.VersionResponse:
        return system_pb2.VersionResponse(
            version=version("stockade"),
            instance=self._instance,
            kernel=os.uname().release,
            python=platform.python_version(),
            started_at=convert.timestamp(self._started_at_ns),
        )

    async def Doctor(self, _request: system_pb2.DoctorRequest, _context: Context) -> system_pb2.DoctorResponse:
        found = await asyncio.to_thread(doctor.probe, self._host)
        return convert.findings([*found, *map(_sink_finding, self._sinks())])

    async def Ready(self, _request: system_pb2.ReadyRequest, _context: Context) -> system_pb2.ReadyResponse:
        health = self._health()
        return system_pb2.ReadyResponse(
            ready=all(ready for ready, _ in health.values()),
            components=[
                system_pb2.Component(name=name, ready=ready, detail=detail) for name, (ready, detail) in health.items()
            ],
        )


def _sink_finding(state: SinkState) -> doctor.Finding:
    return doctor.Finding(
        control=f"log sink {state.name}",
        present=not state.failing,
        how=state.cause or f"{state.kind}: delivered up to entry {state.delivered_seq}, {state.behind} behind",
        remedy="look after what receives it; nothing is lost meanwhile" if state.failing else "",
        required=False,
        source="the daemon",
        protects="the copy of the action log elsewhere",
        absence="advice",
    )
