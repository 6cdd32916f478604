"""Bytes lent to workers: never more than agents and labels have, on disk before, and back where unused."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisord.budgets import Amounts, Budget, LabelBudget
from supervisord.ids import AgentId
from supervisord.ledgers import Ledgers
from supervisord.loans import LOAN_BYTES_MAX, LOAN_BYTES_MIN, LOANS_PER_REST, Loans
from supervisord.store import CannotStore, Store

if TYPE_CHECKING:
    from pathlib import Path

AGENT = AgentId("ag_" + "a" * 26)
OTHER = AgentId("ag_" + "b" * 26)
LABELS = {"team": "payments"}
WORKER, ANOTHER = "w1.1", "w2.1"
KIB = 1024
MIB = 1024 * KIB


class Disk:
    def __init__(self) -> None:
        self.says = 0
        self.full = False

    async def save_spent(self, _agent_id: str, amounts: Amounts) -> None:
        await asyncio.sleep(0)
        if self.full:
            raise CannotStore("cannot keep what was spent: no space")
        self.says = amounts.egress_bytes

    async def save_label_spent(self, _label: str, _period: str, _since: str, amounts: Amounts) -> None:
        await self.save_spent("", amounts)

    async def drop_spent(self, _agent_id: str) -> None:
        await asyncio.sleep(0)


class Bench:
    def __init__(self, budget: Budget, *, label: Budget | None = None) -> None:
        self.disk = Disk()
        labels = [] if label is None else [LabelBudget("team=payments", label)]
        self.ledgers = Ledgers(cast("Any", self.disk), labels=labels)
        for agent_id in (AGENT, OTHER):
            self.ledgers.open(agent_id, budget, labels=LABELS)
        self.loans = Loans(self.ledgers, self._tell)
        self.told: list[tuple[str, str, int, bool]] = []
        self.dead: set[str] = set()

    def _tell(self, worker_id: str, agent_id: AgentId, count: int, last: bool) -> bool:  # noqa: FBT001 - as Loans has it
        if worker_id in self.dead:
            return False
        self.told.append((worker_id, agent_id, count, last))
        return True

    def die(self, worker_id: str) -> None:
        self.dead.add(worker_id)
        self.loans.lost(worker_id)

    def use(self) -> tuple[int, int]:
        """What the first bound that holds the agent says is spent and set aside."""
        use = self.ledgers.uses(AGENT)[0]
        return use.spent, use.reserved


async def test_a_loan_is_a_part_of_what_is_left_and_is_not_lent_twice() -> None:
    bench = Bench(Budget(egress_bytes=64 * MIB))
    await bench.loans.lend(WORKER, AGENT)
    assert bench.told == [(WORKER, AGENT, MIB, False)]
    await bench.loans.lend(WORKER, AGENT)
    assert len(bench.told) == 1
    assert bench.loans.left(AGENT) == 64 * MIB
    await bench.loans.moved(WORKER, AGENT, used=600 * KIB, back=0, want=0)
    assert bench.loans.left(AGENT) == 64 * MIB - 600 * KIB
    await bench.loans.lend(WORKER, AGENT)
    assert len(bench.told) == 2
    assert LOANS_PER_REST * LOAN_BYTES_MIN < 64 * MIB < LOANS_PER_REST * LOAN_BYTES_MAX


async def test_more_is_lent_where_more_is_wanted_and_the_last_of_it_is_said_to_be_the_last() -> None:
    bench = Bench(Budget(egress_bytes=100 * KIB))
    await bench.loans.moved(WORKER, AGENT, used=0, back=0, want=80 * KIB)
    await bench.loans.moved(WORKER, AGENT, used=80 * KIB, back=0, want=80 * KIB)
    await bench.loans.moved(WORKER, AGENT, used=20 * KIB, back=0, want=1)
    assert [(count, last) for _, _, count, last in bench.told] == [(80 * KIB, False), (20 * KIB, True), (0, True)]
    assert bench.use() == (100 * KIB, 0)
    assert bench.loans.left(AGENT) == 0


async def test_what_is_given_back_is_free_and_what_a_dead_worker_had_is_spent() -> None:
    bench = Bench(Budget(egress_bytes=MIB))
    await bench.loans.lend(WORKER, AGENT)
    await bench.loans.moved(WORKER, AGENT, used=1000, back=LOAN_BYTES_MIN - 1000, want=0)
    assert bench.use() == (1000, 0)
    await bench.loans.lend(WORKER, AGENT)
    bench.loans.lost(ANOTHER)
    assert bench.use() == (1000, LOAN_BYTES_MIN)
    bench.loans.lost(WORKER)
    assert bench.use() == (1000 + LOAN_BYTES_MIN, 0)


async def test_a_worker_that_is_gone_already_is_lent_nothing_and_holds_nothing() -> None:
    bench = Bench(Budget(), label=Budget(egress_bytes=MIB))
    bench.die(WORKER)
    await bench.loans.lend(WORKER, AGENT)  # judged while it died
    await bench.loans.moved(WORKER, AGENT, used=0, back=0, want=5)
    assert (bench.told, bench.use(), bench.loans.left(AGENT)) == ([], (0, 0), MIB)
    bench.ledgers.forget(AGENT)
    assert not bench.ledgers.bounded(AGENT)
    # One that dies while the disk takes its loan may not have got it, and is not given it twice.
    lending = asyncio.create_task(bench.loans.lend(ANOTHER, OTHER))
    await asyncio.sleep(0)
    bench.die(ANOTHER)
    await lending
    (use,) = bench.ledgers.shared()
    assert (use.spent, use.reserved) == (LOAN_BYTES_MIN, 0)


@pytest.mark.parametrize("lie", [{"used": 10**12, "back": 0}, {"used": -5, "back": 10**12}, {"used": 1, "back": -9}])
async def test_a_worker_that_was_taken_over_frees_nothing_that_it_was_not_lent(lie: dict[str, int]) -> None:
    bench = Bench(Budget(egress_bytes=MIB))
    await bench.loans.lend(WORKER, AGENT)
    await bench.loans.moved(ANOTHER, AGENT, **lie, want=0)
    assert bench.use() == (0, LOAN_BYTES_MIN)
    await bench.loans.moved(WORKER, AGENT, **lie, want=0)
    spent, reserved = bench.use()
    assert (spent + reserved, reserved >= 0) in {(LOAN_BYTES_MIN, True), (0, True)}
    await bench.loans.moved(WORKER, AGENT, **lie, want=0)
    assert 0 <= sum(bench.use()) <= LOAN_BYTES_MIN


async def test_bytes_that_cannot_be_kept_are_not_lent() -> None:
    bench = Bench(Budget(egress_bytes=MIB))
    bench.disk.full = True
    with pytest.raises(CannotStore):
        await bench.loans.lend(WORKER, AGENT)
    assert (bench.told, bench.use()) == ([], (0, 0))
    await bench.loans.moved(WORKER, AGENT, used=0, back=0, want=5)
    assert bench.told == [(WORKER, AGENT, 0, True)]
    bench.disk.full = False
    await bench.loans.lend(WORKER, AGENT)
    assert bench.use() == (0, LOAN_BYTES_MIN)


async def test_other_bounds_that_are_used_up_keep_no_bytes_from_what_is_open() -> None:
    bench = Bench(Budget(egress_bytes=MIB, requests=0, llm_tokens=0))
    await bench.loans.moved(WORKER, AGENT, used=0, back=0, want=5)
    assert bench.told[0][2] == LOAN_BYTES_MIN


async def test_who_has_no_such_budget_is_lent_nothing() -> None:
    bench = Bench(Budget(requests=5))
    await bench.loans.lend(WORKER, AGENT)
    await bench.loans.moved(WORKER, AGENT, used=5, back=5, want=5)
    assert (bench.told, bench.loans.left(AGENT)) == ([], None)


async def test_a_label_gets_back_what_an_agent_that_ended_did_not_use() -> None:
    bench = Bench(Budget(), label=Budget(egress_bytes=MIB))
    await bench.loans.lend(WORKER, AGENT)
    bench.ledgers.forget(AGENT)
    await bench.loans.moved(WORKER, AGENT, used=7, back=LOAN_BYTES_MIN - 7, want=0)
    (use,) = bench.ledgers.shared()
    assert (use.spent, use.reserved) == (7, 0)
    assert not bench.ledgers.bounded(AGENT)


async def test_what_was_lent_is_spent_after_the_daemon_was_killed(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "state.db", boot_id="b")
    labels = [LabelBudget("team=payments", Budget(egress_bytes=8 * MIB))]
    before = Ledgers(store, labels=labels)
    before.open(AGENT, Budget(egress_bytes=4 * MIB), labels=LABELS)
    loans = Loans(before, lambda *_: True)
    await loans.lend(WORKER, AGENT)
    after = Ledgers(store, labels=labels)
    await after.load()
    after.open(AGENT, Budget(egress_bytes=4 * MIB), labels=LABELS, spent=(await store.spent())[AGENT])
    own, shared = after.uses(AGENT)
    for use, limit in ((own, 4 * MIB), (shared, 8 * MIB)):
        assert LOAN_BYTES_MIN <= use.spent <= LOAN_BYTES_MIN + limit // 64
    await store.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.integers(0, 300 * KIB), st.integers(0, 100)),
        min_size=1,
        max_size=40,
    ),
    st.integers(0, 2 * MIB),
)
def test_whatever_workers_do_no_more_is_lent_than_label_and_agents_have(
    steps: list[tuple[bool, bool, int, int]], most: int
) -> None:
    """Each step: of which agent, whether it ends, what it wants, and what part in a hundred of its loan it used."""

    async def run() -> None:
        bench = Bench(Budget(egress_bytes=MIB), label=Budget(egress_bytes=most))
        have = dict.fromkeys((AGENT, OTHER), 0)
        passed = dict.fromkeys((AGENT, OTHER), 0)
        for first, ends, want, part in steps:
            agent_id, worker = (AGENT, WORKER) if first else (OTHER, ANOTHER)
            used = have[agent_id] * part // 100
            back = have[agent_id] - used if ends else 0
            passed[agent_id] += used
            have[agent_id] -= used + back
            await bench.loans.moved(worker, agent_id, used=used, back=back, want=0 if ends else want)
            for _, lent_to, count, _ in bench.told:
                have[AgentId(lent_to)] += count
            bench.told.clear()
            assert sum(passed.values()) + sum(have.values()) <= most
            assert all(passed[each] + have[each] <= MIB for each in have)
            shared = bench.ledgers.shared()[0]
            assert (shared.spent, shared.reserved) == (sum(passed.values()), sum(have.values()))

    asyncio.run(run())
