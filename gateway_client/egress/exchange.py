"""One exchange as a lifecycle: a table of what may follow what, the facts its outcome tells, and its bytes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from gateway_client.egress.decide import BUDGET_SPENT
from gateway_client.egress.messages import Outcome, Usage

if TYPE_CHECKING:
    from gateway_client.egress.allowance import Allowance, Loan
    from gateway_client.egress.messages import HttpVersion

guardrails_chars_max: Final = 500


class State(Enum):
    ASKED = auto()
    """The daemon has the question; nothing has left."""
    DIALING = auto()
    """Allowed and recorded; the socket is not here yet."""
    OPEN = auto()
    """Bytes may go both ways."""
    ENDED = auto()


class Event(Enum):
    ALLOWED = auto()
    CONNECTED = auto()
    END = auto()
    """Answered by the worker or the gateway, refused, failed or cut."""


NEXT: Final = {
    (State.ASKED, Event.ALLOWED): State.DIALING,
    (State.ASKED, Event.END): State.ENDED,
    (State.DIALING, Event.CONNECTED): State.OPEN,
    (State.DIALING, Event.END): State.ENDED,
    (State.OPEN, Event.END): State.ENDED,
}


class WrongOrder(RuntimeError):  # noqa: N818 - named for what it says
    """An event that the table does not have: nothing may be sent on its strength."""


def transition(state: State, event: Event) -> State:
    """Give the next state; raise WrongOrder where the table has none."""
    following = NEXT.get((state, event))
    if following is None:
        raise WrongOrder(f"cannot follow {event.name} in state {state.name}")
    return following


class BytesSpent(Exception):  # noqa: N818 - named for what it says
    """No more bytes may pass."""


class GrantSpent(BytesSpent):
    def __init__(self) -> None:
        super().__init__("the bytes of the grant are used up")


class BudgetSpent(BytesSpent):
    def __init__(self) -> None:
        super().__init__(BUDGET_SPENT)


@dataclass(slots=True)
class Exchange:
    """What is known of one exchange so far. `state` changes through `advance` alone."""

    x: int
    agent_id: str
    started: float
    state: State = State.ASKED
    status: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    usage: Usage | None = None
    request_sha256: str = ""
    response_sha256: str = ""
    error: str = ""
    allowance: Allowance | None = None
    loan: Loan | None = None
    """None: no budget bounds the bytes of its agent."""
    waiting: int = 0
    """How often it waits for more of its loan: it then learns from that where there is none."""
    first_byte: float | None = None
    """When the first byte of the answer's body came, on the clock of `started`."""
    guardrails: str = ""
    protocol: HttpVersion | None = None

    def advance(self, event: Event) -> None:
        self.state = transition(self.state, event)

    async def take(self, count: int) -> None:
        """Return once that many more bytes may pass; raise BytesSpent where its grant or budget does not have them."""
        if self.allowance is not None and not self.allowance.take(count):
            raise GrantSpent
        if self.loan is not None and not self.loan.take_now(count):
            self.waiting += 1
            try:
                taken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
                self.loan.when_taken(count, lambda there: None if taken.done() else taken.set_result(there))
                if not await taken:
                    raise BudgetSpent
            finally:
                self.waiting -= 1

    @property
    def used_up(self) -> str:
        """Say what of its bounds no more bytes are left of; empty where there are."""
        if self.allowance is not None and self.allowance.spent:
            return str(GrantSpent())
        return BUDGET_SPENT if self.loan is not None and self.loan.spent else ""

    def outcome(self, *, now: float) -> Outcome:
        return Outcome(
            x=self.x,
            agent_id=self.agent_id,
            status=self.status,
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            duration_ms=max(0, round((now - self.started) * 1000)),
            usage=self.usage,
            request_sha256=self.request_sha256,
            response_sha256=self.response_sha256,
            error=self.error[:200],
            grant_spent=self.allowance is not None and self.allowance.spent,
            first_byte_ms=None if self.first_byte is None else max(0, round((self.first_byte - self.started) * 1000)),
            guardrails=self.guardrails[:guardrails_chars_max],
            protocol=self.protocol,
        )
