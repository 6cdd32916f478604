"""What of an agent's system calls is told, and how fast an agent may ask (pure).

Every exec, and every call that no rule of the filter allows, waits for the watcher's answer. The answer never depends
on what is decided here; only how soon it comes does. An agent that asks faster than `ASKED_PER_SECOND` is answered at
that rate, so that a storm costs a bounded share of one processor and delays nobody else. Of execs the first are told
one by one and the rest as a number; refused calls are told by number and number of times. Both draw on one allowance,
so that an agent cannot flood the log.

Reading who asks waits for the lock of its memory, which its threads can hold for long: what that may take in all is
bounded too, and beyond it execs are told as a number.
"""

from dataclasses import dataclass, field
from typing import Any, Final

ASKED_PER_SECOND: Final = 1000.0  # more than a build on two processors does
ASKED_AT_ONCE_MAX: Final = 5000
TOLD_PER_SECOND: Final = 20.0
TOLD_AT_ONCE_MAX: Final = 500
READ_SECONDS_PER_SECOND: Final = 0.1  # 20 execs take some 0.01
READ_SECONDS_AT_ONCE_MAX: Final = 1.0
KEPT_MAX: Final = 2048  # while no daemon is there to hear of it
SUMMARY_SECONDS_MIN: Final = 10.0
CALLS_MAX: Final = 512  # of different numbers, for a call has any that the agent chose


@dataclass(slots=True)
class Bucket:
    """Fills with `per_second` up to `most`; may be overdrawn."""

    per_second: float
    most: float
    level: float
    at: float

    def _fill(self, now: float) -> None:
        self.level = min(self.most, self.level + (now - self.at) * self.per_second)
        self.at = now

    def take(self, now: float, amount: float = 1.0) -> None:
        self._fill(now)
        self.level -= amount

    def has(self, now: float, amount: float = 1.0) -> bool:
        self._fill(now)
        return self.level >= amount

    def wait_seconds(self, now: float) -> float:
        self._fill(now)
        return max(0.0, -self.level / self.per_second)


@dataclass(slots=True)
class _Refused:
    times: int = 0
    told_at: float = float("-inf")


@dataclass(slots=True)
class Account:
    """What one agent did that has not been told yet; all its listeners share it."""

    asked: Bucket
    told: Bucket
    read: Bucket  # in seconds
    untold: int = 0
    untold_since: float = 0.0
    refused: dict[int, _Refused] = field(default_factory=dict)

    @classmethod
    def opened(cls, now: float) -> "Account":
        return cls(
            Bucket(ASKED_PER_SECOND, ASKED_AT_ONCE_MAX, ASKED_AT_ONCE_MAX, now),
            Bucket(TOLD_PER_SECOND, TOLD_AT_ONCE_MAX, TOLD_AT_ONCE_MAX, now),
            Bucket(READ_SECONDS_PER_SECOND, READ_SECONDS_AT_ONCE_MAX, READ_SECONDS_AT_ONCE_MAX, now),
        )

    def executes(self, now: float) -> bool:
        """Note an exec; True where it is to be told by itself."""
        if self.told.has(now) and self.read.has(now, 0.0):
            self.told.take(now)
            return True
        self.leave_out(1, now)
        return False

    def leave_out(self, times: int, now: float) -> None:
        """Note execs that are told as a number only."""
        if not self.untold:
            self.untold_since = now
        self.untold += times

    def refuses(self, number: int, now: float) -> None:
        """Note a refused call; beyond `CALLS_MAX` different ones they are all told as number -1."""
        if number not in self.refused and len(self.refused) >= CALLS_MAX:
            number = -1
        self.refused.setdefault(number, _Refused()).times += 1
        if len(self.refused) >= CALLS_MAX:  # keep nothing of calls that were told long ago
            for old in [n for n, r in self.refused.items() if not r.times and now - r.told_at > SUMMARY_SECONDS_MIN]:
                del self.refused[old]

    def due(self, now: float, *, everything: bool = False) -> list[dict[str, Any]]:
        """Take what is to be told now: a call at once the first time, then at most once in `SUMMARY_SECONDS_MIN`."""
        events: list[dict[str, Any]] = []
        for number, refused in list(self.refused.items()):
            if refused.times and (everything or now - refused.told_at >= SUMMARY_SECONDS_MIN):
                if not everything and not self.told.has(now):
                    break  # counted on, and told when there is room
                self.told.take(now)
                events.append({"kind": "refused", "call": number, "times": refused.times})
                refused.times, refused.told_at = 0, now
                self.refused[number] = self.refused.pop(number)  # last in turn
        if self.untold and (everything or now - self.untold_since >= SUMMARY_SECONDS_MIN):
            events.append({"kind": "execs", "times": self.untold})
            self.untold = 0
        return events


@dataclass(slots=True)
class Kept:
    """What was told while nobody listened: the first `KEPT_MAX` events whole, of the rest how many there were.

    That a watcher was replaced is kept of every agent, once: one that dies again and again fills nothing.
    """

    _events: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    _more: dict[tuple[str, str, str], int] = field(default_factory=dict)  # by agent, stream and kind
    _interrupted: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)  # by agent and stream: once

    def add(self, agent_id: str, stream_id: str, events: list[dict[str, Any]]) -> None:
        for event in events:
            if len(self._events) < KEPT_MAX:
                self._events.append((agent_id, stream_id, event))
            elif event["kind"] == "interrupted":
                before = self._interrupted.get((agent_id, stream_id), event)
                self._interrupted[agent_id, stream_id] = event | {"unread": event["unread"] or before["unread"]}
            else:
                kind = "refused" if event["kind"] == "refused" else "execs"
                key = (agent_id, stream_id, kind)
                self._more[key] = self._more.get(key, 0) + int(event.get("times", 1))

    def take(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Return all of it, by agent, stream and event, and keep nothing."""
        events = [*self._events, *((*whose, event) for whose, event in self._interrupted.items())]
        for (agent_id, stream_id, kind), times in self._more.items():
            number = {"call": -1} if kind == "refused" else {}
            events.append((agent_id, stream_id, {"kind": kind, "times": times, **number}))
        self._events.clear()
        self._interrupted.clear()
        self._more.clear()
        return events


_ESCAPED: Final = tuple(
    "\\\\" if byte == ord("\\") else chr(byte) if ord(" ") <= byte <= ord("~") else f"\\x{byte:02x}"
    for byte in range(256)
)
CUT: Final = "\\..."  # no byte is written so


def shown(text: bytes, characters_max: int) -> str:
    r"""Return the bytes as printable ASCII: others as `\xNN`, a backslash doubled, and `\...` for what is left out.

    That is the middle: the end of a path names the program.
    """
    parts = [_ESCAPED[byte] for byte in text]
    if sum(map(len, parts)) <= characters_max:
        return "".join(parts)
    room = characters_max - len(CUT)
    head, tail = _fitting(parts, room // 4), _fitting(parts[::-1], room - room // 4)
    return "".join([*head, CUT, *tail[::-1]])


def _fitting(parts: list[str], characters_max: int) -> list[str]:
    """Return as many of them, from the first, as there is room for."""
    length = 0
    for index, part in enumerate(parts):
        length += len(part)
        if length > characters_max:
            return parts[:index]
    return parts
