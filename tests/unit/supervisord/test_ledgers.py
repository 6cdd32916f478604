"""Budgets over restarts: what the disk says is never less than what was spent or is under way."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisord.budgets import Amounts, Budget, LabelBudget, Period
from supervisord.errors import Exhausted
from supervisord.ids import AgentId
from supervisord.ledgers import BLOCKS_PER_BUDGET, SLACK_BLOCKS_MAX, Ledgers
from supervisord.store import CannotStore, Store

if TYPE_CHECKING:
    from pathlib import Path

AGENT = AgentId("ag_" + "a" * 26)
OTHER = AgentId("ag_" + "b" * 26)
LABELS = {"team": "payments"}
DAY = 86400.0


class Disk:
    """Writes that end when they end, in order, and sometimes fail."""

    def __init__(self) -> None:
        self.says = Amounts()
        self.full = False
        self.writes = 0

    async def save_spent(self, _agent_id: str, amounts: Amounts) -> None:
        await asyncio.sleep(0)
        if self.full:
            raise CannotStore("cannot keep what was spent: no space")
        self.says = amounts
        self.writes += 1

    async def drop_spent(self, _agent_id: str) -> None:
        self.says = Amounts()


def ledgers_on(disk: Disk) -> Ledgers:
    return Ledgers(cast("Any", disk))


async def test_what_was_spent_is_spent_after_a_restart(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "state.db", boot_id="b")
    before = Ledgers(store)
    before.open(AGENT, Budget(requests=640, llm_tokens=10**6))
    for _ in range(100):
        before.reserve(AGENT, Amounts(requests=1, llm_tokens=100))
        await before.cover(AGENT)
        before.settle(AGENT, Amounts(requests=1, llm_tokens=100), Amounts(requests=1, llm_tokens=50))
    # Killed here: the next daemon knows what the disk says.
    after = Ledgers(store)
    after.open(AGENT, Budget(requests=640, llm_tokens=10**6), spent=(await store.spent())[AGENT])
    ledger = after.get(AGENT)
    assert ledger is not None
    assert 100 <= ledger.spent.requests <= 100 + 10 * (1 + SLACK_BLOCKS_MAX)
    # Stopped in order instead, nothing is counted that was not used.
    await before.close()
    assert (await store.spent())[AGENT] == Amounts(requests=100, llm_tokens=5000)
    await store.close()


async def test_a_call_waits_for_the_disk_and_is_refused_where_it_is_full() -> None:
    disk = Disk()
    ledgers = ledgers_on(disk)
    ledgers.open(AGENT, Budget(requests=1000))
    disk.full = True
    ledgers.reserve(AGENT, Amounts(requests=1))
    with pytest.raises(CannotStore):
        await ledgers.cover(AGENT)
    disk.full = False
    await ledgers.cover(AGENT)
    assert disk.says.requests >= 1


async def test_most_calls_write_nothing() -> None:
    disk = Disk()
    ledgers = ledgers_on(disk)
    ledgers.open(AGENT, Budget(requests=64_000))
    for _ in range(5000):
        ledgers.reserve(AGENT, Amounts(requests=1))
        await ledgers.cover(AGENT)
    assert disk.says.requests >= 5000
    assert disk.writes <= 6


async def test_an_agent_without_a_budget_costs_no_write() -> None:
    disk = Disk()
    ledgers = ledgers_on(disk)
    ledgers.open(AGENT, Budget())
    assert ledgers.reserve(AGENT, Amounts(requests=1)) is False
    await ledgers.cover(AGENT)
    assert disk.writes == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 500)), min_size=1, max_size=40), st.integers(1, 5000))
def test_many_at_once_overspend_by_no_more_than_they_use_beyond_what_they_set_aside(
    calls: list[tuple[int, int]], limit: int
) -> None:
    async def one(ledgers: Ledgers, disk: Disk, wanted: int, used: int) -> int:
        amounts = Amounts(llm_tokens=wanted)
        try:
            ledgers.reserve(AGENT, amounts)
        except Exhausted:
            return 0
        await ledgers.cover(AGENT)
        ledger = ledgers.get(AGENT)
        assert ledger is not None
        assert disk.says.llm_tokens >= ledger.reserved.llm_tokens, "a call was let go that the disk does not know"
        await asyncio.sleep(0)
        ledgers.settle(AGENT, amounts, Amounts(llm_tokens=used))
        return max(used - wanted, 0)

    async def run() -> None:
        disk = Disk()
        ledgers = ledgers_on(disk)
        ledgers.open(AGENT, Budget(llm_tokens=limit))
        over = sum(await asyncio.gather(*(one(ledgers, disk, *call) for call in calls)))
        ledger = ledgers.get(AGENT)
        assert ledger is not None
        assert ledger.spent.llm_tokens <= limit + over
        assert ledger.reserved == Amounts()
        await ledgers.close()
        assert disk.says.llm_tokens == ledger.spent.llm_tokens

    asyncio.run(run())


def test_a_block_is_a_small_part_of_a_budget() -> None:
    assert BLOCKS_PER_BUDGET >= 64


def shared_by(store: Any, budget: Budget, *, now: list[float], period: Period = Period.DAY) -> Ledgers:
    return Ledgers(store, labels=[LabelBudget("team=payments", budget, period)], now_s=lambda: now[0])


async def test_a_label_is_drawn_on_by_all_its_agents_and_by_nobody_else(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "state.db", boot_id="b")
    ledgers = shared_by(store, Budget(requests=3), now=[0.0])
    ledgers.open(AGENT, Budget(requests=2), labels=LABELS)
    ledgers.open(OTHER, Budget(), labels=LABELS)
    stranger = AgentId("ag_" + "c" * 26)
    ledgers.open(stranger, Budget(), labels={"team": "search"})
    one = Amounts(requests=1)
    for agent_id in (AGENT, AGENT, OTHER):
        assert ledgers.reserve(agent_id, one)
        await ledgers.cover(agent_id)
    with pytest.raises(Exhausted, match="of budget requests: 0 left"):
        ledgers.reserve(AGENT, one)
    with pytest.raises(Exhausted, match="of label team=payments: 0 left"):
        ledgers.reserve(OTHER, one)
    assert ledgers.view(OTHER).requests_left == 0
    assert ledgers.reserve(stranger, one) is False
    await store.close()


async def test_nothing_is_set_aside_of_one_where_another_has_nothing_left(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "state.db", boot_id="b")
    ledgers = shared_by(store, Budget(requests=0), now=[0.0])
    ledgers.open(AGENT, Budget(requests=2), labels=LABELS)
    with pytest.raises(Exhausted):
        ledgers.reserve(AGENT, Amounts(requests=1))
    assert all(use.reserved == 0 for use in ledgers.uses(AGENT))
    await store.close()


async def test_what_a_label_spent_outlives_its_agents_and_the_daemon_and_not_its_day(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "state.db", boot_id="b")
    now, one = [DAY], Amounts(requests=1)
    before = shared_by(store, Budget(requests=2), now=now)
    before.open(AGENT, Budget(), labels=LABELS)
    for _ in range(2):
        before.reserve(AGENT, one)
        await before.cover(AGENT)
    before.settle(AGENT, one, one)
    before.forget(AGENT)
    before.settle(AGENT, one, Amounts())  # it ended meanwhile: what was set aside of the label is free again
    (use,) = before.shared()
    assert (use.spent, use.reserved, use.since) == (1, 0, "1970-01-02")
    assert not before.bounded(AGENT)
    await before.close()

    after = shared_by(store, Budget(requests=2), now=now)
    await after.load()
    after.open(OTHER, Budget(), labels=LABELS)
    after.reserve(OTHER, one)
    with pytest.raises(Exhausted):
        after.reserve(OTHER, one)
    now[0] = 0.0  # a clock that is set back begins nothing anew
    with pytest.raises(Exhausted):
        after.reserve(OTHER, one)
    now[0] = 2 * DAY
    after.reserve(OTHER, one)
    (use,) = after.shared()
    assert (use.spent, use.reserved, use.since) == (0, 2, "1970-01-03"), "what is under way counts in the new day"
    await after.cover(OTHER)
    assert (await store.label_spent())["team=payments", "day"][0] == "1970-01-03"
    await store.close()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 400), st.integers(0, 500)), min_size=1, max_size=40),
    st.integers(1, 5000),
)
def test_agents_of_a_label_overspend_by_no_more_than_they_use_beyond_what_they_set_aside(
    calls: list[tuple[bool, int, int]], limit: int
) -> None:
    class Labels(Disk):
        async def save_label_spent(self, _label: str, _period: str, _since: str, amounts: Amounts) -> None:
            await self.save_spent("", amounts)

    async def one(ledgers: Ledgers, disk: Disk, call: tuple[bool, int, int]) -> int:
        agent_id, (_, wanted, used) = (AGENT if call[0] else OTHER), call
        amounts = Amounts(llm_tokens=wanted)
        try:
            ledgers.reserve(agent_id, amounts)
        except Exhausted:
            return 0
        await ledgers.cover(agent_id)
        assert disk.says.llm_tokens >= ledgers.shared()[0].reserved
        await asyncio.sleep(0)
        ledgers.settle(agent_id, amounts, Amounts(llm_tokens=used))
        return max(used - wanted, 0)

    async def run() -> None:
        disk = Labels()
        ledgers = shared_by(disk, Budget(llm_tokens=limit), now=[0.0], period=Period.NONE)
        ledgers.open(AGENT, Budget(), labels=LABELS)
        ledgers.open(OTHER, Budget(), labels=LABELS)
        over = sum(await asyncio.gather(*(one(ledgers, disk, call) for call in calls)))
        (use,) = ledgers.shared()
        assert use.spent <= limit + over
        assert use.reserved == 0
        await ledgers.close()
        assert disk.says.llm_tokens == use.spent

    asyncio.run(run())
