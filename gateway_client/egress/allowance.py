"""How many bytes may still pass on a grant and on an agent's budget: one count each for all that is open on it.

Counted where the bytes pass, before they do: what would be one too many does not.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(slots=True)
class Allowance:
    """The bytes of a grant: the daemon says once how many there are, and hears afterwards what passed."""

    left_bytes: int
    spent: bool = False

    def take(self, count: int) -> bool:
        """Take that many off; False, from then on for ever, where they are not left."""
        if self.spent or count > self.left_bytes:
            self.spent = True
            return False
        self.left_bytes -= count
        return True


@dataclass(frozen=True, slots=True)
class Moved:
    """What passed since it was last told, what of the loan is given back, and how much more somebody waits for."""

    used: int
    back: int = 0
    want: int = 0


@dataclass(slots=True)
class Loan:
    """The bytes of an agent's budget that the daemon has set aside for it: more are asked for before they are gone.

    Whoever needs more than there are waits for the daemon. Where it has no more, they do not pass, the rest counts as
    used (nobody else can have it: it is less than one piece), and all that is open ends.
    """

    tell: Callable[[Moved], None]
    on_spent: Callable[[Loan], None]
    left_bytes: int = 0
    spent: bool = False
    _low_bytes: int = 0
    _used: int = 0
    _asked: bool = False
    _last: bool = False
    _waiting: deque[tuple[int, Callable[[bool], None]]] = field(default_factory=deque)

    def take_now(self, count: int) -> bool:
        """Take that many off if they are there and nobody was first; False where one has to wait, or for ever."""
        if self.spent or self._waiting or count > self.left_bytes:
            return False
        self._take(count)
        return True

    def when_taken(self, count: int, done: Callable[[bool], None]) -> None:
        """Take that many off as soon as they are there; `done` is told whether they were, later or at once.

        Whoever has gone meanwhile has them taken off all the same.
        """
        if self.spent:
            done(False)
            return
        self._waiting.append((count, done))
        self._serve(last=False)

    def lend(self, count: int, *, last: bool) -> None:
        """Have more, from the daemon; `last`: it has set everything aside that there was."""
        self.left_bytes += count
        self._low_bytes = count // 2
        self._asked, self._last = False, last
        self._serve(last=last)

    def end(self) -> None:
        """Give back what is left: nothing of the agent is open just now."""
        self._waiting.clear()
        used, back = self._used, self.left_bytes
        self._used = self.left_bytes = self._low_bytes = 0
        if used or back:
            self.tell(Moved(used, back))

    def _take(self, count: int) -> None:
        self.left_bytes -= count
        self._used += count
        if self.left_bytes < self._low_bytes and not self._asked and not self._last:
            self._ask(0)

    def _ask(self, need: int) -> None:
        used, self._used = self._used, 0
        self._asked = True
        self.tell(Moved(used, want=max(need - self.left_bytes, 1)))

    def _serve(self, *, last: bool) -> None:
        while self._waiting and self._waiting[0][0] <= self.left_bytes:
            count, done = self._waiting.popleft()
            self._take(count)
            done(True)
        if not self._waiting or self._asked:
            return
        if last:
            self._end_for_ever()
        else:
            self._ask(self._waiting[0][0])

    def _end_for_ever(self) -> None:
        self.spent = True
        used, self._used, self.left_bytes = self._used + self.left_bytes, 0, 0
        self.tell(Moved(used))
        self.on_spent(self)
        while self._waiting:
            self._waiting.popleft()[1](False)
