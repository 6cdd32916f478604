"""Who may approve a request of an agent's, and what several approvals come to (pure).

A `digest` stands for what an approver is shown, and what is granted is that scope or one within it. Where several
people have to agree, the grant is what all of them agreed to: the narrowest scope, the tightest of each bound.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gateway_client.egress.scope import Scope, format_scope, includes
from supervisord.errors import Conflict, InvalidInput, PermissionDenied
from supervisord.policy import GrantRules
from supervisord.terms import NO_TERMS, Terms

_UID: Final = re.compile(r"(uid:[0-9]+)\(.*\)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Offer:
    """What one person is ready to give: of the asked scope all, or `scope` within it, and how far.

    `digest` is of the request as that person saw it; empty where nobody looked at more than its id.
    """

    by: str
    scope: Scope | None = None
    terms: Terms = NO_TERMS
    reason: str = ""
    ticket: str = ""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Agreed:
    """What everybody who approved so far agrees to."""

    scope: Scope
    terms: Terms
    by: tuple[str, ...]
    reason: str
    ticket: str


def digest(*, request_id: str, agent_id: str, agent_name: str, scope: Scope, reason: str) -> str:
    """Give `sha256:…` over everything of a request that an approver judges by."""
    shown = {
        "request_id": request_id,
        "agent_id": agent_id,
        "agent_name": agent_name,
        "scope": format_scope(scope),
        "reason": reason,
    }
    text = json.dumps(shown, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def shown_line(text: str, characters_max: int) -> str:
    """Give an agent's words as one line that can do nothing to a terminal or a reader's eye.

    Control, format (those that turn the direction of writing, those without a width), surrogate and unassigned
    characters become spaces.
    """
    return "".join(c if c.isprintable() else " " for c in text[:characters_max])


def person(actor: str) -> str:
    """Give who an actor of the action log is: the uid whatever its name, or the name in a certificate."""
    found = _UID.fullmatch(actor)
    return found[1] if found else actor


def check_person(by: str, *, agent_id: str, launched_by: str, before: Sequence[str], rules: GrantRules) -> None:
    """Raise PermissionDenied or Conflict where this one may not approve for this agent."""
    if by == f"agent:{agent_id}":
        raise PermissionDenied("cannot approve one's own request", remedy="have a person approve it")
    if rules.separation and person(by) == person(launched_by):
        raise PermissionDenied(
            f"cannot approve as {by}: who launched an agent approves nothing for it (grants.separation)",
            remedy="have another person approve it",
        )
    if person(by) in {person(other) for other in before}:
        raise Conflict(
            f"cannot approve again as {by}: {rules.approvers} different people have to", remedy="have another do it"
        )


def check_alone(by: str, *, launched_by: str, policy: str, rules: GrantRules) -> None:
    """Raise PermissionDenied where this one may not grant without being asked, and without others."""
    if rules.approvers > 1:
        raise PermissionDenied(
            f"cannot grant alone: policy {policy} wants {rules.approvers} people to agree (grants.approvers)",
            remedy="have the agent ask, and each approve with `stockadectl requests approve`",
        )
    if rules.separation and person(by) == person(launched_by):
        raise PermissionDenied(
            f"cannot grant as {by}: who launched an agent grants it nothing (grants.separation of policy {policy})",
            remedy="have another person do it",
        )


def agree(asked: Scope, offers: Sequence[Offer]) -> Agreed:
    """Give what these offers come to; raises InvalidInput or Conflict where they come to nothing."""
    scope, terms = asked, NO_TERMS
    for offer in offers:
        wanted = offer.scope or asked
        if not includes(asked, wanted):
            raise InvalidInput(
                f"cannot approve {format_scope(wanted)}: it is not within {format_scope(asked)}, which is asked for",
                remedy="give a narrower scope than is asked for, or leave it out",
            )
        if includes(scope, wanted):
            scope = wanted
        elif not includes(wanted, scope):
            raise Conflict(
                f"cannot approve {format_scope(wanted)}: others approved {format_scope(scope)}, and neither is within "
                "the other",
                remedy="agree on one of them, or deny the request",
            )
        terms = terms.tightest(offer.terms)
    terms.check(scope)
    reason = "; ".join(offer.reason for offer in offers if offer.reason)
    ticket = ", ".join(dict.fromkeys(offer.ticket for offer in offers if offer.ticket))
    return Agreed(scope, terms, tuple(offer.by for offer in offers), reason, ticket)
