"""Doctor on hosts that lack something: a /proc made for the test says so, and the finding names it and a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox import doctor
from sandbox.controls import CONTROLS


def find(control: str, host: doctor.Host) -> doctor.Finding:
    """The finding of one control alone."""
    (row,) = (item for item in CONTROLS if item.name == control)
    return doctor._find(row, host)


def proc(root: Path, **files: str) -> doctor.Host:
    """A host whose /proc has these files; `__` in a name stands for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return doctor.Host(proc=root, cgroup_root=root / "cgroup", subordinate=(root / "subuid",))


def v2(root: Path) -> None:
    (root / "cgroup").mkdir()
    (root / "cgroup" / "cgroup.controllers").write_text("cpu memory pids\n")


@pytest.mark.parametrize(
    ("release", "present"),
    [("6.1.0-18-amd64", True), ("5.15.0-generic", True), ("5.14.0", True), ("5.13.19", False), ("?", False)],
)
def test_kernels_before_cgroup_kill_are_too_old(release: str, present: bool) -> None:  # noqa: FBT001 - a parameter
    finding = find("kernel", doctor.Host(kernel=release))
    assert finding.present is present
    assert bool(finding.remedy) is not present


@pytest.mark.parametrize(("value", "present"), [("96365", True), ("0", False), (None, False)])
def test_user_namespaces_switched_off_are_found(tmp_path: Path, value: str | None, present: bool) -> None:  # noqa: FBT001
    host = proc(tmp_path, **({} if value is None else {"sys__user__max_user_namespaces": value}))
    finding = find("user-namespaces", host)
    assert finding.present is present
    assert finding.required
    if value == "0":
        assert "sysctl user.max_user_namespaces" in finding.remedy


def test_apparmors_restriction_is_told_and_does_not_hurt(tmp_path: Path) -> None:
    host = proc(
        tmp_path,
        sys__user__max_user_namespaces="9",
        sys__kernel__apparmor_restrict_unprivileged_userns="1",
    )
    finding = find("user-namespaces", host)
    assert finding.present
    assert "AppArmor" in finding.how


def test_a_missing_namespace_kind_is_named(tmp_path: Path) -> None:
    host = proc(tmp_path, **{f"self__ns__{name}": "" for name in doctor.NAMESPACES if name != "cgroup"})
    assert find("namespaces", host).how == "the kernel has no cgroup namespace"


def test_swap_that_is_not_accounted_is_a_hole_only_where_there_is_swap(tmp_path: Path) -> None:
    host = proc(tmp_path, swaps="Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n")
    for name in ("memory", "cpu", "pids", "unified"):
        (tmp_path / "cgroup" / name).mkdir(parents=True)
        (tmp_path / "cgroup" / name / "cgroup.procs").touch()
    (tmp_path / "cgroup" / "unified" / "cgroup.controllers").touch()
    finding = find("swap", host)
    assert not finding.present
    assert "/dev/sda2" in finding.how
    (tmp_path / "swaps").write_text("Filename Type Size Used Priority\n")
    assert find("swap", host).present
    (tmp_path / "swaps").write_text("Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n")
    (tmp_path / "cgroup" / "memory" / "memory.memsw.limit_in_bytes").touch()
    assert find("swap", host).present


def test_a_host_without_cgroups_is_told_what_to_boot(tmp_path: Path) -> None:
    finding = find("cgroups", proc(tmp_path))
    assert (finding.present, finding.required) == (False, True)
    assert "systemd.unified_cgroup_hierarchy=1" in finding.remedy


def test_a_kernel_without_cgroup_kill_is_found_by_looking(tmp_path: Path) -> None:
    host = proc(tmp_path)
    v2(tmp_path)
    (tmp_path / "cgroup" / "init.scope").mkdir()
    assert not find("cgroup-kill", host).present
    (tmp_path / "cgroup" / "init.scope" / "cgroup.kill").touch()
    assert find("cgroup-kill", host).present


def test_no_seccomp_filters(tmp_path: Path) -> None:
    assert not find("seccomp", proc(tmp_path)).present
    host = proc(
        tmp_path, sys__kernel__seccomp__actions_avail="kill_process kill_thread trap errno user_notif log allow"
    )
    assert find("seccomp", host).how == "filters, user notification"


@pytest.mark.parametrize(
    ("kind", "present"), [("ext4", True), ("xfs", True), ("hostfs", False), ("nfs4", False), ("9p", False)]
)
def test_file_systems_that_cannot_map_owners_are_named(tmp_path: Path, kind: str, present: bool) -> None:  # noqa: FBT001
    host = proc(tmp_path, self__mountinfo=f"22 1 254:0 / / rw,relatime shared:1 - {kind} /dev/root rw\n")
    assert find("idmap", host).present is present


@pytest.mark.parametrize(
    ("line", "present"),
    [
        ("alice:100000:65536", True),
        ("alice:1879048191:1", True),
        ("alice:1879048191:2", False),
        ("alice:2147352575:65536", False),
        ("alice:2147352576:65536", True),
        ("alice:0:4294967295", False),
        ("nonsense", True),
    ],
)
def test_ids_of_agents_given_to_a_person_are_found_at_the_edges(tmp_path: Path, line: str, present: bool) -> None:  # noqa: FBT001
    finding = find("agent-ids", proc(tmp_path, subuid=f"# comment\n{line}\n"))
    assert finding.present is present
    if not present:
        assert "gives alice" in finding.how


def test_missing_users_are_named(tmp_path: Path) -> None:
    host = doctor.Host(proc=tmp_path, users=("root", "sktest-nobody-has-this-name"))
    finding = find("users", host)
    assert finding.how == "no user sktest-nobody-has-this-name"
    assert "./bootstrap setup" in finding.remedy
    assert find("users", doctor.Host(users=("root",))).present


def test_a_core_handler_is_told(tmp_path: Path) -> None:
    host = proc(tmp_path, sys__kernel__core_pattern="|/usr/lib/systemd/systemd-coredump %P")
    assert "/usr/lib/systemd/systemd-coredump" in find("core-pattern", host).how


def test_a_probe_that_breaks_counts_as_missing_and_hides_nothing(tmp_path: Path) -> None:
    v2(tmp_path)
    host = proc(tmp_path)
    (tmp_path / "cgroup" / "cgroup.controllers").unlink()
    (tmp_path / "cgroup" / "cgroup.controllers").mkdir()
    finding = find("cgroups", host)
    assert not finding.present
    assert "cannot be probed" in finding.how


def test_every_required_control_has_a_remedy_and_a_name_of_its_own() -> None:
    names = [control.name for control in CONTROLS]
    assert len(set(names)) == len(names)
    assert all(control.remedy for control in CONTROLS if control.required)
    assert names == list(doctor._PROBES)


def test_little_memory_and_a_state_directory_that_may_vanish_are_told(tmp_path: Path) -> None:
    kept = find("state-disk", doctor.Host(state_dir=tmp_path / "not" / "yet"))
    assert str(tmp_path) in kept.how
    assert not find("state-disk", doctor.Host(state_dir=Path("/dev/shm/stockade"))).present
    assert "MiB available" in find("host-memory", doctor.Host()).how


def test_a_v1_memory_hierarchy_without_inheritance_is_found(tmp_path: Path) -> None:
    for name in ("memory", "cpu", "pids", "unified"):
        (tmp_path / "cgroup" / name).mkdir(parents=True)
        (tmp_path / "cgroup" / name / "cgroup.procs").touch()
        (tmp_path / "cgroup" / name / "tasks").touch()
    (tmp_path / "cgroup" / "unified" / "cgroup.controllers").touch()
    flag = tmp_path / "cgroup" / "memory" / "memory.use_hierarchy"
    flag.write_text("0\n")
    assert "use_hierarchy is 0" in find("cgroups", proc(tmp_path)).how
    flag.write_text("1\n")
    (tmp_path / "cgroup" / "memory" / "memory.swappiness").write_text("60\n")
    finding = find("cgroups", proc(tmp_path))
    assert finding.present
    assert "v1 hierarchies: cpu, memory, pids" in finding.how
    assert "swappiness 60" in finding.how
