"""What agents do at their limits, told as events: a bounded look at each, in turn, and what it means.

Nothing an agent does makes this look oftener or say more: an agent is looked at once in `LOOK_SECONDS_MIN` at most, and
of one kind there is one event in `EVENT_SECONDS_MIN`; what happens in between is counted and told with the next. A full
disk or a lack of inodes leaves no trace in any counter of the kernel, so there is no event for it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from sandbox.loop import READ
from sandbox.running import State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sandbox.cgroups import Counters
    from sandbox.loop import Loop
    from sandbox.running import Agent

LOOK_SECONDS_MIN: Final = 1.0
LOOKS_PER_SECOND_MAX: Final = 100  # 0.15 ms each: a hundredth of one processor, however many agents there are
EVENT_SECONDS_MIN: Final = 60.0
# A build that is briefly at its limit is no news; one that spends half its time there is.
THROTTLED_SHARE_MIN: Final = 0.5
PERIODS_MIN: Final = 5
PRESSURE_SHARE_MIN: Final = 0.2
OOM_LOOK_SECONDS: Final = 0.001
OOM_LOOKS_MAX: Final = 200


class Kind(Enum):
    PIDS_LIMIT = "pids_limit"
    THROTTLED = "throttled"
    MEMORY_PRESSURE = "memory_pressure"
    IO_PRESSURE = "io_pressure"


def judge(before: Counters, after: Counters, seconds: float) -> dict[Kind, dict[str, int]]:
    """What a group met in this time, with its numbers; empty where nothing is worth a word."""
    met: dict[Kind, dict[str, int]] = {}
    if (hits := after.pids_limit_hits - before.pids_limit_hits) > 0:
        met[Kind.PIDS_LIMIT] = {"times": hits}
    periods = after.cpu_periods - before.cpu_periods
    throttled = after.cpu_periods_throttled - before.cpu_periods_throttled
    if periods >= PERIODS_MIN and throttled >= THROTTLED_SHARE_MIN * periods:
        waited = after.cpu_throttled_usec - before.cpu_throttled_usec
        met[Kind.THROTTLED] = {"times": throttled, "throttled_ms": waited // 1000}
    for kind, old, new in (
        (Kind.MEMORY_PRESSURE, before.memory_pressure_usec, after.memory_pressure_usec),
        (Kind.IO_PRESSURE, before.io_pressure_usec, after.io_pressure_usec),
    ):
        if old is not None and new is not None and new - old >= PRESSURE_SHARE_MIN * seconds * 1e6:
            met[kind] = {"times": 1, "waited_ms": (new - old) // 1000}
    return met


@dataclass(slots=True)
class Teller:
    """Which of what was met is told now: the first at once, then one of a kind in `EVENT_SECONDS_MIN`, summed up."""

    _told: dict[Kind, float] = field(default_factory=dict)
    _kept: dict[Kind, dict[str, int]] = field(default_factory=dict)

    def tell(self, met: Mapping[Kind, Mapping[str, int]], now: float) -> dict[Kind, dict[str, int]]:
        for kind, numbers in met.items():
            kept = self._kept.setdefault(kind, {"looks": 0})
            kept["looks"] += 1
            for name, number in numbers.items():
                kept[name] = kept.get(name, 0) + number
        due = [kind for kind in self._kept if now - self._told.get(kind, -EVENT_SECONDS_MIN) >= EVENT_SECONDS_MIN]
        told = {}
        for kind in due:
            told[kind] = self._kept.pop(kind)
            self._told[kind] = now
        return told


@dataclass(slots=True)
class _Watched:
    at: float
    counters: Counters
    teller: Teller = field(default_factory=Teller)


class Watch:
    """Looks at the running agents in turn; `say(agent, kind, numbers)` is called for what is told."""

    def __init__(
        self,
        loop: Loop,
        agents: Mapping[str, Agent],
        say: Callable[[Agent, Kind, dict[str, Any]], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._agents = agents
        self._say = say
        self._clock = clock
        self._watched: dict[str, _Watched] = {}
        self._running = False

    def add(self, agent: Agent, *, fresh: bool) -> None:
        """Watch an agent that runs; of one that is not `fresh`, what it met earlier is not told again."""
        group = agent.group
        if group is None or agent.agent_id in self._watched:
            return
        now = group.counters()
        # What a fresh one waited for before, it did as a starter. Who lost a process to a lack of memory while no
        # launcher was there has not been ended for it yet.
        counters = replace(now, oom_kills=0, pids_limit_hits=0 if fresh else now.pids_limit_hits)
        self._watched[agent.agent_id] = _Watched(self._clock(), counters)
        self._listen(agent, group.oom_fd())
        if not self._running:
            self._running = True
            self._loop.later(LOOK_SECONDS_MIN, self._look)

    def remove(self, agent: Agent) -> None:
        self._watched.pop(agent.agent_id, None)

    def _listen(self, agent: Agent, event: int) -> None:
        if event >= 0:
            self._loop.watch(event, READ, lambda _events: self._out_of_memory(agent, event))

    def _look(self) -> None:
        now = self._clock()
        due = [(watched.at, agent_id) for agent_id, watched in self._watched.items()]
        most = max(1, int(LOOKS_PER_SECOND_MAX * LOOK_SECONDS_MIN / 4))
        for _, agent_id in sorted(entry for entry in due if now - entry[0] >= LOOK_SECONDS_MIN)[:most]:
            agent = self._agents.get(agent_id)
            if agent is not None and agent.group is not None and agent.state is State.RUNNING:
                self._look_at(agent, agent.group.counters(), now)
        if self._watched:
            self._loop.later(LOOK_SECONDS_MIN / 4, self._look)
        else:
            self._running = False

    def _look_at(self, agent: Agent, counters: Counters, now: float) -> None:
        watched = self._watched[agent.agent_id]
        seconds = now - watched.at
        if counters.oom_kills > watched.counters.oom_kills and agent.group is not None and agent.group.oom_fd() >= 0:
            agent.end()  # the event was missed: an earlier launcher may have taken it
        met = judge(watched.counters, counters, seconds)
        watched.at, watched.counters = now, counters
        for kind, numbers in watched.teller.tell(met, now).items():
            self._say(agent, kind, {"within_seconds": round(seconds, 1), **numbers})

    def _out_of_memory(self, agent: Agent, event: int) -> None:
        """The kernel is about to kill one process of the agent (v1): the rest is ended when it has."""
        os.eventfd_read(event)
        self._loop.forget(event)
        self._end_when_killed(agent, OOM_LOOKS_MAX)

    def _end_when_killed(self, agent: Agent, looks: int) -> None:
        if agent.group is None or agent.state in (State.ENDING, State.GONE):
            return
        if agent.group.oom_kills():
            agent.end()
        elif looks:
            self._loop.later(OOM_LOOK_SECONDS, lambda: self._end_when_killed(agent, looks - 1))
        else:  # somebody gave memory back in time
            self._listen(agent, agent.group.oom_fd())
