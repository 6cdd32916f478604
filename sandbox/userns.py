"""User namespaces made ahead of time, to be joined by descriptor.

A namespace needs a process in it until somebody holds a descriptor of it, and its maps can be written once. A holder is that
process: forked while the launcher is idle, it waits; at launch its maps are written, its namespace opened, and it is killed.
"""

import contextlib
import os
import signal
from typing import Final

from sandbox import syscalls
from sandbox.plan import IdRange

HOLDERS: Final = 3
ENDED_MAX: Final = 4


class Holders:
    """A small stock of user namespaces without maps."""

    def __init__(self, size: int = HOLDERS) -> None:
        self._size = size
        self._pids: list[tuple[int, int]] = []
        self._ended: list[int] = []

    def refill(self) -> bool:
        """Make one more if one is missing; True where more are missing still."""
        self._ended = [pid for pid in self._ended if not _reaped(pid)]
        if len(self._pids) < self._size:
            self._pids.append(_hold())
        return len(self._pids) < self._size

    def take(self, uid_map: str, gid_map: str) -> int:
        """Return a descriptor of a user namespace with these maps; the caller owns it."""
        if len(self._ended) > ENDED_MAX:
            self._ended = [pid for pid in self._ended if not _reaped(pid)]
        pid, pidfd = self._pids.pop() if self._pids else _hold()
        try:
            # The order is free for a writer with CAP_SETGID in the parent namespace (user_namespaces(7)).
            _write(f"/proc/{pid}/gid_map", gid_map)
            _write(f"/proc/{pid}/uid_map", uid_map)
            return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            # Its memory is torn down while the launch goes on; reaped when there is time.
            _end(pidfd)
            self._ended.append(pid)

    def for_agent(self, ids: IdRange) -> int:
        line = f"0 {ids.start} {ids.size}"
        return self.take(line, line)

    def for_mount(self, *, disk_uid: int, disk_gid: int, host_uid: int, host_gid: int) -> int:
        """Return a namespace for an idmapped mount: files of the owner on disk belong to the agent's ids."""
        return self.take(f"{disk_uid} {host_uid} 1", f"{disk_gid} {host_gid} 1")

    def close(self) -> None:
        while self._pids:
            pid, pidfd = self._pids.pop()
            _end(pidfd)
            self._ended.append(pid)
        for pid in self._ended:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self._ended.clear()


def _hold() -> tuple[int, int]:
    pid, pidfd = syscalls.clone3(syscalls.CLONE_NEWUSER)
    if pid == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            # A holder outlives nobody and keeps no descriptor of another agent open.
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            syscalls.close_range(0)
            while True:
                signal.pause()
        finally:
            os._exit(1)
    return pid, pidfd


def _end(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        syscalls.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)


def _reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
