"""Taking an entry's content away and leaving its place: what orders it, what is left, what a verifier accepts (pure).

The leaf hash stays, and with it every root, proof and checkpoint. That content is gone is believed only where an entry
of the log itself, under a signature, orders it for this seq and this hash; else it is tampering.
"""

from dataclasses import dataclass
from typing import Final

from supervisord.actions.segments import Mark
from supervisord.actions.types import JSON, Action, Entry
from supervisord.errors import Conflict

VERB: Final = "log.redact"
REDACTED: Final = "redacted"  # what a redacted entry says in place of its verb and verdict
ORDERED: Final = "allowed"  # the verdict of an order; `done` and `failed` say how it ended
OWN_PREFIX: Final = "log."


@dataclass(frozen=True, slots=True)
class Order:
    """What an entry `log.redact` orders: that the entry `of`, with this hash, is to be redacted."""

    of: int
    leaf_hash: str
    time_seconds: int


@dataclass(frozen=True, slots=True)
class Redacted:
    """An entry whose content is gone."""

    seq: int
    offset: int
    leaf_hash: bytes
    mark: Mark


def order(entry: Entry, *, actor: str, reason: str) -> Action:
    """The action that orders it; it names the entry and says nothing of its content. Raises Conflict."""
    if entry.action.verb == REDACTED:
        raise Conflict(f"cannot redact entry {entry.seq}: it is redacted, as entry {entry.action.object} orders")
    if entry.action.verb.startswith(OWN_PREFIX):
        raise Conflict(f"cannot redact entry {entry.seq}: it is one of the log's own, by which the log is verified")
    # Seconds only: the whole time would make it easier to guess an entry and confirm the guess by its hash.
    details: dict[str, JSON] = {
        "seq": entry.seq,
        "leaf_hash": entry.leaf_hash.hex(),
        "time_seconds": entry.time_ns // 10**9,
    }
    return Action("", actor, VERB, f"entry {entry.seq}", ORDERED, reason, details)


def ended(ordered: Entry, verdict: str, cause: str = "") -> Action:
    """How an order ended."""
    details: dict[str, JSON] = {"seq": ordered.action.details["seq"], "order": ordered.seq}
    return Action("", "daemon", VERB, ordered.action.object, verdict, cause, details)


def order_of(seq: int, action: Action) -> Order | None:
    """What the entry `seq` orders, where it is an order; it has to stand behind what it is about."""
    if action.verb != VERB or action.verdict != ORDERED:
        return None
    of, leaf, seconds = (action.details.get(key) for key in ("seq", "leaf_hash", "time_seconds"))
    if not isinstance(of, int) or not isinstance(leaf, str) or not isinstance(seconds, int) or not 0 < of < seq:
        return None
    return Order(of, leaf, seconds)


def judge(found: Redacted, order: Order | None, *, sealed: int) -> str:
    """What is wrong with a redacted entry, given the order that its mark names; nothing where it is as ordered."""
    by = found.mark.order
    if order is None or order.of != found.seq:
        return f"entry {by}, which its mark names, does not order that"
    if by > sealed:
        return f"entry {by}, which orders it, is not under any signature"
    if order.leaf_hash != found.leaf_hash.hex():
        return f"its frame has another hash than entry {by} says that orders it"
    if order.time_seconds != found.mark.time_seconds:
        return f"its frame has another time than entry {by} says that orders it"
    return ""


def shown(seq: int, leaf_hash: bytes, mark: Mark, ordered: Entry) -> Entry:
    """What queries and sinks get in the entry's place: who had it redacted, when and why."""
    order = ordered.action
    details = {"redacted_by_seq": ordered.seq, "redacted_at_unix_nanos": ordered.time_ns}
    action = Action("", order.actor, REDACTED, str(ordered.seq), REDACTED, order.reason, details)
    return Entry(seq, mark.time_seconds * 10**9, action, leaf_hash)
