"""Every agent's budget, and every label's, kept so that a restart of the daemon gives none of it back.

What is on the disk is never less than what was spent and set aside for a call that was let go: it is written ahead, a
block at a time, and a call waits for that write. A daemon that dies leaves up to a block too much counted, never too
little; one that stops in order writes the exact amounts.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import structlog

from supervisord.budgets import (
    MODEL_CALL,
    NO_BUDGET,
    Amounts,
    Budget,
    LabelBudget,
    Ledger,
    budget_view,
    period_start,
)
from supervisord.errors import StockadeError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from gateway_client.egress.decide import BudgetView
    from supervisord.budgets import Use
    from supervisord.ids import AgentId
    from supervisord.store import Store

log = structlog.get_logger()

BLOCKS_PER_BUDGET: Final = 64
SLACK_BLOCKS_MAX: Final = 4
"""More than this much too high, and the record is brought down again."""


@dataclass(slots=True)
class Kept:
    """A ledger, and what the disk says at least was spent of it. `agent_id` or `shared` says whose it is."""

    ledger: Ledger
    durable: Amounts
    agent_id: AgentId | None = None
    shared: LabelBudget | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    lowering: bool = False
    forgotten: bool = False

    @property
    def covered(self) -> bool:
        return self.ledger.used().within(self.durable, self.ledger.budget)


@dataclass(slots=True)
class Drawing:
    """An agent and the ledgers of its labels; kept until its last call has settled, also when it has ended."""

    shared: tuple[Kept, ...]
    under_way: int = 0
    ended: bool = False


class Ledgers:
    """The ledgers of agents and labels that have a budget; other agents cost nothing here."""

    def __init__(
        self, store: Store, *, labels: Sequence[LabelBudget] = (), now_s: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._now_s = now_s
        self._kept: dict[AgentId, Kept] = {}
        self._shared = [_begun(shared, now_s()) for shared in labels]
        self._drawings: dict[AgentId, Drawing] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self.on_spent: Callable[[AgentId], None] | None = None
        """Told of each agent that has spent something."""

    async def load(self) -> None:
        """Go on with what labels had spent under an earlier daemon; raises CannotStore. Before anybody reserves."""
        spent = await self._store.label_spent()
        for kept in self._shared:
            assert kept.shared is not None  # noqa: S101 - so made by _begun
            found = spent.get((kept.shared.label, kept.shared.period.value))
            # One of a later day than the clock has now stays: a clock set back gives nothing anew.
            if found is not None and found[0] >= kept.ledger.since:
                kept.durable = found[1]
                kept.ledger = replace(kept.ledger, since=found[0], spent=found[1])

    def open(
        self,
        agent_id: AgentId,
        budget: Budget,
        *,
        labels: Mapping[str, str] | None = None,
        spent: Amounts | None = None,
    ) -> None:
        """Begin, or go on with what an earlier daemon had written down."""
        if budget != NO_BUDGET:
            known = spent or Amounts()
            self._kept[agent_id] = Kept(Ledger(budget, spent=known), known, agent_id=agent_id)
        shared = tuple(kept for kept in self._shared if kept.shared is not None and kept.shared.means(labels or {}))
        if shared:
            self._drawings[agent_id] = Drawing(shared)

    def get(self, agent_id: AgentId) -> Ledger | None:
        """Give the agent's own ledger."""
        kept = self._kept.get(agent_id)
        return None if kept is None else kept.ledger

    def bounded(self, agent_id: AgentId) -> bool:
        return agent_id in self._kept or agent_id in self._drawings

    def uses(self, agent_id: AgentId) -> tuple[Use, ...]:
        """Give how much is used of every bound that holds the agent, its own first."""
        return tuple(use for kept in self._drawn(agent_id) for use in kept.ledger.uses())

    def shared(self) -> tuple[Use, ...]:
        """Give how much is used of every bound of every label."""
        return tuple(use for kept in self._shared for use in self._current(kept).ledger.uses())

    def view(self, agent_id: AgentId) -> BudgetView:
        """Give what decide() sees: the least that is left of all that the agent draws on."""
        left = NO_BUDGET
        for kept in self._drawn(agent_id):
            left = left.tightest(kept.ledger.left())
        return budget_view(left)

    def measured(self, agent_id: AgentId, *, wall_ms: int | None = None, cpu_ms: int | None = None) -> None:
        """Note how long the agent has run; neither ever becomes less."""
        kept = self._kept.get(agent_id)
        if kept is not None:
            ledger = kept.ledger
            kept.ledger = replace(
                ledger, wall_ms=max(ledger.wall_ms, wall_ms or 0), cpu_ms=max(ledger.cpu_ms, cpu_ms or 0)
            )

    def bytes_left(self, agent_id: AgentId) -> int | None:
        """Give how many bytes may be lent to the agent; None where nothing bounds them."""
        left = [kept.ledger.left().egress_bytes for kept in self._drawn(agent_id)]
        return min((bound for bound in left if bound is not None), default=None)

    def reserve(
        self, agent_id: AgentId, amounts: Amounts, bounds: Sequence[str] = MODEL_CALL, *, begins: bool = True
    ) -> bool:
        """Set aside, of all that the agent draws on or of none; False where it has no budget. Raises Exhausted.

        What `begins` is settled once that ends; what adds to something under way does not begin.
        """
        drawn = self._drawn(agent_id)
        after = [kept.ledger.reserve(amounts, bounds) for kept in drawn]
        for kept, ledger in zip(drawn, after, strict=True):
            kept.ledger = ledger
        drawing = self._drawings.get(agent_id)
        if drawing is not None and begins:
            drawing.under_way += 1
        return bool(drawn)

    def settle(self, agent_id: AgentId, reserved: Amounts, actual: Amounts, *, ends: bool = True) -> None:
        """Count what was reserved as it was really used; a label's also when the agent has ended meanwhile.

        Without `ends` it is a part of what is under way, which goes on.
        """
        for kept in self._drawn(agent_id):
            kept.ledger = kept.ledger.settle(reserved, actual)
            if not kept.covered:
                self._in_background(self._settled(kept, self._cover))
            elif not kept.lowering and _slack(kept):
                kept.lowering = True
                self._in_background(self._settled(kept, self._lower))
        drawing = self._drawings.get(agent_id)
        if drawing is not None and ends:
            drawing.under_way -= 1
            if drawing.ended and not drawing.under_way:
                del self._drawings[agent_id]
        if self.on_spent is not None:
            self.on_spent(agent_id)

    async def cover(self, agent_id: AgentId) -> None:
        """Return once the disk says at least what is spent and set aside now; raises CannotStore."""
        for kept in self._drawn(agent_id):
            await self._cover(kept)

    async def _cover(self, kept: Kept) -> None:
        while not kept.covered and not kept.forgotten:
            async with kept.lock:
                if kept.covered:
                    return
                await self._write(kept, kept.ledger.used() + block(kept.ledger.budget))

    async def _lower(self, kept: Kept) -> None:
        try:
            if not kept.forgotten and not self._closing:
                async with kept.lock:
                    await self._write(kept, kept.ledger.used() + block(kept.ledger.budget))
        finally:
            kept.lowering = False

    async def _exact(self, kept: Kept) -> None:
        await self._write(kept, kept.ledger.used())

    async def _write(self, kept: Kept, amounts: Amounts) -> None:
        # While it is being written the disk may say either: only the smaller of the two may be relied on.
        kept.durable = kept.durable.least(amounts)
        since = kept.ledger.since
        if kept.shared is not None:
            await self._store.save_label_spent(kept.shared.label, kept.shared.period.value, since, amounts)
        elif kept.agent_id is not None:
            await self._store.save_spent(kept.agent_id, amounts)
        if kept.ledger.since == since:  # else a period has begun meanwhile, and the disk says nothing of it
            kept.durable = amounts

    async def _settled(self, kept: Kept, write: Callable[[Kept], Coroutine[object, object, None]]) -> None:
        try:
            await write(kept)
        except StockadeError as error:  # the next call waits for it again, or is refused
            whose = kept.agent_id or (kept.shared.label if kept.shared is not None else "")
            log.error("what was spent of a budget is not on the disk", whose=whose, cause=error.message)

    def _drawn(self, agent_id: AgentId) -> list[Kept]:
        """Every ledger that the agent draws on, with the periods of now."""
        own, drawing = self._kept.get(agent_id), self._drawings.get(agent_id)
        drawn = [] if own is None else [own]
        if drawing is not None:
            drawn += map(self._current, drawing.shared)
        return drawn

    def _current(self, kept: Kept) -> Kept:
        """Begin a label's ledger anew where its period has: what is under way counts where it settles."""
        if kept.shared is not None and kept.ledger.since:
            since = period_start(kept.shared.period, self._now_s())
            if since > kept.ledger.since:
                kept.ledger = replace(kept.ledger, since=since, spent=Amounts())
                kept.durable = Amounts()
        return kept

    def forget(self, agent_id: AgentId) -> None:
        """End the agent's own ledger; a label's goes on, with what this agent spent of it."""
        kept = self._kept.pop(agent_id, None)
        if kept is not None:
            kept.forgotten = True
        drawing = self._drawings.get(agent_id)
        if drawing is not None:
            drawing.ended = True
            if not drawing.under_way:
                del self._drawings[agent_id]
        if kept is not None or drawing is not None:
            self._in_background(self._drop(agent_id))

    async def _drop(self, agent_id: AgentId) -> None:
        try:
            await self._store.drop_spent(agent_id)
        except StockadeError as error:  # dropped at the next start
            log.error("what an ended agent spent is still on the disk", agent=agent_id, cause=error.message)

    async def close(self) -> None:
        """Write the exact amounts: what is set aside for calls under way counts as spent."""
        self._closing = True
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for kept in [*self._kept.values(), *self._shared]:
            async with kept.lock:
                await self._settled(kept, self._exact)

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def block(budget: Budget) -> Amounts:
    """What is written ahead at a time: a small part of each limit."""
    return Amounts(
        _part(budget.llm_tokens), _part(budget.cost_microusd), _part(budget.requests), _part(budget.egress_bytes)
    )


def _begun(shared: LabelBudget, now_s: float) -> Kept:
    since = period_start(shared.period, now_s)
    return Kept(Ledger(shared.budget, label=shared.label, since=since), Amounts(), shared=shared)


def _part(limit: int | None) -> int:
    return 0 if limit is None else max(limit // BLOCKS_PER_BUDGET, 1)


def _slack(kept: Kept) -> bool:
    budget, used, part = kept.ledger.budget, kept.ledger.used(), block(kept.ledger.budget)
    allowed = used
    for _ in range(SLACK_BLOCKS_MAX):
        allowed += part
    return not kept.durable.within(allowed, budget)
