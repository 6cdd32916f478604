"""Control groups on a hybrid host: limits on v1 hierarchies; kill, freeze and events in the v2 tree beside them.

Moving a process in from outside (`cgroup.procs`) takes a global lock and waits for an RCU grace period: 15 ms measured.
A process that writes `0` to `tasks` moves itself alone, and the kernel skips that lock ("cgroup: Optimize single thread
migration", Linux 5.5): 0.03 ms each. So children enter by themselves, as their first act, through descriptors that the
launcher opened. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from sandbox.cgroups_tree import (
    CPU_PERIOD_USEC,
    NO_RATE,
    PREFIX,
    CannotConfine,
    Counters,
    Group,
    Layout,
    Limits,
    Stats,
    check_name,
    cpu_quota_usec,
    disks,
    make_directory,
    rate,
    read_int,
    read_key,
    read_pairs,
    read_pressure,
    write,
    write_for_disk,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONTROLLERS: Final = ("memory", "cpu", "pids")
BLKIO: Final = "blkio"  # a group of its own only for agents whose policy asks for a rate
TCP_BYTES_MIN: Final = 16 << 20
_REMEDY: Final = "see `stockadectl doctor`"


class HybridGroup(Group):
    def __init__(self, agent_id: str, tree: Path, v1: Mapping[str, Path], *, owner: bool = True) -> None:
        super().__init__(agent_id, tree)
        self._v1 = v1
        self._owner = owner
        self._entries: list[int] = []
        self._oom = -1
        try:
            for path in self._v1.values():
                self._entries.append(os.open(path / "tasks", os.O_WRONLY | os.O_CLOEXEC))
            if owner:
                self._oom = _oom_event(self._v1["memory"])
        except OSError:
            self.close()
            raise

    def directories(self) -> tuple[Path, ...]:
        return (self.tree, *self._v1.values()) if self._owner else (self.tree,)

    def entry_fds(self) -> tuple[int, ...]:
        return tuple(self._entries)

    def add(self, pid: int) -> None:
        for path in (*self._v1.values(), self.tree):
            write(path / "cgroup.procs", str(pid), remedy="the process may be gone already")

    def stats(self) -> Stats:
        memory = self._v1["memory"]
        return Stats(
            memory_bytes=read_int(memory / "memory.usage_in_bytes"),
            memory_peak=read_int(memory / "memory.max_usage_in_bytes"),
            pids=read_int(self._v1["pids"] / "pids.current"),
            # Every v2 group counts CPU time, whether or not the controller is there.
            cpu_usec=read_key(self.tree / "cpu.stat", "usage_usec"),
            oom_kills=self.oom_kills(),
        )

    def in_force(self) -> dict[str, float]:
        memory, cpu = self._v1["memory"], self._v1["cpu"]
        limits: dict[str, float] = {
            "memory_bytes": read_int(memory / "memory.limit_in_bytes"),
            "cpus": read_int(cpu / "cpu.cfs_quota_us") / (read_int(cpu / "cpu.cfs_period_us") or 1),
            "pids": read_int(self._v1["pids"] / "pids.max"),
        }
        both = memory / "memory.memsw.limit_in_bytes"
        if both.exists():
            limits["swap_bytes"] = read_int(both) - limits["memory_bytes"]
        return limits

    def oom_kills(self) -> int:
        return read_key(self._v1["memory"] / "memory.oom_control", "oom_kill")

    def oom_fd(self) -> int:
        return self._oom

    def counters(self) -> Counters:
        cpu = read_pairs(self._v1["cpu"] / "cpu.stat")
        return Counters(
            oom_kills=self.oom_kills(),
            memory_limit_hits=None,  # memory.failcnt stays 0 on newer kernels (6.18)
            pids_limit_hits=read_key(self._v1["pids"] / "pids.events", "max"),
            cpu_periods=cpu.get("nr_periods", 0),
            cpu_periods_throttled=cpu.get("nr_throttled", 0),
            cpu_throttled_usec=cpu.get("throttled_time", 0) // 1000,
            # PSI is kept for every group of the v2 tree, with or without controllers.
            memory_pressure_usec=read_pressure(self.tree / "memory.pressure"),
            cpu_pressure_usec=read_pressure(self.tree / "cpu.pressure"),
            io_pressure_usec=read_pressure(self.tree / "io.pressure"),
        )

    def sub(self, name: str) -> Group:
        path = self.tree / check_name("sub-group", name)
        make_directory(path, fresh=True)
        return HybridGroup(self.agent_id, path, self._v1, owner=False)

    def close(self) -> None:
        while self._entries:
            os.close(self._entries.pop())
        if self._oom >= 0:
            os.close(self._oom)
            self._oom = -1
        super().close()


def _oom_event(memory: Path) -> int:
    """An eventfd that the kernel writes to when the group is out of memory (cgroup-v1/memory.rst, section 10).

    v1 has no memory.oom.group: the kernel kills one process, and whoever hears of it has to end the rest.
    """
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        control = os.open(memory / "memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
        try:
            register = os.open(memory / "cgroup.event_control", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(register, f"{event} {control}".encode("ascii"))
            finally:
                os.close(register)
        finally:
            os.close(control)
    except OSError:
        os.close(event)
        raise
    return event


class HybridLayout(Layout):
    kind = "hybrid"

    def __init__(self, root: Path, parent: str) -> None:
        self.root = root
        self.parent = parent
        self._tree = root / "unified"
        self._swap_limited = (root / "memory" / "memory.memsw.limit_in_bytes").exists()
        self._blkio = (root / BLKIO / "blkio.throttle.read_bps_device").exists()

    def tops(self, instance: str) -> tuple[Path, ...]:
        name = f"{PREFIX}{check_name('instance', instance)}"
        v1 = (*CONTROLLERS, BLKIO) if self._blkio else CONTROLLERS
        return tuple(base / self.parent / name for base in (self._tree, *(self.root / item for item in v1)))

    def create(self, instance: str, agent_id: str, limits: Limits) -> Group:
        paths = [top / check_name("agent", agent_id) for top in self.tops(instance)]
        if not limits.io_limited:
            del paths[1 + len(CONTROLLERS) :]
        made: list[Path] = []
        try:
            for path in paths:
                make_directory(path, fresh=True)
                made.append(path)
            write(paths[2] / "cpu.cfs_period_us", str(CPU_PERIOD_USEC), remedy=_REMEDY)
            self.limit(instance, agent_id, limits)
            return self.open(instance, agent_id)
        except BaseException:
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise

    def limit(self, instance: str, agent_id: str, limits: Limits) -> None:
        _, memory, cpu, pids, *blkio = (top / check_name("agent", agent_id) for top in self.tops(instance))
        self._limit_memory(memory, limits)
        write(cpu / "cpu.cfs_quota_us", str(cpu_quota_usec(limits.cpus)), remedy=_REMEDY)
        write(pids / "pids.max", str(limits.pids), remedy=_REMEDY)
        if limits.io_limited:
            for path in blkio:
                _limit_io(path, limits)

    def io_unheld(self, limits: Limits) -> str:
        if limits.io_limited and not self._blkio:
            return f"there is no blkio controller with throttling below {self.root}"
        if limits.io_write_bytes_per_second < NO_RATE:
            # Dirty pages are written by kernel threads of the root group: v1 cannot tell whose they are
            # (cgroup-v1/blkio-controller.rst, "buffered write IO is not throttled").
            return "cgroup v1 holds direct and synchronous writes to the rate, and not what the page cache writes later"
        return ""

    def open(self, instance: str, agent_id: str) -> Group:
        tree, *v1 = (top / check_name("agent", agent_id) for top in self.tops(instance))
        found = dict(zip((*CONTROLLERS, BLKIO), v1, strict=False))
        if BLKIO in found and not found[BLKIO].exists():
            del found[BLKIO]
        try:
            return HybridGroup(agent_id, tree, found)
        except OSError as error:
            raise CannotConfine(f"cannot open {error.filename}: {error.strerror}; the agent is gone") from error

    def facts(self) -> dict[str, object]:
        return {
            "cgroups": self.kind,
            "memory": "memory.limit_in_bytes",
            "swap": "memory.memsw.limit_in_bytes"
            if self._swap_limited
            else "not accounted: boot with swapaccount=1, or without swap",
            "oom": "the launcher ends the rest when the kernel has killed one",
            "cpu": "cpu.cfs_quota_us",
            "pids": "pids.max",
            "io": "blkio.throttle, reads and direct writes" if self._blkio else "no blkio controller",
        }

    def _limit_memory(self, memory: Path, limits: Limits) -> None:
        if self._swap_limited:  # of an earlier plan; memory alone may not go above it
            write(memory / "memory.memsw.limit_in_bytes", "-1", remedy=_REMEDY)
        write(memory / "memory.limit_in_bytes", str(limits.memory_bytes), remedy=_REMEDY)
        if self._swap_limited:  # memory and swap together, so equal means no swap; it may not be set below the first
            both = min(limits.memory_bytes + limits.swap_bytes, 1 << 62)
            write(memory / "memory.memsw.limit_in_bytes", str(both), remedy=_REMEDY)
        elif not limits.swap_bytes:
            write(memory / "memory.swappiness", "0", remedy=_REMEDY)
        # What loopback connections hold unread is memory too, and here only where it is asked for, beside the limit
        # above (memory-resource controller v1, kmem.tcp). On v2 it is in memory.max.
        buffers = memory / "memory.kmem.tcp.limit_in_bytes"
        if buffers.exists():
            write(buffers, str(max(limits.memory_bytes // 4, TCP_BYTES_MIN)), remedy=_REMEDY)


def _limit_io(blkio: Path, limits: Limits) -> None:
    for name, value in (("read", limits.io_read_bytes_per_second), ("write", limits.io_write_bytes_per_second)):
        for disk in disks():
            write_for_disk(
                blkio / f"blkio.throttle.{name}_bps_device", f"{disk} {rate(value, none='0')}", remedy=_REMEDY
            )
