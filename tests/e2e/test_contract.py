"""What outside checks read: verbs, exit codes and JSON keys of the command line, definitions, selectors, holds."""

from __future__ import annotations

import base64
import grp
import json
import os
import pwd
import re
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from stockade.client import NotPermitted, Stockade

from tests.support.instance import Instance, bin_dir

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

STATUS_KEYS = {"agent_id", "name", "state", "policy", "exit_code", "started_at", "memory_bytes", "pids"}
RECEIPT_KEYS = {"receipt_id", "agent_id", "verified_empty", "processes_killed", "egress_cut_ms", "dead_ms"}
GRANT_KEYS = {"grant_id", "agent_id", "scope", "expires_at", "uses_left"}
ACTION_KEYS = {"seq", "time", "agent_id", "actor", "verb", "object", "verdict", "reason", "details"}
MOMENT = re.compile(r"20[0-9]{2}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]\.[0-9]{6}Z")

NARROW = """
kind: Policy
name: narrow
version: 1
extends: default
scopes: []
limits: {pids: 64}
"""
DEFINITION = """
kind: Agent
name: defined
version: 3
owner: team-observability
purpose: says what it was given
policy: narrow
command: [sh, -c, "ls /workspace; echo $GREETING; id -u; sleep 1000"]
workspace: {path: input, mode: ro}
labels: {team: observability}
env: {GREETING: hello}
scopes: ["llm:defined-*"]
"""


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start(policies={"narrow.yaml": NARROW}) as instance:
        yield instance


@pytest.fixture(autouse=True)
def nobody_left(stockade: Instance) -> Iterator[None]:
    yield
    stockade.ctl("kill", "--all")


# --- JSON


def test_keys_of_documents(stockade: Instance) -> None:
    launched = stockade.launch("--name", "keyed", "--", "sleep", "1000")
    assert {"agent_id", "name", "state", "posture"} <= launched.keys()
    assert re.fullmatch(r"ag_[a-z2-7]{26}", launched["agent_id"])
    assert {"seccomp", "landlock_abi", "limits", "policy_digest", "network", "degraded"} <= launched["posture"].keys()
    status = stockade.json("status", "keyed")
    assert isinstance(status, list)
    assert status[0].keys() >= STATUS_KEYS
    assert status[0]["memory_bytes"] > 0
    assert status[0]["pids"] >= 2
    assert status[0]["exit_code"] is None
    assert MOMENT.fullmatch(status[0]["started_at"])
    assert stockade.json("ps", "keyed")[0].keys() == status[0].keys()
    assert stockade.json("inspect", "keyed").keys() >= STATUS_KEYS | {"posture", "labels", "command"}
    grant = stockade.json("grant", "keyed", "llm:x", "--ttl", "10m", "--max-uses", "2")
    assert grant.keys() >= GRANT_KEYS
    assert (grant["scope"], grant["uses_left"], grant["agent_id"]) == ("llm:x", 2, launched["agent_id"])
    assert MOMENT.fullmatch(grant["expires_at"])
    assert all(item.keys() >= GRANT_KEYS for item in stockade.json("grants", "keyed"))
    receipts = stockade.json("kill", "keyed")
    assert isinstance(receipts, list)
    assert receipts[0].keys() >= RECEIPT_KEYS
    statement = base64.b64decode(receipts[0]["statement"])
    stated = json.loads(statement.partition(b"\n")[2])
    assert stated["grants_revoked"] == receipts[0]["grants_revoked"] == 2  # the policy's and the one above
    assert {key: stated[key] for key in RECEIPT_KEYS} == {key: receipts[0][key] for key in RECEIPT_KEYS}
    assert stockade.json("grants", "keyed") == []
    key = Ed25519PublicKey.from_public_bytes(
        base64.b64decode(stockade.json("log", "status")["public_key"].split("+", 2)[2])[1:]
    )
    key.verify(base64.b64decode(receipts[0]["signature"]), statement)
    with pytest.raises(InvalidSignature):
        key.verify(base64.b64decode(receipts[0]["signature"]), statement.replace(b"true", b"false"))
    actions = stockade.actions("keyed")
    assert all(entry.keys() == ACTION_KEYS for entry in actions)
    assert all(MOMENT.fullmatch(entry["time"]) for entry in actions)
    assert [entry["seq"] for entry in actions] == sorted(entry["seq"] for entry in actions)
    verified = stockade.json("log", "verify")
    assert verified.keys() == {"ok", "size", "root", "problem"}
    assert verified["size"] == stockade.actions()[-1]["seq"]


def test_actions_are_found_by_verb_verdict_time_and_agent(stockade: Instance) -> None:
    agent = stockade.launch("--name", "sought", "--", "sleep", "1000")
    stockade.launch("--name", "other", "--", "sleep", "1000")
    stockade.ctl("kill", "sought")
    kills = stockade.actions("--verb", "agent.kill", "--since", "10m")
    assert agent["agent_id"] in {entry["agent_id"] for entry in kills}
    assert {entry["verb"] for entry in kills} == {"agent.kill"}
    assert {entry["agent_id"] for entry in stockade.actions("sought")} == {agent["agent_id"]}
    assert stockade.actions("--since", "2099-01-01T00:00:00Z") == []
    last = stockade.actions()[-1]["seq"]
    assert stockade.actions("--after", str(last)) == []


def test_actions_are_found_by_label_also_as_they_come(stockade: Instance) -> None:
    red = stockade.launch("--name", "red", "--label", "team=red", "--label", "tier=two", "--", "sleep", "1000")
    blue = stockade.launch("--name", "blue", "--label", "team=blue", "--", "sleep", "1000")
    found = stockade.actions("--label", "team=red")
    assert {entry["agent_id"] for entry in found} == {red["agent_id"]}
    assert {entry["verb"] for entry in found} >= {"agent.launch", "agent.exec"}
    assert stockade.actions("--label", "team=red", "--label", "tier=one") == []
    assert {entry["verb"] for entry in stockade.actions("--label", "team=red", "--verb", "agent")} >= {"agent.launch"}
    assert stockade.actions("--label", "team=red", "--verb", "grant.revoke") == []
    assert stockade.actions("--label", "team=red", "--until", found[0]["time"]) == []
    command = [
        str(bin_dir() / "stockadectl"),
        "-o",
        "json",
        "actions",
        "-f",
        "--label",
        "team=red",
        "--verb",
        "agent.kill",
    ]
    with subprocess.Popen(command, env=stockade.environment, stdout=subprocess.PIPE) as following:
        assert following.stdout is not None
        stockade.ctl("kill", "blue")
        late = stockade.launch("--name", "late", "--label", "team=red", "--", "sleep", "1000")
        for name in ("red", "late"):
            stockade.ctl("kill", name)
        told = [json.loads(following.stdout.readline())["agent_id"] for _ in range(2)]
        following.terminate()
    assert told == [red["agent_id"], late["agent_id"]]
    assert blue["agent_id"] not in told


def test_tables_are_for_people_and_json_comes_at_either_end(stockade: Instance) -> None:
    stockade.launch("--name", "shown", "--", "sleep", "1000")
    table = stockade.ctl("status").out.splitlines()
    assert table[0].split()[:2] == ["NAME", "STATE"]
    assert any(line.split()[:2] == ["shown", "RUNNING"] for line in table)
    assert stockade.ctl("status", "shown", "-o", "json").json()[0]["name"] == "shown"
    assert stockade.ctl("launch", "--", "true").out.startswith("ag_")


def test_a_checkpoint_is_a_signed_note_of_the_whole_log(stockade: Instance) -> None:
    stockade.ctl("run", "--", "true")
    note = stockade.ctl("log", "checkpoint").out
    origin, size, _root, *rest = note.splitlines()
    assert origin.startswith(f"stockade/{stockade.name}/")
    assert int(size) >= stockade.actions()[-1]["seq"] - 1
    assert any(line.startswith(f"— {origin} ") for line in rest)


# --- exit codes


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("inspect", "nobody"), 3, "nobody"),
        (("logs", "nobody"), 3, "nobody"),
        (("wait", "nobody"), 3, "nobody"),
        (("kill", "nobody"), 3, "nobody"),
        (("freeze", "nobody"), 3, "nobody"),
        (("exec", "nobody", "--", "true"), 3, "nobody"),
        (("grant", "nobody", "llm:*"), 3, "nobody"),
        (("revoke", "gr_" + "a" * 26), 3, "gr_"),
        (("revoke", "nobody"), 3, "nobody"),
        (("hold", "--label", "team"), 2, "KEY=VALUE"),
        (("status", "ag_" + "a" * 26), 3, "ag_"),
        (("requests", "approve", "rq_" + "a" * 26), 3, "rq_"),
        (("release", "ho_" + "a" * 26), 3, "ho_"),
        (("policy", "show", "no-such"), 3, "no-such"),
        (("launch", "--policy", "no-such", "--", "true"), 3, "no-such"),
        (("no-such-verb",), 2, "no-such-verb"),
        (("statsu",), 2, "status"),
        (("launch",), 2, "nothing to launch"),
        (("launch", "--memory", "much", "--", "true"), 2, "512MiB"),
        (("launch", "--memory", "1KiB", "--", "true"), 2, "memory_bytes"),
        (("launch", "--memory", "100TiB", "--", "true"), 4, "memory_bytes"),
        (("launch", "--cpus", "0", "--", "true"), 2, "cpus"),
        (("launch", "--cpus", "-1", "--", "true"), 2, "cpus"),
        (("launch", "--cpus", "nan", "--", "true"), 2, "cpus"),
        (("launch", "--pids", "1", "--", "true"), 2, "pids"),
        (("launch", "--pids", "-1", "--", "true"), 2, "pids"),
        (("launch", "--workspace", "/etc/passwd", "--", "true"), 2, "it is a file"),
        (("grant", "nobody", "llm:*", "--max-uses", "-1"), 2, "--max-uses"),
        (("actions", "nobody"), 3, "nobody"),
        (("actions", "--after", "-1"), 2, "--after"),
        (("log", "verify", "--since", "checkpoint"), 2, "--since"),
        (("launch", "--scope", "nonsense", "--", "true"), 2, "nonsense"),
        (("launch", "--name", "../etc", "--", "true"), 2, "../etc"),
        (("launch", "--name", "", "--", "true"), 0, ""),
        (("launch", "--label", "=x", "--", "true"), 2, "key=value"),
        (("launch", "--env", "STOCKADE_AGENT_ID=x", "--", "true"), 2, "STOCKADE_AGENT_ID"),
        (("launch", "--workspace", "/no/such/place", "--", "true"), 3, "/no/such/place"),
        (("launch", "--budget", "wishes=3", "--", "true"), 2, "wishes"),
        (("kill",), 2, "nobody is selected"),
        (("kill", "../../etc"), 3, "etc"),
        (("grant", "nobody"), 2, "SCOPE"),
        (("status", "--", "true"), 2, "no command"),
        (("log", "prove", "much"), 2, "SEQ"),
        (("log", "prove", "999999"), 3, "999999"),
    ],
)
def test_exit_codes_tell_what_was_wrong(stockade: Instance, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = stockade.ctl(*arguments)
    assert (done.code, done.out if code else "") == (code, "")
    assert said in done.err
    if code:
        assert done.err.startswith("stockadectl: ")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("sh", "-c", "exit 0"), 0),
        (("sh", "-c", "exit 1"), 1),
        (("sh", "-c", "exit 69"), 69),
        (("sh", "-c", "exit 255"), 255),
        (("sh", "-c", "kill -TERM $$"), 143),
        (("no-such-program",), 127),
        (("./no-such-program",), 127),
        (("/etc",), 126),
        (("/etc/passwd",), 126),
    ],
)
def test_run_has_the_agents_own_code(stockade: Instance, arguments: tuple[str, ...], code: int) -> None:
    assert stockade.ctl("run", "--", *arguments).code == code


def test_run_says_125_for_what_is_stockades(stockade: Instance) -> None:
    assert stockade.ctl("run", "--policy", "no-such", "--", "true").code == 125
    assert stockade.ctl("run", "--scope", "nonsense", "--", "true").code == 125
    assert stockade.ctl("--socket", "/nonexistent.sock", "run", "--", "true").code == 125
    assert stockade.ctl("--socket", "/nonexistent.sock", "status").code == 69


def test_a_socket_that_nobody_serves_is_no_daemon(stockade: Instance) -> None:
    path = stockade.directory / "dead.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    done = stockade.ctl("--socket", str(path), "status")
    assert done.code == 69
    assert "dead.sock" in done.err


def test_a_killed_agent_is_137_to_whoever_runs_it(stockade: Instance) -> None:
    command = [str(bin_dir() / "stockadectl"), "run", "--name", "victim", "--", "sh", "-c", "echo up; sleep 1000"]
    with subprocess.Popen(command, env=stockade.environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert stockade.ctl("kill", "victim").code == 0
        assert process.wait(20) == 137


# --- definitions and plans


def test_an_agent_from_a_file(stockade: Instance, tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "report.txt").write_text("")
    (tmp_path / "agent.yaml").write_text(DEFINITION)
    agent = stockade.launch("-f", str(tmp_path / "agent.yaml"), "--label", "shift=night")
    assert (agent["name"], agent["policy"], agent["owner"]) == ("defined", "narrow", "team-observability")
    assert agent["purpose"] == "says what it was given"
    assert agent["labels"] == {"team": "observability", "shift": "night"}
    assert agent["workspace"] == {"path": str(tmp_path / "input"), "mode": "ro"}
    stockade.wait(lambda: stockade.ctl("logs", "defined").out.count("\n") == 3)
    assert stockade.ctl("logs", "defined").out == "report.txt\nhello\n1000\n"
    assert {grant["scope"] for grant in stockade.json("grants", "defined")} == {"llm:defined-*"}
    assert agent["posture"]["limits"]["pids"] == 64


def test_a_launch_takes_the_flags_of_run(stockade: Instance) -> None:
    for flags, said in (((), "not a tty\n"), (("-t",), "/dev/pts/0\r\n")):
        agent = stockade.launch("--wait", *flags, "--", "tty")
        assert stockade.ctl("logs", agent["agent_id"]).out.replace("\r", "") == said.replace("\r", "")
    reader = stockade.launch("-i", "--name", "reader", "--", "cat")
    assert stockade.launch("--wait", "--", "cat")["exit_code"] == 0
    with (
        Stockade(f"unix:{stockade.run_dir}/control.sock") as client,
        client.agent(reader["agent_id"]).attach() as session,
    ):
        session.write(b"heard\n")
        session.close_stdin()
        assert b"".join(output.data for output in session) == b"heard\n"


def test_a_dry_run_tells_every_step_and_does_none(stockade: Instance, tmp_path: Path) -> None:
    before = (stockade.actions()[-1]["seq"], len(stockade.json("status")))
    done = stockade.ctl("run", "--dry-run", "--workspace", f"{tmp_path}:ro", "--memory", "64MiB", "--", "true")
    assert done.code == 0
    for word in ("/workspace", "seccomp", "eth0", str(64 << 20), "true"):
        assert word in done.out, word
    assert (stockade.actions()[-1]["seq"], len(stockade.json("status"))) == before
    plan = stockade.json("launch", "--dry-run", "--", "true")["plan"]
    assert len(plan) > 10


# --- selectors


def test_labels_policies_and_all_select_whom_they_say(stockade: Instance) -> None:
    flags = {
        "red": ("--label", "team=red"),
        "red-two": ("--label", "team=red", "--label", "tier=two"),
        "blue": ("--label", "team=blue"),
        "strict": ("--policy", "narrow"),
    }
    for name, given in flags.items():
        stockade.launch("--name", name, *given, "--", "sleep", "1000")

    def states() -> dict[str, str]:
        return {entry["name"]: entry["state"] for entry in stockade.json("status", *flags)}

    frozen = stockade.json("freeze", "--label", "team=red", "--label", "tier=two")
    assert [entry["name"] for entry in frozen] == ["red-two"]
    assert [name for name, state in states().items() if state == "FROZEN"] == ["red-two"]
    assert {r["name"] for r in stockade.json("kill", "--label", "team=red")} == {"red", "red-two"}
    assert {r["name"] for r in stockade.json("kill", "--policy", "narrow")} == {"strict"}
    assert states() == {"red": "KILLED", "red-two": "KILLED", "blue": "RUNNING", "strict": "KILLED"}
    assert stockade.json("kill", "--label", "team=nobody") == []
    # A name that is not there: nobody is killed, also not those that are.
    assert stockade.ctl("kill", "blue", "nobody").code == 3
    assert states()["blue"] == "RUNNING"
    assert {r["name"] for r in stockade.json("kill", "--all", "--reason", "fire drill")} == {"blue"}
    assert stockade.json("kill", "--all") == []
    kills = stockade.actions("blue", "--verb", "agent.kill")
    assert [entry["reason"] for entry in kills] == ["fire drill"]


def test_no_kill_waits_for_better_words(stockade: Instance) -> None:
    stockade.launch("--name", "wordy", "--", "sleep", "1000")
    assert stockade.ctl("freeze", "wordy", "--reason", "two\nlines").code == 0
    assert stockade.ctl("thaw", "wordy", "--reason", "two\nlines").code == 2
    receipt = stockade.json("kill", "wordy", "--reason", "runs wild\n" * 200)[0]
    assert receipt["verified_empty"]
    assert receipt["reason"].startswith("runs wild?runs wild?")
    assert (len(receipt["reason"]), receipt["reason"][-1]) == (500, "…")
    assert stockade.actions("wordy", "--verb", "agent.kill")[0]["reason"] == receipt["reason"]


def test_killing_again_answers_the_same(stockade: Instance) -> None:
    agent = stockade.launch("--name", "twice", "--", "sleep", "1000")
    first = stockade.json("kill", "twice")
    assert stockade.json("kill", "twice") == first
    assert stockade.json("kill", agent["agent_id"]) == first
    assert len([e for e in stockade.actions("twice") if e["verb"] == "agent.kill"]) == 1
    ended = stockade.launch("--wait", "--", "true")
    receipt = stockade.json("kill", ended["agent_id"])[0]
    assert (receipt["already_dead"], receipt["verified_empty"], receipt["processes_killed"]) == (True, True, 0)
    assert stockade.json("status", ended["agent_id"])[0]["state"] == "EXITED"


def test_what_has_ended_is_in_nobodys_way(stockade: Instance) -> None:
    first = stockade.launch("--name", "again", "--", "sleep", "1000")
    assert stockade.ctl("launch", "--name", "again", "--", "true").code == 5
    stockade.json("kill", "again")
    second = stockade.launch("--name", "again", "--", "sleep", "1000")
    assert second["agent_id"] != first["agent_id"]
    assert stockade.json("status", "again")[0]["agent_id"] == second["agent_id"]
    for verb in (("freeze",), ("exec",), ("grant",)):
        rest = {"exec": ("--", "true"), "grant": ("llm:*",)}.get(verb[0], ())
        assert stockade.ctl(*verb, first["agent_id"], *rest).code == 5, verb


# --- holds


@pytest.mark.parametrize(
    ("target", "held", "free"),
    [
        (("reader",), ("--name", "reader"), ("--name", "writer")),
        (("--label", "team=red"), ("--label", "team=red"), ("--label", "team=blue")),
        (("--policy", "narrow"), ("--policy", "narrow"), ("--policy", "default")),
    ],
)
def test_a_hold_holds_until_somebody_else_releases_it(
    stockade: Instance, target: tuple[str, ...], held: tuple[str, ...], free: tuple[str, ...]
) -> None:
    hold = stockade.json("hold", *target, "--reason", "under review")
    try:
        refused = stockade.ctl("launch", *held, "--", "true")
        assert refused.code == 5
        assert "under review" in refused.err
        assert stockade.ctl("launch", *free, "--", "true").code == 0
        # Whoever made it may not take it back, by whichever client.
        assert stockade.ctl("release", hold["hold_id"]).code == 4
        with Stockade(f"unix:{stockade.run_dir}/control.sock") as client, pytest.raises(NotPermitted):
            client.release(hold["hold_id"])
        assert stockade.ctl("launch", *held, "--", "true").code == 5
    finally:
        done = as_operator(stockade, "release", hold["hold_id"], "--reason", "reviewed")
    assert done == 0
    assert stockade.ctl("launch", *held, "--", "true").code == 0
    released = stockade.actions("--verb", "hold.release")[-1]
    assert released["actor"].endswith("(nobody)")
    assert released["reason"] == "reviewed"


def as_operator(stockade: Instance, *arguments: str) -> int:
    """Run stockadectl as somebody else, who is in the group of operators."""
    nobody = pwd.getpwnam("nobody")
    return subprocess.run(
        [bin_dir() / "stockadectl", *arguments], env=stockade.environment, cwd="/", check=False, timeout=60,
        user=nobody.pw_uid, group=grp.getgrnam("stockade").gr_gid, extra_groups=[],
    ).returncode  # fmt: skip


def test_a_hold_on_an_agent_by_its_id_is_one_on_its_name(stockade: Instance) -> None:
    agent = stockade.launch("--name", "byid", "--", "true")
    hold = stockade.json("hold", agent["agent_id"])
    assert (hold["kind"], hold["value"]) == ("name", "byid")
    assert stockade.ctl("launch", "--name", "byid", "--", "true").code == 5
    assert as_operator(stockade, "release", hold["hold_id"]) == 0
    assert stockade.ctl("hold", "ag_" + "a" * 26).code == 3


def test_holds_are_released_by_what_they_hold(stockade: Instance) -> None:
    for target in (("named",), ("--label", "team=green"), ("--policy", "narrow")):
        hold = stockade.json("hold", *target)
        other = stockade.json("hold", "other")
        assert stockade.ctl("release", *target).code == 4  # who made it may not, by this way either
        assert as_operator(stockade, "release", *target) == 0
        assert [each["hold_id"] for each in stockade.json("holds")] == [other["hold_id"]]
        assert stockade.ctl("release", *target).code == 3
        assert as_operator(stockade, "release", "other") == 0
        assert hold["hold_id"] in {entry["details"]["hold_id"] for entry in stockade.actions("--verb", "hold.release")}


def test_a_hold_outlives_the_daemon(stockade: Instance) -> None:
    hold = stockade.json("hold", "sleeper", "--reason", "durable")
    stockade.down()
    stockade.up()
    assert stockade.ctl("launch", "--name", "sleeper", "--", "true").code == 5
    assert hold["hold_id"] in {entry["hold_id"] for entry in json.loads(stockade.ctl("-o", "json", "holds").out)}
    assert as_operator(stockade, "release", hold["hold_id"]) == 0
    assert stockade.ctl("launch", "--name", "sleeper", "--", "true").code == 0
