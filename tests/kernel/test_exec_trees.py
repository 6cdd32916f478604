"""What one exec started can be ended by itself, with all that came of it, and nothing else of the agent."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.launcher import Launcher, LauncherError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
    until(lambda: processes(launcher, agent.agent_id) >= before + 20)
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


def test_groups_of_execs_that_are_over_are_gone(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sleep", "1000"])
    for index in range(5):
        launcher.exec(agent, ["/bin/true"], stream_id=f"x{index}")
    root = Path("/sys/fs/cgroup/unified")
    tree = next((root if root.is_dir() else root.parent).glob(f"**/stockade-{launcher.instance}/{agent.cgroup}"))
    until(lambda: not list(tree.glob("x-*")))
    with pytest.raises(LauncherError):
        launcher.request("end_exec", agent_id="ag_none", stream_id="x0")
