"""Every verb against a scripted API: what is sent, what is printed, which exit code."""

from __future__ import annotations

import json
import os
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from supervisord.ctl.command import run
from supervisord.ctl.verbs import VERBS
from tests.support.scripted_api import AGENT_ID, HOSTILE, Api

if TYPE_CHECKING:
    from pathlib import Path

# A test that only needs the API to be there takes it as an argument all the same: its socket is in the environment.
# ruff: noqa: ARG001

HELD = "stockadectl: cannot launch held: a hold forbids it\nsee holds\n"
MISSING = "stockadectl: cannot exec missing: No such file or directory\ncheck the command\n"

Captured = pytest.CaptureFixture[str]


def answer(capsys: Captured, *argv: str, code: int = 0) -> Any:
    """The one JSON document that the command prints."""
    assert run([*argv[:1], "-o", "json", *argv[1:]]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_launch_sends_what_was_written(
    api: Api, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FROM_HERE", "here")
    words = (
        "--name n --policy p --workspace sub:rw --scope llm:* --scope fs:ro:/x --label a=b --memory 512MiB --cpus 1.5"
    )
    more = "--pids 64 --budget tokens=2000 --env K=V=W --env FROM_HERE --owner o --purpose q"
    document = answer(capsys, "launch", *words.split(), *more.split(), "--", "sh", "-c", "--", "\udcff")
    assert {"agent_id", "name", "state", "posture"} <= document.keys()
    assert (document["agent_id"], document["state"]) == (AGENT_ID, "RUNNING")
    spec = api.agents.launches[0].spec
    assert list(spec.command) == [b"sh", b"-c", b"--", b"\xff"]
    assert (spec.name, spec.policy, spec.owner, spec.purpose) == ("n", "p", "o", "q")
    assert (spec.workspace.path, spec.workspace.mode) == (str(tmp_path / "sub"), 2)
    assert list(spec.scopes) == ["llm:*", "fs:ro:/x"]
    assert (dict(spec.labels), dict(spec.env)) == ({"a": "b"}, {"K": "V=W", "FROM_HERE": "here"})
    assert (spec.limits.memory_bytes, spec.limits.cpus, spec.limits.pids) == (512 << 20, 1.5, 64)
    assert dict(spec.budget) == {"tokens": 2000.0}
    assert not spec.stdin
    assert not spec.HasField("tty")


def test_what_is_not_written_is_not_sent(api: Api, capsys: Captured) -> None:
    assert run(["launch", "--", "true"]) == 0
    assert capsys.readouterr().out == AGENT_ID + "\n"
    spec = api.agents.launches[0].spec
    assert not spec.HasField("limits")
    assert not spec.HasField("workspace")
    assert spec.policy == ""


def test_a_workspace_is_read_only_unless_said_otherwise(api: Api) -> None:
    assert [run(["launch", "--workspace", way, "--", "true"]) for way in ("/w", "/w:ro", "/w:rw")] == [0, 0, 0]
    assert [request.spec.workspace.mode for request in api.agents.launches] == [1, 1, 2]
    assert {request.spec.workspace.path for request in api.agents.launches} == {"/w"}


def test_launch_of_a_file_sends_its_text_and_where_it_lies(api: Api, tmp_path: Path) -> None:
    (tmp_path / "agent.yaml").write_bytes(b"kind: Agent\n")
    assert run(["launch", "-f", str(tmp_path / "agent.yaml"), "--name", "other"]) == 0
    request = api.agents.launches[0]
    assert request.definition_yaml == b"kind: Agent\n"
    assert request.definition_directory == str(tmp_path)
    assert request.spec.name == "other"


def test_dry_run_prints_the_plan(api: Api, capsys: Captured) -> None:
    assert run(["run", "--dry-run", "--", "true"]) == 0
    assert capsys.readouterr().out.splitlines() == ["bind fd 0 at /workspace", "exec true"]
    assert api.agents.launches[0].dry_run


def test_status_has_the_keys_of_the_contract_and_all_pages(api: Api, capsys: Captured) -> None:
    found = answer(capsys, "status")
    assert [item["state"] for item in found] == ["RUNNING", "EXITED"]
    assert {"agent_id", "name", "state", "policy", "exit_code", "started_at", "memory_bytes", "pids"} <= found[0].keys()
    assert found[0]["started_at"] == "2023-11-14T22:13:20.000000Z"
    assert (found[0]["exit_code"], found[1]["exit_code"]) == (None, 3)
    assert (found[0]["memory_bytes"], found[0]["pids"]) == (13 << 20, 3)
    assert found[1]["name"] == HOSTILE
    assert len(answer(capsys, "ps", "--live")) == 1


def test_what_agents_chose_drives_no_terminal(api: Api, capsys: Captured) -> None:
    assert run(["status"]) == 0
    assert run(["actions"]) == 0
    assert run(["-o", "json", "actions"]) == 0
    assert run(["inspect", "reader"]) == 0
    out = capsys.readouterr().out
    assert set(out) <= {chr(point) for point in range(32, 127)} | {"\n", "…"}
    assert "\\x1b]0;title\\x07\\u202egnp.exe\\x0aSECOND LINE" in out


def test_kill_prints_receipts(api: Api, capsys: Captured) -> None:
    receipts = answer(capsys, "kill", "reader", "--reason", "enough")
    keys = {"receipt_id", "agent_id", "verified_empty", "processes_killed", "egress_cut_ms", "dead_ms"}
    assert keys <= receipts[0].keys()
    assert receipts[0]["verified_empty"] is True
    assert receipts[0]["processes_killed"] == 51
    assert list(api.agents.selectors[0].agents) == ["reader"]


def test_a_kill_that_left_something_is_a_failure(api: Api, capsys: Captured) -> None:
    assert run(["kill", "--all", "--reason", "stuck"]) == 1
    assert api.agents.selectors[0].all
    assert "4711" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["kill", "freeze", "thaw"])
def test_nobody_is_not_everybody(api: Api, capsys: Captured, verb: str) -> None:
    assert run([verb]) == 2
    assert "nobody is selected" in capsys.readouterr().err
    assert api.agents.selectors == []


def test_selectors_and_freeze(api: Api, capsys: Captured) -> None:
    found = answer(capsys, "freeze", "--label", "team=a", "--label", "x=y", "--policy", "p")
    assert found[0]["state"] == "FROZEN"
    assert dict(api.agents.selectors[0].labels) == {"team": "a", "x": "y"}
    assert api.agents.selectors[0].policy == "p"


def test_grant_has_the_keys_of_the_contract(api: Api, capsys: Captured) -> None:
    made = answer(capsys, "grant", "reader", "http:GET:https://x/**", "--ttl", "1h30m", "--max-uses", "3")
    assert {"grant_id", "agent_id", "scope", "expires_at", "uses_left"} <= made.keys()
    assert (made["scope"], made["uses_left"]) == ("http:GET:https://x/**", 3)
    assert made["expires_at"] == "2023-11-14T23:43:20.000000Z"
    assert api.grants.requests[0].ttl.seconds == 5400
    unlimited = answer(capsys, "grant", "reader", "llm:*")
    assert (unlimited["expires_at"], unlimited["uses_left"]) == (None, None)
    assert not api.grants.requests[1].HasField("ttl")


def test_actions_are_lines(api: Api, capsys: Captured) -> None:
    assert run(["actions", "reader", "-o", "json", "--verb", "egress.", "--since", "10m"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["seq"] for line in lines] == [1, 2]
    assert list(lines[0]) == ["seq", "time", "agent_id", "actor", "verb", "object", "verdict", "reason", "details"]
    assert lines[0]["time"] == "2023-11-14T22:13:20.123456Z"
    assert lines[0]["details"] == {"scope": "http:GET:x"}
    assert (api.actions.queries[0].agent, api.actions.queries[0].verb) == ("reader", "egress.")
    assert api.actions.queries[0].HasField("since")


def test_following_goes_on_where_the_list_ended(api: Api, capsys: Captured) -> None:
    assert run(["actions", "-f", "-o", "json"]) == 0
    assert [json.loads(line)["seq"] for line in capsys.readouterr().out.splitlines()] == [1, 2, 3]
    assert api.actions.tails[0].after_seq == 2


def test_verify_fails_where_the_log_is_not_good(api: Api, capsys: Captured) -> None:
    good = {"ok": True, "size": 20, "root": "A" * 43 + "=", "problem": ""}
    assert answer(capsys, "log", "verify") == good
    type(api.actions).good = False
    try:
        assert answer(capsys, "log", "verify", code=1)["problem"].startswith("entry 17")
        assert run(["log", "verify"]) == 1
        assert "entry 17 in segment 3" in capsys.readouterr().err
    finally:
        type(api.actions).good = True


def test_checkpoint_is_printed_as_it_is(api: Api, capsys: Captured) -> None:
    assert run(["log", "checkpoint"]) == 0
    assert capsys.readouterr().out == "stockade/default\n20\nAAAA\n\n— stockade Zm9v\n"


def test_policy_check_names_the_line(api: Api, capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("kind: Policy\nlimits:\n    memroy: 1GiB\n")
    (tmp_path / "good.yaml").write_text("kind: Policy\n")
    assert run(["policy", "check", str(tmp_path / "good.yaml")]) == 0
    assert run(["policy", "check", str(tmp_path / "bad.yaml")]) == 1
    assert f"{tmp_path}/bad.yaml:3:5: limits.memroy: unknown key\n  memory?\n" in capsys.readouterr().err
    assert run(["policy", "check", str(tmp_path / "none.yaml")]) == 2


def test_wait_prints_the_code_and_knows_its_time(api: Api, capsys: Captured) -> None:
    assert run(["wait", "reader"]) == 0
    assert capsys.readouterr().out == "7\n"
    assert run(["wait", "reader", "--timeout", "1s"]) == 1
    assert "still RUNNING" in capsys.readouterr().err


def test_doctor_fails_where_something_required_is_missing(api: Api, capsys: Captured) -> None:
    found = answer(capsys, "doctor", code=1)
    assert found["findings"][0]["control"] == "seccomp"
    assert found["components"] == [{"name": "gateway", "ready": False, "detail": "breaker open: Connection refused"}]


def test_hold(api: Api, capsys: Captured) -> None:
    made = answer(capsys, "hold", "--label", "team=a", "--reason", "r")
    assert (made["hold_id"], made["kind"], made["value"]) == ("ho_1", "label", "team=a")
    assert run(["hold"]) == 2


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["inspect", "nobody"], 3, "stockadectl: cannot find nobody: no such agent\nsee status\n"),
        (["kill", "mine-not"], 4, "stockadectl: cannot kill mine-not: not yours\nask root\n"),
        (
            ["launch", "--name", "held", "--", "true"],
            5,
            HELD,
        ),
        (
            ["launch", "--", "missing"],
            1,
            MISSING,
        ),
        (
            ["run", "--", "missing"],
            127,
            MISSING,
        ),
        (["run", "--", "noexec"], 126, "stockadectl: cannot exec noexec: denied\n"),
        (
            ["run", "--name", "held", "--", "true"],
            125,
            HELD,
        ),
        (["grant", "reader", "nonsense"], 2, "stockadectl: cannot read scope 'nonsense': no kind\nwrite llm:*\n"),
        (["thaw", "reader"], 1, "this daemon does not know the call"),
    ],
)
def test_failures(api: Api, capsys: Captured, argv: list[str], code: int, said: str) -> None:
    assert run(argv) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["fly"],
        ["run"],
        ["launch"],
        ["run", "--memory", "12", "--", "x"],
        ["run", "--memory", "1XB", "--", "x"],
        ["run", "--label", "x", "--", "x"],
        ["run", "--budget", "tokens=many", "--", "x"],
        ["run", "--env", "NOT_SET_ANYWHERE", "--", "x"],
        ["run", "--workspace", ":ro", "--", "x"],
        ["grant", "reader"],
        ["grant", "reader", "llm:*", "--ttl", "soon"],
        ["actions", "--since", "yesterday"],
        ["status", "--", "x"],
        ["log", "burn"],
        ["log", "prove", "x"],
        ["policy", "show"],
        ["requests", "approve"],
        ["-o", "xml", "status"],
        ["run", "true"],
        ["run", "--pids", "-3", "--", "x"],
        ["run", "--cpus", "nan", "--", "x"],
        ["run", "--memory", "999999999999999TiB", "--", "x"],
        ["run", "--budget", "tokens=inf", "--", "x"],
        ["grant", "reader", "llm:*", "--max-uses", "-1"],
        ["grant", "reader", "llm:*", "--max-uses", "9" * 30],
        ["grant", "reader", "llm:*", "--max-cost", "nan"],
        ["grant", "reader", "llm:*", "--ttl", "999999999d999999999d"],
        ["actions", "--after", "-1"],
        ["actions", "--since", "999999999d"],
        ["actions", "--since", "9999-12-31T23:59:59-23:00"],
        ["log", "prove", "--from", "-1"],
        ["log", "verify", "--since", "checkpoint"],
        ["log", "verify", "--public-key", "key"],
        ["log"],
        ["policy"],
    ],
)
def test_wrong_command_lines_say_so_and_do_nothing(api: Api, capsys: Captured, argv: list[str]) -> None:
    assert run(argv) == 2
    said = capsys.readouterr()
    assert said.err.startswith("stockadectl: ")
    assert "--help`" in said.err.splitlines()[1]
    assert said.out == ""
    assert api.agents.launches == []


def test_a_command_without_its_dashes_is_told_where_it_goes(api: Api, capsys: Captured) -> None:
    assert run(["run", "true"]) == 2
    assert "'true'; the command goes after --" in capsys.readouterr().err
    assert run(["status", "--bogus"]) == 2
    assert "after --\n" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["inspect", "\udcff"],
        ["kill", "\udcff"],
        ["launch", "--name", "\udcff", "--", "true"],
        ["grant", "\udcff", "llm:*"],
        ["actions", "\udcff"],
        ["exec", "\udcff", "--", "true"],
        ["freeze", "--label", "a=\udcff"],
        ["policy", "explain", "reader", "llm:\udcff"],
    ],
)
def test_a_word_that_is_no_text_is_said_to_be_none(api: Api, capsys: Captured, argv: list[str]) -> None:
    assert run(argv) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.startswith("stockadectl: cannot ")) == ("", True)
    assert "Traceback" not in said.err


def test_nobody_lives_on_for_a_word_in_the_reason(api: Api) -> None:
    assert run(["kill", "reader", "--reason", "it went \udcff"]) == 0
    assert api.agents.killed.is_set()


def test_a_socket_may_be_written_as_clients_have_it(
    api: Api, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["--socket", f"unix:{api.socket}", "status"]) == 0
    monkeypatch.setenv("STOCKADE_SOCKET", f"unix:{api.socket}")
    assert run(["status"]) == 0
    monkeypatch.setenv("STOCKADE_SOCKET", "")  # as if it were not set
    assert run(["status"]) == 69
    assert "/run/stockade/control.sock" in capsys.readouterr().err


def test_no_table_stands_above_an_error(api: Api, capsys: Captured) -> None:
    assert run(["actions", "nobody"]) == 3
    assert capsys.readouterr().out == ""
    assert run(["actions", "reader"]) == 0
    assert capsys.readouterr().out.startswith("SEQ ")


def test_no_daemon(tmp_path: Path, capsys: Captured) -> None:
    assert run(["--socket", str(tmp_path / "none.sock"), "status"]) == 69
    assert "No such file" in capsys.readouterr().err
    assert run(["run", "--socket", str(tmp_path / "none.sock"), "--", "true"]) == 125
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    assert run(["--socket", str(tmp_path / "dead.sock"), "status"]) == 69


def test_a_door_that_closes_at_once_is_a_matter_of_permission(tmp_path: Path, capsys: Captured) -> None:
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "door.sock"))
        door.listen()
        door.settimeout(20)

        def close_all() -> None:
            while True:
                try:
                    door.accept()[0].close()
                except OSError:
                    return

        closer = threading.Thread(target=close_all, daemon=True)
        closer.start()
        code = run(["--socket", str(tmp_path / "door.sock"), "status"])
        door.shutdown(socket.SHUT_RDWR)
        closer.join(5)
    assert code == 4
    assert "does not serve this user" in capsys.readouterr().err


def test_every_verb_has_help(capsys: Captured) -> None:
    assert run(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in VERBS:
        assert f"\n  {name} " in listed
        assert run([name, "--help"]) == 0
        assert "usage: stockadectl " in capsys.readouterr().out


def test_version_says_its_own_even_without_a_daemon(api: Api, capsys: Captured, tmp_path: Path) -> None:
    assert answer(capsys, "version")["daemon"]["instance"] == "test"
    none = str(tmp_path / "none.sock")
    assert run(["--socket", none, "--version"]) == 0
    assert capsys.readouterr().out.startswith("stockadectl ")
    assert run(["--socket", none, "version"]) == 69
    assert capsys.readouterr().out.startswith("stockadectl ")
    assert answer(capsys, "version", "--socket", none, code=69)["daemon"] is None
    assert os.environ["STOCKADE_SOCKET"] == str(api.socket)
