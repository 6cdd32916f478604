"""How a process that parses foreign bytes gives up everything: user, capabilities, network, system calls. For good.

Used once, right before the first foreign byte, by the egress worker, the dialer and the embedded gateway. Import all
that will ever be needed first: afterwards nothing can be opened (`encodings.idna` is the classic).
"""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import prctl  # type: ignore[import-untyped]
import pyseccomp  # type: ignore[import-untyped]

_CLONE_NEWNET: Final = 0x40000000  # linux/sched.h; os.unshare came with Python 3.12
_FIONREAD: Final = 0x541B
_FIONBIO: Final = 0x5421
_FIOCLEX: Final = 0x5451

STEADY: Final = (
    "accept4",
    "brk",
    "clock_getres",  # a real call where the vDSO does not serve it (User-Mode Linux, some clock sources)
    "clock_gettime",
    "clock_nanosleep",
    "close",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_wait",
    "exit",
    "exit_group",
    "fcntl",
    "fstat",
    "futex",
    "getpeername",
    "getpid",
    "getrandom",
    "getsockname",
    "getsockopt",
    "gettid",
    "gettimeofday",
    "getuid",
    "lseek",
    "madvise",
    "mmap",
    "mremap",
    "munmap",
    "newfstatat",
    "poll",
    "ppoll",
    "read",
    "readv",
    "recvfrom",
    "recvmsg",
    "restart_syscall",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_yield",
    "sendmsg",
    "sendto",
    "setsockopt",
    "shutdown",
    "sigaltstack",
    "write",
    "writev",
)
"""What moving bytes between sockets that exist takes. No socket, connect, bind, open, exec, fork or ptrace."""

DIAL: Final = ("socket", "connect", "dup")
"""What opening a connection takes beside that."""


class CannotConfine(OSError):  # noqa: N818 - named for what it says
    """Something could not be given up: the process must end."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """What is left to a process."""

    user: str
    """A system user; its name, never root."""
    system_calls: tuple[str, ...]
    own_network: bool
    """Whether to enter a fresh network namespace, which has no route and no interface that is up."""
    open_files_max: int = 65536
    processes_max: int = 1
    """Processes and threads that the user may have (RLIMIT_NPROC)."""


def confine(plan: Confinement) -> tuple[str, ...]:
    """Give everything up, in the one order that works; return the facts, as the kernel reports them, or raise."""
    try:
        entry = pwd.getpwnam(plan.user)
    except KeyError as error:
        raise CannotConfine(f"cannot become {plan.user}: no such user; `./bootstrap setup` makes it") from error
    if entry.pw_uid == 0 or entry.pw_gid == 0:
        raise CannotConfine(f"cannot become {plan.user}: it is root; name a system user in [users]")
    seccomp = _filter(plan.system_calls)
    if plan.own_network:
        _unshare_network()
    os.chdir("/")
    os.umask(0o077)
    _limit(plan.open_files_max, plan.processes_max)
    prctl.capbset.limit()
    prctl.cap_inheritable.limit()
    prctl.securebits.noroot = True
    prctl.securebits.noroot_locked = True
    os.setgroups([])
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    prctl.set_no_new_privs(1)
    prctl.set_dumpable(False)
    facts = _facts(own_network=plan.own_network)
    seccomp.load()
    return (*facts, f"seccomp={len(plan.system_calls)} system calls")


def forbid_io_uring() -> None:
    """Have io_uring_setup fail with ENOSYS from here on; call it before an event loop is made.

    libuv batches epoll_ctl through a ring where the kernel has one, and aborts when the filter later refuses it. The
    ring could not be allowed: what is submitted there (openat, connect) passes no seccomp filter.
    """
    seccomp = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    seccomp.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "io_uring_setup")
    seccomp.load()


def _unshare_network() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.unshare.argtypes = (ctypes.c_int,)
    if libc.unshare(_CLONE_NEWNET) < 0:
        number = ctypes.get_errno()
        raise CannotConfine(number, f"cannot unshare network: {os.strerror(number)}")


def _limit(open_files: int, processes_max: int) -> None:
    soft = min(open_files, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
    # Not RLIMIT_FSIZE: stderr may be a file, and no other can be opened.
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE):
        resource.setrlimit(limit, (0, 0))
    # 1, not 0: exceeding it shows only at fork, which the filter refuses anyway.
    resource.setrlimit(resource.RLIMIT_NPROC, (processes_max, processes_max))


def _facts(*, own_network: bool) -> tuple[str, ...]:
    """Read back what the kernel says; raise where it is not what was asked for."""
    status = dict(
        line.split(":\t", 1)
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        if ":\t" in line
    )
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if int(status[name], 16):
            raise CannotConfine(f"cannot drop capabilities: {name} is {status[name]}")
    if status["NoNewPrivs"] != "1" or "0" in status["Uid"].split() or status["Groups"].strip():
        raise CannotConfine("cannot drop privileges: the kernel still reports some")
    facts = [f"uid={os.getuid()}", "capabilities=0", "no_new_privs"]
    if own_network:
        routes = Path("/proc/self/net/route").read_text(encoding="ascii").splitlines()[1:]
        if routes:
            raise CannotConfine("cannot leave the network: the namespace has routes")
        facts.append("netns=own, no route")
    return tuple(facts)


def _filter(system_calls: tuple[str, ...]) -> pyseccomp.SyscallFilter:
    """Compile an allow-list. Anything else is EPERM, which Python survives; starting a program kills the process."""
    seccomp = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for name in system_calls:
        seccomp.add_rule(pyseccomp.ALLOW, name)
    for name in ("execve", "execveat", "ptrace", "bpf", "mount", "setns", "unshare", "init_module", "finit_module"):
        seccomp.add_rule(pyseccomp.KILL_PROCESS, name)
    for request in (_FIONBIO, _FIOCLEX, _FIONREAD):
        seccomp.add_rule(pyseccomp.ALLOW, "ioctl", pyseccomp.Arg(1, pyseccomp.EQ, request))
    # A thread or process would be one more place to look at; mprotect may not make code.
    seccomp.add_rule(pyseccomp.ALLOW, "mprotect", pyseccomp.Arg(2, pyseccomp.MASKED_EQ, 4, 0))
    return seccomp
