"""What the launcher says of an agent at its limits, as entries of the action log (pure).

The launcher bounds how often it says anything (sandbox/limits_watch.py); it is root, so what it says is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from supervisord.actions.types import Action

if TYPE_CHECKING:
    from collections.abc import Mapping

    from supervisord.actions.types import JSON
    from supervisord.agents import Agent

# kind -> verb, object, verdict
_MEANINGS: Final = {
    "pids_limit": ("agent.pids_limit", "pids", "denied"),
    "throttled": ("agent.throttled", "cpus", "denied"),
    "memory_pressure": ("agent.pressure", "memory", "done"),
    "io_pressure": ("agent.pressure", "io", "done"),
}


def met_limit_action(agent: Agent, kind: str, details: Mapping[str, JSON]) -> Action | None:
    """The entry for what an agent met; None for a kind that this release does not know."""
    meaning = _MEANINGS.get(kind)
    if meaning is None:
        return None
    verb, what, verdict = meaning
    return Action(agent.agent_id, f"agent:{agent.agent_id}", verb, what, verdict, "", dict(details))


def abandoned_action(agent_id: str, count: int) -> Action:
    """The entry for requests that waited since the agent sent too many, and that it did not wait for."""
    return Action(
        agent_id,
        f"agent:{agent_id}",
        "agent.flood",
        "requests",
        "denied",
        "requests came faster than they are judged, and were given up before they were",
        {"times": count},
    )


def oom_action(agent: Agent) -> Action:
    """The entry for an agent that the kernel ended because it used more memory than its limit."""
    return Action(
        agent.agent_id,
        f"agent:{agent.agent_id}",
        "agent.oom",
        "memory",
        "denied",
        "the memory limit was reached: every process of the agent was ended",
        {"limit": agent.what.memory_bytes},
    )
