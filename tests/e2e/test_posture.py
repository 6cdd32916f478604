"""Posture, degradation and canaries, as an operator meets them: stockadectl, policies and the action log."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from sandbox.canaries import ATTEMPTS
from sandbox.controls import BY_NAME, NEGOTIABLE
from tests.support.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

SURE = """
kind: Policy
name: sure
extends: default
canary: true
require: [landlock, nftables]
"""
NO_QUOTA = """
kind: Policy
name: no-quota
extends: default
require: [workspace-quota]
"""
MISSPELT = """
kind: Policy
name: misspelt
degraded_ok: [landlok, seccomp]
"""


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    policies = {"sure.yaml": SURE, "no-quota.yaml": NO_QUOTA}
    with Instance.start(policies=policies) as instance:
        yield instance


def test_inspect_shows_what_the_kernel_says_and_the_log_what_was_in_force(stockade: Instance) -> None:
    launched = stockade.launch("--name", "seen", "--policy", "sure", "--", "sleep", "1000")
    document = stockade.json("inspect", "seen")
    effective, posture = document["effective"], document["posture"]
    assert posture == launched["posture"]
    assert effective["drift"] == []
    assert effective["namespaces"] == posture["namespaces"]
    assert effective["seccomp_filters"] == posture["seccomp_filters"] == 2
    assert effective["limits"]["pids"] == posture["limits"]["pids"] == 256
    assert effective["network"]["routes"] == ["198.18.0.1/32 dev eth0"]
    assert posture["canary"]["attempts"] == len(ATTEMPTS)
    assert posture["policy_digest"].startswith("sha256:")
    assert posture["seccomp"].startswith("sha256:")
    assert posture["stockade"] == stockade.json("version")["daemon"]["version"]
    (entry,) = stockade.actions("seen", "--verb", "agent.exec")
    assert entry["details"]["posture"] == posture
    table = stockade.ctl("inspect", "seen").out
    assert "effective:" in table
    assert "seccomp_filters: 2" in table
    stockade.ctl("kill", "seen")
    assert "effective" not in stockade.json("inspect", "seen"), "the dead have nothing in force"


def test_drift_is_said_aloud(stockade: Instance) -> None:
    stockade.launch("--name", "drifts", "--", "sleep", "1000")
    pid = str(stockade.json("inspect", "drifts")["effective"]["pid"])
    subprocess.run(["nsenter", "-n", "-t", pid, "ip", "route", "add", "192.0.2.0/24", "dev", "eth0"], check=True)
    done = stockade.ctl("-o", "json", "inspect", "drifts")
    assert done.code == 0
    assert "drifts is not confined as planned: network: routes are" in done.err
    assert "192.0.2.0/24" in done.json()["effective"]["drift"][0]
    stockade.ctl("kill", "drifts")


def test_what_is_done_without_is_in_posture_status_and_log(stockade: Instance) -> None:
    workspace = f"{stockade.workspace(a='b')}:rw"
    agent = stockade.launch("--name", "lacks", "--workspace", workspace, "--", "sleep", "1000")
    assert "workspace-quota" in agent["degraded"]
    (status,) = stockade.json("status", "lacks")
    assert status["degraded"] == agent["degraded"]
    assert "workspace-quota" in stockade.ctl("status", "lacks").out
    (entry,) = stockade.actions("lacks", "--verb", "agent.exec")
    assert any(item.startswith("workspace-quota: /workspace") for item in entry["details"]["posture"]["degraded"])
    stockade.ctl("kill", "lacks")


def test_a_demand_that_cannot_be_met_says_which_and_what_to_do(stockade: Instance) -> None:
    workspace = f"{stockade.workspace()}:rw"
    done = stockade.ctl("launch", "--name", "wants", "--policy", "no-quota", "--workspace", workspace, "--", "true")
    assert done.code == 1
    assert "this host lacks workspace-quota" in done.err
    assert "require: [workspace-quota]" in done.err
    (entry,) = stockade.actions("wants", "--verb", "agent.fail")
    assert "this host lacks workspace-quota" in entry["reason"]
    assert stockade.ctl("run", "--policy", "no-quota", "--", "true").code == 0


def test_a_control_that_does_not_exist_is_refused_with_the_nearest(stockade: Instance) -> None:
    path = stockade.directory / "misspelt.yaml"
    path.write_text(MISSPELT)
    done = stockade.ctl("policy", "check", str(path))
    assert done.code == 1
    assert "there is no control 'landlok'" in done.err
    assert "did you mean landlock?" in done.err
    assert "seccomp is not for a policy to decide" in done.err


def test_doctor_speaks_of_the_same_controls(stockade: Instance) -> None:
    done = stockade.ctl("-o", "json", "doctor")
    findings = {item["control"]: item for item in done.json()["findings"]}
    assert findings.keys() == BY_NAME.keys()
    assert {name for name, item in findings.items() if item["absence"].startswith("unless")} == set(NEGOTIABLE)
    assert all(item["source"] and item["how"] and item["protects"] for item in findings.values())
    assert done.code == (0 if all(item["present"] for item in findings.values() if item["required"]) else 1)
    told = stockade.ctl("doctor").out
    assert "workspace-quota protects" in told
    assert "on a file system of its own" in told
