"""One request of an agent's: what it asks, how far it is, and how that is told."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from gateway_client.egress.scope import format_scope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway_client.egress.scope import Scope
    from supervisord.approvals import Offer
    from supervisord.ids import AgentId


class RequestState(Enum):
    PENDING = "pending"
    APPROVED = "approved"
    DENIED = "denied"
    EXPIRED = "expired"


@dataclass(slots=True)
class Request:
    """One question of an agent's. `reason` is the agent's own words: one bounded line of printable characters.

    `digest` is over all that an approver judges by, which never changes. `offers` are the approvals so far.
    """

    request_id: str
    agent_id: AgentId
    agent_name: str
    scope: Scope
    reason: str
    asked_at_ns: int
    approvers: int = 1
    digest: str = ""
    state: RequestState = RequestState.PENDING
    decided_by: str = ""
    decided_at_ns: int | None = None
    grant_id: str = ""
    answer: str = ""
    offers: tuple[Offer, ...] = ()
    deciding: bool = False
    version: int = 0
    expiry: asyncio.TimerHandle | None = None
    """Set where only a held call asks: it is not asked any more when its time is up."""
    decided: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def approved_by(self) -> tuple[str, ...]:
        return tuple(offer.by for offer in self.offers)


@dataclass(frozen=True, slots=True)
class Held:
    """How the wait of a denied call ended, and what its agent is told."""

    granted: bool
    said: str = ""


@contextmanager
def deciding(request: Request) -> Iterator[None]:
    """Keep everybody else from deciding while this decision waits for the disk: one request makes one grant."""
    request.deciding = True
    try:
        yield
    finally:
        request.deciding = False


def keep_asking(request: Request) -> None:
    """Have it end no more by itself: it is decided, or the agent has asked for it by itself as well."""
    if request.expiry is not None:
        request.expiry.cancel()
        request.expiry = None


def shown_to_agent(request: Request) -> dict[str, object]:
    return {
        "request_id": request.request_id,
        "scope": format_scope(request.scope),
        "state": request.state.value,
        "grant_id": request.grant_id or None,
        "reason": request.answer,
    }
