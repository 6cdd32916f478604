"""Limits of a launched agent beyond its size, and what the launcher says when one is met; on hybrid hosts and on v2."""

from __future__ import annotations

import os
import select
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandbox.cgroups import detect
from sandbox.plan import Bind, Limits
from tests.support.launcher import Launcher, LauncherError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.launcher import Agent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")
MIB = 1 << 20
V2 = detect().kind == "v2"
PYTHON = "/usr/bin/python3"


def group_files(launcher: Launcher, agent: Agent) -> dict[str, str]:
    """Every limit that the kernel has on the agent's group now."""
    names = {
        "v2": ("memory.max", "memory.swap.max", "memory.oom.group", "memory.high", "cpu.max", "pids.max"),
        "hybrid": ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "cpu.cfs_quota_us", "pids.max"),
    }[detect().kind]
    found = {}
    for top in detect().tops(launcher.instance):
        for name in names:
            path = top / agent.cgroup / name
            if path.exists():
                found[name] = path.read_text().strip()
    return found


def groups(launcher: Launcher) -> set[str]:
    tree = detect().tops(launcher.instance)[0]
    return {path.name for path in tree.iterdir() if path.is_dir()} if tree.exists() else set()


def told(launcher: Launcher, agent: Agent, kind: str) -> dict[str, Any]:
    event = launcher.event(
        lambda e: e.get("ev") == "met_limit" and e["agent_id"] == agent.agent_id and e["kind"] == kind
    )
    details: dict[str, Any] = event["details"]
    return details


@pytest.mark.parametrize("swap_bytes", [0, 32 * MIB])
def test_a_starter_made_ahead_has_the_limits_of_its_agent_before_exec(launcher: Launcher, swap_bytes: int) -> None:
    limits = Limits(memory_bytes=100 * MIB, cpus=0.5, pids=17, swap_bytes=swap_bytes)
    deadline = time.monotonic() + 60  # the guest is slow
    while True:  # until a launch is served from the stock: its group was made before the plan was known
        while not (before := groups(launcher)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        agent = launcher.build(launcher.plan(["/bin/true"], limits=limits))
        files = group_files(launcher, agent)
        launcher.request("abort", agent_id=agent.agent_id)
        if agent.cgroup in before:
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if V2:
        swap = {"memory.swap.max": str(swap_bytes)} if "memory.swap.max" in files else {}
        assert files == swap | {
            "memory.max": str(100 * MIB),
            "memory.oom.group": "1",
            "memory.high": "max",
            "cpu.max": "50000 100000",
            "pids.max": "17",
        }
    else:
        assert files == {
            "memory.limit_in_bytes": str(100 * MIB),
            "memory.memsw.limit_in_bytes": str(100 * MIB + swap_bytes),
            "cpu.cfs_quota_us": "50000",
            "pids.max": "17",
        }


UNTIL_TOLD = "import os, time\nwhile not os.path.exists('/tmp/now'): time.sleep(0.05)\n"
GREEDY = """
import os, sys, time
if os.fork() == 0:
    time.sleep(0.2)
    x = bytearray(int(sys.argv[1]) << 20)
    os._exit(0)
os.wait()
print("survived", flush=True)
"""


@pytest.mark.parametrize(("mebibytes", "survives"), [(400, False), (20, True)])
def test_out_of_memory_ends_the_agent_as_a_whole(launcher: Launcher, mebibytes: int, *, survives: bool) -> None:
    """The kernel's victim is a child; what started it does not go on as if nothing had happened."""
    limits = Limits(memory_bytes=96 * MIB)
    agent = launcher.run([PYTHON, "-I", "-S", "-c", GREEDY, str(mebibytes)], limits=limits)
    assert (agent.stdout == "survived\n") is survives
    assert agent.oom is not survives
    assert agent.status == ({"code": 0, "signal": None} if survives else {"code": None, "signal": 9})


def test_the_pids_limit_is_told_of_once_with_its_count(launcher: Launcher) -> None:
    program = """
import os, time
for _ in range(300):
    try:
        if os.fork() == 0: time.sleep(100)
    except OSError: pass
time.sleep(100)
"""
    agent = launcher.launch([PYTHON, "-I", "-S", "-c", program], limits=Limits(memory_bytes=256 * MIB, pids=20))
    details = told(launcher, agent, "pids_limit")
    assert details["limit"] == 20
    assert 0 < details["times"] <= 300
    counters = launcher.request("counters", agent_id=agent.agent_id)["counters"]
    assert counters["pids_limit_hits"] >= details["times"]
    launcher.kill(agent)
    assert [e for e in launcher.events if e.get("ev") == "met_limit" and e["agent_id"] == agent.agent_id] == []


def test_throttling_is_told_of_and_an_idle_agent_is_not(launcher: Launcher) -> None:
    idle = launcher.launch(["/bin/sleep", "100"])
    busy = launcher.launch([PYTHON, "-I", "-S", "-c", "while True: pass"], limits=Limits(cpus=0.1))
    details = told(launcher, busy, "throttled")
    assert details["limit"] == 0.1
    assert details["throttled_ms"] > 100
    assert not any(e.get("ev") == "met_limit" and e["agent_id"] == idle.agent_id for e in launcher.events)
    for agent in (idle, busy):
        launcher.kill(agent)


@pytest.mark.skipif(not Path("/proc/pressure/memory").exists(), reason="needs a kernel with PSI")
def test_waiting_for_memory_is_told_of(launcher: Launcher) -> None:
    """Programs whose files do not fit beside them in their memory read them over and over."""
    program = """
import os, random
held = bytearray(b'x') * (36 << 20)
fd = os.open('/workspace/large', os.O_RDONLY)
for _ in range(4):
    if os.fork() == 0: break
random.seed(os.getpid())
size = os.fstat(fd).st_size
while True: os.pread(fd, 4096, random.randrange(0, size, 4096))
"""
    with workspace(24 * MIB) as (fd, bind):
        agent = launcher.launch(
            [PYTHON, "-I", "-S", "-c", program], [fd], binds=(bind,), limits=Limits(memory_bytes=64 * MIB)
        )
        details = told(launcher, agent, "memory_pressure")
        assert details["waited_ms"] >= 200
        counters = launcher.request("counters", agent_id=agent.agent_id)["counters"]
        assert counters["memory_pressure_usec"] >= 1000 * details["waited_ms"]
        launcher.kill(agent)


# --- rates


class workspace:  # noqa: N801 - used as a function
    """A directory on a disk, with one file that is not in the page cache, and a bind of it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> tuple[int, Bind]:
        self.path = Path(tempfile.mkdtemp(prefix="sktest-io-", dir=os.environ.get("TMPDIR", "/var/tmp")))
        with (self.path / "large").open("wb") as file:
            for _ in range(self.size // MIB):
                file.write(os.urandom(MIB))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for path in (self.path, self.path / "large"):
            os.chown(path, 1000, 1000)
        self.fd = os.open(self.path, os.O_PATH | os.O_CLOEXEC)
        return self.fd, Bind(0, "/workspace", writable=True, owner_uid=1000, owner_gid=1000)

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        shutil.rmtree(self.path)


READ = """
import os, time
fd = os.open('/workspace/large', os.O_RDONLY)
began = time.monotonic()
for at in range(0, 4 << 20, 1 << 16): os.pread(fd, 1 << 16, at)
print(time.monotonic() - began)
"""


@pytest.mark.parametrize(("rate", "held"), [(2 * MIB, True), (1 << 40, False)])
def test_reads_are_held_to_their_rate(launcher: Launcher, rate: int, *, held: bool) -> None:
    with workspace(8 * MIB) as (fd, bind):
        agent = launcher.run(
            [PYTHON, "-I", "-S", "-c", READ], [fd], binds=(bind,), limits=Limits(io_read_bytes_per_second=rate)
        )
    assert agent.stderr == ""
    assert (float(agent.stdout) > 1.0) is held
    assert not any(item.startswith("io:") for item in agent.posture["degraded"])


def test_a_rate_for_writes_is_refused_where_it_cannot_be_held(launcher: Launcher) -> None:
    limits = Limits(io_write_bytes_per_second=2 * MIB)
    if V2:
        agent = launcher.run(["/bin/true"], limits=limits)
        assert not any(item.startswith("io:") for item in agent.posture["degraded"])
    else:
        with pytest.raises(LauncherError, match="page cache"):
            launcher.run(["/bin/true"], limits=limits)
    agent = launcher.run(["/bin/true"], limits=limits, degraded_ok=("io",))
    assert any(item.startswith("io:") for item in agent.posture["degraded"]) is not V2


WRITE = """
import mmap, os, time
fd = os.open('/workspace/new', os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
page = mmap.mmap(-1, 1 << 20)
began = time.monotonic()
for _ in range(4): os.write(fd, page)
print(time.monotonic() - began)
"""


@pytest.mark.parametrize(("rate", "held"), [(2 * MIB, True), (1 << 40, False)])
def test_direct_writes_are_held_to_their_rate(launcher: Launcher, rate: int, *, held: bool) -> None:
    limits = Limits(io_write_bytes_per_second=rate)

    def takes() -> float:
        argv = [PYTHON, "-I", "-S", "-c", WRITE]
        with workspace(0) as (fd, bind):
            agent = launcher.run(argv, [fd], binds=(bind,), limits=limits, degraded_ok=("io",))
        assert agent.stderr == ""
        return float(agent.stdout)

    assert takes() > 1.0 if held else any(takes() <= 1.0 for _ in range(4)), "the disk may be busy with others"


def test_a_restarted_launcher_keeps_watching(own_launcher: Launcher) -> None:
    program = f"{UNTIL_TOLD}x = bytearray(400 << 20)\nprint('survived')"
    two = "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', sys.argv[1]])\ntime.sleep(100)"
    limits = Limits(memory_bytes=96 * MIB, io_read_bytes_per_second=50 * MIB)
    agent = own_launcher.launch([PYTHON, "-I", "-S", "-c", two, program], limits=limits)
    own_launcher.restart()
    own_launcher.request("hello")
    own_launcher.exec(agent, ["/bin/touch", "/tmp/now"])
    own_launcher.wait(agent)
    assert (agent.oom, agent.stdout) == (True, "")


def test_who_ran_out_of_memory_while_no_launcher_was_there_is_ended_by_the_next(own_launcher: Launcher) -> None:
    program = f"{UNTIL_TOLD}x = bytearray(400 << 20)\nprint('survived')"
    script = f'{PYTHON} -I -S -c "$1"; touch /tmp/over; exec sleep 1000'
    agent = own_launcher.launch(["/bin/sh", "-c", script, "sh", program], limits=Limits(memory_bytes=96 * MIB))
    tmp = Path(f"/proc/{agent.pid}/root/tmp")
    own_launcher.process.kill()
    own_launcher.process.wait()
    (tmp / "now").touch()
    deadline = time.monotonic() + 30
    while not ended(agent, 0) and not (tmp / "over").exists():  # v2 ends the whole group by itself
        assert time.monotonic() < deadline
        time.sleep(0.01)
    own_launcher.restart()
    own_launcher.request("hello")
    assert ended(agent, 30)
    assert own_launcher.kill(agent)["verified_empty"]
    assert "survived" not in agent.stdout
    if not V2:
        assert own_launcher.wait(agent).oom


def ended(agent: Agent, seconds: float) -> bool:
    return bool(select.select([agent.pidfd], [], [], seconds)[0])


@pytest.fixture
def own_launcher() -> Iterator[Launcher]:
    with Launcher.start() as launcher:
        yield launcher
