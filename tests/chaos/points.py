"""Where the next `kill -9` falls, from a seed and a number alone (pure): so a run can be gone on with at any point."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Deed(StrEnum):
    """What is under way when somebody dies."""

    LAUNCH = "launch"
    GRANT = "grant"
    EGRESS = "egress"
    APPEND = "append"


class Victim(StrEnum):
    DAEMON = "daemon"
    LAUNCHER = "launcher"
    WORKER = "egress-w1"
    DIALER = "egress-dialer"
    GATEWAY = "gateway"
    WRITER = "log writer"  # a process that writes a log and does nothing else: so it dies while it writes


DELAY_SECONDS_MAX: Final = 0.15
# The daemon has most to lose; the others are there so that each meets each deed often.
_VICTIMS: Final = {
    Deed.LAUNCH: (Victim.DAEMON,) * 6 + (Victim.LAUNCHER,) * 3 + (Victim.WORKER,),
    Deed.GRANT: (Victim.DAEMON,) * 7 + (Victim.LAUNCHER, Victim.WORKER, Victim.DIALER),
    Deed.EGRESS: (Victim.DAEMON,) * 5 + (Victim.WORKER, Victim.DIALER, Victim.GATEWAY) + (Victim.LAUNCHER,),
    Deed.APPEND: (Victim.WRITER,),
}


@dataclass(frozen=True, slots=True)
class Point:
    number: int
    deed: Deed
    victim: Victim
    delay_seconds: float

    def describe(self) -> str:
        return f"{self.number}: {self.deed}, {self.victim} dies after {self.delay_seconds * 1000:.1f} ms"


def point(seed: int, number: int) -> Point:
    """The same for the same two numbers, whatever came before."""
    dice = random.Random(f"{seed}/{number}")  # noqa: S311 - not a secret: to be repeated is what it is for
    deed = dice.choice(list(Deed))
    return Point(number, deed, dice.choice(_VICTIMS[deed]), dice.uniform(0, DELAY_SECONDS_MAX))
