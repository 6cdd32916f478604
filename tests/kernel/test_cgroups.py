"""Limits, kill and freeze as a process in the group feels them.

The same file runs on hybrid hosts and, under User-Mode Linux, on cgroup v2 (tests/second_kernel).
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import sys
import textwrap
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandbox import plan, syscalls
from sandbox.cgroups import CannotConfine, Group, Layout, detect, reconcile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes control groups")

MIB = 1 << 20
Limits = partial(plan.Limits, memory_bytes=256 * MIB, pids=64)


@dataclass
class Child:
    """A process that entered the group the way an agent does: cloned into the v2 tree, then by its own hand into v1."""

    pid: int
    output: int
    status: int | None = field(default=None)

    def read(self) -> str:
        """Everything it prints until every copy of its output is closed."""
        with os.fdopen(self.output, "rb") as stream:
            self.output = -1
            return stream.read().decode()

    def line(self) -> str:
        text = b""
        while not text.endswith(b"\n") and (byte := os.read(self.output, 1)):
            text += byte
        return text.decode().strip()

    def wait(self) -> int:
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status


@dataclass
class Host:
    layout: Layout
    instance: str
    children: list[Child] = field(default_factory=list)

    def group(self, limits: plan.Limits | None = None, name: str = "ag_one") -> Group:
        return self.layout.create(self.instance, name, limits or Limits())

    def run(self, group: Group, program: str) -> Child:
        read, write = os.pipe()
        pid, pidfd = syscalls.clone3(0, cgroup=group.fd_for_clone())
        if pid == 0:
            try:
                for fd in group.entry_fds():
                    os.write(fd, b"0")
                os.dup2(write, 1)
                os.execv(  # noqa: S606 - no shell is the point
                    sys.executable, [sys.executable, "-I", "-S", "-c", textwrap.dedent(program)]
                )
            finally:
                os._exit(127)
        os.close(write)
        os.close(pidfd)
        child = Child(pid, read)
        self.children.append(child)
        return child


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host(detect(), f"t{secrets.token_hex(4)}")
    yield made
    left = reconcile(made.instance, (), layout=made.layout)
    for child in made.children:
        child.wait()
        if child.output >= 0:
            os.close(child.output)
    again = reconcile(made.instance, (), layout=made.layout)
    assert [item for item in (*left, *again) if item.problem] == []
    assert not any(top.exists() for top in made.layout.tops(made.instance))


def until(condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


def test_every_limit_is_in_force_before_the_first_instruction(host: Host) -> None:
    group = host.group()
    child = host.run(group, "print(open('/proc/self/cgroup').read())")
    lines = [line.split(":", 2) for line in child.read().split()]
    mine = f"/stockade-{host.instance}/ag_one"
    where = {name: path for _, names, path in lines for name in (names.split(",") if names else ["v2"])}
    needed = {"v2"} if host.layout.kind == "v2" else {"v2", "memory", "cpu", "pids"}
    assert {name for name, path in where.items() if path.endswith(mine)} == needed


def test_memory_beyond_the_limit_kills_and_is_counted(host: Host) -> None:
    group = host.group(Limits(memory_bytes=48 * MIB))
    child = host.run(group, "x = bytearray(200 << 20); print(len(x))")
    assert child.read() == ""
    assert child.wait() == -signal.SIGKILL
    assert group.oom_kills() == group.stats().oom_kills >= 1


def test_memory_below_the_limit_does_not(host: Host) -> None:
    group = host.group(Limits(memory_bytes=300 * MIB))
    child = host.run(group, "x = bytearray(200 << 20); print(len(x))")
    assert child.read().strip() == str(200 << 20)
    assert child.wait() == 0
    assert group.oom_kills() == 0
    stats = group.stats()
    assert stats.memory_peak == 0 or stats.memory_peak > 190 * MIB


def test_swap_is_no_way_around_the_limit(host: Host) -> None:
    group = host.group(Limits(memory_bytes=64 * MIB))
    if host.layout.kind == "v2":
        swap = group.directories()[0] / "memory.swap.max"
        assert not swap.exists() or swap.read_text().strip() == "0"
    else:
        memory = next(path for path in group.directories() if "memory" in path.parts)
        assert (memory / "memory.memsw.limit_in_bytes").read_text().strip() == str(64 * MIB)


def test_pids_beyond_the_limit_are_refused_inside_and_nowhere_else(host: Host) -> None:
    program = """
        import errno, os, time
        made = 0
        try:
            while made < 40:
                if os.fork() == 0:
                    time.sleep(60)
                    os._exit(0)
                made += 1
        except OSError as error:
            assert error.errno == errno.EAGAIN
        print(made + 1, flush=True)
        time.sleep(60)
    """
    small, large = host.group(Limits(pids=8), "ag_small"), host.group(Limits(pids=64), "ag_large")
    assert host.run(small, program).line() == "8"
    assert host.run(large, program).line() == "41"
    assert (small.stats().pids, len(small.pids())) == (8, 8)


SPIN = """
    import time
    end = time.monotonic() + 1.5
    print("begin", flush=True)
    while time.monotonic() < end: pass
"""


@pytest.mark.parametrize(("cpus", "held"), [(0.05, True), (1.0, False)])
def test_cpu_time_is_held_to_the_quota(host: Host, cpus: float, held: bool) -> None:  # noqa: FBT001 - a parameter
    group = host.group(Limits(cpus=cpus))
    child = host.run(group, SPIN)
    child.line()
    before = group.stats().cpu_usec
    begin = time.monotonic()
    assert child.wait() == 0
    used = (group.stats().cpu_usec - before) / 1e6
    bound = 0.05 * (time.monotonic() - begin) * 1.5 + 0.03
    assert (used <= bound) is held, (used, bound)


STUBBORN = """
    import os, signal, time
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for _ in range(30):
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            time.sleep(600)
    print("ready", flush=True)
    time.sleep(600)
"""


def test_kill_leaves_nobody_and_events_tell(host: Host) -> None:
    group = host.group()
    poller = select.epoll()
    poller.register(group.events_fd(), select.EPOLLPRI)
    child = host.run(group, STUBBORN)
    assert child.line() == "ready"
    assert group.populated()
    assert len(group.pids()) >= 31
    poller.poll(0)
    group.kill()
    assert child.wait() == -signal.SIGKILL
    until(lambda: bool(poller.poll(5)) and not group.populated())
    poller.close()
    assert group.pids() == []
    group.kill()  # twice is the same
    group.remove()
    group.kill()  # and after it is gone, too
    assert not any(path.exists() for path in group.directories())


def test_kill_reaches_a_fork_storm(host: Host) -> None:
    group = host.group(Limits(pids=100))
    storm = """
        import os
        print("storm", flush=True)
        while True:
            try: os.fork()
            except OSError: pass
    """
    assert host.run(group, storm).line() == "storm"
    until(lambda: group.stats().pids >= 90)
    group.kill()
    until(lambda: not group.populated())


def test_freeze_stops_time_and_thaw_gives_it_back(host: Host) -> None:
    group = host.group()
    child = host.run(group, "print('go', flush=True)\nwhile True: pass")
    child.line()
    group.freeze()
    until(group.frozen)
    time.sleep(0.1)  # what left the processor just now is counted when it has
    frozen = group.stats().cpu_usec
    time.sleep(0.3)  # not waiting for a condition: time in which a running process would use some
    assert group.stats().cpu_usec == frozen
    group.thaw()
    until(lambda: group.stats().cpu_usec > frozen)
    assert not group.frozen()


def test_a_frozen_group_can_be_killed(host: Host) -> None:
    group = host.group()
    child = host.run(group, "import time\nprint('go', flush=True)\ntime.sleep(600)")
    child.line()
    group.freeze()
    until(group.frozen)
    group.kill()
    assert child.wait() == -signal.SIGKILL


def test_remove_refuses_while_somebody_lives_and_names_them(host: Host) -> None:
    group = host.group()
    child = host.run(group, "import time\nprint('go', flush=True)\ntime.sleep(600)")
    child.line()
    with pytest.raises(CannotConfine, match=rf"processes left: \[{child.pid}\]"):
        group.remove(seconds_max=0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    host.layout.open(host.instance, "ag_one").remove()


def test_an_outsider_can_be_moved_in(host: Host) -> None:
    group = host.group()
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    group.add(pid)
    assert group.pids() == [pid]
    group.kill()
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def test_a_sub_group_dies_alone_and_with_its_parent(host: Host) -> None:
    group = host.group()
    sub = group.sub("exec-1")
    main = host.run(group, "import time\nprint('go', flush=True)\ntime.sleep(600)")
    extra = host.run(sub, "import time\nprint('go', flush=True)\ntime.sleep(600)")
    assert (main.line(), extra.line()) == ("go", "go")
    assert sorted(group.pids()) == sorted([main.pid, extra.pid])
    assert group.stats().pids == 2, "the limits are the parent's"
    sub.kill()
    assert extra.wait() == -signal.SIGKILL
    sub.remove()
    assert group.pids() == [main.pid]
    second = group.sub("exec-2")
    extra = host.run(second, "import time\nprint('go', flush=True)\ntime.sleep(600)")
    extra.line()
    group.kill()
    assert (main.wait(), extra.wait()) == (-signal.SIGKILL, -signal.SIGKILL)
    second.close()
    group.remove()


def test_an_id_in_use_is_refused_and_the_first_keeps_its_limits(host: Host) -> None:
    first = host.group(Limits(pids=8))
    before = [sorted(path.iterdir()) for path in first.directories()]
    with pytest.raises(CannotConfine, match="another agent has this id"):
        host.group(Limits(pids=9))
    assert [sorted(path.iterdir()) for path in first.directories()] == before
    child = host.run(first, "print('alive')")
    assert child.read() == "alive\n"


@pytest.mark.parametrize("limits", [Limits(pids=-2), Limits(memory_bytes=-5), Limits(cpus=1e12)])
def test_a_limit_the_kernel_refuses_leaves_nothing(host: Host, limits: plan.Limits) -> None:
    descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
    with pytest.raises(CannotConfine, match="cannot write"):
        host.group(limits)
    assert not any((top / "ag_one").exists() for top in host.layout.tops(host.instance))
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == descriptors
    host.group().remove()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\nb", "-a", "x" * 129, "a\0"])
def test_names_that_would_leave_the_instance_are_refused(host: Host, name: str) -> None:
    with pytest.raises(CannotConfine, match="cannot name a cgroup"):
        host.group(name=name)


def test_reconcile_takes_the_dead_and_leaves_the_living_and_the_neighbours(host: Host) -> None:
    sleeper = "import time\nprint('go', flush=True)\ntime.sleep(600)"
    neighbour = Host(host.layout, f"{host.instance}n")
    groups = {name: host.group(name=name) for name in ("ag_dead", "ag_live", "ag_empty")}
    groups["ag_dead"].sub("exec-1").close()
    other = neighbour.group()
    try:
        children = {name: host.run(groups[name], sleeper) for name in ("ag_dead", "ag_live")}
        near = neighbour.run(other, sleeper)
        for child in (*children.values(), near):
            child.line()
        report = reconcile(host.instance, {"ag_live"}, layout=host.layout)
        assert [(item.agent_id, item.processes_killed, item.problem) for item in report] == [
            ("ag_dead", 1, ""),
            ("ag_empty", 0, ""),
        ]
        assert children["ag_dead"].wait() == -signal.SIGKILL
        assert groups["ag_live"].pids() == [children["ag_live"].pid]
        assert other.pids() == [near.pid]
        assert reconcile(host.instance, {"ag_live"}, layout=host.layout) == ()
    finally:
        reconcile(neighbour.instance, (), layout=neighbour.layout)
        near.wait()


def test_create_and_remove_leave_no_descriptor_open(host: Host) -> None:
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    for _ in range(5):
        host.group().remove()
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before
