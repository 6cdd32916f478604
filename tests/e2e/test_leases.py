"""An agent whose holder stops renewing its lease is frozen, then killed; one that is renewed is not."""

from __future__ import annotations

import grp
import json
import os
import pwd
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from stockade.client import Stockade

from supervisord.leases import GRACE_SECONDS_MIN
from tests.support.instance import Instance, bin_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")


OTHER = pwd.getpwnam("nobody")


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    group = grp.getgrgid(OTHER.pw_gid).gr_name
    with Instance.start(f'[control]\ngroup = "{group}"\n') as instance:
        yield instance


def state(stockade: Instance, name: str) -> str:
    return str(stockade.json("status", name)[0]["state"])


def verbs(stockade: Instance, name: str) -> list[str]:
    return [entry["verb"] for entry in stockade.ctl("-o", "json", "actions", name).lines()]


def test_without_renewal_an_agent_is_frozen_then_killed_and_with_it_neither(stockade: Instance) -> None:
    stockade.launch("--name", "left", "--lease", "1s", "--", "sleep", "1000")
    stockade.launch("--name", "free", "--", "sleep", "1000")
    target = f"unix:{stockade.run_dir}/control.sock"
    with Stockade(target) as client:
        kept = client.launch(["sleep", "1000"], name="kept", lease=1)
        with kept.renewing(0.2):
            stockade.wait(lambda: state(stockade, "left") == "FROZEN", 10)
            stockade.wait(lambda: state(stockade, "left") == "KILLED", GRACE_SECONDS_MIN + 10)
            assert (state(stockade, "kept"), state(stockade, "free")) == ("RUNNING", "RUNNING")
            assert 0 < (kept.refresh().info.lease_left or 0) <= 1
        stockade.wait(lambda: state(stockade, "kept") == "FROZEN", 10)
        assert kept.renew().state.value == "RUNNING", "its holder is back in time"
    seen = verbs(stockade, "left")
    assert next(verb for verb in seen if verb in ("lease.lapse", "agent.freeze", "agent.kill")) == "lease.lapse"
    assert {"agent.freeze", "agent.kill"} <= set(seen)
    assert "agent.thaw" in verbs(stockade, "kept")
    assert "lease.lapse" not in verbs(stockade, "free")
    assert stockade.ctl("renew", "free").code == 5
    assert stockade.ctl("renew", "left").code == 5


def test_a_restart_neither_prolongs_nor_loses_a_lease(stockade: Instance) -> None:
    stockade.launch("--name", "long", "--lease", "100s", "--", "sleep", "1000")
    stockade.launch("--name", "short", "--lease", "1s", "--", "sleep", "1000")
    before = left(stockade, "long")
    stockade.down(signal.SIGKILL)
    stockade.up()
    assert 50 < left(stockade, "long") < before
    stockade.wait(lambda: state(stockade, "short") in ("FROZEN", "KILLED"), 15)
    assert stockade.ctl("renew", "long").code == 0
    assert left(stockade, "long") > 95


def left(stockade: Instance, name: str) -> float:
    document: dict[str, Any] = stockade.json("inspect", name)
    return float(document["lease_left"])


def test_a_lease_has_bounds(stockade: Instance) -> None:
    assert stockade.ctl("launch", "--lease", "8d", "--", "true").code == 2
    assert stockade.ctl("launch", "--lease", "100ms", "--", "true").code == 2


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


def test_nobody_but_its_holder_or_an_admin_renews_a_lease(stockade: Instance) -> None:
    def as_other(*words: str) -> int:
        return subprocess.run(
            [bin_dir() / "stockadectl", *words],
            env=stockade.environment,
            user=OTHER.pw_uid,
            group=OTHER.pw_gid,
            extra_groups=[],
            capture_output=True,
            timeout=30,
            check=False,
        ).returncode

    stockade.launch("--name", "ours", "--lease", "100s", "--", "sleep", "1000")
    assert as_other("launch", "--name", "theirs", "--lease", "100s", "--", "sleep", "1000") == 0
    assert as_other("renew", "ours") == 4
    assert as_other("renew", "theirs") == 0
    assert stockade.ctl("renew", "theirs").code == 0, "root is an admin"


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
