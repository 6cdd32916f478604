"""A fair share of the worker's one thread for every agent: not for every connection, of which an agent may have many.

Whatever a connection does, it does in steps of a coroutine between two awaits. Each step's CPU time is taken off the
agent's share; an agent that has overdrawn it waits until the share has grown again, all its connections in one queue.
What a step costs is measured, not guessed, so a kind of input that is dear to parse needs no rule of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

share_per_second: Final = 0.25
"""Seconds of CPU time an agent gets in a second while others use the thread too."""
share_alone_per_second: Final = 0.9
crowded_seconds: Final = 2.0
"""How long after another agent's last step an agent is not alone."""
burst_seconds_max: Final = 0.1
"""What an agent may save up: a whole model body of 16 MiB takes about that."""
debt_seconds_max: Final = 0.5
step_seconds_max: Final = 0.002
"""A step longer than this gives way, where it can."""

Result = TypeVar("Result")


class Thread:
    """Who has used the worker's thread of late; nothing but the last two agents matters."""

    def __init__(
        self, *, cpu: Callable[[], float] = time.thread_time, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.cpu = cpu
        self.now = now
        self._last: Share | None = None
        self._last_at = -crowded_seconds
        self._other_at = -crowded_seconds

    def used(self, share: Share, now: float) -> None:
        if share is not self._last:
            self._last, self._other_at = share, self._last_at
        self._last_at = now

    def rate(self, share: Share, now: float) -> float:
        """Give how fast a share grows."""
        other_at = self._other_at if share is self._last else self._last_at
        return share_per_second if now - other_at < crowded_seconds else share_alone_per_second


class Share:
    """What one agent may use of the thread, and which of its connections wait for more."""

    def __init__(self, loop: asyncio.AbstractEventLoop, thread: Thread) -> None:
        self._loop = loop
        self._thread = thread
        self._cpu = thread.cpu
        self._left = burst_seconds_max
        self._filled_at = thread.now()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.Handle | None = None
        self._step_began = 0.0

    @property
    def overdrawn(self) -> bool:
        return self._left < 0 or bool(self._waiting)

    def begin(self) -> None:
        self._step_began = self._cpu()

    def end(self) -> None:
        self._thread.used(self, self._fill())
        self._left = max(self._left - (self._cpu() - self._step_began), -debt_seconds_max)

    async def breathe(self) -> None:
        """Give way to others if the step that runs has been long: for loops that need not wait for anything."""
        if self._cpu() - self._step_began > step_seconds_max:
            await asyncio.sleep(0)

    async def turn(self) -> None:
        """Wait until the share has grown again and it is this connection's turn."""
        waiter = self._loop.create_future()
        self._waiting.append(waiter)
        self._arm()
        await waiter

    def _fill(self) -> float:
        now = self._thread.now()
        grown = (now - self._filled_at) * self._thread.rate(self, now)
        self._left = min(self._left + grown, burst_seconds_max)
        self._filled_at = now
        return now

    def _arm(self) -> None:
        if self._timer is None:
            rate = self._thread.rate(self, self._thread.now())
            self._timer = self._loop.call_later(max(-self._left, 0.0) / rate, self._next)

    def _next(self) -> None:
        """Let one connection take its step; what it cost is known when the next is looked at."""
        self._timer = None
        self._fill()
        while self._waiting and self._left >= 0:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                break
        if self._waiting:
            self._timer = self._loop.call_soon(self._again)

    def _again(self) -> None:
        self._timer = None
        self._arm()


async def metered(work: Coroutine[Any, Any, Result], share: Share) -> Result:
    """Run a coroutine on an agent's share: the same awaits, results, exceptions and cancellations."""
    result: Result = await _Steps(work, share)
    return result


class _Steps:
    __slots__ = ("_share", "_work")

    def __init__(self, work: Coroutine[Any, Any, Any], share: Share) -> None:
        self._work = work
        self._share = share

    def __await__(self) -> Generator[Any, Any, Any]:
        work, share = self._work, self._share
        problem: BaseException | None = None
        answer: Any = None
        while True:
            share.begin()
            try:
                awaited = work.send(answer) if problem is None else work.throw(problem)
            except StopIteration as end:
                return end.value
            finally:
                share.end()
            problem = None
            try:
                if share.overdrawn:
                    yield from share.turn().__await__()
                answer = yield awaited
            except BaseException as error:  # noqa: BLE001 - whatever comes belongs to the coroutine inside
                problem = error
