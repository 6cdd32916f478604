"""A launch from the plan to the end of the agent, as seen from outside and from inside."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandbox.cgroups import detect
from sandbox.plan import AGENT_ID_FIRST, Bind, EtcFile, IdRange, Limits, Rootfs, Scratch
from tests.support.launcher import Agent, Launcher, LauncherError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BAD_ID_RANGE_START = 65536
STARTERS = 2  # what a launcher keeps ready


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A directory of host user 1000 with a file in it, and its descriptor."""
    path = tmp_path / "work"
    path.mkdir()
    (path / "note").write_text("from the host")
    for entry in (path, path / "note"):
        os.chown(entry, 1000, 1000)
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    yield path, fd
    os.close(fd)


def leftovers(launcher: Launcher, agent: Agent) -> list[str]:
    """What of an agent can still be found on the host."""
    ids = agent.plan.ids
    found = [str(path) for path in groups(launcher) if path.name == agent.cgroup]
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            if entry.name.isdigit() and ids.start <= entry.stat().st_uid < ids.start + ids.size:
                found.append(str(entry))
    return found


def groups(launcher: Launcher) -> list[Path]:
    """Control groups of this launcher, in every hierarchy."""
    tops = detect().tops(launcher.instance)
    return [path for top in tops if top.is_dir() for path in top.iterdir() if path.is_dir()]


def open_descriptors(launcher: Launcher) -> int:
    """Count when the launcher's stocks are full again, which is when the number stays as it is."""
    directory = Path(f"/proc/{launcher.process.pid}/fd")
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 0.5:
        count = len(list(directory.iterdir()))
        if count != last:
            last, since = count, time.monotonic()
        time.sleep(0.02)
    return last


@pytest.mark.parametrize(("script", "status"), [("exit 7", (7, None)), ("kill -9 $$", (None, 9)), ("true", (0, None))])
def test_exit_status_is_the_agents_own(launcher: Launcher, script: str, status: tuple[int | None, int | None]) -> None:
    agent = launcher.sh(script)
    assert agent.status == {"code": status[0], "signal": status[1]}
    assert not leftovers(launcher, agent)


def test_identity_and_environment_come_from_the_plan_alone(launcher: Launcher) -> None:
    agent = launcher.sh("id -u; id -g; id -G; hostname; pwd; env | sort | cut -d= -f1 | tr '\\n' ' '")
    assert agent.stdout.split("\n")[:5] == ["1000", "1000", "1000", "sktest", "/workspace"]
    assert set(agent.stdout.split("\n")[5].split()) <= {"PATH", "HOME", "LANG", "PWD", "OLDPWD", "_", "SHLVL"}


def test_root_inside_is_an_id_of_the_range_outside(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sleep", "60"], uid=0, gid=0)
    owners = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it ended meanwhile
            if entry.name.isdigit():
                owners.add(entry.stat().st_uid)
    assert agent.plan.ids.start in owners
    launcher.kill(agent)
    assert not leftovers(launcher, agent)


def test_one_route_and_the_proxy_only(launcher: Launcher) -> None:
    agent = launcher.sh(
        "ip -o route show table all | grep -v 'table local'; ip -o -6 addr | wc -l; getent hosts gateway.internal"
    )
    lines = agent.stdout.splitlines()
    assert lines[0].startswith("198.18.0.1 dev eth0")
    assert lines[1:] == ["0", "198.18.0.1      gateway.internal"]


def test_workspace_is_writable_as_the_owner_on_disk(launcher: Launcher, directory: tuple[Path, int]) -> None:
    path, fd = directory
    bind = Bind(0, "/workspace", writable=True, owner_uid=1000, owner_gid=1000)
    agent = launcher.sh("stat -c %u:%g note; cat note; echo inside > made; ln -s /etc/shadow link", [fd], binds=(bind,))
    assert agent.status == {"code": 0, "signal": None}, agent.stderr
    assert agent.stdout == "1000:1000\nfrom the host"
    assert (path / "made").read_text() == "inside\n"
    assert (path / "made").stat().st_uid == 1000
    assert "workspace-quota" in " ".join(agent.posture["degraded"])


def test_workspace_of_root_read_only_shows_as_the_agents(launcher: Launcher, tmp_path: Path) -> None:
    path = tmp_path / "logs"
    path.mkdir(mode=0o750)
    (path / "log").write_text("line")
    (path / "log").chmod(0o640)
    fd = os.open(path, os.O_PATH)
    bind = Bind(0, "/workspace", writable=False, owner_uid=0, owner_gid=0)
    agent = launcher.sh("cat log; echo more >> log || echo refused", [fd], binds=(bind,))
    os.close(fd)
    assert agent.stdout == "linerefused\n"
    assert (path / "log").read_text() == "line"


def test_a_file_can_be_bound_alone(launcher: Launcher, directory: tuple[Path, int]) -> None:
    path, _ = directory
    fd = os.open(path / "note", os.O_PATH)
    agent = launcher.sh(
        "cat /data/in/note; ls /data/in",
        [fd],
        binds=(Bind(0, "/data/in/note", writable=False, owner_uid=1000, owner_gid=1000),),
    )
    os.close(fd)
    assert agent.stdout == "from the hostnote\n"


def test_hidden_paths_are_empty(launcher: Launcher) -> None:
    assert launcher.sh("ls /usr/share/doc | head -1; cat /etc/services").stdout
    agent = launcher.sh(
        "ls /usr/share/doc; cat /etc/services 2>&1", hide=("/usr/share/doc", "/etc/services", "/not/there")
    )
    assert "Permission denied" in agent.stdout
    assert len(agent.stdout.splitlines()) == 1


def test_etc_files_of_the_plan_win(launcher: Launcher) -> None:
    agent = launcher.sh(
        "cat /etc/motd /etc/a/b; test -e /etc/resolv.conf || echo none; tail -c 4 $SSL; ls -A /opt",
        env=(("SSL", "/etc/stockade/ca-bundle.pem"),),
        etc=(EtcFile("motd", "hello\n"), EtcFile("a/b", "deep\n")),
        ca_certificate="PEM\n",
    )
    assert agent.stdout == "hello\ndeep\nnone\nPEM\n"
    assert "/opt" in agent.stderr


def copy_program(root: Path, program: str) -> None:
    """Copy a program of the host and the libraries it loads into a root directory."""
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for path in [program, *(word for word in listing.split() if word.startswith("/"))]:
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def test_directory_as_root(launcher: Launcher, tmp_path: Path) -> None:
    for program in ("/bin/sh", "/bin/cat", "/bin/ls", "/bin/touch"):
        copy_program(tmp_path, program)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "marker").write_text("mine")
    (tmp_path / "etc" / "shadow").write_text("secret")
    tmp_path.chmod(0o755)
    fd = os.open(tmp_path, os.O_PATH)
    script = "cat /etc/marker; ls /etc/shadow; touch /bin/x; cat /etc/hostname"
    agent = launcher.sh(script, [fd], rootfs=Rootfs("directory", 0))
    os.close(fd)
    assert agent.stdout == "minesktest\n", agent.stderr
    assert "shadow" in agent.stderr
    assert not (tmp_path / "bin" / "x").exists()
    assert not (tmp_path / "usr" / "bin" / "python3").exists()


SOCKETS = """
import asyncio, socket
async def main():
    s = await asyncio.start_server(lambda r, w: w.close(), '127.0.0.1', 80)
    await asyncio.open_connection('127.0.0.1', 80)
    a, b = socket.socketpair(); a.send(b'x'); print(b.recv(1))
asyncio.run(main())
"""


def test_ports_below_1024_and_own_sockets_work(launcher: Launcher) -> None:
    agent = launcher.run(["python3", "-c", SOCKETS])
    assert agent.stdout == "b'x'\n", agent.stderr


def test_nothing_runs_before_go_and_abort_undoes(launcher: Launcher, directory: tuple[Path, int]) -> None:
    path, fd = directory
    bind = Bind(0, "/workspace", writable=True, owner_uid=1000, owner_gid=1000)
    agent = launcher.build(launcher.plan(["/bin/touch", "ran"], binds=(bind,)), [fd])
    time.sleep(0.1)
    assert not (path / "ran").exists()
    launcher.request("abort", agent_id=agent.agent_id)
    assert not leftovers(launcher, agent)
    assert not agent.directory.exists()
    assert not (path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"argv": ("/nonexistent",)}, "exec"),
        ({"argv": ("/etc/passwd",)}, "exec"),
        ({"cwd": "/not/there"}, "enter working directory /not/there"),
        ({"filter_digest": "unknown"}, "check plan"),
        ({"ids": IdRange(BAD_ID_RANGE_START)}, "check request"),
        ({"instance": "other"}, "check plan"),
        ({"weaken": ("seccomp",)}, "check plan"),
        ({"scratch": Scratch(tmp_bytes=-5)}, "mount scratch"),
        ({"limits": Limits(memory_bytes=1)}, "check request"),
    ],
)
def test_a_failed_launch_names_the_step_and_leaves_nothing(
    launcher: Launcher, changes: dict[str, Any], step: str
) -> None:
    launcher.sh("true")
    before = open_descriptors(launcher)
    plan = replace(launcher.plan(["/bin/true"]), **changes)
    with pytest.raises(LauncherError) as caught:
        launcher.start_plan(plan)
    assert caught.value.error["step"] == step, caught.value.error
    assert not (launcher.run_dir / "agents" / plan.agent_id).exists()
    assert plan.agent_id not in {a["agent_id"] for a in launcher.request("hello")["agents"]}
    until(lambda: len({path.name for path in groups(launcher)}) <= STARTERS)
    assert open_descriptors(launcher) == before


def test_ids_and_agent_ids_are_not_given_twice(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sleep", "60"])
    with pytest.raises(LauncherError, match="in use"):
        launcher.build(launcher.plan(["/bin/true"], ids=agent.plan.ids))
    with pytest.raises(LauncherError, match="there already"):
        launcher.build(replace(launcher.plan(["/bin/true"]), agent_id=agent.agent_id))
    launcher.kill(agent)
    again = launcher.run(["/bin/true"], ids=agent.plan.ids)
    assert again.status == {"code": 0, "signal": None}


def test_writable_root_owned_bind_needs_a_word(launcher: Launcher, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    bind = Bind(0, "/workspace", writable=True, owner_uid=0, owner_gid=0)
    with pytest.raises(LauncherError, match="allow_root_owned"):
        launcher.build(launcher.plan(["/bin/true"], binds=(bind,)), [fd])
    agent = launcher.sh("touch made", [fd], binds=(replace(bind, allow_root_owned=True),))
    os.close(fd)
    assert (tmp_path / "made").stat().st_uid == 0
    assert agent.posture["root_owned"] == ["/workspace"]


def test_file_system_without_idmap_fails_or_is_read_only(launcher: Launcher) -> None:
    """The proc file system has none; a real one without is found under User-Mode Linux (hostfs)."""
    fd = os.open("/proc/sys/kernel", os.O_PATH)
    bind = Bind(0, "/data", writable=True, owner_uid=1000, owner_gid=1000)
    with pytest.raises(LauncherError, match="cannot map ids") as caught:
        launcher.build(launcher.plan(["/bin/true"], binds=(bind,)), [fd])
    assert "degraded_ok: [idmap]" in caught.value.error["remedy"]
    agent = launcher.sh(
        "cat /data/ostype; grep ' /data ' /proc/self/mounts | cut -d' ' -f4 | cut -c1-2",
        [fd],
        binds=(replace(bind, without_idmap="read-only"),),
        degraded_ok=("idmap",),
    )
    os.close(fd)
    assert agent.stdout.split() == ["Linux", "ro"]
    assert any(item.startswith("idmap: /data") for item in agent.posture["degraded"])


def test_a_hundred_launches_leave_nothing(launcher: Launcher) -> None:
    ids = IdRange(AGENT_ID_FIRST + 1999 * 65536)
    launcher.sh("true")
    before = open_descriptors(launcher)
    agents = [launcher.run(["/bin/true"], ids=ids) for _ in range(100)]
    assert all(agent.status == {"code": 0, "signal": None} for agent in agents)
    assert not [item for agent in agents[::10] for item in leftovers(launcher, agent)]
    until(lambda: len({path.name for path in groups(launcher)}) <= STARTERS)
    assert open_descriptors(launcher) == before
    children = Path(f"/proc/{launcher.process.pid}/task/{launcher.process.pid}/children").read_text().split()
    assert len(children) <= 20


def test_what_the_host_mounts_later_is_seen() -> None:
    """A sandbox begun before the mount is not used after it; all in a mount namespace of the launcher's own."""
    place = "/usr/local/games"
    with Launcher.start(wrapper=["unshare", "-m", "--propagation", "private"]) as launcher:
        assert launcher.sh(f"ls {place}").stdout == ""
        open_descriptors(launcher)
        enter = ["nsenter", "-m", "-t", str(launcher.process.pid)]
        subprocess.run([*enter, "mount", "-t", "tmpfs", "sktest", place], check=True)
        subprocess.run([*enter, "touch", f"{place}/later"], check=True)
        assert launcher.sh(f"ls {place}").stdout == "later\n"
        assert launcher.sh(f"ls {place}").stdout == "later\n"
    assert not (Path(place) / "later").exists()
