"""Planning a launch: limits, environment, ids, files; what an order may not ask for."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_client.egress.scope import parse_scope
from sandbox.plan import IDS_PER_AGENT, SandboxPlan, Tty
from supervisord import plan as module
from supervisord.errors import InvalidInput, PermissionDenied
from supervisord.plan import (
    LaunchOrder,
    OpenedFile,
    Root,
    WantedFile,
    build,
    check_order,
    effective_limits,
    wanted_files,
)
from supervisord.policy import Demand, Limits, LimitsWanted, Policy, User, Workspace

AGENT = "ag_" + "a" * 26
ID_FIRST = 1879048192
ORDER = LaunchOrder(command=("true",))
POLICY = Policy(name="default", limits=Limits(memory_bytes=1 << 30, cpus=1, pids=256))


def made(
    order: LaunchOrder = ORDER,
    policy: Policy = POLICY,
    *,
    name: str = "reader",
    slot: int = 0,
    files: tuple[OpenedFile, ...] = (),
    root: Root | None = None,
) -> SandboxPlan:
    return build(
        order, policy, agent_id=AGENT, name=name, instance="default", id_first=ID_FIRST, slot=slot, files=files,
        filter_digest="sha256:0", root=root,
    )  # fmt: skip


def opened(path: str, target: str, *, writable: bool, uid: int = 1000) -> OpenedFile:
    return OpenedFile(
        WantedFile(PurePosixPath(path), PurePosixPath(target), writable, "workspace", by_policy=False), 0, uid, uid
    )


# --- limits


def test_a_launch_narrows_and_never_widens() -> None:
    assert effective_limits(POLICY, LimitsWanted()) == POLICY.limits
    narrow = effective_limits(POLICY, LimitsWanted(memory_bytes=8 << 20, cpus=0.5, pids=256))
    assert (narrow.memory_bytes, narrow.cpus, narrow.pids) == (8 << 20, 0.5, 256)
    assert narrow.open_files == POLICY.limits.open_files
    for wanted in (LimitsWanted(memory_bytes=(1 << 30) + 1), LimitsWanted(cpus=1.01), LimitsWanted(pids=257)):
        with pytest.raises(PermissionDenied, match="policy default gives"):
            effective_limits(POLICY, wanted)


@pytest.mark.parametrize(
    ("wanted", "least"),
    [
        (LimitsWanted(memory_bytes=(8 << 20) - 1), LimitsWanted(memory_bytes=8 << 20)),
        (LimitsWanted(cpus=-1.0), LimitsWanted(cpus=0.01)),
        (LimitsWanted(cpus=float("nan")), LimitsWanted(cpus=1.0)),
        (LimitsWanted(pids=1), LimitsWanted(pids=2)),
    ],
)
def test_a_limit_with_which_nothing_can_start_is_a_wrong_word(wanted: LimitsWanted, least: LimitsWanted) -> None:
    with pytest.raises(InvalidInput, match="is the least"):
        effective_limits(POLICY, wanted)
    effective_limits(POLICY, least)


@given(
    memory=st.none() | st.integers(1, 1 << 40),
    cpus=st.none() | st.floats(0.01, 64),
    pids=st.none() | st.integers(1, 1 << 20),
)
def test_no_limit_is_ever_above_the_policys(memory: int | None, cpus: float | None, pids: int | None) -> None:
    try:
        limits = effective_limits(POLICY, LimitsWanted(memory_bytes=memory, cpus=cpus, pids=pids))
    except (PermissionDenied, InvalidInput):
        return
    for name in Limits.__slots__:
        assert getattr(limits, name) <= getattr(POLICY.limits, name)


def test_scratch_never_promises_more_than_memory_and_disk() -> None:
    plan = made(LaunchOrder(command=("true",), limits=LimitsWanted(memory_bytes=1 << 26)))
    assert plan.scratch.tmp_bytes == 1 << 26
    assert plan.scratch.shm_bytes <= 1 << 26
    small = made(policy=Policy(name="p", limits=Limits(memory_bytes=1 << 30, disk_bytes=1 << 20)))
    assert small.scratch.tmp_bytes == 1 << 20


def test_scratch_is_on_disk_where_the_host_can_and_always_where_the_policy_says_so() -> None:
    assert made().scratch.disk == "preferred"
    assert made(policy=Policy(name="p", disk_quota=Demand.REQUIRED)).scratch.disk == "required"


# --- what may be asked for


def test_a_command_is_bounded_and_whole() -> None:
    check_order(LaunchOrder(command=("x" * (module.COMMAND_BYTES_MAX - 1),)))
    with pytest.raises(InvalidInput, match="longer than"):
        check_order(LaunchOrder(command=("x" * module.COMMAND_BYTES_MAX,)))
    for command in ((), ("",), ("a\0b",), ("sh", "a\0")):
        with pytest.raises(InvalidInput):
            check_order(LaunchOrder(command=command))


def test_an_environment_is_bounded_and_leaves_the_sandboxs_own_alone() -> None:
    check_order(LaunchOrder(command=("true",), env={"A": "", "PATH": "/bin"}))
    room = module.ENVIRONMENT_BYTES_MAX - len("A") - 2
    check_order(LaunchOrder(command=("true",), env={"A": "x" * room}))
    with pytest.raises(InvalidInput, match="longer than"):
        check_order(LaunchOrder(command=("true",), env={"A": "x" * (room + 1)}))
    for key, value in (
        ("", "x"),
        ("A=B", "x"),
        ("A", "x\0"),
        ("A\0", "x"),
        *((k, "x") for k in module.RESERVED_VARIABLES),
    ):
        with pytest.raises(InvalidInput, match="variable"):
            check_order(LaunchOrder(command=("true",), env={key: value}))


def test_scopes_are_bounded() -> None:
    scope = parse_scope("llm:*")
    check_order(LaunchOrder(command=("true",), scopes=(scope,) * module.SCOPES_MAX))
    with pytest.raises(InvalidInput):
        check_order(LaunchOrder(command=("true",), scopes=(scope,) * (module.SCOPES_MAX + 1)))


# --- the plan


def test_the_environment_is_the_plans_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_DAEMON", "x")
    env = dict(
        made(
            LaunchOrder(command=("true",), env={"A": "order", "B": "order"}),
            Policy(name="p", env={"A": "policy", "C": "policy"}),
        ).env
    )
    assert (env["A"], env["B"], env["C"]) == ("order", "order", "policy")
    assert env["STOCKADE_AGENT_ID"] == AGENT
    assert env["OPENAI_BASE_URL"] == env["STOCKADE_GATEWAY_URL"] + "/v1" == "http://gateway.internal:3128/v1"
    assert env["ANTHROPIC_BASE_URL"] == env["HTTP_PROXY"] == env["https_proxy"] == "http://gateway.internal:3128"
    assert "SECRET_OF_THE_DAEMON" not in env
    assert "TERM" not in env
    assert dict(made(LaunchOrder(command=("sh",), tty=Tty(24, 80))).env)["TERM"] == "xterm-256color"
    assert dict(made(policy=Policy(name="p", env={"STOCKADE_AGENT_ID": "forged"})).env)["STOCKADE_AGENT_ID"] == AGENT


@given(slot=st.integers(0, 4093), root=st.booleans())
def test_every_slot_has_ids_of_its_own_and_none_of_the_hosts(slot: int, *, root: bool) -> None:
    plan = made(policy=Policy(name="p", user=User.ROOT if root else User.AGENT), slot=slot)
    assert plan.ids.size == IDS_PER_AGENT
    assert plan.ids.start == ID_FIRST + slot * IDS_PER_AGENT
    assert plan.uid == plan.gid == (0 if root else 1000)
    assert plan.ids.host(plan.uid) >= ID_FIRST
    plan.ids.validate()


@pytest.mark.parametrize(
    ("name", "hostname"),
    [("reader", "reader"), ("a.b_c", "a-b-c"), ("x" * 63, "x" * 63), ("a.", "a"), ("9", "9")],
)
def test_a_name_becomes_a_hostname(name: str, hostname: str) -> None:
    assert made(name=name).hostname == hostname


def test_a_writable_path_of_roots_is_refused_unless_the_policy_says_so() -> None:
    roots = opened("/srv/x", "/workspace", writable=True, uid=0)
    with pytest.raises(PermissionDenied, match="owned by root"):
        made(files=(roots,))
    allowed = made(policy=Policy(name="p", allow_root_owned=True), files=(roots,))
    assert [(bind.target, bind.writable, bind.allow_root_owned) for bind in allowed.binds] == [
        ("/workspace", True, True)
    ]
    assert made(files=(opened("/srv/x", "/workspace", writable=False, uid=0),)).binds[0].writable is False
    assert made(files=(opened("/srv/x", "/workspace", writable=True),)).binds[0].owner_uid == 1000


def test_a_plan_describes_itself_and_goes_through_json() -> None:
    plan = made(files=(opened("/srv/x", "/workspace", writable=True),))
    assert SandboxPlan.from_json(plan.to_json()) == plan
    said = "\n".join(plan.describe())
    for word in ("/workspace", "true", str(1 << 30), "eth0"):
        assert word in said


# --- files


def test_two_paths_cannot_be_in_one_place() -> None:
    workspace = Workspace(PurePosixPath("/srv/a"), writable=True)
    order = LaunchOrder(command=("true",), workspace=workspace, scopes=(parse_scope("fs:ro:/srv/b=/workspace"),))
    with pytest.raises(InvalidInput, match="/srv/b is there"):
        wanted_files(order, POLICY)
    fine = LaunchOrder(
        command=("true",), workspace=workspace, scopes=(parse_scope("fs:ro:/srv/b=/data"), parse_scope("fs:rw:/srv/c"))
    )
    policy = Policy(name="p", scopes=(parse_scope("fs:ro:/srv/d=/d"), parse_scope("llm:*")))
    assert [(str(f.path), str(f.target), f.writable, f.by_policy) for f in wanted_files(fine, policy)] == [
        ("/srv/d", "/d", False, True),
        ("/srv/b", "/data", False, False),
        ("/srv/c", "/srv/c", True, False),
        ("/srv/a", "/workspace", True, False),
    ]


# --- root file system


def test_an_image_is_a_directory_by_descriptor_and_its_path_the_least_of_three() -> None:
    root = Root(3, "oci-archive", "/srv/image.tar#v1", "sha256:1", "/image/bin")
    plan = made(root=root)
    assert (plan.rootfs.kind, plan.rootfs.fd) == ("directory", 3)
    assert plan.rootfs.facts() == {
        "rootfs": "oci-archive",
        "rootfs_source": "/srv/image.tar#v1",
        "rootfs_digest": "sha256:1",
    }
    assert "read-only root from fd 3, oci-archive /srv/image.tar#v1, sha256:1" in list(plan.describe())
    assert dict(plan.env)["PATH"] == "/image/bin"
    assert dict(made(policy=Policy(name="x", env={"PATH": "/p"}), root=root).env)["PATH"] == "/p"
    assert dict(made(LaunchOrder(("true",), env={"PATH": "/o"}), root=root).env)["PATH"] == "/o"
    assert dict(made(root=Root(0, "directory", "/srv/root")).env)["PATH"] == module.PATH
    assert made().rootfs.facts() == {"rootfs": "host", "rootfs_source": "", "rootfs_digest": ""}
    assert SandboxPlan.from_json(plan.to_json()).rootfs == plan.rootfs
