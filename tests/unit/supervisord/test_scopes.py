"""The grant book: time, uses, revocation, ceilings and restarts."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_client.egress.decide import AgentView, Allow, Reason, Refuse, decide
from gateway_client.egress.request import Dialect, EgressRequest, Form
from gateway_client.egress.scope import parse_scope
from supervisord.config import GatewayConfig, GatewayKind
from supervisord.errors import Conflict, Exhausted, InvalidInput, NotFound, PermissionDenied
from supervisord.explain import explain
from supervisord.ids import AgentId, GrantId
from supervisord.policy import Policy
from supervisord.scopes import (
    GRANTS_PER_AGENT_MAX,
    Ended,
    Grant,
    GrantBook,
    check_scopes_reachable,
    read_scope,
)
from supervisord.terms import TTL_SECONDS_MAX

AGENT = AgentId("ag_" + "a" * 26)
OTHER = AgentId("ag_" + "b" * 26)
LLM = parse_scope("llm:*")
SITE = parse_scope("http:GET:https://status.example.com/**")
TLS = parse_scope("tls:git.example.com:443")


class Clock:
    """The monotonic clock and the one for people, as far apart as they like to be."""

    def __init__(self) -> None:
        self.mono = 1000.0
        self.wall = 1_700_000_000.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> GrantBook:
    return make_book(clock)


def make_book(clock: Clock) -> GrantBook:
    numbers = itertools.count()
    return GrantBook(
        now=lambda: clock.mono, wall=lambda: clock.wall, new_id=lambda: GrantId(f"gr_{next(numbers):026d}")
    )


def chat(model: str = "gpt-x") -> EgressRequest:
    return EgressRequest(
        form=Form.MODEL, method="POST", scheme="http", host="gateway.internal", port=3128, path="/v1/chat/completions",
        dialect=Dialect.OPENAI_CHAT, model=model,
    )  # fmt: skip


def verdict(book: GrantBook, clock: Clock) -> object:
    view = AgentView(agent_id=AGENT, name="x", policy="default", state="RUNNING", grants=book.view(AGENT))
    return decide(chat(), view, now=clock.mono)


def test_a_grant_allows_until_its_time_is_up_without_anybody_asking(book: GrantBook, clock: Clock) -> None:
    grant = book.add(AGENT, LLM, by="uid:0(root)", ttl_seconds=600)
    assert grant.expires_at == clock.wall + 600
    clock.mono += 599.999
    assert isinstance(verdict(book, clock), Allow)
    assert book.use(grant.grant_id) == grant
    clock.mono += 0.001
    refused = verdict(book, clock)
    assert isinstance(refused, Refuse)
    assert refused.reason_code == Reason.GRANT_EXPIRED
    with pytest.raises(Conflict, match="expired"):
        book.use(grant.grant_id)
    assert book.for_agent(AGENT) == ()
    assert [ended.ended for ended in book.expire()] == [Ended.EXPIRED]
    assert book.expire() == ()
    assert book.get(grant.grant_id).ended is Ended.EXPIRED


def test_whoever_notices_an_expiry_first_keeps_it_from_nobody(book: GrantBook, clock: Clock) -> None:
    """A list or a revocation at the moment of the expiry: the log still gets its entry, the relay its reset."""
    ended = book.add(AGENT, LLM, by="x", ttl_seconds=10)
    other = book.add(AGENT, SITE, by="x")
    clock.mono += 10
    assert [grant.grant_id for grant in book.all()] == [other.grant_id]
    book.revoke(other.grant_id)
    assert book.next_expiry() == clock.mono
    assert [grant.grant_id for grant in book.expire()] == [ended.grant_id]
    assert book.expire() == ()
    assert book.next_expiry() is None


def test_setting_the_wall_clock_changes_nothing(book: GrantBook, clock: Clock) -> None:
    book.add(AGENT, LLM, by="x", ttl_seconds=10)
    clock.wall -= 10**6
    clock.mono += 9
    assert isinstance(verdict(book, clock), Allow)
    clock.wall += 10**9
    assert isinstance(verdict(book, clock), Allow)
    clock.mono += 1
    assert isinstance(verdict(book, clock), Refuse)


def test_next_expiry_is_the_earliest(book: GrantBook, clock: Clock) -> None:
    assert book.next_expiry() is None
    book.add(AGENT, LLM, by="x")
    assert book.next_expiry() is None
    book.add(AGENT, SITE, by="x", ttl_seconds=60)
    book.add(OTHER, LLM, by="x", ttl_seconds=30)
    assert book.next_expiry() == clock.mono + 30


def test_uses_are_exact_when_many_are_under_way(book: GrantBook, clock: Clock) -> None:
    grant = book.add(AGENT, LLM, by="x", max_uses=3)
    for _ in range(3):
        book.use(grant.grant_id)
    with pytest.raises(Exhausted):
        book.use(grant.grant_id)
    assert isinstance(verdict(book, clock), Refuse)
    book.settle(grant.grant_id, used=False)
    assert book.get(grant.grant_id).uses_left == 1
    assert isinstance(verdict(book, clock), Allow)
    book.use(grant.grant_id)
    for _ in range(3):
        book.settle(grant.grant_id, used=True)
    last = book.get(grant.grant_id)
    assert (last.uses, last.reserved, last.ended) == (3, 0, Ended.SPENT)
    refused = verdict(book, clock)
    assert isinstance(refused, Refuse)
    assert refused.reason_code == Reason.GRANT_USED_UP
    assert book.settle(grant.grant_id, used=True) == last, "a settle too many must not count"


@given(
    st.integers(min_value=1, max_value=5), st.lists(st.sampled_from(["use", "used", "back", "restart"]), max_size=40)
)
def test_no_order_of_events_gives_more_uses_than_granted(max_uses: int, events: list[str]) -> None:
    clock = Clock()
    book = make_book(clock)
    grant_id = book.add(AGENT, LLM, by="x", max_uses=max_uses).grant_id
    passed = under_way = 0
    for event in events:
        if event == "use":
            try:
                book.use(grant_id)
            except (Exhausted, Conflict):
                assert passed + under_way >= max_uses
            else:
                under_way += 1
        elif event == "restart":
            saved = book.get(grant_id).to_json()
            book = make_book(clock)
            book.restore(Grant.from_json(json.loads(json.dumps(saved))))
            passed, under_way = passed + under_way, 0
        elif under_way:
            book.settle(grant_id, used=event == "used")
            under_way -= 1
            passed += event == "used"
        assert passed + under_way <= max_uses
        assert book.get(grant_id).uses_left == max_uses - passed - under_way


def test_revoking_ends_it_at_once_and_twice_is_the_same(book: GrantBook, clock: Clock) -> None:
    grant = book.add(AGENT, LLM, by="x")
    assert isinstance(verdict(book, clock), Allow)
    revoked = book.revoke(grant.grant_id)
    assert revoked.ended is Ended.REVOKED
    assert isinstance(verdict(book, clock), Refuse)
    assert book.revoke(grant.grant_id) == revoked
    with pytest.raises(NotFound):
        book.revoke(GrantId("gr_" + "z" * 26))


def test_a_settle_of_a_grant_long_forgotten_is_no_error(book: GrantBook) -> None:
    assert book.settle(GrantId("gr_" + "z" * 26), used=True) is None


def test_revoking_what_has_expired_says_expired(book: GrantBook, clock: Clock) -> None:
    grant = book.add(AGENT, LLM, by="x", ttl_seconds=1)
    clock.mono += 2
    assert book.revoke(grant.grant_id).ended is Ended.EXPIRED


def test_agents_do_not_share(book: GrantBook) -> None:
    mine, theirs = book.add(AGENT, LLM, by="x"), book.add(OTHER, SITE, by="x")
    assert book.for_agent(AGENT) == (mine,)
    assert [view.grant_id for view in book.view(OTHER)] == [theirs.grant_id]
    assert book.end_agent(AGENT)[0].ended is Ended.AGENT_ENDED
    assert book.for_agent(AGENT) == ()
    assert book.all() == (theirs,)
    assert [grant.agent_id for grant in book.all(include_ended=True)] == [AGENT, OTHER]


def test_a_retry_with_the_same_id_finds_the_first(book: GrantBook) -> None:
    chosen = GrantId("gr_" + "c" * 26)
    first = book.add(AGENT, LLM, by="x", grant_id=chosen)
    assert book.add(AGENT, LLM, by="x", grant_id=chosen) == first
    with pytest.raises(Conflict):
        book.add(AGENT, SITE, by="x", grant_id=chosen)
    with pytest.raises(Conflict):
        book.add(OTHER, LLM, by="x", grant_id=chosen)
    book.revoke(chosen)
    assert book.add(AGENT, LLM, by="x", grant_id=chosen).ended is Ended.REVOKED, "a replay revives nothing"
    assert book.for_agent(AGENT) == ()


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), TTL_SECONDS_MAX + 1])
def test_times_that_are_refused(book: GrantBook, ttl: float) -> None:
    with pytest.raises(InvalidInput):
        book.add(AGENT, LLM, by="x", ttl_seconds=ttl)
    assert book.all() == ()


@pytest.mark.parametrize("max_uses", [0, -1, 10**9 + 1])
def test_uses_that_are_refused(book: GrantBook, max_uses: int) -> None:
    with pytest.raises(InvalidInput):
        book.add(AGENT, LLM, by="x", max_uses=max_uses)


@pytest.mark.parametrize("reason", ["x" * 501, "a\nb", "\x1b[2J"])
def test_reasons_that_are_refused(book: GrantBook, reason: str) -> None:
    with pytest.raises(InvalidInput):
        book.add(AGENT, LLM, by="x", reason=reason)


def test_an_agent_has_so_many_grants_and_not_one_more(book: GrantBook) -> None:
    for _ in range(GRANTS_PER_AGENT_MAX):
        book.add(AGENT, LLM, by="x")
    with pytest.raises(Exhausted):
        book.add(AGENT, LLM, by="x")
    book.add(OTHER, LLM, by="x")


def test_a_ceiling_holds(book: GrantBook) -> None:
    ceiling = (parse_scope("http:GET,POST:https://status.example.com/v1/**"),)
    narrow = parse_scope("http:GET:https://status.example.com/v1/now")
    assert book.add(AGENT, narrow, by="x", ceiling=ceiling).scope == narrow
    for wide in (SITE, LLM, TLS, parse_scope("http:DELETE:https://status.example.com/v1/now")):
        with pytest.raises(PermissionDenied, match="ceiling"):
            book.add(AGENT, wide, by="x", ceiling=ceiling)
        with pytest.raises(PermissionDenied):
            book.add(AGENT, wide, by="x", ceiling=())
    assert len(book.all()) == 1


def test_a_restart_within_a_boot_keeps_time_and_uses(book: GrantBook, clock: Clock) -> None:
    grant = book.add(AGENT, LLM, by="x", ttl_seconds=600, max_uses=5, reason="why")
    book.use(grant.grant_id)
    book.settle(grant.grant_id, used=True)
    book.use(grant.grant_id)
    saved = json.loads(json.dumps(book.get(grant.grant_id).to_json()))
    clock.mono += 100
    again = make_book(clock)
    restored = again.restore(Grant.from_json(saved))
    assert restored.remaining_seconds(clock.mono) == 500
    assert (restored.uses, restored.reserved, restored.uses_left) == (2, 0, 3), "what was under way counts as used"
    assert (restored.scope, restored.reason, restored.expires_at) == (LLM, "why", grant.expires_at)
    assert again.for_agent(AGENT) == (restored,)


def test_a_restart_after_a_reboot_counts_on_from_what_was_left(book: GrantBook, clock: Clock) -> None:
    saved = book.add(AGENT, LLM, by="x", ttl_seconds=600).to_json()
    clock.mono = 5.0
    again = make_book(clock)
    again.restore(Grant.from_json(saved), remaining_seconds=42)
    clock.mono = 46.9
    assert again.for_agent(AGENT)
    clock.mono = 47.0
    assert not again.for_agent(AGENT)


@pytest.mark.parametrize("change", [{"scope": "nonsense"}, {"uses": "x"}, {"ended": "maybe"}, {"created_at": None}])
def test_a_damaged_record_is_refused(book: GrantBook, change: dict[str, str | None]) -> None:
    saved = book.add(AGENT, LLM, by="x").to_json()
    Grant.from_json(saved)
    with pytest.raises(InvalidInput, match="cannot read grant"):
        Grant.from_json({**saved, **change})
    with pytest.raises(InvalidInput, match="cannot read grant"):
        Grant.from_json({key: value for key, value in saved.items() if key != "agent_id"})


def test_scopes_that_no_exit_can_serve_are_refused() -> None:
    closed = GatewayConfig(kind=GatewayKind.LITELLM)
    fs = parse_scope("fs:ro:/srv/logs")
    check_scopes_reachable((LLM, fs, parse_scope("mcp:git/*")), closed)
    for scope in (SITE, TLS):
        with pytest.raises(InvalidInput, match="forward_proxy is empty"):
            check_scopes_reachable((LLM, scope), closed)
        check_scopes_reachable((scope,), GatewayConfig(kind=GatewayKind.LITELLM, forward_proxy="http://127.0.0.1:3128"))
        check_scopes_reachable((scope,), GatewayConfig(kind=GatewayKind.EMBEDDED))


def test_a_bad_scope_of_a_caller_is_bad_input() -> None:
    assert read_scope("llm:*") == LLM
    with pytest.raises(InvalidInput):
        read_scope("http:GET:https://*.example.com/**")


def test_explaining_an_agent_looks_at_its_grants_only(book: GrantBook) -> None:
    policy = Policy(name="p", scopes=(LLM,))
    without = explain(policy, (), parse_scope("llm:gpt-x"), agent="web-1")
    assert not without.allowed
    assert without.remedy == "stockadectl grant web-1 'llm:gpt-x'"
    grant = book.add(AGENT, LLM, by="uid:0(root)")
    covered = explain(policy, book.for_agent(AGENT), parse_scope("llm:gpt-x"), agent="web-1")
    assert (covered.allowed, covered.grant_id) == (True, grant.grant_id)
    assert not explain(policy, (book.revoke(grant.grant_id),), LLM, agent="web-1").allowed


def test_explaining_a_policy_and_its_ceiling() -> None:
    policy = Policy(name="p", scopes=(LLM,), ceiling=(LLM,))
    assert explain(policy, (), parse_scope("llm:gpt-x")).allowed
    never = explain(policy, (), SITE)
    assert not never.allowed
    assert "ceiling" in never.because
    assert "widen grants.ceiling" in never.remedy
    unreachable = explain(Policy(name="p"), (), SITE, gateway=GatewayConfig(kind=GatewayKind.OPENAI))
    assert not unreachable.allowed
    assert "forward_proxy" in unreachable.remedy


def test_bytes_and_cost_end_a_grant_when_they_are_reached(book: GrantBook) -> None:
    by_bytes = book.add(AGENT, LLM, by="x", max_bytes=100)
    book.settle(by_bytes.grant_id, used=True, bytes_used=60)
    assert book.get(by_bytes.grant_id).bytes_left == 40
    book.use(by_bytes.grant_id)
    book.settle(by_bytes.grant_id, used=True, bytes_used=60)
    ended = book.get(by_bytes.grant_id)
    assert (ended.ended, ended.bytes_used) == (Ended.SPENT, 100)
    by_cost = book.add(AGENT, LLM, by="x", max_cost_microusd=10)
    assert book.view(AGENT)[-1].cost_usd_left == 0.00001
    book.settle(by_cost.grant_id, used=True, cost_microusd=9)
    assert book.get(by_cost.grant_id).ended is None
    book.settle(by_cost.grant_id, used=True, cost_microusd=9)
    assert book.get(by_cost.grant_id).ended is Ended.SPENT
    with pytest.raises(Conflict):
        book.use(by_cost.grant_id)


def test_a_worker_that_met_the_end_of_the_bytes_ends_the_grant(book: GrantBook) -> None:
    grant = book.add(AGENT, LLM, by="x", max_bytes=100)
    other = book.add(AGENT, LLM, by="x")
    for each in (grant, other):
        book.settle(each.grant_id, used=True, bytes_used=70, spent=True)
    assert book.get(grant.grant_id).ended is Ended.SPENT
    assert book.get(other.grant_id).ended is None  # it has no bound that could be met


def test_bounds_and_what_was_used_survive_the_store(book: GrantBook) -> None:
    grant = book.add(AGENT, LLM, by="x", max_bytes=100, max_cost_microusd=50, ticket="T-1")
    kept = book.settle(grant.grant_id, used=True, bytes_used=10, cost_microusd=5)
    assert kept is not None
    assert Grant.from_json(kept.to_json()) == kept
    older = {key: value for key, value in kept.to_json().items() if "bytes" not in key and "cost" not in key}
    older.pop("ticket")
    read = Grant.from_json(older)
    assert (read.max_bytes, read.max_cost_microusd, read.ticket) == (None, None, "")
