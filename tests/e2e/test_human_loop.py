"""A human in the loop: a denied call waits, a person answers, and what was approved is what happens."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest
from stockade.client import Conflict

from tests.support.instance import Instance, bin_dir
from tests.support.people import pending, root, steps
from tests.support.site import Site

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stockade.client import Stockade

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

NAME = "status.example"
POLICIES = {
    "asking.yaml": "kind: Policy\nname: asking\nversion: 1\negress: {on_deny: ask, hold: 60s}\n",
    "impatient.yaml": "kind: Policy\nname: impatient\nversion: 1\negress: {on_deny: ask, hold: 1s}\n",
    "quiet.yaml": (
        "kind: Policy\nname: quiet\nversion: 1\ngrants: {asks_per_minute: 3, ask_again_after: 1h,"
        f' ceiling: ["http:GET:http://{NAME}/**"]}}\n'
    ),
}
FETCH = f"curl -sS -m 50 -w ' %{{http_code}}\\n' http://{NAME}"
ASK = "curl -sS $STOCKADE_GATEWAY_URL/.stockade/v1/requests"
APPROVAL_SECONDS_MAX = 0.2
_numbers = itertools.count(1)


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


@pytest.fixture(autouse=True)
def nothing_seen(site: Site) -> None:
    site.seen.clear()


def start(client: Stockade, script: str, policy: str = "asking") -> str:
    """An agent that runs this and then waits."""
    name = f"asker{next(_numbers)}"
    client.launch(["sh", "-c", f"{script}; exec sleep 1000"], name=name, policy=policy)
    return name


def written(client: Stockade, name: str) -> str:
    return b"".join(part.data for part in client.agent(name).logs() if part.stream == "stdout").decode()


def test_a_held_call_goes_on_within_200_ms_of_the_approval(stockade: Instance, client: Stockade, site: Site) -> None:
    took = []
    for _ in range(3):  # the best counts: what else the machine does is not what is measured
        site.seen.clear()
        agent = start(client, f"{FETCH}/held")
        request = pending(stockade, client, agent)
        assert (request.scope, request.state) == (f"http:GET:http://{NAME}/held", "PENDING")
        assert request.reason == f"wanted for GET http://{NAME}/held"
        assert site.seen == []
        began = time.monotonic()
        client.approve(request.request_id, digest=request.digest, ttl=60)
        while not site.seen and time.monotonic() < began + 5:
            time.sleep(0.001)
        took.append(time.monotonic() - began)
        assert site.seen == ["GET /held"]
    assert min(took) < APPROVAL_SECONDS_MAX, took
    stockade.wait(lambda: "200" in written(client, agent))
    assert written(client, agent) == "ok 200\n"
    (approved,) = [step for step in steps(client, agent, "request.approve") if step.verdict == "done"]
    assert approved.details["digest"] == request.digest
    assert approved.details["approved_by"] == ["uid:0(root)"]


def test_a_denied_call_gets_the_reason_and_is_not_asked_about_again(
    stockade: Instance, client: Stockade, site: Site
) -> None:
    agent = start(client, f'{FETCH}/no; {FETCH}/no; {ASK} -d \'{{"scope": "http:GET:http://{NAME}/no"}}\'')
    request = pending(stockade, client, agent)
    client.deny(request.request_id, "not on a Friday")
    stockade.wait(lambda: written(client, agent).endswith("}"))
    first, second, asked = written(client, agent).splitlines()
    for held in (first, second):
        assert held.endswith(" 403")
        denial = json.loads(held.removesuffix(" 403"))
        assert denial["reason_code"] == "scope_missing"
        assert denial["detail"].endswith("; denied: not on a Friday")
    answer = json.loads(asked)
    assert (answer["request_id"], answer["state"], answer["reason"]) == (
        request.request_id,
        "denied",
        "not on a Friday",
    )
    assert [r.request_id for r in client.requests(agent, include_decided=True)] == [request.request_id]
    assert site.seen == []


def test_nobody_answers_in_time_which_is_a_denial(stockade: Instance, client: Stockade, site: Site) -> None:
    agent = start(client, f"{FETCH}/late", "impatient")
    request = pending(stockade, client, agent)
    stockade.wait(lambda: " 403" in written(client, agent))
    assert "nobody answered in time" in written(client, agent)
    (found,) = client.requests(agent, include_decided=True)
    assert (found.request_id, found.state) == (request.request_id, "EXPIRED")
    with pytest.raises(Conflict):
        client.approve(request.request_id)
    assert client.grants(agent) == [grant for grant in client.grants(agent) if grant.scope == "llm:*"]
    stockade.wait(lambda: steps(client, agent, "request.expire"))
    assert [(s.verdict, s.actor) for s in steps(client, agent, "request.expire")] == [("denied", "daemon")]
    assert site.seen == []


def test_a_client_that_goes_away_ends_the_hold_and_joins_it_when_it_comes_back(
    stockade: Instance, client: Stockade, site: Site
) -> None:
    agent = start(client, f"{FETCH}/gone -m 0.5")
    request = pending(stockade, client, agent)
    stockade.wait(lambda: steps(client, agent, "egress.request"), 5)
    (ended,) = steps(client, agent, "egress.request")
    assert ended.verdict == "denied"
    assert ended.reason.endswith("; the client has gone")
    assert site.seen == []
    again = threading.Thread(target=client.agent(agent).exec, args=(["sh", "-c", f"{FETCH}/gone"],))
    again.start()
    time.sleep(0.3)
    assert [r.request_id for r in client.requests(agent)] == [request.request_id]
    client.approve(request.request_id, digest=request.digest)
    again.join(5)
    assert site.seen == ["GET /gone"]


def test_once_is_once(stockade: Instance, client: Stockade, site: Site) -> None:
    agent = start(client, f"{FETCH}/once; {FETCH}/once")
    request = pending(stockade, client, agent)
    done = stockade.ctl("-o", "json", "requests", "approve", request.request_id, "--once", "--ticket", "OPS-7")
    assert done.code == 0, done.err
    assert done.json()["ticket"] == "OPS-7"
    stockade.wait(lambda: [r for r in client.requests(agent) if r.request_id != request.request_id])
    (second,) = client.requests(agent)
    assert second.scope == request.scope
    assert site.seen == ["GET /once"]
    client.deny(second.request_id)
    stockade.wait(lambda: " 403" in written(client, agent))
    assert site.seen == ["GET /once"]


def test_less_than_was_asked_is_granted_and_never_more(stockade: Instance, client: Stockade, site: Site) -> None:
    wide, narrow = f"http:GET,POST:http://{NAME}/**", f"http:GET:http://{NAME}/ok/**"
    agent = start(client, f'{ASK} -d \'{{"scope": "{wide}", "reason": "to see"}}\'')
    request = pending(stockade, client, agent)
    wider = stockade.ctl(
        "requests", "approve", request.request_id, "--scope", "http:GET,POST,PUT:http://status.example/**"
    )
    assert (wider.code, "not within" in wider.err) == (2, True), wider.err
    assert client.requests(agent)[0].state == "PENDING"
    done = stockade.ctl(
        "requests", "approve", request.request_id, "--scope", narrow, "--ttl", "5m", "--reason", "ok part"
    )
    assert done.code == 0, done.err
    assert "to see" in done.out  # what is approved is shown
    (grant,) = [grant for grant in client.grants(agent) if grant.scope != "llm:*"]
    assert (grant.scope, grant.granted_by) == (narrow, "uid:0(root)")
    assert grant.expires_at is not None
    assert grant.reason == f"request {request.request_id}: ok part"
    inside = client.agent(agent).exec(["sh", "-c", f"{FETCH}/ok/1"]).stdout.decode()
    assert inside == "ok 200\n"
    assert site.seen == ["GET /ok/1"]


def test_an_approval_of_something_else_than_was_shown_is_refused(stockade: Instance, client: Stockade) -> None:
    agent = start(client, f'{ASK} -d \'{{"scope": "http:GET:http://{NAME}/x"}}\'')
    request = pending(stockade, client, agent)
    other = request.digest[:-1] + ("0" if request.digest[-1] != "0" else "1")
    refused = stockade.ctl("requests", "approve", request.request_id, "--digest", other)
    assert (refused.code, "not what was shown" in refused.err) == (5, True)
    assert [s.verdict for s in steps(client, agent, "request.approve")] == ["denied"]
    assert stockade.ctl("requests", "approve", request.request_id, "--digest", request.digest).code == 0


def test_an_approver_is_shown_one_plain_line(stockade: Instance, client: Stockade) -> None:
    reason = "\\u001b[2J harmless\\r\\nAPPROVED \\u202egnp.exe\\u200b \\ud800 " + "x" * 600
    agent = start(client, f'{ASK} -d \'{{"scope": "http:GET:http://{NAME}/y", "reason": "{reason}"}}\'')
    request = pending(stockade, client, agent)
    assert request.reason.isprintable()
    assert request.reason.startswith(" [2J harmless  APPROVED  gnp.exe ")
    assert len(request.reason) <= 500
    shown = stockade.ctl("requests").out
    assert not set(shown) & set("\x1b\u202e\r")
    client.deny(request.request_id)


def test_a_watcher_goes_on_where_it_was(stockade: Instance, client: Stockade) -> None:
    agent = start(client, f'{ASK} -d \'{{"scope": "http:GET:http://{NAME}/w1"}}\'')
    first = pending(stockade, client, agent)
    stream = client.watch_requests()
    seen = [next(stream) for _ in client.requests()]
    token = seen[-1][1]
    assert first.request_id in {request.request_id for request, _ in seen}
    client.deny(first.request_id, "no")
    # Another one begins where the first was, and misses nothing of what came between.
    request, token = next(client.watch_requests(token))
    assert (request.request_id, request.state, request.answer) == (first.request_id, "DENIED", "no")
    # A token of another daemon begins with what is pending; what was decided is not among it.
    second = start(client, f'{ASK} -d \'{{"scope": "http:GET:http://{NAME}/w2"}}\'')
    pending(stockade, client, second)
    request, _ = next(client.watch_requests("17.99"))
    assert request.state == "PENDING"
    watcher = subprocess.Popen(
        [bin_dir() / "stockadectl", "-o", "json", "requests", "watch", "--after", token],
        env=stockade.environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert watcher.stdout is not None
        line = json.loads(watcher.stdout.readline())
        assert (line["agent_name"], line["state"]) == (second, "PENDING")
        assert line["resume_token"]
    finally:
        watcher.terminate()
        watcher.wait()


def test_who_asks_too_often_or_beyond_the_ceiling_bothers_nobody(stockade: Instance, client: Stockade) -> None:
    asks = "; ".join(
        f"{ASK} -w '\\n' -d '{{\"scope\": \"http:GET:http://{host}/{n}\"}}'"
        for host, n in (("other.example", 0), (NAME, 1), (NAME, 1), (NAME, 2), (NAME, 3), (NAME, 4))
    )
    agent = start(client, asks, "quiet")
    stockade.wait(lambda: written(client, agent).count("\n") == 6)
    beyond, one, same, two, three, four = map(json.loads, written(client, agent).splitlines())
    assert (beyond["status"], beyond["reason_code"]) == (403, "not_grantable")
    assert one["request_id"] == same["request_id"]
    assert two["state"] == three["state"] == "pending"
    assert (four["status"], four["reason_code"]) == (429, "limit")
    assert len(client.requests(agent)) == 3
