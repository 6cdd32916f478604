"""How often an agent may bother people: a rate, and what was denied lately (pure; the clock is passed in)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from gateway_client.egress.scope import includes

if TYPE_CHECKING:
    from gateway_client.egress.scope import Scope

MINUTE_SECONDS: Final = 60.0
DENIED_KEPT_MAX: Final = 64

R = TypeVar("R")


@dataclass(slots=True)
class Asking(Generic[R]):
    """What one agent asked lately. `R` is what a denial is remembered by."""

    times: deque[float] = field(default_factory=deque)
    denied: deque[tuple[float, Scope, R]] = field(default_factory=lambda: deque(maxlen=DENIED_KEPT_MAX))

    def take(self, now: float, per_minute: int) -> bool:
        """Count one more question; False where there were too many in the last minute."""
        while self.times and self.times[0] <= now - MINUTE_SECONDS:
            self.times.popleft()
        if len(self.times) >= per_minute:
            return False
        self.times.append(now)
        return True

    def deny(self, scope: Scope, what: R, *, until: float) -> None:
        self.denied.append((until, scope, what))

    def lately_denied(self, scope: Scope, now: float) -> R | None:
        """Give the denial that still answers a question for this scope, or for a wider one: nobody is asked again."""
        for until, denied, what in reversed(self.denied):
            if now < until and includes(scope, denied):
                return what
        return None
