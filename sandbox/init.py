"""The child that becomes pid 1 of a sandbox: the order of a launch, written once, top to bottom.

    launcher                          child (pid 1)                          agent
      clone3, cgroup, plan + fds  ->
                                      cgroup, network namespace
                                      mounts, pivot_root, terminal
                                      user namespace (last of all)
                                      clone3                             ->
      <- agent pidfd, terminal        gives up everything                    gives up everything, seccomp last
      <- ready                                                               waits
      go                          ->                                         execve (end-of-file on the sync socket)
                                      reaps; writes the exit status

It is still root of the host while it builds, so that every namespace but the user namespace belongs to init: capabilities
that an agent might ever regain govern nothing, and a fresh /proc mounts where the host's has covers. The network namespace
comes before the user namespace because from inside it could not be joined.
"""

import contextlib
import fcntl
import gc
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from sandbox import confine, mounts, syscalls
from sandbox.plan import INIT_INSIDE, SandboxPlan
from sandbox.sync import StepError, receive, send, step

FLAGS: Final = (
    syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS
)  # the cgroup namespace comes later: its root is the group that the child is in at that time
# What pid 1 keeps, at fixed numbers, so that a launcher that was restarted can fetch them (pidfd_getfd).
FD_EXIT: Final = 3
FD_STDOUT: Final = 4
FD_STDERR: Final = 5
FD_TERMINAL: Final = 6


class Clock:
    """Times of the steps, in microseconds."""

    def __init__(self) -> None:
        self._last = time.perf_counter_ns()
        self.steps: dict[str, int] = {}

    def mark(self, name: str) -> None:
        now = time.perf_counter_ns()
        self.steps[name] = (now - self._last) // 1000
        self._last = now


def flags(weaken: tuple[str, ...]) -> int:
    """Return the namespaces for `clone3`."""
    wanted = FLAGS
    if "private_pid" in weaken:
        wanted &= ~syscalls.CLONE_NEWPID
    if "private_ipc" in weaken:
        wanted &= ~(syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS)
    return wanted


def main(control: socket.socket, entries: tuple[int, ...]) -> NoReturn:
    """Live the life of pid 1; called in the child right after `clone3`, never returns.

    `entries` are the `tasks` files of its cgroups on v1: whoever enters by itself does so in no time, while being moved
    from outside waits for a grace period (15 ms).
    """
    try:
        gc.disable()
        with step("enter cgroups"):
            for fd in entries:
                os.write(fd, b"0")
        forget_launcher(control)
        os.setsid()
        _build(control)
    except StepError as error:
        with contextlib.suppress(OSError):
            send(control, {"error": error.to_json()})
    except BaseException as error:  # noqa: BLE001 - whatever it is, the launcher must hear of it and the child must end
        with contextlib.suppress(OSError):
            send(control, {"error": StepError("build sandbox", 0, f"{type(error).__name__}: {error}").to_json()})
    finally:
        os._exit(1)


def forget_launcher(control: socket.socket, keep: Sequence[int] = ()) -> None:
    """Drop every descriptor of the launcher but these: they are the doors of the other agents."""
    start = 3
    for fd in sorted({control.fileno(), *keep}):
        if fd > start:
            syscalls.close_range(start, fd - 1)
        start = max(start, fd + 1)
    syscalls.close_range(start)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    # Nobody but root of the host may look into this process, whatever id it takes (proc(5), PR_SET_DUMPABLE).
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.set_process_name("stockade-init")


def _build(control: socket.socket) -> None:
    message, fds = receive(control)
    if message is None:
        os._exit(0)
    clock = Clock()
    os.umask(0o022)  # the launcher's is 077; what is made here is for the agent to see
    plan = SandboxPlan.from_json(message["plan"])
    given: dict[str, Any] = message["fds"]
    weak = frozenset(plan.weaken)
    clock.mark("receive")

    with step("enter cgroup namespace"):
        syscalls.unshare(syscalls.CLONE_NEWCGROUP)
    if "network" not in weak:
        with step("enter network namespace"):
            syscalls.setns(fds[given["network"]], syscalls.CLONE_NEWNET)
    if "private_ipc" not in weak:
        with step("set host name"):
            syscalls.sethostname(plan.hostname)
            syscalls.setdomainname("(none)")
    clock.mark("namespaces")

    with step("make mounts private"):
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    clock.mark("private")
    tree = given["rootfs"]
    mounts.make_root(message["base"], plan, None if tree is None else fds[tree], clock.mark)
    mounts.attach_binds(plan, [fds[index] for index in given["binds"]])
    mounts.hide(plan.hide)
    clock.mark("binds")
    with step("enter root"):
        mounts.pivot(read_only="read_only_root" not in weak)
    clock.mark("pivot")

    master, streams = _streams(plan, [None if index is None else fds[index] for index in given["stdio"]])
    filters = b"" if "seccomp" in weak else _read(fds[given["filter"]])
    with step("lower hard limits"):
        _lower_descriptors(plan)
    if "user_namespace" not in weak:
        with step("enter user namespace"):
            syscalls.setns(fds[given["users"]], syscalls.CLONE_NEWUSER)
    clock.mark("users")

    with step("start agent process"):
        pid, pidfd = syscalls.clone3(0)
    if pid == 0:
        _agent(control, plan, streams, filters, clock)
    send(control, {"forked": True, "terminal": master is not None}, [pidfd] + ([master] if master is not None else []))
    _reap(plan, filters, pid, exit_fd=fds[given["exit"]], keep=_kept(given, fds), master=master)


def _streams(plan: SandboxPlan, stdio: list[int | None]) -> tuple[int | None, tuple[int, int, int]]:
    if plan.tty is None:
        with step("open /dev/null"):
            # The sandbox's own, not one of the launcher's: a descriptor tells where it was opened.
            given = [os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC) if fd is None else fd for fd in stdio]
        return None, (given[0], given[1], given[2])
    plain = "user_namespace" in plan.weaken
    with step("open terminal"):
        master, slave = confine.open_terminal(
            plan.tty, uid=plan.uid if plain else plan.ids.host(plan.uid), gid=5 if plain else plan.ids.host(5)
        )
    return master, (slave, slave, slave)


def _kept(given: dict[str, Any], fds: list[int]) -> tuple[int | None, int | None]:
    out, err = given["keep"]
    return (None if out is None else fds[out], None if err is None else fds[err])


def _read(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _lower_descriptors(plan: SandboxPlan) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < plan.limits.open_files:
        with contextlib.suppress(PermissionError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, plan.limits.open_files))


def _agent(
    control: socket.socket,
    plan: SandboxPlan,
    streams: tuple[int, int, int],
    filters: bytes,
    clock: Clock,
) -> NoReturn:
    try:
        with step("take standard streams"):
            confine.take_stdio(*streams)
        clock.mark("fork")
        confine.give_up(plan, filters=filters, terminal=plan.tty is not None, first=True)
        clock.mark("confine")
        send(control, {"ready": True, "timings_us": clock.steps})
        message, _ = receive(control)
        if message is None or not message.get("go"):
            os._exit(1)  # the launcher is gone or wants no more: nothing was run
        confine.execute(plan.argv, plan.env, plan.cwd)
    except StepError as error:
        with contextlib.suppress(OSError):
            send(control, {"error": error.to_json()})
    except BaseException as error:  # noqa: BLE001 - as in main
        with contextlib.suppress(OSError):
            send(control, {"error": StepError("confine agent", 0, f"{type(error).__name__}: {error}").to_json()})
    finally:
        os._exit(1)


def _keep(fds: dict[int, int | None]) -> None:
    """Move these descriptors to their numbers and close all others beyond the standard streams."""
    beyond = max(fds) + 1
    moved = {n: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, beyond) for n, fd in fds.items() if fd is not None}
    syscalls.close_range(3, beyond - 1)
    for number, fd in moved.items():
        os.dup2(fd, number, inheritable=False)
    syscalls.close_range(beyond)


def _reap(
    plan: SandboxPlan,
    filters: bytes,
    agent: int,
    *,
    exit_fd: int,
    keep: tuple[int | None, int | None],
    master: int | None,
) -> NoReturn:
    """Give up everything, reap until the agent's first process ends, write its status, end.

    What is kept open: the file for the status, and the far ends of the agent's output, so that a launcher that dies
    blocks an agent that writes and does not break it. When pid 1 ends, the kernel kills what is left in its namespace.
    """
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    confine.take_stdio(null, null, null)
    _keep(dict(zip((FD_EXIT, FD_STDOUT, FD_STDERR, FD_TERMINAL), (exit_fd, *keep, master), strict=True)))
    if "private_pid" in plan.weaken:
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    confine.become(INIT_INSIDE, INIT_INSIDE)
    # The change of ids set it anew from fs.suid_dumpable.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    confine.install(filters, plan)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == agent:
            break
    code = os.waitstatus_to_exitcode(status)
    text = {"code": code, "signal": None} if code >= 0 else {"code": None, "signal": -code}
    os.pwrite(FD_EXIT, json.dumps(text).encode(), 0)
    os._exit(0)
