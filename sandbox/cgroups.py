"""Where an agent's limits live on this host, and the sweep after a crash. Standard library only.

`detect()` says whether the host's controllers are in the v2 tree or on v1 beside it; both layouts have one interface.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandbox.cgroups_tree import (
    CannotConfine,
    Counters,
    Group,
    Layout,
    Limits,
    Stats,
    below,
    check_name,
    remove_directories,
)
from sandbox.cgroups_v1 import CONTROLLERS as V1_CONTROLLERS
from sandbox.cgroups_v1 import HybridGroup, HybridLayout
from sandbox.cgroups_v2 import CONTROLLERS as V2_CONTROLLERS
from sandbox.cgroups_v2 import UnifiedGroup, UnifiedLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

__all__ = [
    "CannotConfine",
    "Counters",
    "Group",
    "HybridGroup",
    "HybridLayout",
    "Layout",
    "Leftover",
    "Limits",
    "Stats",
    "UnifiedGroup",
    "UnifiedLayout",
    "detect",
    "reconcile",
]

ROOT: Final = Path("/sys/fs/cgroup")
RECONCILE_SECONDS_MAX: Final = 10.0


@dataclass(frozen=True, slots=True)
class Leftover:
    """What `reconcile` found of an agent nobody knows any more; `problem` is empty when it is gone."""

    agent_id: str
    processes_killed: int
    problem: str


def detect(root: Path = ROOT, parent: str | None = None) -> Layout:
    """The layout of this host's cgroups; raises `CannotConfine` where limits cannot be enforced.

    `parent` is a group that was delegated to us, as a path below the root of the v2 tree or relative to it
    (`system.slice/stockade-agents.service/agents`); without one, groups are made at the root.
    """
    inside = _relative(root, parent or "")
    unified = root / "cgroup.controllers"
    if unified.exists():
        have = set(unified.read_text(encoding="ascii").split())
        if missing := [name for name in V2_CONTROLLERS if name not in have]:
            raise CannotConfine(
                f"cannot limit agents: {unified} lacks {', '.join(missing)}; boot without cgroup_disable=, or give "
                "this machine a delegated cgroup tree"
            )
        return UnifiedLayout(root, inside)
    if missing := [name for name in V1_CONTROLLERS if not (root / name / "cgroup.procs").exists()]:
        raise CannotConfine(
            f"cannot limit agents: no cgroup v1 {', '.join(missing)} below {root}, and it is no v2 tree"
        )
    if not (root / "unified" / "cgroup.controllers").exists():
        raise CannotConfine(
            f"cannot kill agents as one: no v2 tree at {root}/unified beside the v1 controllers; boot with "
            "systemd.unified_cgroup_hierarchy=1, or mount one: mkdir -p it and mount -t cgroup2 none on it"
        )
    return HybridLayout(root, inside)


def _relative(root: Path, parent: str) -> str:
    """The parent group relative to the root; every part of it is a plain name."""
    parts = [part for part in parent.removeprefix(f"{root}/").split("/") if part]
    for part in parts:
        if part in {".", ".."} or "\0" in part:
            raise CannotConfine(f"cannot use cgroup parent {parent!r}: it must be a path below the root, without '..'")
    return "/".join(parts)


def reconcile(
    instance: str,
    live_ids: Collection[str],
    *,
    layout: Layout | None = None,
    seconds_max: float = RECONCILE_SECONDS_MAX,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Leftover, ...]:
    """Kill and remove every group of this instance whose agent is not in `live_ids`; other instances are not touched.

    Bounded: what is not gone in time is reported with its problem, for the next start to try again.
    """
    layout = layout or detect()
    deadline = clock() + seconds_max
    found: dict[str, list[Path]] = {}
    for top in layout.tops(instance):
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(top):
                if entry.is_dir(follow_symlinks=False) and entry.name not in live_ids:
                    found.setdefault(entry.name, []).append(Path(entry.path))
    tree = layout.tops(instance)[0]
    leftovers = [
        _sweep(check_name("leftover", agent_id), tree / agent_id, paths, deadline=deadline, clock=clock)
        for agent_id, paths in sorted(found.items())
    ]
    if not live_ids:
        layout.tidy(instance)
    return tuple(leftovers)


def _sweep(agent_id: str, tree: Path, paths: list[Path], *, deadline: float, clock: Callable[[], float]) -> Leftover:
    killed = 0
    try:
        if tree in paths:
            killed = _kill(tree, deadline=deadline, clock=clock)
        everything = [path for top in paths for path in below(top)]
        remove_directories(everything, seconds_max=max(0.0, deadline - clock()), clock=clock)
    except (CannotConfine, OSError) as error:
        return Leftover(agent_id, killed, str(error))
    return Leftover(agent_id, killed, "")


def _kill(tree: Path, *, deadline: float, clock: Callable[[], float]) -> int:
    group = UnifiedGroup(tree.name, tree)
    try:
        count = len(group.pids())
        group.kill()
        while group.populated() and clock() < deadline:
            time.sleep(0.002)
    finally:
        group.close()
    return count
