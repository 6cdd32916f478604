"""Some agents of many are ended, or what one exec started, and nothing beside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from stockade.client import Stockade

from tests.support.instance import Instance, bin_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start() as instance:
        yield instance


def state(stockade: Instance, name: str) -> str:
    return str(stockade.json("status", name)[0]["state"])


def verbs(stockade: Instance, name: str) -> list[str]:
    return [entry["verb"] for entry in stockade.ctl("-o", "json", "actions", name).lines()]


def test_one_exec_is_killed_by_itself(stockade: Instance) -> None:
    stockade.launch("--name", "entered", "--", "sleep", "1000")
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as client:
        agent = client.agent("entered")
        with agent.open(["sh", "-c", "setsid sleep 1000 & sleep 1000"]) as session:
            outputs = iter(session)
            stockade.wait(
                lambda: len(verbs(stockade, "entered")) > 0 and "exec.start" in verbs(stockade, "entered"), 10
            )
            (start,) = stockade.ctl("-o", "json", "actions", "entered", "--verb", "exec.start").lines()
            stream = start["details"]["stream_id"]
            assert stockade.ctl("kill", "entered", "--exec", "st_" + "a" * 26).code == 3
            killed = stockade.json("kill", "entered", "--exec", stream)
            assert killed["verified_empty"]
            assert list(outputs) == []
            assert session.stream_id == stream
    assert state(stockade, "entered") == "RUNNING"
    assert "exec.kill" in verbs(stockade, "entered")


def test_what_an_exec_left_is_killed_also_by_a_daemon_that_was_restarted(stockade: Instance) -> None:
    stockade.launch("--name", "kept", "--", "sleep", "1000")
    done = stockade.ctl("exec", "--show-stream", "kept", "--", "sh", "-c", "setsid sleep 1000 > /dev/null 2>&1 & true")
    assert done.code == 0
    stream = done.err.split()[-1]
    stockade.launch("--name", "other", "--", "sleep", "1000")
    stockade.down(signal.SIGKILL)
    stockade.up()
    assert stockade.ctl("kill", "other", "--exec", stream).code == 3, "an exec of another agent is none of its"
    killed = stockade.json("kill", "kept", "--exec", stream)
    assert (killed["processes_killed"], killed["verified_empty"]) == (1, True)
    assert stockade.ctl("kill", "kept", "--exec", stream).code == 3
    assert (state(stockade, "kept"), state(stockade, "other")) == ("RUNNING", "RUNNING")


def test_an_exec_is_one_agents(stockade: Instance) -> None:
    assert stockade.ctl("kill", "--all", "--exec", "st_" + "a" * 26).code == 2
    assert stockade.ctl("kill", "a", "b", "--exec", "st_" + "a" * 26).code == 2


def test_kills_by_owner_and_at_once_share_one_receipt(stockade: Instance) -> None:
    for name, owner in (("a1", "red"), ("a2", "red"), ("b1", "blue")):
        stockade.launch("--name", name, "--owner", owner, "--", "sleep", "1000")
    command = [str(bin_dir() / "stockadectl"), "-o", "json", "kill", "--owner", "red"]
    kills = [subprocess.Popen(command, env=stockade.environment, stdout=subprocess.PIPE) for _ in range(4)]
    answers = [json.loads(kill.communicate(timeout=60)[0]) for kill in kills]
    by_agent: dict[str, set[str]] = {}
    for receipt in [receipt for answer in answers for receipt in answer]:
        assert receipt["verified_empty"]
        by_agent.setdefault(receipt["name"], set()).add(receipt["receipt_id"])
    assert set(by_agent) == {"a1", "a2"}
    assert all(len(receipts) == 1 for receipts in by_agent.values())
    assert state(stockade, "b1") == "RUNNING"
