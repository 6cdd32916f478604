"""Which layout a host has, told from its files; a tree made for the test stands for the mounts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sandbox.cgroups import CannotConfine, detect
from sandbox.cgroups_tree import cpu_quota_usec

if TYPE_CHECKING:
    from pathlib import Path


def hybrid(root: Path, *, without: str = "") -> Path:
    for name in ("memory", "cpu", "pids", "unified"):
        if name != without:
            (root / name).mkdir()
            (root / name / "cgroup.procs").touch()
    if without != "unified":
        (root / "unified" / "cgroup.controllers").write_text("")
    return root


def test_controllers_in_the_v2_tree_make_it_v2(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    layout = detect(tmp_path)
    assert layout.kind == "v2"
    assert layout.tops("t1") == (tmp_path / "stockade-t1",)


@pytest.mark.parametrize("form", ["{0}", "/{0}/", "{1}/{0}", "{1}/{0}/"])
def test_a_delegated_parent_is_where_groups_go(tmp_path: Path, form: str) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    layout = detect(tmp_path, form.format("system.slice/stockade-agents.service/agents", tmp_path))
    assert layout.tops("t1") == (tmp_path / "system.slice/stockade-agents.service/agents/stockade-t1",)


def test_controllers_on_v1_with_a_v2_tree_beside_make_it_hybrid(tmp_path: Path) -> None:
    layout = detect(hybrid(tmp_path))
    assert layout.kind == "hybrid"
    assert layout.tops("t1")[0] == tmp_path / "unified" / "stockade-t1"
    assert len(layout.tops("t1")) == 4


def test_a_missing_controller_is_named_on_v2(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu pids\n")
    with pytest.raises(CannotConfine, match="lacks memory; boot without"):
        detect(tmp_path)


@pytest.mark.parametrize("name", ["memory", "cpu", "pids"])
def test_a_missing_controller_is_named_on_v1(tmp_path: Path, name: str) -> None:
    with pytest.raises(CannotConfine, match=f"no cgroup v1 {name}"):
        detect(hybrid(tmp_path, without=name))


def test_without_any_v2_tree_there_is_no_kill(tmp_path: Path) -> None:
    with pytest.raises(CannotConfine, match="cannot kill agents as one"):
        detect(hybrid(tmp_path, without="unified"))


@pytest.mark.parametrize("parent", ["..", "a/../b", "../a", "a/./b"])
def test_a_parent_outside_of_the_tree_is_refused(tmp_path: Path, parent: str) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    with pytest.raises(CannotConfine, match="cannot use cgroup parent"):
        detect(tmp_path, parent)


@pytest.mark.parametrize(
    ("cpus", "usec"), [(1.0, 100_000), (0.5, 50_000), (2.5, 250_000), (0.001, 1_000), (0.01, 1_000)]
)
def test_cpus_become_a_quota_the_kernel_accepts(cpus: float, usec: int) -> None:
    assert cpu_quota_usec(cpus) == usec
