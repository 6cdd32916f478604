"""Hosts that lack a control: a policy that demands it is not launched, one that does without shows it as degraded.

A filter around the launcher that answers as a kernel without the control does stands for such a kernel; where the
running kernel itself lacks one (User-Mode Linux has neither Landlock nor nftables), the last test says so for real.
"""

from __future__ import annotations

import os
import platform
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandbox import doctor
from sandbox.plan import Bind
from tests.support.launcher import Launcher, LauncherError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.launcher import Agent

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86_64: the numbers are of this machine")
ROOT = Path(__file__).resolve().parents[2]
# Instructions: (load the number; not it: allow; …; errno). socket(AF_NETLINK, _, NETLINK_NETFILTER) by its arguments.
NO_LANDLOCK = "[(0x20, 0, 0, 0), (0x15, 0, 1, 444), (6, 0, 0, 0x50026), (6, 0, 0, 0x7FFF0000)]"
NO_NFTABLES = (
    "[(0x20, 0, 0, 0), (0x15, 0, 5, 41), (0x20, 0, 0, 16), (0x15, 0, 3, 16), (0x20, 0, 0, 32), (0x15, 0, 1, 12),"
    " (6, 0, 0, 0x5005D), (6, 0, 0, 0x7FFF0000)]"
)
WRAPPER = """
import os, struct, sys
sys.path.insert(0, ROOT)
from sandbox import syscalls
syscalls.seccomp_filter(b"".join(struct.pack("<HBBI", *item) for item in CODE))
os.execv(sys.argv[1], sys.argv[1:])
"""


@contextmanager
def host_without(code: str) -> Iterator[Launcher]:
    if os.geteuid() != 0:
        pytest.skip("needs root: starts sandboxes")
    text = WRAPPER.replace("ROOT", repr(str(ROOT))).replace("CODE", code)
    with Launcher.start(wrapper=[sys.executable, "-c", text], second_layer=code != NO_NFTABLES) as launcher:
        yield launcher


def names(agent: Agent) -> set[str]:
    return {item.partition(":")[0] for item in agent.posture["degraded"]}


def test_without_landlock() -> None:
    with host_without(NO_LANDLOCK) as launcher:
        agent = launcher.run(["/bin/true"], canary=True)
        assert agent.status == {"code": 0, "signal": None}
        assert "landlock: this kernel has none" in agent.posture["degraded"]
        assert agent.posture["landlock_abi"] == 0
        assert agent.posture["seccomp_filters"] == 2, "a filter around the launcher is not the agent's"
        with pytest.raises(LauncherError, match="this host lacks landlock") as caught:
            launcher.build(launcher.plan(["/bin/true"], landlock="required"))
        assert "lsm=" in caught.value.error["remedy"]
        with pytest.raises(LauncherError, match="this host lacks landlock"):
            launcher.build(launcher.plan(["/bin/true"], require=("landlock",), degraded_ok=("landlock",)))
        assert "landlock" not in names(launcher.run(["/bin/true"], landlock="off"))


def test_without_nftables() -> None:
    with host_without(NO_NFTABLES) as launcher:
        agent = launcher.run(["/bin/true"], canary=True)
        assert agent.status == {"code": 0, "signal": None}
        assert "nftables" in names(agent)
        assert agent.posture["network"]["firewall"].startswith("missing")
        plan = launcher.plan(["/bin/true"], require=("nftables",))
        with pytest.raises(LauncherError, match="this host lacks nftables") as caught:
            launcher.build(plan)
        assert "modprobe" in caught.value.error["remedy"]
        assert "require: [nftables]" in caught.value.error["remedy"]
        assert not (launcher.run_dir / "agents" / plan.agent_id).exists()
        assert launcher.run(["/bin/true"], ids=plan.ids).status == {"code": 0, "signal": None}


def test_a_quota_that_is_required_refuses_writable_binds_only(launcher: Launcher, tmp_path: Path) -> None:
    os.chown(tmp_path, 1000, 1000)
    fd = os.open(tmp_path, os.O_PATH)
    for writable in (False, True):
        bind = Bind(0, "/workspace", writable=writable, owner_uid=1000, owner_gid=1000)
        plan = launcher.plan(["/bin/true"], binds=(bind,), require=("workspace-quota",))
        if writable:
            with pytest.raises(LauncherError, match="this host lacks workspace-quota: /workspace"):
                launcher.build(plan, [fd])
            assert "workspace-quota" in names(launcher.run(["/bin/true"], [fd], binds=(bind,)))
        else:
            launcher.kill(launcher.start_plan(plan, [fd]))
    os.close(fd)


def test_this_very_kernel_is_judged_as_doctor_says(launcher: Launcher) -> None:
    """Names and verdicts are one table's: what doctor misses is what posture lists and what demands are refused for."""
    findings = {item.control: item for item in doctor.probe()}
    second_layers = ("landlock", "nftables")
    missing = {name for name in second_layers if not findings[name].present}
    agent = launcher.run(["/bin/true"])
    assert names(agent) == missing
    for name in second_layers:
        plan = launcher.plan(["/bin/true"], require=(name,))
        if name in missing:
            with pytest.raises(LauncherError, match=f"this host lacks {name}"):
                launcher.build(plan)
        else:
            assert launcher.wait(launcher.start_plan(plan)).status == {"code": 0, "signal": None}
    assert (agent.posture["landlock_abi"] == 0) is ("landlock" in missing)
