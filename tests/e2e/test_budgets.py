"""Budgets stop agents: a notice near the end, then what the policy says; times too; and labels share one budget."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

POLICY = """
kind: Policy
name: {name}
version: 1
risk: limited
user: agent
rootfs: host
limits: {{memory: 256MiB, cpus: 1, pids: 64, disk: 64MiB, open_files: 1024, output: 1MiB}}
budget: {budget}
scopes: ["llm:scripted*"]
on_supervisor_loss: contain
"""
BUDGETS = {
    "denies": "{requests: 10}",
    "freezes": "{requests: 10, on_exhausted: freeze}",
    "kills": "{requests: 10, on_exhausted: kill}",
    "short": "{wall_clock: 4s, on_exhausted: kill}",
    "busy": "{cpu_seconds: 1s, on_exhausted: kill}",
    "silenced": "{wall_clock: 1s}",
    "team": "{}",
}
TEAM = """
[[budgets]]
label = "team=payments"
requests = 20
period = "month"

[[budgets]]
label = "team=research"
llm_tokens = 300
"""
A_POLL_SECONDS = 1.5
"""In which the daemon looks at every budget once."""
CALLS = """
import http.client, json, sys, time
from concurrent.futures import ThreadPoolExecutor
body = json.dumps({"model": "scripted", "max_tokens": 20, "messages": [{"role": "user", "content": "@say hello"}]})
def call(_):
    try:
        line = http.client.HTTPConnection("gateway.internal", 3128, timeout=60)
        line.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = line.getresponse()
        answer.read()
        return answer.status
    except OSError:
        return 0
many, width = int(sys.argv[1]), int(sys.argv[2])
with ThreadPoolExecutor(width) as pool:
    for status in pool.map(call, range(many)):
        print(status, flush=True)
print("made", flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    policies = {f"{name}.yaml": POLICY.format(name=name, budget=budget) for name, budget in BUDGETS.items()}
    with Instance.start(TEAM, policies=policies) as instance:
        yield instance


@pytest.fixture(scope="module")
def workspace(stockade: Instance) -> Path:
    return stockade.workspace(calls__py=CALLS)


@pytest.fixture(autouse=True)
def nobody_left(stockade: Instance) -> Iterator[None]:
    yield
    stockade.ctl("kill", "--all")


def calls(
    stockade: Instance, workspace: Path, name: str, many: int, *flags: str, policy: str = "", width: int = 1
) -> None:
    command = ("--", "python3", "/workspace/calls.py", str(many), str(width))
    stockade.launch("--name", name, "--policy", policy or name, "--workspace", f"{workspace}:ro", *flags, *command)


def said(stockade: Instance, name: str) -> list[str]:
    return stockade.ctl("logs", name).out.split("\n")[:-1]


def state(stockade: Instance, name: str) -> str:
    return str(stockade.json("inspect", name)["state"])


def notices(stockade: Instance, name: str) -> list[Any]:
    return stockade.actions(name, "--verb", "agent.budget", "--verdict", "notice")


def by_daemon(stockade: Instance, name: str, verb: str) -> list[Any]:
    found = stockade.actions(name, "--verb", verb)
    return [action for action in found if action["actor"] == "daemon" and action["verdict"] == "done"]


def test_at_the_end_calls_are_refused_and_the_agent_runs_on(stockade: Instance, workspace: Path) -> None:
    calls(stockade, workspace, "denies", 12)
    stockade.wait(lambda: said(stockade, "denies")[-1:] == ["made"])
    assert said(stockade, "denies") == ["200"] * 10 + ["429"] * 2 + ["made"]
    assert state(stockade, "denies") == "RUNNING"
    (notice,) = notices(stockade, "denies")
    assert notice["actor"] == "daemon"
    assert notice["object"] == "requests"
    assert notice["details"] == {"bound": "requests", "spent": 8, "limit": 10}


def test_at_the_end_the_agent_is_frozen_once(stockade: Instance, workspace: Path) -> None:
    calls(stockade, workspace, "freezes", 12)
    stockade.wait(lambda: state(stockade, "freezes") == "FROZEN")
    assert state(stockade, "freezes") == "FROZEN"
    (done,) = by_daemon(stockade, "freezes", "agent.freeze")
    assert done["reason"] == "budget requests: 10 of 10 spent"
    # Whoever thaws it again has decided that it may go on, though not to spend: also over a restart.
    stockade.ctl("thaw", "freezes")
    stockade.down(signal.SIGKILL)
    stockade.up()
    stockade.wait(lambda: said(stockade, "freezes")[-1:] == ["made"])
    stockade.wait(lambda: state(stockade, "freezes") != "RUNNING", A_POLL_SECONDS)
    assert state(stockade, "freezes") == "RUNNING"
    assert said(stockade, "freezes").count("200") <= 10
    assert len(by_daemon(stockade, "freezes", "agent.freeze")) == 1
    assert len(notices(stockade, "freezes")) == 1


def test_below_the_end_nothing_is_said_or_done(stockade: Instance, workspace: Path) -> None:
    calls(stockade, workspace, "frugal", 7, policy="kills")
    stockade.wait(lambda: said(stockade, "frugal")[-1:] == ["made"])
    stockade.wait(lambda: state(stockade, "frugal") != "RUNNING", A_POLL_SECONDS)
    assert state(stockade, "frugal") == "RUNNING"
    assert notices(stockade, "frugal") == []


def test_at_the_end_the_agent_is_killed(stockade: Instance, workspace: Path) -> None:
    calls(stockade, workspace, "kills", 100)
    stockade.wait(lambda: state(stockade, "kills") == "KILLED")
    assert state(stockade, "kills") == "KILLED"
    stockade.wait(lambda: by_daemon(stockade, "kills", "agent.kill"))
    (done,) = by_daemon(stockade, "kills", "agent.kill")
    assert done["reason"] == "budget requests: 10 of 10 spent"
    assert done["details"]["verified_empty"] is True
    assert len(notices(stockade, "kills")) == 1


def test_wall_clock_time_ends_an_agent_also_while_no_daemon_counts(stockade: Instance) -> None:
    began = time.monotonic()
    stockade.launch("--name", "short", "--policy", "short", "--", "sleep", "1000")
    stockade.down(signal.SIGKILL)
    stockade.up()
    stockade.launch("--name", "long", "--policy", "short", "--budget", "wall_clock=1000s", "--", "sleep", "1000")
    stockade.launch("--name", "free", "--policy", "kills", "--budget", "wall_clock=1h", "--", "sleep", "1000")
    stockade.wait(lambda: state(stockade, "short") == "KILLED")
    assert state(stockade, "short") == "KILLED"
    assert time.monotonic() - began >= 4
    stockade.wait(lambda: by_daemon(stockade, "short", "agent.kill"))
    (done,) = by_daemon(stockade, "short", "agent.kill")
    assert done["reason"].startswith("budget wall_clock: ")
    # A launch can shorten what a policy says, and not lengthen it.
    stockade.wait(lambda: state(stockade, "long") == "KILLED")
    assert state(stockade, "long") == "KILLED"
    assert state(stockade, "free") == "RUNNING"


def test_cpu_time_ends_an_agent_and_idleness_costs_none(stockade: Instance) -> None:
    stockade.launch("--name", "idle", "--policy", "busy", "--", "sleep", "1000")
    stockade.launch("--name", "busy", "--policy", "busy", "--", "sh", "-c", "while :; do :; done")
    stockade.wait(lambda: state(stockade, "busy") == "KILLED")
    assert state(stockade, "busy") == "KILLED"
    stockade.wait(lambda: by_daemon(stockade, "busy", "agent.kill"))
    (done,) = by_daemon(stockade, "busy", "agent.kill")
    assert done["reason"].startswith("budget cpu_seconds: ")
    assert state(stockade, "idle") == "RUNNING"


def test_time_that_is_up_lets_nothing_out_any_more(stockade: Instance, workspace: Path) -> None:
    calls(stockade, workspace, "silenced", 20_000)
    stockade.wait(lambda: "429" in said(stockade, "silenced"))
    assert "429" in said(stockade, "silenced")
    assert state(stockade, "silenced") == "RUNNING"


def test_agents_of_one_label_spend_one_budget_at_the_same_time(stockade: Instance, workspace: Path) -> None:
    names = ("one", "two")
    for name in names:
        calls(stockade, workspace, name, 30, "--label", "team=payments", policy="team", width=15)
    calls(stockade, workspace, "other", 30, "--label", "team=search", policy="team", width=15)
    for name in (*names, "other"):
        stockade.wait(lambda name=name: said(stockade, name)[-1:] == ["made"], 30)  # type: ignore[misc]
    assert sum(said(stockade, name).count("200") for name in names) == 20
    assert sum(said(stockade, name).count("429") for name in names) == 40
    assert said(stockade, "other").count("200") == 30
    told = [action for action in stockade.actions("--verb", "agent.budget") if "label" in action["details"]]
    assert [action["details"]["label"] for action in told] == ["team=payments"]
    (shared,) = [use for use in stockade.json("budgets") if use["label"] == "team=payments"]
    assert shared == {**shared, "label": "team=payments", "bound": "requests", "spent": 20, "limit": 20, "reserved": 0}
    assert "100% requests of team=payments" in stockade.ctl("status", "--wide", "one").out
    assert "team=payments" not in stockade.ctl("status", "--wide", "other").out
    # The label has spent it, not the agents: it stays so when they end, and over a restart.
    stockade.ctl("kill", "--all")
    stockade.down(signal.SIGKILL)
    stockade.up()
    calls(stockade, workspace, "three", 1, "--label", "team=payments", policy="team")
    stockade.wait(lambda: said(stockade, "three")[-1:] == ["made"])
    assert said(stockade, "three") == ["429", "made"]


def test_tokens_of_a_label_are_set_aside_before_and_never_overspent(stockade: Instance, workspace: Path) -> None:
    names = ("four", "five")
    for name in names:
        calls(stockade, workspace, name, 60, "--label", "team=research", policy="team", width=10)
    for name in names:
        stockade.wait(lambda name=name: said(stockade, name)[-1:] == ["made"], 30)  # type: ignore[misc]
    (shared,) = [use for use in stockade.json("budgets") if use["label"] == "team=research"]
    spends = [stockade.json("inspect", name)["spend"] for name in names]
    assert shared["spent"] == sum(spend["input_tokens"] + spend["output_tokens"] for spend in spends)
    # No answer is longer than what was set aside for it.
    assert 0 < shared["spent"] <= shared["limit"] == 300
    assert shared["reserved"] == 0
    assert all({"200", "429"} & set(said(stockade, name)) for name in names)
    assert any("429" in said(stockade, name) for name in names)


def test_what_is_spent_is_shown(stockade: Instance, workspace: Path) -> None:
    calls(stockade, workspace, "shown", 5, policy="denies")
    stockade.launch("--name", "quiet", "--policy", "team", "--", "sleep", "1000")
    stockade.wait(lambda: said(stockade, "shown")[-1:] == ["made"])
    info = stockade.json("inspect", "shown")
    (use,) = info["budget"]
    assert use == {"bound": "requests", "spent": 5, "limit": 10, "reserved": 0, "label": "", "since": ""}
    assert info["cpu_seconds"] > 0
    tokens = info["spend"]["input_tokens"] + info["spend"]["output_tokens"]
    assert tokens > 0
    for verb in (("status", "--wide", "--live"), ("top",), ("top", "-n", "2", "-d", "100ms")):
        head, *rows = stockade.ctl(*verb).out.splitlines()
        assert {"NAME", "STATE", "CPU", "MEMORY", "TOKENS", "COST", "BUDGET"} <= set(head.split())
        row = next(row for row in rows if row.startswith("shown "))
        assert f" {tokens} " in row
        assert row.endswith("50% requests")
        assert next(row for row in rows if row.startswith("quiet ")).endswith("-")
    (told, _) = sorted(stockade.json("top"), key=lambda each: str(each["name"]), reverse=True)
    assert told["budget"] == info["budget"]
