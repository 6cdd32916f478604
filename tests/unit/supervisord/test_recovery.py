"""What a daemon takes up when the launcher goes just as it is greeted."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supervisord.errors import Unavailable
from supervisord.lifecycle import State
from supervisord.recovery import Kept, Recovery


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
