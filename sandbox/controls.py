"""The controls: their names, what each protects, and what happens where a host lacks one (pure; standard library only).

One table, read by doctor (which probes for each), by policies (`require`, `degraded_ok`), by the launcher (which
refuses or shows) and so by posture: a name means the same thing everywhere.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final


class Absence(Enum):
    """What a missing control means; the value is what doctor prints."""

    STOPS = "required"  # nothing is launched on this host, whatever a policy says
    REFUSED = "unless degraded_ok"  # refused, unless the policy lets it be missing
    SHOWN = "unless required"  # a second layer: shown as degraded, unless the policy requires it
    TOLD = "advice"  # no control of an agent; doctor tells


@dataclass(frozen=True, slots=True)
class Control:
    name: str
    absence: Absence
    protects: str
    remedy: str

    @property
    def required(self) -> bool:
        """Whether nothing at all is launched without it."""
        return self.absence is Absence.STOPS


class Demanded(Exception):  # noqa: N818 - reads as what it was
    """A control that is demanded is missing."""

    def __init__(self, control: Control, how: str, *, required: bool) -> None:
        super().__init__(f"this host lacks {control.name}: {how}")
        if required:
            key = f"`require: [{control.name}]`" + (" or `landlock: required`" if control.name == "landlock" else "")
            way = f"take {key} out of the policy"
        else:
            way = f"allow it in the policy by `degraded_ok: [{control.name}]`"
        self.remedy = f"{control.remedy}; or, if that may be done without, {way}"


_NEWER: Final = "use a newer kernel: Debian 12 (6.1) and Ubuntu 22.04 (5.15) have everything required"
_BOOTED: Final = "boot with systemd.unified_cgroup_hierarchy=1, or keep cgroup v1 and mount the v2 tree beside it"

CONTROLS: Final = (
    Control("kernel", Absence.STOPS, "everything", _NEWER),
    Control("root", Absence.STOPS, "everything", "start it as root, or as its systemd unit does"),
    Control("system-calls", Absence.STOPS, "mounts and descriptors against swapped paths", _NEWER),
    Control("namespaces", Absence.STOPS, "the host's processes, mounts, network and IPC", _NEWER),
    Control(
        "user-namespaces",
        Absence.STOPS,
        "the host's ids and privileges",
        "sysctl user.max_user_namespaces=10000 (and in /etc/sysctl.d)",
    ),
    Control("cgroups", Absence.STOPS, "the host's memory, CPUs and process table", _BOOTED),
    Control("cgroup-kill", Absence.STOPS, "the certainty that a kill leaves nothing alive", _NEWER),
    Control(
        "swap",
        Absence.REFUSED,
        "the memory limit, which swap would go around",
        "boot with swapaccount=1, or switch swap off: swapoff -a",
    ),
    Control(
        "io",
        Absence.REFUSED,
        "the host's disks, where a policy sets io_read or io_write",
        "boot with systemd.unified_cgroup_hierarchy=1, or leave io_write out",
    ),
    Control(
        "pressure",
        Absence.TOLD,
        "the news that an agent waits for memory or disks",
        "boot with psi=1",
    ),
    Control("seccomp", Absence.STOPS, "the kernel's attack surface", "use a kernel with CONFIG_SECCOMP_FILTER"),
    Control("libseccomp", Absence.STOPS, "the kernel's attack surface", "apt-get install libseccomp2"),
    Control(
        "landlock",
        Absence.SHOWN,
        "files outside of scratch and workspace, as a second layer",
        "boot with landlock in the lsm= list, on Linux 5.13 or newer",
    ),
    Control(
        "idmap",
        Absence.REFUSED,
        "the owners of files in workspaces and grants",
        "put workspaces on ext4, xfs, btrfs or tmpfs; with `degraded_ok: [idmap]` they are read-only elsewhere",
    ),
    Control(
        "workspace-quota",
        Absence.SHOWN,
        "the disk below a writable workspace or grant",
        "put it on a file system of its own, or show it read-only",
    ),
    Control(
        "file-grants",
        Absence.TOLD,
        "that files granted to a running agent can be taken back",
        "use a kernel with CONFIG_FANOTIFY_ACCESS_PERMISSIONS; on this one fs: scopes are for launches alone",
    ),
    Control(
        "disk-quota",
        Absence.SHOWN,
        "memory, which what agents write to scratch counts as where it cannot be on disk",
        "apt-get install e2fsprogs; modprobe loop; without it overlay workspaces and persistent homes are refused",
    ),
    Control("network", Absence.STOPS, "the host's network", "load the veth module: modprobe veth"),
    Control(
        "nftables",
        Absence.SHOWN,
        "the empty network of an agent, as a second layer",
        "load the modules: modprobe -a nf_tables nft_reject_inet",
    ),
    Control("users", Absence.STOPS, "the daemon from its own network processes", "run ./bootstrap setup"),
    Control(
        "agent-ids",
        Absence.STOPS,
        "people and services whose id an agent would share",
        "give these ids up: they are for agents, and must never belong to anyone else",
    ),
    Control("core-pattern", Absence.TOLD, "the host's core dump handler", ""),
    Control("descriptors", Absence.TOLD, "the number of agents", "raise LimitNOFILE= or `ulimit -n` for the launcher"),
    Control("host-memory", Absence.TOLD, "the host against agents that use their whole limit", "add memory"),
    Control(
        "state-disk",
        Absence.TOLD,
        "the action log, whose disk launches wait for",
        "put state_dir on a file system of its own, with room on it",
    ),
)

BY_NAME: Final[Mapping[str, Control]] = {control.name: control for control in CONTROLS}
# What a policy may speak of: the others are there, or there is no launch at all.
NEGOTIABLE: Final = tuple(c.name for c in CONTROLS if c.absence in (Absence.REFUSED, Absence.SHOWN))


def degraded(lacking: Mapping[str, str], *, require: Collection[str], degraded_ok: Collection[str]) -> list[str]:
    """Return what posture lists as degraded, `NAME: how it shows`; raises `Demanded` on what may not be missing.

    `lacking` holds each missing control and how that shows. What is in neither list goes by the table.
    """
    for name, how in lacking.items():
        control = BY_NAME[name]
        refused = control.absence is Absence.REFUSED and name not in degraded_ok
        if name in require or refused or control.required:
            raise Demanded(control, how, required=name in require)
    return [f"{name}: {how}" for name, how in lacking.items()]
