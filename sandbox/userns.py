"""User namespaces made ahead of time, to be joined by descriptor.

A namespace needs a process in it until somebody holds a descriptor of it, and its maps can be written once. A holder is
that process: forked while the launcher is idle, it waits; at launch its maps are written, its namespace opened, and it
is killed.
"""

import contextlib
import os
import signal
from typing import Final

from sandbox import syscalls
from sandbox.plan import IdRange

HOLDERS: Final = 3
USED_MAX: Final = 8


class Holders:
    """A small stock of user namespaces without maps."""

    def __init__(self, size: int = HOLDERS) -> None:
        self._size = size
        self._ready: list[tuple[int, int]] = []
        self._used: list[tuple[int, int]] = []

    def refill(self) -> bool:
        """Let go of those that were used, make one more if one is missing; True where more are missing still."""
        self._end_used()
        if len(self._ready) < self._size:
            self._ready.append(_hold())
        return len(self._ready) < self._size

    def take(self, uid_map: str, gid_map: str) -> int:
        """Return a descriptor of a user namespace with these maps; the caller owns it."""
        if len(self._used) > USED_MAX:
            self._end_used()
        pid, pidfd = self._ready.pop() if self._ready else _hold()
        # Ended when there is time: its memory would be torn down while the launch goes on.
        self._used.append((pid, pidfd))
        # The order is free for a writer with CAP_SETGID in the parent namespace (user_namespaces(7)).
        _write(f"/proc/{pid}/gid_map", gid_map)
        _write(f"/proc/{pid}/uid_map", uid_map)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)

    def for_agent(self, ids: IdRange) -> int:
        line = f"0 {ids.start} {ids.size}"
        return self.take(line, line)

    def for_mount(self, *, disk_uid: int, disk_gid: int, host_uid: int, host_gid: int) -> int:
        """Return a namespace for an idmapped mount: files of the owner on disk belong to the agent's ids."""
        return self.take(f"{disk_uid} {host_uid} 1", f"{disk_gid} {host_gid} 1")

    def close(self) -> None:
        self._used += self._ready
        self._ready.clear()
        self._end_used()

    def _end_used(self) -> None:
        for _, pidfd in self._used:
            with contextlib.suppress(ProcessLookupError):
                syscalls.pidfd_send_signal(pidfd, signal.SIGKILL)
        while self._used:
            pid, pidfd = self._used.pop()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            os.close(pidfd)


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


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
