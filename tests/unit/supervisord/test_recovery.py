"""What a daemon takes up when the launcher goes just as it is greeted."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supervisord.actions.types import Action
from supervisord.agents import Agents
from supervisord.errors import Unavailable
from supervisord.lifecycle import State
from supervisord.recovery import Kept, Recovery
from tests.support.made import make_agent, ticks

STARTED_NS = 1_790_000_000_000_000_000


def test_gates_of_agents_open_also_where_their_launcher_went_as_it_was_greeted() -> None:
    """And where no worker was there at first."""
    opened: list[str] = []

    class Provisions:
        workers = 0

        def open_gate(self, agent: Any, *, frozen: bool) -> None:
            assert not frozen
            if not self.workers:
                raise Unavailable("cannot open the gate: no egress worker runs")
            opened.append(agent.agent_id)

        async def open_transparent(self, _agent: Any) -> None:
            pass

    known: Any = SimpleNamespace(agent_id="ag_1", live=True, state=State.RUNNING, listener=None)
    agents: Any = SimpleNamespace(get={"ag_1": known}.get)
    parts: Any = {"provisions": Provisions(), "launcher": None, "actions": None, "slots": None, "hold": None}
    adopted: list[str] = []

    def greeted() -> Recovery:
        return Recovery(agents=agents, output_dir=Path("/nowhere"), kept=Kept(), adopted=adopted, **parts)

    greeted().adopted.append("ag_1")  # and then that launcher was gone
    second = greeted()
    second.adopt("ag_1", {}, [os.open("/dev/null", os.O_RDONLY)], posture={}, ids=None)
    with pytest.raises(Unavailable):
        asyncio.run(second.open_gates())
    Provisions.workers = 1
    asyncio.run(second.open_gates())
    assert opened == ["ag_1"]
    asyncio.run(greeted().open_gates())
    assert opened == ["ag_1"], "once"


@pytest.mark.parametrize(
    ("said", "state"),
    [
        (["agent.kill"], State.KILLED),
        (["agent.exit", "agent.kill"], State.EXITED),  # killed to be sure, when it had ended
        (["agent.exit"], State.EXITED),
        ([], State.EXITED),
    ],
)
async def test_what_the_log_says_first_is_how_an_agent_ended(tmp_path: Path, said: list[str], state: State) -> None:
    """Where the database had no room for it."""
    agents, gone = Agents(now_ns=ticks()), make_agent("a", State.RUNNING)
    directory = tmp_path / gone.agent_id
    directory.mkdir()
    (directory / "state.json").write_text(json.dumps({"meta": gone.what.to_json()}))
    (directory / "exit").write_text('{"code": 0}')
    noted: list[str] = []

    class Log:
        async def query(self, *, verb: str, **_: object) -> list[Any]:
            if verb == "daemon.start":
                return [SimpleNamespace(time_ns=time_ns) for time_ns in (STARTED_NS + 5, STARTED_NS)]
            entries = [SimpleNamespace(seq=seq, action=Action("", "", what, "", "")) for seq, what in enumerate(said)]
            return [entry for entry in entries if entry.action.verb == verb]

        async def note(self, action: Action) -> None:
            noted.append(action.verb)

    parts: Any = {"provisions": None, "launcher": None, "actions": Log(), "slots": None, "hold": None, "adopted": []}
    recovery = Recovery(agents=agents, output_dir=tmp_path, kept=Kept(), **parts)
    (found,) = await recovery.find_ended(())
    assert (found.state, noted) == (state, [] if said else ["agent.exit"])
    # And where the database had it, and the log may not: what the last daemon ended, not what those before it did.
    for ended_at_ns, missing in ((STARTED_NS + 1, not said), (STARTED_NS - 1, False)):
        noted.clear()
        row: Any = SimpleNamespace(state=state.value, started_at_ns=1, ended_at_ns=ended_at_ns, record={})
        kept = Kept(history={gone.agent_id: row})
        later = Recovery(agents=Agents(now_ns=ticks()), output_dir=tmp_path, kept=kept, **parts)
        assert await later.find_ended(()) == []
        assert noted == ["agent.exit"] * missing
