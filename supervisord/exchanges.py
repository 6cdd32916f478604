"""What workers ask, answered: look, decide, set aside, record, open the way, settle.

Nothing here parses an agent's bytes: a worker's typed request comes in, `decide()` judges it, and the entry is in the
log before the dialer is told to connect.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from gateway_client.egress import messages
from gateway_client.egress.decide import AgentView, BudgetView, Reason, decide
from gateway_client.egress.request import EgressRequest, Form
from supervisord.actions.types import Action, CannotRecord
from supervisord.budgets import MICROUSD_PER_USD, Amounts, Ledger
from supervisord.errors import StockadeError
from supervisord.ids import AgentId, GrantId
from supervisord.lifecycle import State
from supervisord.limit_actions import abandoned_action
from supervisord.pace import Pace
from supervisord.policy import OnDeny

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from supervisord.actions.log import ActionLog
    from supervisord.actions.types import JSON
    from supervisord.agents import Agent, Agents
    from supervisord.config import Network
    from supervisord.egress_plane import EgressPlane
    from supervisord.requests import Requests
    from supervisord.scopes import GrantBook
    from supervisord.store import Store

log = structlog.get_logger()

ASKS_OPEN_PER_AGENT_MAX: Final = 512
AUTHORITIES_KNOWN_MAX: Final = 4096


@dataclass(slots=True)
class Open:
    """An exchange that was allowed and has not ended."""

    agent_id: str
    grant_id: str
    reserved: Amounts
    object: str


@dataclass(slots=True, eq=False)
class _Judging:
    """An exchange that waits or is being judged; its outcome where the agent has gone away meanwhile."""

    outcome: messages.Outcome | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """How allowed requests leave: which prefaces the gateway understands, and what its addresses may be."""

    preface: bool
    forwarding: bool
    allow_networks: tuple[Network, ...]


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
    ) -> None:
        self._agents = agents
        self._book = book
        self._actions = actions
        self._plane = plane
        self._requests = requests
        self._store = store
        self._route = route
        self._on_deny = on_deny
        self._now = now
        self.ledgers: dict[AgentId, Ledger] = {}
        self._open: dict[tuple[str, int], Open] = {}
        self._asking: dict[str, int] = {}
        self._authorities: dict[str, set[str]] = {}
        self._pace = Pace()
        self._judging: dict[tuple[str, int], _Judging] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # --- the judge's part

    def ask(self, worker_id: str, ask: messages.Ask) -> None:
        count = self._asking.get(ask.agent_id, 0)
        if count >= ASKS_OPEN_PER_AGENT_MAX:
            self._plane.answer(worker_id, ask.x, messages.Refuse(503, Reason.LIMIT, "too many requests at once"))
            return
        self._asking[ask.agent_id] = count + 1
        judging = self._judging[worker_id, ask.x] = _Judging()
        self._in_background(self._judge(worker_id, ask, judging))

    def outcome(self, worker_id: str, outcome: messages.Outcome) -> None:
        key = (worker_id, outcome.x)
        if key in self._judging:
            self._judging[key].outcome = outcome
            return
        opened = self._open.pop(key, None)
        if opened is not None:
            self._in_background(self._end(opened, outcome))

    def rejected(self, rejected: messages.Rejected) -> None:
        details: dict[str, JSON] = {"status": rejected.status, "count": rejected.count}
        self._in_background(
            self._note(
                Action(
                    rejected.agent_id,
                    f"agent:{rejected.agent_id}",
                    "egress.request",
                    "malformed request",
                    "denied",
                    f"{rejected.reason_code}: {rejected.detail}",
                    details,
                )
            )
        )

    def worker_lost(self, worker_id: str) -> None:
        """Settle what a dead worker had open: what was allowed may have been used."""
        for key in [key for key in (*self._open, *self._judging) if key[0] == worker_id]:
            self.outcome(worker_id, messages.Outcome(key[1], "", 0, 0, 0, 0, error="the egress worker died"))

    # --- what others order

    def forget(self, agent_id: AgentId) -> None:
        self.ledgers.pop(agent_id, None)
        self._authorities.pop(agent_id, None)
        if count := self._pace.forget(agent_id):
            self._in_background(self._note(abandoned_action(agent_id, count)))

    def cut_grant(self, grant_id: GrantId) -> int:
        """Reset every open exchange that stands on this grant; gives their number."""
        cut: dict[str, list[int]] = {}
        for (worker_id, x), opened in self._open.items():
            if opened.grant_id == grant_id:
                cut.setdefault(worker_id, []).append(x)
        for worker_id, xs in cut.items():
            self._plane.cut_exchanges(worker_id, tuple(xs))
        return sum(map(len, cut.values()))

    def open_count(self, agent_id: str) -> int:
        return sum(opened.agent_id == agent_id for opened in self._open.values())

    def view(self, agent: Agent) -> AgentView:
        """What a decision on this agent depends on."""
        ledger = self.ledgers.get(agent.agent_id)
        budget = BudgetView()
        if ledger is not None:
            left = ledger.left()
            budget = BudgetView(
                left.llm_tokens,
                None if left.cost_microusd is None else left.cost_microusd / MICROUSD_PER_USD,
                left.requests,
            )
        return AgentView(
            agent_id=agent.agent_id,
            name=agent.name,
            policy=agent.what.policy,
            state=agent.state.value,
            grants=self._book.view(agent.agent_id),
            budget=budget,
            forwarding=self._route.forwarding,
            allow_networks=self._route.allow_networks,
        )

    # --- one exchange

    async def _judge(self, worker_id: str, ask: messages.Ask, judging: _Judging) -> None:
        try:
            if wait := self._pace.ask(ask.agent_id, self._now()):
                await asyncio.sleep(wait)
                if judging.outcome is not None:  # nobody waits for it any more, and nothing was decided
                    if count := self._pace.abandoned(ask.agent_id, self._now()):
                        await self._note(abandoned_action(ask.agent_id, count))
                    return
            agent = self._agents.get(ask.agent_id)
            if agent is None:
                verdict: messages.Verdict = messages.Refuse(503, Reason.AGENT_NOT_RUNNING, "the agent has ended")
            else:
                verdict = await self._decide(worker_id, agent, ask)
            if isinstance(verdict, messages.Refuse):
                self._pace.denied(ask.agent_id, self._now())
            self._judged(worker_id, ask, judging)
            if judging.outcome is not None:
                self.outcome(worker_id, judging.outcome)
                return
            if isinstance(verdict, messages.Allow) and verdict.upstream is not messages.Upstream.INSPECT:
                assert agent is not None  # noqa: S101 - only an agent is allowed anything
                told = self._plane.dial(self._dial(worker_id, agent, ask, verdict.upstream))
                if not told:  # the outcome of the refusal gives back what was set aside
                    verdict = messages.Refuse(502, Reason.UPSTREAM_FAILED, "the way to the gateway is being restarted")
            self._plane.answer(worker_id, ask.x, verdict)
        finally:
            self._judged(worker_id, ask, judging)
            count = self._asking[ask.agent_id] - 1
            if count:
                self._asking[ask.agent_id] = count
            else:
                del self._asking[ask.agent_id]

    def _judged(self, worker_id: str, ask: messages.Ask, judging: _Judging) -> None:
        # A worker that was started anew counts from the beginning: the place may be another's by now.
        if self._judging.get((worker_id, ask.x)) is judging:
            del self._judging[worker_id, ask.x]

    async def _decide(self, worker_id: str, agent: Agent, ask: messages.Ask) -> messages.Verdict:
        request = ask.request
        if request.form is Form.SELF and self._requests.mine(request):
            return await self._requests.answer(agent, request)
        verdict = decide(request, self.view(agent), now=self._now())
        if isinstance(verdict, messages.Refuse) and verdict.scope and self._on_deny(agent) is OnDeny.ASK:
            granted = await self._requests.hold(agent, verdict.scope, request.object)
            if granted:
                verdict = decide(request, self.view(agent), now=self._now())
        if isinstance(verdict, messages.Reply):
            return verdict
        opened = Open(agent.agent_id, "", Amounts(), request.object)
        if isinstance(verdict, messages.Allow) and verdict.grant_id:
            taken = self._take(agent, verdict)
            if isinstance(taken, messages.Refuse):
                verdict = taken
            else:
                opened.grant_id, opened.reserved = verdict.grant_id, taken
        try:
            await self._keep_uses(opened)
            await self._record(agent, ask, verdict)
        except StockadeError as error:
            self._give_back(opened, used=False)
            log.error("a request was refused since it cannot be recorded", cause=str(error))
            return messages.Refuse(503, Reason.LOG_UNAVAILABLE, "the action cannot be recorded, so it is not done")
        if isinstance(verdict, messages.Allow):
            again = self._still(agent, opened)
            if again is not None:
                self._give_back(opened, used=False)
                return again
            self._open[worker_id, ask.x] = opened
        return verdict

    def _take(self, agent: Agent, verdict: messages.Allow) -> Amounts | messages.Refuse:
        """Set aside a use of the grant and its part of the budget, before anything else can."""
        amounts = Amounts(llm_tokens=verdict.reserve_tokens, requests=1)
        ledger = self.ledgers.get(agent.agent_id)
        metered = ledger is not None and verdict.upstream is messages.Upstream.API
        try:
            if ledger is not None and metered:
                self.ledgers[agent.agent_id] = ledger.reserve(amounts)
            self._book.use(GrantId(verdict.grant_id))
        except StockadeError as error:
            if ledger is not None and metered:
                self.ledgers[agent.agent_id] = ledger
            exhausted = Reason.BUDGET_EXHAUSTED if "budget" in error.message else Reason.GRANT_USED_UP
            status = 429 if exhausted is Reason.BUDGET_EXHAUSTED else 403
            return messages.Refuse(status, exhausted, error.message, scope=verdict.scope if status == 403 else "")  # noqa: PLR2004
        return amounts if metered else Amounts()

    async def _keep_uses(self, opened: Open) -> None:
        """Write down that a counted use was taken, so that a restart gives none of them again."""
        if opened.grant_id:
            grant = self._book.get(GrantId(opened.grant_id))
            if grant.max_uses is not None:
                await self._store.update_uses({grant.grant_id: grant.uses + grant.reserved})

    def _still(self, agent: Agent, opened: Open) -> messages.Refuse | None:
        """Look once more after the wait for the disk: a revocation or a kill may have come in between."""
        if agent.state not in {State.STARTING, State.RUNNING}:
            return messages.Refuse(503, Reason.AGENT_NOT_RUNNING, f"the agent is {agent.state.value}")
        if opened.grant_id and not self._book.get(GrantId(opened.grant_id)).live(self._now()):
            return messages.Refuse(403, Reason.GRANT_EXPIRED, "the grant was taken back just now")
        return None

    def _give_back(self, opened: Open, *, used: bool, actual: Amounts | None = None) -> None:
        if not opened.grant_id:
            return
        self._book.settle(GrantId(opened.grant_id), used=used)
        ledger = self.ledgers.get(AgentId(opened.agent_id))
        if ledger is not None:
            self.ledgers[AgentId(opened.agent_id)] = ledger.settle(opened.reserved, actual or Amounts())

    async def _record(self, agent: Agent, ask: messages.Ask, verdict: messages.Allow | messages.Refuse) -> None:
        request = ask.request
        details: dict[str, JSON] = {"form": request.form.value, "x": ask.x}
        if request.model:
            details["model"] = request.model
            details["stream"] = request.stream
        if request.dropped:
            details["dropped"] = list(request.dropped)
        if isinstance(verdict, messages.Allow):
            details["grant_id"] = verdict.grant_id
            details["scope"] = verdict.scope
            action = Action(
                agent.agent_id, f"agent:{agent.agent_id}", "egress.request", request.object, "allowed", "", details
            )
            if self._first_call(agent, request):
                await self._actions.record(action)
            else:
                await self._actions.append(action)
            return
        details["status"] = verdict.status
        details["scope"] = verdict.scope
        reason = f"{verdict.reason_code}: {verdict.detail}"
        await self._actions.append(
            Action(
                agent.agent_id, f"agent:{agent.agent_id}", "egress.request", request.object, "denied", reason, details
            )
        )

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
                case messages.Upstream.TUNNEL:
                    allow = f"tcp:{request.authority}"
                case _:
                    allow = "api"
            preface = messages.Preface(agent.agent_id, agent.name, ask.x, allow, dict(agent.what.labels))
        return messages.Dial(worker_id, ask.x, agent.agent_id, upstream, preface)

    async def _end(self, opened: Open, outcome: messages.Outcome) -> None:
        usage = outcome.usage
        actual = Amounts(requests=opened.reserved.requests)
        details: dict[str, JSON] = {
            "x": outcome.x,
            "status": outcome.status,
            "bytes_up": outcome.bytes_up,
            "bytes_down": outcome.bytes_down,
            "duration_ms": outcome.duration_ms,
            "grant_id": opened.grant_id,
            "request_sha256": outcome.request_sha256,
            "response_sha256": outcome.response_sha256,
        }
        agent = self._agents.get(opened.agent_id)
        if usage is not None:
            cost = round((usage.cost_usd or 0.0) * MICROUSD_PER_USD)
            actual = Amounts(max(usage.input_tokens + usage.output_tokens, 0), max(cost, 0), opened.reserved.requests)
            details |= {
                "model": usage.model,
                "input_tokens": usage.input_tokens,
                "output_tokens": usage.output_tokens,
                "cost_usd": usage.cost_usd,
                "cost_estimated": usage.estimated,
            }
            if agent is not None:
                agent.spend.input_tokens += max(usage.input_tokens, 0)
                agent.spend.output_tokens += max(usage.output_tokens, 0)
                agent.spend.cost_usd += max(cost, 0) / MICROUSD_PER_USD
                agent.spend.estimated |= usage.estimated
                agent.spend.requests += 1
        self._give_back(opened, used=outcome.status != 502 or outcome.bytes_up > 0, actual=actual)  # noqa: PLR2004
        await self._note(
            Action(
                opened.agent_id,
                f"agent:{opened.agent_id}",
                "egress.outcome",
                opened.object,
                "failed" if outcome.error else "done",
                outcome.error,
                details,
            )
        )

    async def _note(self, action: Action) -> None:
        """Record what has happened already: a full log stops new requests, and cannot undo this."""
        try:
            await self._actions.append(action)
        except CannotRecord as error:
            log.error("an outcome is not in the action log", object=action.object, cause=str(error))

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
