"""The sibling that keeps the memory which an agent's first process leaves at execve: confined, idle, soon gone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandbox.plan import Limits, Record
from tests.support.census import children, text
from tests.support.launcher import Launcher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.launcher import Agent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")
SECONDS_MAX = 10.0


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


def built(launcher: Launcher, **changes: object) -> tuple[Agent, list[int]]:
    """An agent that waits for `go`, and the children of its pid 1."""
    agent = launcher.build(launcher.plan(["/bin/sleep", "1000"], **changes))
    return agent, children(pid_1(agent))


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


def test_the_memory_it_keeps_goes_when_it_goes(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sleep", "1000"])
    deadline = time.monotonic() + SECONDS_MAX
    while len(children(pid_1(agent))) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(children(pid_1(agent))) == 1
    launcher.kill(agent)


def test_a_launcher_that_was_restarted_ends_it_too(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sleep", "1000"])
    launcher.restart()
    seen = launcher.request("examine", agent_id=agent.agent_id)["effective"]
    assert seen["drift"] == []


def test_where_nobody_ends_it_it_ends_by_itself(launcher: Launcher) -> None:
    agent, (first, keeper) = built(launcher)
    assert ended(keeper), "no word came"
    launcher.request("go", agent_id=agent.agent_id)
    assert "sleep" in os.fspath(Path(f"/proc/{first}/exe").readlink())
    launcher.kill(agent)


@pytest.mark.parametrize(
    "changes",
    [{"limits": Limits(pids=8)}, {"record": Record(refusals=True)}],
    ids=["few processes", "refusals are told of"],
)
def test_there_is_none_where_it_would_be_in_the_way(launcher: Launcher, changes: dict[str, object]) -> None:
    agent, beside = built(launcher, **changes)
    assert len(beside) == 1
    launcher.request("go", agent_id=agent.agent_id)
    launcher.kill(agent)
