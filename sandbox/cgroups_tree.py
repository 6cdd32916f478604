"""What cgroup v2 and hybrid hosts have in common: names, and the v2 tree that kills, freezes and counts.

A hybrid host keeps its controllers on v1 hierarchies, and a v2 tree without controllers beside them; `cgroup.kill`,
`cgroup.freeze` and `cgroup.events` work there all the same, and CLONE_INTO_CGROUP too. Source: cgroups(7) and the
kernel's Documentation/admin-guide/cgroup-v2.rst. Standard library only: the launcher imports this as root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PREFIX: Final = "stockade-"
CPU_PERIOD_USEC: Final = 100_000
NO_RATE: Final = 1 << 50  # as in sandbox.plan
CPU_QUOTA_USEC_MIN: Final = 1_000  # the kernel's min_cfs_quota_period
REMOVE_SECONDS_MAX: Final = 1.0
PIDS_READ_BYTES_MAX: Final = 1 << 20
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)


class CannotConfine(RuntimeError):  # noqa: N818 - reads as what happened
    """A limit could not be set or a group could not be removed; the text names the file and what to do."""


class Limits(Protocol):
    """What a group is limited to; `sandbox.plan.Limits` has it."""

    @property
    def memory_bytes(self) -> int: ...
    @property
    def cpus(self) -> float: ...
    @property
    def pids(self) -> int: ...
    @property
    def swap_bytes(self) -> int: ...
    @property
    def io_read_bytes_per_second(self) -> int: ...
    @property
    def io_write_bytes_per_second(self) -> int: ...
    @property
    def io_limited(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Stats:
    """What a group uses now; `memory_peak` is 0 where the kernel does not keep it (v2 before Linux 5.19)."""

    memory_bytes: int
    memory_peak: int
    pids: int
    cpu_usec: int
    oom_kills: int


@dataclass(frozen=True, slots=True)
class Counters:
    """How often a group met its limits, and how long it waited, since it was made; times in microseconds.

    `*_pressure_usec` is the time in which some process of the group waited for that (PSI, Documentation/accounting/
    psi.rst). None is what the kernel does not tell.
    """

    oom_kills: int
    memory_limit_hits: int | None
    pids_limit_hits: int
    cpu_periods: int
    cpu_periods_throttled: int
    cpu_throttled_usec: int
    memory_pressure_usec: int | None
    cpu_pressure_usec: int | None
    io_pressure_usec: int | None


def check_name(what: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise CannotConfine(f"cannot name a cgroup after {what} {name!r}: use letters, digits, '_', '-' and '.'")
    return name


def cpu_quota_usec(cpus: float) -> int:
    return max(CPU_QUOTA_USEC_MIN, round(cpus * CPU_PERIOD_USEC))


def write(path: Path, value: str, *, remedy: str) -> None:
    """Set one control file in a single system call, or raise `CannotConfine` that names it."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode("ascii"))
        finally:
            os.close(fd)
    except OSError as error:
        raise CannotConfine(f"cannot write {value!r} to {path}: {error.strerror}; {remedy}") from error


def read_int(path: Path) -> int:
    """One number; 0 for a file that this kernel does not have or whose group is gone."""
    try:
        return int(path.read_bytes())
    except (FileNotFoundError, OSError, ValueError):
        return 0


def read_key(path: Path, key: str) -> int:
    """One value of a flat keyed file such as `memory.events`; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0


def read_pairs(path: Path) -> dict[str, int]:
    """A flat keyed file such as `cpu.stat`; empty where there is none."""
    try:
        text = path.read_bytes()
    except OSError:
        return {}
    words = text.decode("ascii", "replace").split()
    return {key: int(value) for key, value in zip(words[::2], words[1::2], strict=False) if value.isdigit()}


def read_pressure(path: Path) -> int | None:
    """The `some` total of a PSI file; None where the kernel has or keeps none (`psi=0`)."""
    try:
        line = path.read_bytes().partition(b"\n")[0]
        return int(line.rpartition(b"total=")[2])
    except (OSError, ValueError):
        return None


def disks(sys_block: Path = Path("/sys/block")) -> list[str]:
    """`MAJOR:MINOR` of every disk of the host that has a medium: rates are set for each device (io.max, blkio)."""
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(sys_block):
            with contextlib.suppress(OSError):
                if read_int(Path(entry.path) / "size"):
                    found.append((Path(entry.path) / "dev").read_text(encoding="ascii").strip())
    return sorted(found)


def write_for_disk(path: Path, value: str, *, remedy: str) -> None:
    """As `write`; a disk that has gone since it was listed is nothing to limit."""
    try:
        write(path, value, remedy=remedy)
    except CannotConfine as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in {errno.ENODEV, errno.ENXIO}:
            raise


def rate(bytes_per_second: int, *, none: str) -> str:
    return none if bytes_per_second >= NO_RATE else str(bytes_per_second)


def make_directory(path: Path, *, fresh: bool) -> None:
    try:
        path.mkdir(parents=True, exist_ok=not fresh)
    except FileExistsError as error:
        raise CannotConfine(f"cannot create {path}: it is there already; another agent has this id") from error
    except OSError as error:
        raise CannotConfine(
            f"cannot create {path}: {error.strerror}; the launcher must be root and see a writable cgroup file system"
        ) from error


def remove_directories(paths: Iterable[Path], *, seconds_max: float, clock: Callable[[], float]) -> None:
    """Remove groups, deepest first; what is busy is tried again until the time is up, and then said."""
    deadline = clock() + seconds_max
    for path in paths:
        pause = 0.001
        while True:
            try:
                path.rmdir()
            except FileNotFoundError:
                break
            except OSError as error:
                if error.errno != errno.EBUSY or clock() >= deadline:
                    raise CannotConfine(
                        f"cannot remove {path}: {error.strerror}; processes left: {_pids(path)}"
                    ) from error
                time.sleep(pause)
                pause = min(pause * 2, 0.02)
            else:
                break


def below(path: Path) -> Iterator[Path]:
    """The group and all groups in it, deepest first."""
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(path), key=lambda item: item.name):
            if entry.is_dir(follow_symlinks=False):
                yield from below(Path(entry.path))
    yield path


def _pids(path: Path) -> list[int]:
    """The processes in this one group; a bounded number of them."""
    with contextlib.suppress(OSError):
        fd = os.open(path / "cgroup.procs", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = b""
            while len(text) < PIDS_READ_BYTES_MAX and (chunk := os.read(fd, 1 << 16)):
                text += chunk
        finally:
            os.close(fd)
        return [int(word) for word in text.split()]
    return []


class Group(ABC):
    """One agent's control group: its limits are in force from before its first process until `remove()`."""

    def __init__(self, agent_id: str, tree: Path) -> None:
        self.agent_id = agent_id
        self.tree = tree
        self._directory = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._events = os.open(tree / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(self._directory)
            raise

    def fd_for_clone(self) -> int:
        """The directory for clone3's CLONE_INTO_CGROUP: a child is in the v2 tree from its birth (clone(2))."""
        return self._directory

    def events_fd(self) -> int:
        """A descriptor that polls EPOLLPRI when `populated()` or `frozen()` may have changed; not to be closed."""
        return self._events

    def populated(self) -> bool:
        """Whether any process, zombies left out, lives in this group or below it."""
        return self._event("populated")

    def frozen(self) -> bool:
        return self._event("frozen")

    def _event(self, key: str) -> bool:
        try:
            lines = os.pread(self._events, 4096, 0).split(b"\n")
        except OSError as error:
            if error.errno == errno.ENODEV:  # the group was removed
                return False
            raise
        return f"{key} 1".encode() in lines

    def kill(self) -> None:
        """SIGKILL to every process of the group and below, fork storms included; frozen ones die too."""
        self._order("cgroup.kill", "1", "kill needs Linux 5.14")

    def freeze(self) -> None:
        """Ask for the freeze; `frozen()` says when it is complete."""
        self._order("cgroup.freeze", "1", "freeze needs Linux 5.2")

    def thaw(self) -> None:
        self._order("cgroup.freeze", "0", "freeze needs Linux 5.2")

    def _order(self, name: str, value: str, remedy: str) -> None:
        if not self.tree.exists():
            return  # removed before: nothing lives in it
        write(self.tree / name, value, remedy=remedy)

    def pids(self) -> list[int]:
        """Every process in the group and below it."""
        return [pid for path in below(self.tree) for pid in _pids(path)]

    def close(self) -> None:
        """Let go of the descriptors without touching the group."""
        for fd in (self._directory, self._events):
            if fd >= 0:
                os.close(fd)
        self._directory = self._events = -1

    def remove(self, *, seconds_max: float = REMOVE_SECONDS_MAX, clock: Callable[[], float] = time.monotonic) -> None:
        """Remove the empty group everywhere; raises `CannotConfine` that names who is left when the time is up."""
        self.close()
        paths = [path for top in self.directories() for path in below(top)]
        remove_directories(paths, seconds_max=seconds_max, clock=clock)

    @abstractmethod
    def directories(self) -> tuple[Path, ...]:
        """The group's directory in each hierarchy."""

    @abstractmethod
    def entry_fds(self) -> tuple[int, ...]:
        """Files into which a process writes `0`, as its first act, to enter the v1 hierarchies; none on v2."""

    @abstractmethod
    def add(self, pid: int) -> None:
        """Move a process in from outside, with all its threads. On v1 this costs up to 15 ms: prefer `entry_fds()`."""

    @abstractmethod
    def stats(self) -> Stats: ...

    @abstractmethod
    def in_force(self) -> dict[str, float]:
        """The limits as the kernel has them now, by the names of `Limits`; 0 where one cannot be read or is none."""

    @abstractmethod
    def oom_kills(self) -> int: ...

    @abstractmethod
    def counters(self) -> Counters: ...

    def oom_fd(self) -> int:
        """Give a descriptor that is readable when the kernel kills for memory; -1 where it ends the group as one."""
        return -1

    @abstractmethod
    def sub(self, name: str) -> Group:
        """A group inside this one that can be killed and counted by itself; it shares the limits."""


class Layout(ABC):
    """How this host's cgroups are mounted, and where ours go: `[<parent>/]stockade-<instance>/<agent_id>`."""

    kind: str
    root: Path
    parent: str

    @abstractmethod
    def create(self, instance: str, agent_id: str, limits: Limits) -> Group:
        """A new group with its limits written; nothing is left when it fails."""

    @abstractmethod
    def limit(self, instance: str, agent_id: str, limits: Limits) -> None:
        """Lower the limits of a group that was made with larger ones; raising them again is not provided for."""

    @abstractmethod
    def io_unheld(self, limits: Limits) -> str:
        """Why the rates asked for cannot be held on this host; empty where they can, or none is asked for."""

    @abstractmethod
    def open(self, instance: str, agent_id: str) -> Group:
        """A group that exists, as after a restart."""

    @abstractmethod
    def tops(self, instance: str) -> tuple[Path, ...]:
        """`stockade-<instance>` in each hierarchy, the v2 tree first."""

    @abstractmethod
    def facts(self) -> dict[str, object]:
        """What posture and doctor say about limits on this host."""

    def tidy(self, instance: str) -> None:
        """Remove the instance's own empty top groups; does nothing while an agent's group is in one."""
        for top in self.tops(instance):
            with contextlib.suppress(OSError):
                top.rmdir()
