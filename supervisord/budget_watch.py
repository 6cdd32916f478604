"""Watches what agents spend: a notice near the end of a bound, and what the policy says at its end.

Tokens, money and requests are looked at whenever a call settles. Times are looked at every POLL_SECONDS: wall-clock
time on the monotonic clock since the launch, CPU time as the kernel counts it for the agent's cgroup; both outlive the
daemon. An agent is stopped at most POLL_SECONDS and STATS_SECONDS_MAX after its time is up, and what a freeze or kill
takes. Where the launcher does not answer, CPU time is not known, and is looked at again with the next poll.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from supervisord.actions.types import Action
from supervisord.budgets import MS_PER_SECOND, OnExhausted
from supervisord.errors import StockadeError
from supervisord.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence

    from supervisord.agents import Agent, Agents
    from supervisord.budgets import Use
    from supervisord.ids import AgentId
    from supervisord.launcher_link import LauncherLink
    from supervisord.ledgers import Ledgers
    from supervisord.store import Store

log = structlog.get_logger()

POLL_SECONDS: Final = 1.0
STATS_SECONDS_MAX: Final = 2.0
RETRY_SECONDS: Final = 5.0
USEC_PER_MS: Final = 1000
NOTICED: Final = "noticed"
ACTED: Final = "acted"


class Order(Protocol):
    """A freeze or a kill, as operators order it too."""

    def __call__(self, agents: Sequence[Agent], *, actor: str, reason: str) -> Awaitable[object]: ...


class BudgetWatch:
    """One for the daemon. `note` records and never raises; `freeze` and `kill` are those of everybody."""

    def __init__(
        self,
        *,
        agents: Agents,
        ledgers: Ledgers,
        launcher: LauncherLink,
        store: Store,
        note: Callable[[Action], Awaitable[None]],
        freeze: Order,
        kill: Order,
        now: Callable[[], float],
    ) -> None:
        self._agents = agents
        self._ledgers = ledgers
        self._launcher = launcher
        self._store = store
        self._note = note
        self._freeze = freeze
        self._kill = kill
        self._now = now
        self._marks: set[tuple[str, str, str]] = set()
        self._acting: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        ledgers.on_spent = self.spent

    async def load(self) -> None:
        """Read what was said and done under an earlier daemon; raises CannotStore."""
        self._marks = await self._store.budget_marks()

    def forget(self, agent_id: str) -> None:
        """Forget what was said of an agent that has ended; the store does so with what it spent."""
        self._marks = {mark for mark in self._marks if mark[0] != agent_id}

    def spent(self, agent_id: AgentId) -> None:
        """Look at an agent that has just spent something."""
        agent = self._agents.get(agent_id)
        if agent is not None and agent.live and any(use.near for use in self._ledgers.uses(agent_id)):
            self._in_background(self._look(agent))

    async def watch_forever(self) -> None:
        """Look at every agent that has a budget, again and again; runs as long as the daemon."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self.poll()
            except Exception:
                log.exception("budgets could not be looked at, and are again in a moment")

    async def poll(self) -> None:
        """Measure times once, and have every agent looked at."""
        bounded = [agent for agent in self._agents.live() if self._ledgers.bounded(agent.agent_id)]
        limits = {agent.agent_id: agent.what.budget for agent in bounded}
        cpu = await self._cpu_ms(agent_id for agent_id, budget in limits.items() if budget.get("cpu_ms") is not None)
        for agent in bounded:
            wall = (
                int((self._now() - agent.what.launched_mono) * MS_PER_SECOND)
                if agent.what.budget.get("wall_ms") is not None
                else None
            )
            self._ledgers.measured(agent.agent_id, wall_ms=wall, cpu_ms=cpu.get(agent.agent_id))
            # Each by itself: a kill that takes long keeps no other agent from being looked at.
            self._in_background(self._look(agent))

    async def _cpu_ms(self, agent_ids: Iterable[str]) -> Mapping[str, int]:
        wanted = list(agent_ids)
        if not wanted:
            return {}
        try:
            reply = await self._launcher.call("stats", agent_ids=wanted, seconds_max=STATS_SECONDS_MAX)
        except StockadeError as error:
            log.warning("CPU time of agents is not known for now", cause=error.message)
            return {}
        stats = reply.body.get("stats")
        found = stats.items() if isinstance(stats, dict) else ()
        return {
            agent_id: usage["cpu_usec"] // USEC_PER_MS
            for agent_id, usage in found
            if isinstance(usage, dict) and isinstance(usage.get("cpu_usec"), int)
        }

    async def _look(self, agent: Agent) -> None:
        uses = self._ledgers.uses(agent.agent_id)
        for use in uses:
            if use.near:
                await self._say(agent, use)
        reached = [use for use in uses if use.reached and (agent.agent_id, use.key, ACTED) not in self._marks]
        if not reached or agent.agent_id in self._acting or not agent.live:
            return
        self._acting.add(agent.agent_id)
        try:
            await self._act(agent, reached)
        except StockadeError as error:
            if agent.live:
                log.error("an agent without budget runs on", agent=agent.agent_id, cause=error.message)
                await asyncio.sleep(RETRY_SECONDS)  # each attempt is an entry in the log
        finally:
            self._acting.discard(agent.agent_id)

    async def _say(self, agent: Agent, use: Use) -> None:
        """Record that little is left, once: of an agent's bound in its life, of a label's in each period."""
        subject = f"label:{use.label}" if use.label else agent.agent_id
        if not await self._mark(subject, use.key, NOTICED):
            return
        await self._note(
            Action(agent.agent_id, "daemon", "agent.budget", use.bound, "notice", str(use), dict(use.facts))
        )

    async def _act(self, agent: Agent, reached: Sequence[Use]) -> None:
        """Freeze or kill as the policy says; who thaws the agent again knows what is used up."""
        reason = "; ".join(map(str, reached))
        match OnExhausted(agent.what.on_exhausted):
            case OnExhausted.DENY:
                return  # what it asks for is refused as it comes
            case OnExhausted.FREEZE:
                if agent.state is not State.RUNNING:
                    return
                await self._freeze([agent], actor="daemon", reason=reason)
            case OnExhausted.KILL:
                if agent.state not in (State.RUNNING, State.FROZEN):
                    return
                await self._kill([agent], actor="daemon", reason=reason)
        # Done first: a daemon that dies in between does it again, and never not at all.
        for use in reached:
            if agent.live:
                await self._mark(agent.agent_id, use.key, ACTED)

    async def _mark(self, subject: str, key: str, what: str) -> bool:
        """Keep that something was said or done; False where it was before, or cannot be kept."""
        mark = (subject, key, what)
        if mark in self._marks:
            return False
        self._marks.add(mark)
        try:
            await self._store.save_budget_mark(*mark)
        except StockadeError as error:
            if what == NOTICED:
                self._marks.discard(mark)
            log.error("what was done about a budget is not on the disk", subject=subject, cause=error.message)
            return False
        return True

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
