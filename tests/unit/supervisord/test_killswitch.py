"""Nothing is dead on the daemon's word alone: the launcher is asked, and what is not proven is tried again."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any, cast

import pytest

from supervisord import killswitch as module
from supervisord.agents import Agent, Agents
from supervisord.killswitch import KillSwitch
from supervisord.launcher_link import LauncherFailed, Reply
from supervisord.lifecycle import State
from tests.support.made import make_agent, ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from supervisord.actions.types import Action

EMPTY: dict[str, object] = {"verified_empty": True, "already": False, "processes_killed": 1, "left": []}
BEFORE: dict[str, object] = {"verified_empty": True, "already": True, "processes_killed": 0, "left": []}
STUCK: dict[str, object] = {"verified_empty": False, "already": False, "left": [7], "problem": "cannot end 7"}


class Bench:
    """A kill switch with a launcher that answers `answers` in turn, the last one again and again."""

    def __init__(self, *answers: dict[str, object] | Exception) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.gone: list[str] = []
        self.noted: list[Action] = []
        self.agents = Agents(now_ns=ticks())
        self.switch = KillSwitch(
            agents=self.agents,
            actions=cast("Any", self),
            launcher=cast("Any", self),
            plane=cast("Any", self),
            sign=lambda receipt: receipt,
            ended=lambda agent: self.gone.append(agent.name),
            new_id=lambda: "rc",
            now_ns=lambda: 1,
        )

    def agent(self, state: State) -> Agent:
        agent = make_agent("a", state)
        self.agents.add(agent)
        return agent

    async def call(self, op: str, _fds: Sequence[int] = (), **_fields: object) -> Reply:
        assert op == "kill"
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        await asyncio.sleep(0)
        if isinstance(answer, Exception):
            raise answer
        return Reply(answer, ())

    async def cut(self, _agent: str) -> None: ...

    async def note(self, action: Action, *, durable: bool) -> None:
        assert durable
        self.noted.append(action)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INSIST_SECONDS", 0.001)


@pytest.mark.parametrize("state", [State.FAILED, State.EXITED, State.KILLED])
async def test_an_agent_that_ended_is_asked_for_all_the_same(state: State) -> None:
    """The table said FAILED, and it ran: the kill finds and ends it, and says so."""
    bench = Bench(EMPTY)
    (receipt,) = await bench.switch.kill([bench.agent(state)], actor="x", reason="")
    assert (receipt.verified_empty, receipt.already_dead, receipt.processes_killed) == (True, False, 1)
    bench = Bench(STUCK)
    (receipt,) = await bench.switch.kill([bench.agent(state)], actor="x", reason="")
    assert (receipt.verified_empty, receipt.left_pids) == (False, (7,))


@pytest.mark.parametrize("answer", [BEFORE, LauncherFailed({"errno": errno.errorcode[errno.ESRCH]})])
async def test_one_that_is_dead_is_dead(answer: dict[str, object] | Exception) -> None:
    bench = Bench(answer)
    (receipt,) = await bench.switch.kill([bench.agent(State.EXITED)], actor="x", reason="")
    assert (receipt.verified_empty, receipt.already_dead) == (True, True)


async def test_what_is_not_proven_stays_and_is_tried_again() -> None:
    bench = Bench(STUCK, STUCK, EMPTY)
    agent = bench.agent(State.RUNNING)
    (receipt,) = await bench.switch.kill([agent], actor="x", reason="because")
    assert not receipt.verified_empty
    assert (agent.state, bench.gone) == (State.KILLING, [])
    assert "cannot end 7" in agent.failure
    async with asyncio.timeout(5):
        await agent.ended.wait()
    assert (agent.state, bench.gone, bench.asked) == (State.KILLED, [agent.name], 3)
    # The proof is recorded, as the kill that it is of, beside what its caller was told.
    await asyncio.sleep(0.01)
    told = [(note.verb, note.actor, note.verdict, note.reason) for note in bench.noted]
    assert told == [("agent.kill", "x", "failed", "because"), ("agent.kill", "x", "done", "because")]
    assert [note.details["verified_empty"] for note in bench.noted] == [False, True]
    assert agent.failure == ""


async def test_one_that_a_second_kill_proves_dead_is_no_more_said_to_be_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "INSIST_SECONDS", 100)
    bench = Bench(STUCK, STUCK, EMPTY)
    agent = bench.agent(State.RUNNING)
    for verified in (False, False, True):
        (receipt,) = await bench.switch.kill([agent], actor="x", reason="")
        assert receipt.verified_empty is verified
        assert (agent.failure == "") is verified
    assert agent.state is State.KILLED


async def test_a_failed_launch_is_over_when_nothing_is_left() -> None:
    bench = Bench(EMPTY)
    agent = bench.agent(State.STARTING)
    assert await bench.switch.undo(agent)
    assert agent.state is State.FAILED


async def test_a_failed_launch_that_may_run_stays_and_its_slot_with_it() -> None:
    bench = Bench(STUCK, EMPTY)
    agent = bench.agent(State.STARTING)
    assert not await bench.switch.undo(agent)
    assert (agent.state, bench.gone) == (State.KILLING, [])
    async with asyncio.timeout(5):
        await agent.ended.wait()
    assert (agent.state, bench.gone) == (State.KILLED, [agent.name])
    assert bench.noted == [], "nobody ordered a kill: the launch that failed is recorded by itself"
