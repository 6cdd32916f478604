"""Which range of uids each agent has: claimed host-wide, so that two instances never give one range to two agents."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from sandbox.plan import IDS_PER_AGENT
from supervisord.errors import Exhausted

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class Slots:
    """Slots 0..`count`-1 from the id `first` on; a claim is a file in a directory that all instances of the host share.

    It is named after the range's first id by IDS_PER_AGENT, so that it means one range whatever part of the ids an
    instance may give. link(2) decides between two that want the same one, and a claim is never seen without its owner's
    name in it. Slots are taken in a circle, so a range rests as long as possible before another agent has it.
    """

    def __init__(self, directory: Path, *, instance: str, first: int, count: int) -> None:
        if first % IDS_PER_AGENT:
            raise ValueError(f"slots begin at a multiple of {IDS_PER_AGENT}, not at {first}")
        self._directory = directory
        self._instance = instance
        self._base: Final = first // IDS_PER_AGENT
        self._count: Final = count
        self._next = 0
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._owner = directory / f".{instance}"
        self._owner.write_text(instance)

    def claim(self) -> int:
        """A free slot; raises Exhausted when all are taken."""
        for _ in range(self._count):
            slot = self._next
            self._next = (self._next + 1) % self._count
            try:
                os.link(self._owner, self._claim(slot))
            except FileExistsError:
                continue
            return slot
        raise Exhausted(
            f"cannot launch: all {self._count} ranges of uids are in use", remedy="kill agents that are not needed"
        )

    def of_range(self, first_id: int) -> int:
        """The number by which an agent's range is known here: another one, also below 0, where `first` has changed."""
        return first_id // IDS_PER_AGENT - self._base

    def release(self, slot: int) -> None:
        self._claim(slot).unlink(missing_ok=True)

    def close(self) -> None:
        """Take the instance's own mark away where nothing is claimed by it any more."""
        if self._owner.exists() and self._owner.stat().st_nlink == 1:
            self._owner.unlink()

    def reconcile(self, live: Iterable[int]) -> None:
        """Give back what this instance claimed and no longer has."""
        kept = set(live)
        names = {self._claim(slot).name for slot in kept}
        for path in self._directory.iterdir():
            if path.name.isdigit() and path.name not in names and path.read_text(errors="replace") == self._instance:
                path.unlink(missing_ok=True)
        for slot in kept:
            with contextlib.suppress(FileExistsError):
                os.link(self._owner, self._claim(slot))
        self._next = (max(kept, default=-1) + 1) % self._count

    def _claim(self, slot: int) -> Path:
        return self._directory / str(self._base + slot)
