"""The end of an agent, whatever it does against it; and launchers that come and go meanwhile."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandbox import sync
from sandbox.plan import Limits, Tty
from sandbox.serve import SUPERVISOR_LOSS_SECONDS
from tests.support.census import text
from tests.support.launcher import Launcher, LauncherError

if TYPE_CHECKING:
    from tests.support.launcher import Agent

STUBBORN = """
import os, signal, time, sys
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
for _ in range(20):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1000)
print('ready', flush=True)
time.sleep(1000)
"""
STORM = """
import os
print('ready', flush=True)
while True:
    try: os.fork()
    except OSError: pass
"""
# Five of each that waits for somebody else: parents in vfork, tracees that are stopped, children that nobody reaps.
WAITING = """
import ctypes, os, platform, signal, time
libc = ctypes.CDLL(None)
CLONE = 220 if platform.machine() == 'aarch64' else 56
CLONE_VM, CLONE_VFORK, PTRACE_TRACEME = 0x100, 0x4000, 0
for _ in range(5):
    if os.fork() == 0:
        libc.syscall(CLONE, CLONE_VM | CLONE_VFORK | signal.SIGCHLD, 0, 0, 0, 0)
        time.sleep(1000)
    if os.fork() == 0:
        assert libc.ptrace(PTRACE_TRACEME, 0, 0, 0) == 0
        os.kill(os.getpid(), signal.SIGSTOP)
    if os.fork() == 0:
        os._exit(0)
print('ready', flush=True)
time.sleep(1000)
"""


def until_ready(agent: Agent) -> None:
    deadline = time.monotonic() + 10
    while "ready" not in agent.stdout:
        assert time.monotonic() < deadline, agent.stderr
        time.sleep(0.005)


def processes(agent: Agent) -> int:
    ids = agent.plan.ids
    return sum(
        1
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and ids.start <= _owner(entry) < ids.start + ids.size
    )


def _owner(entry: Path) -> int:
    try:
        return entry.stat().st_uid
    except OSError:
        return -1


@pytest.mark.parametrize("script", [STUBBORN, STORM], ids=["signals ignored, sessions, stopped", "fork storm"])
def test_nothing_survives_a_kill(launcher: Launcher, script: str) -> None:
    agent = launcher.launch(["python3", "-c", script])
    until_ready(agent)
    deadline = time.monotonic() + 10
    while processes(agent) <= 2:
        assert time.monotonic() < deadline, agent.stderr
        time.sleep(0.005)
    receipt = launcher.kill(agent)
    assert receipt["verified_empty"], receipt
    assert receipt["left"] == []
    assert processes(agent) == 0
    assert launcher.wait(agent).status == {"code": None, "signal": int(signal.SIGKILL)}


def test_who_waits_for_somebody_else_dies_too() -> None:
    with Launcher.start(weakened=True) as launcher:  # the filter leaves nobody to be traced
        who_waits_dies(launcher)


def who_waits_dies(launcher: Launcher) -> None:
    agent = launcher.launch(["python3", "-c", WAITING], weaken=("seccomp",))
    until_ready(agent)
    deadline = time.monotonic() + 10
    while (seen := states(agent)).count("D") < 5 or seen.count("t") < 5 or seen.count("Z") < 5:
        assert time.monotonic() < deadline, (seen, agent.stderr)
        time.sleep(0.005)
    receipt = launcher.kill(agent)
    assert (receipt["verified_empty"], receipt["left"]) == (True, [])
    assert states(agent) == []


def states(agent: Agent) -> list[str]:
    """The letters of proc_pid_stat(5) of all that have an id of the agent's."""
    ids, found = agent.plan.ids, []
    for entry in Path("/proc").iterdir():
        facts = dict(line.partition(":")[::2] for line in text(entry / "status").splitlines())
        if ids.start <= int(facts.get("Uid", "-1").split()[0]) < ids.start + ids.size:
            found.append(facts["State"].strip()[0])
    return found


def test_killing_twice_and_what_never_was(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sleep", "1000"])
    assert launcher.kill(agent)["processes_killed"] == 2
    again = launcher.kill(agent)
    assert (again["already"], again["verified_empty"], again["processes_killed"]) == (True, True, 0)
    for agent_id in ("ag_never", "../etc"):
        with pytest.raises(LauncherError, match="there is no agent"):
            launcher.request("kill", agent_id=agent_id)


def test_who_waits_for_a_launch_hears_of_its_end(launcher: Launcher) -> None:
    agent = launcher.build(launcher.plan(["/bin/sleep", "1000"]))
    receipt = launcher.kill(agent)
    assert receipt["verified_empty"]
    with pytest.raises(LauncherError, match="there is no agent"):
        launcher.request("go", agent_id=agent.agent_id)
    for _ in range(10):  # until both come in one breath, and the kill while the sandbox is being built
        plan = launcher.plan(["/bin/sleep", "1000"])
        sync.send(launcher.sock, {"op": "launch", "rq": -1, "plan": plan.to_json(), "meta": {}})
        launcher.request("kill", agent_id=plan.agent_id)
        answer = launcher.event(lambda e: e.get("rq") == -1)
        if not answer["ok"]:
            break
    assert (answer["ok"], answer["error"]["step"]) == (False, "launch")
    assert not (launcher.run_dir / "agents" / plan.agent_id).exists()


def test_a_frozen_agent_stops_and_can_be_killed(launcher: Launcher) -> None:
    agent = launcher.launch(["python3", "-c", "import time\nwhile True: print(1, flush=True); time.sleep(0.005)"])
    while not agent.stdout:
        time.sleep(0.005)
    launcher.request("freeze", agent_id=agent.agent_id)
    size = -1
    while size != len(agent.stdout):  # until what it had written has come
        size = len(agent.stdout)
        time.sleep(0.1)
    time.sleep(0.1)
    assert len(agent.stdout) == size
    launcher.request("thaw", agent_id=agent.agent_id)
    deadline = time.monotonic() + 5
    while len(agent.stdout) == size:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    launcher.request("freeze", agent_id=agent.agent_id)
    assert launcher.kill(agent)["verified_empty"]


def test_every_copy_of_the_door_is_shut(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sleep", "1000"])
    with socket.socket(fileno=os.dup(agent.listener)) as door:
        assert door.getsockname() == ("198.18.0.1", 3128)
        assert door.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        launcher.kill(agent)
        assert door.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 0


def test_the_door_tells_who_came(launcher: Launcher) -> None:
    agents = [launcher.launch(["python3", "-c", CALL, name]) for name in ("a", "b")]
    for agent, name in zip(agents, (b"a", b"b"), strict=True):
        with socket.socket(fileno=os.dup(agent.listener)) as door:
            door.settimeout(10)
            connection, address = door.accept()
            with connection:
                connection.setblocking(True)
                assert connection.recv(1) == name
                assert address[0] == "198.18.0.2"
        launcher.wait(agent)


CALL = """
import socket, sys
s = socket.create_connection(('gateway.internal', 3128))
s.send(sys.argv[1].encode())
s.recv(1)
"""


def test_memory_limit_is_told_as_out_of_memory(launcher: Launcher) -> None:
    agent = launcher.run(
        ["python3", "-c", "x = bytearray(200 << 20); print('alive')"], limits=Limits(memory_bytes=64 << 20)
    )
    assert agent.oom
    assert "alive" not in agent.stdout
    fits = launcher.run(
        ["python3", "-c", "x = bytearray(20 << 20); print('alive')"], limits=Limits(memory_bytes=64 << 20)
    )
    assert (fits.oom, fits.stdout) == (False, "alive\n")


def test_pids_limit_holds(launcher: Launcher) -> None:
    agent = launcher.launch(["python3", "-c", STORM], limits=Limits(memory_bytes=256 << 20, pids=20))
    until_ready(agent)
    time.sleep(0.2)
    assert launcher.request("stats", agent_ids=[agent.agent_id])["stats"][agent.agent_id]["pids"] <= 20
    assert launcher.kill(agent)["verified_empty"]


# --- the launcher itself ---


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "ended in order"])
def test_agents_survive_the_launcher(launcher: Launcher, *, kill: bool) -> None:
    wait = "until [ -e /tmp/end ]; do sleep 0.05; done"
    script = f"echo start; sleep 0.6; echo middle; {wait}; echo end; exit 5"
    agent = launcher.launch(["/bin/sh", "-c", script])
    terminal = launcher.launch(["/bin/sh", "-c", f"sleep 0.6; tty; {wait}; exit 6"], tty=Tty(24, 80), stdin=True)
    launcher.restart(kill=kill)
    assert {a["agent_id"] for a in launcher.request("hello")["agents"]} >= {agent.agent_id, terminal.agent_id}
    adopted = launcher.event(lambda e: e.get("ev") == "adopt" and e["agent_id"] == agent.agent_id)
    assert len(adopted["fds"]) == 1
    launcher.request("adopt", [adopted["fds"][0], agent.listener], agent_id=agent.agent_id)
    assert launcher.exec(agent, ["/bin/sh", "-c", "grep -h Seccomp: /proc/self/status"])["stdout"] == "Seccomp:\t2\n"
    for each in (agent, terminal):
        launcher.exec(each, ["/bin/touch", "/tmp/end"])
    assert launcher.wait(agent).status == {"code": 5, "signal": None}
    assert launcher.wait(terminal).status == {"code": 6, "signal": None}
    assert agent.stdout == "start\nmiddle\nend\n"
    assert "/dev/pts/0" in terminal.stdout


@pytest.mark.parametrize(
    ("key", "greeted", "ends"), [("kill", False, True), ("kill", True, False), ("contain", False, False)]
)
def test_who_must_not_run_without_a_daemon_does_not_with_the_next_launcher_either(
    launcher: Launcher, key: str, *, greeted: bool, ends: bool
) -> None:
    """The launcher that began to count has died."""
    agent = launcher.build(launcher.plan(["/bin/sleep", "1000"]), on_supervisor_loss=key)
    launcher.request("go", agent_id=agent.agent_id)
    launcher.restart()
    if greeted:
        launcher.request("hello")
    assert bool(select.select([agent.pidfd], [], [], SUPERVISOR_LOSS_SECONDS + (15 if ends else 2))[0]) is ends
    assert launcher.kill(agent)["verified_empty"]


def test_agents_that_ended_without_a_launcher_are_told_of(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sh", "-c", "sleep 0.3; exit 4"])
    launcher.process.kill()
    launcher.process.wait()
    # By pidfd: while a process executes a program its directory in /proc is root's, and it would not be counted.
    assert select.select([agent.pidfd], [], [], 10)[0]
    launcher.restart()
    # Until whoever inherited it has reaped it, a dead pid 1 still looks like a process.
    deadline = time.monotonic() + 10
    while [a for a in launcher.request("hello")["agents"] if a["state"] == "RUNNING"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert json.loads((agent.directory / "exit").read_text())["code"] == 4
    assert agent.cgroup
    while launcher.groups(agent):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert launcher.kill(agent)["already"]


def test_a_launcher_that_dies_while_building_leaves_nothing(launcher: Launcher) -> None:
    agent = launcher.build(launcher.plan(["/bin/sleep", "1000"]))
    launcher.process.kill()
    launcher.process.wait()
    deadline = time.monotonic() + 10
    while processes(agent):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    launcher.restart()
    launcher.request("hello")
    assert agent.cgroup
    assert not launcher.groups(agent)


def test_garbage_on_the_channel_hurts_nobody(launcher: Launcher) -> None:
    for junk in (b"not json", b"[]", b'{"op":"launch","rq":1}', b"\xff\xfe", b'{"op":' + b"[" * 100_000):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(launcher.run_dir / "launcher.sock"))
        sock.send(junk)
        sock.settimeout(5)
        sock.recv(1 << 16)  # an error or the end of the channel, but no silence
        sock.close()
    requests: tuple[tuple[str, dict[str, Any]], ...] = (
        ("nothing", {}),
        ("go", {"agent_id": "x"}),
        ("stdin", {"stream_id": "x"}),
        ("filter", {}),
    )
    for op, fields in requests:
        with pytest.raises(LauncherError):
            launcher.request(op, **fields)
    assert launcher.sh("true").status == {"code": 0, "signal": None}


def test_only_root_may_speak_to_the_launcher(launcher: Launcher) -> None:
    launcher.run_dir.chmod(0o755)
    (launcher.run_dir / "launcher.sock").chmod(0o666)
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(65534, 65534, 65534)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.connect(str(launcher.run_dir / "launcher.sock"))
            sock.settimeout(5)
            sock.send(b'{"op":"hello","rq":1}')
            os._exit(1 if sock.recv(100) else 0)
        except ConnectionError:
            os._exit(0)
        finally:
            os._exit(2)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
