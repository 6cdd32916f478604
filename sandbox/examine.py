"""What is in force for a process, as the kernel tells it, and how that differs from what was planned.

`confinement` and `namespaces` are cheap (about 0.1 ms) and read for every launch, while the agent waits for `go`: one
that is not confined as planned never runs. `examine` reads the rest when somebody asks (`stockadectl inspect`). All of
it comes from /proc of the host and from the cgroup, so nothing inside has a say in it, and everything is bounded.
"""

# ruff: noqa: PTH115, PTH123 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import dataclasses
import os
import re
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from sandbox.filters import agent_filters
from sandbox.plan import INIT_INSIDE, SandboxPlan

if TYPE_CHECKING:
    from sandbox.running import Agent

KINDS: Final = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
CAPABILITIES: Final = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
FILE_BYTES_MAX: Final = 1 << 18
_SHORT_BYTES_MAX: Final = 1 << 13
PROCESSES_MAX: Final = 64  # looked at one by one; the launcher serves everybody meanwhile
DRIFT_MAX: Final = 32
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
# Namespaces that a weakened sandbox shares with the host.
_SHARED: Final[Mapping[str, tuple[str, ...]]] = {
    "network": ("net",),
    "private_ipc": ("ipc", "uts"),
    "private_pid": ("pid",),
    "user_namespace": ("user",),
}
_RLIMITS: Final = {
    "open_files": "Max open files",
    "core_bytes": "Max core file size",
    "locked_memory_bytes": "Max locked memory",
    "realtime_priority": "Max realtime priority",
    "pending_signals": "Max pending signals",
    "queue_bytes": "Max msgqueue size",
}


def _read(path: str) -> str:
    """Return a short file of /proc, which one read gives whole."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _SHORT_BYTES_MAX).decode("utf-8", "replace")
    finally:
        os.close(fd)


def _whole(path: str) -> str:
    """Return a file of /proc that may be longer than one read gives."""
    with open(path, "rb") as file:
        return file.read(FILE_BYTES_MAX).decode("utf-8", "replace")


def namespaces(pid: int | str) -> dict[str, int]:
    """Return the inode number of each namespace of a process; equal numbers are one namespace (namespaces(7))."""
    return {kind: int(os.readlink(f"/proc/{pid}/ns/{kind}").partition("[")[2][:-1]) for kind in KINDS}


def _status(pid: int | str) -> dict[str, str]:
    return dict(_STATUS_LINE.findall(_read(f"/proc/{pid}/status")))


_STATUS_LINE: Final = re.compile(r"^(Uid|Gid|Groups|Cap\w+|NoNewPrivs|Seccomp\w*):\t?(.*?) *$", re.MULTILINE)
# Of the launcher, and so of the host; taken when the process starts. Its own filters stay below those of every agent.
HOST: Final = namespaces("self")
FILTERS_BEFORE: Final = int(_status("self").get("Seccomp_filters", "0"))


def confinement(pid: int) -> dict[str, Any]:
    """Return what the kernel says of a process's confinement; ids are the host's."""
    status = _status(pid)
    return {
        "seccomp_mode": int(status["Seccomp"]),
        "seccomp_filters": int(status.get("Seccomp_filters", "0")) - FILTERS_BEFORE,
        "no_new_privs": status["NoNewPrivs"] == "1",
        "capabilities": {name[3:].lower(): status[name] for name in CAPABILITIES},
        "uid": [int(word) for word in status["Uid"].split()],
        "gid": [int(word) for word in status["Gid"].split()],
        "groups": [int(word) for word in status["Groups"].split()],
    }


def identity(pid: int) -> dict[str, Any]:
    """Return the namespaces and id maps of a process."""
    maps = {name: " ".join(_read(f"/proc/{pid}/{name}").split()) for name in ("uid_map", "gid_map")}
    return {"namespaces": namespaces(pid), **maps}


def pid_of(pidfd: int) -> int:
    """Return the pid of a pidfd's process in the launcher's namespace; raises `ProcessLookupError` when it is gone."""
    for line in _read(f"/proc/self/fdinfo/{pidfd}").splitlines():
        if line.startswith("Pid:") and int(line[4:]) > 0:
            return int(line[4:])
    raise ProcessLookupError(f"the process of pidfd {pidfd} is gone")


def at_launch(agent: "Agent") -> dict[str, Any]:
    """Return what is read back for every launch. Raises `OSError`."""
    pid = agent.agent_pid or pid_of(agent.agent_pidfd)
    return confinement(pid) | identity(pid)


def drift(plan: SandboxPlan, programs: int, seen: Mapping[str, Any]) -> list[str]:
    """Name every way in which a process is less confined than planned; more confined is the program's own affair.

    `programs` is how many of seccomp it should have.
    """
    weak = frozenset(plan.weaken)
    found = []
    planned = 0 if "seccomp" in weak else programs
    if seen["seccomp_filters"] < planned or (planned and seen["seccomp_mode"] != 2):  # noqa: PLR2004 - filter mode
        found.append(f"seccomp: mode {seen['seccomp_mode']}, {seen['seccomp_filters']} filters of {planned}")
    if not seen["no_new_privs"] and "new_privileges" not in weak:
        found.append("no_new_privs: not set")
    if "capabilities" not in weak:
        held = {name: value for name, value in seen["capabilities"].items() if int(value, 16)}
        found += [f"capabilities: {name} is {value}" for name, value in held.items()]
    plain = "user_namespace" in weak
    for kind, inside in (("uid", plan.uid), ("gid", plan.gid)):
        wanted = inside if plain else plan.ids.host(inside)
        if any(number != wanted for number in seen[kind]):
            found.append(f"{kind}: {seen[kind]}, not {wanted}")
    if seen["groups"]:
        found.append(f"groups: {seen['groups']}")
    if "namespaces" in seen:
        shared = {kind for name in weak for kind in _SHARED.get(name, ())}
        found += [
            f"namespaces: {kind} is the host's"
            for kind, number in seen["namespaces"].items()
            if number == HOST[kind] and kind not in shared
        ]
        line = f"0 {plan.ids.start} {plan.ids.size}"
        found += [f"{name}: {seen[name]}" for name in ("uid_map", "gid_map") if seen[name] != line and not plain]
    return found


def programs(agent: "Agent") -> int:
    """Say how many seccomp programs the agent's own processes have at least."""
    return len(agent_filters(agent.filters)) if agent.filters else 0


# --- when somebody asks --------------------------------------------------------------------------------------------


def examine(agent: "Agent") -> dict[str, Any]:
    """Return what is in force for a running agent, and as `drift` what differs from its plan. Raises `OSError`."""
    plan = agent.plan
    pid = pid_of(agent.agent_pidfd)
    seen = confinement(pid) | identity(pid)
    found = drift(plan, programs(agent), seen)
    more: dict[str, Any] = {
        "limits": agent.group.in_force() if agent.group is not None else {},
        "rlimits": rlimits(_read(f"/proc/{pid}/limits")),
        "network": network(pid),
        "mounts": mounts(_whole(f"/proc/{pid}/mountinfo")),
        "oom_score_adj": int(_read(f"/proc/{pid}/oom_score_adj")),
    }
    found += _drift_of_limits(plan, more["limits"], more["rlimits"])
    found += _drift_of_network(plan, more["network"])
    if more["mounts"]["without_nosuid"] and "mount_flags" not in plan.weaken:
        found.append(f"mounts: not nosuid at {', '.join(more['mounts']['without_nosuid'])}")
    looked_at, others = _others(agent, pid)
    found += others
    return seen | more | {"pid": pid, "processes_examined": looked_at, "drift": found[:DRIFT_MAX]}


def rlimits(text: str) -> dict[str, list[int]]:
    """Return soft and hard limits of /proc/PID/limits, -1 for none: prlimit(2) would take CAP_SYS_RESOURCE."""
    values = {}
    for name, title in _RLIMITS.items():
        for line in text.splitlines():
            if line.startswith(title):
                values[name] = [-1 if word == "unlimited" else int(word) for word in line[len(title) :].split()[:2]]
    return values


def _others(agent: "Agent", first: int) -> tuple[int, list[str]]:
    """Look at the agent's other processes, pid 1 among them, which has ids of its own."""
    found: list[str] = []
    count = 1
    known = {first, agent.keeper.pid()}  # a keeper has the first filter and not the second, and is about to end
    pids = agent.group.pids() if agent.group is not None else []
    if any(stream.control is not None for stream in agent.streams.values()):
        pids = [agent.pid]  # a process that is about to enter is in the group already, and has given up nothing yet
    init = dataclasses.replace(agent.plan, uid=INIT_INSIDE, gid=INIT_INSIDE)
    for pid in [pid for pid in pids if pid not in known][: PROCESSES_MAX - 1]:
        try:
            seen = confinement(pid)
            differs = drift(init, 1, seen) if pid == agent.pid else drift(agent.plan, programs(agent), seen)
        except (OSError, LookupError):
            continue  # it ended meanwhile
        count += 1
        found += [f"process {pid}: {text}" for text in differs]
    return count, found


def _drift_of_limits(plan: SandboxPlan, limits: Mapping[str, Any], rlimits: Mapping[str, Sequence[int]]) -> list[str]:
    found = []
    for name, slack in (("memory_bytes", PAGE_BYTES), ("pids", 0), ("cpus", 0.005)):
        if name in limits and not 0 < limits[name] <= getattr(plan.limits, name) + slack:
            found.append(f"limits: {name} is {limits[name]}, not {getattr(plan.limits, name)}")
    if not 0 <= limits.get("swap_bytes", 0) <= plan.limits.swap_bytes:
        found.append(f"limits: swap_bytes is {limits['swap_bytes']}")
    if not 0 <= rlimits["open_files"][1] <= plan.limits.open_files:
        found.append(f"rlimits: open_files is {rlimits['open_files'][1]}, not {plan.limits.open_files}")
    if rlimits["core_bytes"][1] not in (0, 1) and "rlimits" not in plan.weaken:
        found.append(f"rlimits: core_bytes is {rlimits['core_bytes'][1]}")
    return found


def network(pid: int) -> dict[str, Any]:
    """Return interfaces, IPv4 routes and addresses of a process's network namespace, and IPv6 addresses if any."""
    lines = _whole(f"/proc/{pid}/net/dev").splitlines()[2:]
    interfaces = [line.partition(":")[0].strip() for line in lines]
    routes = []
    for line in _whole(f"/proc/{pid}/net/route").splitlines()[1:]:
        words = line.split()
        gateway = "" if words[2] == "00000000" else f" via {_address(words[2])}"
        routes.append(f"{_address(words[1])}/{int(words[7], 16).bit_count()}{gateway} dev {words[0]}")
    try:
        ipv6 = [line.split()[0] for line in _whole(f"/proc/{pid}/net/if_inet6").splitlines()]
    except FileNotFoundError:
        ipv6 = []
    local = re.findall(r"\|-- ([0-9.]+)\n\s*/32 host LOCAL", _whole(f"/proc/{pid}/net/fib_trie"))
    return {"interfaces": interfaces, "routes": routes, "addresses": sorted(set(local)), "ipv6_addresses": ipv6}


def _address(word: str) -> str:
    """Return the dotted form of an address as /proc/net/route has it: hexadecimal, in the byte order of the host."""
    return socket.inet_ntoa(struct.pack("=I", int(word, 16)))


def _drift_of_network(plan: SandboxPlan, seen: Mapping[str, Any]) -> list[str]:
    if "network" in plan.weaken:
        return []
    found = []
    route = plan.network.route
    if seen["routes"] != [route]:
        found.append(f"network: routes are {seen['routes']}, not {route}")
    if set(seen["addresses"]) != {"127.0.0.1", plan.network.agent_address}:
        found.append(f"network: addresses are {seen['addresses']}")
    if seen["ipv6_addresses"]:
        found.append(f"network: IPv6 addresses {seen['ipv6_addresses']}")
    return found


def mounts(mountinfo: str) -> dict[str, Any]:
    """Return a summary of a process's mounts: how many, which are writable, which lack nosuid or nodev."""
    count, writable, setuid, devices = 0, [], [], []
    for line in mountinfo.splitlines():
        words = line.split()
        place, options = words[4], set(words[5].split(","))
        count += 1
        if "rw" in options and "ro" not in line.partition(" - ")[2].split()[2].split(","):
            writable.append(place)
        if "nosuid" not in options:
            setuid.append(place)
        if "nodev" not in options:
            devices.append(place)
    return {"count": count, "writable": writable, "without_nosuid": setuid, "without_nodev": devices}
