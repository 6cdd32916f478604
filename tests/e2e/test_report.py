"""A day of work on a real instance, and the report of it: every figure is what was done, and no text becomes markup."""

from __future__ import annotations

import base64
import json
import os
import signal
import stat
import time
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from supervisord.actions.merkle import consistency_holds
from tests.support.instance import Instance
from tests.support.site import Site

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

NAME = "status.example"
SCOPE = f"http:GET:http://{NAME}/**"
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'"
MODEL = "scripted"
AGENT = f"""kind: Agent
name: log-reader
version: 1
owner: team-observability
purpose: "finds causes {EVIL.replace('"', "")}"
risk: limited
models: ["*"]
data: [service logs]
contact: obs@example.com
labels: {{team: observability}}
command: [sh, -c, "exec sleep 1000"]
"""


def code(path: str, *flags: str, host: str = NAME) -> str:
    return f"curl -sS -m 10 -o /dev/null -w '%{{http_code}} ' {' '.join(flags)} http://{host}{path}"


def ask(scope: str, reason: str) -> str:
    body = json.dumps({"scope": scope, "reason": reason}).replace("'", "'\\''")
    return f"curl -sS -H 'Content-Type: application/json' -d '{body}' $STOCKADE_GATEWAY_URL/.stockade/v1/requests"


@pytest.fixture(scope="module")
def day() -> Iterator[tuple[Instance, dict[str, Any], str]]:
    """What was done in the day is in `live_through_it`; gives the instance and both files of the report."""
    with Site() as site:
        hosts = f'[gateway]\nkind = "embedded"\n[gateway.hosts]\n"{NAME}" = "127.0.0.1:{site.port}"\n'
        with Instance.start(hosts) as stockade:
            live_through_it(stockade)
            out = stockade.directory / "report"
            said = stockade.json("report", "--since", "1h", "--out", str(out))
            assert said["html"] == str(out / "report.html")
            document = json.loads((out / "report.json").read_text())
            assert said["summary"] == document["summary"]
            yield stockade, document, (out / "report.html").read_text()


def live_through_it(stockade: Instance) -> None:
    file = stockade.directory / "agent.yaml"
    file.write_text(AGENT)
    stockade.json("registry", "add", "-f", str(file))
    stockade.launch("--agent", "log-reader", "--name", "reader")

    def inside(script: str) -> str:
        return stockade.ctl("exec", "reader", "--", "sh", "-c", script).out

    assert inside(f"{code('/a')}; {code('/b')}; {code('/', host='evil.example')}").split() == ["403"] * 3
    grant = stockade.json("grant", "reader", SCOPE, "--reason", f"incident 7 {EVIL}")
    assert inside("; ".join(code(f"/{n}") for n in range(4))).split() == ["200"] * 4
    stockade.json("revoke", grant["grant_id"])
    assert inside(code("/a")).split() == ["403"]
    first = json.loads(inside(ask("tls:one.example:443", EVIL)))["request_id"]
    second = json.loads(inside(ask("tls:two.example:443", "please")))["request_id"]
    stockade.json("requests", "approve", first)
    stockade.json("requests", "deny", second, "--reason", "not today")
    call = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "@say hello there"}]})
    answer = inside(f"curl -sS -H 'Content-Type: application/json' -d '{call}' $OPENAI_BASE_URL/chat/completions")
    assert "hello there" in answer, answer
    assert stockade.ctl("run", "--name", "ghost", "--purpose", EVIL, "--", "sh", "-c", "exit 3").code == 3
    hungry = "import time; b = bytearray(200 << 20); b[::4096] = b'x' * len(b[::4096]); time.sleep(9)"
    stockade.ctl("run", "--name", "hungry", "--memory", "48MiB", "--", "python3", "-c", hungry)
    assert stockade.ctl("hold", "villain", "--reason", "an incident").code == 0
    stockade.ctl("registry", "deprecate", "log-reader@1", "--reason", "superseded")
    stockade.launch("--name", "idle", "--", "sleep", "1000")
    assert stockade.json("kill", "reader", "--reason", "the day is over")[0]["verified_empty"]
    assert stockade.process is not None
    stockade.process.send_signal(signal.SIGHUP)
    stockade.wait(lambda: stockade.actions("--verb", "policy.load"))
    stockade.down(signal.SIGKILL)
    stockade.up()


def test_the_figures_are_what_was_done(day: tuple[Instance, dict[str, Any], str]) -> None:
    _, document, _ = day
    summary = document["summary"]
    want = {
        "launched": 4, "unregistered": 3, "exited": 2, "failed": 0, "killed": 1, "granted": 2, "revoked": 1,
        "requests_asked": 2, "requests_approved": 1, "requests_denied": 1, "allowed": 5, "denied": 4, "kills": 1,
        "kills_unverified": 0, "crashes": 1, "calls": 1,
    }  # fmt: skip
    assert {key: summary[key] for key in want} == want
    assert summary["output_tokens"] > 0
    agents = {row["name"]: row for row in document["agents"]["rows"]}
    assert {name: (row["end"], row["how"]) for name, row in agents.items()} == {
        "reader": ("killed", "by uid:0(root): the day is over"),
        "ghost": ("exited", "exit 3"),
        "hungry": ("exited", "out of memory"),
        "idle": ("", ""),
    }
    reader = agents["reader"]
    assert (reader["definition"], reader["owner"], reader["labels"]) == (
        "log-reader@1", "team-observability", {"team": "observability"}
    )  # fmt: skip
    assert (reader["allowed"], reader["denied"]) == (5, 4)
    assert agents["ghost"]["definition"] == ""


def test_scopes_requests_and_kills_say_who(day: tuple[Instance, dict[str, Any], str]) -> None:
    _, document, _ = day
    grants = document["grants"]["rows"]
    assert [(row["agent"], row["scope"], row["by"]) for row in grants] == [
        ("reader", SCOPE, "uid:0(root)"),
        ("reader", "tls:one.example:443", "uid:0(root)"),
    ]
    assert grants[0]["ended"] == "revoked by uid:0(root)"
    asked = [(row["deed"], row["scope"]) for row in document["requests"]["rows"]]
    assert asked == [
        ("asked", "tls:one.example:443"),
        ("asked", "tls:two.example:443"),
        ("approved", "tls:one.example:443"),
        ("denied", "tls:two.example:443"),
    ]
    (kill,) = document["kills"]["rows"]
    assert kill["receipt_id"].startswith("rc_")
    assert (kill["agent"], kill["verified_empty"], len(kill["signature"])) == ("reader", True, 128)


def test_egress_spend_limits_and_changes_are_counted(day: tuple[Instance, dict[str, Any], str]) -> None:
    _, document, _ = day
    egress = document["egress"]
    assert {row["host"]: row["times"] for row in egress["denied_by_host"]["rows"]} == {NAME: 3, "evil.example": 1}
    assert {row["host"]: row["times"] for row in egress["allowed_by_host"]["rows"]} == {
        NAME: 4,
        "gateway.internal:3128": 1,
    }
    assert [(row["model"], row["calls"]) for row in document["spend"]["by_model"]["rows"]] == [(MODEL, 1)]
    assert [row["label"] for row in document["spend"]["by_label"]["rows"]] == ["team=observability"]
    assert [row["agent"] for row in document["spend"]["by_agent"]["rows"]] == ["reader"]
    assert {(row["agent"], row["verb"]) for row in document["limits"]["rows"]} >= {("hungry", "agent.oom")}
    changes = [(row["verb"], row["object"]) for row in document["changes"]["rows"]]
    assert changes == [
        ("registry.add", "log-reader@1"),
        ("hold.create", "name:villain"),
        ("registry.deprecate", "log-reader@1"),
        ("policy.load", "policies"),
    ]
    verbs = [(row["verb"], bool(row["note"])) for row in document["daemon"]["rows"]]
    assert verbs[0] == ("daemon.start", False)
    assert ("daemon.start", True) in verbs  # the one after kill -9
    (definition,) = document["definitions"]
    assert (definition["owner"], definition["risk"], definition["deprecated"]) == (
        "team-observability", "limited", "superseded"
    )  # fmt: skip
    counted = sum(row["times"] for row in document["entries"]["rows"])
    assert counted == document["summary"]["entries"] == document["log"]["last_seq"] - document["log"]["first_seq"] + 1


class Markup(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_no_text_of_an_agent_becomes_markup_and_nothing_is_loaded(day: tuple[Instance, dict[str, Any], str]) -> None:
    _, document, page = day
    assert EVIL in json.dumps(document).replace('\\"', '"')  # it is in there,
    read = Markup()
    read.feed(page)
    assert read.text.count("<script>alert(1)</script><img src=x onerror=alert(2)>") >= 4  # and only as text
    assert not read.tags & {"script", "img", "link", "iframe", "object", "form", "base"}
    assert {name for name, _ in read.attributes} <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "id", "href"
    }  # fmt: skip
    assert all(value.startswith("#") for name, value in read.attributes if name == "href")
    assert "url(" not in page
    assert "@import" not in page


def test_a_later_period_is_proven_to_continue_the_log(day: tuple[Instance, dict[str, Any], str]) -> None:
    stockade, _, _ = day
    after = datetime.now(UTC)
    time.sleep(0.01)
    stockade.launch("--name", "later", "--", "sleep", "1000")
    out = stockade.directory / "later"
    stockade.json("report", "--since", after.isoformat(), "--out", str(out))
    document = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in document["agents"]["rows"]] == ["later"]
    assert document["summary"]["crashes"] == 0
    log = document["log"]
    assert log["first_seq"] > 1
    for proof in (log["before_to_end"], log["end_to_checkpoint"]):
        old_root, root = (base64.b64decode(proof[key]) for key in ("old_root", "root"))
        path = [base64.b64decode(node) for node in proof["path"]]
        assert consistency_holds(proof["old_size"], proof["size"], old_root, root, path)
        assert not consistency_holds(proof["old_size"], proof["size"], root[::-1], root, path)
    assert log["before_to_end"]["old_size"] == log["first_seq"] - 1
    assert log["before_to_end"]["size"] == log["end_to_checkpoint"]["old_size"] == log["last_seq"]
    assert log["end_to_checkpoint"]["root"] == log["root"]
    assert stat.S_IMODE((out / "report.json").stat().st_mode) == 0o600
    # An agent that was launched before the period, and did something in it, has its name.
    stockade.json("kill", "idle")
    stockade.json("report", "--since", after.isoformat(), "--out", str(out))
    again = json.loads((out / "report.json").read_text())
    assert {row["name"]: row["launched_at"] is None for row in again["agents"]["rows"]} == {
        "later": False,
        "idle": True,
    }


def test_a_period_that_is_none_is_a_wrong_command_line(day: tuple[Instance, dict[str, Any], str]) -> None:
    stockade, _, _ = day
    done = stockade.ctl("report", "--since", "1h", "--until", "2h", "--out", str(Path("/nonexistent")))
    assert (done.code, "the period is empty" in done.err) == (2, True)
    done = stockade.ctl("report", "--out", str(stockade.config))  # a file
    assert (done.code, "cannot write" in done.err) == (2, True)
