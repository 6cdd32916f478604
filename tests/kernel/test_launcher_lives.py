"""The launcher holds every agent: what one launch, one agent or one descriptor does must not end it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sandbox.cgroups import detect
from sandbox.launcher import BUSY_SECONDS
from sandbox.loop import READ, Loop, Owned
from sandbox.starters import READY
from tests.support.launcher import Agent, Launcher, LauncherError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")


def descriptors(launcher: Launcher) -> int:
    """Counted when the stocks are full again."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 0.5:
        count = len(list(Path(f"/proc/{launcher.process.pid}/fd").iterdir()))
        if count != last:
            last, since = count, time.monotonic()
        time.sleep(0.02)
    return last


def launch_many(launcher: Launcher, agents: list[Agent]) -> None:
    while len(agents) < 40:
        agents.append(launcher.launch(["/bin/sleep", "1000"]))


def test_descriptors_that_run_out_fail_a_launch_and_nothing_else() -> None:
    with Launcher.start(wrapper=["prlimit", "--nofile=170:170"]) as launcher:
        agents: list[Agent] = []
        with pytest.raises(LauncherError):
            launch_many(launcher, agents)
        assert launcher.process.poll() is None
        for agent in agents:
            assert launcher.kill(agent)["verified_empty"]
        assert launcher.run(["/bin/true"]).status == {"code": 0, "signal": None}


def begun(launcher: Launcher, agents: list[Agent]) -> int:
    """How many sandboxes are begun ahead of need."""
    top = next(iter(detect().tops(launcher.instance)))
    return len({path.name for path in top.iterdir() if path.is_dir()} - {agent.cgroup for agent in agents})


@pytest.mark.parametrize("pause", ["0.004", "1000"], ids=["beside one that never stops printing", "beside a quiet one"])
def test_sandboxes_are_begun_ahead(launcher: Launcher, pause: str) -> None:
    one = f"while :; do echo x; sleep {pause}; done"
    agents = [launcher.launch(["/bin/sh", "-c", f"({one}) & ({one}) & {one}"])]
    try:
        for _ in range(3):
            agents.append(launcher.launch(["/bin/sleep", "1000"]))
            deadline = time.monotonic() + 5
            while begun(launcher, agents) < READY and time.monotonic() < deadline:
                time.sleep(0.01)
            assert begun(launcher, agents) == READY
    finally:
        for agent in agents:
            launcher.kill(agent)


def test_a_launch_that_ends_a_long_wait_does_not_wait_for_the_stock(launcher: Launcher) -> None:
    """What it took is made anew when it is done; before, that made the launch itself slower."""
    ahead: list[int] = []
    for _ in range(40):
        deadline = time.monotonic() + 10
        while begun(launcher, []) < READY and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)  # longer than a busy launcher goes without looking after its stock
        began = time.monotonic()
        agent = launcher.build(launcher.plan(["/bin/true"]))
        here = begun(launcher, [agent])
        if time.monotonic() - began < BUSY_SECONDS / 2:
            ahead.append(here)
        launcher.kill(agent)
        if len(ahead) == 8:
            break
    assert ahead, "the machine is too busy to tell"
    assert set(ahead) == {READY - 1}


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    with Launcher.start(wrapper=["prlimit", "--nofile=170:4096"]) as launcher:
        agents = [launcher.launch(["/bin/sleep", "1000"]) for _ in range(12)]
        assert all(launcher.kill(agent)["verified_empty"] for agent in agents)


def test_a_restart_keeps_no_descriptor_of_the_dead(launcher: Launcher) -> None:
    for _ in range(5):
        launcher.run(["/bin/true"])
    launcher.restart()
    launcher.request("hello")
    first = descriptors(launcher)
    for _ in range(5):
        launcher.run(["/bin/true"])
    launcher.restart()
    launcher.request("hello")
    assert descriptors(launcher) == first


def test_trouble_in_a_callback_ends_whose_it_is() -> None:
    loop, ended, others = Loop(), [], []
    owned = Owned(loop, lambda: ended.append("its agent"))
    read, write = os.pipe()
    os.write(write, b"x")

    def trouble(*_: object) -> None:
        raise OSError("of this one")

    owned.watch(read, READ, trouble)
    owned.later(0, trouble)
    loop.later(0, lambda: others.append("goes on"))
    for _ in range(3):
        loop.turn(0.01)
    assert (ended, others) == (["its agent"] * 2, ["goes on"])  # once a callback: the descriptor is watched no more
    os.close(read)
    os.close(write)


def test_a_run_directory_that_is_full_fails_a_launch_and_nothing_else(launcher: Launcher) -> None:
    plan = launcher.plan(["/bin/true"])
    (launcher.run_dir / "agents" / plan.agent_id).write_text("in the way")  # any failure to write there
    with pytest.raises(LauncherError, match="directory of the agent"):
        launcher.build(plan)
    (launcher.run_dir / "agents" / plan.agent_id).unlink()
    assert launcher.run(["/bin/true"]).status == {"code": 0, "signal": None}
