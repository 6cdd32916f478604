"""User namespaces made ahead of time, to be joined by descriptor.

A namespace needs a process in it until somebody holds a descriptor of it, and its maps can be written once. A holder is
that process: forked while the launcher is idle, it waits; when it hears whose it is to be it makes the namespace as its
owner, its maps are written, the namespace is opened, and it is killed. That is at the launch, or ahead of it for those
ids that are given out next.
"""

import contextlib
import errno
import gc
import os
import signal
import socket
import struct
from dataclasses import dataclass
from typing import Final, NoReturn

from sandbox import confine, syscalls
from sandbox.plan import AGENT_ID_LAST, OWNER_INSIDE, IdRange

HOLDERS: Final = 3
USED_MAX: Final = 8
MAKE_SECONDS_MAX: Final = 5.0
_NO_SETUID_FIXUP: Final = 1 << 2  # capabilities(7)
_OWNER: Final = struct.Struct("<I")
_MADE: Final = b"\0\0\0\0"


@dataclass(frozen=True, slots=True)
class _Holder:
    pid: int
    pidfd: int
    control: socket.socket


class Holders:
    """A small stock of processes that each make a user namespace when they hear whose it is to be.

    The owner matters: what a namespace uses of things that the kernel counts per user (inotify instances, message
    queues, pending signals, namespaces; ucounts) is charged to its owner above it as well. Were that root, one agent
    could use up what root of the host and every other agent may have.
    """

    def __init__(self, size: int = HOLDERS) -> None:
        self._size = size
        self._ready: list[_Holder] = []
        self._used: list[_Holder] = []
        self.made = 0
        # Id ranges are given out one after the other: the next agent most often has the one after the last.
        self._next: IdRange | None = None
        self._ahead: dict[int, int] = {}

    def refill(self) -> bool:
        """Let go of those that were used, make one more if one is missing; True where more are missing still."""
        self.end_used()
        if self._next is not None and self._next.start not in self._ahead:
            self._make_ahead(self._next)
        if len(self._ready) < self._size:
            try:
                self._ready.append(_hold())
            except OSError:
                return False  # no room for a process: a launch tells of it, if it lasts
            self.made += 1
        return len(self._ready) < self._size

    def _make_ahead(self, ids: IdRange) -> None:
        self._forget_ahead()
        try:
            self._ahead[ids.start] = self._begin(ids.host(OWNER_INSIDE)).for_agent(ids)
            self.end_used()  # it has an id of an agent that is not there yet
        except OSError:
            self._next = None  # a launch tells of the problem, if it lasts

    def _forget_ahead(self) -> None:
        while self._ahead:
            os.close(self._ahead.popitem()[1])

    def begin(self, ids: IdRange) -> "Making | Ahead":
        """Have the namespace of an agent made, unless there is one for these ids; to be finished, or let be."""
        after = ids.start + ids.size
        self._next = IdRange(after) if after + ids.size - 1 <= AGENT_ID_LAST else None
        if ids.start in self._ahead:
            return Ahead(self._ahead)
        return self._begin(ids.host(OWNER_INSIDE))

    def _begin(self, owner: int) -> "Making":
        """Have one make its namespace, owned by this host id."""
        if len(self._used) > USED_MAX:
            self.end_used()
        holder = self._ready.pop() if self._ready else _hold()
        # Ended when there is time: its memory would be torn down while the launch goes on.
        self._used.append(holder)
        holder.control.send(_OWNER.pack(owner))
        return Making(holder.pid, holder.control)

    def for_mount(self, *, disk_uid: int, disk_gid: int, host_uid: int, host_gid: int) -> int:
        """Return a namespace for an idmapped mount: files of the owner on disk belong to the agent's ids."""
        # Nothing ever runs in it: whose it is does not matter.
        return self._begin(0).finish(f"{disk_uid} {host_uid} 1", f"{disk_gid} {host_gid} 1")

    def close(self) -> None:
        self._forget_ahead()
        self._used += self._ready
        self._ready.clear()
        self.end_used()

    def end_used(self) -> None:
        """Let go of the processes whose namespaces are in use: each has an id of its agent's."""
        for holder in self._used:
            with contextlib.suppress(ProcessLookupError):
                syscalls.pidfd_send_signal(holder.pidfd, signal.SIGKILL)
        while self._used:
            holder = self._used.pop()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(holder.pid, 0)
            os.close(holder.pidfd)
            holder.control.close()


@dataclass(frozen=True, slots=True)
class Making:
    """A namespace that is being made while the launch goes on with other things."""

    _pid: int
    _control: socket.socket

    def finish(self, uid_map: str, gid_map: str) -> int:
        """Return a descriptor of the namespace with these maps; the caller owns it."""
        answer = self._control.recv(4)
        if answer != _MADE:
            number = int.from_bytes(answer, "little") if answer else errno.ECHILD
            raise OSError(number, os.strerror(number))
        # The order is free for a writer with CAP_SETGID in the parent namespace (user_namespaces(7)).
        _write(f"/proc/{self._pid}/gid_map", gid_map)
        _write(f"/proc/{self._pid}/uid_map", uid_map)
        return os.open(f"/proc/{self._pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)

    def for_agent(self, ids: IdRange) -> int:
        line = f"0 {ids.start} {ids.size}"
        fd = self.finish(line, line)
        # It can be written once, by anybody inside (user_namespaces(7)): taken.
        _write(f"/proc/{self._pid}/projid_map", f"0 {ids.start} 1")
        return fd


@dataclass(frozen=True, slots=True)
class Ahead:
    """One that is made already; it stays in the stock until it is taken."""

    _stock: dict[int, int]

    def for_agent(self, ids: IdRange) -> int:
        return self._stock.pop(ids.start)


def _hold() -> _Holder:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(MAKE_SECONDS_MAX)
    try:
        pid, pidfd = syscalls.clone3(0)
    except OSError:
        ours.close()
        theirs.close()
        raise
    if pid == 0:
        _live(theirs)
    theirs.close()
    return _Holder(pid, pidfd, ours)


def _live(control: socket.socket) -> NoReturn:
    try:
        gc.disable()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # A holder outlives nobody and keeps no descriptor of another agent open.
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        fd = control.fileno()
        syscalls.close_range(0, fd - 1)
        syscalls.close_range(fd + 1)
        # What a namespace allows is what its maker had (ucounts): nothing of it is the launcher's.
        confine.limit_counted()
        # Capabilities outlast the change of id: hosts that keep user namespaces from users ask for CAP_SYS_ADMIN.
        syscalls.prctl(syscalls.PR_SET_SECUREBITS, _NO_SETUID_FIXUP)
        confine.rehearse()
        order = control.recv(_OWNER.size)
        if not order:
            os._exit(0)
        (owner,) = _OWNER.unpack(order)
        try:
            if owner:
                os.setresgid(owner, owner, owner)
                os.setresuid(owner, owner, owner)
                # The change of id took it away (prctl(2)).
                syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            syscalls.unshare(syscalls.CLONE_NEWUSER)
        except OSError as error:
            control.send((error.errno or errno.EIO).to_bytes(4, "little"))
        else:
            control.send(_MADE)
        while True:
            signal.pause()
    finally:
        os._exit(1)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
