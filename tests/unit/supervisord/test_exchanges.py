"""The judge of the egress plane: what hangs up early, what is cut, what is charged; with log and plane played."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import TYPE_CHECKING, Any, cast

import pytest

from gateway_client.egress import messages
from gateway_client.egress.request import Dialect, EgressRequest, Form
from gateway_client.egress.scope import parse_scope
from supervisord.actions.types import Action, CannotRecord
from supervisord.agents import Agent, Agents, Description
from supervisord.budgets import NO_BUDGET, Amounts, Budget
from supervisord.exchanges import EXCHANGES_OPEN_PER_AGENT_MAX, Exchanges, Route
from supervisord.gateway_process import GuardrailVerdict
from supervisord.ids import AgentId, AgentName, GrantId
from supervisord.lifecycle import Event
from supervisord.policy import OnDeny
from supervisord.scopes import GrantBook

if TYPE_CHECKING:
    from collections.abc import Callable

    from supervisord.scopes import Grant

MINE = AgentId("ag_" + "a" * 26)
THEIRS = AgentId("ag_" + "b" * 26)
WORKER = "w1.1"


class Log:
    """A log that takes its time: entries wait until `disk` is set."""

    def __init__(self) -> None:
        self.disk = asyncio.Event()
        self.disk.set()
        self.full = False
        self.entries: list[Action] = []

    async def append(self, action: Action) -> None:
        await self.disk.wait()
        if self.full:
            raise CannotRecord("cannot record: no space")
        self.entries.append(action)

    record = append

    async def note(self, action: Action) -> None:
        with contextlib.suppress(CannotRecord):
            await self.append(action)


class Plane:
    def __init__(self) -> None:
        self.dialed: list[messages.Dial] = []
        self.answers: dict[int, messages.Verdict] = {}
        self.cut: list[tuple[str, tuple[int, ...]]] = []
        self.lent: list[tuple[int, bool]] = []

    def dial(self, order: messages.Dial) -> bool:
        self.dialed.append(order)
        return True

    def answer(self, _worker_id: str, x: int, verdict: messages.Verdict) -> None:
        self.answers[x] = verdict

    def lend(self, _worker_id: str, _agent_id: str, count: int, last: bool) -> bool:  # noqa: FBT001 - as the plane has it
        self.lent.append((count, last))
        return True

    def cut_exchanges(self, worker_id: str, xs: list[int]) -> list[Any]:
        self.cut.append((worker_id, tuple(xs)))
        return []


class Disk:
    def __init__(self) -> None:
        self.spent: dict[str, Amounts] = {}
        self.uses: dict[str, int] = {}
        self.grants: dict[str, Grant] = {}

    async def save_grant(self, grant: Grant) -> None:
        self.grants[grant.grant_id] = grant

    async def update_uses(self, uses: dict[str, int]) -> None:
        self.uses.update(uses)

    async def save_spent(self, agent_id: str, amounts: Amounts) -> None:
        self.spent[agent_id] = amounts

    async def drop_spent(self, agent_id: str) -> None:
        self.spent.pop(agent_id, None)


class World:
    """Two agents that run, and what judges them."""

    def __init__(self, budget: Budget = NO_BUDGET) -> None:
        numbers = itertools.count()
        self.agents = Agents(now_ns=lambda: 1)
        for agent_id in (MINE, THEIRS):
            agent = Agent(described(agent_id))
            self.agents.add(agent)
            self.agents.apply(agent, Event.EXEC_OK)
        self.book = GrantBook(now=lambda: 1.0, wall=lambda: 1.0, new_id=lambda: GrantId(f"gr_{next(numbers):026d}"))
        self.log, self.plane, self.disk = Log(), Plane(), Disk()
        self.exchanges = Exchanges(
            agents=self.agents,
            book=self.book,
            actions=cast("Any", self.log),
            plane=cast("Any", self.plane),
            requests=cast("Any", None),
            store=cast("Any", self.disk),
            route=Route(gateway="embedded", preface=False, forwarding=True, allow_networks=(), mcp_servers=("git",)),
            on_deny=lambda _: OnDeny.DENY,
            now=lambda: 1.0,
        )
        self.exchanges.ledgers.open(MINE, budget)

    def ask(self, x: int, *, agent_id: str = MINE, request: EgressRequest | None = None, worker: str = WORKER) -> None:
        self.exchanges.ask(worker, messages.Ask(x, agent_id, request or tunnel()))

    def end(self, x: int, **changes: Any) -> None:
        facts = {"status": 200, "bytes_up": 10, "bytes_down": 10, "duration_ms": 1, **changes}
        self.exchanges.outcome(WORKER, messages.Outcome(x, MINE, **facts))


def described(agent_id: AgentId) -> Description:
    return Description(
        agent_id=agent_id, name=AgentName(f"n{agent_id[-1]}"), policy="default", policy_digest="", labels={}, owner="",
        purpose="", command=("true",), workspace="", workspace_mode="", launched_by="uid:0(root)", idempotency_key="",
        slot=0, tty=False, stdin=False, memory_bytes=1, cpus=1, pids=1, dedicated_worker=False,
        on_supervisor_loss="contain", budget={}, grants=(), launched_at_ns=1,
    )  # fmt: skip


def tunnel() -> EgressRequest:
    return EgressRequest(form=Form.CONNECT, method="CONNECT", scheme="https", host="pin.example", port=9443, path="")


def chat(max_tokens: int = 100) -> EgressRequest:
    return EgressRequest(
        form=Form.MODEL, method="POST", scheme="http", host="gateway.internal", port=3128, path="/v1/chat/completions",
        dialect=Dialect.OPENAI_CHAT, model="m", max_tokens=max_tokens,
    )  # fmt: skip


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for is in a fake that has no event
            await asyncio.sleep(0)


async def test_who_hangs_up_before_the_verdict_gets_no_connection_and_leaves_nothing_behind() -> None:
    world = World()
    grant = world.book.add(MINE, parse_scope("tls:pin.example:9443"), by="uid:0(root)", max_uses=5)
    world.log.disk.clear()
    world.ask(1)
    await asyncio.sleep(0)
    world.end(1, status=0, bytes_up=0)
    world.log.disk.set()
    await until(lambda: 1 in world.plane.answers)
    assert isinstance(world.plane.answers[1], messages.Refuse)
    assert world.plane.dialed == []
    assert world.exchanges.open_count(MINE) == 0
    left = world.book.get(grant.grant_id)
    assert (left.uses, left.reserved) == (0, 0)
    assert [entry.verb for entry in world.log.entries] == ["egress.request", "egress.outcome"]


async def test_its_twin_that_stays_is_connected_and_ends_once() -> None:
    world = World()
    grant = world.book.add(MINE, parse_scope("tls:pin.example:9443"), by="uid:0(root)", max_uses=5)
    world.ask(1)
    await until(lambda: 1 in world.plane.answers)
    assert isinstance(world.plane.answers[1], messages.Allow)
    assert [order.x for order in world.plane.dialed] == [1]
    assert world.exchanges.open_count(MINE) == 1
    world.end(1)
    world.end(1)
    await until(lambda: len(world.log.entries) == 2)
    assert world.exchanges.open_count(MINE) == 0
    assert world.book.get(grant.grant_id).uses == 1


async def test_a_plain_connect_without_a_grant_leaves_nothing_behind_either() -> None:
    world = World()
    request = EgressRequest(form=Form.CONNECT, method="CONNECT", scheme="https", host="a.example", port=80, path="")
    for x in range(200):
        world.ask(x, request=request)
        world.end(x, status=0, bytes_up=0)
    await until(lambda: len(world.plane.answers) == 200)
    assert world.exchanges.open_count(MINE) == 0


async def test_a_cut_reaches_every_exchange_of_the_grant_and_no_other() -> None:
    world = World()
    first = world.book.add(MINE, parse_scope("tls:pin.example:9443"), by="uid:0(root)")
    world.book.add(THEIRS, parse_scope("tls:pin.example:9443"), by="uid:0(root)")
    world.ask(1)
    world.ask(2)
    world.ask(3, agent_id=THEIRS)
    await until(lambda: len(world.plane.answers) == 3)
    world.book.revoke(first.grant_id)
    assert world.exchanges.cut_grant(first.grant_id).relays == 2
    assert world.plane.cut == [(WORKER, (1, 2))]


async def test_a_revocation_while_the_disk_works_refuses_what_was_allowed_already() -> None:
    world = World()
    grant = world.book.add(MINE, parse_scope("tls:pin.example:9443"), by="uid:0(root)")
    world.log.disk.clear()
    world.ask(1)
    await asyncio.sleep(0)
    world.book.revoke(grant.grant_id)
    assert world.exchanges.cut_grant(grant.grant_id).relays == 0
    world.log.disk.set()
    await until(lambda: 1 in world.plane.answers)
    assert isinstance(world.plane.answers[1], messages.Refuse)
    assert world.plane.dialed == []


async def test_what_a_dead_worker_asked_is_not_begun() -> None:
    world = World()
    world.book.add(MINE, parse_scope("tls:pin.example:9443"), by="uid:0(root)")
    world.log.disk.clear()
    world.ask(1)
    await asyncio.sleep(0)
    world.exchanges.worker_lost(WORKER)
    world.ask(1, worker="w1.2")  # its successor counts from one again
    world.log.disk.set()
    await until(lambda: world.plane.dialed)
    assert [order.worker_id for order in world.plane.dialed] == ["w1.2"]
    assert world.exchanges.open_count(MINE) == 1


async def test_an_agent_has_a_bound_of_open_exchanges_and_another_agent_its_own() -> None:
    world = World()
    for agent_id in (MINE, THEIRS):
        world.book.add(agent_id, parse_scope("tls:pin.example:9443"), by="uid:0(root)")
    for x in range(EXCHANGES_OPEN_PER_AGENT_MAX):
        world.ask(x)
        await until(lambda x=x: x in world.plane.answers)  # type: ignore[misc]
    world.ask(5000)
    refused = world.plane.answers[5000]
    assert isinstance(refused, messages.Refuse)
    assert refused.reason_code == "limit"
    world.ask(5001, agent_id=THEIRS)
    await until(lambda: 5001 in world.plane.answers)
    assert isinstance(world.plane.answers[5001], messages.Allow)


@pytest.mark.parametrize(
    ("ending", "left"),
    [
        ({"usage": None, "bytes_up": 500, "status": 0}, 900),
        ({"usage": None, "bytes_up": 0, "status": 502}, 1000),
        ({"usage": None, "bytes_up": 0, "status": 0}, 1000),
        ({"usage": messages.Usage(input_tokens=10, output_tokens=20)}, 970),
        ({"usage": messages.Usage(input_tokens=-1000, output_tokens=20)}, 980),
        ({"usage": messages.Usage(input_tokens=10**30, cost_usd=float("inf"))}, 0),
        ({"usage": messages.Usage(input_tokens=1, cost_usd=float("nan"))}, 999),
    ],
    ids=["unknown", "never sent", "hung up first", "told", "negative", "absurd", "no number"],
)
async def test_a_call_of_which_nobody_says_what_it_used_used_what_was_set_aside(
    ending: dict[str, Any], left: int
) -> None:
    world = World(Budget(llm_tokens=1000))
    world.book.add(MINE, parse_scope("llm:*"), by="uid:0(root)")
    world.ask(1, request=chat(100))
    await until(lambda: 1 in world.plane.answers)
    ledger = world.exchanges.ledgers.get(MINE)
    assert ledger is not None
    assert ledger.left().llm_tokens == 900
    world.end(1, **ending)
    await until(lambda: len(world.log.entries) == 2)
    ledger = world.exchanges.ledgers.get(MINE)
    assert ledger is not None
    assert ledger.left().llm_tokens == left
    assert ledger.reserved == Amounts()


async def test_nothing_is_let_go_of_which_the_disk_does_not_say_that_it_is_spent() -> None:
    world = World(Budget(llm_tokens=1000))
    world.book.add(MINE, parse_scope("llm:*"), by="uid:0(root)")
    for x in range(9):
        world.ask(x, request=chat(100))
        await until(lambda x=x: x in world.plane.answers)  # type: ignore[misc]
        assert world.disk.spent[MINE].llm_tokens >= 100 * (x + 1)
    assert len(world.plane.dialed) == 9


async def test_a_log_that_refuses_gives_back_what_was_set_aside() -> None:
    world = World(Budget(llm_tokens=1000))
    grant = world.book.add(MINE, parse_scope("llm:*"), by="uid:0(root)", max_uses=3)
    world.log.full = True
    world.ask(1, request=chat(100))
    await until(lambda: 1 in world.plane.answers)
    assert isinstance(world.plane.answers[1], messages.Refuse)
    ledger = world.exchanges.ledgers.get(MINE)
    assert ledger is not None
    assert (ledger.reserved, world.book.get(grant.grant_id).reserved) == (Amounts(), 0)
    assert world.exchanges.open_count(MINE) == 0


# --- forwarded requests, and bytes


def fetch() -> EgressRequest:
    return EgressRequest(form=Form.FORWARD, method="GET", scheme="http", host="pin.example", port=80, path="/")


@pytest.mark.parametrize(
    ("request_", "scope"), [(tunnel, "tls:pin.example:9443"), (fetch, "http:GET:http://pin.example/**")]
)
async def test_what_is_forwarded_draws_on_requests_and_on_no_tokens(
    request_: Callable[[], EgressRequest], scope: str
) -> None:
    bench = World(Budget(requests=2, llm_tokens=0, cost_microusd=0))
    bench.book.add(MINE, parse_scope(scope), by="x")
    for x in (1, 2, 3):
        bench.ask(x, request=request_())
        await until(lambda x=x: x in bench.plane.answers)  # type: ignore[misc]
    assert [isinstance(bench.plane.answers[x], messages.Allow) for x in (1, 2, 3)] == [True, True, False]
    refused = bench.plane.answers[3]
    assert isinstance(refused, messages.Refuse)
    assert (refused.status, "requests" in refused.detail) == (429, True)
    assert len(bench.plane.dialed) == 2


async def test_bytes_are_lent_before_the_answer_and_only_where_a_budget_bounds_them() -> None:
    for budget, lent in ((Budget(egress_bytes=10**6), [(65536, False)]), (Budget(requests=5), [])):
        bench = World(budget)
        bench.book.add(MINE, parse_scope("http:GET:http://pin.example/**"), by="x")
        bench.ask(1, request=fetch())
        await until(lambda bench=bench: bench.plane.answers)  # type: ignore[misc]
        answer = bench.plane.answers[1]
        assert isinstance(answer, messages.Allow)
        assert (answer.lent, bench.plane.lent) == (bool(lent), lent)


@pytest.mark.parametrize("request_", [tunnel, fetch, chat])
async def test_bytes_that_are_used_up_let_nothing_out_and_say_so(request_: Callable[[], EgressRequest]) -> None:
    bench = World(Budget(egress_bytes=1000))
    for scope in ("tls:pin.example:9443", "http:GET:http://pin.example/**", "llm:*"):
        bench.book.add(MINE, parse_scope(scope), by="x")
    bench.ask(1, request=request_())
    await until(lambda: bench.plane.answers)
    bench.exchanges.moved(WORKER, messages.Moved(MINE, used=1000, back=0, want=0))
    bench.end(1, bytes_up=1)
    await until(lambda: not bench.exchanges.open_count(MINE))
    bench.ask(2, request=request_())
    await until(lambda: 2 in bench.plane.answers)
    refused = bench.plane.answers[2]
    assert isinstance(refused, messages.Refuse)
    assert (refused.status, refused.reason_code, "egress_bytes" in refused.detail) == (429, "budget_exhausted", True)


def message(method: str) -> EgressRequest:
    return EgressRequest(
        form=Form.MCP, method="POST", scheme="http", host="gateway.internal", port=3128, path="/mcp/git", server="git",
        rpc_method=method, tool="commit" if method == "tools/call" else "",
    )  # fmt: skip


@pytest.mark.parametrize(("method", "uses"), [("tools/list", 0), ("", 0), ("tools/call", 1)])
async def test_what_keeps_a_session_is_no_use_of_a_grant_and_its_bytes_count(method: str, uses: int) -> None:
    bench = World(Budget(requests=10))
    grant_id = bench.book.add(MINE, parse_scope("mcp:git/*"), by="x", max_uses=2, max_bytes=1000).grant_id
    bench.ask(1, request=message(method))
    await until(lambda: bench.plane.dialed)
    bench.end(1, bytes_up=100, bytes_down=300)
    await until(lambda: grant_id in bench.disk.grants)
    grant = bench.disk.grants[grant_id]
    assert (grant.uses, grant.reserved, grant.bytes_left) == (uses, 0, 600)
    bench.ask(2, request=message(method))
    await until(lambda: len(bench.plane.dialed) == 2)
    bench.end(2, bytes_up=600, grant_spent=True)
    await until(lambda: bench.disk.grants[grant_id].ended)
    assert bench.disk.grants[grant_id].uses == 2 * uses
    (use,) = bench.exchanges.ledgers.uses(MINE)
    assert use.spent == 2 * uses
    bench.ask(3, request=message(method))
    await until(lambda: 3 in bench.plane.answers)
    assert isinstance(bench.plane.answers[3], messages.Refuse)


async def test_a_verdict_that_is_read_in_the_turn_of_the_outcome_is_in_its_entry() -> None:
    world = World()
    world.book.add(MINE, parse_scope("llm:*"), by="uid:0(root)")
    world.ask(1, request=chat(100))
    await until(lambda: 1 in world.plane.answers)
    verdict = GuardrailVerdict(MINE, 1, "response", "mask", ("no-pii",), {"email": 1})
    world.end(1)
    world.exchanges.guardrail(verdict)
    await until(lambda: len(world.log.entries) == 3)
    (ended,) = [entry for entry in world.log.entries if entry.verb == "egress.outcome"]
    found: Any = ended.details["guardrails"]
    assert [each["action"] for each in found] == ["mask"]
