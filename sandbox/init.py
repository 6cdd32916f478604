"""The two processes of a sandbox before the agent's program runs: the order of a launch, written once, top to bottom.

    launcher                     pid 1                                  stub, then agent
      clone3 into a cgroup   ->  enters v1 groups, forgets the launcher
                                 cgroup namespace, private mounts
                                 standard mounts, where asked to        <- clone3
      plan + descriptors     ->  network namespace, mounts, pivot_root  network namespace
                                 terminal, and the word "built"      -> streams, user namespace (last of all)
                                 user namespace, gives up everything    gives up everything, seccomp last
                                                                        canaries, where asked for, in a child of it
                                                                        a sibling keeps its memory (confine.py)
      <- ready                                                          waits
      go                     ->                                         execve (end-of-file on the sync socket)
                                 reaps; writes the exit status

Everything before the plan can be done ahead of need, and is, while the launcher is idle. Both are root of the host
while they build, so that every namespace but the user namespace belongs to init: capabilities that an agent might ever
regain govern nothing, and a fresh /proc mounts where the host's has covers. The network namespace comes before the user
namespace because from inside it could not be joined.
"""

import contextlib
import fcntl
import gc
import json
import os
import pickle
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from sandbox import binds, canaries, confine, etc, javatrust, mounts, syscalls
from sandbox.filters import init_filter
from sandbox.plan import INIT_INSIDE, SandboxPlan
from sandbox.sync import StepError, close_all, receive, receive_bytes, send, send_bytes, step

FLAGS: Final = (
    syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS
)  # the cgroup namespace comes later: its root is the group that the child is in at that time
# What pid 1 keeps, at fixed numbers, so that a launcher that was restarted can fetch them (pidfd_getfd).
FD_EXIT: Final = 3
FD_STDOUT: Final = 4
FD_STDERR: Final = 5
FD_TERMINAL: Final = 6
FD_CONTROL: Final = 7  # until it has given up everything
FD_LISTENER: Final = 8  # of the agent's seccomp filter, if it has one: while pid 1 lives, calls that ask wait


@dataclass(frozen=True, slots=True)
class Standard:
    """What a starter makes ahead of need: the mounts of this plan, at this directory."""

    base: str
    plan: SandboxPlan


@dataclass(frozen=True, slots=True)
class Order:
    """What the launcher tells both processes: a plan that it has checked, and which descriptor is what."""

    plan: SandboxPlan
    fds: dict[str, Any]
    base: str
    stage: str

    def dumps(self) -> bytes:
        """Write it for children of this very process; quicker to read than JSON, and nobody else can write to them."""
        return pickle.dumps(self, pickle.HIGHEST_PROTOCOL)


def _receive(control: socket.socket) -> tuple[Order | None, list[int]]:
    data, fds = receive_bytes(control)
    order: Order | None = pickle.loads(data) if data else None  # noqa: S301 - of the parent that this was forked from
    return order, fds


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


def main(control: socket.socket, stub: socket.socket, entries: tuple[int, ...], standard: Standard | None) -> NoReturn:
    """Live the life of pid 1; called in the child right after `clone3`, never returns.

    `entries` are the `tasks` files of its cgroups on v1: whoever enters by itself does so in no time, while being moved
    from outside waits for a grace period (15 ms). With `standard`, the mounts that most plans share are made at once.
    """
    with _reporting(control):
        gc.disable()
        with step("enter cgroups"):
            for fd in entries:
                os.write(fd, b"0")
        forget_launcher(control, keep=[stub.fileno()])
        confine.let_be_killed()  # the launcher's own score is not for what it starts
        os.setsid()
        os.umask(0o022)  # the launcher's is 077; what is made here is for the agent to see
        with step("enter cgroup namespace"):
            syscalls.unshare(syscalls.CLONE_NEWCGROUP)
        with step("make mounts private"):
            syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        store = None
        if standard is not None:
            store = mounts.make_standard(standard.base, standard.plan, None, Clock().mark)
        built, told = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with step("start agent process"):
            pid, pidfd = syscalls.clone3(0)
        if pid == 0:
            control.close()
            told.close()
            _agent(stub, built, standard)
        stub.close()
        built.close()
        send(control, {"forked": pid}, [pidfd])
        os.close(pidfd)
        if standard is not None:
            _warm(standard.plan)
        _build(control, told, pid, store)


def _warm(plan: SandboxPlan) -> None:
    """Do what a launch does, where it changes nothing, so that by then the pages it touches are this process's own.

    Not all pages at once: pid 1 keeps them for as long as its agent lives, and the stub's execve has to give them back.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        send_bytes(ours, Order(plan, {}, "", "").dumps(), [0])
        order, fds = _receive(theirs)
        close_all(fds)
    if order is not None:
        etc.files(order.plan)
    confine.rehearse()


@contextlib.contextmanager
def _reporting(control: socket.socket, *, ends: bool = True) -> Iterator[None]:
    """Tell the launcher of whatever goes wrong and end this process; with `ends`, end it in any case."""
    failed = True
    try:
        yield
        failed = ends
    except StepError as error:
        with contextlib.suppress(OSError):
            send(control, {"error": error.to_json()})
    except BaseException as error:  # noqa: BLE001 - whatever it is, the launcher must hear of it and the child must end
        with contextlib.suppress(OSError):
            send(control, {"error": StepError("build sandbox", 0, f"{type(error).__name__}: {error}").to_json()})
    finally:
        if failed:
            os._exit(1)


def forget_launcher(control: socket.socket, keep: Sequence[int] = ()) -> None:
    """Drop every descriptor of the launcher but these: they are the doors of the other agents."""
    confine.keep_only((control.fileno(), *keep))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    # Nobody but root of the host may look into this process, whatever id it takes (proc(5), PR_SET_DUMPABLE).
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.set_process_name("stockade-init")


def _build(control: socket.socket, told: socket.socket, agent: int, store: javatrust.Begun | None) -> NoReturn:
    """Perform the plan when it comes; with the launcher's end of file instead there is nothing to do.

    `store` is there where the standard mounts are.
    """
    order, fds = _receive(control)
    if order is None:
        os._exit(0)
    clock = Clock()
    plan, given = order.plan, order.fds
    weak = frozenset(plan.weaken)
    clock.mark("receive")

    if "network" not in weak:
        with step("enter network namespace"):
            syscalls.setns(fds[given["network"]], syscalls.CLONE_NEWNET)
    if "private_ipc" not in weak:
        with step("set host name"):
            syscalls.sethostname(plan.hostname)
            syscalls.setdomainname("(none)")
    clock.mark("namespaces")

    if store is None:
        tree = given["rootfs"]
        store = mounts.make_standard(order.base, plan, None if tree is None else fds[tree], clock.mark)
    staged = {
        name: None if given[name] is None else mounts.Staged(fds[given[name]], f"{order.stage}/{name}")
        for name in ("image", "home")
    }
    mounts.make_own(plan, store, image=staged["image"], home=staged["home"], mark=clock.mark)
    binds.attach_binds(plan, [fds[index] for index in given["binds"]], order.stage)
    mounts.hide(plan.hide)
    clock.mark("binds")
    with step("enter root"):
        mounts.pivot(read_only="read_only_root" not in weak)
    clock.mark("pivot")

    master, slave = _terminal(plan)
    send(told, {"built": True, "timings_us": clock.steps}, [] if slave is None else [slave])
    if master is not None:
        send(control, {"terminal": True}, [master])
    filters = b"" if "seccomp" in weak else _read(fds[given["filter"]])
    if "user_namespace" not in weak:
        with step("enter user namespace"):
            syscalls.setns(fds[given["users"]], syscalls.CLONE_NEWUSER)
    kept = {FD_EXIT: fds[given["exit"]], FD_TERMINAL: master, **_kept(given, fds)}
    if plan.listens:
        # Before pid 1 gives up the calls that this takes. Nothing comes where the agent's process died.
        _, listener = receive(told)
        kept[FD_LISTENER] = listener[0] if listener else None
    _reap(plan, filters, agent, control, kept)


def _terminal(plan: SandboxPlan) -> tuple[int | None, int | None]:
    if plan.tty is None:
        return None, None
    plain = "user_namespace" in plan.weaken
    with step("open terminal"):
        return confine.open_terminal(
            plan.tty, uid=plan.uid if plain else plan.ids.host(plan.uid), gid=5 if plain else plan.ids.host(5)
        )


def _kept(given: dict[str, Any], fds: list[int]) -> dict[int, int | None]:
    numbers = (FD_STDOUT, FD_STDERR)
    return {n: None if index is None else fds[index] for n, index in zip(numbers, given["keep"], strict=True)}


def _read(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _agent(control: socket.socket, built: socket.socket, standard: Standard | None) -> NoReturn:
    """Wait for the plan and for the root, become the agent, wait for `go`, exec.

    Needs nothing of the mounts to give up ids and capabilities, so it does that while pid 1 makes them.
    """
    with _reporting(control):
        # The root that pid 1 pivots to becomes the root of whoever has the old one.
        os.chdir("/")
        if standard is not None:
            _warm(standard.plan)
        confine.start_session()
        order, fds = _receive(control)
        if order is None:
            os._exit(0)
        clock = Clock()
        plan, given = order.plan, order.fds
        weak = frozenset(plan.weaken)
        filters = b"" if "seccomp" in weak else _read(fds[given["filter"]])
        if "network" not in weak:
            with step("enter network namespace"):
                syscalls.setns(fds[given["network"]], syscalls.CLONE_NEWNET)
        confine.limit(plan)
        if "user_namespace" not in weak:
            with step("enter user namespace"):
                syscalls.setns(fds[given["users"]], syscalls.CLONE_NEWUSER)
        confine.give_up(plan)
        clock.mark("stub give up")
        answer, terminal = receive(built)
        if answer is None:
            os._exit(1)  # pid 1 has told the launcher why
        clock.mark("stub wait")
        os.chdir("/")
        with step("take standard streams"):
            _take_streams([None if index is None else fds[index] for index in given["stdio"]], terminal)
        confine.keep_only((control.fileno(), *((built.fileno(),) if plan.listens else ())))
        closed = confine.close_in(plan, filters=filters, terminal=plan.tty is not None, first=True)
        listening: list[int] = []
        if plan.listens:
            listening.append(closed.listener)
            with built:
                send(built, {"listener": True}, listening)
        clock.mark("stub close in")
        said: dict[str, Any] = {"ready": True, "securebits": syscalls.prctl(syscalls.PR_GET_SECUREBITS)}
        if plan.canary:
            if listening:  # what canaries try asks already, and is no act of the agent
                send(control, {"listener": True}, listening)
                os.close(listening.pop())
            said["canary"] = canaries.run(plan)
            clock.mark("stub canaries")
        said["timings_us"] = answer["timings_us"] | clock.steps
        _say_ready(control, said, closed.keeper, listening)
        message, _ = receive(control)
        if message is None or not message.get("go"):
            os._exit(1)  # the launcher is gone or wants no more: nothing was run
        confine.execute(plan.argv, plan.env, plan.cwd)


def _say_ready(control: socket.socket, said: dict[str, Any], keeper: int, listening: list[int]) -> None:
    """Tell the launcher, with what is the launcher's from now on.

    Closed here before the agent's directory and program are looked up, which go where the agent has made them go.
    """
    if keeper < 0:
        send(control, said, listening)
        close_all(listening)
        return
    # On by another channel: the keeper has a copy of this one, and its end would not tell of execve.
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mine, theirs:
        send(control, said | {"kept": True}, [keeper, theirs.fileno(), *listening])
        os.dup2(mine.fileno(), control.fileno(), inheritable=False)
    close_all([keeper, *listening])


def _take_streams(stdio: list[int | None], terminal: list[int]) -> None:
    if terminal:
        confine.take_stdio(terminal[0], terminal[0], terminal[0])
        return
    # The sandbox's own null device, not one of the launcher's: a descriptor tells where it was opened.
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    stdin, stdout, stderr = (null if fd is None else fd for fd in stdio)
    confine.take_stdio(stdin, stdout, stderr)


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
    control: socket.socket,
    kept: dict[int, int | None],
) -> NoReturn:
    """Give up everything, say so, reap until the agent's first process ends, write its status, end.

    What is `kept` open, by number: the file for the status, the far ends of the agent's output, and the listener of its
    filter, so that a launcher that dies blocks an agent that writes, or executes what is told, and does not break it.
    When pid 1 ends, the kernel kills what is left in its namespace.
    """
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    confine.take_stdio(null, null, null)
    _keep({**kept, FD_CONTROL: control.detach()})
    if "private_pid" in plan.weaken:
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    with socket.socket(fileno=FD_CONTROL) as launcher, _reporting(launcher, ends=False):
        confine.become(INIT_INSIDE, INIT_INSIDE)
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        if filters:
            confine.install((init_filter(filters),))
        send(launcher, {"sealed": True})
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
