"""Sandboxes begun ahead of need: two processes in a cgroup and in namespaces of their own, waiting for a plan.

A launch that finds one ready neither forks nor touches cold pages: most of its time is gone already. One that finds
none makes one on the spot, by the same code. A starter has seen nothing of any agent; what it was made from (mounts of
the host, its /etc) is compared before it is used, and one that is stale is thrown away.
"""

# ruff: noqa: PTH116, PTH123 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import contextlib
import os
import select
import signal
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from sandbox import init, sync, syscalls
from sandbox.cgroups import CannotConfine, Layout
from sandbox.mounts import HOST_ROOT
from sandbox.plan import AGENT_ID_FIRST, IdRange, Limits, SandboxPlan, Scratch
from sandbox.sync import StepError, step

if TYPE_CHECKING:
    from sandbox.cgroups import Group

READY: Final = 2
SHOWN: Final = frozenset(name.encode() for name in (*HOST_ROOT, "etc", "dev"))
# A starter begun under less than this would be late, or killed.
ROOMY: Final = Limits(memory_bytes=64 << 20, cpus=0.5, pids=16)
# Lowered before a plan is sent; until then only code of ours runs.
UNLIMITED: Final = Limits(memory_bytes=1 << 50, cpus=1024, pids=4 << 20)


@dataclass(slots=True, eq=False)
class Starter:
    """What the launcher holds of it; whoever takes it closes it, or makes an agent of it."""

    name: str
    group: "Group"
    pid: int
    pidfd: int
    start_ticks: int
    limits: Limits
    control: socket.socket
    stub: socket.socket
    standard: init.Standard | None
    seen: tuple[int, ...]


class Starters:
    """A stock of starters for plans of the usual kind; others are made to order."""

    def __init__(self, layout: Layout, instance: str, base: str, size: int = READY) -> None:
        self._layout = layout
        self._instance = instance
        self._size = size
        self.made = 0
        self._stock: list[Starter] = []
        self._leaving: list[Starter] = []
        self._born = start_ticks(os.getpid())  # a pid alone may have been an earlier launcher's, whose agents are kept
        # Of the last plan: the next one most often has the same, and finds them in force.
        self._limits = UNLIMITED
        self._mountinfo = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._mounts_changed = select.poll()
        self._mounts_changed.register(self._mountinfo, select.POLLPRI)
        self._mounts = self._shown_mounts()
        self._standard = init.Standard(base, _usual(instance))

    def take(self, plan: SandboxPlan) -> Starter:
        """Return one that fits the plan, its group limited as the plan says; raises `StepError`."""
        usual = self._usual(plan)
        starter = None
        seen = self._signature()
        while usual and self._stock and starter is None:
            starter = self._stock.pop()
            if starter.seen != seen:
                self.discard(starter)
                starter = None
        if starter is None:
            rates = (plan.limits.io_read_bytes_per_second, plan.limits.io_write_bytes_per_second)
            limits = replace(UNLIMITED, io_read_bytes_per_second=rates[0], io_write_bytes_per_second=rates[1])
            starter = self._make(init.flags(plan.weaken), self._standard if usual else None, seen, limits)
        try:
            if starter.limits != plan.limits:
                self._layout.limit(self._instance, starter.name, plan.limits)
        except (CannotConfine, OSError) as error:
            self.discard(starter)
            raise StepError("limit cgroup", getattr(error, "errno", 0) or 0, str(error)) from error
        self._limits = plan.limits if usual and _roomy(plan.limits) else UNLIMITED
        return starter

    def _usual(self, plan: SandboxPlan) -> bool:
        standard = self._standard.plan
        return (
            not plan.weaken
            # v1 has a group more for these, and nobody is moved into it later.
            and not plan.limits.io_limited
            and plan.rootfs == standard.rootfs
            and plan.scratch.root_bytes == standard.scratch.root_bytes
        )

    def refill(self) -> bool:
        """Make one more where one is missing, and let go of what has ended; True where more is to be done."""
        self.sweep()
        seen = self._signature()
        for starter in [s for s in self._stock if s.seen != seen]:
            self._stock.remove(starter)
            self.discard(starter)
        if len(self._stock) < self._size:
            # A launch tells of the problem, if it lasts.
            with contextlib.suppress(StepError):
                self._stock.append(self._make(init.FLAGS, self._standard, seen, self._limits))
                return len(self._stock) < self._size
        return bool(self._leaving)

    def _signature(self) -> tuple[int, ...]:
        """Return what changes when the host mounts something, or its root or /etc gets, loses or replaces an entry."""
        # The kernel tells of a change to the mounts of this process once a change (proc(5), mountinfo). Most are of
        # others: of containers, and of network namespaces that have a name.
        if self._mounts_changed.poll(0):
            self._mounts = self._shown_mounts()
        return (self._mounts, *(os.stat(path).st_mtime_ns for path in ("/", "/etc", "/usr")))

    def _shown_mounts(self) -> int:
        """Return what changes with the mounts that a starter shows a part of."""
        os.lseek(self._mountinfo, 0, os.SEEK_SET)
        text = b""
        while piece := os.read(self._mountinfo, 1 << 16):
            text += piece
        # Field 5 is where it is mounted, escaped.
        return hash(tuple(line for line in text.splitlines() if _shows(line.split(b" ", 5)[4])))

    def _make(self, flags: int, standard: init.Standard | None, seen: tuple[int, ...], limits: Limits) -> Starter:
        self.made += 1
        name = f"s{os.getpid()}-{self._born}-{self.made}"
        with contextlib.ExitStack() as undo:
            try:
                group = self._layout.create(self._instance, name, limits)
            except (CannotConfine, OSError) as error:
                number = getattr(error, "errno", 0) or 0
                raise StepError("make cgroup", number, str(error), "see `stockadectl doctor`") from error
            undo.callback(_remove, group)
            with step("make channel"):
                control, theirs = sync.pair()
                undo.callback(control.close)
                undo.callback(theirs.close)
                stub, their_stub = sync.pair()
                undo.callback(stub.close)
                undo.callback(their_stub.close)
            with theirs, their_stub, step("fork"):
                pid, pidfd = syscalls.clone3(flags, cgroup=group.fd_for_clone())
                if pid == 0:
                    init.main(theirs, their_stub, group.entry_fds(), standard)
                ticks = start_ticks(pid)
            undo.pop_all()
        return Starter(name, group, pid, pidfd, ticks, limits, control, stub, standard, seen)

    def discard(self, starter: Starter) -> None:
        """Kill it; its processes and group are let go of when they are dead."""
        starter.control.close()
        starter.stub.close()
        with contextlib.suppress(CannotConfine, OSError):
            starter.group.kill()
        with contextlib.suppress(OSError):
            syscalls.pidfd_send_signal(starter.pidfd, signal.SIGKILL)
        self._leaving.append(starter)

    def sweep(self, *, block: bool = False) -> None:
        """Collect those that were discarded."""
        for starter in list(self._leaving):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(starter.pid, 0 if block else os.WNOHANG)[0] == 0:
                    continue
            self._leaving.remove(starter)
            os.close(starter.pidfd)
            _remove(starter.group)

    def close(self) -> None:
        while self._stock:
            self.discard(self._stock.pop())
        self.sweep(block=True)


def _remove(group: "Group") -> None:
    with contextlib.suppress(CannotConfine, OSError):
        group.remove()


def _shows(place: bytes) -> bool:
    return place == b"/" or place[1:].split(b"/", 1)[0] in SHOWN


def _roomy(limits: Limits) -> bool:
    return all(getattr(limits, name) >= getattr(ROOMY, name) for name in ("memory_bytes", "cpus", "pids"))


def start_ticks(pid: int) -> int:
    """Return when the process began, in clock ticks since boot; with the pid this names it for good (proc(5))."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read(4096).rpartition(b")")[2].split()[19])


def _usual(instance: str) -> SandboxPlan:
    return SandboxPlan("standard", instance, "standard", ("/bin/true",), (), IdRange(AGENT_ID_FIRST), scratch=Scratch())
