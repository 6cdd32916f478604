"""What an exchange takes of its grant and of budgets: set aside before it begins, settled when it has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from gateway_client.egress import messages
from gateway_client.egress.decide import Reason
from gateway_client.egress.scope import format_scope
from supervisord.actions.types import Action
from supervisord.budgets import MICROUSD_PER_USD, MODEL_CALL, OTHER_CALL, Amounts
from supervisord.errors import StockadeError
from supervisord.ids import AgentId, GrantId
from supervisord.scopes import Ended

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from supervisord.actions.types import JSON
    from supervisord.exchanges import Open
    from supervisord.ledgers import Ledgers
    from supervisord.loans import Loans
    from supervisord.scopes import Grant, GrantBook
    from supervisord.store import Store

log = structlog.get_logger()


class Settling:
    """Counts what exchanges use; `cut` ends those on a grant whose bytes have run out."""

    def __init__(
        self,
        *,
        book: GrantBook,
        ledgers: Ledgers,
        loans: Loans,
        store: Store,
        cut: Callable[[GrantId], object],
        note: Callable[[Action], Coroutine[object, object, None]],
        in_background: Callable[[Coroutine[object, object, None]], None],
    ) -> None:
        self._book = book
        self._ledgers = ledgers
        self._loans = loans
        self._store = store
        self._cut = cut
        self._note = note
        self._in_background = in_background

    def take(self, verdict: messages.Allow, opened: Open) -> messages.Allow | messages.Refuse:
        """Set aside a use of the grant and its part of the budget, before anything else can."""
        amounts = Amounts(llm_tokens=verdict.reserve_tokens, requests=1)
        bounds = MODEL_CALL if verdict.upstream is messages.Upstream.API else OTHER_CALL
        metered = False
        try:
            if verdict.counted:
                metered = self._ledgers.reserve(AgentId(opened.agent_id), amounts, bounds)
                self._book.use(GrantId(verdict.grant_id))
        except StockadeError as error:
            if metered:
                self._ledgers.settle(AgentId(opened.agent_id), amounts, Amounts())
            exhausted = Reason.BUDGET_EXHAUSTED if "budget" in error.message else Reason.GRANT_USED_UP
            status = 429 if exhausted is Reason.BUDGET_EXHAUSTED else 403
            return messages.Refuse(status, exhausted, error.message, scope=verdict.scope if status == 403 else "")  # noqa: PLR2004
        opened.grant_id, opened.metered, opened.counted = verdict.grant_id, metered, verdict.counted
        opened.lent = verdict.lent
        if metered:
            opened.reserved = amounts
        return verdict

    async def keep(self, opened: Open) -> None:
        """Write down what was taken of budget and counted uses, so that a restart gives none of it again."""
        if opened.metered:
            await self._ledgers.cover(AgentId(opened.agent_id))
        if opened.lent:
            await self._loans.lend(opened.worker_id, AgentId(opened.agent_id))
        if opened.grant_id:
            grant = self._book.get(GrantId(opened.grant_id))
            if grant.max_uses is not None:
                await self._store.update_uses({grant.grant_id: grant.uses + grant.reserved})

    def give_back(
        self,
        opened: Open,
        *,
        used: bool,
        actual: Amounts | None = None,
        bytes_used: int = 0,
        spent: bool = False,
    ) -> None:
        """Settle an exchange with its grant and the budget, once; `actual` is what it used of the budget."""
        if not opened.grant_id or opened.settled:
            return
        opened.settled = True
        cost = actual.cost_microusd if actual else 0
        self._settle(opened, used=used, bytes_used=bytes_used, cost_microusd=cost, spent=spent)
        if opened.metered:
            self._ledgers.settle(AgentId(opened.agent_id), opened.reserved, actual or Amounts())

    def _settle(self, opened: Open, *, used: bool, bytes_used: int, cost_microusd: int, spent: bool) -> None:
        """Count what an exchange took of its grant; one whose bytes have run out carries none any more."""
        grant_id = GrantId(opened.grant_id)
        before = self._book.get(grant_id) if self._book.knows(grant_id) else None
        grant = self._book.settle(
            grant_id,
            used=used,
            counted=opened.counted,
            bytes_used=bytes_used,
            cost_microusd=cost_microusd,
            spent=spent,
        )
        if before is None or grant is None:
            return
        if grant.ended is Ended.SPENT and before.ended is None:
            if grant.bytes_left == 0:
                self._cut(grant_id)
            self._in_background(self._keep_amounts(grant, ended=True))
        elif (grant.max_bytes is not None and bytes_used) or (grant.max_cost_microusd is not None and cost_microusd):
            self._in_background(self._keep_amounts(grant))

    async def _keep_amounts(self, grant: Grant, *, ended: bool = False) -> None:
        try:
            # As it is by now: it may have been taken back since.
            await self._store.save_grant(self._book.get(grant.grant_id) if self._book.knows(grant.grant_id) else grant)
        except StockadeError as error:
            log.error("what a grant was used for is not on the disk", grant=grant.grant_id, cause=error.message)
        if ended:
            details: dict[str, JSON] = {"grant_id": grant.grant_id, "uses": grant.uses}
            if grant.max_bytes is not None:
                details["bytes"] = grant.bytes_used
            if grant.max_cost_microusd is not None:
                details["cost_usd"] = grant.cost_microusd / MICROUSD_PER_USD
            scope = format_scope(grant.scope)
            await self._note(Action(grant.agent_id, "daemon", "grant.spend", scope, "done", "used up", details))
