"""Every claim about confinement, as attempts that fail: all probes of probes/, in the default sandbox and in weak ones.

The table is run as a whole, once for each way to be in a sandbox; a test here judges one attempt: it was refused to the
agent, to an agent that is root inside, and to what an operator starts in the agent later; and a sandbox with controls
left out is where the same attempt succeeds, or this kernel has no such thing.
"""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import battery
from tests.support.attempt import TALLY
from tests.support.battery import OPEN, PROBES, SHARED, Result

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.adversarial.probes.inside import Probe
    from tests.support.launcher import Launcher

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86_64: the numbers are of this machine"),
    pytest.mark.timeout(300),
]

WAYS = ("agent", "root", "exec")
launcher_facts: dict[str, dict[str, Any]] = {}  # the posture, for each way


@pytest.fixture(scope="module")
def bait() -> Iterator[dict[str, Any]]:
    with battery.bait() as given:
        yield given


@pytest.fixture(scope="module")
def attempts(launcher: Launcher, bait: dict[str, Any]) -> dict[str, dict[str, Result]]:
    """What came of every attempt, for each way to be in a sandbox; and whether its network has a second layer."""
    found = {}
    for way, uid in (("agent", 1000), ("root", 0)):
        agent = launcher.run(battery.program(bait), timeout=200, uid=uid, gid=uid)
        assert agent.status == {"code": 0, "signal": None}, agent.stderr
        found[way] = battery.results(agent.stdout)
        launcher_facts[way] = agent.posture
    host = launcher.launch(["/bin/sleep", "1000"])
    found["exec"] = battery.results(launcher.exec(host, battery.program(bait))["stdout"])
    launcher.kill(host)
    return found


@pytest.fixture(scope="module")
def twins(weak_launcher: Launcher, bait: dict[str, Any]) -> dict[str, Result]:
    found: dict[str, Result] = {}
    for kind, changes in (("open", OPEN), ("shared", SHARED)):
        program = battery.program(bait | {"open": kind == "open"}, battery.twins(kind))
        agent = weak_launcher.run(program, timeout=200, **changes)
        assert agent.status == {"code": 0, "signal": None}, agent.stderr
        found |= battery.results(agent.stdout)
    return found


@pytest.mark.parametrize("name", PROBES)
def test_attempt_is_refused(attempts: dict[str, dict[str, Result]], twins: dict[str, Result], name: str) -> None:
    probe = PROBES[name]
    if probe.needs == "nftables" and launcher_facts["agent"]["network"]["firewall"] != "nftables":
        pytest.skip("no second layer in this kernel")
    if probe.needs == "compat" and "User Mode Linux" in Path("/proc/cpuinfo").read_text():
        pytest.skip("int 0x80 is a native call under User-Mode Linux, and judged as one")
    for way in WAYS:
        result = attempts[way].get(name)
        assert result is not None, f"{way}: not tried"
        assert result.outcome == "refused", f"{way}: {result}"
    verdict = battery.expected(probe, twins.get(name))
    assert verdict in ("found", "absent", "untwinned"), verdict
    TALLY.refused += 1
    TALLY.twins += verdict == "found"
    TALLY.absent += verdict == "absent"


def test_most_twins_are_found(twins: dict[str, Result]) -> None:
    """That a kernel lacks something excuses a twin; if most were excused, nothing would be shown."""
    verdicts = Counter(battery.expected(PROBES[name], result) for name, result in twins.items())
    assert verdicts["found"] > 2 * verdicts["absent"], verdicts


def test_a_probe_that_breaks_is_not_taken_for_one_that_was_refused(launcher: Launcher, bait: dict[str, Any]) -> None:
    """One without what it needs: its answer is neither of the two."""
    short = {key: value for key, value in bait.items() if key != "namespaces"}
    agent = launcher.run(battery.program(short, ["the net namespace is the host's"]))
    (result,) = battery.results(agent.stdout).values()
    assert result.outcome == "broken"


def test_every_probe_without_a_twin_says_why() -> None:
    untwinned: list[Probe] = [probe for probe in PROBES.values() if probe.untwinned]
    assert all(len(probe.untwinned) > 15 for probe in untwinned)
    assert len(untwinned) < len(PROBES) // 8, "few attempts may be without a twin"
