"""The guard of what was taken back: a process that denies every open on a mount that agents should no longer use.

Detaching a mount leaves whoever has a working directory or a directory descriptor in it where they are. A permission
mark on that mount (fanotify(7)) asks the guard before each open and exec; it knows one answer. A mark lives as long as
its group has a descriptor, and without one opens pass again. So the guard is a process of its own, `denier.py`, that
the launcher's death does not touch; the launcher keeps the group open too, and so does systemd, which ends what a
launcher leaves, and the daemon. While nobody reads the group, whoever opens waits, and may be killed: that is a denial
as well.
"""

# ruff: noqa: PTH100 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import contextlib
import errno
import os
import socket
import sys
from typing import TYPE_CHECKING, Final

from sandbox import denier, sync, syscalls
from sandbox.init import forget_launcher
from sandbox.loop import READ, Loop
from sandbox.sync import StepError, step

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAM: Final = os.path.abspath(denier.__file__)
# Directories too: openat(dirfd, ".") is a new descriptor. Reads as well, for files whose reads this kernel asks about.
DENIED: Final = syscalls.FAN_OPEN_PERM | syscalls.FAN_OPEN_EXEC_PERM | syscalls.FAN_ACCESS_PERM | syscalls.FAN_ONDIR
RESTART_SECONDS: Final = 0.05
_GROUP: Final = (
    syscalls.FAN_CLASS_CONTENT
    | syscalls.FAN_CLOEXEC
    | syscalls.FAN_NONBLOCK
    | syscalls.FAN_UNLIMITED_QUEUE
    | syscalls.FAN_UNLIMITED_MARKS
)
# O_NONBLOCK: the kernel opens what is asked about for the reader of the event, and it may be a fifo.
_EVENT_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


class Guard:
    """Starts the process when it is first needed, and again should it die."""

    def __init__(self, loop: Loop, run_dir: str) -> None:
        self._loop = loop
        self._run_dir = run_dir
        self._group = -1
        self._pid = 0
        self._pidfd = -1
        self._control: socket.socket | None = None
        self._agents: dict[int, int] = {}
        self.on_group: list[Callable[[int], None]] = []

    def adopt(self, group: int, *, kept: bool = False) -> None:
        """Serve the group of an earlier launcher, owned from now on; `kept` where systemd has it still."""
        self._group = group
        for call in () if kept else self.on_group:
            call(group)
        self._start()

    def ready(self) -> int:
        """Return the group, served; raises `StepError` where this kernel cannot deny opens."""
        if self._group < 0:
            try:
                self._group = make_group()
            except OSError as error:
                raise StepError(
                    "guard files",
                    error.errno or 0,
                    f"this kernel cannot deny opens on a mount ({error.strerror})",
                    "use a kernel with CONFIG_FANOTIFY_ACCESS_PERMISSIONS, or give the path at launch",
                ) from error
            for call in self.on_group:
                call(self._group)
        if self._pidfd < 0:
            self._start()
        return self._group

    @property
    def group(self) -> int:
        """The group, -1 while there was no need of one."""
        return self._group

    def watch(self, pid: int, pidfd: int) -> None:
        """Have the guard live at least as long as this agent's pid 1."""
        for other, fd in list(self._agents.items()):
            if _dead(fd):
                del self._agents[other]
                os.close(fd)
        if pid not in self._agents:
            self._agents[pid] = os.dup(pidfd)
            self._tell(pidfd)

    def close(self) -> None:
        """Let the process end by itself, when the agents have."""
        if self._pidfd >= 0:
            self._loop.forget(self._pidfd)
        if self._control is not None:
            self._control.close()
        sync.close_all([fd for fd in (self._pidfd, self._group, *self._agents.values()) if fd >= 0])
        self._pidfd = self._group = -1

    def _tell(self, pidfd: int) -> None:
        if self._control is not None:
            # One that has died is started again, and told of all.
            with contextlib.suppress(OSError):
                socket.send_fds(self._control, [b"."], [pidfd], socket.MSG_NOSIGNAL)

    def _start(self) -> None:
        ours, theirs = sync.pair()
        with theirs, step("start guard"):
            pid, pidfd = syscalls.clone3(0)
            if pid == 0:
                _become(theirs, self._group, self._run_dir)
        self._pid, self._pidfd, self._control = pid, pidfd, ours
        self._loop.watch(pidfd, READ, lambda _events: self._died())
        for fd in self._agents.values():
            self._tell(fd)

    def _died(self) -> None:
        self._loop.forget(self._pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        os.close(self._pidfd)
        self._pidfd = -1
        if self._control is not None:
            self._control.close()
            self._control = None
        self._loop.later(RESTART_SECONDS, self._again)

    def _again(self) -> None:
        if self._group >= 0 and self._pidfd < 0:
            with contextlib.suppress(StepError):
                self._start()
                return
            self._loop.later(RESTART_SECONDS, self._again)


def _become(control: socket.socket, group: int, run_dir: str) -> None:
    try:
        forget_launcher(control, keep=[group])
        os.setsid()
        beyond = max(control.fileno(), group, denier.FD_CONTROL) + 1
        os.dup2(group, beyond)
        os.dup2(control.fileno(), beyond + 1)
        os.dup2(beyond, denier.FD_GROUP, inheritable=True)
        os.dup2(beyond + 1, denier.FD_CONTROL, inheritable=True)
        syscalls.close_range(denier.FD_CONTROL + 1)
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-E", PROGRAM, run_dir])  # noqa: S606 - our own program
    finally:
        os._exit(1)


def make_group() -> int:
    """Make a group, and see that permission marks are there: without them in the kernel only a mark is refused."""
    group = syscalls.fanotify_init(_GROUP, _EVENT_FLAGS)
    try:
        probe = syscalls.memfd_create("probe")
        try:
            path = f"/proc/self/fd/{probe}"
            # Of this file of our own alone; it goes with it.
            syscalls.fanotify_mark(group, syscalls.FAN_MARK_ADD, syscalls.FAN_OPEN_PERM, syscalls.AT_FDCWD, path)
        finally:
            os.close(probe)
    except OSError:
        os.close(group)
        raise
    return group


def _dead(pidfd: int) -> bool:
    try:
        syscalls.pidfd_send_signal(pidfd, 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False
