"""Binds of a sandbox that runs: shown to it, and taken away again so that nothing of them can be opened any more.

What is decided and kept is here, in the launcher; the acts are in `entering.py`, in a child that enters the agent's
mount namespace, and the launcher's loop waits for none of them.

    show     record, clone and map the mount here        -> child: make the place, move the mount there
    take     guard marks it, read-only, detached         -> child; where a descriptor that writes is in the way:
             freeze the agent -> child: kill who holds one, again -> thaw

A take that cannot be proven leaves the agent frozen and says so.
"""

import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from sandbox import binds, entering, landlock, sync, syscalls
from sandbox.attach import reap
from sandbox.cgroups import CannotConfine
from sandbox.controls import BY_NAME
from sandbox.entering import Taking
from sandbox.launching import host_owner
from sandbox.loop import READ
from sandbox.mounted import GRANTS, Mounted, drop, mount_id, save
from sandbox.plan import BINDS_MAX, Bind, check_bind
from sandbox.running import Agent, State
from sandbox.sync import StepError, ToldError, step
from sandbox.workshop import Workshop

CHILD_SECONDS_MAX: Final = 8.0
FREEZE_SECONDS_MAX: Final = 5.0
WAIT_SECONDS: Final = 0.005
FREEZE_POLL_SECONDS: Final = 0.002
# Where every Landlock domain of ours lets an agent write, mounts below included (`confine.writable_places`).
WRITABLE_BELOW: Final = (f"{GRANTS}/", "/tmp/")  # noqa: S108 - inside

Done = Callable[[StepError | None, dict[str, Any]], None]


# --- show ------------------------------------------------------------------------------------------------------------


def show(workshop: Workshop, agent: Agent, bind: Bind, fd: int, done: Done) -> None:
    """Bind what the descriptor names into the running agent; raises `StepError`, or calls `done` with the outcome."""
    check_bind("bind", bind)
    _check(agent, f"bind {bind.target}")
    if bind.writable and "workspace-quota" in agent.plan.require:
        control = BY_NAME["workspace-quota"]
        raise StepError(
            f"bind {bind.target}", 0, f"the policy requires {control.name}, which this host lacks", control.remedy
        )
    place = _place(agent, bind)
    _check_room(agent, bind.target, place)
    # Never shown what could not be taken back.
    workshop.guard.watch(agent.pid, agent.pidfd)
    group = workshop.guard.ready()
    tree, degraded = _clone(workshop, agent, bind, fd)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, tree)
        mounted = Mounted(bind.target, place, bind.name, bind.writable, mount_id(tree), fd=tree)
        agent.mounted[bind.target] = mounted
        undo.callback(agent.mounted.pop, bind.target)
        # Before it is there: what a later launcher does not know of it could not take away.
        with step(f"bind {bind.target}"):
            save(agent)

        def act(control: socket.socket) -> None:
            entering.attach(agent, mounted, group, control)

        def over(error: StepError | None, answer: dict[str, Any]) -> None:
            if error is None:
                mounted.made = tuple(answer["made"])
            elif answer.get("absent"):
                drop(agent, mounted)
            with contextlib.suppress(OSError):
                save(agent)
            done(error, {"place": place, "degraded": degraded})

        _in_child(agent, f"bind {bind.target}", act, over, keep=[tree, group])
        undo.pop_all()


def _check(agent: Agent, what: str) -> None:
    if agent.state is not State.RUNNING or agent.group is None or agent.pidfd < 0:
        raise StepError(what, errno.ESRCH, f"agent {agent.agent_id} is {agent.state.value}", "wait until it runs")
    if agent.entered:
        raise StepError(what, errno.EBUSY, "another change of the agent's files is under way", "try again")


def _check_room(agent: Agent, target: str, place: str) -> None:
    if len(agent.mounted) >= BINDS_MAX:
        raise StepError(f"bind {target}", errno.E2BIG, f"the agent has {BINDS_MAX} binds", "revoke one")
    taken = {path for other in agent.mounted.values() for path in (other.target, other.place)}
    for path in sorted(taken):
        if any(new == path or new.startswith(f"{path}/") or path.startswith(f"{new}/") for new in (target, place)):
            raise StepError(
                f"bind {target}",
                errno.EEXIST,
                f"{path} is bound already",
                "revoke that, or choose another place: fs:ro:/host/path=/in/agent",
            )


def _place(agent: Agent, bind: Bind) -> str:
    """Return where the mount goes: below /grants where only there Landlock lets the agent write (a link leads to it).

    A Landlock domain cannot be widened after exec; it was made with /grants writable, and a mount below that is too.
    """
    plan = agent.plan
    place = bind.target
    if plan.rootfs.kind == "host" and place.startswith("/var/tmp/"):  # noqa: S108 - inside, where it is a link to /tmp
        place = place.removeprefix("/var")
    walled = plan.landlock != "off" and "landlock" not in plan.weaken and landlock.ABI > 0
    if not (bind.writable and walled) or place.startswith(WRITABLE_BELOW):
        return place
    return GRANTS + place


def _clone(workshop: Workshop, agent: Agent, bind: Bind, fd: int) -> tuple[int, list[str]]:
    with step(f"bind {bind.target}"):
        uid, gid = host_owner(agent.plan)
        userns = workshop.holders.for_mount(
            disk_uid=bind.owner_uid, disk_gid=bind.owner_gid, host_uid=uid, host_gid=gid
        )
        try:
            tree, unmapped = binds.clone_bind(bind, fd, userns, safe="mount_flags" not in agent.plan.weaken)
        finally:
            os.close(userns)
        return tree, [f"idmap: {unmapped}"] if unmapped else []


# --- take ------------------------------------------------------------------------------------------------------------


def take(workshop: Workshop, agent: Agent, target: str, done: Done) -> None:
    """Take a bind away; raises `StepError`, or calls `done`. Taking what is not there is done already."""
    mounted = agent.mounted.get(target)
    if mounted is None:
        done(None, {"already": True, "processes_killed": 0})
        return
    if agent.entered and agent.state is State.RUNNING:
        agent.loop.later(WAIT_SECONDS, lambda: _again(workshop, agent, target, done))
        return
    _check(agent, f"take {target} away")
    workshop.guard.watch(agent.pid, agent.pidfd)
    group = workshop.guard.ready()
    _Take(agent, mounted, group, done).begin()


def _again(workshop: Workshop, agent: Agent, target: str, done: Done) -> None:
    try:
        take(workshop, agent, target, done)
    except StepError as error:
        done(error, {})


@dataclass(slots=True, eq=False)
class _Take:
    agent: Agent
    mounted: Mounted
    guard: int
    done: Done
    killed: int = 0
    pausing: bool = field(default=False)

    def begin(self) -> None:
        self._run(Taking(self.guard, (), grace_seconds=entering.GRACE_SECONDS))

    def _run(self, taking: Taking) -> None:
        mounted, agent = self.mounted, self.agent
        what = f"take {mounted.target} away"
        stubs = (*agent.stubs, *mounted.made)

        def act(control: socket.socket) -> None:
            entering.detach(agent, mounted, taking, stubs, control)

        keep = [self.guard, *([mounted.fd] if mounted.fd >= 0 else [])]
        try:
            _in_child(agent, what, act, self._over, keep=keep)
        except StepError as error:
            self._end(error)

    def _over(self, error: StepError | None, answer: dict[str, Any]) -> None:
        self.killed += int(answer.get("killed", 0))
        if error is None:
            self.agent.stubs = tuple(answer["left"])
            drop(self.agent, self.mounted)
            with contextlib.suppress(OSError):
                save(self.agent)
            self._end(None)
        elif answer.get("writers") and not self.pausing:
            self._pause()
        else:
            self._end(error)

    def _pause(self) -> None:
        """Stop the agent, so that nobody can pass on what is about to be looked for."""
        self.pausing = self.agent.pausing = True
        try:
            assert self.agent.group is not None  # noqa: S101 - checked by _check, and _end looks again
            self.agent.group.freeze()
        except CannotConfine as error:
            self._end(StepError("freeze", 0, str(error)))
            return
        self._await(FREEZE_SECONDS_MAX)

    def _await(self, seconds: float) -> None:
        agent = self.agent
        if agent.group is None or agent.state is not State.RUNNING:
            self._end(StepError("freeze", errno.ESRCH, "the agent ended"))
        elif agent.group.frozen():
            self._run(Taking(self.guard, tuple(agent.group.pids()), grace_seconds=entering.KILL_SECONDS))
        elif seconds <= 0:
            self._end(StepError("freeze", errno.ETIMEDOUT, "a process did not stop in time", "kill the agent"))
        else:
            agent.loop.later(FREEZE_POLL_SECONDS, lambda: self._await(seconds - FREEZE_POLL_SECONDS))

    def _end(self, error: StepError | None) -> None:
        agent = self.agent
        if self.pausing:
            agent.pausing = False
            # After a failure it stays as it is: frozen, as the daemon will say too.
            if error is None and not agent.frozen and agent.group is not None:
                agent.group.thaw()
            elif error is not None:
                agent.frozen = True
        self.done(error, {"already": False, "processes_killed": self.killed})


# --- children --------------------------------------------------------------------------------------------------------


def _in_child(
    agent: Agent,
    what: str,
    act: Callable[[socket.socket], None],
    over: Callable[[StepError | None, dict[str, Any]], None],
    *,
    keep: list[int],
) -> None:
    """Fork, do `act` there, and call `over` with what it said, or with an error when it said nothing in time."""
    ours, theirs = sync.pair()
    with theirs, step(what):
        pid, pidfd = syscalls.clone3(0)
        if pid == 0:
            entering.run(theirs, [agent.pidfd, *keep], what, act)
    agent.entered = True
    loop = agent.loop

    def finish(error: StepError | None, answer: dict[str, Any]) -> None:
        loop.cancel(deadline)
        loop.forget(ours.fileno())
        ours.close()
        with contextlib.suppress(OSError):
            syscalls.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        reap(loop, pid)
        agent.entered = False
        over(error, answer)

    def heard(_events: int) -> None:
        try:
            message, fds = sync.receive(ours)
        except (OSError, ValueError):
            message, fds = None, []
        sync.close_all(fds)
        if message is None:
            finish(StepError(what, 0, "the child that did it ended without a word"), {})
        elif "error" in message:
            finish(ToldError(message["error"]), message)
        else:
            finish(None, message)

    deadline = loop.later(CHILD_SECONDS_MAX, lambda: finish(StepError(what, 0, "it was not done in time"), {}))
    loop.watch(ours.fileno(), READ, heard)
