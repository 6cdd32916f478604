"""The launcher's event loop: descriptors, and times at which something is due. One thread, no library."""

import contextlib
import heapq
import itertools
import select
import time
from collections.abc import Callable
from typing import Final

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
        return number

    def cancel(self, number: int) -> None:
        self._cancelled.add(number)

    def turn(self, timeout_seconds: float) -> bool:
        """Wait once and call what is ready; False where nothing was before the time was over."""
        if self._timers:
            timeout_seconds = min(timeout_seconds, max(0.0, self._timers[0][0] - time.monotonic()))
        busy = False
        for fd, events in self._epoll.poll(timeout_seconds):
            ready = self._ready.get(fd)
            if ready is not None:
                busy = True
                ready(events)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, number, due = heapq.heappop(self._timers)
            if number in self._cancelled:
                self._cancelled.discard(number)
                continue
            busy = True
            due()
        return busy
