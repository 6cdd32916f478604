"""What an agent writes and reads: pipes, terminals, limits, and processes that are started later."""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING

import pytest

from sandbox.plan import Limits, Tty
from tests.support.launcher import LauncherError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.launcher import Agent, Launcher


def write(launcher: Launcher, stream_id: str, data: bytes, *, eof: bool = False) -> None:
    launcher.request("stdin", stream_id=stream_id, data=base64.b64encode(data).decode(), eof=eof)


def until(condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.005)


def test_stdin_reaches_the_agent_and_ends(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/cat"], stdin=True)
    write(launcher, agent.agent_id, b"one\n")
    write(launcher, agent.agent_id, b"two\n", eof=True)
    assert launcher.wait(agent).stdout == "one\ntwo\n"


def test_without_stdin_there_is_an_end_of_file(launcher: Launcher) -> None:
    agent = launcher.run(["/bin/cat"])
    assert (agent.stdout, agent.status) == ("", {"code": 0, "signal": None})
    with pytest.raises(LauncherError):
        write(launcher, agent.agent_id, b"x")


def test_stdin_that_nobody_reads_is_bounded(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sleep", "60"], stdin=True)
    chunk = base64.b64encode(b"x" * (512 << 10)).decode()
    for number in range(4):
        # Answers to what waits come when it is written, or never: only the refusal is awaited here.
        send_only(launcher, agent.agent_id, chunk, number)
    with pytest.raises(LauncherError, match="buffer is full"):
        launcher.request("stdin", stream_id=agent.agent_id, data=chunk, eof=False)
    launcher.kill(agent)


def send_only(launcher: Launcher, stream_id: str, chunk: str, number: int) -> None:
    from sandbox import sync  # noqa: PLC0415 - the raw channel, for this one test

    sync.send(launcher.sock, {"op": "stdin", "rq": -number, "stream_id": stream_id, "data": chunk, "eof": False})


def test_output_is_bounded_and_the_last_of_it_is_kept(launcher: Launcher) -> None:
    limits = Limits(memory_bytes=256 << 20, output_bytes=64 << 10)
    agent = launcher.sh("seq 1 200000; echo done", limits=limits)
    sizes = [path.stat().st_size for path in agent.directory.glob("std*.log*")]
    assert sum(sizes) <= 64 << 10
    assert agent.stdout.endswith("200000\ndone\n")
    assert (agent.directory / "stdout.log.1").exists()


def test_terminal_has_size_owner_and_hang_up(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sh"], tty=Tty(24, 80), stdin=True)
    write(
        launcher, agent.agent_id, b"tty; stty size; echo 'caf\xc3\xa9' > /dev/tty; : > /dev/stdout && echo open''ed\n"
    )
    until(lambda: "opened\r\n" in agent.stdout)
    assert "/dev/pts/0" in agent.stdout
    assert "24 80" in agent.stdout
    launcher.request("resize", stream_id=agent.agent_id, rows=50, cols=132)
    write(launcher, agent.agent_id, b"stty size; exit 3\n")
    launcher.wait(agent)
    assert "50 132" in agent.stdout
    assert agent.status == {"code": 3, "signal": None}
    assert agent.stderr == ""


def test_end_of_input_on_a_terminal(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/cat"], tty=Tty(24, 80), stdin=True)
    write(launcher, agent.agent_id, b"line\n", eof=True)
    assert launcher.wait(agent).status == {"code": 0, "signal": None}


def test_standard_streams_can_be_opened_again(launcher: Launcher) -> None:
    agent = launcher.sh("echo a > /dev/stdout; echo b > /dev/stderr; echo c > /proc/self/fd/1")
    assert (agent.stdout, agent.stderr) == ("a\nc\n", "b\n")


# --- exec ---


@pytest.fixture
def sleeper(launcher: Launcher) -> Agent:
    return launcher.launch(["/bin/sleep", "1000"])


def test_exec_is_in_the_same_sandbox_with_the_same_confinement(launcher: Launcher, sleeper: Agent) -> None:
    probe = (
        "id -u; grep -hE 'Cap|NoNew|Seccomp_f|^Uid' /proc/self/status; readlink /proc/self/ns/*; ulimit -n -c; umask"
    )
    first = launcher.sh(probe)
    later = launcher.exec(sleeper, ["/bin/sh", "-c", probe])
    assert later["status"] == {"code": 0, "signal": None}
    kinds = ("cgroup:", "ipc:", "mnt:", "net:", "pid:", "time:", "user:", "uts:")

    def without(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith((*kinds, "Uid"))]

    assert without(later["stdout"]) == without(first.stdout)
    inside = set(launcher.exec(sleeper, ["/bin/sh", "-c", "readlink /proc/2/ns/*"])["stdout"].splitlines())
    mine = {line for line in later["stdout"].splitlines() if line.startswith(kinds)}
    assert mine == inside
    launcher.kill(sleeper)


def test_exec_sees_the_agent_and_not_pid_1(launcher: Launcher, sleeper: Agent) -> None:
    event = launcher.exec(sleeper, ["ps", "-e", "-o", "pid=,comm="])
    assert "2 sleep" in event["stdout"]
    assert "stockade" not in event["stdout"]
    launcher.kill(sleeper)


def test_exec_streams_status_and_input(launcher: Launcher, sleeper: Agent) -> None:
    launcher.start_exec(sleeper, ["/bin/sh", "-c", "cat; echo err >&2; exit 9"], stream_id="st_a", stdin=True)
    write(launcher, "st_a", b"data", eof=True)
    event = launcher.event(lambda e: e.get("stream_id") == "st_a")
    assert event["status"] == {"code": 9, "signal": None}
    assert sleeper.read("exec-st_a.out") == "data"
    assert sleeper.read("exec-st_a.err") == "err\n"
    launcher.kill(sleeper)


def test_exec_with_terminal(launcher: Launcher, sleeper: Agent) -> None:
    event = launcher.exec(sleeper, ["/bin/sh", "-c", "tty; stty size"], tty={"rows": 30, "cols": 90})
    assert event["stdout"] == "/dev/pts/0\r\n30 90\r\n"
    launcher.kill(sleeper)


@pytest.mark.parametrize(("argv", "errno"), [(["/nonexistent"], "ENOENT"), (["/etc/passwd"], "EACCES")])
def test_exec_that_cannot_start_says_why(launcher: Launcher, sleeper: Agent, argv: list[str], errno: str) -> None:
    with pytest.raises(LauncherError) as caught:
        launcher.exec(sleeper, argv)
    assert caught.value.error["step"] == "exec"
    assert caught.value.error["errno"] == errno
    launcher.kill(sleeper)


def test_exec_ends_with_the_agent(launcher: Launcher, sleeper: Agent) -> None:
    launcher.start_exec(sleeper, ["/bin/sleep", "1000"], stream_id="st_b")
    receipt = launcher.kill(sleeper)
    assert receipt["verified_empty"]
    assert receipt["processes_killed"] == 3
    event = launcher.event(lambda e: e.get("stream_id") == "st_b")
    assert event["status"] == {"code": None, "signal": 9}
    with pytest.raises(LauncherError):
        launcher.request("signal", stream_id="st_b", signal=15)


def test_signals_reach_the_first_process_and_streams(launcher: Launcher, sleeper: Agent) -> None:
    launcher.start_exec(sleeper, ["/bin/sleep", "1000"], stream_id="st_c")
    launcher.request("signal", stream_id="st_c", signal=15)
    event = launcher.event(lambda e: e.get("stream_id") == "st_c")
    assert event["status"] == {"code": None, "signal": 15}
    launcher.request("signal", agent_id=sleeper.agent_id, signal=2)
    assert launcher.wait(sleeper).status == {"code": None, "signal": 2}


def test_exec_into_what_is_not_running(launcher: Launcher, sleeper: Agent) -> None:
    launcher.request("freeze", agent_id=sleeper.agent_id)
    with pytest.raises(LauncherError, match="not running"):
        launcher.exec(sleeper, ["/bin/true"])
    launcher.request("thaw", agent_id=sleeper.agent_id)
    assert launcher.exec(sleeper, ["/bin/true"])["status"] == {"code": 0, "signal": None}
    launcher.kill(sleeper)
    with pytest.raises(LauncherError, match="there is no agent"):
        launcher.exec(sleeper, ["/bin/true"])
