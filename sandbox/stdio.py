"""An agent's streams: bounded rotating files for what it writes, a bounded buffer for what it reads.

The bytes are never looked at here.
"""

# ruff: noqa: PTH104, PTH123 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import contextlib
import os
import time
from collections.abc import Callable
from typing import Final

from sandbox.loop import READ, WRITE, AnyLoop

CHUNK_BYTES: Final = 64 << 10
CHUNKS_PER_TURN: Final = 8  # then other descriptors have theirs
# What one stream is copied at most: beyond it the writer waits. A small read costs as much as this many bytes.
OUTPUT_BYTES_PER_SECOND_MAX: Final = 64 << 20
SLICE_SECONDS: Final = 0.05
READ_COST_BYTES_MIN: Final = 16 << 10
STDIN_BUFFER_BYTES_MAX: Final = 1 << 20


class RotatingFile:
    """A file of at most `bytes_max`; when full it becomes `NAME.1`, in place of an older one, and a new one begins.

    `NAME.base` says where the current file begins in the stream, and by its inode which file it speaks of: whoever
    reads along can tell a rotation that is under way from one that is done.
    """

    def __init__(self, path: str, bytes_max: int) -> None:
        self._path = path
        self._bytes_max = max(bytes_max, 1)
        self._fd = self._open()
        self._size = os.fstat(self._fd).st_size
        self._base = 0
        with contextlib.suppress(OSError, ValueError), open(path + ".base", encoding="ascii") as file:
            self._base = int(file.read(64).split()[0])

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self._path, flags, 0o600)

    def write(self, data: bytes) -> None:
        """Append; bytes that cannot be stored (file system full) are lost, the agent is not stopped by it."""
        view = memoryview(data)
        while view:
            if self._size >= self._bytes_max:
                self._rotate()
            part = view[: self._bytes_max - self._size]
            try:
                written = os.write(self._fd, part)
            except OSError:
                return
            self._size += written
            view = view[written:]

    def _rotate(self) -> None:
        os.rename(self._path, self._path + ".1")
        os.close(self._fd)
        self._base += self._size
        self._fd = self._open()
        self._size = 0
        temporary = self._path + ".base.new"
        with contextlib.suppress(OSError):
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(f"{self._base} {os.fstat(self._fd).st_ino}\n".encode())
            os.rename(temporary, self._path + ".base")

    def close(self) -> None:
        os.close(self._fd)


class Pump:
    """Copies from a pipe or terminal into a rotating file as it becomes readable, until its end. Owns both."""

    def __init__(self, loop: AnyLoop, fd: int, file: RotatingFile) -> None:
        self._loop = loop
        self.fd = fd
        self._file = file
        self._slice_end = 0.0
        self._slice_left = 0
        self.open = True
        os.set_blocking(fd, False)
        loop.watch(fd, READ, self._ready)

    def _ready(self, _events: int) -> None:
        now = time.monotonic()
        if now >= self._slice_end:
            self._slice_end = now + SLICE_SECONDS
            self._slice_left = int(OUTPUT_BYTES_PER_SECOND_MAX * SLICE_SECONDS)
        if not self._copy(CHUNKS_PER_TURN):
            self.close()
        elif self._slice_left <= 0:
            # Others have their turn, and the writer finds its pipe full.
            self._loop.forget(self.fd)
            self._loop.later(max(0.0, self._slice_end - now), self._go_on)

    def _go_on(self) -> None:
        if self.open:
            self._loop.watch(self.fd, READ, self._ready)

    def _copy(self, chunks: int) -> bool:
        """Copy what there is; False at the end of the stream."""
        for _ in range(chunks):
            try:
                data = os.read(self.fd, CHUNK_BYTES)
            except BlockingIOError:
                return True
            except OSError:
                return False  # EIO: the other side of a terminal is closed
            if not data:
                return False
            self._slice_left -= max(len(data), READ_COST_BYTES_MIN)
            self._file.write(data)
        return True

    def drain(self) -> None:
        """Copy what is left and close; for when every writer is dead. Bounded by what a pipe can hold."""
        if self.open:
            self._copy(1024)
            self.close()

    def close(self) -> None:
        if self.open:
            self.open = False
            self._loop.forget(self.fd)
            os.close(self.fd)
            self._file.close()


class Feed:
    """Writes into a pipe or terminal as it takes bytes; `written(ok)` tells when what was given is in. Owns it."""

    def __init__(self, loop: AnyLoop, fd: int, *, terminal: bool) -> None:
        self._loop = loop
        self._fd = fd
        self._terminal = terminal
        self._waiting: list[tuple[memoryview, Callable[[bool], None]]] = []
        self._bytes = 0
        self._watched = False
        self._end = False
        self.open = True
        os.set_blocking(fd, False)

    def give(self, data: bytes, *, eof: bool, written: Callable[[bool], None]) -> bool:
        """Queue; False where the buffer is full or the stream is closed already."""
        if not self.open or self._end or self._bytes + len(data) > STDIN_BUFFER_BYTES_MAX:
            return False
        if eof and self._terminal:
            data += b"\x04"  # what a person types: a terminal has no other end of input
        self._end = eof
        self._bytes += len(data)
        self._waiting.append((memoryview(data), written))
        self._write()
        return True

    def _write(self) -> None:
        while self._waiting:
            view, written = self._waiting[0]
            try:
                count = os.write(self._fd, view[:CHUNK_BYTES]) if view else 0
            except BlockingIOError:
                if not self._watched:
                    self._loop.watch(self._fd, WRITE, lambda _events: self._write())
                    self._watched = True
                return
            except OSError:
                self.close()
                return
            self._bytes -= count
            if count < len(view):
                self._waiting[0] = (view[count:], written)
                continue
            self._waiting.pop(0)
            written(True)
        if self._watched:
            self._loop.forget(self._fd)
            self._watched = False
        if self._end:
            self.close()

    def close(self) -> None:
        if self.open:
            self.open = False
            self._loop.forget(self._fd)
            with contextlib.suppress(OSError):
                os.close(self._fd)
            for _, written in self._waiting:
                written(False)
            self._waiting.clear()
