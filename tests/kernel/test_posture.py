"""Posture and examination: what they say is what the host sees for itself; a change from outside is told as drift."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandbox import examine
from sandbox.plan import Bind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.launcher import Agent, Launcher

KINDS = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


def first_process(agent: Agent) -> int:
    return int(Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()[0])


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def look(launcher: Launcher, agent: Agent) -> dict[str, Any]:
    effective: dict[str, Any] = launcher.request("examine", agent_id=agent.agent_id)["effective"]
    return effective


@pytest.fixture(params=[0, 1000])
def agent(launcher: Launcher, request: pytest.FixtureRequest) -> Iterator[Agent]:
    agent = launcher.launch(["/bin/sleep", "1000"], uid=request.param, gid=request.param)
    yield agent
    launcher.kill(agent)


def test_posture_is_what_the_host_sees(agent: Agent) -> None:
    posture, pid = agent.posture, first_process(agent)
    seen = status(pid)
    assert posture["seccomp_filters"] == 2
    assert seen["Seccomp"] == "2"
    assert posture["no_new_privs"] is (seen["NoNewPrivs"] == "1") is True
    assert posture["capabilities"] == dict.fromkeys(("inh", "prm", "eff", "bnd", "amb"), "0" * 16)
    assert {seen[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (
        posture["ids"]["uid"]
        == [int(word) for word in seen["Uid"].split()]
        == [agent.plan.ids.host(agent.plan.uid)] * 4
    )
    assert posture["ids"]["uid_map"].split() == Path(f"/proc/{pid}/uid_map").read_text().split()
    assert posture["securebits"] == "0xef"
    for kind in KINDS:
        assert posture["namespaces"][kind] == Path(f"/proc/{pid}/ns/{kind}").stat().st_ino
        assert posture["namespaces"][kind] != Path(f"/proc/self/ns/{kind}").stat().st_ino
    assert posture["kernel"] == os.uname().release


def test_examination_is_what_the_host_sees_after_exec(launcher: Launcher, agent: Agent) -> None:
    effective, pid = look(launcher, agent), first_process(agent)
    assert effective["drift"] == []
    assert effective["pid"] == pid
    assert effective["namespaces"] == agent.posture["namespaces"]
    assert effective["limits"]["memory_bytes"] == agent.plan.limits.memory_bytes
    assert (effective["limits"]["pids"], effective["limits"]["cpus"]) == (256, 1)
    assert effective["rlimits"]["open_files"] == [4096, 4096]
    assert "Max open files            4096                 4096 " in Path(f"/proc/{pid}/limits").read_text()
    assert effective["rlimits"]["core_bytes"] == [1, 1]
    assert effective["network"]["routes"] == ["198.18.0.1/32 dev eth0"]
    assert effective["network"]["addresses"] == ["127.0.0.1", "198.18.0.2"]
    assert effective["network"]["ipv6_addresses"] == []
    assert effective["mounts"]["count"] == len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines())
    assert {"/tmp", "/home/agent", "/workspace", "/dev/shm"} <= set(effective["mounts"]["writable"])
    assert "/usr" not in effective["mounts"]["writable"]
    assert effective["processes_examined"] == 2
    assert effective["oom_score_adj"] == 500


def test_limits_that_somebody_raised_are_drift(launcher: Launcher, agent: Agent) -> None:
    for group in launcher.groups(agent):
        if (group / "pids.max").exists():
            (group / "pids.max").write_text("9999")
    assert look(launcher, agent)["drift"] == ["limits: pids is 9999, not 256"]


def test_a_route_and_an_address_that_somebody_added_are_drift(launcher: Launcher, agent: Agent) -> None:
    enter = ["nsenter", "-n", "-t", str(agent.pid), "ip"]
    subprocess.run([*enter, "route", "add", "192.0.2.0/24", "dev", "eth0"], check=True)
    subprocess.run([*enter, "address", "add", "198.51.100.1/32", "dev", "lo"], check=True)
    drift = " ".join(look(launcher, agent)["drift"])
    assert "192.0.2.0/24 dev eth0" in drift
    assert "198.51.100.1" in drift


def test_an_unconfined_process_among_the_agents_is_drift(launcher: Launcher, agent: Agent) -> None:
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        for group in launcher.groups(agent):
            (group / "cgroup.procs").write_text(str(stranger.pid))
        drift = look(launcher, agent)["drift"]
        assert f"process {stranger.pid}: no_new_privs: not set" in drift
        assert any(item.startswith(f"process {stranger.pid}: seccomp") for item in drift)
        assert any(item.startswith(f"process {stranger.pid}: capabilities: eff") for item in drift)
        launcher.kill(agent)
        assert stranger.wait(10) == -9


def test_more_processes_and_filters_of_its_own_are_no_drift(launcher: Launcher) -> None:
    own = """
import ctypes, os, time
class F(ctypes.Structure):
    _fields_ = [('code', ctypes.c_uint16), ('jt', ctypes.c_uint8), ('jf', ctypes.c_uint8), ('k', ctypes.c_uint32)]
class P(ctypes.Structure): _fields_ = [('len', ctypes.c_uint16), ('filter', ctypes.POINTER(F))]
program = P(1, (F * 1)(F(6, 0, 0, 0x7fff0000)))
assert ctypes.CDLL(None).syscall(317, 1, 0, ctypes.byref(program)) == 0
if os.fork() == 0: time.sleep(1000)
print('ready', flush=True)
time.sleep(1000)
"""
    agent = launcher.launch(["python3", "-c", own])
    launcher.start_exec(agent, ["/bin/sleep", "1000"], stream_id="st_other")
    deadline = time.monotonic() + 10
    while "ready" not in agent.stdout and time.monotonic() < deadline:
        launcher.exec(agent, ["/bin/true"])
    effective = look(launcher, agent)
    assert effective["seccomp_filters"] == 3
    assert effective["processes_examined"] == 4
    assert effective["drift"] == []
    launcher.kill(agent)


def test_examination_survives_a_restart_of_the_launcher(launcher: Launcher) -> None:
    agent = launcher.launch(["/bin/sleep", "1000"])
    launcher.restart()
    effective = look(launcher, agent)
    assert (effective["drift"], effective["namespaces"]) == ([], agent.posture["namespaces"])
    launcher.kill(agent)


def test_a_bind_of_roots_and_a_writable_one_are_in_posture(launcher: Launcher, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    bind = Bind(0, "/workspace", writable=True, owner_uid=0, owner_gid=0, allow_root_owned=True)
    agent = launcher.launch(["/bin/sleep", "1000"], [fd], binds=(bind,))
    os.close(fd)
    assert agent.posture["root_owned"] == ["/workspace"]
    assert [item.partition(":")[0] for item in agent.posture["degraded"] if "nftables" not in item] == [
        "workspace-quota"
    ]
    assert "/workspace" in look(launcher, agent)["mounts"]["writable"]
    launcher.kill(agent)


def test_reading_back_is_cheap() -> None:
    """What every launch pays, in microseconds of the best of many: the promise is 200 on a quiet machine."""
    pidfd = os.pidfd_open(os.getpid())
    best = min(_timed(pidfd) for _ in range(200))
    os.close(pidfd)
    plain = min(_timed_plain() for _ in range(200))
    assert best < max(400_000, 40 * plain), "a slow machine is slow at reading one file too"


def _timed_plain() -> int:
    began = time.perf_counter_ns()
    Path("/proc/self/status").read_text()
    return time.perf_counter_ns() - began


def _timed(pidfd: int) -> int:
    began = time.perf_counter_ns()
    pid = examine.pid_of(pidfd)
    examine.confinement(pid)
    examine.identity(pid)
    return time.perf_counter_ns() - began
