"""How long what ended agents wrote is kept: the newest, as far as room and time allow.

Output lies below the run directory, which is memory on most hosts and holds the sockets of this instance too: without a
limit, agents that come and go fill it, and nothing can be launched any more. Agents that live are bounded by their own
limit (`limits.output`) and never touched here.
"""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

log = structlog.get_logger()

SWEEP_SECONDS: Final = 60.0
SETTLE_SECONDS: Final = 1.0  # agents that end together are looked at once
SHARE_OF_DISK: Final = 4  # at most a quarter of the file system, whatever the configuration says
DIRECTORIES_MAX: Final = 2048  # as many as the daemon remembers (agents.ENDED_AGENTS_KEPT_MAX)


@dataclass(frozen=True, slots=True)
class Left:
    """What one ended agent left; `ended_s` is when the last of it was written, in seconds since 1970."""

    name: str
    bytes: int
    ended_s: float


def surplus(left: Iterable[Left], *, bytes_max: int, seconds_max: float, now_s: float) -> list[str]:
    """Names of those to remove, the oldest first: too old, too many, or beyond the room there is (pure)."""
    newest = sorted(left, key=lambda each: each.ended_s, reverse=True)
    remove: list[str] = []
    total = 0
    for index, each in enumerate(newest):
        total += each.bytes
        if index >= DIRECTORIES_MAX or total > bytes_max or now_s - each.ended_s > seconds_max:
            remove.append(each.name)
            total -= each.bytes
    return remove[::-1]


class Retention:
    """Removes what ended agents left in `directory`; `live` tells which are not to be touched."""

    def __init__(
        self,
        directory: Path,
        *,
        bytes_max: int,
        seconds_max: float,
        live: Callable[[], Iterable[str]],
        now_s: Callable[[], float],
    ) -> None:
        self._directory = directory
        self._bytes_max = bytes_max
        self._seconds_max = seconds_max
        self._live = live
        self._now_s = now_s
        self._wanted = asyncio.Event()

    def agent_ended(self) -> None:
        self._wanted.set()

    async def keep_forever(self) -> None:
        """Sweep when an agent has ended, and now and then; runs as long as the daemon."""
        while True:
            try:
                await self.sweep()
            except OSError as error:
                log.error("cannot remove output of ended agents", cause=str(error))
            try:
                async with asyncio.timeout(SWEEP_SECONDS):
                    await self._wanted.wait()
            except TimeoutError:
                continue
            self._wanted.clear()
            await asyncio.sleep(SETTLE_SECONDS)

    async def sweep(self) -> list[str]:
        """Remove what is beyond the limits; gives the ids of the agents whose output it was."""
        # Seen before who lives: a launch that begins meanwhile is not in the list.
        names = await asyncio.to_thread(self._names)
        live = set(self._live())
        ended = [name for name in names if name not in live]
        return await asyncio.to_thread(self._remove, ended)

    def _names(self) -> list[str]:
        return [entry.name for entry in self._directory.iterdir()] if self._directory.is_dir() else []

    def _remove(self, ended: Sequence[str]) -> list[str]:
        room = shutil.disk_usage(self._directory).total // SHARE_OF_DISK
        left = [found for name in ended if (found := _left(self._directory / name)) is not None]
        remove = surplus(left, bytes_max=min(self._bytes_max, room), seconds_max=self._seconds_max, now_s=self._now_s())
        for name in remove:
            shutil.rmtree(self._directory / name, ignore_errors=True)
        if remove:
            log.info("removed output of ended agents", agents=len(remove))
        return remove


def _left(directory: Path) -> Left | None:
    """Gives None where it went away meanwhile, and where its agent may be on its way still."""
    size, last = 0, 0.0
    try:
        if not (directory / "state.json").exists():
            return None
        for entry in directory.iterdir():
            status = entry.lstat()
            size += status.st_blocks * 512
            last = max(last, status.st_mtime)
    except OSError:
        return None
    return Left(directory.name, size, last)
