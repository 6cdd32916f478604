"""The front door: the control socket, and a kernel-vouched name for everybody who comes through it.

gRPC tells a Python server nothing of a unix socket's peer (grpc/grpc#28755). So the door accepts, asks the kernel who
is there (SO_PEERCRED), and passes the bytes on to gRPC's private socket from a socket bound to a path made for this
connection: gRPC shows that path as the peer, and `peers` says who is behind it. No byte is looked at.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import struct
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Final, cast

import structlog

from supervisord.callers import Caller, Role, role, user_name
from supervisord.errors import Conflict, Unavailable

if TYPE_CHECKING:
    from pathlib import Path

    from supervisord.callers import Access

SO_PEERGROUPS: Final = 59  # asm-generic/socket.h; the socket module has no name for it
PEERGROUPS_BYTES_MAX: Final = 1024  # the most that socket.getsockopt takes: 256 groups
CONNECTIONS_PER_UID_MAX: Final = 128
CONNECTIONS_PER_READER_MAX: Final = 16
CONNECTIONS_MAX: Final = 1024
BACKLOG: Final = 256
BUFFERED_BYTES_MAX: Final = 256 * 1024
CONNECT_SECONDS_MAX: Final = 5.0
FULL_PAUSE_SECONDS: Final = 0.1
BACKLOG_PAUSE_SECONDS: Final = 0.005
ACCEPTS_PER_WAKE: Final = 32
SYSTEMD_FIRST_FD: Final = 3  # sd_listen_fds(3)

log = structlog.get_logger()


def peer_credentials(sock: socket.socket) -> tuple[int, int, int, frozenset[int]]:
    """(pid, uid, gid, all gids) of the process at the other end, as of its connect(2); see unix(7)."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, PEERGROUPS_BYTES_MAX)
    except OSError:  # ERANGE: somebody in more groups than fit counts by uid and primary group alone
        groups = b""
    supplementary = struct.unpack(f"{len(groups) // 4}I", groups)
    return pid, uid & 0xFFFFFFFF, gid & 0xFFFFFFFF, frozenset((gid & 0xFFFFFFFF, *supplementary))


def listening_socket(path: Path, *, mode: int = 0o600, gid: int = -1) -> socket.socket:
    """The control socket: the one systemd passed (sd_listen_fds(3)), else bound anew at `path`.

    Raises Conflict where another daemon answers there.
    """
    passed = os.environ.get("LISTEN_FDS") if os.environ.get("LISTEN_PID") == str(os.getpid()) else None
    if passed is not None and int(passed) >= 1:
        for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
            os.environ.pop(name, None)  # they are not meant for our children
        os.set_inheritable(SYSTEMD_FIRST_FD, False)
        sock = socket.socket(fileno=SYSTEMD_FIRST_FD)
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise Unavailable(
                "cannot serve the control socket: the descriptor that systemd passed is no unix stream socket",
                remedy="use ListenStream= with an absolute path in stockaded.socket",
            )
        sock.setblocking(False)
        return sock
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        sock.bind(str(path))
        # Nobody can connect before listen(2), so the permissions are in force before anyone comes.
        os.chown(path, -1, gid)
        path.chmod(mode)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise Unavailable(
            f"cannot serve the control socket {path}: {error.strerror}", remedy="check run_dir in stockade.toml"
        ) from error
    return sock


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise Conflict(
                f"cannot serve the control socket {path}: there is a file of that name and it is no socket",
                remedy="move it away or choose another run_dir in stockade.toml",
            )
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except OSError:
            pass  # a full backlog or a time-out: somebody is there
    raise Conflict(
        f"cannot serve the control socket {path}: another daemon answers there",
        remedy="stop it, or give this one another instance and run_dir in stockade.toml",
    )


class _Pipe(asyncio.Protocol):
    """One end of a spliced pair: what comes in goes to `other`, and nothing is read while `other` is full."""

    def __init__(self) -> None:
        self.other: _Pipe | None = None
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport
        self.ended = False
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=BUFFERED_BYTES_MAX)
        # gRPC greets at once. Python 3.11 may still read one time after this; `_early` takes what comes then.
        self.transport.pause_reading()

    def join(self, other: _Pipe) -> None:
        """Begin to pass on to `other`, which is connected."""
        self.other = other
        other.transport.writelines(self._early)
        self._early.clear()
        if self.gone.done():
            other.transport.close()
        elif self.ended:
            other.transport.write_eof()
        else:
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self._early.append(data)
        else:
            self.other.transport.write(data)

    def eof_received(self) -> bool:
        self.ended = True
        if self.other is not None:
            if self.other.ended:
                self.transport.close()
                self.other.transport.close()
            elif not self.other.transport.is_closing():
                self.other.transport.write_eof()
        return True  # the other direction may still have something to say

    def pause_writing(self) -> None:
        if self.other is not None and not self.other.transport.is_closing():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if not self.gone.done():
            self.gone.set_result(None)
        if self.other is not None:
            self.other.transport.close()


class FrontDoor:
    """Serves the control socket until closed.

    `private_path` is gRPC's own socket, in a directory of mode 0700 that holds nothing else of value.
    """

    def __init__(
        self,
        listener: socket.socket,
        private_path: Path,
        access: Access,
        *,
        connections_per_uid_max: int = CONNECTIONS_PER_UID_MAX,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        self.peers: dict[str, Caller] = {}
        self._listener = listener
        self._private = private_path
        self._access = access
        self._per_uid_max = connections_per_uid_max
        self._max = connections_max
        self._by_uid: Counter[int] = Counter()
        self._made = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def start(self) -> None:
        """Begin to accept; gRPC's server has to be listening on `private_path`."""
        # A daemon that was killed between bind(2) and unlink(2) has left a name, which one connection here would want.
        for left in self._private.parent.glob("c[0-9]*"):
            left.unlink(missing_ok=True)
        self._listen()

    def _listen(self) -> None:
        """Wait for who comes; needs no descriptor, and must not fail where there are none."""
        if not self._closed:
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    async def close(self) -> None:
        """Stop accepting and end every connection."""
        self._closed = True
        asyncio.get_running_loop().remove_reader(self._listener.fileno())
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_WAKE):
            try:
                sock, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of descriptors: an immediate retry would spin, since the connection stays pending.
                log.warning("cannot accept on the control socket", cause=error.strerror)
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._listener.fileno())
                loop.call_later(FULL_PAUSE_SECONDS, self._listen)
                return
            sock.setblocking(False)
            caller = self._admit(sock)
            if caller is None:
                sock.close()
                continue
            self._made += 1
            self._by_uid[caller.uid] += 1
            # Never reused, so that a path can only ever mean one connection.
            path = self._private.with_name(f"c{self._made}")
            task = asyncio.get_running_loop().create_task(self._serve(sock, caller, path))
            self._tasks.add(task)
            task.add_done_callback(partial(self._forget, sock, caller, path))

    def _forget(self, sock: socket.socket, caller: Caller, path: Path, task: asyncio.Task[None]) -> None:
        sock.close()
        self._tasks.discard(task)
        self.peers.pop(str(path), None)
        self._by_uid[caller.uid] -= 1
        if self._by_uid[caller.uid] == 0:
            del self._by_uid[caller.uid]

    def _admit(self, sock: socket.socket) -> Caller | None:
        pid, uid, gid, gids = peer_credentials(sock)
        granted = role(uid, gids, self._access)
        if granted is None:
            log.warning("refused a caller", uid=uid, gid=gid, pid=pid)
            return None
        # Root is not counted out: whoever fills the door must not keep an operator from the kill switch.
        most = min(self._per_uid_max, CONNECTIONS_PER_READER_MAX) if granted is Role.READER else self._per_uid_max
        if uid != 0 and (self._by_uid[uid] >= most or self._by_uid.total() >= self._max):
            log.warning("refused a caller: too many connections", uid=uid, pid=pid, connections=self._by_uid[uid])
            return None
        return Caller(uid=uid, gid=gid, pid=pid, role=granted, name=user_name(uid))

    async def _serve(self, sock: socket.socket, caller: Caller, path: Path) -> None:
        self.peers[str(path)] = caller
        closing: list[socket.socket | asyncio.Transport] = []
        try:
            loop = asyncio.get_running_loop()
            inner = _bound_socket(path)
            closing.append(inner)
            await _connect(inner, self._private)
            _, there = await loop.create_unix_connection(_Pipe, sock=inner)
            closing.append(there.transport)
            _, here = await loop.connect_accepted_socket(_Pipe, sock)
            closing.append(here.transport)
            here.join(there)
            there.join(here)
            await asyncio.gather(here.gone, there.gone)
        except OSError as error:
            log.warning("cannot pass a connection on to the API server", cause=error.strerror, uid=caller.uid)
        finally:
            for end in reversed(closing):  # a transport before the socket under it
                end.close()


async def _connect(sock: socket.socket, path: Path) -> None:
    async with asyncio.timeout(CONNECT_SECONDS_MAX):
        # unix(7): EAGAIN means that the backlog is full, and nothing says when it is not.
        while (error := sock.connect_ex(str(path))) == errno.EAGAIN:  # noqa: ASYNC110
            await asyncio.sleep(BACKLOG_PAUSE_SECONDS)
    if error:
        raise OSError(error, os.strerror(error), str(path))


def _bound_socket(path: Path) -> socket.socket:
    """A socket named `path`, of which no file is left: getpeername(2) needs none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(str(path))
        path.unlink()
    except BaseException:
        sock.close()
        raise
    return sock
