"""Writes down what agents' processes did, as fast as the log takes it; what it does not take is bounded, and counted.

Agents say how much there is to tell, within the watcher's rates (sandbox/notices.py), and nobody inside waits for the
log: a disk that hangs must not fill the daemon's memory.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Final

import structlog

from supervisord.actions.types import Action, CannotRecord
from supervisord.call_actions import called_action

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

log = structlog.get_logger()

RETRY_SECONDS: Final = 1.0
PENDING_MAX: Final = 4096
"""Entries of some KiB that wait while others are written."""
STOP_SECONDS: Final = 2.0


class ToldCalls:
    """One write at a time; `append` raises CannotRecord."""

    def __init__(
        self, append: Callable[[Sequence[Action]], Awaitable[object]], *, call_name: Callable[[int], str]
    ) -> None:
        self._append = append
        self._call_name = call_name
        self._pending: list[Action] = []
        self._lost: Counter[str] = Counter()
        self._writing: asyncio.Task[None] | None = None

    def tell(self, agent_id: str, stream_id: str, events: object) -> None:
        """Have them written soon; also of an agent that ended while no daemon was there."""
        for event in events if isinstance(events, list) else ():
            action = called_action(agent_id, stream_id, event, self._call_name)
            if action is None:
                continue
            if len(self._pending) < PENDING_MAX:
                self._pending.append(action)
            else:
                self._lost[agent_id] += 1
        if self._pending and self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write())

    async def stop(self) -> None:
        """Wait for what is being written, STOP_SECONDS at most."""
        if self._writing is not None:
            await asyncio.wait({self._writing}, timeout=STOP_SECONDS)
            if self._writing is not None:
                self._writing.cancel()

    async def _write(self) -> None:
        try:
            while self._pending or self._lost:
                actions, self._pending = self._pending, []
                lost, self._lost = self._lost, Counter()
                try:
                    await self._append([*actions, *(lost_action(agent_id, times) for agent_id, times in lost.items())])
                except CannotRecord as error:
                    log.error("what processes did is not in the action log yet", cause=error.message)
                    self._put_back(actions, lost)
                    await asyncio.sleep(RETRY_SECONDS)
        finally:
            # In the same step as the last look at what waits: a callback of the task's end comes a turn later, and
            # what is told in between would wait for the next event.
            self._writing = None

    def _put_back(self, actions: list[Action], lost: Counter[str]) -> None:
        """Have them written before what came meanwhile, of which there is less room then."""
        later, self._pending = self._pending[PENDING_MAX - len(actions) :], actions + self._pending
        del self._pending[PENDING_MAX:]
        self._lost += lost + Counter(action.agent_id for action in later)


def lost_action(agent_id: str, times: int) -> Action:
    """Say that so many entries about an agent are missing."""
    reason = "the log was too slow: so many entries of what processes did are lost"
    return Action(agent_id, "daemon", "process.watch", "", "failed", reason, {"times": times})
