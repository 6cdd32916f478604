"""How fast one agent's requests are judged, so that it floods neither the log nor the agents beside it (pure).

Requests are made to wait, not refused: what was judged is in the log, every time, and an honest burst only takes
longer. Waiting requests hold a connection each, and of those an agent has a bounded number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

DENIALS_PER_SECOND_MAX: Final = 20.0
DENIALS_AT_ONCE_MAX: Final = 200
# In force while another agent asks for something too; one that is alone has the whole of the host's proxy.
REQUESTS_PER_SECOND_BESIDE_OTHERS_MAX: Final = 100.0
REQUESTS_AT_ONCE_BESIDE_OTHERS_MAX: Final = 100
BESIDE_OTHERS_SECONDS: Final = 2.0
ABANDONED_TOLD_SECONDS_MIN: Final = 60.0


@dataclass(slots=True)
class Bucket:
    """Fills with `per_second` up to `most`; may be overdrawn, and whoever comes then waits until it is not."""

    per_second: float
    most: float
    level: float
    at: float

    def take(self, count: float, now: float) -> None:
        self._fill(now)
        self.level -= count

    def wait_seconds(self, now: float) -> float:
        self._fill(now)
        return max(0.0, -self.level / self.per_second)

    def _fill(self, now: float) -> None:
        self.level = min(self.most, self.level + (now - self.at) * self.per_second)
        self.at = now


@dataclass(slots=True)
class _Asker:
    denials: Bucket
    requests: Bucket
    asked_at: float
    abandoned: int = 0
    told_at: float = float("-inf")


@dataclass(slots=True)
class Pace:
    _askers: dict[str, _Asker] = field(default_factory=dict)

    def ask(self, agent_id: str, now: float) -> float:
        """Note a request; gives the seconds that it has to wait before it is judged."""
        asker = self._askers.get(agent_id)
        if asker is None:
            denials = Bucket(DENIALS_PER_SECOND_MAX, DENIALS_AT_ONCE_MAX, DENIALS_AT_ONCE_MAX, now)
            most = REQUESTS_AT_ONCE_BESIDE_OTHERS_MAX
            requests = Bucket(REQUESTS_PER_SECOND_BESIDE_OTHERS_MAX, most, most, now)
            asker = self._askers[agent_id] = _Asker(denials, requests, now)
        asker.asked_at = now
        wait = asker.denials.wait_seconds(now)
        if self._beside_others(agent_id, now):
            asker.requests.take(1, now)
            wait = max(wait, asker.requests.wait_seconds(now))
        return wait

    def denied(self, agent_id: str, now: float) -> None:
        asker = self._askers.get(agent_id)
        if asker is not None:
            asker.denials.take(1, now)

    def abandoned(self, agent_id: str, now: float) -> int:
        """Note a request whose asker went away while it waited; gives how many are to be told of now, mostly none."""
        asker = self._askers.get(agent_id)
        if asker is None:
            return 0
        asker.abandoned += 1
        if now - asker.told_at < ABANDONED_TOLD_SECONDS_MIN:
            return 0
        asker.told_at = now
        count, asker.abandoned = asker.abandoned, 0
        return count

    def forget(self, agent_id: str) -> int:
        """Drop what is known of an agent; gives the abandoned requests that nobody was told of."""
        asker = self._askers.pop(agent_id, None)
        return 0 if asker is None else asker.abandoned

    def _beside_others(self, agent_id: str, now: float) -> bool:
        # Dictionaries keep their order, and agents are few: the first that asked lately ends the search.
        return any(
            now - other.asked_at < BESIDE_OTHERS_SECONDS for name, other in self._askers.items() if name != agent_id
        )
