"""A watch of agents that breaks off and is resumed by its token misses nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from stockade.v1 import agents_pb2

from supervisord.rpc.agents import AgentService


@pytest.mark.parametrize("changes", [False, True])
async def test_what_changes_while_another_is_sent_hides_nothing_from_who_resumes(*, changes: bool) -> None:
    agents = [SimpleNamespace(name=name, version=number) for number, name in ((5, "a"), (6, "b"), (7, "c"))]
    service: Any = SimpleNamespace(
        _agents=SimpleNamespace(all=lambda: agents, version=7),
        _shown=lambda agent: agents_pb2.Agent(name=agent.name),
    )

    async def named(token: str, count: int) -> tuple[list[str], str]:
        watch = AgentService.WatchAgents(service, agents_pb2.WatchAgentsRequest(resume_token=token), service)
        found = []
        async for each in watch:
            found.append(each.agent.name)
            token = each.resume_token
            if changes and each.agent.name == "a":
                agents[1].version = service._agents.version = 9
            if len(found) == count:
                break
        await watch.aclose()  # type: ignore[attr-defined]
        return found, token

    first, token = await named("", 2)
    assert first == ["a", "b"]
    rest, _ = await named(token, 2 if changes else 1)
    assert rest == (["c", "b"] if changes else ["c"])
