"""The launcher's side of a launch: gather what the child needs, and send it to a starter; `following.py` goes on.

Everything that was made is undone when a later step fails; `end()` of the agent undoes the rest.
"""

# ruff: noqa: PTH102, PTH106, PTH108, PTH123, PTH208 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any, Final

from sandbox import binds, init, mounted, sync, syscalls
from sandbox.attach import own_pipe
from sandbox.following import Built, Follow
from sandbox.netpool import CannotMakeNetwork
from sandbox.plan import SandboxPlan
from sandbox.posture import degraded, lacking_network
from sandbox.running import Agent
from sandbox.scratch import HOME_ID, UPPER, CannotMakeScratch
from sandbox.stdio import Feed, Pump, RotatingFile
from sandbox.sync import StepError, step
from sandbox.userns import Ahead, Making
from sandbox.workshop import Workshop

META_BYTES_MAX: Final = 64 << 10


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
        undo.callback(agent.put_images_away)
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
        agent.put_images_away()
        raise StepError("make scratch", error.number, str(error), error.remedy) from error


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
            rootfs = add(binds.clone_tree(fds[plan.rootfs.fd], "/", syscalls.AT_RECURSIVE))
    shown = _binds(workshop, agent, fds, (host_uid, host_gid), add)
    undo.callback(mounted.forget, agent)
    with step("note binds"):
        mounted.launched(agent, [given[index] for index in shown])
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
        "binds": shown,
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
    shown = []
    try:
        for bind in agent.plan.binds:
            with step(f"bind {bind.target}"):
                owner = (bind.owner_uid, bind.owner_gid)
                if owner not in namespaces:
                    namespaces[owner] = workshop.holders.for_mount(
                        disk_uid=owner[0], disk_gid=owner[1], host_uid=host[0], host_gid=host[1]
                    )
                tree, unmapped = binds.clone_bind(
                    bind, fds[bind.fd], namespaces[owner], safe="mount_flags" not in agent.plan.weaken
                )
            if unmapped:
                agent.lacking["idmap"] = "; ".join(filter(None, (agent.lacking.get("idmap"), unmapped)))
            shown.append(add(tree))
    finally:
        sync.close_all(list(namespaces.values()))
    return shown


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
