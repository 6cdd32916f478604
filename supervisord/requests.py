"""Requests: what agents ask for and people answer. An agent can ask and wait here, and never grant.

`POST /.stockade/v1/requests {scope, reason}` makes one, `GET /.stockade/v1/requests/ID?wait=30s` tells its state, and
`on_deny: ask` makes one of every denied call that names a scope.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

import structlog

from gateway_client.egress import messages
from gateway_client.egress.decide import SELF_PREFIX, Reason
from gateway_client.egress.scope import BadScope, format_scope, parse_scope
from supervisord.actions.types import Action, CannotRecord
from supervisord.approvals import agree, check_person, digest, shown_line
from supervisord.asking import Asking
from supervisord.errors import Conflict, InvalidInput, NotFound, StockadeError
from supervisord.ids import AgentId, shown
from supervisord.question import Held, Request, RequestState, deciding, keep_asking, shown_to_agent
from supervisord.sizes import parse_duration

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from gateway_client.egress.request import EgressRequest
    from gateway_client.egress.scope import Scope
    from supervisord.actions.log import ActionLog
    from supervisord.actions.types import JSON
    from supervisord.agents import Agent, Agents
    from supervisord.approvals import Agreed, Offer
    from supervisord.policy import Policy
    from supervisord.scopes import Grant

log = structlog.get_logger()

PENDING_PER_AGENT_MAX: Final = 16
DECIDED_PER_AGENT_MAX: Final = 64
REQUESTS_KEPT_MAX: Final = 4096
"""Beyond it the oldest decided ones go; pending ones never do, they are bounded by agent."""
REASON_CHARACTERS_MAX: Final = 500
WAIT_SECONDS_MAX: Final = 60.0
DECIDING_SECONDS: Final = 1.0


class Requests:
    """Every request of agents that live. `check` raises for a scope that nobody could grant to an agent of a policy."""

    def __init__(
        self,
        *,
        agents: Agents,
        actions: ActionLog,
        new_id: Callable[[], str],
        now_ns: Callable[[], int],
        now: Callable[[], float],
        policy_of: Callable[[Agent], Policy],
        check: Callable[[Scope, Policy], None],
    ) -> None:
        self._agents = agents
        self._actions = actions
        self._new_id = new_id
        self._now_ns = now_ns
        self._now = now
        self._policy_of = policy_of
        self._check = check
        self._all: OrderedDict[str, Request] = OrderedDict()
        self._making: dict[tuple[AgentId, Scope], asyncio.Task[Request]] = {}
        self._asked: dict[AgentId, Asking[Request]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self.version = 0
        self.epoch = now_ns()
        self.on_change: list[Callable[[Request], None]] = []

    def all(self) -> list[Request]:
        return list(self._all.values())

    def get(self, request_id: str) -> Request:
        request = self._all.get(request_id)
        if request is None:
            raise NotFound(
                f"cannot find request {shown(request_id)}: there is none", remedy="see `stockadectl requests`"
            )
        return request

    async def wait_changed(self, since: int) -> int:
        while self.version <= since:
            await self._changed.wait()
        return self.version

    def changed_since(self, version: int) -> list[Request]:
        """Those that came or changed after that version, in the order in which they did."""
        return sorted((r for r in self._all.values() if r.version > version), key=lambda each: each.version)

    # --- people

    async def approve(
        self, request_id: str, offer: Offer, *, grant: Callable[[Request, Agreed], Awaitable[Grant]]
    ) -> tuple[Request, Grant | None]:
        """Approve what was shown, or less; `grant` makes the grant once enough people have, before that there is None.

        Raises Conflict where it was decided or is another than was shown, PermissionDenied where this one may not.
        """
        request = self._pending(request_id)
        try:
            agreed = self._judge(request, offer)
        except StockadeError as error:
            # Whoever tries what they may not is on record; and that they may not does not hang on the record.
            await self._actions.append(self._action(request, offer.by, "request.approve", "denied", error.message))
            raise
        with deciding(request):
            if len(agreed.by) < request.approvers:
                await self._actions.record(self._approval(request, offer, agreed))
                request.offers += (offer,)
                self._note(request)
                return request, None
            made = await grant(request, agreed)
        request.offers += (offer,)
        request.grant_id = made.grant_id
        request.answer = agreed.reason
        self._decide(request, RequestState.APPROVED, actor=", ".join(agreed.by))
        return request, made

    def _judge(self, request: Request, offer: Offer) -> Agreed:
        if offer.digest and offer.digest != request.digest:
            raise Conflict(
                f"cannot approve {request.request_id}: it is not what was shown (its digest is {request.digest})",
                remedy="look at `stockadectl requests` again",
            )
        agent = self._agents.find_live(request.agent_id)
        rules = self._policy_of(agent).grants
        check_person(
            offer.by,
            agent_id=request.agent_id,
            launched_by=agent.what.launched_by,
            before=request.approved_by,
            rules=rules,
        )
        request.approvers = max(request.approvers, rules.approvers)  # a policy that was read anew asks for no fewer
        return agree(request.scope, (*request.offers, offer))

    def _approval(self, request: Request, offer: Offer, agreed: Agreed) -> Action:
        more: dict[str, JSON] = {
            "approvals": len(agreed.by),
            "approvers": request.approvers,
            **offer.terms.to_json(),
            **({"ticket": offer.ticket} if offer.ticket else {}),
            **({"narrower": format_scope(offer.scope)} if offer.scope else {}),
        }
        return self._action(request, offer.by, "request.approve", "done", offer.reason, more=more)

    async def deny(self, request_id: str, *, actor: str, reason: str) -> Request:
        request = self._pending(request_id)
        with deciding(request):
            await self._actions.record(self._action(request, actor, "request.deny", "done", reason))
        request.answer = reason
        self._decide(request, RequestState.DENIED, actor=actor)
        agent = self._agents.get(request.agent_id)
        if agent is not None and agent.live:
            until = self._now() + self._policy_of(agent).grants.ask_again_seconds
            self._of(request.agent_id).deny(request.scope, request, until=until)
        return request

    def end_agent(self, agent_id: AgentId) -> None:
        self._asked.pop(agent_id, None)
        for request in self._all.values():
            if request.agent_id == agent_id and request.state is RequestState.PENDING:
                self._decide(request, RequestState.EXPIRED, actor="daemon")

    # --- agents

    def mine(self, request: EgressRequest) -> bool:
        """Tell whether this self-service call is for here."""
        topic = request.path.removeprefix(SELF_PREFIX)
        return topic == "requests" or topic.startswith("requests/")

    async def answer(
        self, agent: Agent, request: EgressRequest, *, gone: asyncio.Future[None] | None = None
    ) -> messages.Verdict:
        """Serve `requests` and `requests/ID`; `gone` is done when nobody waits for the answer any more."""
        topic = request.path.removeprefix(SELF_PREFIX)
        if topic == "requests" and request.method == "POST":
            return await self._post(agent, request.body)
        if topic.startswith("requests/") and request.method == "GET":
            return await self._get(agent, topic.removeprefix("requests/"), request.query, gone)
        return messages.Refuse(405, Reason.SELF_UNKNOWN, "POST to requests, GET requests/ID")

    async def hold(self, agent: Agent, scope_text: str, what: str, *, gone: asyncio.Future[None]) -> Held:
        """Ask people for a scope on the agent's behalf and wait, unless the client is `gone`.

        The question outlives the client for its time: a client that tries again joins it, and people are asked once.
        """
        try:
            seconds = self._policy_of(agent).egress.hold_seconds
            request = await self._ask(agent, parse_scope(scope_text), f"wanted for {what}", held_seconds=seconds)
        except (StockadeError, BadScope) as error:
            said = error.message if isinstance(error, StockadeError) else str(error)
            log.info("a denied call makes no request", agent=agent.agent_id, cause=said)
            return Held(granted=False, said=f"nobody was asked: {said}")
        await self._wait(request, seconds, gone)
        match request.state:
            case RequestState.APPROVED:
                return Held(granted=True)
            case RequestState.DENIED:
                return Held(granted=False, said=f"denied: {request.answer}" if request.answer else "denied")
            case RequestState.PENDING if gone.done():
                return Held(granted=False, said="the client has gone")
            case _:
                return Held(granted=False, said="nobody answered in time")

    async def _wait(self, request: Request, seconds: float, gone: asyncio.Future[None] | None) -> None:
        """Return when it is decided, the time is up, or the asker is gone."""
        if request.decided.is_set():
            return
        decided = asyncio.ensure_future(request.decided.wait())
        waiters: list[asyncio.Future[Any]] = [decided]
        if gone is not None:
            waiters.append(gone)
        try:
            await asyncio.wait(waiters, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            decided.cancel()

    async def _post(self, agent: Agent, body: str) -> messages.Verdict:
        try:
            value = json.loads(body)
            scope_text, reason = value["scope"], value.get("reason", "")
            if not isinstance(scope_text, str) or not isinstance(reason, str):
                raise TypeError("scope and reason are strings")
            request = await self._ask(agent, parse_scope(scope_text), reason)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return messages.Refuse(400, "bad_request", f'cannot read the request: {error}; send {{"scope", "reason"}}')
        except Conflict as error:
            return messages.Refuse(429, Reason.LIMIT, error.message)
        except CannotRecord:
            return messages.Refuse(503, Reason.LOG_UNAVAILABLE, "the request cannot be recorded")
        except StockadeError as error:
            return messages.Refuse(403, Reason.NOT_GRANTABLE, error.message)
        return messages.Reply(202 if request.state is RequestState.PENDING else 200, shown_to_agent(request))

    async def _get(
        self, agent: Agent, request_id: str, query: str, gone: asyncio.Future[None] | None
    ) -> messages.Verdict:
        request = self._all.get(request_id)
        if request is None or request.agent_id != agent.agent_id:
            return messages.Refuse(404, Reason.SELF_UNKNOWN, "there is no such request of yours")
        wait = parse_qs(query, max_num_fields=8).get("wait", ["0s"])[0] if query else "0s"
        try:
            seconds = min(parse_duration(wait), WAIT_SECONDS_MAX)
        except InvalidInput as error:
            return messages.Refuse(400, "bad_request", error.message)
        await self._wait(request, seconds, gone)
        return messages.Reply(200, shown_to_agent(request))

    async def _ask(self, agent: Agent, scope: Scope, reason: str, *, held_seconds: float | None = None) -> Request:
        """The request of this agent for this scope; raises Conflict where it has too many, CannotRecord.

        One that was denied lately is the answer again. `held_seconds` is how long it is asked for a held call.
        """
        policy = self._policy_of(agent)
        if not format_scope(scope).isprintable():
            raise InvalidInput("cannot ask for a scope with characters that cannot be shown")
        self._check(scope, policy)
        mine = [r for r in self._all.values() if r.agent_id == agent.agent_id and r.state is RequestState.PENDING]
        for request in mine:
            if request.scope == scope:
                if held_seconds is None:
                    keep_asking(request)
                return request  # the same question again tires people
        asked = self._of(agent.agent_id)
        denied = asked.lately_denied(scope, self._now())
        if denied is not None:
            return denied
        key = (agent.agent_id, scope)
        making = self._making.get(key)
        if making is None:
            # Counted before the wait for the disk: those that come meanwhile see it.
            if len(mine) + sum(whose == agent.agent_id for whose, _ in self._making) >= PENDING_PER_AGENT_MAX:
                raise Conflict(f"cannot ask: {PENDING_PER_AGENT_MAX} requests are pending", remedy="wait for answers")
            if not asked.take(self._now(), policy.grants.asks_per_minute):
                raise Conflict(
                    f"cannot ask: {policy.grants.asks_per_minute} a minute are the most", remedy="ask for less, later"
                )
            making = asyncio.get_running_loop().create_task(self._make(agent, scope, reason, policy, held_seconds))
            self._making[key] = making
            making.add_done_callback(lambda _: self._making.pop(key, None))
        request = await asyncio.shield(making)
        if held_seconds is None:
            keep_asking(request)
        return request

    async def _make(
        self, agent: Agent, scope: Scope, reason: str, policy: Policy, held_seconds: float | None
    ) -> Request:
        request = Request(
            self._new_id(),
            agent.agent_id,
            agent.name,
            scope,
            shown_line(reason, REASON_CHARACTERS_MAX),
            self._now_ns(),
            approvers=policy.grants.approvers,
        )
        request.digest = digest(
            request_id=request.request_id,
            agent_id=request.agent_id,
            agent_name=request.agent_name,
            scope=scope,
            reason=request.reason,
        )
        await self._actions.record(
            self._action(request, f"agent:{agent.agent_id}", "request.create", "done", request.reason)
        )
        self._all[request.request_id] = request
        if not agent.live:
            self._decide(request, RequestState.EXPIRED, actor="daemon")  # it ended while this was recorded
        elif held_seconds is not None:
            request.expiry = asyncio.get_running_loop().call_later(held_seconds, self._time_up, request)
        self._forget_old(agent.agent_id)
        self._note(request)
        return request

    def _time_up(self, request: Request) -> None:
        """Nobody answered in time, which is a denial; a decision that is being written comes first."""
        if request.deciding:
            request.expiry = asyncio.get_running_loop().call_later(DECIDING_SECONDS, self._time_up, request)
        elif request.state is RequestState.PENDING:
            self._decide(request, RequestState.EXPIRED, actor="daemon")
            task = asyncio.get_running_loop().create_task(self._record_expiry(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _record_expiry(self, request: Request) -> None:
        await self._actions.note(self._action(request, "daemon", "request.expire", "denied", "nobody answered in time"))

    def _action(
        self,
        request: Request,
        actor: str,
        verb: str,
        verdict: str,
        reason: str,
        *,
        more: Mapping[str, JSON] | None = None,
    ) -> Action:
        details: dict[str, JSON] = {"request_id": request.request_id, "digest": request.digest, **(more or {})}
        return Action(request.agent_id, actor, verb, format_scope(request.scope), verdict, reason, details)

    def _of(self, agent_id: AgentId) -> Asking[Request]:
        return self._asked.setdefault(agent_id, Asking())

    def _forget_old(self, agent_id: AgentId) -> None:
        decided = [r for r in self._all.values() if r.state is not RequestState.PENDING]
        own = [r for r in decided if r.agent_id == agent_id]
        gone = own[: max(0, len(own) - DECIDED_PER_AGENT_MAX)]
        rest = [r for r in decided if r not in gone]
        gone += rest[: max(0, len(self._all) - len(gone) - REQUESTS_KEPT_MAX)]
        for request in gone:
            del self._all[request.request_id]

    def _pending(self, request_id: str) -> Request:
        request = self.get(request_id)
        if request.state is not RequestState.PENDING or request.deciding:
            state = "being decided by somebody else" if request.deciding else request.state.value
            raise Conflict(f"cannot decide request {request_id}: it is {state}", remedy="see `stockadectl requests`")
        return request

    def _decide(self, request: Request, state: RequestState, *, actor: str) -> None:
        request.state = state
        request.decided_by = actor
        request.decided_at_ns = self._now_ns()
        keep_asking(request)
        request.decided.set()
        self._note(request)

    def _note(self, request: Request) -> None:
        self.version += 1
        request.version = self.version
        for tell in self.on_change:
            tell(request)
        woken, self._changed = self._changed, asyncio.Event()
        woken.set()
