"""What this host has of what Stockade enforces with: a probe for each control of `sandbox.controls`.

Used by `stockadectl doctor`, `stockaded --check` and at the daemon's start; `required` controls stop it. A probe tries
the thing itself where that leaves no trace (a network is made and thrown away in a thread of its own) and otherwise
reads what the kernel says about it.
"""

from __future__ import annotations

import errno
import importlib
import os
import platform
import pwd
import re
import resource
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandbox import cgroups, scratch, syscalls
from sandbox.controls import CONTROLS, Control
from sandbox.guard import make_group
from sandbox.netpool import CannotMakeNetwork, Pool
from sandbox.plan import AGENT_ID_FIRST, AGENT_ID_LAST, Limits

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

KERNEL_LEAST: Final = (5, 14)
IDMAP_FILE_SYSTEMS: Final = frozenset(
    {"ext4", "xfs", "btrfs", "f2fs", "vfat", "exfat", "tmpfs", "erofs", "squashfs", "zfs"}
)
DESCRIPTORS_LEAST: Final = 4096
MEMORY_BYTES_LEAST: Final = 512 << 20
STATE_DISK_BYTES_LEAST: Final = 256 << 20
NAMESPACES: Final = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
USERS: Final = ("stockade-egress", "stockade-dialer", "stockade-gateway", "stockade-images")
_PROBE_SECONDS_MAX: Final = 10


@dataclass(frozen=True, slots=True)
class Finding:
    """One control: whether the host has it, how that shows, and what to do where it does not.

    `source` is what was asked, `absence` what a launch does where it is missing (`sandbox.controls.Absence`).
    """

    control: str
    present: bool
    how: str
    remedy: str
    required: bool
    source: str
    protects: str
    absence: str


class Lacking(Exception):  # noqa: N818 - reads as what the host is
    """The host does not have it; the text says how that shows."""


@dataclass(frozen=True, slots=True)
class Host:
    """Where the probes look; tests point it elsewhere."""

    proc: Path = Path("/proc")
    cgroup_root: Path = cgroups.ROOT
    cgroup_parent: str | None = None
    users: tuple[str, ...] = USERS
    state_dir: Path = Path("/var/lib/stockade")
    subordinate: tuple[Path, ...] = (Path("/etc/subuid"), Path("/etc/subgid"))
    kernel: str = platform.release()
    scratch: str = "/var/tmp"  # noqa: S108 - on the same kind of disk as a state_dir, as a rule

    def text(self, path: str) -> str | None:
        """A file below /proc, stripped; None where this kernel has none."""
        try:
            return (self.proc / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None


def probe(host: Host | None = None) -> tuple[Finding, ...]:
    """Try every control; a probe that fails in a way of its own counts as missing and says so."""
    return tuple(_find(control, host or Host()) for control in CONTROLS)


def _find(control: Control, host: Host) -> Finding:
    look, source = _PROBES[control.name]
    try:
        how, present = look(host), True
    except Lacking as lacking:
        how, present = str(lacking), False
    except OSError as error:
        how, present = f"cannot be probed: {error}", False
    return Finding(
        control=control.name,
        present=present,
        how=how,
        remedy="" if present else control.remedy,
        required=control.required,
        source=source,
        protects=control.protects,
        absence=control.absence.value,
    )


# --- probes --------------------------------------------------------------------------------------------------------


def _kernel(host: Host) -> str:
    found = re.match(r"(\d+)\.(\d+)", host.kernel)
    least = ".".join(map(str, KERNEL_LEAST))
    if found is None or tuple(map(int, found.groups())) < KERNEL_LEAST:
        raise Lacking(f"Linux {host.kernel}; cgroup.kill came with {least}")
    return f"Linux {host.kernel} on {platform.machine()}"


def _root(_: Host) -> str:
    if os.geteuid() != 0:
        raise Lacking(f"running as uid {os.geteuid()}")
    return "uid 0"


def _namespaces(host: Host) -> str:
    if missing := [name for name in NAMESPACES if not (host.proc / "self" / "ns" / name).exists()]:
        raise Lacking(f"the kernel has no {', '.join(missing)} namespace")
    return ", ".join(NAMESPACES)


def _user_namespaces(host: Host) -> str:
    most = host.text("sys/user/max_user_namespaces")
    if most in {None, "0"}:
        raise Lacking("user.max_user_namespaces is 0" if most else "no user namespaces in this kernel")
    # The launcher makes them with CAP_SYS_ADMIN, which AppArmor's restriction (Ubuntu 23.10 and later) leaves alone.
    restricted = host.text("sys/kernel/apparmor_restrict_unprivileged_userns") == "1"
    note = "; restricted for the unprivileged by AppArmor, which does not concern the launcher" if restricted else ""
    return f"up to {most}{note}"


def _layout(host: Host) -> cgroups.Layout:
    try:
        return cgroups.detect(host.cgroup_root, host.cgroup_parent)
    except cgroups.CannotConfine as error:
        raise Lacking(str(error)) from error


def _cgroups(host: Host) -> str:
    layout = _layout(host)
    facts = layout.facts()
    v1 = _hierarchies(host) if layout.kind == "hybrid" else ""
    return f"{facts['cgroups']}: {facts['memory']}, {facts['cpu']}, {facts['pids']}{v1}"


def _hierarchies(host: Host) -> str:
    """What the v1 side of a hybrid host has, and whether limits there hold for all that is below a group."""
    try:
        nodes = importlib.import_module("cgroupspy.nodes")
    except ImportError as error:
        return f"; v1 not looked at: {error}"
    root = nodes.Node(str(host.cgroup_root))
    names = sorted(path.name for path in host.cgroup_root.iterdir() if (path / "tasks").exists())
    memory = nodes.Node("memory", parent=root).controller
    if memory.get_content("use_hierarchy") is False:
        raise Lacking("memory.use_hierarchy is 0: a limit would not hold for groups below the one that has it")
    swappiness = memory.get_content("swappiness")
    told = "" if swappiness is None else f", swappiness {swappiness}"
    return f"; v1 hierarchies: {', '.join(names)}{told}"


def _io(host: Host) -> str:
    layout = _layout(host)
    held = str(layout.facts()["io"])
    if why := layout.io_unheld(Limits(io_read_bytes_per_second=1, io_write_bytes_per_second=1)):
        raise Lacking(why)
    return held


def _pressure(host: Host) -> str:
    if host.text("pressure/memory") is None:
        raise Lacking("the kernel keeps no pressure stall information")
    return "pressure stall information, for each group of the v2 tree"


def _cgroup_kill(host: Host) -> str:
    tree = _layout(host).tops("probe")[0].parent
    children = [path for path in tree.iterdir() if path.is_dir()] if tree.is_dir() else []
    if children and not any((path / "cgroup.kill").exists() for path in children):
        raise Lacking(f"{children[0]}/cgroup.kill does not exist")
    return "cgroup.kill, cgroup.freeze and cgroup.events in the v2 tree"


def _swap(host: Host) -> str:
    swaps = (host.text("swaps") or "").splitlines()[1:]
    swap = str(_layout(host).facts()["swap"])
    if swap.startswith("memory."):
        return "agents get what their policy says, usually none" if swaps else "agents get none; the host has none"
    if swaps:
        raise Lacking(f"the host swaps to {swaps[0].split()[0]}, and swap is not accounted: a memory limit is no limit")
    return "not accounted; the host has none"


def _seccomp(host: Host) -> str:
    actions = (host.text("sys/kernel/seccomp/actions_avail") or "").split()
    if "errno" not in actions:
        raise Lacking("no seccomp filters in this kernel (CONFIG_SECCOMP_FILTER)")
    return "filters" + (", user notification" if "user_notif" in actions else "")


def _libseccomp(_: Host) -> str:
    try:
        import pyseccomp  # type: ignore[import-untyped]  # noqa: PLC0415 - raises at import where the library is missing
    except (ImportError, RuntimeError) as error:
        raise Lacking(str(error)) from error
    return f"pyseccomp {pyseccomp.__version__}"


def _landlock(_: Host) -> str:
    if (abi := syscalls.landlock_abi()) == 0:
        raise Lacking("not in this kernel, or not in its lsm= list")
    return f"ABI {abi}"


def _exists(name: str, attempt: Callable[[], object]) -> str:
    """Whether the kernel has a call, told by what it answers to arguments that can never be right."""
    try:
        attempt()
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise Lacking(f"no {name} in this kernel, or a seccomp filter around this process hides it") from error
    return name


def _system_calls(_: Host) -> str:
    names = (
        _exists("openat2", lambda: syscalls.openat2(-1, "x", 0)),
        _exists("pidfd_open", lambda: syscalls.pidfd_open(-1)),
        _exists("close_range", lambda: syscalls.close_range(2, 1)),
        _exists("open_tree", lambda: syscalls.open_tree(-1, "x", 0)),
        _exists("move_mount", lambda: syscalls.move_mount(-1, "x", -1, "x", 0)),
        _exists("mount_setattr", lambda: syscalls.mount_setattr(-1, "x", 0)),
        _exists("fsopen", lambda: syscalls.fsopen("stockade-no-such-file-system")),
    )
    return ", ".join(names)


def _file_grants(_: Host) -> str:
    try:
        os.close(make_group())
    except OSError as error:
        raise Lacking(f"opens on a mount cannot be denied: {error}") from error
    return "fanotify permission events"


def _idmap(host: Host) -> str:
    for line in (host.text("self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[4] == "/":
            kind = right.split()[0]
            break
    else:
        raise Lacking("cannot tell what / is from mountinfo")
    if kind not in IDMAP_FILE_SYSTEMS:
        raise Lacking(f"/ is {kind}, which does not map owners")
    return f"/ is {kind}"


def _disk_quota(host: Host) -> str:
    """Make an image, and see whether it can be mounted; it is gone when this is over."""
    if why := scratch.lacking(host.scratch):
        raise Lacking(why)
    stock = scratch.Stock(host.scratch, label="stockade-doctor", size=0, reserve_bytes=0)
    try:
        stock.take(1 << 20).drop()
    except scratch.CannotMakeScratch as error:
        raise Lacking(str(error)) from error
    return "ext4 images behind loop devices"


def _network(_: Host) -> str:
    """Make a whole network and throw it away. In a thread: namespaces are per thread, and end with it."""
    answer: list[str | CannotMakeNetwork] = []

    def attempt() -> None:
        pool = Pool("doctor", 3128, 0)
        try:
            net = pool.take()
            answer.append(f"veth between two namespaces; IPv6 {net.ipv6}; second layer: {net.firewall}")
            net.close()
        except CannotMakeNetwork as error:
            answer.append(error)
        finally:
            pool.close()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS_MAX)
    match answer:
        case [str() as how]:
            return how
        case [CannotMakeNetwork() as error]:
            raise Lacking(str(error.__cause__ or error)) from error
        case _:
            raise Lacking(f"no answer within {_PROBE_SECONDS_MAX} s")


def _nftables(host: Host) -> str:
    how = _network(host)
    if "missing" in how:
        raise Lacking(how.partition("second layer: ")[2])
    return "rules load in a new namespace"


def _users(host: Host) -> str:
    missing = []
    for name in host.users:
        try:
            pwd.getpwnam(name)
        except KeyError:
            missing.append(name)
    if missing:
        raise Lacking(f"no user {', '.join(missing)}")
    return ", ".join(host.users)


def _agent_ids(host: Host) -> str:
    """The agents' ids must be nobody's: neither an account's nor delegated to one (subuid(5))."""
    for account in pwd.getpwall():
        if AGENT_ID_FIRST <= account.pw_uid <= AGENT_ID_LAST:
            raise Lacking(f"user {account.pw_name} has id {account.pw_uid}, which is one of the agents'")
    for path in host.subordinate:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        for line in lines:
            owner, _, rest = line.partition(":")
            first, _, count = rest.partition(":")
            if not (first.isdigit() and count.isdigit()):
                continue
            if int(first) <= AGENT_ID_LAST and int(first) + int(count) > AGENT_ID_FIRST:
                raise Lacking(f"{path} gives {owner} ids of the agents")
    return f"{AGENT_ID_FIRST} to {AGENT_ID_LAST} belong to nobody"


def _core_pattern(host: Host) -> str:
    pattern = host.text("sys/kernel/core_pattern") or ""
    if pattern.startswith("|"):
        return f"cores go to {pattern[1:].split()[0]}; agents have RLIMIT_CORE=1, which starts no handler"
    return f"cores go to a file ({pattern or 'none'}); agents write none"


def _descriptors(_: Host) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else 1 << 30
    if most < DESCRIPTORS_LEAST:
        raise Lacking(f"at most {most} open files, about {most // 16} agents")
    return f"{soft} open files, raisable to {most}"


def _workspace_quota(_: Host) -> str:
    raise Lacking("a writable bind has no limit on bytes or files of Stockade's, on any host")


def _host_memory(_: Host) -> str:
    memory = _psutil().virtual_memory()
    how = f"{memory.available >> 20} of {memory.total >> 20} MiB available"
    if memory.available < MEMORY_BYTES_LEAST:
        raise Lacking(how)
    return how


def _state_disk(host: Host) -> str:
    """The file system that holds, or will hold, the action log."""
    place = host.state_dir
    while not place.exists():
        place = place.parent
    psutil = _psutil()
    usage = psutil.disk_usage(str(place))
    held = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    kind, mounted = ("unknown", "/")
    if held:
        nearest = max(held, key=lambda part: len(part.mountpoint))
        kind, mounted = nearest.fstype, nearest.mountpoint
    how = f"{host.state_dir} is on {kind} mounted at {mounted}, {usage.free >> 20} MiB free"
    if usage.free < STATE_DISK_BYTES_LEAST:
        raise Lacking(f"{how}: too little")
    if kind in {"tmpfs", "ramfs", "overlay"} and mounted != "/":
        raise Lacking(f"{how}: it may not outlive a restart")
    return how


def _psutil() -> ModuleType:
    """Imported where it is used: the daemon's start and the launches have no need of it."""
    try:
        return importlib.import_module("psutil")
    except ImportError as error:
        raise Lacking(f"cannot tell: {error}") from error


_PROBES: Final[dict[str, tuple[Callable[[Host], str], str]]] = {
    "kernel": (_kernel, "uname(2)"),
    "root": (_root, "geteuid(2)"),
    "system-calls": (_system_calls, "each called in vain"),
    "namespaces": (_namespaces, "/proc/self/ns"),
    "user-namespaces": (_user_namespaces, "/proc/sys/user/max_user_namespaces"),
    "cgroups": (_cgroups, "/sys/fs/cgroup"),
    "cgroup-kill": (_cgroup_kill, "files of the v2 tree"),
    "swap": (_swap, "/proc/swaps, memory controller"),
    "io": (_io, "files of the v2 tree, blkio"),
    "pressure": (_pressure, "/proc/pressure"),
    "seccomp": (_seccomp, "/proc/sys/kernel/seccomp/actions_avail"),
    "libseccomp": (_libseccomp, "loaded"),
    "landlock": (_landlock, "landlock_create_ruleset(2)"),
    "idmap": (_idmap, "/proc/self/mountinfo"),
    "workspace-quota": (_workspace_quota, "not in this version"),
    "file-grants": (_file_grants, "made a permission mark"),
    "disk-quota": (_disk_quota, "made an image and threw it away"),
    "network": (_network, "made one and threw it away"),
    "nftables": (_nftables, "loaded the rules in a namespace of its own"),
    "users": (_users, "the user database"),
    "agent-ids": (_agent_ids, "the user database, /etc/subuid, /etc/subgid"),
    "core-pattern": (_core_pattern, "/proc/sys/kernel/core_pattern"),
    "descriptors": (_descriptors, "getrlimit(2)"),
    "host-memory": (_host_memory, "/proc/meminfo"),
    "state-disk": (_state_disk, "statfs(2), /proc/self/mounts"),
}
