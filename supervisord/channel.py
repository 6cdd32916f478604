"""A channel to one of Stockade's own processes: packets of bytes, with descriptors.

SOCK_SEQPACKET keeps message borders, so there is no framing to get wrong (unix(7)).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from typing import TYPE_CHECKING, Final, TypeAlias

from supervisord.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PACKET_BYTES_MAX: Final = 1 << 20
QUEUED_PACKETS_MAX: Final = 4096
PACKETS_PER_WAKE: Final = 64
FDS_MAX: Final = 64

OnPacket: TypeAlias = "Callable[[bytes, list[int]], None]"


class Channel:
    """One end of a SEQPACKET connection served by the running event loop.

    `on_packet` gets each packet and owns its descriptors; `on_close` is called once, when the peer has gone or sent
    more than `packet_bytes_max`.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        name: str,
        on_packet: OnPacket,
        on_close: Callable[[], None],
        packet_bytes_max: int = PACKET_BYTES_MAX,
    ) -> None:
        self.name = name
        self._sock = sock
        self._on_packet = on_packet
        self._on_close = on_close
        self._bytes_max = packet_bytes_max
        self._queue: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._loop = asyncio.get_running_loop()
        self.closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Queue a packet; descriptors are duplicated when they have to wait, so the caller may close its own.

        Raises Unavailable when the peer has gone, is stuck, or the packet is too long.
        """
        if self.closed:
            raise Unavailable(f"cannot reach the {self.name}: it has gone", remedy="try again in a moment")
        if len(data) > self._bytes_max:
            raise Unavailable(
                f"cannot send {len(data)} bytes to the {self.name}: the limit is {self._bytes_max}",
                remedy="shorten the command or its environment",
            )
        if self._queue or not self._try_send(data, tuple(fds)):
            if len(self._queue) >= QUEUED_PACKETS_MAX:
                raise Unavailable(f"cannot reach the {self.name}: it does not read", remedy="see the daemon's journal")
            if not self._queue:
                self._loop.add_writer(self._sock.fileno(), self._writable)
            self._queue.append((data, tuple(os.dup(fd) for fd in fds)))

    def close(self) -> None:
        """Close this end; `on_close` is not called."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _, fds in self._queue:
            close_all(fds)
        self._queue.clear()

    def _try_send(self, data: bytes, fds: tuple[int, ...]) -> bool:
        try:
            if fds:
                socket.send_fds(self._sock, [data], list(fds), socket.MSG_NOSIGNAL)
            else:
                self._sock.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            self._lost()
            raise Unavailable(
                f"cannot reach the {self.name}: {error.strerror}", remedy="try again in a moment"
            ) from error
        return True

    def _writable(self) -> None:
        while self._queue:
            data, fds = self._queue[0]
            try:
                if not self._try_send(data, fds):
                    return
            except Unavailable:
                return  # _lost() has told the owner
            self._queue.popleft()
            close_all(fds)
        self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        for _ in range(PACKETS_PER_WAKE):
            if self.closed:
                return
            try:
                data, fds, flags, _ = socket.recv_fds(self._sock, self._bytes_max, FDS_MAX, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                self._lost()
                return
            if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                close_all(fds)
                self._lost()
                return
            self._on_packet(data, fds)

    def _lost(self) -> None:
        if not self.closed:
            self.close()
            self._on_close()


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
