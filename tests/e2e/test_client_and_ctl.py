"""One agent's life by the command line and by the client, on the real daemon; each step is then in the log."""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from stockade.client import AsyncStockade, NotFound, Selector, State, Stockade

from tests.support.instance import Instance, bin_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: runs the daemon")

HANG = ("sh", "-c", "trap 'echo caught; exit 9' INT; echo up; while :; do sleep 0.1; done")
SCOPE = "llm:other-*"


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start() as instance:
        yield instance


@pytest.fixture
def client(stockade: Instance) -> Iterator[Stockade]:
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as connected:
        yield connected


def test_run_is_the_program_it_runs(stockade: Instance) -> None:
    done = stockade.run("cat; echo err >&2; exit 7", "-i", stdin="in\n")
    assert (done.code, done.out, done.err) == (7, "in\n", "err\n")
    assert stockade.run("kill -9 $$").code == 137
    assert stockade.ctl("run", "--", "no-such-program").code == 127
    assert stockade.ctl("run", "--", "/etc/passwd").code == 126
    assert stockade.ctl("run", "--policy", "no-such-policy", "--", "true").code == 125


def test_an_interrupt_reaches_the_program(stockade: Instance) -> None:
    command = [str(bin_dir() / "stockadectl"), "run", "--", *HANG]
    with subprocess.Popen(command, env=stockade.environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"caught\n"
        assert process.wait(30) == 9


def test_a_life_by_command_line(stockade: Instance) -> None:
    agent = stockade.launch("--name", "by-hand", "--label", "team=a", "--", *HANG)
    assert (agent["name"], agent["state"]) == ("by-hand", "RUNNING")
    assert agent["posture"]["no_new_privs"] is True
    assert stockade.ctl("launch", "--name", "by-hand", "--", "true").code == 5
    assert stockade.json("status", "by-hand")[0]["pids"] >= 2
    assert stockade.ctl("exec", "by-hand", "--", "sh", "-c", "id -u; exit 4").out == "1000\n"
    assert stockade.ctl("exec", "by-hand", "--", "sh", "-c", "exit 4").code == 4
    made = stockade.json("grant", "by-hand", SCOPE, "--ttl", "10m", "--max-uses", "2")
    assert (made["scope"], made["uses_left"]) == (SCOPE, 2)
    assert SCOPE in {grant["scope"] for grant in stockade.json("grants", "by-hand")}
    assert stockade.json("revoke", made["grant_id"])["state"] == "REVOKED"
    assert SCOPE not in {grant["scope"] for grant in stockade.json("grants", "by-hand")}
    assert stockade.json("freeze", "by-hand")[0]["state"] == "FROZEN"
    assert stockade.json("thaw", "by-hand")[0]["state"] == "RUNNING"
    receipt = stockade.json("kill", "--label", "team=a", "--reason", "enough")[0]
    assert (receipt["agent_id"], receipt["verified_empty"]) == (agent["agent_id"], True)
    assert receipt["processes_killed"] >= 2
    assert stockade.json("wait", "by-hand")["state"] == "KILLED"
    verbs = {(entry["verb"], entry["actor"]) for entry in stockade.actions("by-hand")}
    for verb in ("agent.launch", "grant.create", "grant.revoke", "agent.freeze", "agent.thaw", "agent.kill"):
        assert (verb, "uid:0(root)") in verbs
    assert stockade.json("log", "verify")["ok"] is True


def test_a_life_by_client(client: Stockade) -> None:
    agent = client.launch(list(HANG), name="by-program", labels={"team": "b"})
    assert agent.state is State.RUNNING
    assert next(output.data for output in agent.logs(follow=True)) == b"up\n"
    assert agent.exec(["cat"], stdin=b"x" * 100_000).stdout == b"x" * 100_000
    grant = agent.grant(SCOPE, ttl=600, max_uses=1)
    assert (grant.uses_left, client.revoke(grant.grant_id).state) == (1, "REVOKED")
    assert agent.freeze().state is State.FROZEN
    assert agent.thaw().state is State.RUNNING
    with ThreadPoolExecutor() as others:
        waiting = others.submit(agent.wait)
        receipt = client.kill_all(Selector(labels={"team": "b"}), "enough")[0]
        assert waiting.result(20).info.state is State.KILLED
    assert receipt.verified_empty
    assert agent.kill() == receipt
    seen = [entry.verb for entry in client.actions("by-program")]
    assert seen.index("agent.launch") < seen.index("grant.create") < seen.index("agent.kill")
    with pytest.raises(NotFound):
        client.agent("never-was")


def test_a_retry_finds_the_first_attempt(client: Stockade) -> None:
    first = client.launch(["sleep", "60"], idempotency_key="once")
    assert client.launch(["sleep", "60"], idempotency_key="once").agent_id == first.agent_id
    first.kill()


async def test_many_at_once_from_asyncio(stockade: Instance) -> None:
    async with AsyncStockade(f"unix:{stockade.run_dir}/control.sock") as client:
        agents = await asyncio.gather(*(client.launch(["sh", "-c", f"exit {code}"]) for code in range(4)))
        assert [(await agent.wait()).exit_code for agent in agents] == [0, 1, 2, 3]


def test_another_user_is_not_served(stockade: Instance) -> None:
    nobody = pwd.getpwnam("nobody")
    asked = subprocess.run(
        [bin_dir() / "stockadectl", "status"],
        env=stockade.environment, user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], cwd="/",
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert asked.returncode == 4
    assert "does not serve this user" in asked.stderr
    assert stockade.ctl("status").code == 0
