"""What is said and done as budgets end: once each, whoever fails and whoever restarts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest

from supervisord import budget_watch as module
from supervisord.agents import Agent, Agents
from supervisord.budget_watch import BudgetWatch
from supervisord.budgets import Amounts, Budget, LabelBudget, Period
from supervisord.errors import Unavailable
from supervisord.launcher_link import Reply
from supervisord.ledgers import Ledgers
from supervisord.lifecycle import Event, State
from supervisord.store import Store
from tests.support.made import make_agent, ticks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from supervisord.actions.types import Action

SHARED = LabelBudget("team=payments", Budget(requests=4), Period.NONE)


class Bench:
    """A watch whose launcher, log, freeze and kill are this."""

    def __init__(self, store: Store, budget: Budget, on_exhausted: str = "deny") -> None:
        self.store = store
        self.now = 100.0
        self.cpu_usec = 0
        self.failing = False
        self.said: list[Action] = []
        self.done: list[tuple[str, str, str]] = []
        self.agents = Agents(now_ns=ticks())
        self.agent = make_agent(
            budget=budget.to_json(), on_exhausted=on_exhausted, launched_mono=100.0, labels={"team": "payments"}
        )
        self.agents.add(self.agent)
        self.start(budget)

    def start(self, budget: Budget) -> None:
        """Begin as a daemon does, also one that comes back."""
        self.ledgers = Ledgers(self.store, labels=[SHARED])
        self.watch = BudgetWatch(
            agents=self.agents,
            ledgers=self.ledgers,
            launcher=cast("Any", self),
            store=self.store,
            note=self.note,
            freeze=self.freeze,
            kill=self.kill,
            now=lambda: self.now,
        )
        self.ledgers.open(self.agent.agent_id, budget, labels=self.agent.what.labels)

    async def call(self, op: str, *, agent_ids: list[str], seconds_max: float) -> Reply:
        assert (op, seconds_max) == ("stats", module.STATS_SECONDS_MAX)
        if self.failing:
            raise Unavailable("cannot reach the launcher")
        return Reply({"stats": {agent_id: {"cpu_usec": self.cpu_usec} for agent_id in agent_ids}}, ())

    async def note(self, action: Action) -> None:
        self.said.append(action)

    async def freeze(self, agents: Sequence[Agent], *, actor: str, reason: str) -> None:
        self._do("freeze", actor, reason)
        self.agents.apply(agents[0], Event.FREEZE)

    async def kill(self, agents: Sequence[Agent], *, actor: str, reason: str) -> None:
        self._do("kill", actor, reason)
        self.agents.apply(agents[0], Event.KILL)

    def _do(self, what: str, actor: str, reason: str) -> None:
        if self.failing:
            raise Unavailable("cannot reach the launcher")
        self.done.append((what, actor, reason))

    async def spend(self, **amounts: int) -> None:
        wanted = Amounts(**amounts)
        self.ledgers.reserve(self.agent.agent_id, wanted)
        self.ledgers.settle(self.agent.agent_id, wanted, wanted)
        await self.look()

    async def look(self) -> None:
        await self.watch.poll()
        while tasks := list(self.watch._tasks):
            await asyncio.gather(*tasks)
            await asyncio.sleep(0)  # what is done is taken out


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await Store.open(tmp_path / "state.db", boot_id="b")
    yield store
    await store.close()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)


async def test_each_bound_is_noticed_once_also_over_a_restart(store: Store) -> None:
    budget = Budget(llm_tokens=100, cost_microusd=1_000_000)
    bench = Bench(store, budget)
    await bench.spend(llm_tokens=79)
    assert bench.said == []
    await bench.spend(llm_tokens=1)
    await bench.spend(llm_tokens=20)
    (told,) = bench.said
    assert (told.verb, told.verdict, told.actor, told.object) == ("agent.budget", "notice", "daemon", "llm_tokens")
    assert told.details == {"bound": "llm_tokens", "spent": 80, "limit": 100}
    bench.start(budget)
    await bench.watch.load()
    await bench.spend(llm_tokens=100)
    assert len(bench.said) == 1
    assert bench.done == []


async def test_a_label_is_noticed_once_for_all_its_agents(store: Store) -> None:
    bench = Bench(store, Budget())
    other = make_agent("b", labels={"team": "payments"})
    bench.agents.add(other)
    bench.ledgers.open(other.agent_id, Budget(), labels=other.what.labels)
    for _ in range(4):
        await bench.spend(requests=1)
    (told,) = bench.said
    assert told.details == {"bound": "requests", "spent": 4, "limit": 4, "label": "team=payments", "since": ""}


async def test_an_agent_is_frozen_once_for_what_is_used_up_and_again_for_more(store: Store) -> None:
    budget = Budget(llm_tokens=10, wall_ms=5000)
    bench = Bench(store, budget, "freeze")
    await bench.spend(llm_tokens=10)
    await bench.look()
    assert bench.done == [("freeze", "daemon", "budget llm_tokens: 10 of 10 spent")]
    bench.agents.apply(bench.agent, Event.THAW)
    await bench.look()
    bench.start(budget)
    await bench.watch.load()
    bench.ledgers.open(bench.agent.agent_id, budget, spent=Amounts(llm_tokens=10))
    await bench.look()
    assert len(bench.done) == 1
    bench.now += 5
    await bench.look()
    assert bench.done[1:] == [("freeze", "daemon", "budget wall_clock: 5 of 5 spent")]


async def test_what_fails_is_tried_again(store: Store) -> None:
    bench = Bench(store, Budget(requests=1), "kill")
    bench.failing = True
    await bench.spend(requests=1)
    assert bench.done == []
    bench.failing = False
    await bench.look()
    await bench.look()
    assert [what for what, _, _ in bench.done] == ["kill"]


@pytest.mark.parametrize("state", [State.STARTING, State.FROZEN])
async def test_only_what_runs_is_frozen(store: Store, state: State) -> None:
    bench = Bench(store, Budget(wall_ms=1000), "freeze")
    bench.agent.state = state
    bench.now += 2
    await bench.look()
    assert bench.done == []
    bench.agent.state = State.RUNNING
    await bench.look()
    assert [what for what, _, _ in bench.done] == ["freeze"]


async def test_times_are_measured_and_never_become_less(store: Store) -> None:
    bench = Bench(store, Budget(wall_ms=10_000, cpu_ms=10_000), "kill")
    bench.now, bench.cpu_usec = 104.0, 9_999_000
    await bench.look()
    assert {use.bound: use.spent for use in bench.ledgers.uses(bench.agent.agent_id)[:2]} == {
        "wall_clock": 4000,
        "cpu_seconds": 9999,
    }
    assert bench.done == []
    bench.failing = True  # not known is not nothing
    await bench.look()
    assert bench.ledgers.uses(bench.agent.agent_id)[1].spent == 9999
    bench.failing, bench.cpu_usec = False, 10_000_000
    await bench.look()
    assert bench.done == [("kill", "daemon", "budget cpu_seconds: 10 of 10 spent")]


async def test_a_label_that_is_used_up_stops_its_agents_as_their_policies_say(store: Store) -> None:
    bench = Bench(store, Budget(), "kill")
    await bench.spend(requests=3)
    assert bench.done == []
    await bench.spend(requests=1)
    assert bench.done == [("kill", "daemon", "budget requests of label team=payments: 4 of 4 spent")]


async def test_nothing_is_kept_of_agents_that_have_ended(store: Store) -> None:
    bench = Bench(store, Budget(llm_tokens=10), "freeze")
    await bench.spend(llm_tokens=10)
    assert {mark[0] for mark in await store.budget_marks()} == {bench.agent.agent_id}
    bench.ledgers.forget(bench.agent.agent_id)
    bench.watch.forget(bench.agent.agent_id)
    await bench.ledgers.close()
    assert await store.budget_marks() == set()
    assert bench.watch._marks == set()
