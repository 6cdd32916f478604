"""Disk-backed scratch: what an agent may put there, who is hurt where it ends, and what is left of it."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandbox import scratch, sync, syscalls
from sandbox.plan import Bind, Limits, SandboxPlan
from tests.support.census import children, text
from tests.support.launcher import Agent, Launcher, LauncherError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DISK = 64 << 20
FILL = "dd if=/dev/zero of=/tmp/full bs=1M 2>/dev/null; df --output=size,avail -B1 /tmp | tail -1; stat -c %s /tmp/full"


def on_disk(launcher: Launcher, argv: list[str], *, disk: int = DISK, memory: int = 256 << 20) -> SandboxPlan:
    plan = launcher.plan(argv, limits=Limits(memory_bytes=memory, disk_bytes=disk))
    return replace(plan, scratch=replace(plan.scratch, disk="required"))


def sh(launcher: Launcher, script: str, **changes: int) -> Agent:
    return launcher.wait(launcher.start_plan(on_disk(launcher, ["/bin/sh", "-c", script], **changes)))


def devices(instance: str) -> list[str]:
    """Loop devices of an instance, by their label."""
    found = []
    for path in Path("/sys/block").glob("loop*"):
        try:
            fd = os.open(f"/dev/{path.name}", os.O_RDONLY)
        except OSError:
            continue
        try:
            if syscalls.loop_status(fd)[2] == f"stockade-{instance}":
                found.append(path.name)
        except OSError:
            continue
        finally:
            os.close(fd)
    return found


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def test_the_limit_stops_bytes_where_df_says_it_is(launcher: Launcher) -> None:
    agent = sh(launcher, FILL)
    size, free, written = map(int, agent.stdout.split())
    assert DISK <= size <= DISK * 1.06 + (1 << 20)
    assert free < 1 << 20
    assert DISK * 0.98 <= written <= size


def test_a_larger_limit_lets_more_through(launcher: Launcher) -> None:
    assert int(sh(launcher, FILL, disk=2 * DISK).stdout.split()[-1]) >= 1.9 * DISK


def test_tmp_home_and_workspace_share_one_limit(launcher: Launcher) -> None:
    script = "for d in /tmp ~ /workspace; do dd if=/dev/zero of=$d/f bs=1M count=30 2>&1 | grep -c 'No space'; done"
    assert sh(launcher, script).stdout.split() == ["0", "0", "1"]


def test_inodes_stop_at_the_limit_and_come_back(launcher: Launcher) -> None:
    script = (
        "import errno\nfrom pathlib import Path\nn = 0\n"
        "try:\n  while True:\n    Path(f'/tmp/{n}').touch(); n += 1\n"
        "except OSError as error:\n  print(n, errno.errorcode[error.errno])\n"
        "Path('/tmp/0').unlink(); Path('/tmp/again').touch()"
    )
    agent = launcher.wait(launcher.start_plan(on_disk(launcher, ["python3", "-c", script])))
    assert agent.status == {"code": 0, "signal": None}, agent.stderr
    count, cause = agent.stdout.split()
    assert cause == "ENOSPC"
    assert scratch.geometry(DISK).inodes * 0.98 <= int(count) <= scratch.geometry(DISK).inodes * 1.02


def test_a_full_agent_hurts_nobody_else(launcher: Launcher) -> None:
    plan = on_disk(launcher, ["/bin/sh", "-c", f"{FILL}; sleep 60"])
    full = launcher.start_plan(plan)
    until(lambda: full.stdout.count("\n") == 2)
    assert sh(launcher, "dd if=/dev/zero of=/tmp/f bs=1M count=40 2>/dev/null && echo fine").stdout == "fine\n"
    launcher.kill(full)


def test_what_is_on_scratch_is_not_counted_as_memory(launcher: Launcher) -> None:
    script = "dd if=/dev/zero of=/tmp/f bs=1M count=200 2>/dev/null && stat -c %s /tmp/f"
    agent = sh(launcher, script, disk=512 << 20, memory=48 << 20)
    assert (agent.stdout, agent.oom) == (f"{200 << 20}\n", False), agent.stderr


def test_on_memory_the_same_is_stopped(launcher: Launcher) -> None:
    """The twin: tmpfs counts."""
    plan = launcher.plan(
        ["/bin/sh", "-c", "dd if=/dev/zero of=/tmp/f bs=1M count=200 && echo fine"],
        limits=Limits(memory_bytes=48 << 20),
    )
    sizes = replace(plan.scratch, disk="off", tmp_bytes=512 << 20)
    agent = launcher.wait(launcher.start_plan(replace(plan, scratch=sizes)))
    assert "fine" not in agent.stdout


def test_nothing_of_one_agent_is_there_for_the_next(launcher: Launcher) -> None:
    mark = "sktest-secret-of-the-first-agent"
    assert sh(launcher, f"echo {mark} | tee /tmp/s ~/s /workspace/s").stdout.strip() == mark
    for _ in range(3):
        assert sh(launcher, "ls -A /tmp ~ /workspace | grep -v :; cat /tmp/s ~/s").stdout.strip() == ""


def test_set_id_and_device_bits_do_nothing_on_scratch(launcher: Launcher) -> None:
    lines = sh(launcher, "grep -E ' (/tmp|/home/agent|/workspace) ' /proc/self/mounts").stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert {"nosuid", "nodev", "rw"} <= set(line.split()[3].split(",")), line


def test_neither_device_nor_top_of_the_image_is_reachable(launcher: Launcher) -> None:
    agent = sh(launcher, "ls /dev | grep -c loop; ls -d /tmp/../lost+found /home/agent/../upper /run/* 2>&1 | wc -l")
    assert agent.stdout.split() == ["0", "3"]


def test_the_end_of_an_agent_takes_image_and_device_along() -> None:
    with Launcher.start(arguments=["--images", "0"]) as launcher:
        agent = launcher.start_plan(on_disk(launcher, ["/bin/sh", "-c", f"{FILL}; sleep 60"]))
        until(lambda: agent.stdout.count("\n") == 2)
        assert len(devices(launcher.instance)) == 1
        assert launcher.scratch_dir is not None
        free = os.statvfs(launcher.scratch_dir)
        launcher.kill(agent)
        until(lambda: not devices(launcher.instance))
        assert [path for path in launcher.scratch_dir.rglob("*") if not path.is_dir()] == []
        after = os.statvfs(launcher.scratch_dir)
        assert after.f_bfree >= free.f_bfree - (8 << 20) // free.f_frsize


def test_much_that_was_not_written_yet_does_not_delay_a_kill(launcher: Launcher) -> None:
    plan = on_disk(
        launcher,
        ["/bin/sh", "-c", "dd if=/dev/zero of=/tmp/f bs=1M count=400 2>/dev/null; echo done; sleep 60"],
        disk=512 << 20,
        memory=1 << 30,
    )
    agent = launcher.start_plan(plan)
    until(lambda: agent.stdout == "done\n", 90)
    assert launcher.kill(agent)["dead_ms"] < 1000


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "ended"])
def test_a_launcher_that_goes_leaves_no_image_and_takes_up_those_that_live(*, kill: bool) -> None:
    with Launcher.start() as launcher:
        until(lambda: len(devices(launcher.instance)) == scratch.READY)
        agent = launcher.start_plan(on_disk(launcher, ["/bin/sh", "-c", "echo x > /tmp/x; sleep 60"]))
        launcher.restart(kill=kill)
        launcher.request("hello")
        until(lambda: len(devices(launcher.instance)) == scratch.READY + 1)
        assert launcher.exec(agent, ["cat", "/tmp/x"])["stdout"] == "x\n"
        launcher.kill(agent)
        until(lambda: len(devices(launcher.instance)) == scratch.READY)
        instance = launcher.instance
    until(lambda: not devices(instance))


def test_agents_that_outlive_the_launcher_end_without_it() -> None:
    with Launcher.start(arguments=["--images", "0"]) as launcher:
        launcher.start_plan(on_disk(launcher, ["/bin/sh", "-c", "sleep 5"]))
        launcher.process.kill()
        launcher.process.wait()
        assert devices(launcher.instance)
        until(lambda: not devices(launcher.instance))
        launcher.restart()


def test_a_host_that_is_nearly_full_launches_nothing_and_says_so(tmp_path: Path) -> None:
    stock = scratch.Stock(str(tmp_path), label="stockade-room", size=0, reserve_bytes=1 << 60)
    room = os.statvfs(tmp_path)
    assert room.f_bavail > room.f_blocks // 10, "of a host with room a tenth is enough"
    stock.take(1 << 20).drop()
    stock.reserve_part = 1
    with pytest.raises(scratch.CannotMakeScratch, match="stay free for the host"):
        stock.take(1 << 20)


def test_a_host_without_it_refuses_or_says_what_is_missing() -> None:
    with Launcher.start(arguments=["--scratch-dir", ""]) as launcher:
        with pytest.raises(LauncherError, match="cannot have it on disk: the launcher was given no directory"):
            launcher.start_plan(on_disk(launcher, ["/bin/true"]))
        agent = launcher.sh("stat -fc %T /tmp")
        assert agent.stdout.strip() == "tmpfs"
        assert [item for item in agent.posture["degraded"] if item.startswith("disk-quota: ")]


def test_with_it_nothing_is_degraded(launcher: Launcher) -> None:
    agent = launcher.sh("stat -fc %T /tmp")
    assert agent.stdout.strip() == "ext2/ext3"
    assert not [item for item in agent.posture["degraded"] if item.startswith("disk-quota")]
    assert re.match(r"on disk, \d+ bytes and \d+ inodes", agent.posture["scratch"])


def test_an_fsync_inside_does_not_reach_the_hosts_disk(launcher: Launcher) -> None:
    """What the agent's fsync does on the host would make the action log wait."""
    script = (
        "import os,time\nf=os.open('/tmp/f',os.O_RDWR|os.O_CREAT)\nfor _ in range(200): os.write(f,b'x'); os.fsync(f)"
    )
    assert launcher.wait(launcher.start_plan(on_disk(launcher, ["python3", "-c", script]))).status == {
        "code": 0,
        "signal": None,
    }
    assert "nobarrier" in sh(launcher, "grep ' /tmp ' /proc/self/mounts").stdout


def test_an_image_is_never_behind_two_devices(tmp_path: Path) -> None:
    stock = scratch.Stock(str(tmp_path), label="stockade-twice", size=0, reserve_bytes=0)
    image = stock.make_kept(1 << 20, str(tmp_path / "kept"))
    with pytest.raises(scratch.CannotMakeScratch, match="in use"):
        stock.open(str(tmp_path / "kept"))
    image.drop()
    again = stock.open(str(tmp_path / "kept"))
    again.drop()
    until(lambda: not devices("twice"))


def test_room_taken_at_once_is_there_whatever_the_host_does(tmp_path: Path) -> None:
    for preallocate in (True, False):
        stock = scratch.Stock(str(tmp_path), label="stockade-pre", size=0, reserve_bytes=0, preallocate=preallocate)
        image = stock.take(16 << 20)
        assert (os.fstat(image.file).st_blocks * 512 >= 16 << 20) == preallocate
        image.drop()


# --- layers and kept homes


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A workspace of host user 1000, and its descriptor."""
    path = tmp_path / "work"
    path.mkdir()
    for name in ("kept", "gone"):
        (path / name).write_text("old")
    for entry in (path, *path.iterdir()):
        os.chown(entry, 1000, 1000)
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    yield path, fd
    os.close(fd)


def layered(launcher: Launcher, script: str) -> SandboxPlan:
    bind = Bind(fd=0, target="/workspace", writable=False, owner_uid=1000, owner_gid=1000, layer=True)
    return replace(on_disk(launcher, ["/bin/sh", "-c", script]), binds=(bind,))


def layer(launcher: Launcher, agent: Agent) -> int:
    _, (top,) = launcher.request_fds("layer", agent_id=agent.agent_id)
    return top


def test_a_layer_takes_what_the_agent_writes_and_the_workspace_nothing(
    launcher: Launcher, workspace: tuple[Path, int]
) -> None:
    path, fd = workspace
    script = "echo new > fresh; echo new > kept; rm gone; cat kept; ls; stat -c %U kept fresh"
    agent = launcher.wait(launcher.start_plan(layered(launcher, script), [fd]))
    assert agent.stdout.split() == ["new", "fresh", "kept", "agent", "agent"], agent.stderr
    assert {entry.name: entry.read_text() for entry in path.iterdir()} == {"kept": "old", "gone": "old"}
    top = layer(launcher, agent)
    try:
        assert sorted(os.listdir(top)) == ["fresh", "gone", "kept"]  # noqa: PTH208 - a descriptor
        assert os.stat("gone", dir_fd=top, follow_symlinks=False).st_rdev == 0
        with pytest.raises(OSError, match="Read-only"):
            os.open("mine", os.O_CREAT | os.O_WRONLY, dir_fd=top)
    finally:
        os.close(top)
    launcher.request("drop", agent_id=agent.agent_id)
    with pytest.raises(LauncherError, match="there is no layer"):
        launcher.request("layer", agent_id=agent.agent_id)


def test_a_layer_of_an_agent_that_runs_is_read_and_not_dropped(launcher: Launcher, workspace: tuple[Path, int]) -> None:
    agent = launcher.start_plan(layered(launcher, "echo x > fresh; sleep 60"), [workspace[1]])
    until(lambda: "fresh" in names_of(layer(launcher, agent)))
    with pytest.raises(LauncherError, match="has not ended"):
        launcher.request("drop", agent_id=agent.agent_id)
    launcher.kill(agent)
    assert "fresh" in names_of(layer(launcher, agent)), "a kill writes out what is kept"
    launcher.request("drop", agent_id=agent.agent_id)


def test_a_launcher_that_was_restarted_still_keeps_what_is_to_be_kept(workspace: tuple[Path, int]) -> None:
    with Launcher.start() as launcher:
        agents = []
        for name in ("first", "second"):
            plan = replace(layered(launcher, f"echo x > {name}; echo y > ~/y; sleep 60"), home=name)
            agents.append(launcher.start_plan(plan, [workspace[1]]))
        until(lambda: all("gone" not in names_of(layer(launcher, a)) and names_of(layer(launcher, a)) for a in agents))
        launcher.restart()
        launcher.request("hello")
        for agent, name in zip(agents, ("first", "second"), strict=True):
            launcher.kill(agent)
            assert name in names_of(layer(launcher, agent))
            again = launcher.wait(launcher.start_plan(home(launcher, "cat ~/y", name=name)))
            assert again.stdout == "y\n", again.stderr
            launcher.request("drop", agent_id=agent.agent_id)


def names_of(top: int) -> list[str]:
    try:
        return os.listdir(top)
    finally:
        os.close(top)


def test_a_launch_that_fails_keeps_no_layer(launcher: Launcher, workspace: tuple[Path, int]) -> None:
    agent = launcher.build(layered(launcher, "true"), [workspace[1]])
    launcher.request("abort", agent_id=agent.agent_id)
    with pytest.raises(LauncherError, match="there is no layer"):
        launcher.request("layer", agent_id=agent.agent_id)


@pytest.mark.parametrize("name", ["../homes/x", "", "a/b"])
def test_no_name_of_a_layer_leads_elsewhere(launcher: Launcher, name: str) -> None:
    for operation in ("layer", "drop"):
        with pytest.raises(LauncherError, match="must be letters"):
            launcher.request(operation, agent_id=name)


def home(launcher: Launcher, script: str, *, name: str = "worker") -> SandboxPlan:
    return replace(on_disk(launcher, ["/bin/sh", "-c", script]), home=name)


def test_a_kept_home_is_the_next_agents_whatever_its_ids(launcher: Launcher) -> None:
    for expected in ("", "x", "xx"):
        agent = launcher.wait(launcher.start_plan(home(launcher, "cat ~/f; printf x >> ~/f; stat -c %u:%g ~/f ~")))
        assert agent.stdout.replace("1000:1000\n", "") == expected, agent.stderr
        assert agent.stdout.count("1000:1000") == 2
    other = launcher.wait(launcher.start_plan(home(launcher, "ls -A ~", name="other")))
    assert other.stdout == ""


def test_one_agent_at_a_time_has_a_home(launcher: Launcher) -> None:
    first = launcher.start_plan(home(launcher, "sleep 60", name="single"))
    with pytest.raises(LauncherError, match="the home of single is in use"):
        launcher.start_plan(home(launcher, "true", name="single"))
    launcher.kill(first)
    assert launcher.wait(launcher.start_plan(home(launcher, "true", name="single"))).status == {
        "code": 0,
        "signal": None,
    }


def test_a_launch_that_waits_for_its_home_can_be_killed(launcher: Launcher) -> None:
    """What the last one wrote is still on its way to the disk: the process that writes it is stopped here."""
    first = launcher.start_plan(home(launcher, "sleep 1000", name="waited"))
    (writes,) = (pid for pid in children(launcher.process.pid) if text(Path(f"/proc/{pid}/comm")) == "stockade-sweep\n")
    plan = home(launcher, "sleep 1000", name="waited")
    os.kill(writes, signal.SIGSTOP)
    try:
        assert launcher.kill(first)["verified_empty"]
        sync.send(launcher.sock, {"op": "launch", "rq": -1, "plan": plan.to_json(), "meta": {}})
        with pytest.raises(LauncherError, match="there is no agent"):
            launcher.request("kill", agent_id=plan.agent_id)
        answer = launcher.event(lambda e: e.get("rq") == -1)
        assert "was killed before it ran" in answer["error"]["message"]
    finally:
        os.kill(writes, signal.SIGCONT)
    # The twin: the next one, which nobody kills, waits and runs.
    again = launcher.start_plan(home(launcher, "sleep 1000", name="waited"))
    assert plan.agent_id not in {each["agent_id"] for each in launcher.request("hello")["agents"]}
    assert launcher.kill(again)["verified_empty"]
