"""What one exec started can be ended by itself, with all that came of it, and nothing else of the agent."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.launcher import Launcher, LauncherError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.launcher import Agent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

SECONDS_MAX = 20.0
# A daemon's way: sessions of their own, signals ignored, parents gone.
TREE = "trap '' TERM HUP INT; for i in 1 2 3; do (setsid sh -c 'sleep 1000 & sleep 1000' &) ; done; sleep 1000"


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    with Launcher.start() as started:
        yield started


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    while not holds():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def processes(launcher: Launcher, agent_id: str) -> int:
    return int(launcher.request("stats", agent_ids=[agent_id])["stats"][agent_id]["pids"])


def test_an_exec_ends_with_all_its_descendants_and_nothing_else(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sleep", "1000"])
    before = processes(launcher, agent.agent_id)
    for name in ("one", "two"):
        launcher.start_exec(agent, ["/bin/sh", "-c", TREE], stream_id=name)
    (group,) = groups(launcher, agent)
    until(lambda: [len((one / "cgroup.procs").read_text().split()) >= 10 for one in execs_in(group)] == [True, True])
    ended = launcher.request("end_exec", agent_id=agent.agent_id, stream_id="one")
    assert ended["verified_empty"]
    assert ended["left"] == []
    assert ended["processes_killed"] >= 10
    launcher.event(lambda e: e.get("ev") == "exec_exited" and e["stream_id"] == "one")
    until(
        lambda: processes(launcher, agent.agent_id) == before + 11 or processes(launcher, agent.agent_id) == before + 10
    )
    again = launcher.request("end_exec", agent_id=agent.agent_id, stream_id="one")
    assert (again["verified_empty"], again["processes_killed"]) == (True, 0)
    assert launcher.kill(agent)["verified_empty"]


def test_the_first_process_alone_leaves_the_rest_which_the_exec_still_is(launcher: Launcher) -> None:
    """The twin: a signal to the program does not do it."""
    agent = launcher.launch(["/bin/sleep", "1000"])
    before = processes(launcher, agent.agent_id)
    launcher.start_exec(agent, ["/bin/sh", "-c", TREE], stream_id="one")
    until(lambda: processes(launcher, agent.agent_id) >= before + 10)
    launcher.request("signal", stream_id="one", signal=9)
    launcher.event(lambda e: e.get("ev") == "exec_exited" and e["stream_id"] == "one")
    assert processes(launcher, agent.agent_id) >= before + 9
    ended = launcher.request("end_exec", agent_id=agent.agent_id, stream_id="one")
    assert (ended["verified_empty"], ended["processes_killed"] >= 9) == (True, True)
    until(lambda: processes(launcher, agent.agent_id) == before)


def test_groups_of_execs_that_are_over_are_gone_but_one(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sleep", "1000"])
    for index in range(5):
        launcher.exec(agent, ["/bin/true"], stream_id=f"x{index}")
    (tree,) = groups(launcher, agent)
    until(lambda: len(execs_in(tree)) == 1)
    (spare,) = execs_in(tree)
    assert (spare / "cgroup.procs").read_text() == "", "kept for the next"
    with pytest.raises(LauncherError):
        launcher.request("end_exec", agent_id="ag_none", stream_id="x0")


def test_what_an_exec_left_can_be_ended_by_a_launcher_that_was_restarted(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sleep", "1000"])
    before = processes(launcher, agent.agent_id)
    for name in ("one", "two"):
        launcher.start_exec(agent, ["/bin/sh", "-c", TREE], stream_id=name)
    until(lambda: processes(launcher, agent.agent_id) >= before + 20)
    (group,) = groups(launcher, agent)

    def in_each() -> list[int]:
        return [len((tree / "cgroup.procs").read_text().split()) for tree in execs_in(group)]

    seen: list[list[int]] = []

    def settled() -> bool:
        seen.append(in_each()[:2])
        return min(seen[-1]) >= 10 and len(set(seen[-1])) == 1 and seen[-20:] == [seen[-1]] * 20

    until(settled)
    one = seen[-1][0] - 1
    assert seen[-1] == [one + 1] * 2
    launcher.restart()
    launcher.request("hello")
    until(lambda: in_each() == [one, one])  # without what the launcher was the parent of
    ended = launcher.request("end_exec", agent_id=agent.agent_id, stream_id="one")
    assert (ended["verified_empty"], ended["processes_killed"]) == (True, one)
    until(lambda: in_each() == [one])  # one that was killed is not used again
    assert launcher.exec(agent, ["/bin/true"], stream_id="three")["status"]["code"] == 0
    assert launcher.kill(agent)["verified_empty"]
    assert groups(launcher, agent) == []


def test_a_group_that_an_earlier_launcher_killed_is_not_the_next_execs(launcher: Launcher) -> None:
    """Linux 6.18 kills what is started in a group that was killed before."""
    agent = launcher.launch(["/bin/sleep", "1000"])
    launcher.start_exec(agent, ["/bin/sh", "-c", "setsid sleep 1000 & sleep 1000"], stream_id="one")
    (group,) = groups(launcher, agent)
    (tree,) = execs_in(group)
    until(lambda: len((tree / "cgroup.procs").read_text().split()) == 3)
    launcher.restart()
    launcher.request("hello")
    (tree / "cgroup.kill").write_text("1")  # as if that had been its last act
    until(lambda: "populated 0" in (tree / "cgroup.events").read_text())
    for stream_id in ("two", "three", "four"):
        assert launcher.exec(agent, ["/bin/true"], stream_id=stream_id)["status"]["code"] == 0
        until(lambda: len(execs_in(group)) == 1)
    assert launcher.kill(agent)["verified_empty"]


def test_an_exec_that_forks_on_ends_too(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sleep", "1000"])
    before = processes(launcher, agent.agent_id)
    storm = "f() { f & f & }; trap '' TERM; f; sleep 1000"
    launcher.start_exec(agent, ["/bin/sh", "-c", storm], stream_id="storm")
    until(lambda: processes(launcher, agent.agent_id) >= 100)
    ended = launcher.request("end_exec", agent_id=agent.agent_id, stream_id="storm")
    assert ended["verified_empty"]
    until(lambda: processes(launcher, agent.agent_id) == before)


def execs_in(group: Path) -> list[Path]:
    return sorted(group / name for name in os.listdir(group) if name.startswith("exec-"))  # noqa: PTH208 - they come and go


def groups(launcher: Launcher, agent: Agent) -> list[Path]:
    return launcher.groups(agent)[:1]  # that of the v2 tree
