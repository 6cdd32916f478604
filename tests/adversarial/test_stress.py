"""stress-ng inside the default policy: the agent ends or is bounded, the host goes on, and nothing is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from sandbox.cgroups import detect
from sandbox.plan import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.launcher import Agent, Launcher

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes"),
    pytest.mark.skipif(shutil.which("stress-ng") is None, reason="needs stress-ng (Debian's package)"),
]
DEFAULT = Limits()
HOST_SECONDS_MAX = 2.0  # for a process of the host to start and end, with everybody else's load beside it
FINISHED = {0, 2, 3}  # stress-ng: well, a stressor failed, there were not the resources for it
QUICK = (
    "--fork 2 --pthread 1 --vm 2 --vm-bytes 2g --shm 1 --memfd 1 --mmap 1 --brk 1 --stack 1 --pipe 1 --sock 1 "
    "--sockfd 1 --sem 1 --sem-sysv 1 --mq 1 --msg 1 --timer 1 --timerfd 1 --sigq 1 --inotify 1 --epoll 1 --flock 1 "
    "--hdd 1 --dir 1 --dentry 1 --dup 1 --pty 1 --exec 1 --zombie 1 --key 1 --aio 1 --sync-file 1 --io 1"
)
CLASSES = ("cpu", "filesystem", "interrupt", "io", "memory", "network", "os", "pipe", "scheduler", "vm")


class Watched:
    """Starts processes on the host all the while, and knows the longest that one of them took."""

    def __enter__(self) -> Self:
        self.longest = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.05):
            began = time.monotonic()
            subprocess.run(["/bin/true"], check=True)
            self.longest = max(self.longest, time.monotonic() - began)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def stress(launcher: Launcher, *arguments: str, timeout: float) -> Agent:
    """Run it as an agent of the default size; kills the agent where stress-ng itself does not come to an end."""
    agent = launcher.launch(
        ["stress-ng", "--temp-path", "/tmp", "--oomable", "--no-rand-seed", *arguments],
        limits=DEFAULT,
    )
    try:
        return launcher.wait(agent, timeout=timeout)
    except TimeoutError:
        assert launcher.kill(agent)["verified_empty"]
        return launcher.wait(agent)


def host_limits() -> dict[str, str]:
    """What no agent may change: settings, and what is counted for the whole host."""
    names = ("kernel/core_pattern", "kernel/pid_max", "vm/overcommit_memory", "fs/aio-nr", "kernel/sched_rt_runtime_us")
    return {name: Path("/proc/sys", name).read_text().strip() for name in names}


@pytest.fixture(autouse=True)
def nothing_is_left(launcher: Launcher) -> Iterator[None]:
    before = host_limits()
    yield
    assert launcher.request("hello")["agents"] == []
    assert host_limits() == before
    for top in detect().tops(launcher.instance):
        stock = [path.name for path in top.iterdir() if path.is_dir()] if top.exists() else []
        assert len(stock) <= 3, "the starters that are ready, and no agent's group"
    # The launcher is as quick as before.
    assert launcher.run(["/bin/true"], timeout=10).status == {"code": 0, "signal": None}


def test_everything_at_once_is_bounded(launcher: Launcher) -> None:
    with Watched() as host:
        agent = stress(launcher, *QUICK.split(), "--timeout", "3s", timeout=80)
    assert host.longest < HOST_SECONDS_MAX
    assert agent.status is not None
    assert agent.oom or agent.status["code"] in FINISHED, (agent.status, agent.stderr[-2000:])


def test_the_stressors_do_run(launcher: Launcher) -> None:
    """The twin: what is bounded above is no program that could not start."""
    agent = stress(launcher, "--cpu", "1", "--pipe", "1", "--timeout", "1s", "--metrics-brief", timeout=30)
    assert agent.status == {"code": 0, "signal": None}
    assert "successful run completed" in agent.stdout + agent.stderr


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", CLASSES)
def test_a_class_of_stressors_one_after_the_other(launcher: Launcher, name: str) -> None:
    with Watched() as host:
        agent = stress(launcher, "--class", name, "--sequential", "1", "--timeout", "1s", timeout=300)
    assert host.longest < HOST_SECONDS_MAX
    assert agent.status is not None
    assert agent.oom or agent.status["code"] in FINISHED or agent.status["signal"] == 9, agent.status
