"""The access review: each kind of finding has the case that makes it, and the same inventory without it makes none."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from gateway_client.egress.scope import parse_scope
from supervisord.definitions import Definition, DefinitionRow
from supervisord.errors import NotFound
from supervisord.ids import GrantId
from supervisord.lifecycle import State
from supervisord.policy import AgentSpec, LimitsWanted, Policy, Risk
from supervisord.review import Inventory, asked_for_use, review
from supervisord.scopes import Grant
from tests.support.made import make_agent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from supervisord.agents import Agent

DAY = 86400
NOW = 1_790_000_000
ROW = DefinitionRow("reader", 1, "sha256:x", "", "", "uid:0(root)", 1)
SPEC = AgentSpec(name="reader", owner="team", purpose="reads", risk=Risk.LIMITED)
POLICY = Policy(name="default", scopes=(parse_scope("llm:*"),))


def definition(row: DefinitionRow = ROW, problem: str = "", **changes: Any) -> Definition:
    return Definition(row, replace(SPEC, **changes), problem)


def grant(scope: str, *, days: float = 0, uses: int = 0, by: str = "uid:0(root)") -> Grant:
    name = GrantId("gr_" + "a" * 26)
    return Grant(name, make_agent("a").agent_id, parse_scope(scope), by, "", NOW - days * DAY, uses=uses)


def agent(state: State = State.RUNNING, days: float = 0, **changes: Any) -> Agent:
    launched = int((NOW - days * DAY) * 1e9)
    return make_agent("a", state, launched_at_ns=launched, **{"definition": "reader@1", **changes})


def found(
    definitions: Sequence[Definition] = (definition(),),
    agents: Sequence[Agent] = (),
    grants: Sequence[Grant] = (),
    *,
    policy: Policy = POLICY,
    used: frozenset[str] = frozenset(),
    unknown: frozenset[str] = frozenset(),
) -> list[str]:
    def get(name: str) -> Policy:
        if name != policy.name:
            raise NotFound(f"cannot find policy {name}: there is none", remedy="choose another")
        return policy

    inventory = Inventory(
        definitions=definitions,
        agents=agents,
        policy=get,
        grants=lambda _: grants,
        used=used,
        unknown=unknown,
        since_ns=int((NOW - 30 * DAY) * 1e9),
        now_ns=int(NOW * 1e9),
    )
    findings = review(inventory)
    assert all(each.detail and each.remedy for each in findings)
    return [each.kind for each in findings]


def test_a_tidy_inventory_has_nothing_to_look_at() -> None:
    assert found(agents=[agent()], grants=[grant("llm:*", days=40, uses=1)], used=frozenset({"gr_" + "a" * 26})) == []


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"owner": ""}, ["no-owner"]),
        ({"purpose": ""}, ["no-purpose"]),
        ({"risk": None}, ["no-risk-class"]),
        ({"risk": Risk.HIGH}, ["policy-too-lax"]),
        ({"risk": Risk.MINIMAL}, ["policy-too-strict"]),
        ({"policy": "gone"}, ["unusable"]),
        ({"problem": "cannot read it"}, ["unusable"]),
    ],
)
def test_what_is_wrong_with_a_definition(changes: dict[str, Any], kinds: list[str]) -> None:
    assert found([definition(**changes)]) == kinds
    old = replace(ROW, deprecated="superseded")
    assert found([definition(old, **changes)]) == []  # nobody launches it any more


@pytest.mark.parametrize(("days", "kinds"), [(29.9, []), (30, ["unused-grant"]), (300, ["unused-grant"])])
def test_a_grant_that_is_old_and_was_never_used(days: float, kinds: list[str]) -> None:
    assert found(agents=[agent()], grants=[grant("llm:*", days=days)]) == kinds


def test_a_grant_that_was_used_once_and_not_since() -> None:
    held = grant("llm:*", days=40, uses=3)
    assert asked_for_use([held, grant("llm:*", days=40), grant("llm:*", uses=1)], int((NOW - 30 * DAY) * 1e9)) == {
        held.grant_id
    }
    assert found(agents=[agent()], grants=[held]) == ["unused-grant"]
    assert found(agents=[agent()], grants=[held], used=frozenset({held.grant_id})) == []
    assert found(agents=[agent()], grants=[held], unknown=frozenset({held.grant_id})) == ["use-unknown"]


def test_nobody_counts_how_often_files_are_opened() -> None:
    files = definition(scopes=(parse_scope("fs:ro:/srv/x"),))
    assert found([files], [agent()], [grant("fs:ro:/srv/x", days=300)]) == []


def test_an_agent_beyond_its_definition() -> None:
    assert found(agents=[agent()], grants=[grant("tls:a.example:443")]) == ["over-scope"]
    wide = definition(scopes=(parse_scope("tls:a.example:443"),))
    assert found([wide], [agent()], [grant("tls:a.example:443")]) == []
    narrow = definition(models=("gpt-*",))
    assert found([narrow], [agent()], [grant("llm:*")]) == ["over-model"]
    assert found([narrow], [agent()], [grant("llm:gpt-5")]) == []
    small = definition(limits=LimitsWanted(memory_bytes=1 << 20, pids=4, cpus=0.5))
    assert found([small], [agent(memory_bytes=1 << 21, pids=4, cpus=1.0)]) == ["over-limit", "over-limit"]


def test_agents_by_no_definition_and_by_an_old_one() -> None:
    assert found(agents=[agent(definition="")]) == ["unregistered"]
    assert found(agents=[agent(State.EXITED, definition="")]) == ["unregistered"]
    assert found(agents=[agent(State.EXITED, days=31, definition="")]) == []
    assert found(agents=[agent(days=31, definition="")]) == ["unregistered"]  # it lives
    assert found(agents=[agent(definition="gone@9")]) == ["unregistered"]
    old = definition(replace(ROW, deprecated="superseded"))
    assert found([old], [agent()]) == ["deprecated-running"]
    assert found([old], [agent(State.EXITED)]) == []
