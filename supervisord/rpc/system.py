"""SystemService: version, the host's fitness, readiness."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeAlias

from stockade.v1 import system_pb2, system_pb2_grpc

from sandbox import doctor
from supervisord.callers import current_caller
from supervisord.errors import Unavailable
from supervisord.rpc import convert

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path

    import grpc

    from supervisord.backup import Backup
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
        backup: Backup | None = None,
    ) -> None:
        self._instance = instance
        self._host = doctor.Host(state_dir=state_dir)
        self._started_at_ns = started_at_ns
        self._health = health
        self._sinks = sinks
        self._backup = backup

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

    async def Backup(
        self, _request: system_pb2.BackupRequest, _context: Context
    ) -> AsyncIterator[system_pb2.BackupResponse]:
        if self._backup is None:
            raise Unavailable(
                "cannot back up: the daemon can only kill now", remedy="copy state_dir when it is stopped"
            )
        async with contextlib.aclosing(self._backup.pieces(current_caller().actor)) as pieces:
            async for path, data in pieces:
                yield system_pb2.BackupResponse(path=path, data=data)


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
