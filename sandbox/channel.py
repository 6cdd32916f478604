"""The launcher's channel: who is connected, heard and told. What does not fit into a socket waits in a bounded queue.

The peer must be root (SO_PEERCRED, unix(7)). What the messages say is in `serve.py`.
"""

import contextlib
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from sandbox import sync
from sandbox.loop import READ, WRITE, Loop

CONNECTIONS_MAX: Final = 64
QUEUE_MAX: Final = 8192  # messages; a daemon that reads none for so long has to connect anew
TOLD_QUEUED_MAX: Final = 256  # of some KiB each, and agents say how many there are
ACCEPT_PAUSE_SECONDS: Final = 0.1

# Takes an error, or descriptors and the fields of what was asked for; called once a request.
Answer = Callable[..., None]
Heard = Callable[["Connection", dict[str, Any], list[int]], None]


class Connection:
    """One peer, which is heard and told; `flushed` is called when nothing waits for it any more.

    `heard` gets a message with its descriptors, which are closed when it returns.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        *,
        heard: Heard,
        flushed: Callable[[], None],
        closed: "Callable[[Connection], None]",
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._heard = heard
        self._flushed = flushed
        self._closed = closed
        self._queue: deque[tuple[dict[str, Any], list[int]]] = deque()
        self.greeted = False  # it said hello: it is told of everything
        sock.setblocking(False)
        sync.enlarge(sock)
        loop.watch(sock.fileno(), READ, self._ready)

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & ~WRITE and self._sock.fileno() >= 0:
            self._read()

    def _read(self) -> None:
        try:
            message, fds = sync.receive(self._sock)
        except BlockingIOError:
            return
        except (OSError, ValueError):
            message, fds = None, []
        if message is None:
            self.close()
            return
        try:
            self._heard(self, message, fds)
        finally:
            sync.close_all(fds)

    def send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Send now or later; descriptors are duplicated where they have to wait."""
        if self._sock.fileno() < 0:
            return
        if not self._queue:
            try:
                sync.send(self._sock, message, fds)
            except BlockingIOError:
                self._loop.change(self._sock.fileno(), READ | WRITE)
            except OSError:
                self.close()
                return
            else:
                return
        self._queue.append((message, [os.dup(fd) for fd in fds]))
        if len(self._queue) > QUEUE_MAX:
            self.close()

    @property
    def behind(self) -> bool:
        """Whether so much waits for its peer that what agents have told is kept for later, as a bounded number."""
        return len(self._queue) > TOLD_QUEUED_MAX

    def _flush(self) -> None:
        while self._queue:
            message, fds = self._queue[0]
            try:
                sync.send(self._sock, message, fds)
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            self._queue.popleft()
            sync.close_all(fds)
        self._loop.change(self._sock.fileno(), READ)
        self._flushed()

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.forget(self._sock.fileno())
            self._sock.close()
            while self._queue:
                sync.close_all(self._queue.popleft()[1])
            self._closed(self)


class Channel:
    """Everybody who is connected.

    `flushed` is called when nothing waits for somebody any more, `left` when the last who had said hello has gone.
    """

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        *,
        heard: Heard,
        flushed: Callable[[], None],
        left: Callable[[], None],
    ) -> None:
        self.connections: set[Connection] = set()
        self._loop = loop
        self._listener = listener
        self._heard = heard
        self._flushed = flushed
        self._left = left
        listener.setblocking(False)
        self._listen()

    def _listen(self) -> None:
        self._loop.watch(self._listener.fileno(), READ, self._accept)

    def _accept(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    raise
                # Who waits is served when descriptors are free again; asking at once would only keep this busy.
                self._loop.forget(self._listener.fileno())
                self._loop.later(ACCEPT_PAUSE_SECONDS, self._listen)
                return
            _, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid != 0 or len(self.connections) >= CONNECTIONS_MAX:
                sock.close()
                return
            self.add(sock)

    def add(self, sock: socket.socket) -> Connection:
        """Hear and tell a peer from now on."""
        connection = Connection(self._loop, sock, heard=self._heard, flushed=self._flushed, closed=self._closed)
        self.connections.add(connection)
        return connection

    def _closed(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if connection.greeted and not self.greeted:
            self._left()

    @property
    def greeted(self) -> list[Connection]:
        """Those who are told of events: they have said hello."""
        return [connection for connection in self.connections if connection.greeted]

    def broadcast(self, event: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        for connection in self.greeted:
            connection.send(event, fds)
