"""The launcher's side of a launch: gather what the child needs, fork it, follow what it says.

Everything that was made is undone when a later step fails; `end()` of the agent undoes the rest.
"""

# ruff: noqa: PTH102, PTH106, PTH108, PTH123, PTH208 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from sandbox import canaries, capabilities, controls, examine, init, keeper, landlock, mounted, mounts, sync, syscalls
from sandbox.attach import own_pipe
from sandbox.cgroups import Layout
from sandbox.guard import Guard
from sandbox.loop import READ, Loop
from sandbox.netpool import CannotMakeNetwork, Net, Pool
from sandbox.plan import SandboxPlan
from sandbox.running import EXEC_SECONDS_MAX, Agent, State
from sandbox.scratch import HOME_ID, UPPER, CannotMakeScratch, Image, Stock, geometry
from sandbox.starters import Starters
from sandbox.stdio import Feed, Pump, RotatingFile
from sandbox.sweeper import Sweeper
from sandbox.sync import StepError, ToldError, receive, send, step
from sandbox.userns import Ahead, Holders, Making
from sandbox.watching import Watching

# Below what the daemon waits for an answer (launcher_link): it hears of a failure, and that nothing is left.
BUILD_SECONDS_MAX: Final = 20.0
GO_SECONDS_MAX: Final = 60.0  # for the word to come; nothing runs meanwhile
META_BYTES_MAX: Final = 64 << 10
KERNEL: Final = os.uname().release

Built = Callable[[Agent, StepError | None], None]


@dataclass(slots=True)
class Workshop:
    """What every launch draws on."""

    run_dir: str
    instance: str
    loop: Loop
    layout: Layout
    pool: Pool
    holders: Holders
    starters: Starters
    guard: Guard
    stock: Stock
    sweeper: Sweeper
    watching: Watching
    allow_weakened: bool
    exec_seconds: float = EXEC_SECONDS_MAX
    filters: dict[str, bytes] = field(default_factory=dict)

    leaving: dict[str, list[Callable[[], None]]] = field(default_factory=dict)

    @property
    def forks(self) -> int:
        """Count the processes made ahead: each shares this one's memory, which is copied when it is next written to."""
        return self.starters.made + self.holders.made

    def put_away(self, image: Image) -> None:
        """Let go of an image; until that is done, `when_free` of its path waits."""
        path = image.kept
        if not path:
            self.sweeper.put_away(image)
            return
        self.leaving.setdefault(path, [])

        def done() -> None:
            for call in self.leaving.pop(path, []):
                call()

        self.sweeper.put_away(image, done)

    def when_free(self, path: str, call: Callable[[], None]) -> None:
        """Call now, or when the image of this path has been written out."""
        if path in self.leaving:
            self.leaving[path].append(call)
        else:
            call()

    def check(self, plan: SandboxPlan, fds: list[int], agents: Iterable[Agent]) -> None:
        """Refuse what cannot be launched here; raises `StepError`."""
        if plan.instance != self.instance:
            raise StepError("check plan", 0, f"plan is of instance {plan.instance}, this launcher of {self.instance}")
        if plan.weaken and not self.allow_weakened:
            raise StepError("check plan", 0, "a weakened sandbox is for tests (--allow-weakened) only")
        for agent in agents:
            if agent.agent_id == plan.agent_id:
                raise StepError("check plan", 0, f"agent {plan.agent_id} is there already")
            if plan.home is not None and agent.plan.home == plan.home:
                raise StepError("check plan", 0, f"the home of {plan.home} is in use by {agent.agent_id}")
            if agent.plan.ids.start == plan.ids.start:
                raise StepError("check plan", 0, f"ids {plan.ids.start} are in use by {agent.agent_id}")
        if plan.fds_needed() > len(fds):
            raise StepError("check plan", 0, f"plan needs {plan.fds_needed()} descriptors, {len(fds)} came")
        if "seccomp" not in plan.weaken and plan.filter_digest not in self.filters:
            raise StepError("check plan", 0, f"filter {plan.filter_digest!r} is not known", "send it first (op filter)")
        degraded(plan, self.lacking(plan))

    def lacking(self, plan: SandboxPlan) -> dict[str, str]:
        """Return what this host and this plan do without, before anything is made, and how each shows."""
        found = {}
        if plan.landlock != "off" and not landlock.ABI:
            found["landlock"] = "this kernel has none"
        if not str(self.layout.facts()["swap"]).startswith("memory.") and swaps():
            found["swap"] = "the host swaps, and swap is not accounted"
        if plan.scratch.disk != "off" and self.stock.lacking:
            found["disk-quota"] = self.stock.lacking
        if why := self.layout.io_unheld(plan.limits):
            found["io"] = why
        writable = [bind.target for bind in plan.binds if bind.writable]
        if writable:
            found["workspace-quota"] = f"{', '.join(writable)}: a writable bind has no limit on bytes or files"
        return found


def begin(
    workshop: Workshop,
    plan: SandboxPlan,
    *,
    wire: dict[str, Any],
    meta: dict[str, Any],
    fds: list[int],
    built: Built,
) -> "tuple[Agent, Follow]":
    """Send a starter the plan (`wire` is its JSON); `built` is called once, when it waits for `go` or has failed.

    Raises `StepError` where not even that can be done; then nothing is left. The descriptors stay the caller's.
    """
    agent = Agent(plan, meta, f"{workshop.run_dir}/agents/{plan.agent_id}", workshop.loop)
    agent.filters = workshop.filters.get(plan.filter_digest, b"")
    agent.exec_seconds = workshop.exec_seconds
    agent.watching = workshop.watching
    if plan.listens:
        workshop.watching.ensure()
    clock = init.Clock()
    with contextlib.ExitStack() as undo:
        with step("make user namespace"):
            users = workshop.holders.begin(plan.ids)
        undo.callback(workshop.holders.end_used)
        starter = workshop.starters.take(plan)
        undo.callback(workshop.starters.discard, starter)
        agent.group, agent.group_name = starter.group, starter.name
        clock.mark("starter")
        try:
            agent.net = workshop.pool.take(transparent=plan.network.transparent)
        except (CannotMakeNetwork, OSError) as error:
            raise StepError("make network", getattr(error, "errno", 0) or 0, str(error)) from error
        undo.callback(agent.net.close)
        agent.listener = agent.net.listener
        agent.lacking = workshop.lacking(plan) | lacking_network(agent.net)
        clock.mark("network")
        _take_scratch(workshop, agent)
        undo.callback(_put_away, agent)
        clock.mark("scratch")
        with contextlib.ExitStack() as mine:
            order, given = _gather(workshop, agent, (fds, users), mine, undo)
            agent.degraded = degraded(plan, agent.lacking)
            clock.mark("gather")
            begun = init.Order(plan, order, base=f"{workshop.run_dir}/root", stage=f"{workshop.run_dir}/stage")
            with step("send plan"):
                data = begun.dumps()
                sync.send_bytes(starter.control, data, given)
                sync.send_bytes(starter.stub, data, given)
            clock.mark("send")
        agent.pid = starter.pid
        # While they build, and before anybody hears of it: what a later launcher does not know it kills.
        with step("keep what a restart needs", "make room in the run directory (`df /run`)"):
            save(agent, wire, starter.start_ticks)
        undo.pop_all()
    agent.pidfd = starter.pidfd
    agent.control, agent.builder = starter.stub, starter.control
    agent.timings_us = clock.steps
    return agent, Follow(agent, built)


def _take_scratch(workshop: Workshop, agent: Agent) -> None:
    """Give the agent its image, or nothing where the host can have none and the plan may do without."""
    plan, stock = agent.plan, workshop.stock
    agent.put_away = workshop.put_away
    if plan.scratch.disk == "off":
        return
    if stock.lacking:
        if plan.scratch.disk == "required":
            raise StepError(
                "make scratch", 0, f"the host cannot have it on disk: {stock.lacking}", "see `stockadectl doctor`"
            )
        return  # it is memory, and listed as lacking
    try:
        if any(bind.layer for bind in plan.binds):
            agent.image = stock.make_kept(plan.limits.disk_bytes, stock.layer_path(plan.agent_id))
        else:
            agent.image = stock.take(plan.limits.disk_bytes)
        if plan.home is not None:
            agent.home = stock.home(plan.home, plan.limits.disk_bytes)
    except CannotMakeScratch as error:
        _put_away(agent)
        raise StepError("make scratch", error.number, str(error), error.remedy) from error


def _put_away(agent: Agent) -> None:
    if agent.image is not None:
        agent.image.forget()
    for image in (agent.image, agent.home):
        if image is not None and agent.put_away is not None:
            agent.put_away(image)
    agent.image = agent.home = None


def _gather(
    workshop: Workshop,
    agent: Agent,
    sources: tuple[list[int], Making | Ahead],
    mine: contextlib.ExitStack,
    undo: contextlib.ExitStack,
) -> tuple[dict[str, Any], list[int]]:
    """Return the children's descriptors by name, as indices, and in order; what is only theirs goes onto `mine`."""
    fds, making = sources
    plan, net = agent.plan, agent.net
    assert net is not None  # noqa: S101 - just taken
    given: list[int] = []

    def add(fd: int, *, own: bool = True) -> int:
        if own:
            mine.callback(os.close, fd)
        given.append(fd)
        return len(given) - 1

    host_uid, host_gid = host_owner(plan)
    image = None
    if agent.image is not None:
        with step("make scratch"):
            agent.image.own(host_uid, host_gid)
            for bind in plan.binds:
                if bind.layer:
                    mode = os.fstat(fds[bind.fd]).st_mode
                    os.chmod(UPPER, mode & 0o777, dir_fd=agent.image.root)
            image = add(agent.image.mount)
            agent.image.mount = -1
    home = None
    if agent.home is not None:
        with step("show kept home"):
            users_of_home = workshop.holders.for_mount(
                disk_uid=HOME_ID, disk_gid=HOME_ID, host_uid=host_uid, host_gid=host_gid
            )
            mine.callback(os.close, users_of_home)
            set_ = syscalls.MOUNT_ATTR_IDMAP
            syscalls.mount_setattr(agent.home.mount, "", syscalls.AT_EMPTY_PATH, set_=set_, userns_fd=users_of_home)
            home = add(agent.home.mount)
            agent.home.mount = -1
    rootfs = None
    if plan.rootfs.fd is not None:
        with step("show root file system"):
            rootfs = add(mounts.clone_tree(fds[plan.rootfs.fd], "/", syscalls.AT_RECURSIVE))
    binds = _binds(workshop, agent, fds, (host_uid, host_gid), add)
    undo.callback(mounted.forget, agent)
    with step("note binds"):
        mounted.launched(agent, [given[index] for index in binds])
    with step("make directory of the agent"):
        os.mkdir(agent.directory, 0o700)
        undo.callback(remove_directory, agent.directory)
        agent.exit_fd = os.open(
            f"{agent.directory}/exit", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        undo.callback(os.close, agent.exit_fd)
    with step("make streams"):
        stdio, keep = _stdio(agent, add, undo)
    filters = -1
    if "seccomp" not in plan.weaken:
        filters = add(syscalls.memfd_create("filter", workshop.filters[plan.filter_digest]))
    # Last: it was made meanwhile.
    with step("make user namespace"):
        users = add(making.for_agent(plan.ids))
    return {
        "network": add(net.agent_ns, own=False),
        "users": users,
        "rootfs": rootfs,
        "image": image,
        "home": home,
        "binds": binds,
        "exit": add(agent.exit_fd, own=False),
        "stdio": stdio,
        "keep": keep,
        "filter": filters,
    }, given


def host_owner(plan: SandboxPlan) -> tuple[int, int]:
    """Return the ids on the host of whom the agent's program runs as."""
    if "user_namespace" in plan.weaken:
        return plan.uid, plan.gid
    return plan.ids.host(plan.uid), plan.ids.host(plan.gid)


def _binds(
    workshop: Workshop, agent: Agent, fds: list[int], host: tuple[int, int], add: Callable[..., int]
) -> list[int]:
    """Clone what the plan binds, each owner on disk mapped to the agent by one user namespace."""
    namespaces: dict[tuple[int, int], int] = {}
    binds = []
    try:
        for bind in agent.plan.binds:
            with step(f"bind {bind.target}"):
                owner = (bind.owner_uid, bind.owner_gid)
                if owner not in namespaces:
                    namespaces[owner] = workshop.holders.for_mount(
                        disk_uid=owner[0], disk_gid=owner[1], host_uid=host[0], host_gid=host[1]
                    )
                tree, unmapped = mounts.clone_bind(
                    bind, fds[bind.fd], namespaces[owner], safe="mount_flags" not in agent.plan.weaken
                )
            if unmapped:
                agent.lacking["idmap"] = "; ".join(filter(None, (agent.lacking.get("idmap"), unmapped)))
            binds.append(add(tree))
    finally:
        sync.close_all(list(namespaces.values()))
    return binds


def _stdio(
    agent: Agent, add: Callable[..., int], undo: contextlib.ExitStack
) -> tuple[list[int | None], list[int | None]]:
    """Make pipes for what is not a terminal: the child's ends, and the read ends that pid 1 keeps open too."""
    plan = agent.plan
    if plan.tty is not None:
        return [None, None, None], [None, None]
    stdin: int | None = None
    if plan.stdin:
        read, write = os.pipe2(os.O_CLOEXEC)
        own_pipe(plan, read)
        stdin = add(read)
        agent.feed = Feed(agent.loop, write, terminal=False)
        undo.callback(agent.feed.close)
    stdio: list[int | None] = [stdin]
    keep: list[int | None] = []
    for name in ("stdout", "stderr"):
        read, write = os.pipe2(os.O_CLOEXEC)
        own_pipe(plan, write)
        stdio.append(add(write))
        file = RotatingFile(f"{agent.directory}/{name}.log", plan.limits.output_bytes // 4)
        pump = Pump(agent.loop, read, file)
        undo.callback(pump.close)
        agent.pumps.append(pump)
        keep.append(add(read, own=False))
    return stdio, keep


def remove_directory(path: str) -> None:
    with contextlib.suppress(OSError):
        for name in os.listdir(path):
            os.unlink(f"{path}/{name}")
        os.rmdir(path)


class Follow:
    """Hears what the two processes say until the agent's program runs: `builder` is pid 1, `control` the stub."""

    def __init__(self, agent: Agent, built: Built) -> None:
        assert agent.control is not None  # noqa: S101 - begin() made both
        assert agent.builder is not None  # noqa: S101
        self._agent = agent
        self._built: Built | None = built
        self._went: Built | None = None
        self._sealed = False
        self._wanted = False
        self._began = time.perf_counter_ns()
        agent.loop.watch(agent.control.fileno(), READ, lambda _e: self._stub_said())
        agent.loop.watch(agent.builder.fileno(), READ, lambda _e: self._builder_said())
        agent.loop.watch(agent.pidfd, READ, lambda _e: self._died())
        self._deadline = agent.loop.later(BUILD_SECONDS_MAX, self._late)
        # Whoever waits hears of the end, however it came; only when everything is undone, so that it may launch again
        # with the same ids.
        self._error = StepError("launch", 0, f"agent {agent.agent_id} was killed before it ran")
        agent.gone.append(lambda _agent: self._answer(self._error))

    def _late(self) -> None:
        if self._agent.state in (State.BUILDING, State.BUILT, State.STARTING):
            what = {State.BUILDING: "build sandbox", State.BUILT: "go", State.STARTING: "exec"}[self._agent.state]
            self._fail(StepError(what, errno.ETIMEDOUT, "not done in time"))

    def _died(self) -> None:
        # What they said last comes first.
        self._drain_builder()
        if self._agent.state in (State.BUILDING, State.BUILT):
            self._fail(StepError("build sandbox", 0, "pid 1 died; out of memory, or killed from outside"))
        elif self._agent.state is State.STARTING:
            self._stub_said()
        self._agent.end()

    def _drain_builder(self) -> None:
        while self._agent.builder is not None and self._more():
            self._builder_said()

    def _more(self) -> bool:
        builder = self._agent.builder
        try:
            return builder is not None and bool(builder.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def _builder_said(self) -> None:
        agent = self._agent
        if agent.builder is None:
            return
        message, fds = _hear(agent.builder)
        if message is None:
            # It lets go of everything when its work is done; if it died instead, its pidfd tells.
            agent.close_builder()
        elif "error" in message:
            sync.close_all(fds)
            self._fail(ToldError(message["error"]))
        elif "forked" in message:
            agent.agent_pidfd = fds[0]
            # Now, while the launcher waits for the child anyway. One that died meanwhile is told of by its pidfd.
            with contextlib.suppress(OSError):
                agent.agent_pid = examine.pid_of(fds[0])
        elif message.get("terminal"):
            self._adopt_terminal(fds[0])
        elif message.get("sealed"):
            self._sealed = True
            self._perhaps_go()

    def _stub_said(self) -> None:
        agent = self._agent
        if agent.control is None:
            return
        message, fds = _hear(agent.control)
        try:
            if message is not None and message.get("kept"):
                self._change_channel(fds.pop(0), fds.pop(0))
            self._take_listener(message or {}, fds)
        finally:
            sync.close_all(fds)
        if message is None:
            self._ended()
        elif "error" in message:
            self._fail(ToldError(message["error"]))
        elif message.get("ready"):
            agent.timings_us |= {f"child.{name}": value for name, value in message["timings_us"].items()}
            # pid 1 has said all it had to say before the stub could be ready.
            self._drain_builder()
            try:
                _verify(agent, message)
            except StepError as error:
                self._fail(error)
                return
            self._is_built()

    def _change_channel(self, kept: int, channel: int) -> None:
        """Go on by a channel of which the keeper of the stub's memory has no copy."""
        agent = self._agent
        agent.close_control()
        agent.keeper.hold(agent.loop, kept)
        agent.control = socket.socket(fileno=channel)
        agent.loop.watch(channel, READ, lambda _e: self._stub_said())

    def _take_listener(self, message: dict[str, Any], fds: list[int]) -> None:
        """Have the agent's calls answered from now on, and told of once it is ready: canaries are not its acts."""
        agent = self._agent
        if agent.watching is None or agent.state is not State.BUILDING:
            return
        ready = bool(message.get("ready"))
        if fds:
            agent.listening = agent.watching.add(agent, agent.agent_id, fds.pop(), told=ready)
        elif ready and agent.listening:
            agent.watching.begin_telling(agent.listening)

    def _adopt_terminal(self, master: int) -> None:
        agent = self._agent
        agent.terminal = master
        file = RotatingFile(f"{agent.directory}/stdout.log", agent.plan.limits.output_bytes // 2)
        agent.pumps.append(Pump(agent.loop, os.dup(master), file))
        agent.feed = Feed(agent.loop, os.dup(master), terminal=True)

    def _is_built(self) -> None:
        agent = self._agent
        if agent.state is State.BUILDING and self._built is not None:
            agent.timings_us["child"] = (time.perf_counter_ns() - self._began) // 1000
            agent.state = State.BUILT
            agent.loop.cancel(self._deadline)
            self._deadline = agent.loop.later(GO_SECONDS_MAX, self._late)
            built, self._built = self._built, None
            built(agent, None)

    def go(self, went: Built) -> None:
        """Let the agent exec; `went` is called when it has, or could not. Raises `StepError`."""
        agent = self._agent
        if agent.state is not State.BUILT or agent.control is None:
            raise StepError("go", 0, f"agent {agent.agent_id} is {agent.state.value}, not {State.BUILT.value}")
        self._went = went
        agent.state = State.STARTING
        agent.loop.cancel(self._deadline)
        self._deadline = agent.loop.later(agent.exec_seconds, self._late)
        self._wanted = True
        self._perhaps_go()

    def _perhaps_go(self) -> None:
        """Let it go when that is wanted and pid 1 has given up everything too."""
        agent = self._agent
        if self._wanted and self._sealed and agent.control is not None:
            self._wanted = False
            try:
                send(agent.control, {"go": True})
            except OSError as error:
                self._fail(StepError.from_os("go", error))

    def _ended(self) -> None:
        """End-of-file: `execve` happened, or the child is dead before it said anything."""
        agent = self._agent
        agent.close_control()
        agent.loop.later(keeper.END_SECONDS, agent.keeper.end)
        if agent.state is State.STARTING:
            agent.loop.cancel(self._deadline)
            agent.state = State.RUNNING
            agent.started_at = time.time()
            self._answer(None)
        elif agent.state in (State.BUILDING, State.BUILT):
            self._drain_builder()
            self._fail(StepError("build sandbox", 0, "a process of the sandbox ended without a word"))

    def _fail(self, error: StepError) -> None:
        agent = self._agent
        if agent.state in (State.ENDING, State.GONE):
            return
        agent.loop.cancel(self._deadline)
        self._error = error
        agent.end()

    def _answer(self, error: StepError | None) -> None:
        call = self._built or self._went
        self._built = self._went = None
        if call is not None:
            call(self._agent, error)


def _hear(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    try:
        return receive(sock)
    except (OSError, ValueError):
        return None, []


def _verify(agent: Agent, said: dict[str, Any]) -> None:
    """Read back what is in force before the program runs; raises `StepError` where that is not what was planned."""
    began = time.perf_counter_ns()
    try:
        agent.seen = examine.at_launch(agent)
    except OSError as error:
        raise StepError.from_os("read back confinement", error, "it may have been killed") from error
    except (LookupError, ValueError) as error:
        # Of a kernel that tells it in another way: whatever it is, it must not end the process that holds every agent.
        raise StepError("read back confinement", 0, f"{type(error).__name__}: {error}", "report this") from error
    if agent.plan.listens and not agent.listening:
        raise StepError("confine agent", 0, "no listener came with its filter", "report this")
    agent.seen["securebits"] = hex(said["securebits"])
    if "canary" in said:
        agent.seen["canary"] = {"digest": canaries.digest(), **said["canary"]}
    drift = examine.drift(agent.plan, examine.programs(agent), agent.seen)
    # Only the process itself can read these (capabilities(7)); it was ours when it said so.
    if said["securebits"] != capabilities.SECUREBITS and "capabilities" not in agent.plan.weaken:
        drift.append(f"securebits: {said['securebits']:#x}, not {capabilities.SECUREBITS:#x}")
    agent.timings_us["read back"] = (time.perf_counter_ns() - began) // 1000
    if drift:
        raise StepError(
            "confine agent", 0, f"not in force as planned: {'; '.join(drift)}", "see `stockadectl doctor`; report this"
        )


def posture(workshop: Workshop, agent: Agent) -> dict[str, Any]:
    """Return which controls are in force: as the kernel told where it can (`seen`), else as they were applied."""
    plan, net, seen = agent.plan, agent.net, agent.seen
    return {
        "ids": {
            "start": plan.ids.start,
            "size": plan.ids.size,
            "inside": plan.uid,
            **{name: seen[name] for name in ("uid", "gid", "groups", "uid_map", "gid_map")},
        },
        "namespaces": seen["namespaces"],
        **plan.rootfs.facts(),
        "seccomp": plan.filter_digest,
        "seccomp_filters": seen["seccomp_filters"],
        "record": {"execs": plan.listens and plan.record.execs, "refusals": plan.listens and plan.record.refusals},
        "no_new_privs": seen["no_new_privs"],
        "capabilities": seen["capabilities"],
        "securebits": seen["securebits"],
        "landlock_abi": 0 if plan.landlock == "off" or "landlock" in plan.weaken else landlock.ABI,
        "limits": {name: getattr(plan.limits, name) for name in plan.limits.__slots__},
        "cgroups": workshop.layout.facts(),
        "network": net.facts() if isinstance(net, Net) else {},
        "scratch": _scratch(agent),
        "canary": seen.get("canary", {}),
        "kernel": KERNEL,
        "weakened": sorted(plan.weaken),
        "root_owned": [bind.target for bind in plan.binds if bind.writable and not bind.owner_uid],
        "degraded": agent.degraded,
    }


def _scratch(agent: Agent) -> str:
    if agent.image is None:
        return "tmpfs, counts as memory"
    disk_bytes = agent.plan.limits.disk_bytes
    inodes = geometry(disk_bytes).inodes
    home = "" if agent.plan.home is None else "; home is kept, with a limit of its own"
    return f"on disk, {disk_bytes} bytes and {inodes} inodes{home}; /dev/shm is tmpfs, counts as memory"


def degraded(plan: SandboxPlan, lacking: dict[str, str]) -> list[str]:
    """Return what posture lists as degraded; raises `StepError` on what the plan does not do without."""
    require = {*plan.require, *(("landlock",) if plan.landlock == "required" else ())}
    try:
        return controls.degraded(lacking, require=require, degraded_ok=plan.degraded_ok)
    except controls.Demanded as demanded:
        raise StepError("launch on this host", 0, str(demanded), demanded.remedy) from demanded


def lacking_network(net: Net) -> dict[str, str]:
    return {} if net.firewall == "nftables" else {"nftables": net.firewall.removeprefix("missing: ")}


def swaps() -> bool:
    """Return whether the host swaps to anything (proc(5), /proc/swaps: a heading, then a line each)."""
    with open("/proc/swaps", "rb") as file:
        return len(file.read(4096).splitlines()) > 1


def save(agent: Agent, wire: dict[str, Any], start_ticks: int) -> None:
    """Leave what a restarted launcher needs to find the agent again."""
    path = f"{agent.directory}/state.json"
    state = {
        "plan": wire,
        "meta": agent.meta,
        "pid": agent.pid,
        "start_ticks": start_ticks,
        "group": agent.group_name,
    }
    # Not json.dump, which writes piece by piece and does without the encoder in C.
    with open(path, "xb") as file:
        file.write(json.dumps(state).encode())
    if agent.mounted:
        mounted.save(agent)
