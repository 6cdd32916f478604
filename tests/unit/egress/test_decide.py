"""The decision: every reason to refuse, and which grant is used."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest

from gateway_client.egress.decide import (
    AgentView,
    Allow,
    BudgetView,
    GrantView,
    Reason,
    Refuse,
    Reply,
    Upstream,
    Verdict,
    decide,
    tokens_reserved_default,
)
from gateway_client.egress.request import Dialect, EgressRequest, Form
from gateway_client.egress.scope import parse_scope

NOW = 1000.0
CALL = EgressRequest(
    Form.MODEL, "POST", "http", "gateway.internal", 3128, "/v1/messages", dialect=Dialect.ANTHROPIC_MESSAGES, model="m1"
)
TUNNEL = EgressRequest(Form.CONNECT, "CONNECT", "tls", "example.com", 443, "")
PAGE = EgressRequest(Form.FORWARD, "GET", "http", "example.com", 80, "/a")


def view(*scopes: str, **changes: object) -> AgentView:
    grants = tuple(GrantView(f"gr_{number}", parse_scope(scope)) for number, scope in enumerate(scopes))
    return replace(AgentView("ag_1", "one", "default", "RUNNING", grants=grants), **changes)  # type: ignore[arg-type]


def reason(verdict: Verdict) -> str:
    assert isinstance(verdict, Refuse)
    return verdict.reason_code


def test_a_covering_grant_allows_and_the_verdict_says_which() -> None:
    assert decide(CALL, view("llm:x", "llm:m*"), now=NOW) == Allow("gr_1", Upstream.API, "llm:m*")
    assert decide(PAGE, view("http:GET:http://example.com/**"), now=NOW) == Allow(
        "gr_0", Upstream.FORWARD, "http:GET:http://example.com/**"
    )
    assert decide(TUNNEL, view("tls:example.com:443"), now=NOW) == Allow("gr_0", Upstream.TUNNEL, "tls:example.com:443")


@pytest.mark.parametrize("state", ["FROZEN", "KILLING", "KILLED", "EXITED", "FAILED", "anything"])
def test_only_an_agent_that_runs_may_send(state: str) -> None:
    assert reason(decide(CALL, view("llm:*", state=state), now=NOW)) == Reason.AGENT_NOT_RUNNING
    assert isinstance(decide(CALL, view("llm:*", state="STARTING"), now=NOW), Allow)


def test_a_grant_ends_at_its_time_and_with_its_uses() -> None:
    scope = parse_scope("llm:*")
    at = GrantView("gr", scope, expires_at=NOW)
    assert reason(decide(CALL, view(grants=(at,)), now=NOW)) == Reason.GRANT_EXPIRED
    assert isinstance(decide(CALL, view(grants=(at,)), now=NOW - 0.001), Allow)
    used = GrantView("gr", scope, uses_left=0)
    assert reason(decide(CALL, view(grants=(used,)), now=NOW)) == Reason.GRANT_USED_UP
    assert isinstance(decide(CALL, view(grants=(replace(used, uses_left=1),)), now=NOW), Allow)


def test_an_unlimited_grant_is_used_before_one_that_counts() -> None:
    scope = parse_scope("llm:*")
    grants = (
        GrantView("counted", scope, uses_left=5),
        GrantView("short", scope, expires_at=NOW + 1),
        GrantView("free", scope),
    )
    verdict = decide(CALL, view(grants=grants), now=NOW)
    assert isinstance(verdict, Allow)
    assert verdict.grant_id == "free"


def test_paths_of_the_gateway_that_are_no_model_endpoint_are_refused_whatever_is_granted() -> None:
    assert reason(decide(replace(CALL, dialect=None, path="/key/generate"), view("llm:*"), now=NOW)) == (
        Reason.ENDPOINT_REFUSED
    )


def test_a_denial_names_the_missing_scope() -> None:
    for request, scope in ((CALL, "llm:m1"), (PAGE, "http:GET:http://example.com/a"), (TUNNEL, "tls:example.com:443")):
        verdict = decide(request, view(), now=NOW)
        assert isinstance(verdict, Refuse)
        assert (verdict.status, verdict.reason_code, verdict.scope) == (403, Reason.SCOPE_MISSING, scope)


def test_address_literals_that_are_not_public_are_refused_unless_the_operator_opened_the_network() -> None:
    request = replace(TUNNEL, host="10.0.0.1")
    granted = view("tls:10.0.0.1:443")
    assert reason(decide(request, granted, now=NOW)) == Reason.ADDRESS_FORBIDDEN
    opened = replace(granted, allow_networks=(ip_network("10.0.0.0/8"),))
    assert isinstance(decide(request, opened, now=NOW), Allow)


def test_without_a_forward_proxy_nothing_is_forwarded() -> None:
    assert reason(decide(TUNNEL, view("tls:example.com:443", forwarding=False), now=NOW)) == Reason.FORWARDING_OFF


def test_connect_for_plain_http_is_looked_into_and_opens_nothing() -> None:
    inspect = Allow("", Upstream.INSPECT)
    assert decide(replace(TUNNEL, port=80), view(), now=NOW) == inspect
    other = replace(TUNNEL, port=8080)
    assert decide(other, view("http:GET:http://example.com:8080/"), now=NOW) == inspect
    assert reason(decide(other, view(), now=NOW)) == Reason.SCOPE_MISSING


def test_tls_ends_in_the_worker_where_an_http_scope_of_an_https_url_is_in_force() -> None:
    terminate, narrow = Allow("", Upstream.TERMINATE), "http:GET:https://example.com/v1/**"
    assert decide(TUNNEL, view(narrow), now=NOW) == terminate
    assert decide(TUNNEL, view(narrow, "tls:example.com:443"), now=NOW) == terminate
    assert reason(decide(TUNNEL, view(narrow.replace("example.com", "other.example")), now=NOW)) == Reason.SCOPE_MISSING
    assert reason(decide(TUNNEL, view(narrow.replace(".com", ".com:8443")), now=NOW)) == Reason.SCOPE_MISSING
    ended = GrantView("old", parse_scope(narrow), expires_at=NOW)
    whole = GrantView("whole", parse_scope("tls:example.com:443"))
    assert decide(TUNNEL, view(grants=(ended,)), now=NOW) == terminate  # the refusal inside says that it has expired
    assert decide(TUNNEL, view(grants=(ended, whole)), now=NOW) == Allow(
        "whole", Upstream.TUNNEL, "tls:example.com:443"
    )


def test_what_is_inside_of_tls_is_covered_by_the_narrower_scope_first() -> None:
    inside = replace(PAGE, scheme="https", port=443, path="/v1/a")
    narrow, whole = "http:GET:https://example.com/v1/**", "tls:example.com:443"
    assert decide(inside, view(whole, narrow), now=NOW) == Allow("gr_1", Upstream.SEALED, narrow)
    assert decide(replace(inside, path="/"), view(whole, narrow), now=NOW) == Allow("gr_0", Upstream.SEALED, whole)
    assert reason(decide(replace(inside, path="/"), view(narrow), now=NOW)) == Reason.SCOPE_MISSING
    assert reason(decide(inside, view("http:GET:http://example.com:443/**"), now=NOW)) == Reason.SCOPE_MISSING
    assert reason(decide(replace(inside, scheme="http"), view(narrow, whole), now=NOW)) == Reason.SCOPE_MISSING


def test_a_name_is_told_only_where_a_grant_for_its_host_is_in_force() -> None:
    look_up = EgressRequest(Form.NAME, "LOOKUP", "dns", "example.com", 0, "")
    told = Allow("", Upstream.NAME)
    for scope in ("tls:example.com:8443", "http:GET:https://example.com/a", "http:GET:http://example.com/a"):
        assert decide(look_up, view(scope), now=NOW) == told
        assert decide(look_up, view(scope), now=NOW).upstream.opens is False  # type: ignore[union-attr]
    for scope in ("tls:other.example:443", "llm:*", "tls:a.example.com:443", "tls:com:443"):
        assert reason(decide(look_up, view(scope), now=NOW)) == Reason.SCOPE_MISSING
    refused = decide(look_up, view(), now=NOW)
    assert isinstance(refused, Refuse)
    assert refused.scope == "tls:example.com:443"
    ended = GrantView("old", parse_scope("tls:example.com:443"), expires_at=NOW)
    assert reason(decide(look_up, view(grants=(ended,)), now=NOW)) == Reason.SCOPE_MISSING
    assert reason(decide(look_up, view("tls:example.com:443", state="FROZEN"), now=NOW)) == Reason.AGENT_NOT_RUNNING


def test_budgets_are_checked_before_and_reserved() -> None:
    assert reason(decide(CALL, view("llm:*", budget=BudgetView(llm_tokens_left=0)), now=NOW)) == Reason.BUDGET_EXHAUSTED
    assert reason(decide(CALL, view("llm:*", budget=BudgetView(cost_usd_left=0.0)), now=NOW)) == Reason.BUDGET_EXHAUSTED
    little = view("llm:*", budget=BudgetView(llm_tokens_left=10))
    assert reason(decide(replace(CALL, max_tokens=11), little, now=NOW)) == Reason.BUDGET_EXHAUSTED
    for asked, reserved in ((10, 10), (3, 3), (None, 10)):
        verdict = decide(replace(CALL, max_tokens=asked), little, now=NOW)
        assert isinstance(verdict, Allow)
        assert verdict.reserve_tokens == reserved
    much = decide(CALL, view("llm:*", budget=BudgetView(llm_tokens_left=10**6)), now=NOW)
    assert isinstance(much, Allow)
    assert much.reserve_tokens == tokens_reserved_default
    free = replace(CALL, dialect=Dialect.MODELS, model="")
    assert isinstance(decide(free, view("llm:*", budget=BudgetView(llm_tokens_left=0)), now=NOW), Allow)


def test_a_call_sets_aside_what_it_may_put_out_over_all_its_answers_and_what_it_puts_in() -> None:
    def reserved(left: int, **call: object) -> int | str:
        verdict = decide(replace(CALL, **call), view("llm:*", budget=BudgetView(llm_tokens_left=left)), now=NOW)  # type: ignore[arg-type]
        return verdict.reserve_tokens if isinstance(verdict, Allow) else reason(verdict)

    assert reserved(10**6, max_tokens=300, input_tokens=50) == 350
    assert reserved(10**6, max_tokens=None, choices=3, input_tokens=50) == 3 * tokens_reserved_default + 50
    assert reserved(320, max_tokens=300, input_tokens=40) == 320  # high as it is, the estimate alone refuses nothing
    assert reserved(320, max_tokens=300, input_tokens=42) == Reason.BUDGET_EXHAUSTED
    assert reserved(100, max_tokens=None, input_tokens=300) == Reason.BUDGET_EXHAUSTED
    assert reserved(100, max_tokens=None, input_tokens=100) == 100


def test_self_service_tells_the_agent_about_itself() -> None:
    def ask(path: str, method: str = "GET") -> Verdict:
        request = EgressRequest(Form.SELF, method, "http", "gateway.internal", 3128, f"/.stockade/v1/{path}")
        expired = GrantView("old", parse_scope("llm:old"), expires_at=NOW - 1)
        counted = GrantView("gr", parse_scope("llm:*"), expires_at=NOW + 5, uses_left=2)
        return decide(request, view(grants=(expired, counted)), now=NOW)

    assert ask("whoami") == Reply(200, {"agent_id": "ag_1", "name": "one", "policy": "default", "state": "RUNNING"})
    assert ask("scopes") == Reply(
        200, {"scopes": [{"grant_id": "gr", "scope": "llm:*", "expires_in_seconds": 5.0, "uses_left": 2}]}
    )
    assert isinstance(ask("budget"), Reply)
    assert reason(ask("whoami", "POST")) == Reason.SELF_UNKNOWN
    assert reason(ask("../../key")) == Reason.SELF_UNKNOWN
