"""What a look at an agent's counters comes to, and how often anything is said of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sandbox.cgroups import Counters
from sandbox.limits_watch import EVENT_SECONDS_MIN, Kind, Teller, Watch, judge
from sandbox.running import State

NOTHING_YET = Counters(0, 0, 0, 0, 0, 0, 0, 0, 0)
QUIET = replace(NOTHING_YET, cpu_periods=10)


@pytest.mark.parametrize(
    ("after", "met"),
    [
        (QUIET, {}),
        (replace(QUIET, pids_limit_hits=7), {Kind.PIDS_LIMIT: {"times": 7}}),
        (replace(QUIET, cpu_periods_throttled=4, cpu_throttled_usec=90_000), {}),
        (
            replace(QUIET, cpu_periods_throttled=5, cpu_throttled_usec=90_000),
            {Kind.THROTTLED: {"times": 5, "throttled_ms": 90}},
        ),
        (replace(NOTHING_YET, cpu_periods=4, cpu_periods_throttled=4), {}),
        (replace(QUIET, memory_pressure_usec=199_999), {}),
        (replace(QUIET, memory_pressure_usec=200_000), {Kind.MEMORY_PRESSURE: {"times": 1, "waited_ms": 200}}),
        (replace(QUIET, io_pressure_usec=500_000), {Kind.IO_PRESSURE: {"times": 1, "waited_ms": 500}}),
        (replace(QUIET, memory_pressure_usec=None, io_pressure_usec=None), {}),
        (replace(QUIET, memory_limit_hits=10_000, oom_kills=1), {}),
    ],
)
def test_what_a_second_comes_to(after: Counters, met: dict[Kind, dict[str, int]]) -> None:
    assert judge(NOTHING_YET, after, 1.0) == met


@pytest.mark.parametrize(("grows", "told"), [(0, []), (600_000, [Kind.MEMORY_PRESSURE])])
def test_what_was_waited_for_before_is_not_the_agents(grows: int, told: list[Kind]) -> None:
    """It was a starter then, made ahead of need."""
    now, said = [0.0], []
    counters = replace(QUIET, memory_pressure_usec=900_000)
    loop = SimpleNamespace(later=lambda _seconds, due: due, watch=None)
    group: Any = SimpleNamespace(counters=lambda: counters, oom_fd=lambda: -1)
    agent: Any = SimpleNamespace(agent_id="ag_a", group=group, state=State.RUNNING)
    watch = Watch(
        cast("Any", loop), {"ag_a": agent}, lambda _agent, kind, _numbers: said.append(kind), clock=lambda: now[0]
    )
    watch.add(agent, fresh=True)
    now[0], counters = 1.0, replace(counters, memory_pressure_usec=900_000 + grows)
    watch._look()
    assert said == told


def test_of_one_kind_there_is_one_event_in_its_time_and_nothing_is_lost() -> None:
    teller = Teller()
    hit = {Kind.PIDS_LIMIT: {"times": 3}}
    told = [(second, numbers) for second in range(200) for numbers in teller.tell(hit, float(second)).values()]
    assert [second for second, _ in told] == [0, 60, 120, 180]
    assert [numbers["times"] for _, numbers in told] == [3, 180, 180, 180]
    assert [numbers["looks"] for _, numbers in told] == [1, 60, 60, 60]


def test_what_was_kept_back_is_told_when_it_has_stopped_too() -> None:
    teller = Teller()
    assert teller.tell({Kind.THROTTLED: {"times": 9, "throttled_ms": 50}}, 0.0) != {}
    assert teller.tell({Kind.THROTTLED: {"times": 9, "throttled_ms": 50}}, 1.0) == {}
    assert teller.tell({}, EVENT_SECONDS_MIN - 1) == {}
    assert teller.tell({}, EVENT_SECONDS_MIN) == {Kind.THROTTLED: {"looks": 1, "times": 9, "throttled_ms": 50}}
    assert teller.tell({}, 10 * EVENT_SECONDS_MIN) == {}


def test_kinds_do_not_wait_for_each_other() -> None:
    teller = Teller()
    assert set(teller.tell({Kind.PIDS_LIMIT: {"times": 1}}, 0.0)) == {Kind.PIDS_LIMIT}
    assert set(teller.tell({Kind.THROTTLED: {"times": 1}, Kind.PIDS_LIMIT: {"times": 1}}, 1.0)) == {Kind.THROTTLED}
