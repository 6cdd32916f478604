"""The sibling that keeps the memory which an agent's first process leaves at execve: confined, idle, soon gone."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandbox import sync
from sandbox.init import FD_CONTROL
from sandbox.plan import Limits, Record
from tests.support.census import children, descriptors, text
from tests.support.launcher import Launcher, LauncherError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.support.launcher import Agent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")
SECONDS_MAX = 30.0
QUIET_SECONDS = 1.0
# What a program of the agent finds when it looks for its keeper, which it then ends.
LOOK = """
import ctypes, json, os, signal
libc = ctypes.CDLL(None, use_errno=True)
keeper = next(pid for pid in range(os.getpid() + 1, 100) if not libc.kill(pid, 0))
place, pidfd, through = f"/proc/{keeper}/", os.pidfd_open(keeper), []
word = ctypes.create_string_buffer(8)
here, there = ((ctypes.c_void_p * 2)(ctypes.addressof(word), 8) for _ in range(2))
def attempt(name, call):
    try:
        if call() == -1: return
    except OSError: return
    through.append(name)
for name in "mem", "maps", "environ", "auxv", "syscall", "stack", "cmdline", "status":
    attempt(name, lambda: open(place + name, "rb").read(64))
for name in "oom_score_adj", "mem", "comm", "clear_refs", "timerslack_ns":
    attempt(name + " written", lambda: open(place + name, "wb", buffering=0).write(b"0"))
for name in "exe", "cwd", "root", "fd/1", "ns/user": attempt(name, lambda: os.readlink(place + name))
for name in "cwd", "root", "fd/0", "fd/3", "fd/4": attempt(name + " opened", lambda: os.open(place + name, os.O_PATH))
attempt("attach", lambda: libc.ptrace(16, keeper, 0, 0))
attempt("seize", lambda: libc.ptrace(0x4206, keeper, 0, 0))
attempt("read", lambda: libc.process_vm_readv(keeper, here, 1, there, 1, 0))
attempt("write", lambda: libc.process_vm_writev(keeper, here, 1, there, 1, 0))
for fd in range(8): attempt(f"get {fd}", lambda: libc.syscall(ctypes.c_long(438), pidfd, fd, 0))
attempt("join", lambda: libc.setns(pidfd, 0x20000))
attempt("wait", lambda: os.waitid(os.P_PIDFD, pidfd, os.WEXITED))
os.kill(keeper, signal.SIGKILL)
print(json.dumps({"its parent's child": keeper, "came through": through}))
"""


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    with Launcher.start() as started:
        yield started


def pid_1(agent: Agent) -> int:
    return int(json.loads((agent.directory / "state.json").read_text())["pid"])


def facts(pid: int) -> dict[str, str]:
    lines = text(Path(f"/proc/{pid}/status")).splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def ended(pid: int) -> bool:
    deadline = time.monotonic() + SECONDS_MAX
    while time.monotonic() < deadline:
        if facts(pid).get("State", "Z")[0] in "ZX":
            return True
        time.sleep(0.005)
    return False


def built(launcher: Launcher, argv: Sequence[str] = ("/bin/sleep", "1000"), **changes: Any) -> tuple[Agent, list[int]]:
    """An agent that waits for `go`, and the children of its pid 1."""
    agent = launcher.build(launcher.plan(argv, **changes))
    return agent, children(pid_1(agent))


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def pass_on(launcher: Launcher, agent: Agent, first: int, keeper: int) -> None:
    """Give the word to go to an agent that is stopped before it hears of it; its keeper is, and ends not by itself."""
    os.kill(keeper, signal.SIGSTOP)
    os.kill(first, signal.SIGSTOP)
    # Only when pid 1 has said its last.
    until(lambda: not Path(f"/proc/{pid_1(agent)}/fd/{FD_CONTROL}").is_symlink())
    sync.send(launcher.sock, {"op": "go", "rq": 0, "agent_id": agent.agent_id})
    for _ in range(2):
        launcher.request("stats", agent_ids=[])


def test_it_is_as_confined_as_the_agent_but_for_the_second_filter(launcher: Launcher) -> None:
    agent, (first, keeper) = built(launcher)
    theirs, its = facts(first), facts(keeper)
    same = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "NSpid")
    assert {name: its[name] for name in same[:-1]} == {name: theirs[name] for name in same[:-1]}
    assert (its["CapEff"], its["NoNewPrivs"], its["Seccomp"]) == ("0" * 16, "1", "2")
    assert int(theirs["Seccomp_filters"]) - int(its["Seccomp_filters"]) == 1
    assert its["Threads"] == "1"
    for kind in ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts"):
        assert Path(f"/proc/{keeper}/ns/{kind}").readlink() == Path(f"/proc/{first}/ns/{kind}").readlink()
    # Nobody of the agent's ids may look into it: its files of /proc are root's (proc(5), PR_SET_DUMPABLE).
    assert Path(f"/proc/{keeper}/mem").stat().st_uid == 0
    assert launcher.kill(agent)["verified_empty"]


def test_it_ends_soon_after_the_program_began_and_is_not_counted(launcher: Launcher) -> None:
    agent, (first, keeper) = built(launcher)
    launcher.request("go", agent_id=agent.agent_id)
    assert launcher.request("stats", agent_ids=[agent.agent_id])["stats"][agent.agent_id]["pids"] == 2
    assert ended(keeper)
    assert Path(f"/proc/{first}/exe").readlink() != Path(f"/proc/{launcher.process.pid}/exe").readlink()
    assert launcher.kill(agent)["processes_killed"] == 2


def test_it_is_not_counted_in_the_moment_in_which_it_ends(launcher: Launcher) -> None:
    """Who looks all the time sees the same number: it was three where the keeper ended between two looks."""
    seen: Counter[int] = Counter()
    for _ in range(40):
        agent, (_, keeper) = built(launcher)
        launcher.request("go", agent_id=agent.agent_id)
        while facts(keeper):
            seen[launcher.request("stats", agent_ids=[agent.agent_id])["stats"][agent.agent_id]["pids"]] += 1
        assert launcher.kill(agent)["processes_killed"] == 2
    assert list(seen) == [2], seen


def test_the_memory_it_keeps_goes_when_it_goes(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sleep", "1000"])
    deadline = time.monotonic() + SECONDS_MAX
    while len(children(pid_1(agent))) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(children(pid_1(agent))) == 1
    launcher.kill(agent)


def test_a_launcher_that_was_restarted_ends_it_too(launcher: Launcher) -> None:
    agent, (first, keeper) = built(launcher)
    pass_on(launcher, agent, first, keeper)
    launcher.restart()
    os.kill(first, signal.SIGCONT)
    assert ended(keeper)
    until(lambda: Path(f"/proc/{first}/exe").readlink().name == "sleep")
    seen = launcher.request("examine", agent_id=agent.agent_id)["effective"]
    assert (seen["drift"], seen["processes_examined"]) == ([], 2)
    assert launcher.request("stats", agent_ids=[agent.agent_id])["stats"][agent.agent_id]["pids"] == 2
    assert launcher.kill(agent)["processes_killed"] == 2


def test_a_restarted_launcher_ends_nobody_else(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sh", "-c", "(sleep 1000 &) ; exec sleep 1001"])  # the first is a child of pid 1
    until(lambda: [facts(pid).get("Name") for pid in children(pid_1(agent))] == ["sleep", "sleep"])
    before = children(pid_1(agent))
    launcher.restart()
    launcher.request("stats", agent_ids=[])
    assert [facts(pid)["State"][0] for pid in before] == ["S", "S"]
    assert launcher.kill(agent)["processes_killed"] == 3


def test_where_nobody_ends_it_it_ends_by_itself_and_nobody_is_counted_for_it(launcher: Launcher) -> None:
    agent, (first, keeper) = built(launcher)
    assert ended(keeper), "no word came"
    assert launcher.request("stats", agent_ids=[agent.agent_id])["stats"][agent.agent_id]["pids"] == 2
    launcher.request("go", agent_id=agent.agent_id)
    assert "sleep" in os.fspath(Path(f"/proc/{first}/exe").readlink())
    assert launcher.kill(agent)["processes_killed"] == 2
    agent, (_, keeper) = built(launcher)
    assert ended(keeper)
    assert launcher.kill(agent)["processes_killed"] == 2


def test_frozen_with_the_agent_it_is_not_counted_either(launcher: Launcher) -> None:
    agent, (first, keeper) = built(launcher)
    pass_on(launcher, agent, first, keeper)
    os.kill(pid_1(agent), signal.SIGSTOP)  # as when it is frozen: what ends is not reaped
    until(lambda: facts(pid_1(agent))["State"].startswith("T"))
    os.kill(first, signal.SIGCONT)
    assert ended(keeper)
    assert facts(keeper)["State"].startswith("Z")
    for _ in range(3):
        assert launcher.request("stats", agent_ids=[agent.agent_id])["stats"][agent.agent_id]["pids"] == 2
        time.sleep(0.01)
    os.kill(pid_1(agent), signal.SIGCONT)
    until(lambda: not facts(keeper))
    assert launcher.kill(agent)["processes_killed"] == 2


def test_the_agent_can_end_it_and_look_at_nothing(launcher: Launcher) -> None:
    agent, (first, keeper) = built(launcher, argv=["python3", "-I", "-c", LOOK])
    pass_on(launcher, agent, first, keeper)
    os.kill(launcher.process.pid, signal.SIGSTOP)  # it would end it 5 ms after execve
    try:
        os.kill(first, signal.SIGCONT)
        assert ended(keeper)
        assert ended(first)
    finally:
        os.kill(launcher.process.pid, signal.SIGCONT)
    launcher.wait(agent)
    assert json.loads(agent.stdout) == {"its parent's child": 3, "came through": []}, agent.stderr


def test_nothing_of_it_stays_with_the_launcher(launcher: Launcher) -> None:
    def held() -> int:
        """Counted when what is made ahead is there again, which holds some too."""
        last, since = -1, time.monotonic()
        while time.monotonic() - since < QUIET_SECONDS:
            count = Counter(descriptors(launcher.process.pid))["anon_inode:[pidfd]"]
            if count != last:
                last, since = count, time.monotonic()
            time.sleep(0.02)
        return last

    launcher.run(["/bin/true"])
    before = held()
    for _ in range(5):
        launcher.run(["/bin/true"])
        launcher.kill(launcher.launch(["/bin/sleep", "1000"]))
        launcher.kill(launcher.build(launcher.plan(["/bin/true"])))
        for program in ("/nonexistent", "/etc/passwd"):
            with pytest.raises(LauncherError, match=program):
                launcher.launch([program])
    assert held() == before


@pytest.mark.parametrize(
    "changes",
    [{"limits": Limits(pids=32)}, {"limits": Limits(memory_bytes=16 << 20)}, {"record": Record(refusals=True)}],
    ids=["few processes", "little memory", "refusals are told of"],
)
def test_there_is_none_where_it_would_be_in_the_way(launcher: Launcher, changes: dict[str, Any]) -> None:
    agent, beside = built(launcher, **changes)
    assert len(beside) == 1
    launcher.request("go", agent_id=agent.agent_id)
    launcher.kill(agent)
