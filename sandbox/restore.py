"""What survives a launcher: agents found again after a restart, and descriptors that systemd keeps meanwhile.

An agent is found by its state file, and known to be the same process by pid and start time. Its output is fetched back
out of pid 1, which keeps the read ends at fixed numbers (pidfd_getfd(2)); its listener comes from systemd's descriptor
store (sd_pid_notify_with_fds(3)) or from the daemon (`adopt`).
"""

# ruff: noqa: PTH116, PTH123, PTH208 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import array
import contextlib
import errno
import json
import os
import socket
from typing import Final

from sandbox import cgroups, examine, init, mounted, sockets, syscalls
from sandbox.cgroups import CannotConfine
from sandbox.decoding import InvalidPlan
from sandbox.plan import SandboxPlan
from sandbox.running import Agent, State
from sandbox.scratch import Image, again
from sandbox.serve import Server
from sandbox.starters import start_ticks
from sandbox.stdio import Feed, Pump, RotatingFile

STORED_FIRST: Final = 3
LISTENER: Final = "listener."
GUARD: Final = "guard"
LISTENER_RETRY_SECONDS: Final = 1.0


class Notifier:
    """Speaks to systemd where there is one (sd_notify(3)); says nothing otherwise."""

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        self.stored = _stored()

    def send(self, text: str, fds: tuple[int, ...] = ()) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(address)
            sock.sendmsg([text.encode()], ancillary)

    def agent_changed(self, agent: Agent, what: str) -> None:
        name = LISTENER + agent.agent_id
        if what == "built" and agent.listener >= 0:
            self.send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", (agent.listener,))
        elif what == "gone":
            self.send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def guard_made(self, group: int) -> None:
        """Have the guard's group outlive this launcher and all its children."""
        self.send(f"FDSTORE=1\nFDNAME={GUARD}\nFDPOLL=0", (group,))


def _stored() -> dict[str, int]:
    """Take the descriptors that systemd kept, by name; each is close-on-exec from now on."""
    stored: dict[str, int] = {}
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        names = os.environ.get("LISTEN_FDNAMES", "").split(":")
        for index in range(int(os.environ.get("LISTEN_FDS", "0"))):
            fd = STORED_FIRST + index
            os.set_inheritable(fd, False)
            name = names[index] if index < len(names) else ""
            if name in stored or not (name == GUARD or name.startswith(LISTENER)):
                os.close(fd)
            else:
                stored[name] = fd
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)
    return stored


def restore(server: Server, notifier: Notifier) -> None:
    """Take up the agents that an earlier launcher started, and clear away what is left of those that are dead."""
    run_dir = server.workshop.run_dir
    group = notifier.stored.pop(GUARD, -1)
    if group >= 0:
        server.workshop.guard.adopt(group, kept=True)
    for digest in os.listdir(f"{run_dir}/filters"):
        with open(f"{run_dir}/filters/{digest}", "rb") as file:
            server.workshop.filters[digest] = file.read()
    for agent_id in sorted(os.listdir(f"{run_dir}/agents")):
        directory = f"{run_dir}/agents/{agent_id}"
        listener = notifier.stored.pop(LISTENER + agent_id, -1)
        agent = _load(server, directory)
        if agent is None:
            if listener >= 0:
                _give_back(notifier, LISTENER + agent_id, listener)
            continue
        agent.listener = listener
        server.agents[agent.agent_id] = agent
        agent.gone.append(server.agent_gone)
        if agent.pidfd >= 0:
            _reconnect(agent)
            _find_image(server, agent)
            agent.watch_death()
            sockets.look(agent)
            server.watch.add(agent, fresh=False)
            if group >= 0:
                server.workshop.guard.watch(agent.pid, agent.pidfd)
        else:
            agent.end()
    for name, fd in notifier.stored.items():
        _give_back(notifier, name, fd)
    # What an earlier launcher left: starters it had ready, agents it was building.
    cgroups.reconcile(
        server.workshop.instance, {a.group_name for a in server.agents.values()}, layout=server.workshop.layout
    )
    server.expect_daemon()  # an earlier launcher may have begun to count, and its clock went with it


def _give_back(notifier: Notifier, name: str, fd: int) -> None:
    """Close what systemd kept for nobody; it would keep it for every later launcher too."""
    os.close(fd)
    notifier.send(f"FDSTOREREMOVE=1\nFDNAME={name}")


def _load(server: Server, directory: str) -> Agent | None:
    """Return the agent of a state file, or None where it is over already."""
    try:
        with open(f"{directory}/state.json", encoding="utf-8") as file:
            state = json.load(file)
        plan = SandboxPlan.from_json(state["plan"])
        group = server.workshop.layout.open(server.workshop.instance, str(state["group"]))
        try:
            exit_fd = os.open(f"{directory}/exit", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            group.close()
            raise
    except (OSError, ValueError, KeyError, InvalidPlan, CannotConfine):
        return None
    agent = Agent(
        plan,
        state["meta"],
        directory,
        server.loop,
        group=group,
        group_name=str(state["group"]),
        pid=state["pid"],
        exit_fd=exit_fd,
    )
    agent.own_child = False
    agent.exec_seconds = server.workshop.exec_seconds
    agent.watching = server.workshop.watching
    agent.state = State.RUNNING
    agent.started_at = os.stat(f"{directory}/state.json").st_mtime
    agent.frozen = group.frozen()
    agent.filters = server.workshop.filters.get(plan.filter_digest, b"")
    mounted.restore(agent)
    agent.pidfd = _same(agent.pid, state["start_ticks"])
    return agent


def _same(pid: int, ticks: object) -> int:
    """Return a pidfd where this is still the process that began then; -1 otherwise."""
    try:
        pidfd = syscalls.pidfd_open(pid)
    except OSError:
        return -1
    # Opened first, compared after: the pid cannot change hands in between.
    with contextlib.suppress(OSError, ValueError, LookupError):
        if start_ticks(pid) == ticks:
            return pidfd
    os.close(pidfd)
    return -1


def _find_image(server: Server, agent: Agent) -> None:
    """Take hold of the agent's scratch again, so that its end need not write it out."""
    agent.put_away = server.workshop.put_away
    if agent.plan.scratch.disk == "off":
        return
    stock, disk_bytes = server.workshop.stock, agent.plan.limits.disk_bytes
    if agent.plan.home is not None:
        with contextlib.suppress(OSError):
            found = again(f"/proc/{agent.pid}/root/home/agent")
            if found is not None:
                agent.home = Image(*found, -1, disk_bytes, stock.home_path(agent.plan.home))
    with contextlib.suppress(OSError):
        found = again(f"/proc/{agent.pid}/root/tmp")
        if found is not None:
            agent.image = Image(*found, -1, disk_bytes)
            if any(bind.layer for bind in agent.plan.binds):
                agent.image.kept = stock.layer_path(agent.agent_id)


def _take_listener(agent: Agent) -> None:
    """Have its calls answered, now or as soon as there are descriptors: until then whatever asks waits."""
    if not agent.plan.listens or agent.watching is None or agent.state is not State.RUNNING:
        return
    try:
        fd = syscalls.pidfd_getfd(agent.pidfd, init.FD_LISTENER)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            agent.loop.later(LISTENER_RETRY_SECONDS, lambda: _take_listener(agent))
        return  # it is about to end: pid 1 has none, or is none
    agent.listening = agent.watching.restore(agent, fd)


def _children(agent: Agent) -> list[int]:
    with open(f"/proc/{agent.pid}/task/{agent.pid}/children") as file:
        return [int(word) for word in file.read().split()]


def _end_keeper(agent: Agent) -> None:
    """End who keeps the memory that the first process left, where an earlier launcher did not come to it.

    It is the second child, and has fewer filters than any process of the agent could have.
    """
    for pid in _children(agent)[1:2]:
        pidfd = syscalls.pidfd_open(pid)
        # Opened first, looked at after: it may end by itself meanwhile, and the pid be somebody's whom nobody may end.
        # A child of pid 1 is what the pidfd is of, or that is of nobody.
        is_keeper = False
        with contextlib.suppress(OSError, LookupError):
            less = examine.confinement(pid)["seccomp_filters"] < examine.programs(agent)
            is_keeper = less and pid in _children(agent)
        if is_keeper:
            agent.keeper.hold(agent.loop, pidfd)
            agent.keeper.end()
        else:
            os.close(pidfd)


def _reconnect(agent: Agent) -> None:
    """Fetch the agent's output and first process back."""
    share = agent.plan.limits.output_bytes
    if agent.plan.tty is None:
        for name, number in (("stdout", init.FD_STDOUT), ("stderr", init.FD_STDERR)):
            with contextlib.suppress(OSError):
                fd = syscalls.pidfd_getfd(agent.pidfd, number)
                agent.pumps.append(Pump(agent.loop, fd, RotatingFile(f"{agent.directory}/{name}.log", share // 4)))
    else:
        with contextlib.suppress(OSError):
            agent.terminal = syscalls.pidfd_getfd(agent.pidfd, init.FD_TERMINAL)
            file = RotatingFile(f"{agent.directory}/stdout.log", share // 2)
            agent.pumps.append(Pump(agent.loop, os.dup(agent.terminal), file))
            agent.feed = Feed(agent.loop, os.dup(agent.terminal), terminal=True)
    _take_listener(agent)
    with contextlib.suppress(OSError):  # then when they are asked for
        agent.trees()
    with contextlib.suppress(OSError, ValueError, LookupError):
        agent.agent_pidfd = syscalls.pidfd_open(_children(agent)[0])
        _end_keeper(agent)
