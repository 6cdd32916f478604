"""Attempts to live longer than anybody knows: to start after a launch was given up, to stay after a kill."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandbox.plan import Bind
from tests.support.attempt import PRELUDE, attempt
from tests.support.launcher import Launcher, LauncherError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.launcher import Agent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

EXEC_SECONDS = 0.5


@pytest.fixture(scope="module")
def hasty() -> Iterator[Launcher]:
    """A launcher that waits for an execve for a short time only."""
    with Launcher.start(arguments=["--exec-seconds", str(EXEC_SECONDS)]) as launcher:
        yield launcher


@pytest.fixture
def workspace() -> Iterator[tuple[Path, int, Bind]]:
    """A directory with a script that says that it ran."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        path = Path(name)
        (path / "victim").write_text("#!/bin/sh\ntouch /workspace/ran; sleep 1000\n")
        (path / "victim").chmod(0o755)
        for each in (path, path / "victim"):
            os.chown(each, 1000, 1000)
        fd = os.open(path, os.O_PATH)
        yield path, fd, Bind(0, "/workspace", writable=True, owner_uid=1000, owner_gid=1000)
        os.close(fd)


@contextlib.contextmanager
def lease(path: Path) -> Iterator[Callable[[], object]]:
    """Hold a write lease: whoever opens or executes the file waits until it is given up (fcntl(2)). Gives the word."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield lambda: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, before)


def test_a_launch_that_was_given_up_never_runs(hasty: Launcher, workspace: tuple[Path, int, Bind]) -> None:
    path, fd, bind = workspace
    agent = hasty.build(hasty.plan(["/workspace/victim"], binds=(bind,)), [fd])
    with lease(path / "victim") as give_up:
        with pytest.raises(LauncherError) as told:
            hasty.request("go", agent_id=agent.agent_id)
        assert (told.value.error["step"], told.value.error["errno"]) == ("exec", "ETIMEDOUT")
        give_up()
        time.sleep(0.2)
    assert not (path / "ran").exists()
    assert not processes(agent)


def test_an_exec_that_was_given_up_never_runs(hasty: Launcher, workspace: tuple[Path, int, Bind]) -> None:
    path, fd, bind = workspace
    agent = hasty.launch(["/bin/sleep", "1000"], [fd], binds=(bind,))
    with lease(path / "victim") as give_up:
        with pytest.raises(LauncherError) as told:
            hasty.start_exec(agent, ["/workspace/victim"], stream_id="late")
        assert told.value.error["errno"] == "ETIMEDOUT"
        give_up()
        time.sleep(0.2)
    assert not (path / "ran").exists()
    assert hasty.kill(agent)["verified_empty"]


def test_what_is_in_time_runs(hasty: Launcher, workspace: tuple[Path, int, Bind]) -> None:
    """The twin: a lease that is given up early only delays."""
    path, fd, bind = workspace
    with lease(path / "victim") as give_up:
        threading.Timer(EXEC_SECONDS / 5, give_up).start()
        agent = hasty.launch(["/workspace/victim"], [fd], binds=(bind,))
    deadline = time.monotonic() + 10
    while not (path / "ran").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert hasty.kill(agent)["verified_empty"]


LEASE = """
import fcntl
with open('/tmp/file', 'w') as file: pass
fd = os.open('/tmp/file', os.O_RDONLY)
try: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
except OSError as e: refused(name(e.errno))
reached()
"""


def test_no_lease_can_be_taken(launcher: Launcher, weak_launcher: Launcher) -> None:
    assert not attempt(launcher, LEASE).reached
    assert attempt(weak_launcher, LEASE, weaken=("seccomp",)).reached


SIBLINGS = """
import signal
for _ in range(3):
    pid, error = call(56, 0x8000 | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0: os._exit(0)
    if pid < 0: refused(error)
reached(os.getppid())
"""


def siblings(launcher: Launcher, **changes: Any) -> tuple[str, dict[str, Any], float]:
    """Have an exec'd program make siblings of itself, then kill; gives what it said, the receipt, and the seconds."""
    agent = launcher.launch(["/bin/sleep", "1000"], **changes)
    said = launcher.exec(agent, ["python3", "-I", "-c", PRELUDE + SIBLINGS])["stdout"]
    began = time.monotonic()
    receipt = launcher.kill(agent)
    seconds = time.monotonic() - began
    assert not processes(agent)
    return said, receipt, seconds


def test_no_sibling_of_an_execd_program(launcher: Launcher, weak_launcher: Launcher) -> None:
    """It would be the launcher's child, and the end of its pid namespace waits until it is reaped."""
    said, receipt, _ = siblings(launcher)
    assert "refused" in said
    assert receipt["verified_empty"]
    # Where it can be made, the launcher collects it all the same, and the kill ends.
    said, receipt, seconds = siblings(weak_launcher, weaken=("seccomp",))
    assert "reached" in said
    assert receipt["verified_empty"]
    assert seconds < 5


def processes(agent: Agent) -> list[str]:
    """Processes with an id of the agent's, zombies too."""
    ids, found = agent.plan.ids, []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and ids.start <= entry.stat().st_uid < ids.start + ids.size:
                found.append(entry.name)
    return found
