"""Leases: an agent whose holder stops renewing is frozen, and killed a while later.

Time is the monotonic clock, which no change of the host's time moves and which every daemon of one boot shares: when a
lease is due is kept in the run directory, so that a restart neither prolongs nor loses it. While no daemon runs nobody
can renew, so one that comes back leaves each lease a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

import structlog

from supervisord.actions.types import JSON, Action
from supervisord.errors import Conflict, InvalidInput, StockadeError
from supervisord.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from supervisord.actions.log import ActionLog
    from supervisord.acts import Acts
    from supervisord.agents import Agent, Agents
    from supervisord.killswitch import KillSwitch

log = structlog.get_logger()

LEASE_SECONDS_MIN: Final = 1.0
LEASE_SECONDS_MAX: Final = 7 * 86400.0
GRACE_SECONDS_MIN: Final = 5.0
GRACE_SECONDS_MAX: Final = 300.0
ADOPTED_SECONDS_MIN: Final = 10.0
RETRY_SECONDS: Final = 5.0


def lease_seconds(value: float) -> float:
    """A lease that a launch may ask for; raises InvalidInput."""
    if not LEASE_SECONDS_MIN <= value <= LEASE_SECONDS_MAX:
        raise InvalidInput(
            f"cannot launch with a lease of {value:g} s: from {LEASE_SECONDS_MIN:g} s to {LEASE_SECONDS_MAX:g} s",
            remedy="choose some times the pause between two renewals",
        )
    return value


def grace_seconds(lease: float) -> float:
    """How long an agent whose lease was not renewed stays frozen before it is killed."""
    return min(max(lease, GRACE_SECONDS_MIN), GRACE_SECONDS_MAX)


@dataclass(frozen=True, slots=True)
class Lease:
    """When the next step is due, whether the first one is behind, and whether it is what the agent is frozen for."""

    due: float
    lapsed: bool = False
    froze: bool = False

    def lapse(self, seconds: float) -> Lease:
        return replace(self, due=self.due + grace_seconds(seconds), lapsed=True)

    def adopted(self, now: float, seconds: float) -> Lease:
        return replace(self, due=max(self.due, now + min(seconds, ADOPTED_SECONDS_MIN)))


class Leases:
    """The leases of the living; `changed` is told of every change of an agent, and begins and ends them.

    `frozen` is told of every order to freeze one.
    """

    def __init__(
        self,
        *,
        agents: Agents,
        acts: Acts,
        killswitch: KillSwitch,
        actions: ActionLog,
        directory: Path,
        now: Callable[[], float],
    ) -> None:
        self._agents = agents
        self._acts = acts
        self._killswitch = killswitch
        self._actions = actions
        self._directory = directory
        self._now = now
        self._leases: dict[str, Lease] = {}
        self._ordered: Counter[str] = Counter()
        self._sooner = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        directory.mkdir(mode=0o700, exist_ok=True)

    def changed(self, agent: Agent) -> None:
        seconds = agent.what.lease_seconds
        if not seconds or agent.state is State.STARTING:
            return
        if not agent.live:
            self._leases.pop(agent.agent_id, None)
            self._ordered.pop(agent.agent_id, None)
            (self._directory / agent.agent_id).unlink(missing_ok=True)
        elif agent.agent_id not in self._leases:
            kept = self._read(agent.agent_id)
            now = self._now()
            self._set(agent, Lease(now + seconds) if kept is None else kept.adopted(now, seconds))
        elif agent.state is State.RUNNING and self._leases[agent.agent_id].froze:
            # Somebody let it go on. Whatever it is frozen for next, no renewal ends that.
            self._set(agent, replace(self._leases[agent.agent_id], froze=False))

    def frozen(self, agent: Agent) -> None:
        """Note that somebody ordered it to stand still, which no renewal ends; what is due here is noted after it."""
        lease = self._leases.get(agent.agent_id)
        if lease is None:
            return
        self._ordered[agent.agent_id] += 1
        if lease.froze:
            self._set(agent, replace(lease, froze=False))

    def left(self, agent: Agent) -> float | None:
        """Seconds until the next step; None for an agent without a lease."""
        lease = self._leases.get(agent.agent_id)
        return None if lease is None else max(lease.due - self._now(), 0.0)

    async def renew(self, agent: Agent, *, actor: str) -> None:
        """Begin the lease anew; an agent that was frozen because of it goes on, one that an operator froze does not.

        Raises Conflict where it has none.
        """
        lease = self._leases.get(agent.agent_id)
        if lease is None or agent.state not in (State.RUNNING, State.FROZEN):
            raise Conflict(
                f"cannot renew the lease of {agent.name}: "
                + (f"it is {agent.state.value}" if lease is not None or not agent.live else "it has none"),
                remedy="launch it with a lease, or anew",
            )
        # What it is frozen for stays noted until it runs: a thaw that fails is tried by the next renewal.
        self._set(agent, Lease(self._now() + agent.what.lease_seconds, froze=lease.froze))
        if lease.froze and agent.state is State.FROZEN:
            await self._thaw(agent, actor=actor, reason="its lease was renewed")

    async def watch_forever(self) -> None:
        """Freeze and kill when that is due, whatever fails for one of them."""
        while True:
            next_due = min((lease.due for lease in self._leases.values()), default=None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if next_due is None else max(0.0, next_due - self._now())):
                    await self._sooner.wait()
            self._sooner.clear()
            self._take_steps()

    def _take_steps(self) -> None:
        now = self._now()
        for agent_id, lease in list(self._leases.items()):
            agent = self._agents.get(agent_id)
            if lease.due > now:
                continue
            if agent is None:
                del self._leases[agent_id]
            elif lease.lapsed:
                self._leases[agent_id] = replace(lease, due=now + RETRY_SECONDS)  # again until it is dead
                self._start(self._kill(agent))
            else:
                self._set(agent, lease.lapse(agent.what.lease_seconds))
                self._start(self._freeze(agent))

    def _lapsed(self, agent: Agent) -> bool:
        """Whether it still is: a renewal may have come meanwhile."""
        lease = self._leases.get(agent.agent_id)
        return lease is not None and lease.lapsed

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _freeze(self, agent: Agent) -> None:
        reason = f"its lease of {agent.what.lease_seconds:g} s was not renewed"
        held_by: dict[str, JSON] = {"held_by": agent.what.launched_by}
        await self._actions.note(Action(agent.agent_id, "daemon", "lease.lapse", agent.name, "done", reason, held_by))
        if agent.state is not State.RUNNING or not self._lapsed(agent):
            return  # one that somebody froze stays so
        before = self._ordered[agent.agent_id]
        try:
            await self._acts.freeze([agent], actor="daemon", reason=reason)
            lease = self._leases.get(agent.agent_id)
            if lease is None or self._ordered[agent.agent_id] > before + 1:
                return  # it ended, or somebody else froze it too, which no renewal ends
            self._set(agent, replace(lease, froze=True))
            if not lease.lapsed:
                await self._thaw(agent, actor="daemon", reason="its lease was renewed meanwhile")
        except StockadeError as error:
            # It is killed soon in any case.
            log.error("cannot freeze an agent whose lease has lapsed", agent=agent.agent_id, cause=error.message)

    async def _thaw(self, agent: Agent, *, actor: str, reason: str) -> None:
        def wanted() -> bool:
            lease = self._leases.get(agent.agent_id)
            return lease is not None and lease.froze

        await self._acts.thaw([agent], actor=actor, reason=reason, wanted=wanted)

    async def _kill(self, agent: Agent) -> None:
        if not self._lapsed(agent):
            return
        try:
            await self._killswitch.kill([agent], actor="daemon", reason="its lease was not renewed")
        except StockadeError as error:
            log.error("cannot kill an agent whose lease has lapsed", agent=agent.agent_id, cause=error.message)

    def _set(self, agent: Agent, lease: Lease) -> None:
        self._leases[agent.agent_id] = lease
        self._sooner.set()
        path = self._directory / agent.agent_id
        try:
            path.with_suffix(".new").write_text(json.dumps(asdict(lease)), encoding="ascii")
            path.with_suffix(".new").replace(path)
        except OSError as error:
            # A daemon that comes back begins it anew: longer by what had passed.
            log.error("cannot keep a lease for a restart", agent=agent.agent_id, cause=str(error))

    def _read(self, agent_id: str) -> Lease | None:
        try:
            kept = json.loads((self._directory / agent_id).read_text(encoding="ascii"))
            return Lease(float(kept["due"]), lapsed=bool(kept["lapsed"]), froze=bool(kept["froze"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.error("cannot read what was kept of a lease", agent=agent_id, cause=str(error))
            return None
