"""The grant book: who may do what, until when, how often (pure; the clock and the ids are passed in).

Time to live counts on the monotonic clock: setting the host's clock neither prolongs nor ends a grant. Uses are set
aside before an exchange and settled after it, so `max_uses` holds however many exchanges run at once.
"""

import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Self

from gateway_client.egress.decide import GrantView
from gateway_client.egress.scope import (
    BadScope,
    HttpScope,
    Scope,
    TlsScope,
    format_scope,
    includes,
    parse_scope,
)
from supervisord.budgets import MICROUSD_PER_USD
from supervisord.config import GatewayConfig, GatewayKind
from supervisord.errors import Conflict, Exhausted, InvalidInput, NotFound, PermissionDenied
from supervisord.ids import AgentId, GrantId, shown
from supervisord.terms import JsonValue, Terms

GRANTS_PER_AGENT_MAX: Final = 256
ENDED_GRANTS_KEPT_MAX: Final = 4096
REASON_CHARACTERS_MAX: Final = 500
TICKET_CHARACTERS_MAX: Final = 200
ENDED_SHOWN_TO_AGENT_MAX: Final = 16

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Ended(Enum):
    """Why a grant no longer gives anything."""

    REVOKED = "revoked"
    EXPIRED = "expired"
    SPENT = "spent"
    AGENT_ENDED = "agent_ended"


@dataclass(frozen=True, slots=True)
class Grant:
    """One scope of one agent.

    `expires_mono` (seconds of the monotonic clock) decides; `expires_at` (seconds since 1970) is what people are told.
    `uses` are settled, `reserved` belong to exchanges under way. Bytes (both ways, heads too) and cost are of exchanges
    that have ended; the worker counts the bytes of those under way, and cuts them.
    """

    grant_id: GrantId
    agent_id: AgentId
    scope: Scope
    by: str
    reason: str
    created_at: float
    expires_mono: float | None = None
    expires_at: float | None = None
    max_uses: int | None = None
    uses: int = 0
    reserved: int = 0
    ended: Ended | None = None
    max_bytes: int | None = None
    bytes_used: int = 0
    max_cost_microusd: int | None = None
    cost_microusd: int = 0
    ticket: str = ""

    @property
    def uses_left(self) -> int | None:
        """Uses that nobody has or has set aside; None is no limit."""
        return None if self.max_uses is None else max(self.max_uses - self.uses - self.reserved, 0)

    @property
    def bytes_left(self) -> int | None:
        return None if self.max_bytes is None else max(self.max_bytes - self.bytes_used, 0)

    @property
    def cost_left_microusd(self) -> int | None:
        return None if self.max_cost_microusd is None else max(self.max_cost_microusd - self.cost_microusd, 0)

    @property
    def spent(self) -> bool:
        """Whether what has ended reaches one of its bounds."""
        uses_spent = self.max_uses is not None and self.uses >= self.max_uses
        return uses_spent or self.bytes_left == 0 or self.cost_left_microusd == 0

    @property
    def terms_counted(self) -> tuple[int | None, int | None, int | None]:
        return (self.max_uses, self.max_bytes, self.max_cost_microusd)

    @property
    def terms(self) -> Terms:
        ttl = None if self.expires_at is None else self.expires_at - self.created_at
        return Terms(ttl, self.max_uses, self.max_bytes, self.max_cost_microusd)

    def remaining_seconds(self, now: float) -> float | None:
        return None if self.expires_mono is None else max(self.expires_mono - now, 0.0)

    def live(self, now: float) -> bool:
        return self.ended is None and (self.expires_mono is None or now < self.expires_mono)

    def to_json(self) -> dict[str, JsonValue]:
        return {
            "grant_id": self.grant_id,
            "agent_id": self.agent_id,
            "scope": format_scope(self.scope),
            "by": self.by,
            "reason": self.reason,
            "created_at": self.created_at,
            "expires_mono": self.expires_mono,
            "expires_at": self.expires_at,
            "max_uses": self.max_uses,
            "uses": self.uses,
            "reserved": self.reserved,
            "ended": self.ended.value if self.ended else None,
            "max_bytes": self.max_bytes,
            "bytes_used": self.bytes_used,
            "max_cost_microusd": self.max_cost_microusd,
            "cost_microusd": self.cost_microusd,
            "ticket": self.ticket,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, JsonValue]) -> Self:
        """Gives the grant that to_json() wrote; raises InvalidInput when the record is not one."""
        try:
            return cls(
                grant_id=GrantId(str(data["grant_id"])),
                agent_id=AgentId(str(data["agent_id"])),
                scope=parse_scope(str(data["scope"])),
                by=str(data["by"]),
                reason=str(data["reason"]),
                created_at=_number(data["created_at"]),
                expires_mono=_optional(data["expires_mono"]),
                expires_at=_optional(data["expires_at"]),
                max_uses=None if data["max_uses"] is None else int(_number(data["max_uses"])),
                uses=int(_number(data["uses"])),
                reserved=int(_number(data["reserved"])),
                ended=None if data["ended"] is None else Ended(data["ended"]),
                # Records of an earlier version have none of these.
                max_bytes=_whole(data.get("max_bytes")),
                bytes_used=_whole(data.get("bytes_used")) or 0,
                max_cost_microusd=_whole(data.get("max_cost_microusd")),
                cost_microusd=_whole(data.get("cost_microusd")) or 0,
                ticket=str(data.get("ticket") or ""),
            )
        except (KeyError, ValueError) as error:
            raise InvalidInput(f"cannot read grant from the store: {error}", remedy="see docs/OPERATING.md") from error


class GrantBook:
    """Every grant of every agent that lives; not thread-safe, one event loop owns it.

    `now` is the monotonic clock, `wall` the clock for people, `new_id` makes an id.
    """

    def __init__(self, *, now: Callable[[], float], wall: Callable[[], float], new_id: Callable[[], GrantId]) -> None:
        self._now = now
        self._wall = wall
        self._new_id = new_id
        self._live: dict[GrantId, Grant] = {}
        self._ids: dict[AgentId, dict[GrantId, None]] = {}
        self._ended: OrderedDict[GrantId, Grant] = OrderedDict()
        self._lapsed: dict[AgentId, deque[GrantId]] = {}
        self._views: dict[AgentId, tuple[GrantView, ...]] = {}
        self._unreported: list[Grant] = []

    def add(
        self,
        agent_id: AgentId,
        scope: Scope,
        *,
        by: str,
        reason: str = "",
        ticket: str = "",
        ttl_seconds: float | None = None,
        max_uses: int | None = None,
        max_bytes: int | None = None,
        max_cost_microusd: int | None = None,
        ceiling: tuple[Scope, ...] | None = None,
        grant_id: GrantId | None = None,
    ) -> Grant:
        """Gives the agent the scope from now on.

        A `grant_id` of the caller's makes a retry safe: the same wish gives the grant that exists already. Raises
        InvalidInput, PermissionDenied (beyond the ceiling), Conflict (the id is another grant's) or Exhausted.
        """
        check_ceiling(scope, ceiling)
        terms = Terms(ttl_seconds, max_uses, max_bytes, max_cost_microusd)
        terms.check(scope)
        for text, what, most in ((reason, "reason", REASON_CHARACTERS_MAX), (ticket, "ticket", TICKET_CHARACTERS_MAX)):
            if len(text) > most or _CONTROL.search(text):
                raise InvalidInput(
                    f"cannot grant {format_scope(scope)}: the {what} is longer than {most} characters "
                    "or has control characters",
                    remedy="shorten it to one line",
                )
        if grant_id is not None and (known := self._find(grant_id)) is not None:
            same = replace(terms, ttl_seconds=None) == replace(known.terms, ttl_seconds=None)
            if (known.agent_id, known.scope) == (agent_id, scope) and same:
                return known
            raise Conflict(f"cannot grant as {grant_id}: that id is another grant's", remedy="let the daemon choose")
        if len(self._ids.get(agent_id, ())) >= GRANTS_PER_AGENT_MAX:
            raise Exhausted(
                f"cannot grant {format_scope(scope)}: {agent_id} has {GRANTS_PER_AGENT_MAX} live grants",
                remedy="revoke some, or grant one wider scope",
            )
        expires_mono = None if ttl_seconds is None else self._now() + ttl_seconds
        created_at = self._wall()
        grant = Grant(
            grant_id=grant_id or self._new_id(),
            agent_id=agent_id,
            scope=scope,
            by=by,
            reason=reason,
            created_at=created_at,
            expires_mono=expires_mono,
            expires_at=None if ttl_seconds is None else created_at + ttl_seconds,
            max_uses=max_uses,
            max_bytes=max_bytes,
            max_cost_microusd=max_cost_microusd,
            ticket=ticket,
        )
        self._put(grant)
        return grant

    def get(self, grant_id: GrantId) -> Grant:
        """Gives the grant, live or ended lately; raises NotFound."""
        grant = self._find(grant_id)
        if grant is None:
            raise NotFound(f"cannot find grant {shown(grant_id)}: there is none", remedy="see `stockadectl grants`")
        return grant

    def knows(self, grant_id: GrantId) -> bool:
        return self._find(grant_id) is not None

    def withdraw(self, grant_id: GrantId) -> None:
        """Forgets a grant that was added and could not be given: there was none."""
        grant = self._live.pop(grant_id, None)
        if grant is not None:
            self._ids.get(grant.agent_id, {}).pop(grant_id, None)
            self._views.pop(grant.agent_id, None)

    def revoke(self, grant_id: GrantId) -> Grant:
        """Takes the grant back and gives it as it now is; again is the same answer; raises NotFound."""
        self._sweep()
        grant = self.get(grant_id)
        return grant if grant.ended else self._end(grant, Ended.REVOKED)

    def expire(self) -> tuple[Grant, ...]:
        """Ends every grant whose time is up and gives each that ended so, once, whoever noticed it first."""
        self._sweep()
        expired, self._unreported = tuple(self._unreported), []
        return expired

    def _sweep(self) -> None:
        now = self._now()
        due = [grant for grant in self._live.values() if not grant.live(now)]
        self._unreported += (self._end(grant, Ended.EXPIRED) for grant in due)

    def next_expiry(self) -> float | None:
        """Gives the monotonic time at which expire() has something to do."""
        if self._unreported:
            return self._now()
        return min((g.expires_mono for g in self._live.values() if g.expires_mono is not None), default=None)

    def use(self, grant_id: GrantId) -> Grant:
        """Sets one use aside; raises Conflict when the grant has ended, Exhausted when no use is left."""
        grant = self.get(grant_id)
        if not grant.live(self._now()):
            ended = grant.ended or Ended.EXPIRED
            raise Conflict(f"cannot use grant {grant_id}: it is {ended.value}", remedy="ask for a new one")
        if grant.bytes_left == 0 or grant.cost_left_microusd == 0:
            raise Exhausted(f"cannot use grant {grant_id}: it is used up", remedy="ask for a new one")
        if grant.max_uses is None:
            return grant
        if grant.uses_left == 0:
            raise Exhausted(f"cannot use grant {grant_id}: no use is left", remedy="ask for a new one")
        grant = replace(grant, reserved=grant.reserved + 1)
        self._put(grant)
        return grant

    def settle(
        self,
        grant_id: GrantId,
        *,
        used: bool,
        counted: bool = True,
        bytes_used: int = 0,
        cost_microusd: int = 0,
        spent: bool = False,
    ) -> Grant | None:
        """Turns a use that was set aside into a use, or gives it back when nothing left the host; counts the rest.

        Without `counted` no use was set aside, and only the rest is counted.

        What reaches a bound ends the grant; so does `spent`: the worker has met the end of its bytes. What was set
        aside before the grant ended is counted afterwards too; None when the grant ended so long ago that the book has
        forgotten it.
        """
        grant = self._find(grant_id)
        if grant is None or (grant.terms_counted == (None, None, None)):
            return grant
        if counted and grant.max_uses is not None and grant.reserved:
            grant = replace(grant, reserved=grant.reserved - 1, uses=grant.uses + (1 if used else 0))
        if grant.max_bytes is not None:
            total = grant.max_bytes if spent else min(grant.bytes_used + bytes_used, grant.max_bytes)
            grant = replace(grant, bytes_used=total)
        if grant.max_cost_microusd is not None:
            grant = replace(grant, cost_microusd=grant.cost_microusd + cost_microusd)
        if grant.ended:
            self._ended[grant_id] = grant
            return grant
        if grant.spent:
            return self._end(grant, Ended.SPENT)
        self._put(grant)
        return grant

    def for_agent(self, agent_id: AgentId) -> tuple[Grant, ...]:
        """Gives the agent's live grants, oldest first."""
        now = self._now()
        grants = (self._live[grant_id] for grant_id in self._ids.get(agent_id, ()))
        return tuple(grant for grant in grants if grant.live(now))

    def all(self, *, include_ended: bool = False) -> tuple[Grant, ...]:
        """Gives every live grant, oldest first, after those that ended lately where asked for."""
        self._sweep()
        return (*(self._ended.values() if include_ended else ()), *self._live.values())

    def view(self, agent_id: AgentId) -> tuple[GrantView, ...]:
        """Gives what decide() sees of an agent's grants: made anew only after a change.

        Lately expired and spent ones are in it, so that a denial can say so; decide() compares times by itself.
        """
        view = self._views.get(agent_id)
        if view is None:
            lapsed = (self._ended.get(grant_id) for grant_id in self._lapsed.get(agent_id, ()))
            live = [self._live[grant_id] for grant_id in self._ids.get(agent_id, ())]
            view = tuple(
                GrantView(
                    grant.grant_id,
                    grant.scope,
                    grant.expires_mono,
                    0 if grant.ended is Ended.SPENT else grant.uses_left,
                    grant.bytes_left,
                    None if grant.cost_left_microusd is None else grant.cost_left_microusd / MICROUSD_PER_USD,
                )
                for grant in (*(grant for grant in lapsed if grant), *live)
            )
            if agent_id in self._ids:
                self._views[agent_id] = view
        return view

    def end_agent(self, agent_id: AgentId) -> tuple[Grant, ...]:
        """Ends every grant of an agent that is no more and gives those."""
        grants = [self._live[grant_id] for grant_id in self._ids.get(agent_id, ())]
        ended = tuple(self._end(grant, Ended.AGENT_ENDED) for grant in grants)
        for by_agent in (self._ids, self._lapsed, self._views):
            by_agent.pop(agent_id, None)
        return ended

    def restore(self, grant: Grant, *, remaining_seconds: float | None = None) -> Grant:
        """Puts a grant back that was read from the store.

        Within one boot the monotonic clock went on, so `expires_mono` still holds; after a reboot it means nothing and
        `remaining_seconds` says what was left. A use set aside whose end nobody saw counts as used: it may have been.
        """
        if grant.expires_mono is not None and remaining_seconds is not None:
            grant = replace(grant, expires_mono=self._now() + remaining_seconds)
        grant = replace(grant, uses=grant.uses + grant.reserved, reserved=0)
        if grant.ended:
            self._keep(grant)
        elif grant.spent:
            return self._end(grant, Ended.SPENT)
        else:
            self._put(grant)
        return grant

    def _find(self, grant_id: GrantId) -> Grant | None:
        return self._live.get(grant_id) or self._ended.get(grant_id)

    def _put(self, grant: Grant) -> None:
        self._live[grant.grant_id] = grant
        self._ids.setdefault(grant.agent_id, {})[grant.grant_id] = None
        self._views.pop(grant.agent_id, None)

    def _end(self, grant: Grant, why: Ended) -> Grant:
        self._live.pop(grant.grant_id, None)
        self._ids.get(grant.agent_id, {}).pop(grant.grant_id, None)
        grant = replace(grant, ended=why)
        if why in (Ended.EXPIRED, Ended.SPENT):
            self._lapsed.setdefault(grant.agent_id, deque(maxlen=ENDED_SHOWN_TO_AGENT_MAX)).append(grant.grant_id)
        self._keep(grant)
        return grant

    def _keep(self, grant: Grant) -> None:
        self._ended[grant.grant_id] = grant
        self._views.pop(grant.agent_id, None)
        while len(self._ended) > ENDED_GRANTS_KEPT_MAX:
            self._ended.popitem(last=False)


def read_scope(text: str) -> Scope:
    """Gives the scope of a text from a caller; raises InvalidInput."""
    try:
        return parse_scope(text)
    except BadScope as error:
        raise InvalidInput(str(error), remedy="scopes are described in docs/POLICY.md") from error


def within(scope: Scope, wide: tuple[Scope, ...]) -> bool:
    return any(includes(each, scope) for each in wide)


def check_ceiling(scope: Scope, ceiling: tuple[Scope, ...] | None) -> None:
    """Raises PermissionDenied for a scope that is not within one scope of the ceiling; None is no ceiling."""
    if ceiling is not None and not within(scope, ceiling):
        listed = ", ".join(format_scope(wide) for wide in ceiling) or "nothing"
        raise PermissionDenied(
            f"cannot grant {format_scope(scope)}: the policy's ceiling is {listed}",
            remedy="grant a narrower scope, or widen grants.ceiling in the policy",
        )


def check_scopes_reachable(scopes: tuple[Scope, ...], gateway: GatewayConfig) -> None:
    """Raises InvalidInput for a scope that no configured exit can serve.

    Only the embedded gateway opens other hosts by itself; others need `gateway.forward_proxy` for `http:` and `tls:`.
    """
    if gateway.kind is GatewayKind.EMBEDDED or gateway.forward_proxy:
        return
    for scope in scopes:
        if isinstance(scope, HttpScope | TlsScope):
            raise InvalidInput(
                f"cannot use scope {format_scope(scope)}: gateway.forward_proxy is empty, so nothing opens other hosts",
                remedy="set forward_proxy in [gateway] of stockade.toml, or leave the scope out",
            )


TRANSPARENT_PORTS: Final = (80, 443)
TRANSPARENT_PORTS_MAX: Final = 10


def transparent_ports(scopes: Iterable[Scope]) -> tuple[int, ...]:
    """The ports at which a transparent network takes connections: those of the web, and those that scopes name."""
    named = {scope.port for scope in scopes if isinstance(scope, HttpScope | TlsScope)}
    return (*TRANSPARENT_PORTS, *sorted(named - set(TRANSPARENT_PORTS)))[:TRANSPARENT_PORTS_MAX]


def _number(value: JsonValue) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")  # noqa: TRY004 - the caller renames ValueError
    return value


def _whole(value: JsonValue) -> int | None:
    return None if value is None else int(_number(value))


def _optional(value: JsonValue) -> float | None:
    return None if value is None else _number(value)
