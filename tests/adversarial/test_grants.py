"""Attempts on grants: outlive them, use them more often, approve or widen them oneself, have another thing approved.

Each has its twin: the same attempt succeeds where it should, so that the refusal means something.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from stockade.client import Conflict, InvalidArgument, NotPermitted

from tests.support.instance import Instance
from tests.support.people import ANNA, BERT, by, pending, root, steps
from tests.support.site import Site

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stockade.client import Stockade

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

NAME = "status.example"
SCOPE = f"http:GET:http://{NAME}/**"
POLICIES = {
    "two.yaml": (
        "kind: Policy\nname: two\nversion: 1\nscopes: []\ngrants: {approvers: 2, separation: true}\n"
        "egress: {on_deny: ask}\n"
    ),
    "second.yaml": "kind: Policy\nname: second\nversion: 1\nscopes: []\ngrants: {separation: true}\n",
    "bounded.yaml": (
        f'kind: Policy\nname: bounded\nversion: 1\nscopes: []\ngrants: {{ceiling: ["http:GET:http://{NAME}/ok/**"]}}\n'
    ),
}
FETCH = "curl -sS -m 20 -o /dev/null -w '%{http_code} ' http://" + NAME
ASK = "curl -sS -m 20 $STOCKADE_GATEWAY_URL/.stockade/v1/requests"
USES_MAX, AT_ONCE = 10, 64


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


@pytest.fixture(scope="module")
def stockade(site: Site) -> Iterator[Instance]:
    hosts = f'[gateway]\nkind = "embedded"\n[gateway.hosts]\n"{NAME}" = "127.0.0.1:{site.port}"\n'
    with Instance.start(hosts, policies=POLICIES) as instance:
        yield instance


@pytest.fixture(scope="module")
def client(stockade: Instance) -> Iterator[Stockade]:
    with root(stockade) as client:
        yield client


@pytest.fixture
def agent(request: pytest.FixtureRequest, client: Stockade, site: Site) -> Iterator[str]:
    """An agent of the policy that the test is marked with."""
    policy = getattr(request, "param", "default")
    name = f"attacker-{policy}"
    client.launch(["sleep", "1000"], name=name, policy=policy)
    site.seen.clear()
    yield name
    client.agent(name).kill()


of_policy = pytest.mark.parametrize


def inside(client: Stockade, agent: str, script: str) -> str:
    return client.agent(agent).exec(["sh", "-c", script]).stdout.decode()


def ask(client: Stockade, agent: str, scope: str = SCOPE, reason: str = "please") -> dict[str, str]:
    body = json.dumps({"scope": scope, "reason": reason})
    answer: dict[str, str] = json.loads(inside(client, agent, f"{ASK} -d '{body}'"))
    return answer


# --- time


def test_a_stream_outlives_no_grant_and_nobody_has_to_ask(client: Stockade, agent: str, site: Site) -> None:
    site.cut.clear()
    client.grant(agent, SCOPE, ttl=5.0)
    # One answer without end: nothing is asked of the proxy after its beginning.
    assert inside(client, agent, f"curl -sS -N -o /dev/null -w '%{{http_code}}' http://{NAME}/slow; echo \" $?\"") in (
        "200 56\n",
        "200 18\n",
    )
    assert site.cut.wait(5)
    assert inside(client, agent, f"{FETCH}/after") == "403 "
    (end,) = steps(client, agent, "grant.expire")
    assert (end.actor, end.details["relays_cut"]) == ("daemon", 1)
    # The twin: without an end it is read for as long as one likes.
    client.grant(agent, SCOPE)
    read = inside(
        client, agent, f"curl -sS -N -m 2.5 -o /dev/null -w '%{{http_code}}' http://{NAME}/slow; echo \" $?\""
    )
    assert read == "200 28\n"  # curl's own time-out


# --- uses


@of_policy("agent", ["default"], indirect=True)
def test_64_at_once_on_a_grant_of_ten_uses_are_ten(client: Stockade, agent: str, site: Site) -> None:
    storm = f"seq {AT_ONCE} | xargs -P {AT_ONCE} -I N {FETCH}/N"
    grant = client.grant(agent, SCOPE, max_uses=USES_MAX)
    codes = inside(client, agent, storm).split()
    assert sorted(codes) == ["200"] * USES_MAX + ["403"] * (AT_ONCE - USES_MAX)
    assert len(site.seen) == USES_MAX
    # Its last use ended it, and that is on record.
    ended = {each.grant_id: each for each in client.grants(agent, include_ended=True)}[grant.grant_id]
    assert (ended.state, ended.uses, ended.uses_left) == ("USED_UP", USES_MAX, 0)
    assert [s.details["grant_id"] for s in steps(client, agent, "grant.spend")] == [grant.grant_id]
    client.grant(agent, SCOPE, max_uses=AT_ONCE)
    assert inside(client, agent, storm).split() == ["200"] * AT_ONCE


# --- bytes and cost


def test_a_relay_is_cut_when_the_bytes_of_its_grant_run_out(client: Stockade, agent: str, site: Site) -> None:
    site.cut.clear()
    most = 64 * 1024
    grant = client.grant(agent, SCOPE, max_bytes=most, ticket="OPS-1")
    fetched = f"curl -sS -o got -w '%{{http_code}} %{{size_download}} ' http://{NAME}/big; echo $?; "
    code, size, status = inside(client, agent, f"cd /tmp; {fetched}").split()
    assert (code, int(size) < most) == ("200", True)
    assert status != "0", "the answer looked whole"
    assert inside(client, agent, f"{FETCH}/more") == "403 "
    ended = {each.grant_id: each for each in client.grants(agent, include_ended=True)}[grant.grant_id]
    assert (ended.state, ended.bytes_left, ended.bytes_used, ended.ticket) == ("USED_UP", 0, most, "OPS-1")
    outcome = steps(client, agent, "egress.outcome")[-1]
    assert (outcome.verdict, outcome.reason) == ("failed", "the bytes of the grant are used up")
    assert outcome.details["bytes_down"] + outcome.details["bytes_up"] <= most
    (spent,) = steps(client, agent, "grant.spend")
    assert (spent.actor, spent.details["bytes"]) == ("daemon", most)
    # The twin: with enough of them it is whole.
    client.grant(agent, SCOPE, max_bytes=16 << 20)
    assert inside(client, agent, f"cd /tmp; {fetched}").split() == ["200", str(8 << 20), "0"]


def test_several_at_once_share_the_bytes_of_a_grant(client: Stockade, agent: str) -> None:
    most = 1 << 20
    client.grant(agent, SCOPE, max_bytes=most)
    fetch = f"curl -sS -o /dev/null -w '%{{http_code}} %{{size_download}}\\n' http://{NAME}/big"
    answers = [
        line.split() for line in inside(client, agent, f"seq 8 | xargs -P 8 -I N {fetch} 2>/dev/null").splitlines()
    ]
    # Those that came when nothing was left were cut (502 where the site had not answered yet), or got a denial: those
    # bytes are the worker's and not the grant's.
    assert {code for code, _ in answers} <= {"000", "200", "403", "502"}
    assert 0 < sum(int(size) for code, size in answers if code == "200") < most


def test_a_bound_that_means_nothing_is_refused(client: Stockade, agent: str) -> None:
    for scope, terms in (
        (SCOPE, {"max_cost_usd": 1.0}),
        ("llm:*", {"max_cost_usd": float("nan")}),
        (SCOPE, {"max_bytes": 0}),
        ("fs:ro:/usr/share/doc", {"max_bytes": 100}),
    ):
        with pytest.raises(InvalidArgument, match="cannot grant"):
            client.grant(agent, scope, **terms)
    assert client.grant(agent, "llm:*", max_cost_usd=0.5).cost_usd_left == 0.5


# --- approve oneself


def test_an_agent_cannot_approve_its_own_request(client: Stockade, agent: str) -> None:
    request_id = ask(client, agent)["request_id"]
    own = "$STOCKADE_GATEWAY_URL/.stockade/v1"
    forged = json.dumps({"scope": SCOPE, "state": "approved", "grant_id": "gr_x"})
    tries = (
        f"-X POST {own}/requests/{request_id}",
        f"-X PUT -d approved {own}/requests/{request_id}",
        f"-X PATCH {own}/requests/{request_id}",
        f"-X DELETE {own}/requests/{request_id}",
        f"-X POST {own}/requests/{request_id}/approve",
        f"-X POST {own}/grants",
        f"-d '{forged}' {own}/requests",
    )
    code = "curl -sS -m 20 -o /dev/null -w '%{http_code} '"
    codes = inside(client, agent, "; ".join(f"{code} {each}" for each in tries)).split()
    assert codes[:-1] == ["405", "405", "405", "405", "405", "404"]
    assert codes[-1] == "202"  # the same question again, and the rest of it is not read
    call = {"name": "approve_request", "arguments": {"request_id": request_id}}
    message = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call})
    by_mcp = inside(client, agent, f"curl -sS $STOCKADE_GATEWAY_URL/.stockade/mcp -d '{message}'")
    assert json.loads(by_mcp)["error"]["code"] == -32602
    assert inside(client, agent, f"{FETCH}/x") == "403 "
    (request,) = client.requests(agent)
    assert (request.state, request.approved_by) == ("PENDING", ())
    # The twin: a person can.
    client.approve(request_id, digest=request.digest)
    assert inside(client, agent, f"{FETCH}/x") == "200 "


@of_policy("agent", ["bounded"], indirect=True)
def test_nothing_widens_beyond_the_ceiling(stockade: Instance, client: Stockade, agent: str) -> None:
    assert ask(client, agent)["reason_code"] == "not_grantable"
    assert client.requests(agent) == []
    with pytest.raises(NotPermitted):
        client.grant(agent, SCOPE)
    with pytest.raises(NotPermitted):
        client.launch(["true"], policy="bounded", scopes=[SCOPE])
    within = f"http:GET:http://{NAME}/ok/*"
    request_id = ask(client, agent, within)["request_id"]
    wide = stockade.ctl("requests", "approve", request_id, "--scope", f"http:GET:http://{NAME}/ok/**")
    assert (wide.code, "not within" in wide.err) == (2, True), wide.err
    client.approve(request_id)
    assert inside(client, agent, f"{FETCH}/ok/1; {FETCH}/ok/1/2; {FETCH}/x").split() == ["200", "403", "403"]


def test_an_approval_is_used_once(client: Stockade, agent: str, site: Site) -> None:
    asked = ask(client, agent)
    client.approve(asked["request_id"], max_uses=1)
    assert inside(client, agent, f"{FETCH}/1; {FETCH}/2").split() == ["200", "403"]
    assert site.seen == ["GET /1"]
    with pytest.raises(Conflict):
        client.approve(asked["request_id"], max_uses=1)
    # The same question again is another one, and waits for a person.
    again = ask(client, agent)
    assert again["request_id"] != asked["request_id"]
    assert again["state"] == "pending"


def test_what_is_shown_cannot_be_changed_afterwards(client: Stockade, agent: str) -> None:
    first = ask(client, agent, reason="to read one page")
    shown = {request.request_id: request for request in client.requests(agent)}[first["request_id"]]
    assert ask(client, agent, reason="everything, please")["request_id"] == first["request_id"]
    ask(client, agent, f"http:GET,POST:http://{NAME}/**", reason="to read one page")
    again = {request.request_id: request for request in client.requests(agent)}
    assert again[first["request_id"]] == shown
    assert len({request.digest for request in again.values()}) == 2
    with pytest.raises(Conflict):  # the digest of the other question approves nothing
        client.approve(first["request_id"], digest=next(r.digest for r in again.values() if r != shown))
    client.approve(first["request_id"], digest=shown.digest)
    assert [g.scope for g in client.grants(agent) if g.scope != "llm:*"] == [shown.scope]


# --- two people


@pytest.fixture
def annas(stockade: Instance, client: Stockade) -> Iterator[str]:
    """An agent that Anna has launched, of a policy that wants two people other than her."""
    launched = by(stockade, ANNA, "launch", "--name", "annas", "--policy", "two", "--", "sleep", "1000")
    assert launched.code == 0, launched.err
    yield "annas"
    client.agent("annas").kill()


def test_who_launched_it_and_who_approved_already_are_no_second_person(
    stockade: Instance, client: Stockade, annas: str
) -> None:
    request_id = ask(client, annas)["request_id"]
    by_anna = by(stockade, ANNA, "requests", "approve", request_id)
    assert (by_anna.code, "launched" in by_anna.err) == (4, True), by_anna.err
    first = by(stockade, BERT, "requests", "approve", request_id, "--ttl", "5m", "--max-uses", "7")
    assert first.code == 0, first.err
    assert "approved by 1 of 2" in first.out
    assert inside(client, annas, "true") == ""
    assert client.grants(annas) == []
    again = by(stockade, BERT, "requests", "approve", request_id)
    assert (again.code, "again" in again.err) == (5, True), again.err
    assert client.grants(annas) == []
    # The twin: a second person, and what both agreed to is granted.
    done = stockade.json("requests", "approve", request_id, "--ttl", "1h", "--max-uses", "3")
    (grant,) = client.grants(annas)
    assert (done["grant_id"], done["uses_left"]) == (grant.grant_id, 3)
    assert grant.granted_by == f"uid:{BERT}(?), uid:0(root)"
    assert grant.expires_at is not None
    assert grant.granted_at is not None
    assert (grant.expires_at - grant.granted_at).total_seconds() == pytest.approx(300, abs=1)
    tried = [(s.actor, s.verdict) for s in steps(client, annas, "request.approve") if s.verdict != "allowed"]
    assert tried == [
        (f"uid:{ANNA}(?)", "denied"),
        (f"uid:{BERT}(?)", "done"),
        (f"uid:{BERT}(?)", "denied"),
        ("uid:0(root)", "done"),
    ]


def test_one_person_gets_round_it_neither_by_a_grant_nor_at_launch(
    stockade: Instance, client: Stockade, annas: str
) -> None:
    for uid in (ANNA, BERT):
        alone = by(stockade, uid, "grant", annas, SCOPE)
        assert (alone.code, "2 people" in alone.err) == (4, True), alone.err
    at_launch = by(stockade, ANNA, "launch", "--policy", "two", "--scope", SCOPE, "--", "true")
    assert (at_launch.code, "second person" in at_launch.err) == (4, True), at_launch.err
    assert client.grants(annas) == []


def test_with_separation_alone_any_other_person_is_enough(stockade: Instance, client: Stockade) -> None:
    launched = by(stockade, ANNA, "launch", "--name", "one", "--policy", "second", "--", "sleep", "1000")
    assert launched.code == 0, launched.err
    own = by(stockade, ANNA, "grant", "one", SCOPE)
    assert (own.code, "who launched" in own.err) == (4, True), own.err
    other = by(stockade, BERT, "grant", "one", SCOPE, "--reason", "looked at it", "--ticket", "OPS-2")
    assert other.code == 0, other.err
    (grant,) = client.grants("one")
    assert (grant.granted_by, grant.reason, grant.ticket) == (f"uid:{BERT}(?)", "looked at it", "OPS-2")
    assert [s.verdict for s in steps(client, "one", "grant.create")] == ["denied", "allowed", "done"]
    client.agent("one").kill()


def test_a_held_call_waits_for_both(stockade: Instance, client: Stockade, site: Site) -> None:
    site.seen.clear()
    script = f"curl -sS -m 50 -w '%{{http_code}}' -o /dev/null http://{NAME}/both; exec sleep 1000"
    launched = by(stockade, ANNA, "launch", "--name", "held", "--policy", "two", "--", "sh", "-c", script)
    assert launched.code == 0, launched.err
    request = pending(stockade, client, "held")
    assert by(stockade, BERT, "requests", "approve", request.request_id).code == 0
    assert site.seen == []
    client.approve(request.request_id, digest=request.digest)
    stockade.wait(lambda: site.seen)
    assert site.seen == ["GET /both"]
    client.agent("held").kill()
