"""The report's figures out of made entries: bounded however long the period is, and escaped whatever they hold."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from stockade.client.values import Action

from supervisord.ctl import dossier as module
from supervisord.ctl.dossier import Dossier, host_of
from supervisord.ctl.dossier_html import page

START = datetime(2026, 1, 31, tzinfo=UTC)
LOG = {
    "first_seq": 1, "last_seq": 1, "size": 1, "root": "AAAA", "checkpoint": "o\n1\nAAAA\n", "before_to_end": None,
    "end_to_checkpoint": {"old_size": 1, "old_root": "A", "size": 1, "root": "A", "path": []},
}  # fmt: skip


def entry(seq: int, verb: str, verdict: str = "done", *, agent: str = "ag_a", **fields: Any) -> Action:
    values = {"actor": "uid:0(root)", "object": "", "reason": "", "details": {}, **fields}
    return Action(seq=seq, time=START + timedelta(seconds=seq), agent_id=agent, verb=verb, verdict=verdict, **values)


def test_memory_is_bounded_and_what_is_left_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in (("ROWS_MAX", 10), ("KEYS_MAX", 10), ("AGENTS_MAX", 10)):
        monkeypatch.setattr(module, name, most)
    found = Dossier()
    for seq in range(1, 101):
        agent = f"ag_{seq}"
        found.feed(entry(seq, "egress.request", "denied", agent=agent, object=f"GET http://h{seq}/", reason="no: x"))
        found.feed(entry(seq, "agent.kill", agent=agent, details={"verified_empty": True}))
        found.feed(entry(seq, "egress.outcome", agent=agent, details={"model": f"m{seq}", "cost_usd": 0.25}))
        found.feed(entry(seq, "agent.throttled", agent=agent))
    assert len(found.agents) <= 10
    document = found.document(5)
    assert {document["summary"][key] for key in ("kills", "denied", "limit_events")} == {100}
    assert document["summary"]["cost_usd"] == 25  # also what has no row of its own
    assert (len(document["kills"]["rows"]), document["kills"]["left_out"]) == (10, 90)
    hosts = document["egress"]["denied_by_host"]
    assert (hosts["rows"][0], hosts["left_out"], hosts["left_out_times"]) == ({"host": "(others)", "times": 90}, 6, 6)


def test_an_end_without_a_stop_is_seen_also_across_the_periods_border() -> None:
    starts = [entry(1, "daemon.start"), entry(2, "daemon.stop"), entry(3, "daemon.start"), entry(4, "daemon.start")]
    for before, crashes in ((False, 1), (True, 2)):
        found = Dossier(running_before=before)
        for each in starts:
            found.feed(each)
        assert found.document(5)["summary"]["crashes"] == crashes


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("GET https://a.example/x", "a.example"),
        ("POST http://a.example:81/", "a.example:81"),
        ("CONNECT a.example:443", "a.example:443"),
        ("malformed request", "malformed request"),
        ("GET http://[::1/x", "GET http://[::1/x"),
        ("", ""),
    ],
)
def test_the_host_of_a_line_of_the_log(text: str, host: str) -> None:
    assert host_of(text) == host


@pytest.mark.parametrize(
    "evil", ["<script>x</script>", "\x1b[2J<b>", "\u202egpj.exe", "'\"><img src=x>", "x" * 100_000]
)
def test_no_field_of_an_entry_is_markup_or_drives_anything(evil: str) -> None:
    found = Dossier()
    labels = {evil: evil}
    fields: dict[str, Any] = {"object": evil, "reason": evil, "actor": evil}
    words = ("name", "owner", "purpose", "policy", "definition", "model", "receipt_id", "grant_id", "code")
    details = dict.fromkeys(words, evil)
    posture = {"degraded": [evil]}
    verbs = (
        "agent.launch", "agent.exec", "agent.exit", "agent.oom", "agent.kill", "grant.create", "request.create",
        "request.deny", "egress.request", "egress.outcome", "policy.load", "hold.create", "daemon.start", evil,
    )  # fmt: skip
    for seq, verb in enumerate(verbs, 1):
        every = {**details, "labels": labels, "scopes": [evil], "posture": posture, evil: evil}
        found.feed(entry(seq, verb, agent=evil, **fields, details=every))
    reach = {key: [evil] for key in ("files", "hosts", "models", "tools")}
    said = ("reference", "owner", "contact", "purpose", "risk", "policy", "deprecated")
    definition = {**dict.fromkeys(said, evil), "models": [evil], "data": [evil], "reach": reach}
    shown = page(
        {
            "instance": evil, "stockade": evil, "made_at": evil, "attention": [evil], "definitions": [definition],
            "period": {"since": evil, "until": evil}, **found.document(5), "log": {**LOG, "checkpoint": evil},
        }
    )  # fmt: skip
    assert evil not in shown
    assert {c for c in shown if not c.isprintable()} <= {"\n", "\u202f"}
    assert "<script" not in shown
    assert "<img" not in shown
    assert len(shown) < 200_000


def test_an_approval_of_several_is_a_grant_when_the_last_has_agreed() -> None:
    found = Dossier()
    asked = {"object": "tls:a.example:443"}
    found.feed(entry(1, "request.create", **asked))
    found.feed(entry(2, "request.approve", actor="uid:1(ada)", **asked, details={"approvals": 1, "approvers": 2}))
    found.feed(entry(3, "request.approve", "denied", actor="uid:1(ada)", **asked))
    people = ["uid:1(ada)", "uid:2(bob)"]
    done = {"grant_id": "gr_x", "approved_by": people, "ticket": "T-1"}
    found.feed(entry(4, "request.approve", "allowed", actor="uid:2(bob)", **asked, details=done))
    found.feed(entry(5, "request.approve", actor="uid:2(bob)", **asked, details=done))
    found.feed(entry(6, "request.expire", "denied", **asked))
    document = found.document(5)
    assert [row["deed"] for row in document["requests"]["rows"]] == [
        "asked", "agreed", "tried to approve", "approved", "expired",
    ]  # fmt: skip
    (grant,) = document["grants"]["rows"]
    assert (grant["by"], grant["ticket"]) == ("uid:1(ada), uid:2(bob)", "T-1")
    assert (document["summary"]["granted"], document["summary"]["requests_approved"]) == (1, 1)
