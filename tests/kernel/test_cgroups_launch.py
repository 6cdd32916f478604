"""Limits as a launched agent feels them, with everything else of the sandbox around it; on hybrid hosts and on v2."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from sandbox.plan import Limits

if TYPE_CHECKING:
    from tests.support.launcher import Launcher

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")
SPIN = """
import resource, time
end = time.monotonic() + 1.5
while time.monotonic() < end:
    pass
used = resource.getrusage(resource.RUSAGE_SELF)
print("spun", used.ru_utime + used.ru_stime)
"""
FORK = """
import os, time
made = 1
try:
    while made < 60:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        made += 1
except OSError as error:
    print(error.errno == 11)
print(made)
"""


@pytest.mark.parametrize(("cpus", "held"), [(0.05, True), (1.0, False)])
def test_cpu_limit_holds_for_an_agent(launcher: Launcher, cpus: float, held: bool) -> None:  # noqa: FBT001
    begin = time.monotonic()
    agent = launcher.run(["/usr/bin/python3", "-I", "-S", "-c", SPIN], limits=Limits(cpus=cpus), timeout=90)
    elapsed = time.monotonic() - begin
    assert agent.status == {"code": 0, "signal": None}
    said, used = agent.stdout.split()
    assert said == "spun"
    bound = 0.05 * elapsed * 1.5 + 0.03
    assert (float(used) <= bound) is held, (used, bound)


@pytest.mark.parametrize(("mebibytes", "survives"), [(64, False), (400, True)])
def test_memory_limit_holds_for_an_agent(launcher: Launcher, mebibytes: int, survives: bool) -> None:  # noqa: FBT001
    program = "x = bytearray(200 << 20); print(len(x))"
    limits = Limits(memory_bytes=mebibytes << 20)
    agent = launcher.run(["/usr/bin/python3", "-I", "-S", "-c", program], limits=limits, timeout=90)
    assert (agent.stdout.strip() == str(200 << 20)) is survives
    assert agent.oom is not survives
    assert agent.status == ({"code": 0, "signal": None} if survives else {"code": None, "signal": 9})


@pytest.mark.parametrize(("pids", "refused"), [(12, True), (100, False)])
def test_pids_limit_holds_for_an_agent(launcher: Launcher, pids: int, refused: bool) -> None:  # noqa: FBT001
    agent = launcher.run(["/usr/bin/python3", "-I", "-S", "-c", FORK], limits=Limits(pids=pids), timeout=90)
    words = agent.stdout.split()
    assert ("True" in words) is refused
    assert (int(words[-1]) < pids) if refused else (int(words[-1]) == 60)
