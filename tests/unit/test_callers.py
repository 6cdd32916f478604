"""Who has which role, and what a role may call."""

from __future__ import annotations

import grpc
import pytest

from supervisord.callers import METHOD_ROLES, Access, Caller, Role, certified, current_caller, judge, role

ACCESS = Access(
    admin_gids=frozenset({10}),
    operator_uids=frozenset({1001}),
    operator_gids=frozenset({20}),
    reader_gids=frozenset({30}),
)
KILL = "/stockade.v1.AgentService/Kill"
STATUS = "/stockade.v1.AgentService/ListAgents"


@pytest.mark.parametrize(
    ("uid", "gids", "expected"),
    [
        (0, set(), Role.ADMIN),
        (1000, {1000}, None),
        (1000, {1000, 30}, Role.READER),
        (1000, {1000, 20}, Role.OPERATOR),
        (1000, {30, 20}, Role.OPERATOR),
        (1000, {30, 20, 10}, Role.ADMIN),
        (1001, {1001}, Role.OPERATOR),
        (1000, {0}, None),  # root's group is not root
        (20, {30}, Role.READER),  # a uid is not a gid
    ],
)
def test_the_highest_role_counts(uid: int, gids: set[int], expected: Role | None) -> None:
    assert role(uid, frozenset(gids), ACCESS) is expected


def test_root_stays_an_admin_whatever_the_configuration_says() -> None:
    assert role(0, frozenset(), Access(admin_uids=frozenset())) is Role.ADMIN


def test_everyone_may_read_only_where_that_is_said() -> None:
    assert role(1000, frozenset({1000}), Access()) is None
    assert role(1000, frozenset({1000}), Access(everyone_reads=True)) is Role.READER


def caller(given: Role) -> Caller:
    return Caller(uid=1000, gid=1000, pid=1, role=given, name="ada")


def test_each_method_needs_its_role_and_no_more() -> None:
    for method, needed in METHOD_ROLES.items():
        for given in Role:
            assert (judge(method, caller(given)) is None) == (given >= needed), (method, given)


def test_readers_see_and_do_not_act() -> None:
    assert judge(STATUS, caller(Role.READER)) is None
    refusal = judge(KILL, caller(Role.READER))
    assert refusal is not None
    assert refusal.code is grpc.StatusCode.PERMISSION_DENIED
    assert "uid:1000(ada)" in refusal.message


def test_whoever_launches_does_not_register() -> None:
    launch, register = "/stockade.v1.AgentService/Launch", "/stockade.v1.RegistryService/RegisterDefinition"
    assert judge(launch, caller(Role.OPERATOR)) is None
    assert judge(register, caller(Role.OPERATOR)) is not None
    assert judge(register, caller(Role.ADMIN)) is None


@pytest.mark.parametrize(
    "method", ["", "/stockade.v1.AgentService/Burn", "/grpc.reflection.v1.ServerReflection/X", KILL + "/"]
)
def test_what_is_not_in_the_table_is_nobodys(method: str) -> None:
    assert judge(method, caller(Role.ADMIN)) is not None


def test_without_a_caller_nothing_may_be_called() -> None:
    for method in METHOD_ROLES:
        refusal = judge(method, None)
        assert refusal is not None
        assert refusal.code is grpc.StatusCode.UNAUTHENTICATED


ROLES = {"cn:ci": Role.OPERATOR, "spiffe://example.org/boss": Role.ADMIN}


def tls(*, cn: bytes = b"", uri: bytes = b"", kind: bytes = b"ssl") -> dict[str, list[bytes]]:
    return {
        "transport_security_type": [kind],
        "x509_common_name": [cn] if cn else [],
        "x509_subject_alternative_name": [b"host.example.org", uri] if uri else [],
    }


def test_a_certificate_with_a_role_is_a_caller() -> None:
    found = certified(tls(cn=b"ci"), ROLES)
    assert found is not None
    assert (found.actor, found.role, found.uid) == ("cn:ci", Role.OPERATOR, -1)
    found = certified(tls(cn=b"ci", uri=b"spiffe://example.org/boss"), ROLES)
    assert found is not None
    assert (found.actor, found.role) == ("spiffe://example.org/boss", Role.ADMIN)


@pytest.mark.parametrize(
    "context",
    [
        {},
        tls(),
        tls(cn=b"somebody"),
        tls(cn=b"cn:ci"),
        tls(cn=b"spiffe://example.org/boss"),
        tls(uri=b"spiffe://example.org/boss/"),
        tls(cn=b"ci", kind=b"insecure"),
    ],
)
def test_no_other_certificate_is(context: dict[str, list[bytes]]) -> None:
    assert certified(context, ROLES) is None


def test_outside_a_call_there_is_no_caller() -> None:
    with pytest.raises(LookupError):
        current_caller()
