"""The launcher's event loop: descriptors, and times at which something is due. One thread, no library."""

import contextlib
import functools
import heapq
import itertools
import select
import sys
import time
import traceback
from collections.abc import Callable
from typing import Final, TypeAlias

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT
Ready = Callable[[int], None]
Due = Callable[[], None]


class Loop:
    """Calls `ready(events)` for descriptors and `due()` for times; a callback may add and remove both."""

    def __init__(self) -> None:
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._ready: dict[int, Ready] = {}
        self._timers: list[tuple[float, int, Due]] = []
        self._due: set[int] = set()
        self._cancelled: set[int] = set()
        self._numbers = itertools.count(1)
        self.running = True

    def watch(self, fd: int, events: int, ready: Ready) -> None:
        self._epoll.register(fd, events)
        self._ready[fd] = ready

    def change(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Stop watching; to be called before the descriptor is closed. Unknown ones are ignored."""
        if self._ready.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def later(self, seconds: float, due: Due) -> int:
        """Call once after that time; returns a number for `cancel`."""
        number = next(self._numbers)
        heapq.heappush(self._timers, (time.monotonic() + seconds, number, due))
        self._due.add(number)
        return number

    def cancel(self, number: int) -> None:
        """Do without that call; one that was made already changes nothing."""
        if number in self._due:
            self._cancelled.add(number)

    def turn(self, timeout_seconds: float) -> bool:
        """Wait once and call what is ready; False where nothing was before the time was over."""
        if self._timers:
            timeout_seconds = min(timeout_seconds, max(0.0, self._timers[0][0] - time.monotonic()))
        busy = False
        happened = [(fd, events, self._ready.get(fd)) for fd, events in self._epoll.poll(timeout_seconds)]
        for fd, events, ready in happened:
            # One before it may have closed this one, and have had the number given to another, which has nothing to say
            # yet: who then reads where that blocks would wait, and everybody with it.
            if ready is not None and self._ready.get(fd) is ready:
                busy = True
                self._call(functools.partial(ready, events), fd)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, number, due = heapq.heappop(self._timers)
            self._due.discard(number)
            if number in self._cancelled:
                self._cancelled.discard(number)
                continue
            busy = True
            self._call(due)
        return busy

    def _call(self, due: Due, fd: int = -1) -> None:
        """Call; trouble of one must not end the process that holds every agent."""
        try:
            due()
        except Exception:  # noqa: BLE001 - told, and whoever it belongs to has ended itself (Owned)
            traceback.print_exc(file=sys.stderr)
            self.forget(fd)


class Owned:
    """The loop as one agent uses it: what goes wrong in a callback of its own ends this agent, and no other."""

    def __init__(self, loop: Loop, failed: Due) -> None:
        self._loop = loop
        self._failed = failed
        self.change, self.forget, self.cancel = loop.change, loop.forget, loop.cancel

    def watch(self, fd: int, events: int, ready: Ready) -> None:
        self._loop.watch(fd, events, lambda happened: self._guard(lambda: ready(happened)))

    def later(self, seconds: float, due: Due) -> int:
        return self._loop.later(seconds, lambda: self._guard(due))

    def _guard(self, due: Due) -> None:
        try:
            due()
        except Exception:
            self._failed()
            raise


AnyLoop: TypeAlias = Loop | Owned
