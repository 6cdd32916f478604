"""Which controls are in force for an agent, as its posture says, and which it does without."""

import os
from typing import Any, Final

from sandbox import controls, landlock
from sandbox.cgroups import Layout
from sandbox.netpool import Net
from sandbox.plan import SandboxPlan
from sandbox.running import Agent
from sandbox.scratch import geometry
from sandbox.sync import StepError

KERNEL: Final = os.uname().release


def posture(agent: Agent, layout: Layout) -> dict[str, Any]:
    """Return which controls are in force: as the kernel told where it can (`seen`), else as they were applied."""
    plan, net, seen = agent.plan, agent.net, agent.seen
    return {
        "ids": {
            "start": plan.ids.start,
            "size": plan.ids.size,
            "inside": plan.uid,
            **{name: seen[name] for name in ("uid", "gid", "groups", "uid_map", "gid_map")},
        },
        "namespaces": seen["namespaces"],
        **plan.rootfs.facts(),
        "seccomp": plan.filter_digest,
        "seccomp_filters": seen["seccomp_filters"],
        "record": {"execs": plan.listens and plan.record.execs, "refusals": plan.listens and plan.record.refusals},
        "no_new_privs": seen["no_new_privs"],
        "capabilities": seen["capabilities"],
        "securebits": seen["securebits"],
        "landlock_abi": 0 if plan.landlock == "off" or "landlock" in plan.weaken else landlock.ABI,
        "limits": {name: getattr(plan.limits, name) for name in plan.limits.__slots__},
        "cgroups": layout.facts(),
        "network": net.facts() if isinstance(net, Net) else {},
        "scratch": _scratch(agent),
        "canary": seen.get("canary", {}),
        "kernel": KERNEL,
        "weakened": sorted(plan.weaken),
        "root_owned": [bind.target for bind in plan.binds if bind.writable and not bind.owner_uid],
        "degraded": agent.degraded,
    }


def _scratch(agent: Agent) -> str:
    if agent.image is None:
        return "tmpfs, counts as memory"
    disk_bytes = agent.plan.limits.disk_bytes
    inodes = geometry(disk_bytes).inodes
    home = "" if agent.plan.home is None else "; home is kept, with a limit of its own"
    return f"on disk, {disk_bytes} bytes and {inodes} inodes{home}; /dev/shm is tmpfs, counts as memory"


def degraded(plan: SandboxPlan, lacking: dict[str, str]) -> list[str]:
    """Return what posture lists as degraded; raises `StepError` on what the plan does not do without."""
    require = {*plan.require, *(("landlock",) if plan.landlock == "required" else ())}
    try:
        return controls.degraded(lacking, require=require, degraded_ok=plan.degraded_ok)
    except controls.Demanded as demanded:
        raise StepError("launch on this host", 0, str(demanded), demanded.remedy) from demanded


def lacking_network(net: Net) -> dict[str, str]:
    return {} if net.firewall == "nftables" else {"nftables": net.firewall.removeprefix("missing: ")}
