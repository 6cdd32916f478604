"""The table of agents: names and ids, selection, states, and who is told of a change."""

from __future__ import annotations

import asyncio
import json

import pytest

from supervisord import agents as module
from supervisord.agents import Agents, Description, LaunchGrant, Selector
from supervisord.errors import Conflict, InvalidInput, NotFound
from supervisord.ids import AgentName
from supervisord.lifecycle import Event, State
from tests.support.made import DESCRIPTION, agent_id, make_agent, ticks


@pytest.fixture
async def table() -> Agents:
    return Agents(now_ns=ticks())


async def test_a_name_is_one_live_agents_and_then_free(table: Agents) -> None:
    first = make_agent("a", name=AgentName("same"))
    table.add(first)
    with pytest.raises(Conflict, match="same"):
        table.add(make_agent("b", name=AgentName("same")))
    with pytest.raises(Conflict, match="this id"):
        table.add(make_agent("a", name=AgentName("other")))
    assert table.find("same") is first
    table.apply(first, Event.EXITED)
    second = make_agent("b", name=AgentName("same"))
    table.add(second)
    assert table.find("same") is second
    assert table.find(first.agent_id) is first


async def test_an_ended_agent_of_earlier_takes_no_live_ones_name(table: Agents) -> None:
    live = make_agent("a", name=AgentName("same"), launched_at_ns=5)
    table.add(live)
    table.remember(make_agent("b", State.EXITED, name=AgentName("same"), launched_at_ns=9))
    assert table.find("same") is live
    for letter, launched in (("c", 3), ("d", 7), ("e", 4)):
        table.remember(make_agent(letter, State.EXITED, name=AgentName("gone"), launched_at_ns=launched))
    assert table.find("gone").agent_id == agent_id("d")
    assert len(table.all()) == 5


async def test_what_is_not_there_is_named_safely(table: Agents) -> None:
    for name in ("nobody", agent_id("z"), "../etc", "\x1b[2J", "x" * 10_000, ""):
        with pytest.raises(NotFound) as caught:
            table.find(name)
        assert "\x1b" not in caught.value.message
        assert len(caught.value.message) < 300
    table.add(make_agent("a", State.EXITED))
    with pytest.raises(Conflict, match="EXITED"):
        table.find_live("agent-a")


async def test_selectors_mean_whom_they_say(table: Agents) -> None:
    table.add(make_agent("a", labels={"team": "red", "tier": "1"}))
    table.add(make_agent("b", labels={"team": "red"}, policy="strict"))
    table.add(make_agent("c", labels={"team": "blue"}, owner="o"))
    table.add(make_agent("d", State.EXITED, labels={"team": "red"}))

    def chosen(*, live_only: bool = True, **what: object) -> str:
        found = table.select(Selector(**what), live_only=live_only)  # type: ignore[arg-type]
        return "".join(agent.agent_id[3] for agent in found)

    assert chosen(labels=(("team", "red"),)) == "ab"
    assert chosen(labels=(("team", "red"),), live_only=False) == "abd"
    assert chosen(labels=(("team", "red"), ("tier", "1"))) == "a"
    assert chosen(labels=(("team", "red"),), policy="strict") == "b"
    assert chosen(owner="o") == "c"
    assert chosen(all=True) == "abc"
    assert chosen(labels=(("team", "green"),)) == ""
    # Named ones are meant also when they have ended: killing again answers the same.
    assert chosen(agents=("agent-d", agent_id("a"))) == "da"
    with pytest.raises(InvalidInput, match="empty"):
        table.select(Selector(), live_only=True)
    with pytest.raises(NotFound):
        chosen(agents=("agent-a", "nobody"))


async def test_states_move_along_the_table_only(table: Agents) -> None:
    agent = make_agent("a", State.STARTING)
    table.add(agent)
    table.apply(agent, Event.EXEC_OK)
    started = agent.started_at_ns
    assert started is not None
    table.apply(agent, Event.FREEZE)
    table.apply(agent, Event.THAW)
    assert agent.started_at_ns == started
    with pytest.raises(Conflict):
        table.apply(agent, Event.LAUNCH_FAILED)
    assert not agent.ended.is_set()
    table.apply(agent, Event.KILL)
    assert not agent.ended.is_set()
    table.apply(agent, Event.CGROUP_EMPTY)
    ended = agent.ended_at_ns
    assert agent.ended.is_set()
    table.apply(agent, Event.EXITED)
    assert (agent.state, agent.ended_at_ns) == (State.KILLED, ended)


async def test_an_exit_that_is_heard_of_before_the_exec_is_an_exit(table: Agents) -> None:
    agent = make_agent("a", State.STARTING)
    table.add(agent)
    table.apply(agent, Event.EXITED)
    table.apply(agent, Event.EXEC_OK)
    assert (agent.state, agent.started_at_ns) == (State.EXITED, agent.ended_at_ns)
    assert agent.started_at_ns is not None


async def test_a_watcher_misses_no_change(table: Agents) -> None:
    told: list[str] = []
    table.on_change.append(lambda agent: told.append(agent.state.value))
    agent = make_agent("a", State.STARTING)
    before = table.version
    waiting = asyncio.ensure_future(table.wait_changed(before))
    await asyncio.sleep(0)
    assert not waiting.done()
    table.add(agent)
    table.apply(agent, Event.EXEC_OK)
    assert await waiting > before
    assert await table.wait_changed(before) == table.version
    assert told == ["STARTING", "RUNNING"]
    assert agent.version == table.version


async def test_ended_agents_are_forgotten_oldest_first_and_live_ones_never(
    table: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ENDED_AGENTS_KEPT_MAX", 2)
    table.add(make_agent("a"))
    for letter in "bcd":
        table.add(make_agent(letter, State.EXITED))
    table.add(make_agent("e"))
    assert [agent.agent_id[3] for agent in table.all()] == ["a", "c", "d", "e"]
    with pytest.raises(NotFound):
        table.find("agent-b")
    assert table.find("agent-c").agent_id == agent_id("c")


def test_a_description_survives_the_launchers_keeping() -> None:
    grants = (LaunchGrant("gr_x", "llm:*", "policy:default"),)
    made = make_agent(
        "a", command=("sh", "-c", "\udcff"), grants=grants, labels={"k": "v"}, budget={"llm_tokens": None}
    )
    kept = json.loads(json.dumps(made.what.to_json()))
    assert Description.from_json(kept) == made.what
    for missing in ("command", "agent_id", "slot"):
        with pytest.raises((TypeError, KeyError)):
            Description.from_json({key: value for key, value in kept.items() if key != missing})
    with pytest.raises(TypeError):
        Description.from_json({**DESCRIPTION.to_json(), "unknown": 1})
    with pytest.raises(TypeError):
        Description.from_json({**DESCRIPTION.to_json(), "command": "sh -c"})
