"""What the log and the posture say of a launch (pure)."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Final, cast

from supervisord.actions.types import Action

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sandbox.plan import SandboxPlan
    from supervisord.actions.types import JSON
    from supervisord.agents import Agent

OBJECT_CHARACTERS_MAX: Final = 512
VERSION: Final = version("stockade")


def confirmed(agent: Agent, built: Mapping[str, object]) -> dict[str, object]:
    """The posture: what the launcher says of what it built, and by whose order."""
    ordered = {"policy": agent.what.policy, "policy_digest": agent.what.policy_digest, "stockade": VERSION}
    return {**built, **ordered, **_defined(agent)}


def _defined(agent: Agent) -> dict[str, str]:
    """By which definition of the registry it was launched; nothing where by none."""
    if not agent.what.definition:
        return {}
    return {"definition": agent.what.definition, "definition_digest": agent.what.definition_digest}


def intent_action(agent: Agent, plan: SandboxPlan, *, actor: str) -> Action:
    """What is about to be launched, and by whose order."""
    what = agent.what
    details: dict[str, JSON] = {
        "name": what.name,
        "policy": what.policy,
        "policy_digest": what.policy_digest,
        "scopes": [grant.scope for grant in what.grants],
        "labels": dict(what.labels),
        "owner": what.owner,
        "purpose": what.purpose,
        "workspace": what.workspace,
        "workspace_mode": what.workspace_mode,
        "memory_bytes": what.memory_bytes,
        "cpus": what.cpus,
        "pids": what.pids,
        "budget": {**what.budget, "on_exhausted": what.on_exhausted},
        "uid_slot": what.slot,
        **_defined(agent),
        **plan.rootfs.facts(),
    }
    return Action(what.agent_id, actor, "agent.launch", _object(agent), "allowed", "", details)


def outcome_action(agent: Agent, verb: str, verdict: str, *, reason: str, actor: str) -> Action:
    """What became of a launch."""
    details: dict[str, JSON] = {"name": agent.name, "posture": cast("JSON", agent.posture)}
    return Action(agent.agent_id, actor, verb, _object(agent), verdict, reason, details)


def _object(agent: Agent) -> str:
    return " ".join(agent.what.command)[:OBJECT_CHARACTERS_MAX]
