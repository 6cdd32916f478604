"""The decision on one request: a function of the request, what the agent holds, and the time. The daemon calls it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, assert_never

from gateway_client.egress.mcpcall import SESSION
from gateway_client.egress.request import Dialect, EgressRequest, Form
from gateway_client.egress.scope import HttpScope, McpScope, Scope, TlsScope, covers, format_scope, missing_scope
from gateway_client.egress.target import address_of, forbidden_address

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network

tokens_reserved_default: Final = 4096
"""What a call that names no limit reserves of a token budget for each answer until its usage is known."""

SELF_PREFIX: Final = "/.stockade/v1/"
BUDGET_SPENT: Final = "the agent's budget of egress_bytes is used up"


class Upstream(StrEnum):
    """What the dialer opens for an allowed request."""

    API = "api"
    MCP = "mcp"
    FORWARD = "forward"
    TUNNEL = "tunnel"
    INSPECT = "inspect"
    """Nothing yet: the worker parses the plain HTTP inside the CONNECT, and asks about each request of it."""
    TERMINATE = "terminate"
    """Nothing yet: the worker ends TLS inside the CONNECT, and asks about each request of it."""
    NAME = "name"
    """Nothing at all: a name is told."""
    SEALED = "sealed"
    """A tunnel in which the worker speaks TLS itself, for one request that was inside of TLS."""

    @property
    def opens(self) -> bool:
        """Whether anything is dialled for it."""
        return self not in (Upstream.INSPECT, Upstream.TERMINATE, Upstream.NAME)


class Reason(StrEnum):
    """Why a request was refused: stable codes for programs, in the answer to the agent and in the log."""

    SCOPE_MISSING = "scope_missing"
    GRANT_EXPIRED = "grant_expired"
    GRANT_USED_UP = "grant_used_up"
    NOT_GRANTABLE = "not_grantable"
    ENDPOINT_REFUSED = "endpoint_refused"
    ADDRESS_FORBIDDEN = "address_forbidden"
    FORWARDING_OFF = "forwarding_off"
    TLS_UNAVAILABLE = "tls_unavailable"
    AGENT_NOT_RUNNING = "agent_not_running"
    BUDGET_EXHAUSTED = "budget_exhausted"
    SELF_UNKNOWN = "self_unknown"
    LOG_UNAVAILABLE = "log_unavailable"
    DAEMON_GONE = "daemon_gone"
    GATEWAY_DOWN = "gateway_down"
    UPSTREAM_FAILED = "upstream_failed"
    FROZEN = "frozen"
    LIMIT = "limit"


@dataclass(frozen=True, slots=True)
class GrantView:
    """A grant as the decision sees it; times are seconds of the monotonic clock."""

    grant_id: str
    scope: Scope
    expires_at: float | None = None
    uses_left: int | None = None
    bytes_left: int | None = None
    cost_usd_left: float | None = None

    @property
    def usable(self) -> bool:
        """Whether none of its bounds is reached; None is no bound."""
        bounds = (self.uses_left, self.bytes_left, self.cost_usd_left)
        return all(left is None or left > 0 for left in bounds)

    @property
    def bounded(self) -> bool:
        return (self.uses_left, self.bytes_left, self.cost_usd_left) != (None, None, None)


@dataclass(frozen=True, slots=True)
class BudgetView:
    """What is left, reservations taken off; None is without limit."""

    llm_tokens_left: int | None = None
    cost_usd_left: float | None = None
    requests_left: int | None = None
    wall_seconds_left: float | None = None
    """With one of the times used up nothing leaves any more."""
    cpu_seconds_left: float | None = None
    egress_bytes_left: int | None = None
    """What egress workers have been lent for this agent is among it."""

    @property
    def time_over(self) -> str:
        for left, what in ((self.wall_seconds_left, "wall-clock time"), (self.cpu_seconds_left, "CPU time")):
            if left is not None and left <= 0:
                return what
        return ""


@dataclass(frozen=True, slots=True)
class AgentView:
    """Everything about an agent that a decision depends on."""

    agent_id: str
    name: str
    policy: str
    state: str
    """A lifecycle state; only STARTING (execve done, not yet noted) and RUNNING may send."""
    grants: tuple[GrantView, ...] = ()
    budget: BudgetView = field(default_factory=BudgetView)
    mcp_servers: tuple[str, ...] = ()
    """MCP servers that the gateway reaches."""
    forwarding: bool = True
    """Whether the gateway, or a forward proxy beside it, opens other hosts."""
    allow_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    """Networks whose address literals an operator has opened in the configuration."""


@dataclass(frozen=True, slots=True)
class Allow:
    grant_id: str
    upstream: Upstream
    scope: str = ""
    reserve_tokens: int = 0
    """Taken off the token budget until the outcome is known."""
    bytes_left: int | None = None
    """What may pass on the grant, by the daemon's last count; the worker goes on from the first it was told."""
    counted: bool = True
    """Whether it is a use of the grant; what only keeps a session going is none."""
    lent: bool = False
    """Whether its bytes are counted on what the daemon lends of the agent's budget."""


@dataclass(frozen=True, slots=True)
class Refuse:
    status: int
    reason_code: str
    detail: str
    scope: str = ""
    """The scope that was missing, as `grant` takes it; empty where no scope would help."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The daemon's own answer to a self-service request."""

    status: int
    body: dict[str, Any]
    """JSON: values that `json.dumps` takes."""


Verdict = Allow | Refuse | Reply


def decide(request: EgressRequest, view: AgentView, *, now: float) -> Verdict:  # noqa: PLR0911 - one for each form
    """Judge one request. `now` is monotonic seconds, the clock of `GrantView.expires_at`."""
    if view.state not in ("STARTING", "RUNNING"):
        return Refuse(503, Reason.AGENT_NOT_RUNNING, f"the agent is {view.state} and may send nothing")
    if view.budget.time_over and request.form is not Form.SELF:
        return Refuse(429, Reason.BUDGET_EXHAUSTED, f"the agent's budget of {view.budget.time_over} is used up")
    match request.form:
        case Form.SELF:
            return _answer_self(request, view, now=now)
        case Form.MODEL:
            return _decide_model(request, view, now=now)
        case Form.MCP:
            return _decide_mcp(request, view, now=now)
        case Form.FORWARD:
            secure = request.scheme == "https"
            return _decide_elsewhere(request, view, now=now, upstream=Upstream.SEALED if secure else Upstream.FORWARD)
        case Form.CONNECT:
            return _decide_elsewhere(request, view, now=now, upstream=Upstream.TUNNEL)
        case Form.NAME:
            return _decide_name(request, view, now=now)
        case _:
            assert_never(request.form)


def _decide_name(request: EgressRequest, view: AgentView, *, now: float) -> Verdict:
    """Judge a look-up: names of hosts in scopes that are in force are told, no others, and none is looked up."""
    if any(
        isinstance(grant.scope, HttpScope | TlsScope) and grant.scope.host == request.host and _live(grant, now)
        for grant in view.grants
    ):
        return Allow(grant_id="", upstream=Upstream.NAME)
    return Refuse(403, Reason.SCOPE_MISSING, f"the agent has no grant for {request.host}", scope=missing_scope(request))


def _decide_model(request: EgressRequest, view: AgentView, *, now: float) -> Verdict:
    if request.dialect is None:
        return Refuse(
            403, Reason.ENDPOINT_REFUSED, "the path is no model endpoint; only those of the known dialects are offered"
        )
    grant = _best_grant(request, view, now=now)
    if isinstance(grant, Refuse):
        return grant
    if used_up := _bytes_used_up(view.budget):
        return used_up
    if request.dialect in (Dialect.MODELS, Dialect.ANTHROPIC_COUNT_TOKENS):  # these use no model, so cost nothing
        return _allow(grant, Upstream.API)
    reserved = _set_aside(request, view.budget)
    return reserved if isinstance(reserved, Refuse) else _allow(grant, Upstream.API, reserve_tokens=reserved)


def _decide_mcp(request: EgressRequest, view: AgentView, *, now: float) -> Verdict:
    if request.server not in view.mcp_servers:
        return Refuse(404, Reason.ENDPOINT_REFUSED, "there is no such MCP server behind the gateway")
    session = request.rpc_method in SESSION
    grant = _best_grant(request, view, now=now, counted=not session)
    if isinstance(grant, Refuse):
        return grant
    if used_up := _bytes_used_up(view.budget) or _requests_used_up(view.budget):
        return used_up
    return replace(_allow(grant, Upstream.MCP), counted=not session)


def _bytes_used_up(budget: BudgetView) -> Refuse | None:
    left = budget.egress_bytes_left
    return Refuse(429, Reason.BUDGET_EXHAUSTED, BUDGET_SPENT) if left is not None and left <= 0 else None


def _requests_used_up(budget: BudgetView) -> Refuse | None:
    left = budget.requests_left
    if left is None or left > 0:
        return None
    return Refuse(429, Reason.BUDGET_EXHAUSTED, "the agent's budget of requests is used up")


def mcp_globs(server: str, view: AgentView, *, now: float) -> tuple[str, ...]:
    """Give what an agent may use of a server just now, for the gateway to hold it to."""
    return tuple(
        sorted(
            {
                grant.scope.tool_glob
                for grant in view.grants
                if isinstance(grant.scope, McpScope)
                and grant.scope.server == server
                and (grant.expires_at is None or now < grant.expires_at)  # uses are counted by the daemon alone
            }
        )
    )


def _set_aside(request: EgressRequest, budget: BudgetView) -> int | Refuse:
    """Give how many tokens a call takes off the budget until it is known what it used."""
    for left, what in (
        (budget.llm_tokens_left, "tokens"),
        (budget.cost_usd_left, "cost"),
        (budget.requests_left, "requests"),
    ):
        if left is not None and left <= 0:
            return Refuse(429, Reason.BUDGET_EXHAUSTED, f"the agent's budget of {what} is used up")
    tokens_left = budget.llm_tokens_left
    if tokens_left is None:
        return 0
    # The input is estimated high for what is set aside; what must be there before is what it takes at the least.
    least = (request.max_tokens or 0) + request.input_tokens // 2
    if least > tokens_left:
        return Refuse(
            429, Reason.BUDGET_EXHAUSTED, f"the call asks for {least} tokens and {tokens_left} are left of the budget"
        )
    return min(output_reserved(request.max_tokens, request.choices) + request.input_tokens, tokens_left)


def output_reserved(max_tokens: int | None, choices: int) -> int:
    """Give what is set aside for the output of a call, and counts where nobody says what it was."""
    return max_tokens if max_tokens is not None else tokens_reserved_default * choices


def _decide_elsewhere(request: EgressRequest, view: AgentView, *, now: float, upstream: Upstream) -> Verdict:
    address = address_of(request.host)
    if address is not None and not any(address in network for network in view.allow_networks):
        why = forbidden_address(address)
        if why is not None:
            return Refuse(403, Reason.ADDRESS_FORBIDDEN, f"{request.host} is a {why} address, which no scope opens")
    grant = _best_grant(request, view, now=now)
    if request.form is Form.CONNECT:
        looked_into = _look_inside(request, view, now=now, opaque=isinstance(grant, GrantView))
        if looked_into is not None:
            return Allow(grant_id="", upstream=looked_into)
    if isinstance(grant, Refuse):
        return grant
    if not view.forwarding:
        return Refuse(
            403, Reason.FORWARDING_OFF, "the gateway serves models only; the operator must set gateway.forward_proxy"
        )
    return _bytes_used_up(view.budget) or _requests_used_up(view.budget) or _allow(grant, upstream)


def _look_inside(request: EgressRequest, view: AgentView, *, now: float, opaque: bool) -> Upstream | None:
    """Tell how a CONNECT is looked into, None where it is not: it passes as a whole (`opaque`), or not at all.

    The narrower scope wins: where an http: scope of an https URL is in force TLS ends in the worker, and a tls: scope
    of the same host then covers what is inside request by request. Some clients send CONNECT for plain http:// URLs
    too. Either way the worker answers 200 itself, opens nothing and asks about each request inside, so this permits
    nothing that those would not be permitted on their own. Where nothing passes as a whole, a scope that has ended
    counts too: the refusal is then one that the client can read.
    """
    schemes = {
        grant.scope.scheme
        for grant in view.grants
        if isinstance(grant.scope, HttpScope)
        and (grant.scope.host, grant.scope.port) == (request.host, request.port)
        and (not opaque or _live(grant, now))
    }
    if "https" in schemes:
        return Upstream.TERMINATE
    if not opaque and ("http" in schemes or request.port == 80):  # noqa: PLR2004 - the port of http://
        return Upstream.INSPECT
    return None


def _best_grant(request: EgressRequest, view: AgentView, *, now: float, counted: bool = True) -> GrantView | Refuse:
    """Find the grant to use: an unlimited one before one that counts, then the one that lasts longest."""
    covering = [grant for grant in view.grants if covers(grant.scope, request)]
    live = [grant for grant in covering if grant.expires_at is None or now < grant.expires_at]
    usable = [
        grant for grant in live if (grant.usable if counted else grant.bytes_left is None or grant.bytes_left > 0)
    ]
    if usable:
        return min(
            usable,
            key=lambda grant: (
                isinstance(grant.scope, TlsScope),  # the wider one last
                grant.bounded,
                -(grant.expires_at or float("inf")),
                grant.grant_id,
            ),
        )
    scope = missing_scope(request)
    if live:
        return Refuse(403, Reason.GRANT_USED_UP, f"the grant for {scope} is used up", scope=scope)
    if covering:
        return Refuse(403, Reason.GRANT_EXPIRED, f"the grant for {scope} has expired", scope=scope)
    return Refuse(403, Reason.SCOPE_MISSING, f"the agent has no grant for {scope}", scope=scope)


def _allow(grant: GrantView, upstream: Upstream, *, reserve_tokens: int = 0) -> Allow:
    return Allow(
        grant_id=grant.grant_id,
        upstream=upstream,
        scope=format_scope(grant.scope),
        reserve_tokens=reserve_tokens,
        bytes_left=grant.bytes_left,
    )


def _answer_self(request: EgressRequest, view: AgentView, *, now: float) -> Verdict:
    """Answer what the view alone can answer; `requests` is the daemon's, which looks before it calls decide()."""
    topic = request.path.removeprefix(SELF_PREFIX)
    if topic in ("whoami", "scopes", "budget") and request.method not in ("GET", "HEAD"):
        return Refuse(405, Reason.SELF_UNKNOWN, f"{topic} is read with GET")
    match topic:
        case "whoami":
            return Reply(
                200, {"agent_id": view.agent_id, "name": view.name, "policy": view.policy, "state": view.state}
            )
        case "scopes":
            return Reply(200, {"scopes": [_grant_json(grant, now=now) for grant in view.grants if _live(grant, now)]})
        case "budget":
            budget = view.budget
            return Reply(
                200,
                {
                    "llm_tokens_left": budget.llm_tokens_left,
                    "cost_usd_left": budget.cost_usd_left,
                    "requests_left": budget.requests_left,
                    "wall_seconds_left": budget.wall_seconds_left,
                    "cpu_seconds_left": budget.cpu_seconds_left,
                    "egress_bytes_left": budget.egress_bytes_left,
                },
            )
        case _:
            return Refuse(404, Reason.SELF_UNKNOWN, "there are whoami, scopes and budget under /.stockade/v1/")


def _live(grant: GrantView, now: float) -> bool:
    return (grant.expires_at is None or now < grant.expires_at) and grant.usable


def _grant_json(grant: GrantView, *, now: float) -> dict[str, Any]:
    told: dict[str, Any] = {
        "grant_id": grant.grant_id,
        "scope": format_scope(grant.scope),
        "expires_in_seconds": None if grant.expires_at is None else round(grant.expires_at - now, 3),
        "uses_left": grant.uses_left,
    }
    if grant.bytes_left is not None:
        told["bytes_left"] = grant.bytes_left
    if grant.cost_usd_left is not None:
        told["cost_usd_left"] = grant.cost_usd_left
    return told
