"""The last steps before an agent's program: what a process gives up, and `execve`.

Used for the first program of a sandbox and for those that `exec` starts later, so that both are confined alike.
"""

# ruff: noqa: PTH116, PTH123 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import contextlib
import errno
import fcntl
import os
import resource
import signal
import stat
import struct
import termios
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from sandbox import capabilities, landlock, syscalls
from sandbox.filters import agent_filters
from sandbox.keeper import has_room, keep_memory
from sandbox.plan import SandboxPlan, Tty
from sandbox.sync import StepError, step

SEARCH_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LOCKED_MEMORY_BYTES: Final = 8 << 20
QUEUED_SIGNALS_MAX: Final = 8192  # and timers, which reserve one each; the default grows with the machine
QUEUE_BYTES: Final = 819_200  # what Linux gives to everybody
# setrlimit(2), <asm-generic/resource.h>; Python 3.11 has no names for them.
_RLIMIT_SIGPENDING: Final = 11
_RLIMIT_MSGQUEUE: Final = 12
# The kernel's killer takes agents before services of the host (proc(5), oom_score_adj).
OOM_SCORE: Final = 500
# Of what Python sets to "ignore" at its start; a program expects the default.
# ioctl_tty(2); Python 3.11 has no names for them.
_TIOCSPTLCK: Final = 0x40045431
_TIOCGPTPEER: Final = 0x5441
_IGNORED_BY_PYTHON: Final = (signal.SIGPIPE, signal.SIGXFSZ)


def take_stdio(stdin: int, stdout: int, stderr: int) -> None:
    """Make these the standard streams; they may have any numbers, also 0 to 2 of another order."""
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (stdin, stdout, stderr)]
    for target, fd in enumerate(moved):
        os.dup2(fd, target)


def keep_only(fds: Sequence[int]) -> None:
    """Close every descriptor but the standard streams and these.

    An agent's working directory and program are looked up after this: a directory among what a launch was given, the
    scratch or a bind of it, would be reached as /proc/self/fd/N (CVE-2024-21626).
    """
    start = 3
    for fd in sorted(set(fds)):
        if fd > start:
            syscalls.close_range(start, fd - 1)
        start = max(start, fd + 1)
    syscalls.close_range(start)


def open_terminal(tty: Tty, *, uid: int, gid: int) -> tuple[int, int]:
    """Return `(master, slave)` of a new terminal of this sandbox's own devpts, owned by these host ids."""
    master = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
        # The peer without a path: /dev/pts could be anything in a root given as a directory (ioctl_tty(2)).
        slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        os.fchown(slave, uid, gid)
        resize(master, tty)
    except OSError:
        os.close(master)
        raise
    return master, slave


def resize(terminal: int, tty: Tty) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", tty.rows, tty.cols, 0, 0))


def start_session() -> None:
    with step("start session"):
        os.setsid()
        os.umask(0o022)
        for number in _IGNORED_BY_PYTHON:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


def limit(plan: SandboxPlan) -> None:
    """Set resource limits; while still root of the host."""
    with step("set resource limits"):
        _limit(plan, core="rlimits" not in plan.weaken)


def let_be_killed() -> None:
    """Stand first in line of the kernel's killer.

    Root's word (CAP_SYS_RESOURCE) is also the least there may be later: an agent cannot go back to the launcher's.
    """
    with contextlib.suppress(PermissionError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(OOM_SCORE))


def give_up(plan: SandboxPlan) -> None:
    """Become the agent: ids, capabilities, keyring, no way back. In its user namespace. Raises `StepError`."""
    weak = frozenset(plan.weaken)
    become(plan.uid, plan.gid, keep_capabilities="capabilities" in weak)
    with step("leave session keyring"):
        syscalls.keyctl_join_session_keyring()
    if "new_privileges" not in weak:
        with step("set no_new_privs"):
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)


@dataclass(frozen=True, slots=True)
class Closed:
    """Descriptors that come of closing in, -1 for none."""

    listener: int = -1  # of the filter: whoever has it answers for every exec
    keeper: int = -1  # pidfd (keeper.py)


def close_in(plan: SandboxPlan, *, filters: bytes, terminal: bool, first: bool) -> Closed:
    """Add what needs mounts and standard streams in place: terminal, Landlock, seccomp last. Raises `StepError`.

    Landlock is for the first process and all its descendants. A process that exec starts later cannot join that domain,
    and from a domain of its own it cannot see the agent in /proc: it has one where the policy requires it, and
    otherwise only the same mounts. The agent cannot look into it either.
    """
    wanted = plan.landlock == "required" or (first and plan.landlock == "if-present")
    if terminal:
        with step("take terminal"):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    if wanted and "landlock" not in plan.weaken and landlock.ABI:
        with step("restrict with Landlock"):
            _landlock(plan)
    if "seccomp" in plan.weaken:
        return Closed()
    programs = agent_filters(filters)
    listener, keeper = -1, -1
    if plan.listens:
        listener = install_listening(programs[0])
    else:
        install(programs[:1])
    # Between the two: it is confined by the first, and the second refuses CLONE_PARENT. Where refused calls are told of
    # a profile without clone would have this process wait for an answer that nobody gives yet.
    if first and has_room(plan.limits) and not (plan.listens and plan.record.refusals):
        keeper = keep_memory()
    install(programs[1:])
    return Closed(listener, keeper)


def become(uid: int, gid: int, *, keep_capabilities: bool = False) -> None:
    """Take these ids, inside, and give up all capabilities."""
    with step("drop capabilities"):
        if not keep_capabilities:
            capabilities.lock()
    with step("change ids"):
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        if keep_capabilities:
            syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)
        os.setresuid(uid, uid, uid)
    with step("drop capabilities"):
        if not keep_capabilities:
            capabilities.drop()
    # The change of ids set it anew from fs.suid_dumpable: until execve nobody of these ids may look into this process.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)


def rehearse() -> None:
    """Do what `become` does, as root of the host that stays so: what it touches is in place when that is for good."""
    for number in range(capabilities.LAST + 1):
        syscalls.prctl(syscalls.PR_CAPBSET_READ, number)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)


def install(programs: Sequence[bytes]) -> None:
    """Load seccomp programs. Last, because they forbid what the other steps need."""
    with step("load seccomp filter"):
        for program in programs:
            syscalls.seccomp_filter(program)


def install_listening(program: bytes) -> int:
    """Load it and return its listener: whoever has that answers the calls that it asks about.

    The kernel lets nobody add a second listener (EBUSY, seccomp_unotify(2)), and the filter lets nobody try.
    """
    with step("load seccomp filter"):
        return syscalls.seccomp_listener(program)


def _limit(plan: SandboxPlan, *, core: bool) -> None:
    _lower(resource.RLIMIT_NOFILE, plan.limits.open_files)
    _lower(resource.RLIMIT_MEMLOCK, LOCKED_MEMORY_BYTES)
    _lower(resource.RLIMIT_RTPRIO, 0)
    limit_counted()
    if core:
        # 1 and not 0: with 0 a core_pattern that is a pipe still starts its handler, as root of the host (core(5)).
        _lower(resource.RLIMIT_CORE, 1)


def limit_counted() -> None:
    """Limit what the kernel counts per user and not per process: memory of its own that no cgroup is charged for."""
    _lower(_RLIMIT_SIGPENDING, QUEUED_SIGNALS_MAX)
    _lower(_RLIMIT_MSGQUEUE, QUEUE_BYTES)


def _lower(what: int, value: int) -> None:
    """Set both limits, at most to the hard one there is: raising it takes CAP_SYS_RESOURCE."""
    _, hard = resource.getrlimit(what)
    least = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (least, least))


def _landlock(plan: SandboxPlan) -> None:
    ruleset = landlock.make_ruleset(writable_places(plan), landlock.ABI)
    syscalls.landlock_restrict_self(ruleset)
    os.close(ruleset)


def writable_places(plan: SandboxPlan) -> Iterator[str]:
    """Yield what Landlock leaves writable: scratch, devices, /proc/self, writable binds, and where grants appear."""
    yield from ("/tmp", "/home/agent", "/dev", "/proc", "/workspace", "/grants")  # noqa: S108 - inside the sandbox
    yield from (bind.target for bind in plan.binds if bind.writable and bind.target != "/workspace")


def execute(argv: Sequence[str], env: Sequence[tuple[str, str]], cwd: str) -> NoReturn:
    """Replace the process; every descriptor beyond 2 goes. Raises `StepError` with the errno of `execve`."""
    with step(f"enter working directory {cwd}", "name a directory that the agent can enter, as it is seen inside"):
        os.chdir(cwd)
    environment = dict(env)
    # Close before exec: an inherited directory descriptor is a way back to the host (CVE-2024-21626). Marked instead of
    # closed, so that the sync socket still tells of a failing execve.
    with step("close descriptors"):
        syscalls.close_range(3, syscalls.FD_MAX, syscalls.CLOSE_RANGE_CLOEXEC)
    failure = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for candidate in _candidates(argv[0], environment.get("PATH", SEARCH_PATH)):
        try:
            os.execve(candidate, list(argv), environment)  # noqa: S606 - this is what it is for
        except OSError as error:
            # As a shell does: "not executable" in one place is told, "not there" only when it is nowhere.
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                failure = error
    raise StepError("exec", failure.errno or 0, f"{argv[0]}: {failure.strerror}", "see the command of the agent")


def _candidates(name: str, path: str) -> Iterator[str]:
    if "/" in name:
        yield name
        return
    for directory in path.split(":"):
        candidate = f"{directory or '.'}/{name}"
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.stat(candidate).st_mode):
                yield candidate
