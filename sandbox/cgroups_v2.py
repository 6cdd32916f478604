"""Control groups on a host whose controllers are all in the v2 tree. Standard library only."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from sandbox.cgroups_tree import (
    CPU_PERIOD_USEC,
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
    from pathlib import Path

CONTROLLERS: Final = ("cpu", "memory", "pids")
IO: Final = "io"  # enabled where the kernel has it; a plan that asks for a rate is refused where it has not
_REMEDY: Final = "see `stockadectl doctor`"


class UnifiedGroup(Group):
    def __init__(self, agent_id: str, tree: Path, *, limited: Path | None = None) -> None:
        super().__init__(agent_id, tree)
        self._limited = limited or tree

    def directories(self) -> tuple[Path, ...]:
        return (self.tree,)

    def entry_fds(self) -> tuple[int, ...]:
        return ()

    def add(self, pid: int) -> None:
        write(self.tree / "cgroup.procs", str(pid), remedy="the process may be gone already")

    def stats(self) -> Stats:
        return Stats(
            memory_bytes=read_int(self._limited / "memory.current"),
            memory_peak=read_int(self._limited / "memory.peak"),
            pids=read_int(self._limited / "pids.current"),
            cpu_usec=read_key(self.tree / "cpu.stat", "usage_usec"),
            oom_kills=self.oom_kills(),
        )

    def in_force(self) -> dict[str, float]:
        limits: dict[str, float] = {
            "memory_bytes": read_int(self._limited / "memory.max"),
            "cpus": _cpus(self._limited / "cpu.max"),
            "pids": read_int(self._limited / "pids.max"),
        }
        swap = self._limited / "memory.swap.max"
        if swap.exists():
            # "max" is no number: as much as there is.
            limits["swap_bytes"] = -1 if swap.read_bytes().strip() == b"max" else read_int(swap)
        return limits

    def oom_kills(self) -> int:
        return read_key(self._limited / "memory.events", "oom_kill")

    def counters(self) -> Counters:
        memory, cpu = read_pairs(self._limited / "memory.events"), read_pairs(self._limited / "cpu.stat")
        return Counters(
            oom_kills=memory.get("oom_kill", 0),
            memory_limit_hits=memory.get("max", 0),
            pids_limit_hits=read_key(self._limited / "pids.events", "max"),
            cpu_periods=cpu.get("nr_periods", 0),
            cpu_periods_throttled=cpu.get("nr_throttled", 0),
            cpu_throttled_usec=cpu.get("throttled_usec", 0),
            memory_pressure_usec=read_pressure(self._limited / "memory.pressure"),
            cpu_pressure_usec=read_pressure(self._limited / "cpu.pressure"),
            io_pressure_usec=read_pressure(self._limited / "io.pressure"),
        )

    def sub(self, name: str) -> Group:
        path = self.tree / check_name("sub-group", name)
        make_directory(path, fresh=True)
        return UnifiedGroup(self.agent_id, path, limited=self._limited)


class UnifiedLayout(Layout):
    """Below the root, or below a group that systemd delegated (`parent`, relative to the root)."""

    kind = "v2"

    def __init__(self, root: Path, parent: str) -> None:
        self.root = root
        self.parent = parent
        self._io = IO in (root / "cgroup.controllers").read_text(encoding="ascii").split()

    def tops(self, instance: str) -> tuple[Path, ...]:
        return (self.root / self.parent / f"{PREFIX}{check_name('instance', instance)}",)

    def create(self, instance: str, agent_id: str, limits: Limits) -> Group:
        (top,) = self.tops(instance)
        make_directory(top, fresh=False)
        self._enable(top)
        path = top / check_name("agent", agent_id)
        make_directory(path, fresh=True)
        try:
            self.limit(instance, agent_id, limits)
            return UnifiedGroup(agent_id, path)
        except BaseException:
            with contextlib.suppress(OSError):
                path.rmdir()
            raise

    def limit(self, instance: str, agent_id: str, limits: Limits) -> None:
        path = self.tops(instance)[0] / check_name("agent", agent_id)
        self._limit(path, limits)
        if limits.io_limited and self._io:
            self._limit_io(path, limits)

    def io_unheld(self, limits: Limits) -> str:
        if limits.io_limited and not self._io:
            return f"there is no io controller below {self.root / self.parent}: boot with it, or delegate it"
        return ""

    def open(self, instance: str, agent_id: str) -> Group:
        path = self.tops(instance)[0] / check_name("agent", agent_id)
        try:
            return UnifiedGroup(agent_id, path)
        except OSError as error:
            raise CannotConfine(f"cannot open {path}: {error.strerror}; the agent is gone") from error

    def facts(self) -> dict[str, object]:
        return {
            "cgroups": self.kind,
            "memory": "memory.max",
            "swap": "memory.swap.max",
            "oom": "memory.oom.group",
            "cpu": "cpu.max",
            "pids": "pids.max",
            "io": "io.max" if self._io else "no io controller",
        }

    def _enable(self, top: Path) -> None:
        """Make the controllers available in the children of `top`.

        From the root down, adding only what is missing: every group between may already have them, and a group that
        holds processes cannot get them (the "no internal processes" rule; the root alone is exempt).
        """
        chain = [top, *top.parents]
        for path in reversed(chain[: chain.index(self.root) + 1]):
            have = set((path / "cgroup.subtree_control").read_text(encoding="ascii").split())
            if missing := [name for name in CONTROLLERS if name not in have]:
                write(
                    path / "cgroup.subtree_control",
                    " ".join(f"+{name}" for name in missing),
                    remedy="give the launcher a delegated, empty group: --cgroup-parent, and Delegate=yes in its unit",
                )
            if self._io and IO not in have:
                try:
                    write(path / "cgroup.subtree_control", f"+{IO}", remedy=_REMEDY)
                except CannotConfine:
                    self._io = False

    @staticmethod
    def _limit(path: Path, limits: Limits) -> None:
        write(path / "memory.max", str(limits.memory_bytes), remedy=_REMEDY)
        swap = path / "memory.swap.max"
        if swap.exists():  # absent only in a kernel without swap
            write(swap, str(limits.swap_bytes), remedy=_REMEDY)
        # An agent that lost one process to the OOM killer is in a state nobody foresaw: it ends as a whole.
        write(path / "memory.oom.group", "1", remedy=_REMEDY)
        write(path / "cpu.max", f"{cpu_quota_usec(limits.cpus)} {CPU_PERIOD_USEC}", remedy=_REMEDY)
        write(path / "pids.max", str(limits.pids), remedy=_REMEDY)

    @staticmethod
    def _limit_io(path: Path, limits: Limits) -> None:
        read = rate(limits.io_read_bytes_per_second, none="max")
        written = rate(limits.io_write_bytes_per_second, none="max")
        for disk in disks():
            write_for_disk(path / "io.max", f"{disk} rbps={read} wbps={written}", remedy=_REMEDY)


def _cpus(path: Path) -> float:
    """Quota over period of `cpu.max`; 0 where there is no quota or no such file."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = path.read_text(encoding="ascii").split()
        return int(quota) / int(period)
    return 0
