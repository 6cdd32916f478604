"""The circuit breaker of the gateway: a table of what follows what, and when the way is closed. Pure.

Failures that count are of connecting and of the daemon's own probes, never of a call: an agent that could make a call
fail would otherwise take the gateway from all the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

FAILURES_MAX: Final = 3


class State(Enum):
    CLOSED = "closed"
    """Calls pass."""
    OPEN = "open"
    """The gateway does not answer: calls are refused at once."""
    HALF_OPEN = "half_open"
    """One probe is on its way, and decides; calls are refused still."""


class Event(Enum):
    FAILED = "failed"
    ANSWERED = "answered"
    TRIED = "tried"
    """A probe was sent while the breaker is open."""


NEXT: Final = {
    (State.CLOSED, Event.FAILED): State.OPEN,  # the last of FAILURES_MAX in a row
    (State.CLOSED, Event.ANSWERED): State.CLOSED,
    (State.CLOSED, Event.TRIED): State.CLOSED,
    (State.OPEN, Event.FAILED): State.OPEN,
    (State.OPEN, Event.ANSWERED): State.OPEN,  # an answer to an older question
    (State.OPEN, Event.TRIED): State.HALF_OPEN,
    (State.HALF_OPEN, Event.FAILED): State.OPEN,
    (State.HALF_OPEN, Event.ANSWERED): State.CLOSED,
    (State.HALF_OPEN, Event.TRIED): State.HALF_OPEN,
}


@dataclass(frozen=True, slots=True)
class Breaker:
    """`failures` counts those in a row, `cause` says what the last one was."""

    state: State = State.CLOSED
    failures: int = 0
    cause: str = ""

    @property
    def passes(self) -> bool:
        return self.state is State.CLOSED

    def after(self, event: Event, cause: str = "") -> Breaker:
        """Give the breaker after an event."""
        if event is Event.FAILED:
            failures = self.failures + 1
            if self.state is State.CLOSED and failures < FAILURES_MAX:
                return replace(self, failures=failures, cause=cause)
            return Breaker(NEXT[self.state, event], failures, cause)
        following = NEXT[self.state, event]
        answered = event is Event.ANSWERED and following is State.CLOSED
        return Breaker() if answered else replace(self, state=following)
