"""Launch, deny, grant, allow, expire, revoke, freeze, thaw, kill, verify: by command line, by client, by asyncio.

Each step is judged by what reaches a web site on the host's loopback, to which the gateway pins a documentation name.
"""

from __future__ import annotations

import base64
import json
import os
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.census import cgroups_of, of_agent, settled
from tests.support.instance import Instance
from tests.support.operators import WAYS, Operator, Step, operator
from tests.support.site import Site

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

NAME = "status.example"
SCOPE = f"http:GET:http://{NAME}/**"
FETCH = "curl -sS -m 10 -o /dev/null -w '%{http_code}' http://" + NAME
IDLE = "echo up; exec sleep 1000"

OWN = """kind: Policy
name: {name}
version: 1
risk: limited
user: agent
rootfs: host
limits: {{memory: 256MiB, cpus: 1, pids: 64, disk: 64MiB, open_files: 1024, output: 1MiB}}
scopes: ["{scope}"]
egress: {{worker: {name}}}
on_supervisor_loss: contain
"""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


@pytest.fixture(scope="module")
def stockade(site: Site) -> Iterator[Instance]:
    hosts = f'[gateway]\nkind = "embedded"\n[gateway.hosts]\n"{NAME}" = "127.0.0.1:{site.port}"\n'
    with Instance.start(hosts) as instance:
        yield instance


@pytest.fixture(params=WAYS)
def by(request: pytest.FixtureRequest, stockade: Instance) -> Iterator[Operator]:
    with operator(stockade, request.param) as chosen:
        yield chosen


@pytest.fixture
def agent(by: Operator) -> Iterator[str]:
    name = "governed"
    by.launch(name, IDLE)
    yield name
    by.kill(name)


def fetch(by: Operator, name: str, path: str) -> str:
    return by.inside(name, f"{FETCH}{path}")


def verdicts(by: Operator, name: str) -> list[str]:
    return [step.verdict for step in by.steps(name) if step.verb == "egress.request"]


def test_denied_then_granted_then_revoked(by: Operator, agent: str, site: Site) -> None:
    site.seen.clear()
    denial = json.loads(by.inside(agent, f"curl -sS http://{NAME}/a -w '\\n%{{content_type}}'").splitlines()[0])
    assert (denial["status"], denial["scope"]) == (403, f"http:GET:http://{NAME}/a")
    kind = by.inside(agent, f"curl -sS -o /dev/null -w '%{{content_type}}' http://{NAME}/a")
    assert kind == "application/problem+json"
    assert site.seen == []
    grant_id = by.grant(agent, denial["scope"])
    assert fetch(by, agent, "/a") == "200"
    assert site.seen == ["GET /a"]
    # What was granted, and nothing beside it.
    assert fetch(by, agent, "/b") == "403"
    assert by.inside(agent, f"{FETCH}/a -X POST") == "403"
    assert site.seen == ["GET /a"]
    assert by.revoke(grant_id) == "REVOKED"
    assert fetch(by, agent, "/a") == "403"
    assert site.seen == ["GET /a"]
    steps = by.steps(agent)
    mine = [step for step in steps if step.verb.startswith("grant.")]
    assert [(s.verb, s.verdict, s.actor, s.reason) for s in mine] == [
        ("grant.create", "allowed", "uid:0(root)", "a test"),
        ("grant.create", "done", "uid:0(root)", "a test"),
        ("grant.revoke", "done", "uid:0(root)", "enough"),
    ]
    assert {step.object for step in mine} == {denial["scope"]}
    assert verdicts(by, agent) == ["denied", "denied", "allowed", "denied", "denied", "denied"]
    outcomes = [step for step in steps if step.verb == "egress.outcome"]
    assert [step.verdict for step in outcomes] == ["done"]
    assert all(step.actor.startswith("agent:ag_") for step in steps if step.verb.startswith("egress."))


def test_a_grant_ends_when_its_time_is_up_unasked(by: Operator, agent: str, stockade: Instance, site: Site) -> None:
    grant_id = by.grant(agent, SCOPE, ttl="5s")
    assert grant_id in by.grants(agent)
    # Nobody asks for the agent's grants or makes a request: the daemon ends it by itself.
    stockade.wait(lambda: any(step.verb == "grant.expire" for step in by.steps(agent)))
    expired = [step for step in by.steps(agent) if step.verb == "grant.expire"]
    assert [(step.verdict, step.actor, step.object) for step in expired] == [("done", "daemon", SCOPE)]
    assert grant_id not in by.grants(agent)
    site.seen.clear()
    assert fetch(by, agent, "/late") == "403"
    assert site.seen == []


def test_uses_are_counted_also_when_they_come_at_once(by: Operator, agent: str, site: Site) -> None:
    grant_id = by.grant(agent, SCOPE, max_uses=3)
    assert by.grants(agent)[grant_id] == 3
    site.seen.clear()
    all_at_once = f"for i in 1 2 3 4 5 6 7 8; do {FETCH}/$i & done; wait"
    codes = by.inside(agent, all_at_once)
    assert sorted(codes[i : i + 3] for i in range(0, len(codes), 3)) == ["200"] * 3 + ["403"] * 5
    assert len(site.seen) == 3
    assert by.grants(agent).get(grant_id) in (None, 0)


def test_a_revocation_resets_what_is_open(by: Operator, stockade: Instance, site: Site) -> None:
    site.cut.clear()
    by.launch("streaming", f"sleep 1000 & while ! curl -sS -N -f http://{NAME}/slow; do sleep 0.1; done; wait")
    try:
        grant_id = by.grant("streaming", f"http:GET:http://{NAME}/slow")
        stockade.wait(lambda: "piece" in by.logs("streaming"))
        assert "piece" in by.logs("streaming")
        assert not site.cut.is_set()
        by.revoke(grant_id)
        assert site.cut.wait(5), "the site still has its client"
        # The agent lives, tries again, and gets nothing more.
        tried = len(verdicts(by, "streaming"))
        stockade.wait(lambda: len(verdicts(by, "streaming")) > tried + 1)  # so what was cut has ended
        length = len(by.logs("streaming"))
        count = len(verdicts(by, "streaming"))
        stockade.wait(lambda: len(verdicts(by, "streaming")) > count + 1)
        assert set(verdicts(by, "streaming")[count:]) == {"denied"}
        assert len(by.logs("streaming")) == length
        assert by.state("streaming") == "RUNNING"
    finally:
        by.kill("streaming")


def test_a_frozen_agent_does_nothing_and_reaches_nothing(by: Operator, stockade: Instance, site: Site) -> None:
    by.launch("ticking", f"while :; do {FETCH}/tick; echo; sleep 0.02; done")
    try:
        by.grant("ticking", SCOPE)
        site.seen.clear()
        stockade.wait(lambda: len(site.seen) > 2)
        assert len(site.seen) > 2
        by.freeze("ticking")
        assert by.state("ticking") == "FROZEN"
        before = (0, 0)

        def stands_still() -> bool:
            nonlocal before
            earlier, before = before, (len(site.seen), len(by.logs("ticking")))
            time.sleep(0.5)
            return before == earlier

        stockade.wait(stands_still)  # what was under way has arrived; from here on nothing may
        assert (len(site.seen), len(by.logs("ticking"))) == before
        by.thaw("ticking")
        assert by.state("ticking") == "RUNNING"
        stockade.wait(lambda: len(site.seen) > before[0] + 2)
        assert len(site.seen) > before[0] + 2
        steps = [(s.verb, s.verdict, s.actor) for s in by.steps("ticking")]
        for verb in ("agent.freeze", "agent.thaw"):
            assert (verb, "done", "uid:0(root)") in steps
    finally:
        by.kill("ticking")


def test_a_kill_leaves_nothing_and_says_so(by: Operator, stockade: Instance, site: Site) -> None:
    assert by.verified()  # the client's connection is there and counted
    before = settled(stockade)
    storm = "trap '' TERM INT HUP; for i in $(seq 20); do setsid sleep 1000 & (sleep 1000 &) & done;"
    started = by.launch("doomed", f"{storm} while ! curl -sS -N -f http://{NAME}/slow; do :; done")
    by.grant("doomed", SCOPE)
    stockade.wait(lambda: "piece" in by.logs("doomed") and len(of_agent(started)) > 40)
    alive = of_agent(started)
    assert len(alive) > 40
    groups = {path for pid in alive for path in cgroups_of(pid)}
    assert groups
    site.cut.clear()
    receipt = by.kill("doomed")
    # At once, not in a while: the receipt claims it.
    assert of_agent(started) == []
    assert receipt["verified_empty"] is True
    assert receipt["processes_killed"] > 40
    assert 0 < receipt["egress_cut_ms"] < 5000
    assert 0 < receipt["dead_ms"] < 5000
    assert receipt["agent_id"] == started["agent_id"]
    assert site.cut.wait(5), "the site still has its client"
    assert not any(path.exists() for path in groups)
    assert settled(stockade) == before
    assert by.kill(started["agent_id"])["receipt_id"] == receipt["receipt_id"]
    assert by.state("doomed") == "KILLED"
    assert by.grants("doomed") == {}
    kills = [step for step in by.steps("doomed") if step.verb == "agent.kill"]
    assert [(s.verdict, s.actor, s.reason) for s in kills] == [("done", "uid:0(root)", "the end")]
    assert by.verified()


def test_every_step_of_a_life_is_in_the_log_in_order(by: Operator) -> None:
    started = by.launch("recorded", IDLE)
    fetch(by, "recorded", "/x")
    grant_id = by.grant("recorded", SCOPE)
    fetch(by, "recorded", "/x")
    by.revoke(grant_id)
    by.freeze("recorded")
    by.thaw("recorded")
    by.kill("recorded")
    human, agent = "uid:0(root)", f"agent:{started['agent_id']}"
    wanted = [
        ("agent.launch", "allowed", human),
        ("agent.exec", "done", human),
        ("exec.start", "allowed", human),
        ("egress.request", "denied", agent),
        ("grant.create", "done", human),
        ("egress.request", "allowed", agent),
        ("grant.revoke", "done", human),
        ("agent.freeze", "done", human),
        ("agent.thaw", "done", human),
        ("agent.kill", "done", human),
    ]
    steps: Iterator[Step] = iter(by.steps("recorded"))
    for verb, verdict, actor in wanted:
        assert any((s.verb, s.verdict, s.actor) == (verb, verdict, actor) for s in steps), (
            f"{verb} {verdict} is missing"
        )
    assert by.verified()


def nothing_fits_any_more(site: Site) -> bool:
    """Whether all that is between site and reader is full."""
    before = site.pieces
    time.sleep(1)
    return site.pieces == before > 0


def test_a_receipt_says_what_was_cut(stockade: Instance, site: Site) -> None:
    """More is on its way to an agent than it reads; another one has read all there was."""
    site.seen.clear()
    slow = f"while ! curl -sS -f --limit-rate 10k -o /dev/null http://{NAME}/endless; do sleep 0.1; done"
    whole = f"until curl -sS -f -o /dev/null http://{NAME}/big; do sleep 0.1; done; echo whole; exec sleep 1000"
    for name, script in (("slow-reader", slow), ("whole-reader", whole)):
        stockade.launch("--name", name, "--", "sh", "-c", script)
        stockade.json("grant", name, SCOPE)
    stockade.wait(lambda: "whole" in stockade.ctl("logs", "whole-reader").out)
    stockade.wait(lambda: "GET /endless" in site.seen)
    assert sorted(site.seen) == ["GET /big", "GET /endless"]
    stockade.wait(lambda: nothing_fits_any_more(site))
    cut, none = (stockade.json("kill", name)[0] for name in ("slow-reader", "whole-reader"))
    assert (cut["relays_cut"], none["bytes_cut"]) == (1, 0)
    assert cut["bytes_cut"] > 0
    (entry,) = stockade.actions("slow-reader", "--verb", "agent.kill")
    stated = json.loads(base64.b64decode(cut["statement"]).partition(b"\n")[2])
    assert entry["details"]["bytes_cut"] == stated["bytes_cut"] == cut["bytes_cut"]


def test_a_worker_of_the_agents_own_tells_what_passed_before_it_ends(site: Site) -> None:
    hosts = f'[gateway]\nkind = "embedded"\n[gateway.hosts]\n"{NAME}" = "127.0.0.1:{site.port}"\n'
    policies = {f"{name}.yaml": OWN.format(name=name, scope=SCOPE) for name in ("dedicated", "shared")}
    with Instance.start(hosts, policies=policies) as stockade:
        for name in ("dedicated", "shared"):
            site.seen.clear()
            script = f"curl -sS -N -o /dev/null http://{NAME}/endless"
            stockade.launch("--name", name, "--policy", name, "--", "sh", "-c", script)
            stockade.wait(lambda: nothing_fits_any_more(site) or site.pieces > 100)
            assert stockade.json("kill", name)[0]["verified_empty"] is True
            stockade.wait(lambda name=name: stockade.actions(name, "--verb", "egress.outcome"))  # type: ignore[misc]
            (outcome,) = stockade.actions(name, "--verb", "egress.outcome")
            assert (outcome["verdict"], outcome["reason"]) == ("failed", "cut")
            assert outcome["details"]["bytes_down"] > 1 << 20
