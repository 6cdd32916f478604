"""RegistryService: decode, call, encode."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from stockade.v1 import agents_pb2, registry_pb2, registry_pb2_grpc

from gateway_client.egress.scope import format_scope
from supervisord.callers import current_caller
from supervisord.definitions import reach
from supervisord.errors import InvalidInput, StockadeError
from supervisord.plan import check_order
from supervisord.policy import AgentSpec, Risk
from supervisord.review import FINDINGS_MAX, NS_PER_SECOND, SECONDS_PER_DAY, Inventory, asked_for_use, review
from supervisord.rpc import convert

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from supervisord.actions.log import ActionLog
    from supervisord.agents import Agent, Agents
    from supervisord.definitions import Definition
    from supervisord.ledgers import Ledgers
    from supervisord.policies import PolicyShelf
    from supervisord.registry import Registry
    from supervisord.scopes import GrantBook

UNUSED_DAYS: Final = 30
PAGE_ENTRIES: Final = 1000
ENTRIES_MAX: Final = 20_000
"""So many requests of one agent are looked through for uses of its grants."""

_RISKS: Final = {
    None: registry_pb2.RISK_CLASS_UNSPECIFIED,
    Risk.MINIMAL: registry_pb2.RISK_CLASS_MINIMAL,
    Risk.LIMITED: registry_pb2.RISK_CLASS_LIMITED,
    Risk.HIGH: registry_pb2.RISK_CLASS_HIGH,
}

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RegistryService(registry_pb2_grpc.RegistryServiceServicer):
    def __init__(
        self,
        *,
        registry: Registry,
        policies: PolicyShelf,
        agents: Agents,
        book: GrantBook,
        ledgers: Ledgers,
        actions: ActionLog,
        now_ns: Callable[[], int],
    ) -> None:
        self._registry = registry
        self._policies = policies
        self._agents = agents
        self._book = book
        self._ledgers = ledgers
        self._actions = actions
        self._now_ns = now_ns

    async def RegisterDefinition(
        self, request: registry_pb2.RegisterDefinitionRequest, _context: Context
    ) -> registry_pb2.RegisterDefinitionResponse:
        text, spec = self._read(request)
        definition, existed = await self._registry.add(
            text, spec, directory=request.directory, actor=current_caller().actor
        )
        return registry_pb2.RegisterDefinitionResponse(definition=self._encode(definition), existed=existed)

    def _read(self, request: registry_pb2.RegisterDefinitionRequest) -> tuple[str, AgentSpec]:
        """The agent of a file that could be launched as it is; raises StockadeError."""
        source = convert.text("file name", request.filename) or "agent.yaml"
        try:
            text = request.content.decode()
        except UnicodeDecodeError as error:
            raise InvalidInput(f"cannot read {source}: it is not UTF-8", remedy="save it as UTF-8") from error
        convert.text("directory", request.directory)
        directory = PurePosixPath(request.directory) if request.directory else None
        if directory is not None and not directory.is_absolute():
            raise InvalidInput(f"cannot register {source}: directory is not absolute", remedy="write it in full")
        found = self._policies.check(text, source=source, directory=directory)
        if not isinstance(found, AgentSpec):
            raise InvalidInput(f"cannot register {source}: its kind is Policy", remedy="give an agent's file")
        check_order(convert.launch_order(agents_pb2.LaunchSpec(), found))
        return text, found

    async def GetDefinition(
        self, request: registry_pb2.GetDefinitionRequest, _context: Context
    ) -> registry_pb2.GetDefinitionResponse:
        definition = self._registry.find(request.reference)
        return registry_pb2.GetDefinitionResponse(
            definition=self._encode(definition), content=definition.row.text.encode()
        )

    async def ListDefinitions(
        self, request: registry_pb2.ListDefinitionsRequest, _context: Context
    ) -> registry_pb2.ListDefinitionsResponse:
        rows = self._registry.rows(request.name)
        shown, token = convert.page(
            rows, size=request.page_size, token=request.page_token, key=lambda each: each.reference
        )
        return registry_pb2.ListDefinitionsResponse(
            definitions=[self._encode(each) for each in await self._registry.definitions(shown)], next_page_token=token
        )

    async def DeprecateDefinition(
        self, request: registry_pb2.DeprecateDefinitionRequest, _context: Context
    ) -> registry_pb2.DeprecateDefinitionResponse:
        reason = convert.text("reason", request.reason)
        definition = await self._registry.deprecate(request.reference, actor=current_caller().actor, reason=reason)
        return registry_pb2.DeprecateDefinitionResponse(definition=self._encode(definition))

    async def Review(self, request: registry_pb2.ReviewRequest, _context: Context) -> registry_pb2.ReviewResponse:
        seconds = convert.seconds(request.unused) if request.HasField("unused") else UNUSED_DAYS * SECONDS_PER_DAY
        if seconds < 0:
            raise InvalidInput("cannot review: the time that a grant may go unused is negative", remedy="correct it")
        now_ns = self._now_ns()
        since_ns = max(0, now_ns - int(seconds * NS_PER_SECOND))
        live = self._agents.live()
        used: set[str] = set()
        unknown: set[str] = set()
        for agent in live:
            asked = asked_for_use(self._book.for_agent(agent.agent_id), since_ns)
            seen, left = await self._used(agent, asked, since_ns)
            used |= seen
            unknown |= left
        inventory = Inventory(
            definitions=await self._registry.definitions(self._registry.rows()),
            agents=self._agents.all(),
            policy=self._policies.get,
            grants=lambda agent: self._book.for_agent(agent.agent_id),
            used=frozenset(used),
            unknown=frozenset(unknown),
            since_ns=since_ns,
            now_ns=now_ns,
        )
        found = review(inventory)
        return registry_pb2.ReviewResponse(
            findings=[
                registry_pb2.ReviewFinding(
                    kind=each.kind,
                    subject=each.subject,
                    agent_id=each.agent_id,
                    owner=each.owner,
                    detail=convert.printable(each.detail),
                    remedy=convert.printable(each.remedy),
                )
                for each in found[:FINDINGS_MAX]
            ],
            left_out=max(0, len(found) - FINDINGS_MAX),
        )

    async def _used(self, agent: Agent, asked: frozenset[str], since_ns: int) -> tuple[set[str], set[str]]:
        """Which of these grants the log says were used since then, and which nobody can tell: there is too much."""
        missing, after = set(asked), 0
        for _ in range(ENTRIES_MAX // PAGE_ENTRIES):
            if not missing:
                break
            entries = await self._actions.query(
                agent_id=agent.agent_id,
                verb="egress.request",
                verdict="allowed",
                since_ns=since_ns,
                after_seq=after,
                limit=PAGE_ENTRIES,
            )
            missing -= {str(entry.action.details.get("grant_id")) for entry in entries}
            if len(entries) < PAGE_ENTRIES:
                return set(asked) - missing, set()
            after = entries[-1].seq
        return set(asked) - missing, missing

    async def ListRunning(
        self, request: registry_pb2.ListRunningRequest, _context: Context
    ) -> registry_pb2.ListRunningResponse:
        shown, token = convert.page(
            self._agents.live(), size=request.page_size, token=request.page_token, key=lambda each: each.agent_id
        )
        return registry_pb2.ListRunningResponse(agents=[self._running(each) for each in shown], next_page_token=token)

    def _running(self, agent: Agent) -> registry_pb2.RunningAgent:
        definition = self._registry.get(agent.what.definition)
        try:
            policy_risk: Risk | None = self._policies.get(agent.what.policy).risk
        except StockadeError:
            policy_risk = None  # its file has gone or is broken; the agent keeps what it was launched with
        message = registry_pb2.RunningAgent(
            agent=convert.agent(agent),
            risk=_RISKS[definition.spec.risk if definition else None],
            policy_risk=_RISKS[policy_risk],
            contact=definition.spec.contact if definition else "",
            deprecated=definition.row.deprecated if definition else "",
            grants=[convert.grant(grant, agent.name) for grant in self._book.for_agent(agent.agent_id)],
        )
        ledger = self._ledgers.get(agent.agent_id)
        if ledger is not None:
            message.budget.update(ledger.budget.named())
            message.budget_left.update(ledger.left().named())
        return message

    def _encode(self, definition: Definition) -> registry_pb2.Definition:
        row, spec = definition.row, definition.spec
        problem = definition.problem
        policy = None
        if not problem:
            try:
                policy = self._policies.get(spec.policy)
            except StockadeError as error:
                problem = error.message
        found = reach(spec, policy)
        return registry_pb2.Definition(
            name=row.name,
            version=row.version,
            digest=row.digest,
            owner=spec.owner,
            purpose=spec.purpose,
            risk=_RISKS[spec.risk],
            contact=spec.contact,
            policy=spec.policy,
            models=spec.models,
            data=spec.data,
            scopes=[format_scope(scope) for scope in spec.scopes],
            reach=registry_pb2.Reach(files=found.files, hosts=found.hosts, models=found.models, tools=found.tools),
            labels=spec.labels,
            registered_by=row.registered_by,
            registered_at=convert.timestamp(row.registered_at_ns),
            deprecated=row.deprecated,
            deprecated_by=row.deprecated_by,
            deprecated_at=convert.timestamp(row.deprecated_at_ns),
            problem=problem,
        )
