"""Who keeps the memory that a process leaves behind at `execve`, so that the kernel need not take it down first.

That took 1 to 2 ms of each launch, for some 4,000 pages of the interpreter that built the sandbox (ADR 22). The keeper
is a sibling that shares this memory, is as confined as its maker, does nothing, and is ended soon after.
"""

import contextlib
import os
import signal
import socket
from typing import TYPE_CHECKING, Final

from sandbox import examine, syscalls
from sandbox.plan import Limits

if TYPE_CHECKING:
    from sandbox.loop import AnyLoop

# With less it is in the way of what the agent may have: it counts as a process, and 2 MB of what it keeps as memory. A
# program that at once takes what there is would be refused, or killed.
PIDS_LEAST: Final = 64
MEMORY_BYTES_LEAST: Final = 64 << 20
LIVES_MICROSECONDS: Final = 1_000_000  # where nobody ends it; an exec later than that takes its time
END_SECONDS: Final = 0.005  # after execve: by then the program has begun, and what it left is taken down beside it
LOOK_SECONDS: Final = 1.0


def has_room(limits: Limits) -> bool:
    return limits.pids >= PIDS_LEAST and limits.memory_bytes >= MEMORY_BYTES_LEAST


def keep_memory() -> int:
    """Have a sibling share this process's memory; returns its pidfd, -1 where there is none, which only costs time.

    The sibling is what this process is by now: same ids, no capabilities, same filter, and nobody of these ids may look
    into it (PR_SET_DUMPABLE is a property of the memory).
    """
    try:
        for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET):  # whoever has a keeper needs one next
            end.close()
        return syscalls.sleeper(syscalls.CLONE_PARENT, LIVES_MICROSECONDS)
    except OSError:
        return -1


class Keeper:
    """One agent's keeper as the launcher holds it, from `hold` on."""

    def __init__(self) -> None:
        self._pidfd = -1
        self._loop: AnyLoop | None = None

    def hold(self, loop: "AnyLoop", pidfd: int) -> None:
        """Own its pidfd until it has ended, which it may do at any time: by itself, or because the agent ended it."""
        self._loop, self._pidfd = loop, pidfd
        loop.watch(pidfd, 1, lambda _events: self._ended())

    def end(self) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(OSError):
                syscalls.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def pid(self) -> int:
        """Return its pid, 0 where there is none any more: it is ours, and no process of the agent."""
        with contextlib.suppress(OSError):
            return examine.pid_of(self._pidfd) if self._pidfd >= 0 else 0
        return 0

    def drop(self) -> None:
        """Let go of its pidfd."""
        if self._pidfd >= 0 and self._loop is not None:
            self._loop.forget(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _ended(self) -> None:
        if self._loop is not None and self.pid():  # not reaped, and counted: pid 1 may be frozen
            self._loop.forget(self._pidfd)
            self._loop.later(LOOK_SECONDS, self._ended)
        else:
            self.drop()
