"""The registry on a real instance: launches by definition, policies that refuse the rest, the review, what runs now."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from stockade.client import AsyncStockade, Conflict, InvalidArgument, NotFound, NotPermitted, Stockade

from tests.support.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

STRICT = "kind: Policy\nname: strict\nextends: default\nregistered: required\n"
SCOPE = "http:GET:https://status.example.com/**"


def text(name: str, version: int = 1, **more: object) -> str:
    fields: dict[str, object] = {
        "kind": "Agent", "name": name, "version": version, "owner": "team-a", "purpose": "sleeps", "risk": "limited",
        "contact": "a@example.com", "command": ["sleep", "1000"], "scopes": [SCOPE], "limits": {"memory": "128MiB"},
        "budget": {"llm_tokens": 5000},
    }  # fmt: skip
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in {**fields, **more}.items())


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start('[control]\ngroup = "nogroup"\n', policies={"strict.yaml": STRICT}) as instance:
        yield instance


@pytest.fixture(scope="module")
def client(stockade: Instance) -> Iterator[Stockade]:
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as client:
        yield client


def add(stockade: Instance, name: str, version: int = 1, **more: object) -> dict[str, Any]:
    file = stockade.directory / f"{name}.yaml"
    file.write_text(text(name, version, **more))
    made: dict[str, Any] = stockade.json("registry", "add", "-f", str(file))
    return made


def test_everything_says_by_which_definition_an_agent_runs(stockade: Instance) -> None:
    made = add(stockade, "reader", 3)
    launched = stockade.launch("--agent", "reader", "--name", "r1")
    want = ("reader@3", made["digest"])
    (row,) = stockade.json("status", "r1")
    inspected = stockade.json("inspect", "r1")
    (entry,) = stockade.actions("r1", "--verb", "agent.launch")
    for said in (launched, launched["posture"], row, inspected, inspected["posture"], entry["details"]):
        assert (said["definition"], said["definition_digest"]) == want
    assert (row["owner"], row["purpose"]) == ("team-a", "sleeps")
    assert "reader@3" in stockade.ctl("status", "r1").out
    # It is so after the daemon died, too; and one that was launched by no definition says none.
    stockade.down(signal.SIGKILL)
    stockade.up()
    assert (stockade.json("inspect", "r1")["definition"], stockade.json("registry", "list")[0]["digest"]) == want
    assert stockade.launch("--name", "plain", "--", "sleep", "1000")["definition"] == ""
    stockade.ctl("kill", "r1", "plain")


def test_a_version_never_changes(stockade: Instance, client: Stockade) -> None:
    add(stockade, "fixed")
    assert add(stockade, "fixed")["reference"] == "fixed@1"  # the same again: it is there
    with pytest.raises(Conflict, match="another content"):
        client.register(text("fixed", owner="mallory").encode())
    with pytest.raises(InvalidArgument, match="Article 5"):
        client.register(text("banned", risk="prohibited").encode())
    with pytest.raises(NotFound):
        client.definition("banned")
    adds = [entry for entry in stockade.actions("--verb", "registry.add") if entry["object"].startswith("fixed")]
    assert [(entry["actor"], entry["details"]["version"]) for entry in adds] == [("uid:0(root)", 1)]
    assert client.definition("fixed@1")[1].decode() == text("fixed")


def test_a_policy_takes_registered_agents_only(stockade: Instance, client: Stockade) -> None:
    refused = stockade.ctl("run", "--policy", "strict", "--", "true")
    assert refused.code == 125
    assert "registered agents only" in refused.err
    # A file that is not in the registry is not enough, nor one that is and was given by hand.
    add(stockade, "tight", policy="strict", command=["sh", "-c", "echo ran"])
    file = stockade.directory / "tight.yaml"
    assert stockade.ctl("launch", "-f", str(file)).code == 4
    agent = client.launch(registered="tight")
    assert agent.wait().exit_code == 0
    assert b"ran" in b"".join(output.data for output in agent.logs())
    for more in ({"scopes": ["tls:evil.example:443"]}, {"workspace": "/etc"}, {"memory_bytes": 1 << 30}):
        with pytest.raises(NotPermitted, match="more than its definition"):
            client.launch(registered="tight", **more)
    with pytest.raises(NotPermitted, match="another command"):
        client.launch(["id"], registered="tight")
    with pytest.raises(NotPermitted, match="another policy"):
        client.launch(registered="tight", policy="default")
    client.deprecate("tight@1", "superseded")
    with pytest.raises(NotPermitted, match="superseded"):
        client.launch(registered="tight@1")
    assert [agent.name for agent in client.agents()] == []  # nothing of it ran


def test_what_runs_now_and_what_it_can_do(stockade: Instance, client: Stockade) -> None:
    add(stockade, "worker")
    agent = client.launch(registered="worker", name="w1")
    agent.grant("tls:extra.example:443", ttl=600, max_uses=3)
    (now,) = stockade.json("registry", "running")
    assert (now["name"], now["risk"], now["policy_risk"]) == ("w1", "limited", "limited")
    assert (now["agent"]["owner"], now["contact"]) == ("team-a", "a@example.com")
    held = {grant["scope"]: (grant["uses_left"], bool(grant["expires_at"])) for grant in now["grants"]}
    assert held == {"llm:*": (None, False), SCOPE: (None, False), "tls:extra.example:443": (3, True)}
    assert (now["budget"], now["budget_left"]) == ({"llm_tokens": 5000}, {"llm_tokens": 5000})
    table = stockade.ctl("registry", "running").out
    for said in ("worker@1", "team-a", "tls:extra.example:443", "3 uses left", "llm_tokens 5000 of 5000", "128.0MiB"):
        assert said in table

    async def through_asyncio() -> list[str]:
        async with AsyncStockade(f"unix:{stockade.run_dir}/control.sock") as other:
            return [each.agent.definition for each in await other.running()]

    assert asyncio.run(through_asyncio()) == ["worker@1"]
    agent.kill()
    assert stockade.ctl("registry", "running").out == "no agent is running\n"


def test_the_review_finds_what_is_there_and_nothing_else(stockade: Instance, client: Stockade) -> None:
    add(stockade, "tidy")
    agent = client.launch(registered="tidy", name="t1")
    mine = ("t1", "tidy@1", "loose@1")

    def kinds(unused: float | None = None) -> list[str]:
        return sorted(each.kind for each in client.review(unused) if each.subject in mine)

    assert kinds() == []
    agent.grant("tls:extra.example:443")
    add(stockade, "loose", owner="x", purpose="y", risk="high")
    assert kinds() == ["over-scope", "policy-too-lax"]
    assert kinds(0) == ["over-scope", "policy-too-lax", "unused-grant", "unused-grant", "unused-grant"]
    client.deprecate("tidy@1", "superseded")
    client.deprecate("loose@1", "superseded")
    assert kinds() == ["deprecated-running", "over-scope"]
    done = stockade.ctl("registry", "review")
    assert (done.code, "deprecated-running" in done.out) == (0, True)
    assert stockade.ctl("registry", "review", "--strict").code == 1
    agent.kill()
    assert kinds() == []


def test_one_who_may_launch_may_not_register(stockade: Instance) -> None:
    file = stockade.directory / "a.yaml"
    file.write_text(text("mine", command=["true"]))
    file.chmod(0o644)
    as_somebody: Any = {"user": 65534, "group": 65534, "extra_groups": []}
    assert stockade.ctl("run", "--", "true", **as_somebody).code == 0
    assert stockade.ctl("registry", "list", **as_somebody).code == 0
    refused = stockade.ctl("registry", "add", "-f", str(file), **as_somebody)
    assert (refused.code, "needs the role admin" in refused.err) == (4, True)
    assert stockade.json("registry", "list", "mine") == []
    assert stockade.ctl("registry", "add", "-f", str(file)).code == 0
    assert stockade.ctl("launch", "--agent", "mine", **as_somebody).code == 0
    assert stockade.ctl("registry", "deprecate", "mine@1", "--reason", "x", **as_somebody).code == 4
