"""Canaries: attempts to get out that run in a finished sandbox, right before the agent's program would.

`run` forks a child of the process that will become the agent: same namespaces, ids, filters, limits, streams. The child
makes every attempt, says what came through and ends, so nothing that an attempt changed is there for the agent; what
the attempts make has no name or is taken away again. An attempt that cannot be made counts as one that came through.

Each is harmless where the border fails: pointers that fault, descriptors that are none, files opened and never written,
no packet but to the gate of a network that was found to be the agent's own.
"""

# ruff: noqa: PTH115, PTH116, PTH123, PTH208 - strings and descriptors: pathlib costs time here

import contextlib
import errno
import fcntl
import json
import os
import platform
import resource
import signal
import socket
import stat
import struct
import termios
import time
from collections.abc import Callable
from typing import Any, Final, NoReturn

from sandbox import capabilities, examine, syscalls
from sandbox.plan import SandboxPlan
from sandbox.sync import StepError, step

SECONDS_MAX: Final = 10
ANSWER_BYTES_MAX: Final = 64 << 10
FINDINGS_SHOWN_MAX: Final = 8
_BAD: Final = 1  # an address that faults
_WORD: Final = 0xFFFFFFFF
# The answers of a filter; any other says that the kernel looked at the arguments.
_FILTERED: Final = (errno.EPERM, errno.ENOSYS)
# Where nobody is: documentation addresses (RFC 5737).
_NOWHERE: Final = ("192.0.2.1", "198.51.100.1", "203.0.113.1")
_LAYERS_MAX: Final = (16, 64)  # of Landlock: since Linux 5.19, and before
_ARM: Final = platform.machine() == "aarch64"
_CLONE: Final = 220 if _ARM else 56
_SETRESUID: Final = 147 if _ARM else 117
_SETGROUPS: Final = 159 if _ARM else 116

# name: number on x86_64, on aarch64, arguments.
CALLS: Final[dict[str, tuple[int, int, tuple[int, ...]]]] = {
    "unshare-user": (272, 97, (syscalls.CLONE_NEWUSER,)),
    "unshare-mount": (272, 97, (syscalls.CLONE_NEWNS,)),
    "unshare-net": (272, 97, (syscalls.CLONE_NEWNET,)),
    "clone3": (435, 435, (0, 0)),
    "setns": (308, 268, (-1, 0)),
    "mount": (165, 40, (_BAD, _BAD, _BAD, 0, _BAD)),
    "umount": (166, 39, (_BAD, 0)),
    "pivot-root": (155, 41, (_BAD, _BAD)),
    "chroot": (161, 51, (_BAD,)),
    "open-tree": (428, 428, (-1, _BAD, 0)),
    "fsopen": (430, 430, (_BAD, 0)),
    "mount-setattr": (442, 442, (-1, _BAD, 0, _BAD, 32)),
    "open-by-handle": (304, 265, (-1, _BAD, 0)),
    "ptrace": (101, 117, (9999, 999999, 0, 0)),
    "process-vm-readv": (310, 270, (999999, 0, 0, 0, 0, 0)),
    "bpf": (321, 280, (9999, _BAD, 0)),
    "perf-event-open": (298, 241, (_BAD, 0, -1, -1, 0)),
    "keyctl": (250, 219, (9999, 0, 0, 0, 0)),
    "io-uring": (425, 425, (0, _BAD)),
    "userfaultfd": (323, 282, (0xFFFF,)),
    "init-module": (175, 105, (_BAD, 0, _BAD)),
    "kexec": (246, 104, (0, 99999, 0, 0)),
    "personality": (135, 92, (0x0040000,)),
}
# family, type, protocol; the answers that mean "there is no such thing here".
_SOCKETS: Final[dict[str, tuple[int, int, int]]] = {
    "socket-inet6": (socket.AF_INET6, socket.SOCK_STREAM, 0),
    "socket-packet": (socket.AF_PACKET, socket.SOCK_RAW, 0x0300),
    "socket-raw": (socket.AF_INET, socket.SOCK_RAW, 1),
    "socket-mptcp": (socket.AF_INET, socket.SOCK_STREAM, 262),
    "socket-vsock": (40, socket.SOCK_STREAM, 0),
    "socket-netfilter": (socket.AF_NETLINK, socket.SOCK_RAW, 12),
}
_MASKED: Final = ("kcore", "kmsg", "kallsyms", "keys", "timer_list", "sysrq-trigger")
_SETTINGS: Final = ("kernel/core_pattern", "kernel/modprobe", "net/ipv4/ip_forward", "vm/overcommit_memory")
_DEVICES: Final = frozenset({"null", "zero", "full", "random", "urandom", "tty", "ptmx", "console"})

Attempt = Callable[[SandboxPlan], str]  # what came through, or nothing


def run(plan: SandboxPlan) -> dict[str, Any]:
    """Make all attempts; raises `StepError` that names those that came through."""
    began = time.perf_counter_ns()
    with step("start canaries", "the pids limit of the policy leaves no room for one more process"):
        read, write = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
    if pid == 0:
        _child(plan, write)
    os.close(write)
    answer = b""
    with open(read, "rb", buffering=0) as file:
        while len(answer) < ANSWER_BYTES_MAX and (more := file.read(ANSWER_BYTES_MAX)):
            answer += more
    _, status = os.waitpid(pid, 0)
    try:
        findings = dict(json.loads(answer))
    except ValueError:
        code = os.waitstatus_to_exitcode(status)
        raise StepError("run canaries", 0, f"they ended without a word, with {code}", "see docs/POLICY.md") from None
    if findings:
        shown = "; ".join(f"{name}: {what}" for name, what in list(findings.items())[:FINDINGS_SHOWN_MAX])
        rest = f"; and {len(findings) - FINDINGS_SHOWN_MAX} more" if len(findings) > FINDINGS_SHOWN_MAX else ""
        raise StepError(
            "run canaries",
            0,
            f"the sandbox does not hold: {shown}{rest}",
            "launch nothing here before `stockadectl doctor` and the kernel's log say why",
        )
    return {"attempts": len(ATTEMPTS), "duration_us": (time.perf_counter_ns() - began) // 1000}


def _child(plan: SandboxPlan, write: int) -> NoReturn:
    """Make the attempts one after the other; ends by a signal where one of them hangs."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS_MAX)
        findings = {}
        for name, attempt in ATTEMPTS.items():
            try:
                what = attempt(plan)
            except Exception as error:  # noqa: BLE001 - what could not be tried did not hold
                what = f"could not be tried: {type(error).__name__}: {error}"
            if what:
                findings[name] = what[:256]
        os.write(write, json.dumps(findings).encode())
    finally:
        os._exit(0)


def _name(number: int) -> str:
    return errno.errorcode.get(number, str(number))


# --- system calls --------------------------------------------------------------------------------------------------


def _calls(name: str) -> Attempt:
    number, on_arm, arguments = CALLS[name]

    def attempt(_plan: SandboxPlan) -> str:
        _, error = syscalls.attempt(on_arm if _ARM else number, *arguments)
        return "" if error in _FILTERED else f"the kernel answered {_name(error) if error else 'yes'}"

    return attempt


def _clone(_plan: SandboxPlan) -> str:
    """Namespaces by clone(2) itself; what comes to life ends at once."""
    for flag in (syscalls.CLONE_NEWUSER, syscalls.CLONE_NEWNS, syscalls.CLONE_NEWNET, syscalls.CLONE_NEWPID):
        pid, error = syscalls.attempt(_CLONE, flag | signal.SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            os._exit(0)
        if pid > 0:
            os.waitpid(pid, 0)
            return f"made a namespace, flag {flag:#x}"
        if error not in _FILTERED:
            return f"the kernel answered {_name(error)}"
    return ""


def _sockets(name: str) -> Attempt:
    family, kind, protocol = _SOCKETS[name]

    def attempt(_plan: SandboxPlan) -> str:
        with contextlib.suppress(OSError):
            socket.socket(family, kind, protocol).close()
            return "it opens"
        return ""

    return attempt


def _terminal_input(_plan: SandboxPlan) -> str:
    """TIOCSTI, with high bits too, which the kernel does not look at (CVE-2019-10063)."""
    for request in (termios.TIOCSTI, termios.TIOCSTI | 1 << 32):
        _, error = syscalls.attempt(29 if _ARM else 16, 0, request, _BAD)
        if error != errno.EPERM:
            return f"request {request:#x}: {_name(error)}"
    return ""


def _set_id_bit(_plan: SandboxPlan) -> str:
    """Chmod 4755, on a file without a name."""
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)  # noqa: S108 - of the sandbox
    try:
        os.fchmod(fd, 0o4755)
    except PermissionError:
        return ""
    finally:
        os.close(fd)
    return "a file took the set-uid bit"


def _device(_plan: SandboxPlan) -> str:
    path = f"/tmp/.canary-{os.getpid()}"  # noqa: S108 - of the sandbox
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        return ""
    os.unlink(path)  # noqa: PTH108 - as above
    return "a device node was made"


# --- identity ------------------------------------------------------------------------------------------------------


def _ids(plan: SandboxPlan) -> str:
    uids, gids, groups = os.getresuid(), os.getresgid(), os.getgroups()
    as_planned = set(uids) == {plan.uid} and set(gids) == {plan.gid} and not groups
    return "" if as_planned else f"uid {uids}, gid {gids}, groups {groups}"


def _id_map(plan: SandboxPlan) -> str:
    """No id of the host is mapped, least of all 0."""
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/self/{name}") as file:
            words = file.read().split()
        if words != ["0", str(plan.ids.start), str(plan.ids.size)]:
            return f"{name} is {' '.join(words)}"
    return ""


def _capability_sets(_plan: SandboxPlan) -> str:
    with open("/proc/self/status") as file:
        sets = dict(line.split() for line in file if line.startswith("Cap"))
    held = [f"{name} {value}" for name, value in sets.items() if int(value, 16)]
    return "" if len(sets) == len(examine.CAPABILITIES) and not held else ", ".join(held) or "they cannot be read"


def _securebits(_plan: SandboxPlan) -> str:
    bits = syscalls.prctl(syscalls.PR_GET_SECUREBITS)
    return "" if bits == capabilities.SECUREBITS else f"{bits:#x}, not {capabilities.SECUREBITS:#x}"


def _no_new_privs(_plan: SandboxPlan) -> str:
    return "" if syscalls.prctl(syscalls.PR_GET_NO_NEW_PRIVS) == 1 else "not set"


def _become_another(plan: SandboxPlan) -> str:
    """Take another id of the range, and a group: setresuid, setgroups."""
    other = 1000 if plan.uid == 0 else 0
    _, error = syscalls.attempt(_SETGROUPS, 0, 0)
    if error == 0:
        return "setgroups"
    result, _ = syscalls.attempt(_SETRESUID, *[other & _WORD] * 3)
    return f"became uid {other}" if result == 0 else ""


def _seccomp_mode(_plan: SandboxPlan) -> str:
    with open("/proc/self/status") as file:
        mode = next((line.split()[1] for line in file if line.startswith("Seccomp:")), "none")
    return "" if mode == "2" else f"mode {mode}"


def _namespaces(_plan: SandboxPlan) -> str:
    mine = examine.namespaces("self")
    shared = [kind for kind, number in mine.items() if number == examine.HOST[kind]]
    return f"the host's {', '.join(shared)}" if shared else ""


def _resource_limits(plan: SandboxPlan) -> str:
    for name, number, most in (
        ("core", resource.RLIMIT_CORE, 1),
        ("open files", resource.RLIMIT_NOFILE, plan.limits.open_files),
        ("real-time priority", resource.RLIMIT_RTPRIO, 0),
    ):
        _, hard = resource.getrlimit(number)
        if hard == resource.RLIM_INFINITY or hard > most:
            return f"{name}: {hard}"
    return ""


def _inherited(_plan: SandboxPlan) -> str:
    """No descriptor but the standard streams outlives execve, and none of those is a directory."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the one that listed
            if fd > 2 and not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:  # noqa: PLR2004 - stderr
                return f"descriptor {fd} stays open"
            if fd <= 2 and stat.S_ISDIR(os.fstat(fd).st_mode):  # noqa: PLR2004 - stderr
                return f"descriptor {fd} is a directory"
    return ""


# --- files ---------------------------------------------------------------------------------------------------------


def _mount_flags(_plan: SandboxPlan) -> str:
    with open("/proc/self/mountinfo") as file:
        lines = file.read().splitlines()
    for line in lines:
        words = line.split()
        place, options = words[4], words[5].split(",")
        device = place.startswith("/dev/") and place != "/dev/shm"  # noqa: S108 - of the sandbox
        if "nosuid" not in options or ("nodev" not in options and not device):
            return f"{place} is {words[5]}"
        if any(word.startswith(("shared:", "master:")) for word in words[6 : words.index("-")]):
            return f"{place} is shared with the host"
    return ""


def _read_only_root(_plan: SandboxPlan) -> str:
    for place in ("/", "/usr", "/etc", "/dev"):
        if os.path.isdir(place) and not os.statvfs(place).f_flag & os.ST_RDONLY:  # noqa: PTH112 - as above
            return f"{place} is mounted writable"
    return ""


def _old_root(_plan: SandboxPlan) -> str:
    """`/` is its own parent and mounted once; nothing of pid 1's is to be seen."""
    if not os.path.samefile("/", "/.."):  # noqa: PTH121 - as above
        return "/.. is another directory"
    if os.readlink("/proc/self/root") != "/" or not os.readlink("/proc/self/cwd").startswith("/"):
        return "the root is not the root"
    with contextlib.suppress(OSError):
        os.stat("/proc/1/root")
        return "/proc/1/root"
    with open("/proc/self/mountinfo") as file:
        roots = [line for line in file if line.split()[4] == "/"]
    return "" if len(roots) == 1 else f"{len(roots)} mounts at /"


def _settings(_plan: SandboxPlan) -> str:
    """Nothing in /proc/sys opens for writing, and it is mounted read-only."""
    for name in _SETTINGS:
        with contextlib.suppress(OSError):
            os.close(os.open(f"/proc/sys/{name}", os.O_WRONLY | os.O_CLOEXEC))
            return name
    return "" if os.statvfs("/proc/sys").f_flag & os.ST_RDONLY else "/proc/sys is mounted writable"


def _masked(_plan: SandboxPlan) -> str:
    for name in _MASKED:
        flags = os.O_WRONLY if name == "sysrq-trigger" else os.O_RDONLY
        with contextlib.suppress(OSError):
            os.close(os.open(f"/proc/{name}", flags | os.O_NONBLOCK | os.O_CLOEXEC))
            return f"/proc/{name} opens"
    return "/sys/kernel is there" if os.path.exists("/sys/kernel") else ""  # noqa: PTH110 - as above


def _devices(_plan: SandboxPlan) -> str:
    extra = [
        entry.name
        for entry in os.scandir("/dev")
        if entry.name not in _DEVICES and stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) in _NODES
    ]
    return f"/dev has {', '.join(sorted(extra)[:5])}" if extra else ""


_NODES: Final = (stat.S_IFCHR, stat.S_IFBLK)


def _processes(_plan: SandboxPlan) -> str:
    """In /proc there is this process and the one that becomes the agent, and pid 1 takes no signal."""
    mine = {str(os.getpid()), str(os.getppid())}
    others = [name for name in os.listdir("/proc") if name.isdigit() and name not in mine]
    if others:
        return f"sees process {others[0]}"
    with contextlib.suppress(OSError):
        os.kill(1, 0)
        return "may signal pid 1"
    return ""


def _landlock(plan: SandboxPlan) -> str:
    """A process has room for so many layers; where one is missing, one is in force. Comes last: it confines."""
    abi = syscalls.landlock_abi()
    if plan.landlock == "off" or not abi:
        return ""
    layers = 0
    ruleset = syscalls.landlock_create_ruleset(1 << 12, abi=abi)  # making symbolic links, nowhere
    try:
        while layers < max(_LAYERS_MAX):
            syscalls.landlock_restrict_self(ruleset)
            layers += 1
    except OSError as error:
        if error.errno != errno.E2BIG:
            raise
    finally:
        os.close(ruleset)
    return f"there is room for {layers} layers: none is in force" if layers in _LAYERS_MAX else ""


# --- network -------------------------------------------------------------------------------------------------------


def _interfaces(plan: SandboxPlan) -> str:
    """One route, to the gate; connecting a datagram socket asks the kernel for a route and sends nothing."""
    with open("/proc/net/route") as file:
        routes = [line.split()[:2] for line in file.read().splitlines()[1:]]
    gate = f"{struct.unpack('=I', socket.inet_aton(plan.network.gate_address))[0]:08X}"
    if routes != [[plan.network.device, gate]]:
        return f"routes are {routes[:4]}"
    with contextlib.suppress(FileNotFoundError), open("/proc/net/if_inet6") as file:
        if file.read(1):
            return "there is an IPv6 address"
    for address in _NOWHERE:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.connect((address, 9))
            return f"there is a way to {address}"
    return ""


def _gate(plan: SandboxPlan) -> str:
    """No port of the gate but the proxy's answers. Only from a network that is the agent's own."""
    if _interfaces(plan):
        return "not tried: this is not the network of an agent"
    for port in (1, 22, plan.network.proxy_port + 1):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock, contextlib.suppress(OSError):
            sock.settimeout(1)
            sock.connect((plan.network.gate_address, port))
            return f"port {port} of the gate answers"
    return ""


def _abstract_sockets(_plan: SandboxPlan) -> str:
    """No unix socket without a file but of this network namespace, in which nobody has made one yet."""
    with open("/proc/net/unix") as file:
        names = [line.split()[7] for line in file if "@" in line]
    return f"{names[0]} can be reached" if names else ""


def _netlink(_plan: SandboxPlan) -> str:
    """Ask for a change to a link that does not exist: who may not gets EPERM, who may ENODEV."""
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0x7FFFFFF0, 0, 0)
    message = struct.pack("=IHHII", 16 + len(body), 16, 0x5, 1, 0) + body  # RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.settimeout(1)
        sock.send(message)
        (code,) = struct.unpack_from("=i", sock.recv(4096), 16)
    return "" if code == -errno.EPERM else f"the kernel answered {_name(-code)}"


# In this order. The last ones change the child.
ATTEMPTS: Final[dict[str, Attempt]] = {
    "ids": _ids,
    "id-map": _id_map,
    "capabilities": _capability_sets,
    "securebits": _securebits,
    "no-new-privs": _no_new_privs,
    "seccomp-mode": _seccomp_mode,
    "namespaces": _namespaces,
    "resource-limits": _resource_limits,
    "inherited-descriptors": _inherited,
    "mount-flags": _mount_flags,
    "read-only-root": _read_only_root,
    "old-root": _old_root,
    "kernel-settings": _settings,
    "masked-files": _masked,
    "devices": _devices,
    "processes": _processes,
    "routes": _interfaces,
    "gate-ports": _gate,
    "abstract-sockets": _abstract_sockets,
    "netlink-write": _netlink,
    **{name: _sockets(name) for name in _SOCKETS},
    "terminal-input": _terminal_input,
    "set-id-bit": _set_id_bit,
    "device-node": _device,
    **{name: _calls(name) for name in CALLS},
    "clone-namespace": _clone,
    "become-another": _become_another,
    "landlock": _landlock,
}


def digest() -> str:
    """Return the digest of the set: of this very file, so that two launches with one digest tried the same."""
    if not _digest:
        import hashlib  # noqa: PLC0415 - only launchers that ever run canaries pay for it

        with open(__file__, "rb") as file:
            _digest.append("sha256:" + hashlib.sha256(file.read()).hexdigest())
    return _digest[0]


_digest: list[str] = []
