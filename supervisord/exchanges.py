"""What workers ask, answered: look, decide, set aside, record, open the way, settle.

Nothing here parses an agent's bytes: a worker's typed request comes in, `decide()` judges it, and the entry is in the
log before the dialer is told to connect.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, assert_never

import structlog

from gateway_client.egress import messages
from gateway_client.egress.decide import AgentView, Reason, decide, mcp_globs
from gateway_client.egress.request import EgressRequest, Form
from supervisord.actions.types import Action
from supervisord.budgets import (
    COST_MICROUSD_MAX,
    LLM_TOKENS_MAX,
    MICROUSD_PER_USD,
    Amounts,
)
from supervisord.errors import StockadeError
from supervisord.exchange_actions import (
    guardrail_action,
    guardrail_facts,
    outcome_details,
    rejected_action,
    request_action,
)
from supervisord.ids import AgentId, GrantId
from supervisord.ledgers import Ledgers
from supervisord.lifecycle import State
from supervisord.limit_actions import abandoned_action
from supervisord.loans import Loans
from supervisord.pace import Pace
from supervisord.policy import OnDeny
from supervisord.replies import fitting
from supervisord.settling import Settling

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from supervisord.actions.log import ActionLog
    from supervisord.actions.types import JSON
    from supervisord.agents import Agent, Agents
    from supervisord.budgets import LabelBudget
    from supervisord.config import Network
    from supervisord.egress_plane import EgressPlane
    from supervisord.gateway_health import GatewayHealth
    from supervisord.gateway_process import GuardrailVerdict
    from supervisord.requests import Requests
    from supervisord.scopes import GrantBook
    from supervisord.store import Store

log = structlog.get_logger()

ASKS_OPEN_PER_AGENT_MAX: Final = 512
EXCHANGES_OPEN_PER_AGENT_MAX: Final = 1024
AUTHORITIES_KNOWN_MAX: Final = 4096
NOT_SENT: Final = frozenset({502, 503})
"""What the worker answers itself where nothing could be sent, or might be: with no bytes up the call was not made."""
WORKER_DIED: Final = "the egress worker died"


class Phase(Enum):
    """How far an exchange is. What ended is no longer in the table."""

    ASKED = auto()
    ALLOWED = auto()


@dataclass(slots=True)
class Open:
    """An exchange that was asked about and has not ended.

    `outcome` is set where it ended before it was judged, as when the agent hangs up at once: nothing is dialed then.
    """

    agent_id: str
    request: EgressRequest
    worker_id: str = ""
    grant_id: str = ""
    reserved: Amounts = field(default_factory=Amounts)
    metered: bool = False
    lent: bool = False
    """Whether its bytes are counted on a loan."""
    counted: bool = True
    """Whether it is a use of its grant; its bytes count either way."""
    phase: Phase = Phase.ASKED
    settled: bool = False
    cut: bool = False
    """Whether it was ordered to end."""
    guardrails: list[JSON] = field(default_factory=list)
    """What the gateway's guardrails found, as its outcome tells it."""
    outcome: messages.Outcome | None = None
    gone: asyncio.Future[None] | None = None
    """Done when it has ended, for what waits for people meanwhile."""


@dataclass(frozen=True, slots=True)
class CutOrder:
    """A cut that was ordered: how many exchanges, and what is done when none of them carries a byte any more."""

    relays: int
    confirmed: tuple[asyncio.Future[None], ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """How allowed requests leave: which prefaces the gateway understands, and what its addresses may be."""

    gateway: str
    """Its kind, for the log."""
    preface: bool
    forwarding: bool
    allow_networks: tuple[Network, ...]
    mcp_servers: tuple[str, ...] = ()


class Exchanges:
    """The judge of the egress plane."""

    def __init__(
        self,
        *,
        agents: Agents,
        book: GrantBook,
        actions: ActionLog,
        plane: EgressPlane,
        requests: Requests,
        store: Store,
        route: Route,
        on_deny: Callable[[Agent], OnDeny],
        now: Callable[[], float],
        label_budgets: Sequence[LabelBudget] = (),
    ) -> None:
        self._agents = agents
        self._book = book
        self._actions = actions
        self._plane = plane
        self._requests = requests
        self._route = route
        self._on_deny = on_deny
        self._now = now
        self.ledgers = Ledgers(store, labels=label_budgets)
        self._loans = Loans(self.ledgers, plane.lend)
        self._settling = Settling(
            book=book,
            ledgers=self.ledgers,
            loans=self._loans,
            store=store,
            cut=self.cut_grant,
            note=self.note,
            in_background=self._in_background,
        )
        self.gateway: GatewayHealth | None = None
        self._open: dict[tuple[str, int], Open] = {}
        self._ending: dict[tuple[str, int], Open] = {}
        self._open_of: dict[str, int] = {}
        self._asking: dict[str, int] = {}
        self._authorities: dict[str, set[str]] = {}
        self._pace = Pace()
        self._tasks: set[asyncio.Task[None]] = set()

    # --- the judge's part

    def ask(self, worker_id: str, ask: messages.Ask) -> None:
        key = (worker_id, ask.x)
        mine = self._open_of.get(ask.agent_id, 0)
        full = self._asking.get(ask.agent_id, 0) >= ASKS_OPEN_PER_AGENT_MAX or mine >= EXCHANGES_OPEN_PER_AGENT_MAX
        if full or key in self._open:  # a worker never asks twice with one x, unless it was taken over
            self._plane.answer(worker_id, ask.x, messages.Refuse(503, Reason.LIMIT, "too many requests at once"))
            return
        # In the table from the question on: an agent that hangs up before it is judged has ended all the same.
        self._open[key] = opened = Open(ask.agent_id, ask.request, worker_id)
        self._open_of[ask.agent_id] = mine + 1
        self._asking[ask.agent_id] = self._asking.get(ask.agent_id, 0) + 1
        self._in_background(self._judge(worker_id, ask, opened))

    def outcome(self, worker_id: str, outcome: messages.Outcome) -> None:
        self._ended((worker_id, outcome.x), outcome)

    def moved(self, worker_id: str, moved: messages.Moved) -> None:
        agent = self._agents.get(moved.agent_id)
        want = moved.want if agent is not None and agent.live else 0
        self._in_background(
            self._loans.moved(worker_id, AgentId(moved.agent_id), used=moved.used, back=moved.back, want=want)
        )

    def _ended(self, key: tuple[str, int], outcome: messages.Outcome) -> None:
        opened = self._open.get(key)
        if opened is None:
            return  # refused, or ended before
        match opened.phase:
            case Phase.ASKED:
                opened.outcome = outcome
                if opened.gone is not None and not opened.gone.done():
                    opened.gone.set_result(None)
            case Phase.ALLOWED:
                self._ending[key] = opened
                self._remove(key)
                self._in_background(self._over(key, opened, outcome))
            case _:
                assert_never(opened.phase)

    async def _over(self, key: tuple[str, int], opened: Open, outcome: messages.Outcome) -> None:
        await asyncio.sleep(0)  # a verdict of the gateway that was told before may be read in the same turn
        self._ending.pop(key, None)
        await self._end(opened, outcome)

    def _remove(self, key: tuple[str, int]) -> None:
        opened = self._open.pop(key)
        left = self._open_of[opened.agent_id] - 1
        if left:
            self._open_of[opened.agent_id] = left
        else:
            del self._open_of[opened.agent_id]

    def rejected(self, rejected: messages.Rejected) -> None:
        self._in_background(self.note(rejected_action(rejected)))

    def not_connected(self, cause: str) -> None:
        if self.gateway is not None:
            self.gateway.cannot_connect(cause)

    def worker_lost(self, worker_id: str) -> None:
        """Settle what a dead worker had open: what was allowed may have been used, what was asked is not begun."""
        self._loans.lost(worker_id)
        for key in [key for key in self._open if key[0] == worker_id]:
            self._ended(key, messages.Outcome(key[1], self._open[key].agent_id, 0, 0, 0, 0, error=WORKER_DIED))

    # --- what others order

    def forget(self, agent_id: AgentId) -> None:
        self.ledgers.forget(agent_id)
        self._authorities.pop(agent_id, None)
        if count := self._pace.forget(agent_id):
            self._in_background(self.note(abandoned_action(agent_id, count)))

    def cut_grant(self, grant_id: GrantId) -> CutOrder:
        """Reset every open exchange that stands on this grant, with or without its worker's help; never raises.

        One that is being judged now is refused by `_still`, since the grant has ended before this is called.
        """
        cut: dict[str, list[int]] = {}
        for (worker_id, x), opened in self._open.items():
            if opened.grant_id == grant_id and opened.phase is Phase.ALLOWED:
                opened.cut = True
                cut.setdefault(worker_id, []).append(x)
        confirmed: list[asyncio.Future[None]] = []
        for worker_id, xs in cut.items():
            confirmed += self._plane.cut_exchanges(worker_id, xs)
        return CutOrder(sum(map(len, cut.values())), tuple(confirmed))

    def open_count(self, agent_id: str) -> int:
        return self._open_of.get(agent_id, 0)

    def view(self, agent: Agent) -> AgentView:
        """What a decision on this agent depends on."""
        return AgentView(
            agent_id=agent.agent_id,
            name=agent.name,
            policy=agent.what.policy,
            state=agent.state.value,
            grants=self._book.view(agent.agent_id),
            budget=replace(self.ledgers.view(agent.agent_id), egress_bytes_left=self._loans.left(agent.agent_id)),
            forwarding=self._route.forwarding,
            allow_networks=self._route.allow_networks,
            mcp_servers=self._route.mcp_servers,
        )

    # --- one exchange

    async def _judge(self, worker_id: str, ask: messages.Ask, opened: Open) -> None:
        key = (worker_id, ask.x)
        verdict: messages.Verdict = messages.Refuse(503, Reason.LOG_UNAVAILABLE, "the request could not be judged")
        try:
            if wait := self._pace.ask(ask.agent_id, self._now()):
                await asyncio.sleep(wait)
                if opened.outcome is not None:  # nobody waits for it any more, and nothing was decided
                    if count := self._pace.abandoned(ask.agent_id, self._now()):
                        await self.note(abandoned_action(ask.agent_id, count))
                    return
            agent = self._agents.get(ask.agent_id)
            if agent is None:
                verdict = messages.Refuse(503, Reason.AGENT_NOT_RUNNING, "the agent has ended")
            else:
                verdict = await self._decide(agent, ask, opened)
            if isinstance(verdict, messages.Refuse):
                self._pace.denied(ask.agent_id, self._now())
            # No await from the last look at grant and agent to the order to dial: a cut comes before or after both.
            if isinstance(verdict, messages.Allow) and verdict.upstream.opens:
                assert agent is not None  # noqa: S101 - only an agent is allowed anything
                told = self._plane.dial(self._dial(worker_id, agent, ask, verdict.upstream))
                if not told:  # the outcome of the refusal gives back what was set aside
                    verdict = messages.Refuse(502, Reason.UPSTREAM_FAILED, "the way to the gateway is being restarted")
        finally:
            if opened.phase is Phase.ASKED:
                self._remove(key)
                # Where it was not yet: whatever went wrong, nothing went out.
                self._settling.give_back(opened, used=False)
            count = self._asking[ask.agent_id] - 1
            if count:
                self._asking[ask.agent_id] = count
            else:
                del self._asking[ask.agent_id]
            self._plane.answer(worker_id, ask.x, verdict)

    async def _decide(self, agent: Agent, ask: messages.Ask, opened: Open) -> messages.Verdict:
        request = ask.request
        if request.form is Form.SELF and self._requests.mine(request):
            return await self._requests.answer(agent, request, gone=_gone(opened))
        verdict = decide(request, self.view(agent), now=self._now())
        # Not for a look-up, which nobody waits for so long, and which would ask for a whole host.
        may_ask = request.form is not Form.NAME
        if isinstance(verdict, messages.Refuse) and verdict.scope and may_ask and self._on_deny(agent) is OnDeny.ASK:
            held = await self._requests.hold(agent, verdict.scope, request.object, gone=_gone(opened))
            if held.granted and opened.outcome is None:
                verdict = decide(request, self.view(agent), now=self._now())
            elif held.said:
                verdict = replace(verdict, detail=f"{verdict.detail}; {held.said}")
        match verdict:
            case messages.Reply():
                return fitting(verdict, request.query)
            case messages.Allow() if self._leads_nowhere(verdict):
                verdict = messages.Refuse(
                    503, Reason.GATEWAY_DOWN, "the gateway does not answer; try again in a moment"
                )
            case messages.Allow() if verdict.grant_id:
                lent = self.ledgers.bytes_left(agent.agent_id) is not None
                verdict = self._settling.take(replace(verdict, lent=lent), opened)
        try:
            await self._settling.keep(opened)
            await self._record(agent, ask, verdict)
        except StockadeError as error:
            self._settling.give_back(opened, used=False)
            log.error("a request was refused since it cannot be recorded", cause=str(error))
            return messages.Refuse(503, Reason.LOG_UNAVAILABLE, "the action cannot be recorded, so it is not done")
        return await self._begin(agent, opened, verdict) if isinstance(verdict, messages.Allow) else verdict

    def _leads_nowhere(self, verdict: messages.Allow) -> bool:
        """Tell whether this way out leads to a gateway that does not answer; a forward proxy beside it is another."""
        if verdict.upstream is messages.Upstream.INSPECT or (self.gateway is None or self.gateway.passes):
            return False
        return verdict.upstream is messages.Upstream.API or self._route.preface

    async def _begin(self, agent: Agent, opened: Open, verdict: messages.Allow) -> messages.Verdict:
        """Let it go, unless agent, worker or grant have gone while the disk took the record."""
        if opened.outcome is not None:
            await self._end(opened, opened.outcome, begun=False)
            return messages.Refuse(503, Reason.AGENT_NOT_RUNNING, "the connection has ended")
        again = self._still(agent, opened)
        if again is not None:
            self._settling.give_back(opened, used=False)
            return again
        opened.phase = Phase.ALLOWED
        return verdict

    def _still(self, agent: Agent, opened: Open) -> messages.Refuse | None:
        """Look once more after the wait for the disk: a revocation or a kill may have come in between."""
        if agent.state not in {State.STARTING, State.RUNNING}:
            return messages.Refuse(503, Reason.AGENT_NOT_RUNNING, f"the agent is {agent.state.value}")
        if opened.grant_id and not self._book.get(GrantId(opened.grant_id)).live(self._now()):
            return messages.Refuse(403, Reason.GRANT_EXPIRED, "the grant was taken back just now")
        return None

    async def _record(self, agent: Agent, ask: messages.Ask, verdict: messages.Allow | messages.Refuse) -> None:
        action = request_action(agent.agent_id, ask.x, ask.request, verdict)
        if isinstance(verdict, messages.Allow) and self._first_call(agent, ask.request):
            await self._actions.record(action)
        else:
            await self._actions.append(action)

    def _first_call(self, agent: Agent, request: EgressRequest) -> bool:
        """Tell whether this is the agent's first call to that authority, which is always durable (DESIGN section 7)."""
        known = self._authorities.setdefault(agent.agent_id, set())
        authority = f"{request.host}:{request.port}"
        if authority in known:
            return False
        if len(known) < AUTHORITIES_KNOWN_MAX:
            known.add(authority)
        return True

    def _dial(self, worker_id: str, agent: Agent, ask: messages.Ask, upstream: messages.Upstream) -> messages.Dial:
        request = ask.request
        preface = None
        if self._route.preface:
            match upstream:
                case messages.Upstream.FORWARD:
                    allow = f"http://{request.authority}"
                case messages.Upstream.TUNNEL | messages.Upstream.SEALED:
                    allow = f"tcp:{request.authority}"
                case messages.Upstream.MCP:
                    globs = mcp_globs(request.server, self.view(agent), now=self._now())
                    allow = f"mcp:{request.server}:{','.join(globs)}"
                case _:
                    allow = "api"
            preface = messages.Preface(agent.agent_id, agent.name, ask.x, allow, dict(agent.what.labels))
        return messages.Dial(worker_id, ask.x, agent.agent_id, upstream, preface)

    def guardrail(self, verdict: GuardrailVerdict) -> None:
        """Record what the gateway found in an exchange, and keep it for the outcome of that exchange."""
        agent = self._agents.get(verdict.agent_id)
        if agent is None:
            log.warning("a verdict on nobody's exchange", agent=verdict.agent_id)
            return
        for key, opened in (*self._open.items(), *self._ending.items()):
            if key[1] == verdict.x and opened.agent_id == verdict.agent_id:
                opened.guardrails.append(guardrail_facts(verdict))
        self._in_background(self.note(guardrail_action(verdict)))

    async def _end(self, opened: Open, outcome: messages.Outcome, *, begun: bool = True) -> None:
        usage = outcome.usage
        # Nobody said what a call used that went upstream: then it used all that was set aside for it.
        sent = begun and (outcome.bytes_up > 0 or outcome.error == WORKER_DIED)
        actual = opened.reserved if sent else Amounts(requests=opened.reserved.requests if begun else 0)
        agent = self._agents.get(opened.agent_id)
        if usage is not None and begun:
            tokens_in, tokens_out, cost = _spent(usage)
            actual = Amounts(tokens_in + tokens_out, cost, opened.reserved.requests)
            if agent is not None:
                agent.spend.input_tokens += tokens_in
                agent.spend.output_tokens += tokens_out
                agent.spend.cost_usd += cost / MICROUSD_PER_USD
                agent.spend.estimated |= usage.estimated
                agent.spend.requests += 1
        used = begun and (outcome.status not in NOT_SENT or outcome.bytes_up > 0)
        # A worker that died says nothing of bytes: all that were left may have passed.
        spent = outcome.grant_spent or (begun and outcome.error == WORKER_DIED)
        moved = max(outcome.bytes_up, 0) + max(outcome.bytes_down, 0) if begun else 0
        self._settling.give_back(opened, used=used, actual=actual, bytes_used=moved, spent=spent)
        await self.note(
            Action(
                opened.agent_id,
                f"agent:{opened.agent_id}",
                "egress.outcome",
                opened.request.object,
                "failed" if outcome.error else "done",
                self._reason(opened, outcome),
                outcome_details(
                    opened.request,
                    outcome if begun else replace(outcome, usage=None),
                    grant_id=opened.grant_id,
                    gateway=self._route.gateway,
                    guardrails=opened.guardrails,
                ),
            )
        )

    def _reason(self, opened: Open, outcome: messages.Outcome) -> str:
        """Why it failed: what was cut did for that, also where the worker saw the end before it heard of the order."""
        agent = self._agents.get(opened.agent_id)
        cut = opened.cut or (agent is not None and agent.state in (State.KILLING, State.KILLED))
        return messages.CUT if cut and outcome.error not in ("", WORKER_DIED) else outcome.error

    async def note(self, action: Action) -> None:
        """Record what has happened already: a full log stops new requests, and cannot undo this."""
        await self._actions.note(action)

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _gone(opened: Open) -> asyncio.Future[None]:
    """Give what is done once the exchange has ended: made only where somebody waits for long."""
    if opened.gone is None:
        opened.gone = asyncio.get_running_loop().create_future()
        if opened.outcome is not None:
            opened.gone.set_result(None)
    return opened.gone


def _spent(usage: messages.Usage) -> tuple[int, int, int]:
    """Tokens in, tokens out and millionths of a dollar, bounded: a worker that was taken over may say anything."""
    cost = usage.cost_usd or 0.0
    microusd = COST_MICROUSD_MAX if math.isnan(cost) else min(max(cost, 0.0) * MICROUSD_PER_USD, COST_MICROUSD_MAX)
    return (
        min(max(usage.input_tokens, 0), LLM_TOKENS_MAX),
        min(max(usage.output_tokens, 0), LLM_TOKENS_MAX),
        round(microusd),
    )
