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
    PREFIX,
    CannotConfine,
    Group,
    Layout,
    Limits,
    Stats,
    check_name,
    cpu_quota_usec,
    make_directory,
    read_int,
    read_key,
    write,
)

if TYPE_CHECKING:
    from pathlib import Path

CONTROLLERS: Final = ("memory", "cpu", "pids")
_REMEDY: Final = "see `stockadectl doctor`"


class HybridGroup(Group):
    def __init__(self, agent_id: str, tree: Path, *, memory: Path, cpu: Path, pids: Path, owner: bool = True) -> None:
        super().__init__(agent_id, tree)
        self._v1 = {"memory": memory, "cpu": cpu, "pids": pids}
        self._owner = owner
        self._entries: list[int] = []
        try:
            for path in self._v1.values():
                self._entries.append(os.open(path / "tasks", os.O_WRONLY | os.O_CLOEXEC))
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

    def sub(self, name: str) -> Group:
        path = self.tree / check_name("sub-group", name)
        make_directory(path, fresh=True)
        v1 = self._v1
        return HybridGroup(self.agent_id, path, memory=v1["memory"], cpu=v1["cpu"], pids=v1["pids"], owner=False)

    def close(self) -> None:
        while self._entries:
            os.close(self._entries.pop())
        super().close()


class HybridLayout(Layout):
    kind = "hybrid"

    def __init__(self, root: Path, parent: str) -> None:
        self.root = root
        self.parent = parent
        self._tree = root / "unified"
        self._swap_limited = (root / "memory" / "memory.memsw.limit_in_bytes").exists()

    def tops(self, instance: str) -> tuple[Path, ...]:
        name = f"{PREFIX}{check_name('instance', instance)}"
        return tuple(base / self.parent / name for base in (self._tree, *(self.root / item for item in CONTROLLERS)))

    def create(self, instance: str, agent_id: str, limits: Limits) -> Group:
        paths = [top / check_name("agent", agent_id) for top in self.tops(instance)]
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
        _, memory, cpu, pids = (top / check_name("agent", agent_id) for top in self.tops(instance))
        self._limit_memory(memory, limits.memory_bytes)
        write(cpu / "cpu.cfs_quota_us", str(cpu_quota_usec(limits.cpus)), remedy=_REMEDY)
        write(pids / "pids.max", str(limits.pids), remedy=_REMEDY)

    def open(self, instance: str, agent_id: str) -> Group:
        tree, memory, cpu, pids = (top / check_name("agent", agent_id) for top in self.tops(instance))
        try:
            return HybridGroup(agent_id, tree, memory=memory, cpu=cpu, pids=pids)
        except OSError as error:
            raise CannotConfine(f"cannot open {error.filename}: {error.strerror}; the agent is gone") from error

    def facts(self) -> dict[str, object]:
        return {
            "cgroups": self.kind,
            "memory": "memory.limit_in_bytes",
            "swap": "0" if self._swap_limited else "not accounted: boot with swapaccount=1, or without swap",
            "cpu": "cpu.cfs_quota_us",
            "pids": "pids.max",
        }

    def _limit_memory(self, memory: Path, limit_bytes: int) -> None:
        write(memory / "memory.limit_in_bytes", str(limit_bytes), remedy=_REMEDY)
        if self._swap_limited:  # memory and swap together, so equal means no swap; it may not be set below the first
            write(memory / "memory.memsw.limit_in_bytes", str(limit_bytes), remedy=_REMEDY)
        else:
            write(memory / "memory.swappiness", "0", remedy=_REMEDY)
