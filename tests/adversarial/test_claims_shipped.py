"""The same attempts where agents really are: launched by the daemon, under each policy that is shipped."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import battery
from tests.support.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86_64: the numbers are of this machine"),
    pytest.mark.timeout(200),
]

SHIPPED = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "policies").glob("*.yaml"))
AS_ROOT = """
kind: Policy
name: as-root
version: 1
extends: default
user: root
widen: {user: the strongest agent is what is to be held}
"""


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start('[gateway]\nkind = "embedded"\n', policies={"as-root.yaml": AS_ROOT}) as instance:
        yield instance


@pytest.fixture(scope="module")
def bait() -> Iterator[dict[str, Any]]:
    with battery.bait() as given:
        yield given


def judge(output: str) -> None:
    found = battery.results(output)
    assert len(found) == len(battery.PROBES), sorted(set(battery.PROBES) - set(found))[:5]
    odd = {name: f"{result.outcome} {result.detail}" for name, result in found.items() if result.outcome != "refused"}
    assert odd == {}


@pytest.mark.parametrize("policy", [*SHIPPED, "as-root"])
def test_no_attempt_gets_out_of_a_shipped_policy(stockade: Instance, bait: dict[str, Any], policy: str) -> None:
    workspace = str(stockade.workspace())
    done = stockade.ctl("run", "--policy", policy, "--workspace", workspace, "--", *battery.program(bait), seconds=120)
    assert done.code == 0, done.err
    judge(done.out)


def test_no_attempt_gets_out_of_what_an_operator_starts_inside(stockade: Instance, bait: dict[str, Any]) -> None:
    stockade.launch("--name", "host-of-exec", "--", "sleep", "1000")
    try:
        done = stockade.ctl("exec", "host-of-exec", "--", *battery.program(bait), seconds=120)
        assert done.code == 0, done.err
        judge(done.out)
    finally:
        stockade.ctl("kill", "host-of-exec")
