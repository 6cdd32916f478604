"""How fast the action log is, beside what the disk below it does in the same run."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Final

from supervisord.actions.log import ActionLog
from supervisord.actions.types import Action

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

WRITERS: Final = 64
BATCH: Final = 64
SECONDS: Final = 2.0
BLOCK: Final = bytes(4096)


def act(number: int) -> Action:
    agent = f"ag_{number % 16:026d}"
    url = f"GET https://api.example.com/v1/{number % 500}"
    return Action(agent, f"agent:{agent}", "egress.request", url, "allowed", "", {"exchange": number})


def rates(directory: Path) -> dict[str, float]:
    """Entries or syncs a second, by name."""
    found = {"fdatasync of 4 KiB: per_second": syncs(directory / "sync")}
    for name, work in (
        (f"batched appends, {BATCH} a call", batched),
        (f"durable appends, {WRITERS} writers", durable),
    ):
        wall, cpu = asyncio.run(measured(directory / name.split(maxsplit=1)[0], work))
        found[f"{name}: per_second"] = wall
        found[f"{name}: per second of CPU"] = cpu  # what a quiet machine would come near to
    return found


def syncs(path: Path) -> float:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    count, began = 0, time.perf_counter()
    try:
        while time.perf_counter() - began < SECONDS:
            os.write(fd, BLOCK)
            os.fdatasync(fd)
            count += 1
    finally:
        os.close(fd)
    return count / (time.perf_counter() - began)


async def measured(directory: Path, work: Callable[[ActionLog, float], Awaitable[None]]) -> tuple[float, float]:
    log = ActionLog.open(directory, directory.with_suffix(".key"), now_ns=time.time_ns, checkpoint_every_entries=1000)
    try:
        began, used = time.perf_counter(), time.process_time()
        await work(log, began + SECONDS)
        return log.size / (time.perf_counter() - began), log.size / (time.process_time() - used)
    finally:
        await log.close()


async def batched(log: ActionLog, until: float) -> None:
    number = 0
    while time.perf_counter() < until:
        await log.append_all([act(number + offset) for offset in range(BATCH)])
        number += BATCH
        await asyncio.sleep(0)


async def durable(log: ActionLog, until: float) -> None:
    async def write(writer: int) -> None:
        number = writer
        while time.perf_counter() < until:
            await log.record(act(number))
            number += WRITERS

    await asyncio.gather(*map(write, range(WRITERS)))
