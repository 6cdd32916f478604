"""The plan as a value: what it takes and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import etc
from sandbox.decoding import InvalidPlan
from sandbox.filters import pack_filters, unpack_filters
from sandbox.plan import (
    AGENT_ID_FIRST,
    AGENT_ID_LAST,
    IDS_PER_AGENT,
    Bind,
    EtcFile,
    IdRange,
    Limits,
    Rootfs,
    SandboxPlan,
    Tty,
)
from sandbox.sync import dumps

PLAN = SandboxPlan(
    agent_id="ag_x",
    instance="t1",
    hostname="h",
    argv=("/bin/true", "\udcff"),
    env=(("A", "b=c"),),
    ids=IdRange(AGENT_ID_FIRST),
    binds=(Bind(0, "/workspace", writable=True, owner_uid=1000, owner_gid=1000),),
    etc=(EtcFile("motd", "hé\n"),),
    tty=Tty(24, 80),
    filter_digest="d",
)


def through_json(plan: SandboxPlan) -> SandboxPlan:
    return SandboxPlan.from_json(json.loads(dumps(plan.to_json()).decode("utf-8", "surrogateescape")))


def test_a_plan_survives_the_channel() -> None:
    assert through_json(PLAN) == PLAN
    assert through_json(replace(PLAN, limits=Limits(cpus=2))) == replace(PLAN, limits=Limits(cpus=2.0))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ids": IdRange(0)}, "ids.start"),
        ({"ids": IdRange(AGENT_ID_FIRST - IDS_PER_AGENT)}, "ids.start"),
        ({"ids": IdRange(AGENT_ID_FIRST + 1)}, "multiple"),
        ({"ids": IdRange(AGENT_ID_LAST - IDS_PER_AGENT + 2)}, "ids.start"),
        ({"ids": IdRange(AGENT_ID_FIRST, 1)}, "ids.size"),
        ({"uid": 33}, "uid"),
        ({"argv": ()}, "argv"),
        ({"argv": ("",)}, "argv"),
        ({"argv": ("a\0b",)}, "NUL"),
        ({"env": (("A=B", "c"),)}, "name of a variable"),
        ({"cwd": "relative"}, "cwd"),
        ({"cwd": "/a/../b"}, "cwd"),
        ({"hostname": "a b"}, "hostname"),
        ({"instance": "../x"}, "instance"),
        ({"agent_id": "../x"}, "agent_id"),
        ({"hide": ("/a//b",)}, "hide"),
        ({"etc": (EtcFile("../x", ""),)}, "etc.name"),
        ({"weaken": ("everything",)}, "weaken"),
        ({"tty": Tty(0, 80)}, "tty"),
        ({"rootfs": Rootfs("directory")}, "rootfs.fd"),
        ({"rootfs": Rootfs("host", 3)}, "rootfs.fd"),
        ({"limits": Limits(memory_bytes=1)}, "limits.memory_bytes"),
        ({"limits": Limits(pids=0)}, "limits.pids"),
    ],
)
def test_what_types_cannot_say_is_checked(change: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidPlan, match=text):
        through_json(replace(PLAN, **change))  # type: ignore[arg-type]


def test_the_last_slot_is_inside_of_the_range() -> None:
    start = (AGENT_ID_LAST + 1) // IDS_PER_AGENT * IDS_PER_AGENT - IDS_PER_AGENT
    through_json(replace(PLAN, ids=IdRange(start)))


@pytest.mark.parametrize(
    "target", ["/proc/x", "/dev/x", "/etc", "/usr/lib", "/bin", "/", "workspace", "/a/./b", "/sys"]
)
def test_a_bind_cannot_cover_the_sandbox_itself(target: str) -> None:
    with pytest.raises(InvalidPlan, match="target"):
        through_json(replace(PLAN, binds=(replace(PLAN.binds[0], target=target),)))


def test_a_writable_bind_of_root_needs_a_word() -> None:
    bind = replace(PLAN.binds[0], owner_uid=0)
    with pytest.raises(InvalidPlan, match="allow_root_owned"):
        through_json(replace(PLAN, binds=(bind,)))
    for fine in (replace(bind, allow_root_owned=True), replace(bind, writable=False)):
        through_json(replace(PLAN, binds=(fine,)))


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (("unknown",), 1, "unknown key 'unknown'"),
        (("version",), 2, "releases"),
        (("argv",), "ls", "plan.argv: must be a list"),
        (("argv",), [1], r"plan.argv\[0\]"),
        (("stdin",), 1, "plan.stdin"),
        (("uid",), True, "plan.uid"),
        (("limits", "pids"), 1.5, "plan.limits.pids"),
        (("limits", "more"), 1, "plan.limits: unknown key"),
        (("ids",), None, "plan.ids"),
        (("landlock",), "perhaps", "plan.landlock"),
        (("env",), [["A"]], r"plan.env\[0\]"),
    ],
)
def test_json_is_taken_strictly(path: tuple[str, ...], value: object, text: str) -> None:
    document = json.loads(dumps(replace(PLAN, argv=("/bin/true",)).to_json()))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(InvalidPlan, match=text):
        SandboxPlan.from_json(document)


def test_descriptors_needed() -> None:
    assert PLAN.fds_needed() == 1
    assert replace(PLAN, binds=()).fds_needed() == 0
    assert replace(PLAN, rootfs=Rootfs("directory", 4)).fds_needed() == 5


def test_description_names_every_step() -> None:
    text = "\n".join(replace(PLAN, argv=("/bin/true",), hide=("/usr/local",), weaken=("seccomp",)).describe())
    for word in ("/workspace", "/usr/local", "WEAKENED", "execve /bin/true", "24x80", "eth0", "motd"):
        assert word in text


programs = st.lists(st.binary(min_size=8, max_size=64).map(lambda b: b[: len(b) // 8 * 8]), min_size=1, max_size=4)


@given(programs)
def test_filters_survive_packing(given_programs: list[bytes]) -> None:
    assert unpack_filters(pack_filters(given_programs)) == tuple(given_programs)


@given(st.binary(max_size=200))
def test_junk_is_no_filter(junk: bytes) -> None:
    with pytest.raises(InvalidPlan):
        unpack_filters(junk)


@given(programs, st.integers(min_value=1, max_value=60))
def test_a_cut_filter_is_none(given_programs: list[bytes], cut: int) -> None:
    blob = pack_filters(given_programs)
    with pytest.raises(InvalidPlan):
        unpack_filters(blob[: max(0, len(blob) - cut)])


# --- /etc ---


def test_etc_names_the_gateway_and_no_resolver() -> None:
    files = etc.files(PLAN)
    assert "198.18.0.1\tgateway.internal" in files["hosts"]
    assert "resolv.conf" not in files
    assert "dns" not in files["nsswitch.conf"]
    assert files["motd"] == "hé\n"
    assert etc.files(replace(PLAN, etc=(EtcFile("hosts", "x"),)))["hosts"] == "x"


@pytest.mark.parametrize(
    ("name", "shown"),
    [("ssl", True), ("java-21-openjdk", True), ("shadow", False), ("machine-id", False), ("docker", False)],
)
def test_little_of_the_hosts_etc_is_shown(name: str, *, shown: bool) -> None:
    assert etc.wanted(name) is shown
