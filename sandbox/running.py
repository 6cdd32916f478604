"""One agent as the launcher holds it, from the first descriptor to the last; undoing is written here once.

    BUILDING -> BUILT -> STARTING -> RUNNING -> ENDING -> GONE        any -> ENDING

`end()` is the only way out: cut the door, kill the group, wait until it is empty, copy the last bytes of output, let go
of network, group and ids, leave the exit status in a file. It waits for nothing but the kernel.
"""

# ruff: noqa: PTH116, PTH123 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import contextlib
import errno
import json
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from sandbox import mounted, syscalls
from sandbox.cgroups import CannotConfine
from sandbox.exec_trees import Trees
from sandbox.keeper import Keeper
from sandbox.loop import Loop, Owned
from sandbox.sync import StepError, close_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandbox.attach import Stream
    from sandbox.cgroups import Group
    from sandbox.loop import AnyLoop
    from sandbox.mounted import Mounted
    from sandbox.netpool import Net
    from sandbox.plan import SandboxPlan
    from sandbox.scratch import Image
    from sandbox.stdio import Feed, Pump
    from sandbox.watching import Watching

POLL_SECONDS: Final = 0.001
POLL_SECONDS_MAX: Final = 0.05
POLL_PART: Final = 0.03
KILL_AGAIN_SECONDS: Final = 0.05
# From then on it is looked at less often. It is never let go of before it is empty: what says "nothing is left" is a
# receipt that is signed.
EMPTY_SECONDS_MAX: Final = 30.0
STUBBORN_POLL_SECONDS: Final = 1.0
STRANGERS_SECONDS: Final = 0.2
# Until execve, which blocks on a file that somebody holds a lease on (fcntl(2)). Below what the daemon waits for the
# answer, so that it hears that nothing was started.
EXEC_SECONDS_MAX: Final = 20.0
PIDS_SHOWN_MAX: Final = 64
KILLED: Final[dict[str, Any]] = {"code": None, "signal": int(signal.SIGKILL), "oom": False}


class State(Enum):
    BUILDING = "BUILDING"
    BUILT = "BUILT"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    ENDING = "ENDING"
    GONE = "GONE"


@dataclass(slots=True)
class Ending:
    """What is known of an agent's end; times in milliseconds from its begin."""

    began: float
    processes: int
    egress_cut_ms: float
    next_kill_seconds: float = KILL_AGAIN_SECONDS
    dead_ms: float = 0.0
    problem: str = ""
    left: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Agent:
    """What the launcher holds for one sandbox."""

    plan: "SandboxPlan"
    meta: dict[str, Any]
    directory: str
    loop: "AnyLoop"
    group: "Group | None" = None
    group_name: str = ""
    net: "Net | None" = None
    listener: int = -1
    image: "Image | None" = None
    home: "Image | None" = None
    put_away: "Callable[[Image], None] | None" = None
    watching: "Watching | None" = None
    listening: int = 0  # key of the listener of its first process
    pid: int = 0
    pidfd: int = -1
    agent_pidfd: int = -1
    agent_pid: int = 0  # of the launcher's namespace; known from the launch on, and asked of the pidfd later
    keeper: Keeper = field(default_factory=Keeper)
    own_child: bool = True
    exit_fd: int = -1
    control: socket.socket | None = None
    builder: socket.socket | None = None
    filters: bytes = b""
    started_at: float = 0.0
    state: State = State.BUILDING
    frozen: bool = False
    over_memory: bool = False  # ended for memory that no cgroup counts (sockets.py)
    exec_seconds: float = EXEC_SECONDS_MAX
    pumps: "list[Pump]" = field(default_factory=list)
    feed: "Feed | None" = None
    terminal: int = -1
    streams: "dict[str, Stream]" = field(default_factory=dict)
    exec_trees: "Trees | None" = None  # from the first exec on
    mounted: "dict[str, Mounted]" = field(default_factory=dict)  # by target
    stubs: tuple[str, ...] = ()  # places that could not be removed yet
    entered: bool = False  # a child of ours changes its mounts
    pausing: bool = False  # frozen for the moment that takes
    ending: Ending | None = None
    gone: "list[Callable[[Agent], None]]" = field(default_factory=list)
    lacking: dict[str, str] = field(default_factory=dict)  # controls that it does without, and how that shows
    degraded: list[str] = field(default_factory=list)
    seen: dict[str, Any] = field(default_factory=dict)  # what the kernel said of it before it ran
    posture: dict[str, Any] = field(default_factory=dict)  # of what this launcher built itself
    timings_us: dict[str, int] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=lambda: dict(KILLED))

    def __post_init__(self) -> None:
        # Whatever goes wrong with something of this agent's ends this agent.
        if isinstance(self.loop, Loop):
            self.loop = Owned(self.loop, self.end)

    @property
    def agent_id(self) -> str:
        return self.plan.agent_id

    def close_control(self) -> None:
        if self.control is not None:
            self.loop.forget(self.control.fileno())
            self.control.close()
            self.control = None

    def close_builder(self) -> None:
        if self.builder is not None:
            self.loop.forget(self.builder.fileno())
            self.builder.close()
            self.builder = None

    def cut(self) -> None:
        """Stop accepting: every copy of the listener, wherever it is, refuses from now on."""
        if self.listener >= 0:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.listener)) as door:
                door.shutdown(socket.SHUT_RDWR)

    def signal(self, number: int) -> None:
        """Send to the agent's first process; raises `OSError`."""
        if self.agent_pidfd < 0:
            raise OSError(errno.ESRCH, "the first process is not known")
        syscalls.pidfd_send_signal(self.agent_pidfd, number)

    def trees(self) -> Trees:
        """Return the groups of what its execs started; raises `OSError`."""
        assert self.group is not None  # noqa: S101 - it runs
        if self.exec_trees is None:
            # Of one that an earlier launcher started: also where that failed before, or nothing would be left of them.
            self.exec_trees = (Trees if self.own_child else Trees.found)(self.group.fd_for_clone())
        return self.exec_trees

    def drop_trees(self) -> None:
        """Remove the groups of execs of which nothing is left."""
        if self.exec_trees is not None:
            self.exec_trees.drop(self.streams)

    def watch_death(self) -> None:
        """Have `end` called when pid 1 is dead."""
        self.loop.watch(self.pidfd, 1, lambda _events: self.end())

    def end(self) -> None:
        """Begin the end, or do nothing where it has begun; `gone` is called when nothing is left."""
        if self.state in (State.ENDING, State.GONE):
            return
        self.state = State.ENDING
        began = time.monotonic()
        self.cut()
        cut_ms = (time.monotonic() - began) * 1000
        processes = 0
        if self.group is not None:
            self.loop.forget(self.group.oom_fd())
            kept = self.keeper.pid()  # before the list is read: what has ended by then is not in it
            pids = self.group.pids()
            processes = len(pids) - (kept in pids)
            with contextlib.suppress(CannotConfine, OSError):
                self.group.kill()
        # Also by pidfd: while a child is being built the group may not have it yet.
        if self.pidfd >= 0:
            self.loop.forget(self.pidfd)
            with contextlib.suppress(OSError):
                syscalls.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.ending = Ending(began, processes, cut_ms)
        self.close_control()
        self.close_builder()
        self._wait()

    def _wait(self) -> None:
        assert self.ending is not None  # noqa: S101 - set by end(), the only caller's caller
        if self.state is State.GONE:
            return
        again = self.loop.later(STUBBORN_POLL_SECONDS, self._wait)  # also where a step of this fails
        self._reap()
        for stream in list(self.streams.values()):
            stream.poll()
        if self.pidfd >= 0 or (self.group is not None and self.group.populated()):
            seconds = time.monotonic() - self.ending.began
            if seconds > self.ending.next_kill_seconds:
                # Again for what came into the group by another way than fork(2), but not at each look: while the kernel
                # goes through the group, nothing that dies leaves it.
                self.ending.next_kill_seconds = seconds * 2
                with contextlib.suppress(CannotConfine, OSError):
                    if self.group is not None and self.group.populated():
                        self.group.kill()
            if seconds > STRANGERS_SECONDS:
                self._reap_strangers()
            most = POLL_SECONDS_MAX if seconds < EMPTY_SECONDS_MAX else STUBBORN_POLL_SECONDS
            self.loop.cancel(again)
            # The death is seen when it is at most this part older.
            self.loop.later(min(max(seconds * POLL_PART, POLL_SECONDS), most), self._wait)
            return
        self.ending.dead_ms = (time.monotonic() - self.ending.began) * 1000
        self._let_go()
        self.loop.cancel(again)

    def _reap(self) -> None:
        """Take note of pid 1's death; closes its pidfd."""
        if self.pidfd < 0:
            return
        if self.own_child:
            try:
                done, _ = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                done = self.pid
        else:
            try:
                syscalls.pidfd_send_signal(self.pidfd, 0)
                done = 0
            except OSError:
                done = self.pid
        if done:
            os.close(self.pidfd)
            self.pidfd = -1

    def _reap_strangers(self) -> None:
        """Collect dead children that nobody here started: the end of a pid namespace waits for each process in it.

        A program could make its parent's sibling (CLONE_PARENT, clone(2)); the filter refuses that since, and this is
        for what the filter does not see.
        """
        streams = {stream.pid for stream in self.streams.values()} | {self.pid}
        with contextlib.suppress(OSError):
            mine = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                children = [int(word) for word in file.read().split()]
            for pid in children:
                with contextlib.suppress(OSError):
                    if pid not in streams and os.stat(f"/proc/{pid}/ns/pid").st_ino == mine:
                        os.waitpid(pid, os.WNOHANG)

    def _let_go(self) -> None:
        ending = self.ending
        assert ending is not None  # noqa: S101 - as above
        for stream in list(self.streams.values()):
            stream.end()
        for pump in self.pumps:
            pump.drain()
        self.pumps.clear()
        if self.feed is not None:
            self.feed.close()
            self.feed = None
        if self.net is not None:
            self.net.close()
            self.net, self.listener = None, -1
        self.keeper.drop()
        # A descriptor would keep a mount busy on the host. The numbers go too: a child that takes one away may answer
        # after this, when they are somebody else's.
        mounted.forget(self)
        close_all([fd for fd in (self.listener, self.agent_pidfd, self.terminal) if fd >= 0])
        self.listener = self.agent_pidfd = self.terminal = -1
        self.put_images_away()
        if self.watching is not None:
            self.watching.end_agent(self.agent_id)
        oom = self._remove_group(ending)
        self._leave_status(oom=oom or self.over_memory)
        self.state = State.GONE
        while self.gone:
            self.gone.pop(0)(self)

    def put_images_away(self) -> None:
        """Let go of its images; where nothing ran there is no layer to keep."""
        if self.image is not None and not self.started_at:
            self.image.forget()
        for image in (self.image, self.home):
            if image is not None and self.put_away is not None:
                self.put_away(image)
        self.image = self.home = None

    def _remove_group(self, ending: Ending) -> bool:
        group, self.group = self.group, None
        if self.exec_trees is not None:
            self.exec_trees.close()
            self.exec_trees = None
        if group is None:
            return False
        ending.left = tuple(group.pids()[:PIDS_SHOWN_MAX])
        oom = group.oom_kills() > 0
        try:
            group.remove()
        except (CannotConfine, OSError) as error:
            ending.problem = str(error)
        return oom

    def _leave_status(self, *, oom: bool) -> None:
        """Complete what pid 1 wrote, so that a daemon that was away finds it."""
        if self.exit_fd < 0:
            return
        status = read_status(self.exit_fd) | {"oom": oom}
        text = json.dumps(status).encode()
        with contextlib.suppress(OSError):
            os.pwrite(self.exit_fd, text, 0)
            os.ftruncate(self.exit_fd, len(text))
        os.close(self.exit_fd)
        self.exit_fd = -1
        self.status = status


def read_status(fd: int) -> dict[str, Any]:
    """Return what pid 1 left; where it could write nothing, it was killed, and its agent with it."""
    try:
        value = json.loads(os.pread(fd, 4096, 0))
        return {"code": value["code"], "signal": value["signal"], "oom": bool(value.get("oom", False))}
    except (OSError, ValueError, KeyError, TypeError):
        return dict(KILLED)


def agent_error(agent_id: str, step: str) -> StepError:
    return StepError(step, errno.ESRCH, f"there is no agent {agent_id}", "see `stockadectl status`")
