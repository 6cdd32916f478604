"""Drift, judged on values: less confined than planned is told, more confined is the program's own affair."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox import examine, following
from sandbox.filters import pack_filters
from sandbox.plan import AGENT_ID_FIRST, IdRange, SandboxPlan
from sandbox.sync import StepError

PLAN = SandboxPlan("ag_x", "t", "host", ("/bin/true",), (), IdRange(AGENT_ID_FIRST))
FILTERS = 2
BLOB = pack_filters([bytes(8)] * (1 + FILTERS))
HELD = AGENT_ID_FIRST + 1000
SEEN: dict[str, Any] = {
    "seccomp_mode": 2,
    "seccomp_filters": 2,
    "no_new_privs": True,
    "capabilities": dict.fromkeys(("inh", "prm", "eff", "bnd", "amb"), "0000000000000000"),
    "uid": [HELD] * 4,
    "gid": [HELD] * 4,
    "groups": [],
    "namespaces": {kind: number + 1 for kind, number in examine.HOST.items()},
    "uid_map": f"0 {AGENT_ID_FIRST} 65536",
    "gid_map": f"0 {AGENT_ID_FIRST} 65536",
}


@pytest.mark.parametrize("changes", [{}, {"seccomp_filters": 3}])
def test_as_planned_or_more_is_no_drift(changes: dict[str, Any]) -> None:
    assert examine.drift(PLAN, FILTERS, SEEN | changes) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seccomp_filters": 1}, "seccomp: mode 2, 1 filters of 2"),
        ({"seccomp_mode": 0}, "seccomp: mode 0"),
        ({"no_new_privs": False}, "no_new_privs"),
        ({"capabilities": SEEN["capabilities"] | {"bnd": "0000000000000400"}}, "capabilities: bnd"),
        ({"uid": [HELD, HELD, HELD, 0]}, "uid: "),
        ({"gid": [0, HELD, HELD, HELD]}, "gid: "),
        ({"groups": [27]}, "groups: [27]"),
        ({"uid_map": "0 0 4294967295"}, "uid_map: 0 0 4294967295"),
        *[
            ({"namespaces": SEEN["namespaces"] | {kind: examine.HOST[kind]}}, f"namespaces: {kind} is the host's")
            for kind in examine.KINDS
        ],
    ],
)
def test_less_than_planned_is_told(changes: dict[str, Any], told: str) -> None:
    (item,) = examine.drift(PLAN, FILTERS, SEEN | changes)
    assert item.startswith(told)


def test_what_a_test_leaves_out_is_not_missed() -> None:
    shared = SEEN["namespaces"] | {"net": examine.HOST["net"]}
    assert examine.drift(replace(PLAN, weaken=("network",)), FILTERS, SEEN | {"namespaces": shared}) == []
    bare = SEEN | {"seccomp_mode": 0, "seccomp_filters": 0}
    assert examine.drift(replace(PLAN, weaken=("seccomp",)), 0, bare) == []


@pytest.mark.parametrize(
    ("changes", "securebits", "told"),
    [
        ({}, 0xEF, ""),
        ({"no_new_privs": False}, 0xEF, "no_new_privs: not set"),
        ({}, 0x10, "securebits: 0x10, not 0xef"),
    ],
)
def test_what_is_not_confined_as_planned_never_runs(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], securebits: int, told: str
) -> None:
    agent: Any = SimpleNamespace(plan=PLAN, filters=BLOB, seen={}, timings_us={})
    monkeypatch.setattr(examine, "at_launch", lambda _agent: SEEN | changes)
    if told:
        with pytest.raises(StepError, match=f"not in force as planned: {told}"):
            following._verify(agent, {"securebits": securebits})
    else:
        following._verify(agent, {"securebits": securebits})
        assert agent.seen["securebits"] == "0xef"


MOUNTINFO = """\
1 2 0:1 / / ro,nosuid,nodev,relatime - tmpfs tmpfs rw
2 1 0:2 / /tmp rw,nosuid,nodev - tmpfs tmpfs rw
3 1 0:3 / /data rw,relatime shared:7 - ext4 /dev/vda rw
4 1 0:4 / /cd rw,nosuid,nodev - iso9660 /dev/sr0 ro
"""


def test_mounts_are_summed_up() -> None:
    assert examine.mounts(MOUNTINFO) == {
        "count": 4,
        "writable": ["/tmp", "/data"],
        "without_nosuid": ["/data"],
        "without_nodev": ["/data"],
    }
