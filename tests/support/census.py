"""What an instance and its agents have on the host, counted from outside: processes, cgroups, networks, files."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.instance import Instance

IDS_PER_AGENT = 65536
SLOTS = Path("/run/stockade-slots")
CGROUPS = Path("/sys/fs/cgroup")
GONE = 1 << 62
SETTLED_SECONDS = 1.0
SETTLE_SECONDS_MAX = 20.0


@dataclass(frozen=True)
class Census:
    """Counts that are the same before and after agents came and went."""

    processes: int
    cgroups: int
    networks: int
    slots: int
    links: frozenset[str]
    mounts: int
    files: frozenset[str]
    daemon_fds: int
    launcher_fds: int


def census(stockade: Instance) -> Census:
    group = f"/stockade-{stockade.name}/"
    daemon = stockade.process.pid if stockade.process is not None else 0
    launcher = launcher_pid(stockade)
    return Census(
        processes=sum(group in text(process / "cgroup") for process in processes()),
        cgroups=sum(1 for _ in directories(stockade.name)),
        networks=len(networks(launcher)),
        slots=slots(stockade),
        links=frozenset(name for _, name in socket.if_nameindex()),
        mounts=len(text(Path("/proc/self/mountinfo")).splitlines()),
        files=frozenset(
            str(path.relative_to(stockade.run_dir))
            for path in below(stockade.run_dir)
            if "agents" not in path.relative_to(stockade.run_dir).parts
        ),
        daemon_fds=len(descriptors(daemon)),
        launcher_fds=len(descriptors(launcher)),
    )


def settled(stockade: Instance) -> Census:
    """The census once what is made ahead of need has been made: when it has not changed for a while."""
    last, since = census(stockade), time.monotonic()
    deadline = since + SETTLE_SECONDS_MAX
    while time.monotonic() < min(deadline, since + SETTLED_SECONDS):
        time.sleep(0.05)
        seen = census(stockade)
        if seen != last:
            last, since = seen, time.monotonic()
    return last


def launcher_pid(stockade: Instance) -> int:
    """The launcher of this instance: the one of its processes with that program that is nobody's fork.

    An agent's pid 1 is one of those forks, has the same command line, and outlives its launcher.
    """
    found = []
    group = f"/stockade-{stockade.name}/"
    for process in processes():
        words = text(process / "cmdline").split("\0")
        if not any(word.endswith("sandbox/launcher.py") for word in words) or str(stockade.run_dir) not in words:
            continue
        if group not in text(process / "cgroup"):
            found.append(int(process.name))
    return min(found, key=started, default=0)


def started(pid: int) -> int:
    """When a process began, in clock ticks (proc_pid_stat(5), field 22); GONE where there is none or a zombie."""
    fields = text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return int(fields[19]) if fields and fields[0] != "Z" else GONE


def of_uids(start: int) -> list[int]:
    """Pids of every process with any credential in an agent's range."""
    found = []
    for process in processes():
        for line in text(process / "status").splitlines():
            if line.startswith(("Uid:", "Gid:")) and any(
                start <= int(word) < start + IDS_PER_AGENT for word in line.split()[1:]
            ):
                found.append(int(process.name))
                break
    return found


def of_agent(agent: dict[str, object]) -> list[int]:
    posture = agent["posture"]
    assert isinstance(posture, dict)
    return of_uids(int(posture["ids"]["start"]))


def children(pid: int) -> list[int]:
    return [int(word) for word in text(Path(f"/proc/{pid}/task/{pid}/children")).split()]


def cgroups_of(pid: int) -> list[Path]:
    """The directories of a process's groups that are below an instance's."""
    found = []
    for line in text(Path(f"/proc/{pid}/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if "/stockade-" in path:
            for base in (CGROUPS / (controllers or "unified"), CGROUPS):
                if (base / path[1:]).is_dir():
                    found.append(base / path[1:])
                    break
    return found


def slots(stockade: Instance) -> int:
    """How many ranges of ids it has claimed."""
    return sum(1 for path in SLOTS.glob("[0-9]*") if text(path) == stockade.name)


def below(directory: Path) -> Iterator[Path]:
    """All that is below it; what goes meanwhile is passed over."""
    for above, directories, files in os.walk(directory):
        yield from (Path(above, name) for name in (*directories, *files))


def directories(instance: str) -> Iterator[Path]:
    for top in (CGROUPS, *CGROUPS.iterdir()):
        group = top / f"stockade-{instance}"
        if group.is_dir():
            yield from (path for path in below(group) if path.is_dir())


def networks(launcher: int) -> set[str]:
    """Network namespaces that a launcher or a process below it holds."""
    found = set()
    waiting = [launcher]
    while waiting:
        pid = waiting.pop()
        waiting += children(pid)
        found |= {link(Path(f"/proc/{pid}/ns/net"))}
        found |= {target for target in descriptors(pid) if target.startswith("net:[")}
    return found - {"", link(Path("/proc/self/ns/net"))}


def descriptors(pid: int) -> list[str]:
    try:
        return [link(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []


def processes() -> list[Path]:
    return [path for path in Path("/proc").iterdir() if path.name.isdigit()]


def text(path: Path) -> str:
    """The file's text, or nothing where it has gone."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""
