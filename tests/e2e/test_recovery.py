"""The daemon, the launcher or a worker dies: agents stay confined, nothing unlogged leaves, all is known afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from stockade.client import Stockade

from supervisord.egress_plane import CUT_SECONDS_MAX
from tests.support.census import (
    CGROUPS,
    GONE,
    IDS_PER_AGENT,
    SLOTS,
    cgroups_of,
    children,
    launcher_pid,
    of_agent,
    settled,
    started,
    text,
)
from tests.support.instance import Instance
from tests.support.site import Site

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

NAME = "status.example"
SCOPE = f"http:GET:http://{NAME}/**"
FETCH = "curl -sS -m 10 -o /dev/null -w '%{http_code}\\n' http://" + NAME
TRIED = "cannot be started again yet"
UNTIL_GO = "while [ ! -e /workspace/go ]; do sleep 0.05; done"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


@pytest.fixture(scope="module")
def stockade(site: Site) -> Iterator[Instance]:
    hosts = f'[gateway]\nkind = "embedded"\n[gateway.hosts]\n"{NAME}" = "127.0.0.1:{site.port}"\n'
    with Instance.start(hosts) as instance:
        yield instance


@pytest.fixture(autouse=True)
def nobody_left(stockade: Instance) -> Iterator[None]:
    yield
    if stockade.process is None:
        stockade.up()
    stockade.ctl("kill", "--all")


def output(stockade: Instance, agent: dict[str, Any]) -> str:
    """What an agent wrote, by the file: no daemon is needed to see it."""
    return text(stockade.run_dir / "agents" / agent["agent_id"] / "stdout.log")


def confinement(agent: dict[str, Any]) -> dict[int, tuple[str, ...]]:
    """The facts of each process of the agent that make it confined."""
    facts = {}
    for pid in of_agent(agent):
        status = text(Path(f"/proc/{pid}/status"))
        kept = [line for line in status.splitlines() if line.startswith(("Seccomp:", "NoNewPrivs:", "CapEff:", "Uid:"))]
        try:
            spaces = [str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for kind in ("net", "mnt", "pid", "user", "ipc")]
        except FileNotFoundError:
            continue  # one of those that come and go
        facts[pid] = (*kept, *spaces, *map(str, cgroups_of(pid)))
    return facts


@dataclass
class Before:
    """What there is when the daemon goes."""

    lives: dict[str, Any]
    ends: dict[str, Any]
    asleep: dict[str, Any]
    timed: dict[str, Any]
    counted: dict[str, Any]
    gone: dict[str, Any]
    workspace: Path
    log_size: int
    daemon: int


def prepared(stockade: Instance) -> Before:
    """One agent that calls out again and again, one that will end, a frozen one, and grants of each kind."""
    workspace = stockade.workspace()
    calls = f"while :; do {FETCH}/tick; sleep 0.1; done"
    lives = stockade.launch("--name", "lives", "--label", "a=b", "--", "sh", "-c", calls)
    until = f"{UNTIL_GO}; echo last words; exit 9"
    ends = stockade.launch("--name", "ends", "--workspace", f"{workspace}:rw", "--", "sh", "-c", until)
    asleep = stockade.launch("--name", "asleep", "--", "sh", "-c", "while :; do echo tick; sleep 0.05; done")
    stockade.json("freeze", "asleep")
    timed = stockade.json("grant", "lives", f"http:GET:http://{NAME}/tick", "--ttl", "10m")
    counted = stockade.json("grant", "lives", f"http:GET:http://{NAME}/once", "--max-uses", "2")
    assert stockade.ctl("exec", "lives", "--", "sh", "-c", f"{FETCH}/once").out == "200\n"
    gone = stockade.json("grant", "lives", "llm:taken-back")
    stockade.json("revoke", gone["grant_id"])
    stockade.wait(lambda: "200" in output(stockade, lives))
    size = int(stockade.json("log", "verify")["size"])
    assert stockade.process is not None
    return Before(lives, ends, asleep, timed, counted, gone, workspace, size, stockade.process.pid)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_agents_outlive_the_daemon_and_are_taken_up_again(
    stockade: Instance, site: Site, number: signal.Signals
) -> None:
    before = prepared(stockade)
    lives, ends, asleep = before.lives, before.ends, before.asleep
    confined = confinement(lives)

    stockade.down(number)

    # Confined as before, and cut off: every new request is answered with 503, and nothing arrives.
    assert len(confinement(lives).keys() & confined.keys()) >= 2
    assert all(confinement(lives).get(pid, facts) == facts for pid, facts in confined.items())
    stockade.wait(lambda: "503" in output(stockade, lives))
    seen, length = len(site.seen), len(output(stockade, lives))
    stockade.wait(lambda: output(stockade, lives)[length:].count("\n") > 2)
    assert set(output(stockade, lives)[length:].split()) == {"503"}
    assert len(site.seen) == seen
    (before.workspace / "go").touch()
    stockade.wait(lambda: not of_agent(ends), 20)
    assert of_agent(ends) == []

    stockade.up()

    status = {entry["agent_id"]: entry for entry in stockade.json("status")}
    assert status[lives["agent_id"]]["state"] == "RUNNING"
    assert status[lives["agent_id"]]["started_at"] == lives["started_at"]
    assert (status[ends["agent_id"]]["state"], status[ends["agent_id"]]["exit_code"]) == ("EXITED", 9)
    assert stockade.ctl("logs", "ends").out == "last words\n"
    assert stockade.json("inspect", "lives")["posture"] == lives["posture"]
    check_grants(stockade, before)
    length = len(output(stockade, lives))
    stockade.wait(lambda: "200" in output(stockade, lives)[length:])
    assert len(site.seen) > seen
    # The frozen one is still frozen, and can go on.
    assert status[asleep["agent_id"]]["state"] == "FROZEN"
    ticks = output(stockade, asleep)
    assert output(stockade, asleep) == ticks
    stockade.json("thaw", "asleep")
    stockade.wait(lambda: output(stockade, asleep) != ticks)
    assert output(stockade, asleep) != ticks
    assert stockade.ctl("launch", "--name", "lives", "--", "true").code == 5
    assert {r["name"] for r in stockade.json("kill", "--label", "a=b")} == {"lives"}
    assert stockade.json("kill", "asleep")[0]["verified_empty"] is True
    assert of_agent(lives) == []
    check_log(stockade, before, number)


def check_grants(stockade: Instance, before: Before) -> None:
    grants = {grant["grant_id"]: grant for grant in stockade.json("grants", "lives")}
    ends = datetime.fromisoformat(grants[before.timed["grant_id"]]["expires_at"])
    assert abs(ends - datetime.fromisoformat(before.timed["expires_at"])) < timedelta(seconds=1)
    assert grants[before.counted["grant_id"]]["uses_left"] == 1
    assert before.gone["grant_id"] not in grants
    codes = [stockade.ctl("exec", "lives", "--", "sh", "-c", f"{FETCH}/once").out for _ in range(2)]
    assert codes == ["200\n", "403\n"]


def check_log(stockade: Instance, before: Before, number: signal.Signals) -> None:
    assert stockade.json("log", "verify")["ok"] is True
    entries = stockade.actions("--after", str(before.log_size))
    recovered = [entry["details"] for entry in entries if entry["verb"] == "daemon.recover"]
    assert [set(details["adopted"]) for details in recovered] == [{before.lives["agent_id"], before.asleep["agent_id"]}]
    assert recovered[0]["ended"] == [before.ends["agent_id"]]
    exits = [e for e in entries if e["verb"] == "agent.exit" and e["agent_id"] == before.ends["agent_id"]]
    assert [(entry["verdict"], entry["details"]["code"]) for entry in exits] == [("done", 9)]
    stops = [entry for entry in entries if entry["verb"] == "daemon.stop"]
    crashes = [entry["details"]["pid"] for entry in entries if entry["verb"] == "daemon.crash"]
    assert (len(stops), crashes) == ((1, []) if number is signal.SIGTERM else (0, [before.daemon]))


def test_a_name_that_was_used_before_is_the_live_ones_after_a_restart(stockade: Instance) -> None:
    for _ in range(2):
        stockade.launch("--wait", "--name", "reused", "--", "true")
    live = stockade.launch("--name", "reused", "--", "sleep", "1000")
    stockade.down(signal.SIGKILL)
    stockade.up()
    assert stockade.json("status", "reused")[0]["agent_id"] == live["agent_id"]
    stockade.json("kill", "reused")
    last = stockade.launch("--wait", "--name", "reused", "--", "sh", "-c", "exit 4")
    stockade.down(signal.SIGKILL)
    stockade.up()
    # Of those that have ended, the last one has the name.
    assert stockade.json("status", "reused")[0]["agent_id"] == last["agent_id"]
    assert stockade.json("status", live["agent_id"])[0]["state"] == "KILLED"


def test_a_grant_that_ran_out_meanwhile_is_not_given_again(stockade: Instance, site: Site) -> None:
    stockade.launch("--name", "late", "--", "sleep", "1000")
    grant = stockade.json("grant", "late", SCOPE, "--ttl", "1s")
    stockade.down(signal.SIGKILL)
    stockade.wait(lambda: grant["expires_at"] < now())
    site.seen.clear()
    stockade.up()
    assert grant["grant_id"] not in {entry["grant_id"] for entry in stockade.json("grants", "late")}
    assert stockade.ctl("exec", "late", "--", "sh", "-c", f"{FETCH}/late").out == "403\n"
    assert site.seen == []
    stockade.wait(lambda: any(entry["verb"] == "grant.expire" for entry in stockade.actions("late")))
    assert [e["verdict"] for e in stockade.actions("late") if e["verb"] == "grant.expire"] == ["done"]


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + ".000000Z"


def test_a_relay_that_is_open_ends_with_the_daemon(stockade: Instance, site: Site) -> None:
    """A stream that nobody could cut or settle any more must not flow on."""
    site.cut.clear()
    agent = stockade.launch("--", "sh", "-c", f"while ! curl -sS -N -f http://{NAME}/slow; do sleep 0.1; done")
    stockade.json("grant", agent["agent_id"], SCOPE)
    stockade.wait(lambda: "piece" in output(stockade, agent))
    stockade.down(signal.SIGKILL)
    assert site.cut.wait(10), "the site still has its client"


def test_a_start_that_failed_is_no_crash() -> None:
    with Instance.start() as instance:
        instance.down()
        config = instance.directory / "stockade.toml"
        good = config.read_text()
        config.write_text(
            good.replace("[users]", '[users]\ngateway = "nobody-here"\n', 1)
            if "[users]" in good
            else good + '\n[users]\ngateway = "nobody-here"\n'
        )
        with pytest.raises(AssertionError):
            instance.up()
        config.write_text(good)
        instance.up()
        ends = [(e["verb"], e["verdict"]) for e in instance.actions("--verb", "daemon")]
        assert ends == [
            ("daemon.start", "done"), ("daemon.stop", "done"), ("daemon.start", "done"),
            ("daemon.stop", "failed"), ("daemon.start", "done"),
        ]  # fmt: skip


def test_policies_that_change_while_no_daemon_runs_are_in_the_log() -> None:
    with Instance.start(policies={"narrow.yaml": "kind: Policy\nname: narrow\nextends: default\n"}) as instance:

        def loads() -> list[str]:
            instance.down()
            instance.up()
            return [entry["details"]["narrow"] for entry in instance.actions("--verb", "policy.load")]

        assert loads() == []
        (policy,) = instance.directory.rglob("narrow.yaml")
        policy.write_text(policy.read_text() + "limits: {pids: 64}\n")
        (digest,) = loads()
        assert loads() == [digest], "once"
        assert instance.process is not None
        policy.write_text("kind: Policy\nname: narrow\nextends: default\n")
        instance.process.send_signal(signal.SIGHUP)
        instance.wait(lambda: len(instance.actions("--verb", "policy.load")) == 2)
        assert len(loads()) == 2, "what an order loaded is not told again"


def test_what_served_agents_ends_when_daemon_and_agents_are_gone(stockade: Instance) -> None:
    """The worker answers 503 as long as an agent may ask; then nobody is left to end it, and it ends itself."""
    workspace = stockade.workspace()
    agent = stockade.launch("--workspace", f"{workspace}:rw", "--", "sh", "-c", UNTIL_GO)
    worker = int(json.loads((stockade.run_dir / "processes" / "egress-w1.json").read_text())["pid"])
    launcher = launcher_pid(stockade)
    stockade.down(signal.SIGKILL)
    stockade.wait(lambda: launcher_pid(stockade) == 0, 1)
    assert started(worker) < GONE
    assert launcher_pid(stockade) == launcher
    (workspace / "go").touch()
    stockade.wait(lambda: not of_agent(agent) and started(worker) == GONE and launcher_pid(stockade) == 0, 20)
    assert started(worker) == GONE
    assert launcher_pid(stockade) == 0
    assert list(CGROUPS.glob(f"*/stockade-{stockade.name}")) == []


def test_a_launcher_that_dies_leaves_agents_confined_and_killable(stockade: Instance, site: Site) -> None:
    agent = stockade.launch("--name", "orphan", "--", "sh", "-c", f"while :; do {FETCH}/x; sleep 0.1; done")
    stockade.json("grant", "orphan", SCOPE)
    stockade.wait(lambda: "200" in output(stockade, agent))
    before = confinement(agent)
    launcher = launcher_pid(stockade)
    os.kill(launcher, signal.SIGKILL)

    stockade.wait(lambda: launcher_pid(stockade) not in (0, launcher))
    assert all(confinement(agent).get(pid, facts) == facts for pid, facts in before.items())
    assert of_agent(agent)
    # The next launcher serves launches, knows the orphan, enters and kills it.
    stockade.wait(lambda: stockade.ctl("run", "--", "true").code == 0, 20)
    assert stockade.ctl("run", "--", "true").code == 0
    assert stockade.json("status", "orphan")[0]["state"] == "RUNNING"
    receipt = stockade.json("kill", "orphan")[0]
    assert receipt["verified_empty"] is True
    assert of_agent(agent) == []
    seen = len(site.seen)
    assert stockade.json("log", "verify")["ok"] is True
    assert len(site.seen) == seen


def test_a_program_that_was_execd_ends_with_the_launcher_and_is_told_of(stockade: Instance) -> None:
    agent = stockade.launch("--name", "entered", "--", "sleep", "1000")
    with ThreadPoolExecutor(1) as pool:
        entered = pool.submit(stockade.ctl, "exec", "entered", "--", "sh", "-c", "echo in; exec sleep 999")
        stockade.wait(lambda: b"sleep\x00999" in b"".join(cmdline(pid) for pid in of_agent(agent)))
        os.kill(launcher_pid(stockade), signal.SIGKILL)
        assert entered.result(20).code == 137
    stockade.wait(lambda: b"999" not in b"".join(cmdline(pid) for pid in of_agent(agent)))
    left = [cmdline(pid) for pid in of_agent(agent)]
    assert not any(b"999" in line for line in left)
    assert any(b"1000" in line for line in left)  # the agent itself goes on


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_an_agent_that_ends_while_no_launcher_is_there_has_its_exit_code(stockade: Instance) -> None:
    workspace = stockade.workspace()
    agent = stockade.launch("--workspace", f"{workspace}:rw", "--", "sh", "-c", f"{UNTIL_GO}; exit 7")
    lock, away = stockade.run_dir / "launcher.lock", stockade.run_dir / "kept.lock"
    lock.rename(away)
    lock.mkdir()  # so that none can be started
    try:
        os.kill(launcher_pid(stockade), signal.SIGKILL)
        (workspace / "go").touch()
        stockade.wait(lambda: not of_agent(agent))
        assert of_agent(agent) == []
    finally:
        lock.rmdir()
        away.rename(lock)
    stockade.wait(lambda: stockade.json("status", agent["agent_id"])[0]["state"] != "RUNNING")
    ended = stockade.json("status", agent["agent_id"])[0]
    assert (ended["state"], ended["exit_code"]) == ("EXITED", 7)


def test_a_kill_does_not_wait_for_a_launcher(stockade: Instance) -> None:
    """A launcher that hangs delays the receipt, not the death: pid 1 is killed without it."""
    agent = stockade.launch("--", "sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000")
    launcher = launcher_pid(stockade)
    os.kill(launcher, signal.SIGKILL)
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as client:
        receipt = client.agent(agent["agent_id"]).kill("at once")
    assert receipt.verified_empty
    assert of_agent(agent) == []


@pytest.mark.parametrize("kind", ["egress-w1", "egress-dialer"])
def test_a_part_of_egress_that_hangs_delays_no_death(stockade: Instance, kind: str) -> None:
    """The receipt waits for the dialer's word, for as long as it may; the agent does not live as long."""
    agent = stockade.launch("--", "sleep", "1000")
    hung = int(json.loads((stockade.run_dir / "processes" / f"{kind}.json").read_text())["pid"])
    os.kill(hung, signal.SIGSTOP)
    try:
        receipt = stockade.json("kill", agent["agent_id"])[0]
    finally:
        os.kill(hung, signal.SIGCONT)
    assert receipt["verified_empty"] is True
    assert of_agent(agent) == []
    assert receipt["dead_ms" if kind == "egress-dialer" else "egress_cut_ms"] < CUT_SECONDS_MAX * 1000


@pytest.mark.parametrize("kind", ["egress-w1", "egress-dialer", "gateway"])
def test_a_part_of_egress_that_dies_is_started_again(stockade: Instance, kind: str) -> None:
    agent = stockade.launch("--", "sh", "-c", f"while :; do {FETCH}/y; sleep 0.1; done")
    stockade.json("grant", agent["agent_id"], SCOPE)
    stockade.wait(lambda: "200" in output(stockade, agent))
    record = stockade.run_dir / "processes" / f"{kind}.json"
    pid = int(json.loads(record.read_text())["pid"])
    os.kill(pid, signal.SIGKILL)
    stockade.wait(lambda: (words := text(record)) and int(json.loads(words)["pid"]) != pid)
    length = len(output(stockade, agent))
    stockade.wait(lambda: "200" in output(stockade, agent)[length:], 20)
    assert "200" in output(stockade, agent)[length:]
    assert stockade.json("kill", agent["agent_id"])[0]["verified_empty"] is True
    assert of_agent(agent) == []


@pytest.mark.parametrize("kind", ["egress-w1", "egress-dialer", "gateway"])
def test_a_part_that_cannot_be_started_again_at_once_is_tried_until_it_can(stockade: Instance, kind: str) -> None:
    """What lacks here is where its pid is written down, as on a run_dir that is full."""
    agent, other = (stockade.launch("--", "sh", "-c", f"while :; do {FETCH}/y; sleep 0.1; done") for _ in range(2))
    stockade.json("grant", agent["agent_id"], SCOPE)
    stockade.wait(lambda: "200" in output(stockade, agent))
    records = stockade.run_dir / "processes"
    pid = int(json.loads((records / f"{kind}.json").read_text())["pid"])
    assert stockade.process is not None
    daemon, said = stockade.process.pid, len(stockade.daemon_log())
    before = len(children(daemon))
    away = records.rename(stockade.run_dir / "away")
    try:
        os.kill(pid, signal.SIGKILL)
        stockade.wait(lambda: TRIED in stockade.daemon_log()[said:])
        assert TRIED in stockade.daemon_log()[said:]
        stockade.wait(lambda: len(children(daemon)) < before)
        assert len(children(daemon)) < before, "one that was not written down was ended"
        receipt = stockade.json("kill", other["agent_id"])[0]
        assert receipt["verified_empty"] is True
        assert receipt["egress_cut_ms"] < CUT_SECONDS_MAX * 1000, "who is gone is not waited for"
    finally:
        away.rename(records)
    length = len(output(stockade, agent))
    stockade.wait(lambda: "200" in output(stockade, agent)[length:], 30)
    assert "200" in output(stockade, agent)[length:]
    assert len(children(daemon)) == before
    assert stockade.json("kill", agent["agent_id"])[0]["verified_empty"] is True


def test_who_lost_the_gate_with_daemon_and_launcher_is_named(stockade: Instance) -> None:
    models = "curl -sS -m 10 -o /dev/null -w '%{http_code}' $OPENAI_BASE_URL/models"
    agent = stockade.launch("--name", "shut", "--", "sleep", "1000")
    for launcher_too in (False, True):
        stockade.down(signal.SIGKILL)
        if launcher_too:
            os.kill(launcher_pid(stockade), signal.SIGKILL)
        stockade.up()
        recovered = stockade.actions("--verb", "daemon.recover")[-1]["details"]
        assert recovered.get("without_gate") == ([agent["agent_id"]] if launcher_too else None)
        assert (stockade.ctl("exec", "shut", "--", "sh", "-c", models).out == "200") is not launcher_too
    assert stockade.json("kill", "shut")[0]["verified_empty"] is True


def test_a_freeze_does_not_fail_for_a_launcher_that_is_being_started(stockade: Instance) -> None:
    agent = stockade.launch("--", "sh", "-c", "while :; do echo tick; sleep 0.05; done")
    for order, stands in (("freeze", True), ("thaw", False)):
        os.kill(launcher_pid(stockade), signal.SIGKILL)
        stockade.json(order, agent["agent_id"])
        stockade.wait(lambda: launcher_pid(stockade) != 0)
        stockade.ctl("run", "--", "true")  # it has taken up what lives
        seen = output(stockade, agent)
        stockade.wait(lambda: output(stockade, agent) != seen, 1 if stands else 20)  # noqa: B023 - in this turn
        assert (output(stockade, agent) == seen) is stands
    assert stockade.json("status", agent["agent_id"])[0]["state"] == "RUNNING"


def test_without_a_launcher_agents_die_and_the_proof_comes_with_the_next_one(stockade: Instance) -> None:
    models = "curl -sS -m 10 -o /dev/null -w '%{http_code}' $OPENAI_BASE_URL/models"
    doomed = stockade.launch("--name", "doomed", "--", "sh", "-c", "trap '' TERM; setsid sleep 1000 & sleep 1000")
    stockade.launch("--name", "spared", "--", "sleep", "1000")
    lock, away = stockade.run_dir / "launcher.lock", stockade.run_dir / "kept.lock"
    lock.rename(away)
    lock.mkdir()  # so that none can be started
    try:
        os.kill(launcher_pid(stockade), signal.SIGKILL)
        with ThreadPoolExecutor() as pool:
            killing = pool.submit(stockade.ctl, "-o", "json", "kill", "doomed", "--reason", "why not")
            stockade.wait(lambda: not of_agent(doomed), 5)
            assert of_agent(doomed) == []
            frozen = stockade.ctl("freeze", "spared")
            assert frozen.code != 0
            assert "its gate is closed" in frozen.err
            (receipt,) = killing.result().json()
        assert receipt["verified_empty"] is False
        assert stockade.json("status", "doomed")[0]["state"] == "KILLING"
    finally:
        lock.rmdir()
        away.rename(lock)
    stockade.wait(lambda: stockade.json("status", "doomed")[0]["state"] == "KILLED")
    stockade.wait(lambda: len(stockade.actions("doomed", "--verb", "agent.kill")) == 2, 5)
    kills = stockade.actions("doomed", "--verb", "agent.kill")
    assert [(entry["verdict"], entry["reason"]) for entry in kills] == [("failed", "why not"), ("done", "why not")]
    assert [bool(entry["details"]["verified_empty"]) for entry in kills] == [False, True]
    assert len({entry["details"]["signature"] for entry in kills}) == 2
    assert stockade.actions("doomed", "--verb", "agent.exit") == []
    # What was half frozen is closed, as was said, until somebody decides.
    assert stockade.ctl("exec", "spared", "--", "sh", "-c", models).out == "503"
    stockade.json("freeze", "spared")
    stockade.json("thaw", "spared")
    assert stockade.ctl("exec", "spared", "--", "sh", "-c", models).out == "200"
    verdicts = [entry["verdict"] for entry in stockade.actions("spared", "--verb", "agent.freeze")]
    assert verdicts == ["allowed", "failed", "allowed", "done"]


@pytest.mark.parametrize("free", [0, 3])
def test_a_daemon_that_had_no_descriptors_left_for_a_while_serves_again(stockade: Instance, free: int) -> None:
    """And has all that died meanwhile again: launcher, worker, and who comes through the control socket."""
    agent = stockade.launch("--", "sh", "-c", f"while :; do {FETCH}/tick; sleep 0.1; done")
    asleep = stockade.launch("--name", "asleep", "--", "sleep", "1000")
    stockade.json("freeze", "asleep")
    stockade.json("grant", agent["agent_id"], f"http:GET:http://{NAME}/tick")
    before = settled(stockade)
    assert stockade.process is not None
    daemon = stockade.process.pid
    record = stockade.run_dir / "processes" / "egress-w1.json"
    # The lowest ones are given first: so many of them can still be had.
    have = {int(path.name) for path in Path(f"/proc/{daemon}/fd").iterdir()}
    limit = sorted(set(range(4096)) - have)[free]
    said, limits = len(stockade.daemon_log()), resource.prlimit(daemon, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon, resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        os.kill(launcher_pid(stockade), signal.SIGKILL)
        os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(stockade.run_dir / "control.sock"))
            stockade.wait(lambda: TRIED in stockade.daemon_log()[said:], 10)
            refused = stockade.ctl("launch", "--", "true", seconds=40)
        assert refused.code != 0
        assert "an error of the daemon's own" not in refused.err
    finally:
        resource.prlimit(daemon, resource.RLIMIT_NOFILE, limits)
    stockade.wait(lambda: stockade.ctl("run", "--", "true").code == 0)
    assert stockade.ctl("run", "--", "true").code == 0
    length = len(output(stockade, agent))
    stockade.wait(lambda: "200" in output(stockade, agent)[length:])
    assert "200" in output(stockade, agent)[length:]
    assert stockade.json("status", "asleep")[0]["state"] == "FROZEN"
    assert stockade.ctl("exec", "asleep", "--", "true", seconds=5).code != 0
    after = settled(stockade)
    assert (after.daemon_fds, after.slots, after.cgroups) == (before.daemon_fds, before.slots, before.cgroups)
    assert stockade.json("kill", asleep["agent_id"])[0]["verified_empty"] is True
    assert "Traceback" not in stockade.daemon_log()[said:]


def test_a_daemon_that_dies_between_plan_and_exec_leaves_nothing_half_built(stockade: Instance) -> None:
    """Launches are under way when the daemon dies, at moments that differ."""
    reference = lasting(stockade)
    for pause in (0.002, 0.006, 0.012, 0.03):
        with Stockade(f"unix:{stockade.run_dir}/control.sock") as client, ThreadPoolExecutor(8) as callers:
            assert client.verify_log().ok  # it is connected: what follows takes milliseconds
            size = client.verify_log().size
            answers = [callers.submit(client.launch, ["sleep", "1000"]) for _ in range(8)]
            time.sleep(pause)
            stockade.down(signal.SIGKILL)
        answered = {answer.result().agent_id for answer in answers if answer.exception() is None}
        stockade.up()
        running = {entry["agent_id"] for entry in stockade.json("status") if entry["state"] == "RUNNING"}
        recorded = {entry["agent_id"] for entry in stockade.actions("--verb", "agent.launch", "--after", str(size))}
        # What was answered runs, and nothing runs that is not in the log.
        assert answered <= running <= recorded
        stockade.ctl("kill", "--all")
    assert lasting(stockade) == reference
    assert stockade.json("log", "verify")["ok"] is True


def lasting(stockade: Instance) -> tuple[int, ...]:
    """What agents leave if anything does; a new daemon has descriptors of its own."""
    seen = settled(stockade)
    return seen.processes, seen.cgroups, seen.networks, seen.slots


def test_the_daemon_does_not_take_a_pid_for_a_process(stockade: Instance) -> None:
    """A record of a former daemon's process names pid and start: another process with that pid is left alone."""
    stockade.launch("--", "sleep", "1000")
    stockade.down(signal.SIGKILL)
    record = stockade.run_dir / "processes" / "egress-w1.json"
    left = int(json.loads(record.read_text())["pid"])
    with subprocess.Popen(["sleep", "1000"]) as bystander:
        try:
            stockade.wait(lambda: started(bystander.pid) < GONE)
            forged = {**json.loads(record.read_text()), "pid": bystander.pid}
            record.write_text(json.dumps(forged))
            stockade.up()
            assert bystander.poll() is None
        finally:
            bystander.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)


def test_an_agent_keeps_its_ids_when_the_ids_of_its_instance_begin_elsewhere() -> None:
    first = 1879048192 + 64 * IDS_PER_AGENT

    def ids(start: int) -> str:
        return f"uid_range = [{start}, {start + 4 * IDS_PER_AGENT - 1}]"

    with Instance.start(f"[agents]\n{ids(first)}\n") as stockade:
        living = stockade.launch("--", "sleep", "100")["agent_id"]
        claim = SLOTS / str(first // IDS_PER_AGENT)
        assert text(claim) == stockade.name
        stockade.down()
        stockade.config.write_text(stockade.config.read_text().replace(ids(first), ids(first + IDS_PER_AGENT)))
        stockade.up()
        assert text(claim) == stockade.name, "the range of an agent that lives is nobody else's"
        assert stockade.json("kill", living)[0]["verified_empty"] is True
        stockade.wait(lambda: not claim.exists())
