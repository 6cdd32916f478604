"""Requests: what agents ask for and people answer. An agent can ask and wait here, and never grant.

`POST /.stockade/v1/requests {scope, reason}` makes one, `GET /.stockade/v1/requests/ID?wait=30s` tells its state, and
`on_deny: ask` makes one of every denied call that names a scope.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs

import structlog

from gateway_client.egress import messages
from gateway_client.egress.decide import SELF_PREFIX, Reason
from gateway_client.egress.scope import BadScope, format_scope, parse_scope
from supervisord.actions.types import Action, CannotRecord
from supervisord.errors import Conflict, InvalidInput, NotFound, PermissionDenied
from supervisord.ids import AgentId, shown
from supervisord.sizes import parse_duration

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from gateway_client.egress.request import EgressRequest
    from gateway_client.egress.scope import Scope
    from supervisord.actions.log import ActionLog
    from supervisord.agents import Agent, Agents
    from supervisord.scopes import Grant

log = structlog.get_logger()

PENDING_PER_AGENT_MAX: Final = 16
DECIDED_PER_AGENT_MAX: Final = 64
REQUESTS_KEPT_MAX: Final = 4096
"""Beyond it the oldest decided ones go; pending ones never do, they are bounded by agent."""
REASON_CHARACTERS_MAX: Final = 500
WAIT_SECONDS_MAX: Final = 60.0
HOLD_SECONDS_MAX: Final = 300.0

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class RequestState(Enum):
    PENDING = "pending"
    APPROVED = "approved"
    DENIED = "denied"
    EXPIRED = "expired"


@dataclass(slots=True)
class Request:
    """One question of an agent's. `reason` is the agent's own words: cut, and without control characters."""

    request_id: str
    agent_id: AgentId
    agent_name: str
    scope: Scope
    reason: str
    asked_at_ns: int
    state: RequestState = RequestState.PENDING
    decided_by: str = ""
    decided_at_ns: int | None = None
    grant_id: str = ""
    answer: str = ""
    deciding: bool = False
    decided: asyncio.Event = field(default_factory=asyncio.Event)


class Requests:
    """Every request of agents that live; `grant` is called for an approval and makes the grant."""

    def __init__(
        self,
        *,
        agents: Agents,
        actions: ActionLog,
        new_id: Callable[[], str],
        now_ns: Callable[[], int],
    ) -> None:
        self._agents = agents
        self._actions = actions
        self._new_id = new_id
        self._now_ns = now_ns
        self._all: OrderedDict[str, Request] = OrderedDict()
        self._asking: dict[tuple[AgentId, Scope], asyncio.Task[Request]] = {}
        self._changed = asyncio.Event()
        self.version = 0

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

    # --- people

    async def approve(
        self, request_id: str, *, actor: str, shown_scope: str, grant: Callable[[Request], Awaitable[Grant]]
    ) -> tuple[Request, Grant]:
        """Approve what was shown, and nothing else; raises Conflict where it was decided or is another scope."""
        request = self._pending(request_id)
        if shown_scope and shown_scope != format_scope(request.scope):
            raise Conflict(
                f"cannot approve {request_id}: it asks for {format_scope(request.scope)}, not for {shown(shown_scope)}",
                remedy="look at `stockadectl requests` again",
            )
        if actor == f"agent:{request.agent_id}":
            raise PermissionDenied("cannot approve one's own request", remedy="have another person approve it")
        with _deciding(request):
            made = await grant(request)
        request.grant_id = made.grant_id
        self._decide(request, RequestState.APPROVED, actor=actor)
        return request, made

    async def deny(self, request_id: str, *, actor: str, reason: str) -> Request:
        request = self._pending(request_id)
        with _deciding(request):
            await self._actions.record(
                Action(request.agent_id, actor, "request.deny", format_scope(request.scope), "done", reason)
            )
        request.answer = reason
        self._decide(request, RequestState.DENIED, actor=actor)
        return request

    def end_agent(self, agent_id: AgentId) -> None:
        for request in self._all.values():
            if request.agent_id == agent_id and request.state is RequestState.PENDING:
                self._decide(request, RequestState.EXPIRED, actor="daemon")

    # --- agents

    def mine(self, request: EgressRequest) -> bool:
        """Tell whether this self-service call is for here."""
        topic = request.path.removeprefix(SELF_PREFIX)
        return topic == "requests" or topic.startswith("requests/")

    async def answer(self, agent: Agent, request: EgressRequest) -> messages.Verdict:
        """Serve `requests` and `requests/ID`."""
        topic = request.path.removeprefix(SELF_PREFIX)
        if topic == "requests" and request.method == "POST":
            return await self._post(agent, request.body)
        if topic.startswith("requests/") and request.method == "GET":
            return await self._get(agent, topic.removeprefix("requests/"), request.query)
        return messages.Refuse(405, Reason.SELF_UNKNOWN, "POST to requests, GET requests/ID")

    async def hold(self, agent: Agent, scope_text: str, what: str) -> bool:
        """Ask people for a scope on the agent's behalf and wait; True where it was approved in time."""
        try:
            request = await self._ask(agent, parse_scope(scope_text), f"wanted for {what}"[:REASON_CHARACTERS_MAX])
        except (InvalidInput, Conflict, BadScope, CannotRecord) as error:
            log.info("a denied call makes no request", agent=agent.agent_id, cause=str(error))
            return False
        try:
            async with asyncio.timeout(HOLD_SECONDS_MAX):
                await request.decided.wait()
        except TimeoutError:
            if not request.deciding:
                self._decide(request, RequestState.EXPIRED, actor="daemon")
        return request.state is RequestState.APPROVED

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
        return messages.Reply(202, _shown_to_agent(request))

    async def _get(self, agent: Agent, request_id: str, query: str) -> messages.Verdict:
        request = self._all.get(request_id)
        if request is None or request.agent_id != agent.agent_id:
            return messages.Refuse(404, Reason.SELF_UNKNOWN, "there is no such request of yours")
        wait = parse_qs(query, max_num_fields=8).get("wait", ["0s"])[0] if query else "0s"
        try:
            seconds = min(parse_duration(wait), WAIT_SECONDS_MAX)
        except InvalidInput as error:
            return messages.Refuse(400, "bad_request", error.message)
        try:
            async with asyncio.timeout(seconds):
                await request.decided.wait()
        except TimeoutError:
            pass  # the answer is then `pending`
        return messages.Reply(200, _shown_to_agent(request))

    async def _ask(self, agent: Agent, scope: Scope, reason: str) -> Request:
        """The request of this agent for this scope; raises Conflict where it has too many, CannotRecord."""
        mine = [r for r in self._all.values() if r.agent_id == agent.agent_id and r.state is RequestState.PENDING]
        for request in mine:
            if request.scope == scope:
                return request  # the same question again tires people
        key = (agent.agent_id, scope)
        asking = self._asking.get(key)
        if asking is None:
            # Counted before the wait for the disk: those that come meanwhile see it.
            if len(mine) + sum(whose == agent.agent_id for whose, _ in self._asking) >= PENDING_PER_AGENT_MAX:
                raise Conflict(f"cannot ask: {PENDING_PER_AGENT_MAX} requests are pending", remedy="wait for answers")
            asking = asyncio.get_running_loop().create_task(self._make(agent, scope, reason))
            self._asking[key] = asking
            asking.add_done_callback(lambda _: self._asking.pop(key, None))
        return await asyncio.shield(asking)

    async def _make(self, agent: Agent, scope: Scope, reason: str) -> Request:
        request = Request(
            self._new_id(),
            agent.agent_id,
            agent.name,
            scope,
            _CONTROL.sub(" ", reason)[:REASON_CHARACTERS_MAX],
            self._now_ns(),
        )
        await self._actions.record(
            Action(
                agent.agent_id,
                f"agent:{agent.agent_id}",
                "request.create",
                format_scope(scope),
                "done",
                request.reason,
                {"request_id": request.request_id},
            )
        )
        self._all[request.request_id] = request
        if not agent.live:
            self._decide(request, RequestState.EXPIRED, actor="daemon")  # it ended while this was recorded
        self._forget_old(agent.agent_id)
        self._note()
        return request

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
        request.decided.set()
        self._note()

    def _note(self) -> None:
        self.version += 1
        woken, self._changed = self._changed, asyncio.Event()
        woken.set()


@contextmanager
def _deciding(request: Request) -> Iterator[None]:
    """Keep everybody else from deciding while this decision waits for the disk: one request makes one grant."""
    request.deciding = True
    try:
        yield
    finally:
        request.deciding = False


def _shown_to_agent(request: Request) -> dict[str, object]:
    return {
        "request_id": request.request_id,
        "scope": format_scope(request.scope),
        "state": request.state.value,
        "grant_id": request.grant_id or None,
        "reason": request.answer,
    }
