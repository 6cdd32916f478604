"""Every agent's budget, kept so that a restart of the daemon gives none of it back.

What is on the disk is never less than what was spent and set aside for a call that was let go: it is written ahead, a
block at a time, and a call waits for that write. A daemon that dies leaves up to a block too much counted, never too
little; one that stops in order writes the exact amounts.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog

from supervisord.budgets import NO_BUDGET, Amounts, Budget, Ledger
from supervisord.errors import StockadeError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from supervisord.ids import AgentId
    from supervisord.store import Store

log = structlog.get_logger()

BLOCKS_PER_BUDGET: Final = 64
SLACK_BLOCKS_MAX: Final = 4
"""More than this much too high, and the record is brought down again."""


@dataclass(slots=True)
class Kept:
    """A ledger, and what the disk says at least was spent of it."""

    ledger: Ledger
    durable: Amounts
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    lowering: bool = False


class Ledgers:
    """The ledgers of agents that have a budget; others cost nothing here."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: dict[AgentId, Kept] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    def open(self, agent_id: AgentId, budget: Budget, *, spent: Amounts | None = None) -> None:
        """Begin, or go on with what an earlier daemon had written down."""
        if budget != NO_BUDGET:
            known = spent or Amounts()
            self._kept[agent_id] = Kept(Ledger(budget, spent=known), known)

    def get(self, agent_id: AgentId) -> Ledger | None:
        kept = self._kept.get(agent_id)
        return None if kept is None else kept.ledger

    def reserve(self, agent_id: AgentId, amounts: Amounts) -> bool:
        """Set aside; False where the agent has no budget. Raises Exhausted."""
        kept = self._kept.get(agent_id)
        if kept is None:
            return False
        kept.ledger = kept.ledger.reserve(amounts)
        return True

    def settle(self, agent_id: AgentId, reserved: Amounts, actual: Amounts) -> None:
        kept = self._kept.get(agent_id)
        if kept is None:
            return
        kept.ledger = kept.ledger.settle(reserved, actual)
        budget = kept.ledger.budget
        if not kept.ledger.used().within(kept.durable, budget):
            self._in_background(self._settled(agent_id, self.cover))
        elif not kept.lowering and _slack(kept):
            kept.lowering = True
            self._in_background(self._settled(agent_id, self._lower))

    async def cover(self, agent_id: AgentId) -> None:
        """Return once the disk says at least what is spent and set aside now; raises CannotStore."""
        kept = self._kept.get(agent_id)
        if kept is None:
            return
        while not kept.ledger.used().within(kept.durable, kept.ledger.budget):
            async with kept.lock:
                used = kept.ledger.used()
                if used.within(kept.durable, kept.ledger.budget):
                    return
                await self._write(agent_id, kept, used + block(kept.ledger.budget))

    async def _lower(self, agent_id: AgentId) -> None:
        kept = self._kept.get(agent_id)
        if kept is None or self._closing:
            return
        try:
            async with kept.lock:
                await self._write(agent_id, kept, kept.ledger.used() + block(kept.ledger.budget))
        finally:
            kept.lowering = False

    async def _write(self, agent_id: AgentId, kept: Kept, amounts: Amounts) -> None:
        # While it is being written the disk may say either: only the smaller of the two may be relied on.
        kept.durable = kept.durable.least(amounts)
        await self._store.save_spent(agent_id, amounts)
        kept.durable = amounts

    async def _settled(self, agent_id: AgentId, write: Callable[[AgentId], Coroutine[object, object, None]]) -> None:
        try:
            await write(agent_id)
        except StockadeError as error:  # the next call waits for it again, or is refused
            log.error("what an agent spent is not on the disk", agent=agent_id, cause=error.message)

    def forget(self, agent_id: AgentId) -> None:
        if self._kept.pop(agent_id, None) is not None:
            self._in_background(self._settled(agent_id, self._store.drop_spent))

    async def close(self) -> None:
        """Write the exact amounts: what is set aside for calls under way counts as spent."""
        self._closing = True
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for agent_id, kept in self._kept.items():
            async with kept.lock:
                await self._settled(agent_id, self._exact(kept))

    def _exact(self, kept: Kept) -> Callable[[AgentId], Coroutine[object, object, None]]:
        async def write(agent_id: AgentId) -> None:
            await self._write(agent_id, kept, kept.ledger.used())

        return write

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def block(budget: Budget) -> Amounts:
    """What is written ahead at a time: a small part of each limit."""
    return Amounts(_part(budget.llm_tokens), _part(budget.cost_microusd), _part(budget.requests))


def _part(limit: int | None) -> int:
    return 0 if limit is None else max(limit // BLOCKS_PER_BUDGET, 1)


def _slack(kept: Kept) -> bool:
    budget, used, part = kept.ledger.budget, kept.ledger.used(), block(kept.ledger.budget)
    allowed = used
    for _ in range(SLACK_BLOCKS_MAX):
        allowed += part
    return not kept.durable.within(allowed, budget)
