"""Bytes of budgets, lent to egress workers a part at a time: what passes was set aside here before, and is on disk.

A worker counts where bytes pass, tells what passed, asks for more before a loan is gone, and gives back what is left
when nothing of the agent is open. So no agent and no label ever passes more than its budget, whichever workers serve
them, and a daemon that is killed finds what was lent counted as spent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from supervisord.budgets import Amounts
from supervisord.errors import StockadeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from supervisord.ids import AgentId
    from supervisord.ledgers import Ledgers

log = structlog.get_logger()

LOANS_PER_REST: Final = 64
"""A loan is this part of what is left: agents of a label keep little from each other."""
LOAN_BYTES_MIN: Final = 64 * 1024
LOAN_BYTES_MAX: Final = 16 * 1024 * 1024
WANT_BYTES_MAX: Final = 32 * 1024 * 1024
"""What a worker may ask for at once: a model call's body is one piece."""


@dataclass(slots=True)
class Loan:
    """What a worker has of an agent's budget and has not told to have used."""

    worker_id: str
    held: int = 0


class Loans:
    """One for the daemon.

    `tell` sends (worker_id, agent_id, bytes, whether that was all) to a worker; False where that worker is gone.
    """

    def __init__(self, ledgers: Ledgers, tell: Callable[[str, AgentId, int, bool], bool]) -> None:
        self._ledgers = ledgers
        self._tell = tell
        self._loans: dict[AgentId, Loan] = {}

    def left(self, agent_id: AgentId) -> int | None:
        """Give how many bytes may still pass, what is lent among them; None where nothing bounds them."""
        left, loan = self._ledgers.bytes_left(agent_id), self._loans.get(agent_id)
        return None if left is None else left + (0 if loan is None else loan.held)

    async def lend(self, worker_id: str, agent_id: AgentId) -> None:
        """Have a worker have enough for one more exchange to begin; raises CannotStore."""
        left = self._ledgers.bytes_left(agent_id)
        if left is None:
            return
        loan = self._loan(worker_id, agent_id)
        size = _size(left, 0)
        if loan.held < size // 2:
            await self._give(agent_id, loan, size)

    async def moved(self, worker_id: str, agent_id: AgentId, *, used: int, back: int, want: int) -> None:
        """Count what passed, and give more where it is asked for; never raises."""
        loan = self._loans.get(agent_id)
        if loan is None or loan.worker_id != worker_id:
            # A worker that was taken over may say anything, but of what it was lent alone.
            if want > 0 and self._ledgers.bytes_left(agent_id) is not None:
                loan = self._loan(worker_id, agent_id)
            else:
                return
        used = min(max(used, 0), loan.held)
        self._settle(agent_id, loan, used, used=True)
        self._settle(agent_id, loan, min(max(back, 0), loan.held), used=False)
        if want > 0:
            left = self._ledgers.bytes_left(agent_id)
            try:
                await self._give(agent_id, loan, 0 if left is None else _size(left, want))
            except StockadeError as error:
                # No record, no bytes: what is open ends as if the budget had.
                log.error(
                    "bytes of a budget are refused since they cannot be kept", agent=agent_id, cause=error.message
                )
                self._tell(loan.worker_id, agent_id, 0, True)

    def lost(self, worker_id: str) -> None:
        """Count all that a dead worker had as spent: it may have passed."""
        for agent_id, loan in [item for item in self._loans.items() if item[1].worker_id == worker_id]:
            self._settle(agent_id, loan, loan.held, used=True)

    def _loan(self, worker_id: str, agent_id: AgentId) -> Loan:
        loan = self._loans.get(agent_id)
        if loan is not None and loan.worker_id != worker_id:
            self._settle(agent_id, loan, loan.held, used=True)
            loan = None
        return Loan(worker_id) if loan is None else loan

    async def _give(self, agent_id: AgentId, loan: Loan, size: int) -> None:
        if size:
            begins = loan.held == 0
            self._ledgers.reserve(agent_id, Amounts(egress_bytes=size), (), begins=begins)
            loan.held += size
            self._loans[agent_id] = loan
            try:
                await self._ledgers.cover(agent_id)
            except StockadeError:
                self._settle(agent_id, loan, min(size, loan.held), used=False)
                raise
        if not self._tell(loan.worker_id, agent_id, size, not self._ledgers.bytes_left(agent_id)):
            # It died before it was lent this, so nobody will count or give it back.
            self._settle(agent_id, loan, min(size, loan.held), used=False)

    def _settle(self, agent_id: AgentId, loan: Loan, count: int, *, used: bool) -> None:
        if not count:
            return
        loan.held -= count
        if not loan.held and self._loans.get(agent_id) is loan:
            del self._loans[agent_id]
        amounts = Amounts(egress_bytes=count)
        self._ledgers.settle(agent_id, amounts, amounts if used else Amounts(), ends=not loan.held)


def _size(left: int, want: int) -> int:
    """Give how much is lent of what is left."""
    size = min(max(left // LOANS_PER_REST, LOAN_BYTES_MIN), LOAN_BYTES_MAX)
    return min(max(size, min(want, WANT_BYTES_MAX)), left)
