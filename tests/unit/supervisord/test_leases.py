"""Who froze an agent last decides whether a renewal of its lease lets it go on, whatever came in between."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from supervisord.acts import Acts
from supervisord.agents import Agents
from supervisord.leases import Leases
from supervisord.lifecycle import State
from tests.support.made import make_agent, ticks

if TYPE_CHECKING:
    from pathlib import Path

    from supervisord.actions.types import Action


class World:
    """One agent with a lease that has lapsed, and what an order goes through, which can be made to wait."""

    def __init__(self, directory: Path) -> None:
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.calls: list[str] = []
        self.gate: list[str] = []
        self.now = 0.0
        self.agents = Agents(now_ns=ticks())
        self.agent = make_agent("a", State.RUNNING, lease_seconds=10.0)
        self.agents.add(self.agent)
        this: Any = self
        names = ("config", "policies", "book", "exchanges", "requests", "holds", "store", "endings")
        others: Any = dict.fromkeys((*names, "entropy", "now_ns"))
        self.acts = Acts(agents=self.agents, actions=this, launcher=this, plane=this, files=this, **others)
        self.leases = Leases(
            agents=self.agents, acts=self.acts, killswitch=this, actions=this, directory=directory / "leases",
            now=lambda: self.now,
        )  # fmt: skip
        self.acts.on_freeze.append(self.leases.frozen)
        self.agents.on_change.append(self.leases.changed)
        self.leases.changed(self.agent)
        self._lock = asyncio.Lock()

    async def record(self, _action: Action) -> None:
        await asyncio.sleep(0)

    note = record

    async def call(self, verb: str, *, agent_id: str) -> None:
        assert agent_id == self.agent.agent_id
        await self.go_on.wait()
        self.calls.append(verb)

    def freeze(self, _agent_id: str) -> None:
        self.gate.append("freeze")

    def thaw(self, _agent_id: str) -> None:
        self.gate.append("thaw")

    def lock(self, _agent: Any) -> asyncio.Lock:
        return self._lock

    async def settle(self, _agent: Any) -> None: ...

    async def lapse(self) -> None:
        self.now = 11.0
        self.leases._take_steps()
        await asyncio.sleep(0.01)


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_a_renewal_lets_go_on_what_its_lapse_alone_froze(world: World) -> None:
    await world.lapse()
    assert (world.agent.state, world.calls) == (State.FROZEN, ["freeze"])
    await world.leases.renew(world.agent, actor="holder")
    assert (world.agent.state, world.calls[-1], world.gate[-1]) == (State.RUNNING, "thaw", "thaw")


@pytest.mark.parametrize("when", ["with the lapse", "after it"])
async def test_no_renewal_ends_a_freeze_of_somebody_elses(world: World, when: str) -> None:
    if when == "with the lapse":
        world.go_on.clear()
    await world.lapse()
    ordered = asyncio.create_task(world.acts.freeze([world.agent], actor="uid:0(root)", reason="mine"))
    await asyncio.sleep(0.01)
    world.go_on.set()
    await ordered
    await asyncio.sleep(0.01)
    await world.leases.renew(world.agent, actor="holder")
    assert (world.agent.state, set(world.calls), world.gate[-1]) == (State.FROZEN, {"freeze"}, "freeze")


async def test_a_freeze_that_comes_while_a_renewal_thaws_is_what_stands(world: World) -> None:
    await world.lapse()
    world.go_on.clear()
    renewed = asyncio.create_task(world.leases.renew(world.agent, actor="holder"))
    await asyncio.sleep(0.01)
    ordered = asyncio.create_task(world.acts.freeze([world.agent], actor="uid:0(root)", reason="mine"))
    await asyncio.sleep(0.01)
    world.go_on.set()
    await asyncio.gather(renewed, ordered)
    assert (world.agent.state, world.calls[-1], world.gate[-1]) == (State.FROZEN, "freeze", "freeze")


async def test_a_renewal_whose_caller_went_away_is_done_all_the_same(world: World) -> None:
    await world.lapse()
    world.go_on.clear()
    renewed = asyncio.create_task(world.leases.renew(world.agent, actor="holder"))
    await asyncio.sleep(0.01)
    renewed.cancel()
    await asyncio.sleep(0.01)
    world.go_on.set()
    await asyncio.sleep(0.01)
    assert (world.agent.state, world.gate[-1]) == (State.RUNNING, "thaw")
