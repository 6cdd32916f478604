"""A SOCK_SEQPACKET channel on an event loop: whole frames and descriptors in, whole frames and descriptors out."""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
from collections import deque
from typing import TYPE_CHECKING, Final

from gateway_client.egress.codec import frame_bytes_max

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

descriptors_per_frame_max: Final = 4
queued_frames_max: Final = 65536
frames_per_turn_max: Final = 64

_log: Final = logging.getLogger(__name__)

_INT_BYTES: Final = array.array("i").itemsize


class Link:
    """Sends and receives frames; `on_frame(frame, fds)` owns the descriptors, `on_gone()` is called once."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        endpoint: socket.socket,
        *,
        on_frame: Callable[[bytes, list[int]], None],
        on_gone: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._socket = endpoint
        self._on_frame = on_frame
        self._on_gone = on_gone
        self._queue: deque[tuple[bytes, int | None]] = deque()
        self.gone = False
        endpoint.setblocking(False)
        loop.add_reader(endpoint.fileno(), self._readable)

    def send(self, frame: bytes, *, fd: int | None = None) -> None:
        """Send a frame, now or when the peer takes it; a descriptor beside it is duplicated, not taken."""
        if self.gone:
            return
        if not self._queue and self._try_send(frame, fd):
            return
        if len(self._queue) >= queued_frames_max:
            self.close()
            return
        if not self._queue:
            self._loop.add_writer(self._socket.fileno(), self._writable)
        self._queue.append((frame, None if fd is None else os.dup(fd)))

    def _try_send(self, frame: bytes, fd: int | None) -> bool:
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            self._socket.sendmsg([frame], rights, socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            self.close()
        return True

    def _writable(self) -> None:
        while self._queue:
            frame, fd = self._queue[0]
            if not self._try_send(frame, fd):
                return
            if self.gone:
                return
            self._queue.popleft()
            if fd is not None:
                os.close(fd)
        self._loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        for _ in range(frames_per_turn_max):
            try:
                frame, ancillary, flags, _ = self._socket.recvmsg(
                    frame_bytes_max + 1,
                    socket.CMSG_SPACE(descriptors_per_frame_max * _INT_BYTES),
                    socket.MSG_CMSG_CLOEXEC,
                )
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.close()
                return
            fds = _descriptors(ancillary)
            if flags & socket.MSG_CTRUNC and frame:
                # No descriptor is free here: the frame holds, and whoever misses its descriptor says so for that one.
                _log.error("a descriptor could not be received: too many are open")
            if not frame or flags & socket.MSG_TRUNC:
                for fd in fds:
                    os.close(fd)
                self.close()
                return
            self._on_frame(frame, fds)
            if self.gone:
                return

    def close(self) -> None:
        """Close the channel; `on_gone` is called, once, from the loop."""
        if self.gone:
            return
        self.gone = True
        self._loop.remove_reader(self._socket.fileno())
        if self._queue:
            self._loop.remove_writer(self._socket.fileno())
        for _, fd in self._queue:
            if fd is not None:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._queue.clear()
        self._socket.close()
        self._loop.call_soon(self._on_gone)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % _INT_BYTES])
            fds += numbers
    return fds
