"""Who may approve, and what several approvals come to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gateway_client.egress.scope import format_scope, parse_scope
from supervisord.approvals import Offer, agree, check_alone, check_person, digest, person, shown_line
from supervisord.asking import Asking
from supervisord.errors import Conflict, InvalidInput, PermissionDenied
from supervisord.grantable import check_launched_with
from supervisord.policy import GrantRules, Policy
from supervisord.terms import Terms

if TYPE_CHECKING:
    from gateway_client.egress.scope import Scope

WIDE, GETS, OK, OTHER = (
    parse_scope(text)
    for text in (
        "http:GET,POST:http://a.example/**",
        "http:GET:http://a.example/**",
        "http:GET:http://a.example/ok/**",
        "http:GET:http://a.example/other/**",
    )
)
ANNA, BERT, ROOT = "uid:1(anna)", "uid:2(bert)", "uid:0(root)"


def approves(by: str, *before: str, launched_by: str = ROOT, separation: bool = True) -> None:
    rules = GrantRules(approvers=2, separation=separation)
    check_person(by, agent_id="ag_1", launched_by=launched_by, before=before, rules=rules)


def test_two_different_people_neither_of_whom_launched_it() -> None:
    approves(ANNA)
    approves(BERT, ANNA)
    with pytest.raises(PermissionDenied):
        approves(ROOT)
    approves(ROOT, separation=False)
    with pytest.raises(PermissionDenied):
        approves("agent:ag_1", separation=False)
    with pytest.raises(Conflict):
        approves(ANNA, ANNA)


def test_a_person_is_a_uid_whatever_its_name_is_today() -> None:
    assert person("uid:7(a)") == person("uid:7(b)") == person("uid:7(?)") == "uid:7"
    assert person("uid:70(a)") != person("uid:7(a)")
    assert person("cn:alice") == "cn:alice"
    with pytest.raises(Conflict):
        approves("uid:1(renamed)", ANNA)
    with pytest.raises(PermissionDenied):
        approves("uid:1(renamed)", launched_by=ANNA)


def test_nobody_grants_alone_where_several_have_to() -> None:
    with pytest.raises(PermissionDenied, match="2 people"):
        check_alone(ANNA, launched_by=ROOT, policy="p", rules=GrantRules(approvers=2))
    with pytest.raises(PermissionDenied, match="launched"):
        check_alone(ANNA, launched_by=ANNA, policy="p", rules=GrantRules(separation=True))
    check_alone(BERT, launched_by=ANNA, policy="p", rules=GrantRules(separation=True))
    check_alone(ANNA, launched_by=ANNA, policy="p", rules=GrantRules())


@pytest.mark.parametrize(("scopes", "wanted"), [((), WIDE), ((GETS, None), GETS), ((None, OK), OK), ((OK, GETS), OK)])
def test_the_narrowest_scope_is_what_all_agree_to(scopes: tuple[Scope | None, ...], wanted: Scope) -> None:
    assert agree(WIDE, [Offer(ANNA, scope) for scope in scopes]).scope == wanted


def test_a_wider_scope_or_two_that_have_nothing_in_common_are_no_agreement() -> None:
    with pytest.raises(InvalidInput, match="not within"):
        agree(GETS, [Offer(ANNA, WIDE)])
    with pytest.raises(Conflict, match="neither is within"):
        agree(WIDE, [Offer(ANNA, OK), Offer(BERT, OTHER)])


def test_each_bound_is_the_tightest_that_anybody_gave() -> None:
    agreed = agree(
        WIDE,
        [
            Offer(ANNA, terms=Terms(ttl_seconds=60, max_uses=5), reason="a", ticket="T-1"),
            Offer(BERT, terms=Terms(ttl_seconds=600, max_bytes=100), reason="b", ticket="T-1"),
        ],
    )
    assert agreed.terms == Terms(ttl_seconds=60, max_uses=5, max_bytes=100)
    assert (agreed.by, agreed.reason, agreed.ticket) == ((ANNA, BERT), "a; b", "T-1")
    with pytest.raises(InvalidInput):
        agree(WIDE, [Offer(ANNA, terms=Terms(max_cost_microusd=1))])


def test_a_digest_changes_with_everything_that_is_shown() -> None:
    shown = {"request_id": "rq", "agent_id": "ag", "agent_name": "n", "scope": WIDE, "reason": "r"}
    first = digest(**shown)  # type: ignore[arg-type]
    assert first.startswith("sha256:")
    for key, value in {"request_id": "x", "agent_id": "x", "agent_name": "x", "scope": GETS, "reason": "x"}.items():
        assert digest(**{**shown, key: value}) != first  # type: ignore[arg-type]


def test_words_of_an_agent_become_one_printable_line() -> None:
    line = shown_line("a\x1b[2J\r\nb\u202ec\u200bd\ud800e\u2028f\x9bg", 100)
    assert line.isprintable()
    assert line == "a [2J  b c d e f g"
    assert shown_line("x" * 101, 100) == "x" * 100


def test_a_rate_is_of_the_last_minute() -> None:
    asking: Asking[str] = Asking()
    assert [asking.take(float(n), 3) for n in range(4)] == [True, True, True, False]
    assert [asking.take(59.9, 3), asking.take(60.0, 3), asking.take(60.5, 3)] == [False, True, False]


def test_a_denial_answers_for_its_scope_and_wider_ones_for_a_while() -> None:
    asking: Asking[str] = Asking()
    asking.deny(GETS, "no", until=100)
    assert asking.lately_denied(GETS, 99.9) == "no"
    assert asking.lately_denied(WIDE, 99.9) == "no"
    assert asking.lately_denied(OK, 99.9) is None
    assert asking.lately_denied(GETS, 100) is None


def test_a_launcher_gives_nothing_where_a_second_person_has_to() -> None:
    free = Policy("p", scopes=(GETS,))
    check_launched_with(WIDE, free)
    for rules in (GrantRules(separation=True), GrantRules(approvers=2)):
        strict = Policy("p", scopes=(GETS,), grants=rules)
        check_launched_with(OK, strict)
        with pytest.raises(PermissionDenied, match="second person"):
            check_launched_with(WIDE, strict)
    with pytest.raises(PermissionDenied, match="ceiling"):
        check_launched_with(WIDE, Policy("p", ceiling=(GETS,)))
    assert format_scope(OK).isprintable()
