"""What is ordered of several agents at once is done for each, whatever becomes of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from supervisord.acts import Acts
from supervisord.errors import Conflict, Unavailable
from supervisord.launcher_link import LauncherFailed
from supervisord.lifecycle import State, transition

if TYPE_CHECKING:
    from supervisord.actions.types import Action


class Rest:
    """Log, launcher, egress plane and table of agents, as far as they are spoken to."""

    def __init__(self, stuck: str) -> None:
        self.stuck = stuck
        self.entries: list[tuple[str, str]] = []
        self.closed: list[str] = []

    async def note(self, action: Action) -> None:
        self.entries.append((action.agent_id, action.verdict))

    record = note

    async def call(self, verb: str, *, agent_id: str) -> None:
        assert verb == "freeze"
        if agent_id == self.stuck:
            raise LauncherFailed({"message": "cannot freeze agent: it does not stand still", "step": "freeze"})

    def freeze(self, agent_id: str) -> None:
        self.closed.append(agent_id)

    def apply(self, agent: Any, event: Any) -> None:
        agent.state = transition(agent.state, event)


@pytest.mark.parametrize("stuck", ["ag_1", ""])
async def test_one_that_cannot_be_frozen_keeps_no_other_running(stuck: str) -> None:
    rest: Any = Rest(stuck)
    names = ("config", "policies", "book", "exchanges", "requests", "holds", "store", "files", "endings")
    others: Any = dict.fromkeys((*names, "entropy", "now_ns"))
    acts = Acts(agents=rest, actions=rest, launcher=rest, plane=rest, **others)
    agents: Any = [SimpleNamespace(agent_id=f"ag_{n}", name=f"a{n}", state=State.RUNNING) for n in (1, 2, 3)]
    if stuck:
        with pytest.raises(Unavailable, match=r"cannot freeze a1: .* its gate is closed"):
            await acts.freeze(agents, actor="uid:0(root)", reason="why")
    else:
        await acts.freeze(agents, actor="uid:0(root)", reason="why")
    assert {agent.agent_id: agent.state for agent in agents} == {
        "ag_1": State.RUNNING if stuck else State.FROZEN, "ag_2": State.FROZEN, "ag_3": State.FROZEN,
    }  # fmt: skip
    assert set(rest.closed) == {"ag_1", "ag_2", "ag_3"}
    assert ("ag_1", "failed" if stuck else "done") in rest.entries
    assert {("ag_2", "done"), ("ag_3", "done")} <= set(rest.entries)


async def test_who_is_being_started_keeps_nobody_else_from_standing_still() -> None:
    rest: Any = Rest("")
    names = ("config", "policies", "book", "exchanges", "requests", "holds", "store", "files", "endings")
    others: Any = dict.fromkeys((*names, "entropy", "now_ns"))
    acts = Acts(agents=rest, actions=rest, launcher=rest, plane=rest, **others)
    states = (State.RUNNING, State.STARTING, State.RUNNING)
    agents: Any = [SimpleNamespace(agent_id=f"ag_{n}", name=f"a{n}", state=state) for n, state in enumerate(states)]
    with pytest.raises(Conflict, match="cannot freeze a1: it is STARTING"):
        await acts.freeze(agents, actor="uid:0(root)", reason="why")
    assert [agent.state for agent in agents] == [State.FROZEN, State.STARTING, State.FROZEN]
