"""Start one more process in a sandbox that runs, confined as its first one is.

A child of the launcher enters the namespaces by pidfd, the user namespace last, and forks the process as its own
sibling (CLONE_PARENT): the launcher is its parent, reaps it and has its status, while the process lives in the pid
namespace.
"""

import contextlib
import errno
import gc
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from sandbox import confine, sync, syscalls
from sandbox.decoding import InvalidPlan
from sandbox.init import forget_launcher
from sandbox.loop import READ, AnyLoop
from sandbox.plan import SandboxPlan, Tty, check_environment, check_strings, check_target, check_terminal
from sandbox.running import Agent, State
from sandbox.stdio import Feed, Pump, RotatingFile
from sandbox.sync import StepError, ToldError, receive, send, step

STREAMS_PER_AGENT_MAX: Final = 64
STREAM_ID_MAX: Final = 64  # it is part of a file name
REAP_SECONDS: Final = 0.005
_ALL: Final = (
    syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWCGROUP
    | syscalls.CLONE_NEWNET
)


@dataclass(frozen=True, slots=True)
class ExecOrder:
    """What to start: decoded and checked."""

    stream_id: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    cwd: str
    tty: Tty | None
    stdin: bool

    def validate(self) -> None:
        """Raise `InvalidPlan` on what types cannot say."""
        if not 0 < len(self.stream_id) <= STREAM_ID_MAX or not all(
            c.isascii() and (c.isalnum() or c in "-_") for c in self.stream_id
        ):
            raise InvalidPlan("stream_id: must be 1..64 letters, digits, '-' or '_'")
        if not self.argv or not self.argv[0]:
            raise InvalidPlan("argv: must not be empty")
        check_strings("argv", self.argv)
        check_environment("env", self.env)
        check_target("cwd", self.cwd)
        if self.tty is not None:
            check_terminal(self.tty)


@dataclass(slots=True, eq=False)
class Stream:
    """A process that was started later, and its streams; unknown to pid 1 but for its end."""

    agent: Agent
    order: ExecOrder
    loop: AnyLoop
    started: Callable[["Stream", StepError | None], None]
    exited: Callable[["Stream", dict[str, Any]], None]
    control: socket.socket | None = None
    pid: int = 0
    pidfd: int = -1
    helper: int = 0
    helper_fd: int = -1
    pumps: list[Pump] = field(default_factory=list)
    feed: Feed | None = None
    terminal: int = -1
    running: bool = False
    deadline: int = 0

    @property
    def stream_id(self) -> str:
        return self.order.stream_id

    def late(self) -> None:
        """Give up an exec that is still under way: its file may be held by a lease, and it must not start later."""
        if self.control is not None:
            self._failed(StepError("exec", errno.ETIMEDOUT, "not done in time"))

    def _heard(self, _events: int) -> None:
        assert self.control is not None  # noqa: S101 - watched only while it is there
        try:
            message, fds = receive(self.control)
        except (OSError, ValueError):
            message, fds = None, []
        if message is None:
            self._close_control()
            self._reap_helper(block=True)
            if self.pidfd >= 0:
                self.running = True
                self.loop.watch(self.pidfd, READ, lambda _e: self.poll())
                self.started(self, None)
            else:
                self._failed(StepError("exec", 0, "the process ended before it began"))
        elif "error" in message:
            sync.close_all(fds)
            error = message["error"]
            self._failed(StepError(error["step"], 0, error["message"]), as_told=error)
        elif message.get("forked"):
            self.pid, self.pidfd = message["pid"], fds[0]
            if len(fds) > 1:
                self._adopt_terminal(fds[1])
        elif message.get("listener") and self.agent.watching is not None:
            self.agent.watching.add(self.agent, self.stream_id, fds[0])

    def _adopt_terminal(self, master: int) -> None:
        self.terminal = master
        path = f"{self.agent.directory}/exec-{self.stream_id}.out"
        share = self.agent.plan.limits.output_bytes // 2
        self.pumps.append(Pump(self.loop, os.dup(master), RotatingFile(path, share)))
        self.feed = Feed(self.loop, os.dup(master), terminal=True)

    def _failed(self, error: StepError, as_told: dict[str, Any] | None = None) -> None:
        told = ToldError(as_told) if as_told is not None else error
        self.close()
        self.started(self, told)

    def poll(self) -> None:
        """Take note of the end of the process."""
        self._reap_helper(block=False)
        if self.pidfd < 0:
            return
        try:
            result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            self.loop.forget(self.pidfd)
            return
        if result is None:
            return
        exited = result.si_code == os.CLD_EXITED
        status = {"code": result.si_status if exited else None, "signal": None if exited else result.si_status}
        was_running = self.running
        self.close()
        if was_running:
            self.exited(self, status)

    def _reap_helper(self, *, block: bool) -> None:
        if self.helper:
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(self.helper, 0 if block else os.WNOHANG)[0] == 0:
                    return
            os.close(self.helper_fd)
            self.helper = 0

    def _close_control(self) -> None:
        if self.control is not None:
            self.loop.cancel(self.deadline)
            self.loop.forget(self.control.fileno())
            self.control.close()
            self.control = None

    def signal(self, number: int) -> None:
        syscalls.pidfd_send_signal(self.pidfd, number)

    def end(self) -> None:
        """Close with the agent, and tell whoever waits."""
        was_running, waited_for = self.running, self.control is not None
        self.running = False
        self.close()
        if was_running:
            self.exited(self, {"code": None, "signal": int(signal.SIGKILL)})
        elif waited_for:
            self.started(self, StepError("exec", 0, f"agent {self.agent.agent_id} ended"))

    def close(self) -> None:
        """Kill what may run, copy what it wrote, let go of everything."""
        self.agent.streams.pop(self.stream_id, None)
        self._close_control()
        if self.helper:
            with contextlib.suppress(OSError):
                syscalls.pidfd_send_signal(self.helper_fd, signal.SIGKILL)
            self._reap_helper(block=True)
        if self.pidfd >= 0:
            self.loop.forget(self.pidfd)
            with contextlib.suppress(OSError):
                syscalls.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            reap(self.loop, self.pid)
            os.close(self.pidfd)
            self.pidfd = -1
        self.loop.later(REAP_SECONDS, self.agent.drop_trees)
        for pump in self.pumps:
            pump.drain()
        if self.feed is not None:
            self.feed.close()
        if self.terminal >= 0:
            os.close(self.terminal)
            self.terminal = -1


def reap(loop: AnyLoop, pid: int) -> None:
    """Collect a child that was killed, now or as soon as it is dead: pid 1 of its sandbox waits for that."""
    with contextlib.suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG)[0] == 0:
            loop.later(REAP_SECONDS, lambda: reap(loop, pid))


def start(
    agent: Agent,
    order: ExecOrder,
    *,
    started: Callable[[Stream, StepError | None], None],
    exited: Callable[[Stream, dict[str, Any]], None],
) -> None:
    """Begin; `started` is called after `execve` or a failure, `exited` at the end. Raises `StepError`."""
    order.validate()
    if agent.state is not State.RUNNING or agent.group is None or agent.frozen:
        raise StepError("exec", 0, f"agent {agent.agent_id} is not running", "wait for it, or thaw it")
    if order.stream_id in agent.streams or order.stream_id == agent.agent_id:
        raise StepError("exec", 0, f"stream {order.stream_id} is there already")
    if agent.trees().left(order.stream_id):
        raise StepError("exec", 0, f"processes of an earlier stream {order.stream_id} are there still")
    if len(agent.streams) >= STREAMS_PER_AGENT_MAX:
        raise StepError("exec", 0, f"agent has {STREAMS_PER_AGENT_MAX} streams already")
    stream = Stream(agent, order, agent.loop, started, exited)
    ours, theirs = sync.pair()
    with contextlib.ExitStack() as undo:
        undo.callback(theirs.close)
        undo.callback(ours.close)
        given, mine = _pipes(agent.plan, order)
        undo.callback(sync.close_all, mine)
        with contextlib.ExitStack() as always:
            always.callback(sync.close_all, [fd for fd in given if fd is not None])
            with step("make cgroup", "see `stockadectl doctor`"):
                tree = agent.trees().take()
            try:
                with step("start exec helper"):
                    pid, pidfd = syscalls.clone3(0, cgroup=tree.fd)
            except StepError:
                agent.trees().give_back(tree)
                raise
            if pid == 0:
                _helper(agent, order, theirs, given)
        stream.helper, stream.helper_fd = pid, pidfd
        theirs.close()
        undo.pop_all()
    stream.control = ours
    stream.deadline = agent.loop.later(agent.exec_seconds, stream.late)
    agent.streams[order.stream_id] = stream
    if order.tty is None:
        _pump(stream, mine)
    agent.loop.watch(ours.fileno(), READ, stream._heard)  # noqa: SLF001 - same module
    # While the helper is under way.
    agent.trees().keep(tree, order.stream_id)


def _pipes(plan: SandboxPlan, order: ExecOrder) -> tuple[list[int | None], list[int]]:
    """Return the child's ends (None: /dev/null, or a terminal) and ours."""
    if order.tty is not None:
        return [None, None, None], []
    given: list[int | None] = []
    mine = []
    for index in range(3):
        if index == 0 and not order.stdin:
            given.append(None)
            continue
        read, write = os.pipe2(os.O_CLOEXEC)
        theirs = read if index == 0 else write
        own_pipe(plan, theirs)
        given.append(theirs)
        mine.append(write if index == 0 else read)
    return given, mine


def own_pipe(plan: SandboxPlan, fd: int) -> None:
    """Make the agent the owner, so that it can open /dev/stdout and the like again."""
    inside = "user_namespace" in plan.weaken
    os.fchown(fd, plan.uid if inside else plan.ids.host(plan.uid), plan.gid if inside else plan.ids.host(plan.gid))


def _pump(stream: Stream, mine: list[int]) -> None:
    share = stream.agent.plan.limits.output_bytes // 4
    base = f"{stream.agent.directory}/exec-{stream.stream_id}"
    if stream.order.stdin:
        stream.feed = Feed(stream.loop, mine.pop(0), terminal=False)
    for fd, suffix in zip(mine, ("out", "err"), strict=True):
        stream.pumps.append(Pump(stream.loop, fd, RotatingFile(f"{base}.{suffix}", share)))


def _helper(agent: Agent, order: ExecOrder, control: socket.socket, given: list[int | None]) -> NoReturn:
    """Enter the sandbox and fork the process; in a child of the launcher."""
    try:
        gc.disable()
        with step("enter cgroups"):
            for fd in agent.group.entry_fds() if agent.group is not None else ():
                os.write(fd, b"0")
        target = agent.pidfd
        forget_launcher(control, keep=[target, *(fd for fd in given if fd is not None)])
        # Here: in the sandbox's /proc this process does not exist, and in its user namespace it has no say.
        confine.limit(agent.plan)
        confine.let_be_killed()
        weak = set(agent.plan.weaken)
        wanted = _ALL
        wanted &= ~syscalls.CLONE_NEWPID if "private_pid" in weak else ~0
        with step("enter namespaces"):
            syscalls.setns(target, wanted)
        terminal, streams = _streams(agent.plan, order, given)
        if "user_namespace" not in weak:
            with step("enter user namespace"):
                syscalls.setns(target, syscalls.CLONE_NEWUSER)
        with step("start process"):
            pid, pidfd = syscalls.clone3(syscalls.CLONE_PARENT)
        if pid:
            send(control, {"forked": True, "pid": pid}, [pidfd] + ([terminal] if terminal is not None else []))
            os._exit(0)
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
        with step("take standard streams"):
            confine.take_stdio(*streams)
        confine.keep_only((control.fileno(),))
        confine.start_session()
        confine.give_up(agent.plan)
        # Its streams end with the launcher, and so does it: nobody could say how it ended. Kept by execve, and set here
        # because a change of id takes it away.
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        sync.end_if_alone(control)
        closed = confine.close_in(agent.plan, filters=agent.filters, terminal=order.tty is not None, first=False)
        if closed.listener >= 0:
            send(control, {"listener": True}, [closed.listener])
            os.close(closed.listener)
        # Until the launcher has the pidfd, its end of the socket must not see an end-of-file.
        confine.execute(order.argv, order.env, order.cwd)
    except StepError as error:
        with contextlib.suppress(OSError):
            send(control, {"error": error.to_json()})
    except BaseException as error:  # noqa: BLE001 - the launcher must hear of it and this child must end
        with contextlib.suppress(OSError):
            send(control, {"error": StepError("exec", 0, f"{type(error).__name__}: {error}").to_json()})
    finally:
        os._exit(1)


def _streams(plan: SandboxPlan, order: ExecOrder, given: list[int | None]) -> tuple[int | None, tuple[int, int, int]]:
    if order.tty is None:
        with step("open /dev/null"):
            fds = [os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC) if fd is None else fd for fd in given]
        return None, (fds[0], fds[1], fds[2])
    plain = "user_namespace" in plan.weaken
    with step("open terminal"):
        master, slave = confine.open_terminal(
            order.tty, uid=plan.uid if plain else plan.ids.host(plan.uid), gid=5 if plain else plan.ids.host(5)
        )
    return master, (slave, slave, slave)
