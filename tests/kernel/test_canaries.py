"""Canaries: with the default plan all of them fail to get out; with any control left out one of them says so."""

from __future__ import annotations

import os
import re
import socket
from typing import TYPE_CHECKING

import pytest

from sandbox.canaries import ATTEMPTS
from sandbox.plan import WEAKENINGS, Bind, Limits, Tty
from tests.support.launcher import Launcher, LauncherError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# weakening: what is left out with it (a filter needs no_new_privs), and the attempts that must tell.
TWINS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "capabilities": (("capabilities",), {"capabilities", "securebits", "become-another"}),
    "devices": (("devices",), {"devices"}),
    "hidden_proc": (("hidden_proc",), {"kernel-settings", "masked-files", "processes"}),
    "landlock": (("landlock",), {"landlock"}),
    "mount_flags": (("mount_flags",), {"mount-flags"}),
    "network": (("network",), {"namespaces", "routes", "gate-ports"}),
    "new_privileges": (("new_privileges", "seccomp", "landlock", "capabilities"), {"no-new-privs"}),
    "private_ipc": (("private_ipc",), {"namespaces"}),
    "private_pid": (("private_pid",), {"namespaces"}),
    "read_only_root": (("read_only_root",), {"read-only-root"}),
    "rlimits": (("rlimits",), {"resource-limits"}),
    "seccomp": (("seccomp",), {"seccomp-mode", "socket-inet6", "terminal-input", "set-id-bit", "unshare-user"}),
    "user_namespace": (("user_namespace",), {"id-map", "namespaces"}),
}


@pytest.fixture(scope="module")
def bare_launcher() -> Iterator[Launcher]:
    """One that begins nothing ahead of need: all it forks is of the launch at hand."""
    if os.geteuid() != 0:
        pytest.skip("needs root: starts sandboxes")
    with Launcher.start(arguments=["--starters", "0"]) as launcher:
        yield launcher


def findings(error: LauncherError) -> set[str]:
    """The attempts that came through; the message names the first ones and counts the others."""
    text = error.error["message"].partition("does not hold: ")[2]
    return {part.partition(":")[0] for part in re.split(r"; (?=[a-z0-9-]+: )", text)}


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("terminal", [False, True])
def test_the_default_plan_holds(launcher: Launcher, tmp_path: Path, *, uid: int, terminal: bool) -> None:
    os.chown(tmp_path, 1000, 1000)
    fd = os.open(tmp_path, os.O_PATH)
    bind = Bind(0, "/workspace", writable=True, owner_uid=1000, owner_gid=1000)
    tty = Tty(24, 80) if terminal else None
    agent = launcher.run(["/bin/true"], [fd], uid=uid, gid=uid, canary=True, tty=tty, binds=(bind,))
    os.close(fd)
    assert agent.status == {"code": 0, "signal": None}
    canary = agent.posture["canary"]
    assert canary["attempts"] == len(ATTEMPTS) >= 50
    assert re.fullmatch("sha256:[0-9a-f]{64}", canary["digest"])
    assert canary["duration_us"] > 0
    assert list(tmp_path.iterdir()) == []


def test_who_asks_for_none_pays_for_none(launcher: Launcher) -> None:
    agent = launcher.run(["/bin/true"])
    assert agent.posture["canary"] == {}
    assert "child.stub canaries" not in agent.timings_us


def test_every_control_that_can_be_left_out_has_its_twin() -> None:
    assert TWINS.keys() == WEAKENINGS


@pytest.mark.parametrize("weakening", sorted(TWINS))
def test_a_control_left_out_is_found_and_nothing_runs(weak_launcher: Launcher, weakening: str) -> None:
    weaken, told = TWINS[weakening]
    plan = weak_launcher.plan(["/bin/true"], canary=True, weaken=weaken)
    with pytest.raises(LauncherError, match="sandbox does not hold") as caught:
        weak_launcher.start_plan(plan)
    assert caught.value.error["step"] == "run canaries"
    found = findings(caught.value)
    hidden = re.search(r"and (\d+) more$", caught.value.error["message"])
    assert told <= found or (hidden and told & found), caught.value.error["message"]
    assert not (weak_launcher.run_dir / "agents" / plan.agent_id).exists()
    assert plan.agent_id not in {agent["agent_id"] for agent in weak_launcher.request("hello")["agents"]}
    assert weak_launcher.run(["/bin/true"], ids=plan.ids, weaken=weaken).status == {"code": 0, "signal": None}


TRACES = """
import os, resource
for place in ('/tmp', '/workspace', '/home/agent', '/dev/shm', '/dev/mqueue'):
    print(place, sorted(os.listdir(place)) if os.path.isdir(place) else None)
print('others', [name for name in os.listdir('/proc') if name.isdigit() and int(name) != os.getpid()])
print('descriptors', [os.readlink(f'/proc/self/fd/{fd}').partition(':')[0] for fd in range(3)])
print(os.path.exists('/proc/self/fd/4'))
wanted = ('Seccomp', 'NoNewPrivs', 'Uid', 'Gid', 'Groups', 'Cap', 'Sig', 'Umask', 'NSpid')
print(*(line for line in open('/proc/self/status') if line.startswith(wanted)), sep='')
print([resource.getrlimit(number) for number in range(16)], os.getsid(0), os.getcwd(), dict(os.environ))
print(open('/proc/self/mountinfo').read().count('\\n'), os.times().children_user)
"""


def test_the_agent_finds_no_trace(bare_launcher: Launcher) -> None:
    """All that a program can tell of its surroundings is the same with canaries and without."""
    command = ["python3", "-I", "-c", TRACES]
    with_them, without = (bare_launcher.run(command, canary=canary).stdout for canary in (True, False))
    assert with_them == without
    assert "others []" in with_them
    assert "Seccomp_filters:\t2" in with_them


def test_no_room_for_them_is_no_launch(launcher: Launcher) -> None:
    with pytest.raises(LauncherError, match="cannot start canaries") as caught:
        launcher.build(launcher.plan(["/bin/true"], canary=True, limits=Limits(256 << 20, pids=2)))
    assert "pids limit" in caught.value.error["remedy"]
    assert launcher.run(["/bin/true"], limits=Limits(256 << 20, pids=2)).status == {"code": 0, "signal": None}


def test_no_attempt_knocks_at_the_proxys_door(launcher: Launcher) -> None:
    """Every other port of the gate is tried; of that one no connection waits, until the agent makes one."""
    agent = launcher.launch(["/bin/sleep", "1000"], canary=True)
    with socket.socket(fileno=os.dup(agent.listener)) as door:
        door.settimeout(0)
        with pytest.raises(BlockingIOError):
            door.accept()
        launcher.exec(agent, ["/bin/bash", "-c", "exec 3<>/dev/tcp/198.18.0.1/3128"])
        door.settimeout(5)
        door.accept()[0].close()
    launcher.kill(agent)
