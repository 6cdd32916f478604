"""What agents wrote, read back from the launcher's files: opaque bytes, in chunks, by offset.

A stream is a file and, once that was full, the one before it (`NAME.1`); `NAME.base` says where the current file
begins, counted from the first byte the agent wrote (sandbox/stdio.py writes them). Older output is gone, and an
offset that jumps says so.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

CHUNK_BYTES_MAX: Final = 64 * 1024
POLL_SECONDS_FIRST: Final = 0.002
POLL_SECONDS_MAX: Final = 0.05
ROTATIONS_WAITED_MAX: Final = 100

_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Chunk:
    """`data` of `stream` ("stdout" or "stderr"), which begins at `offset`."""

    stream: str
    offset: int
    data: bytes


class Tail:
    """Reads one stream from an offset on, over rotations."""

    def __init__(self, path: Path, *, stream: str, offset: int = 0) -> None:
        self._path = path
        self._stream = stream
        self._offset = offset
        self._fd: int | None = None
        self._base = 0

    def read(self) -> Chunk | None:
        """The next chunk, or None where there is no more for now."""
        for _ in range(3):  # the previous file, the current one, and one that a rotation made meanwhile
            if self._fd is None and not self._open():
                return None
            assert self._fd is not None  # noqa: S101 - _open said so
            data = os.pread(self._fd, CHUNK_BYTES_MAX, self._offset - self._base)
            if data:
                chunk = Chunk(self._stream, self._offset, data)
                self._offset += len(data)
                return chunk
            if self._is_current():
                return None
            self.close()
        return None

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> bool:
        """Open the file that holds the offset, or the oldest that is left."""
        for _ in range(ROTATIONS_WAITED_MAX):
            opened = self._open_current()
            if opened is None:
                return False
            self._fd, self._base = opened
            if self._offset >= self._base or self._open_previous():
                return True
            self.close()  # it was rotated while we looked
        return False

    def _open_previous(self) -> bool:
        """Go to the file before the current one; where it is gone, begin with the current one."""
        assert self._fd is not None  # noqa: S101 - the caller opened it
        try:
            previous = os.open(f"{self._path}.1", _FLAGS)
        except FileNotFoundError:
            self._offset = self._base
            return True
        if not self._is_current():
            os.close(previous)
            return False
        os.close(self._fd)
        self._fd, self._base = previous, self._base - os.fstat(previous).st_size
        self._offset = max(self._offset, self._base)
        return True

    def _open_current(self) -> tuple[int, int] | None:
        """The current file and where it begins in the stream; None where there is none that is sure."""
        for _ in range(ROTATIONS_WAITED_MAX):
            try:
                fd = os.open(self._path, _FLAGS)
            except FileNotFoundError:
                return None
            try:
                base, inode = self._path.with_name(f"{self._path.name}.base").read_text().split()
            except (FileNotFoundError, ValueError):
                if not os.path.exists(f"{self._path}.1"):  # noqa: PTH110 - no Path of a name that is a suffix away
                    return fd, 0  # never rotated
                base, inode = "0", "0"
            if int(inode) == os.fstat(fd).st_ino:
                return fd, int(base)
            os.close(fd)  # a rotation is under way
        return None

    def _is_current(self) -> bool:
        assert self._fd is not None  # noqa: S101 - callers have it open
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return False  # a rotation is under way
        ours = os.fstat(self._fd)
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


async def follow(tails: list[Tail], *, ended: asyncio.Event | None) -> AsyncIterator[Chunk]:
    """Every chunk of all tails; with `ended`, until that is set and everything before it was read, else once over.

    The files are read and not watched: a look costs some microseconds, and the pause grows while nothing comes.
    """
    pause = POLL_SECONDS_FIRST
    try:
        while True:
            last = ended is None or ended.is_set()
            idle = True
            for tail in tails:
                while (chunk := tail.read()) is not None:
                    idle = False
                    yield chunk
            if last:
                return
            pause = min(pause * 2, POLL_SECONDS_MAX) if idle else POLL_SECONDS_FIRST
            assert ended is not None  # noqa: S101 - else it was the last round
            try:
                async with asyncio.timeout(pause):
                    await ended.wait()
            except TimeoutError:
                continue
    finally:
        for tail in tails:
            tail.close()
