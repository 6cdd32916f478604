"""Budgets over restarts: what the disk says is never less than what was spent or is under way."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisord.budgets import Amounts, Budget
from supervisord.errors import Exhausted
from supervisord.ids import AgentId
from supervisord.ledgers import BLOCKS_PER_BUDGET, SLACK_BLOCKS_MAX, Ledgers
from supervisord.store import CannotStore, Store

if TYPE_CHECKING:
    from pathlib import Path

AGENT = AgentId("ag_" + "a" * 26)


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
