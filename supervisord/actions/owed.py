"""What has happened and the log did not take: kept until it does, since nobody can refuse it any more.

A launch or a grant that cannot be recorded is not done. A kill is done all the same, an agent ends, an exec fails: each
is owed to the log. A file in the run directory (a file system of its own) keeps that over a restart of the daemon, not
over one of the host.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from supervisord.actions.types import Action

log = structlog.get_logger()

RETRY_SECONDS: Final = 1.0
OWED_MAX: Final = 8192
OF_AGENTS_MAX: Final = 4096  # what agents do fills a part: no kill is lost because of it
NOTE_BYTES_MAX: Final = 64 << 20
LOST: Final = "more happened while the log could not be written than is kept: so many entries are lost"
_NS_PER_SECOND: Final = 10**9


class Owed:
    """In memory, and in the file `path`; beyond its bounds it is a number."""

    def __init__(self, path: Path, *, now_ns: Callable[[], int]) -> None:
        self._path = path
        self._now_ns = now_ns
        self._left: list[Action] = []
        self._of_agents = 0
        self._lost = 0
        self._lines = 0  # in the file
        self.came = asyncio.Event()
        self._take_up()

    def __len__(self) -> int:
        return len(self._left) + bool(self._lost)

    def keep(self, action: Action, *, cause: str) -> None:
        """Owe it, with the time at which it happened: the entry will have that of its recording."""
        log.error("what happened is not in the action log yet", verb=action.verb, agent=action.agent_id, cause=cause)
        self.came.set()
        at = datetime.fromtimestamp(self._now_ns() / _NS_PER_SECOND, UTC).isoformat(timespec="milliseconds")
        action = replace(action, details={**action.details, "happened_at": at.replace("+00:00", "Z")})
        if not self._add(action):
            self._lost += 1
            return
        try:
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            if self._lines >= 2 * OWED_MAX:  # most are recorded, as a disk took one now and then
                fresh = self._path.with_suffix(".new")
                fresh.unlink(missing_ok=True)
                _write(fresh, self._left)
                fresh.replace(self._path)
                self._lines = len(self._left)
            else:
                _write(self._path, [action])
                self._lines += 1
        except OSError as error:
            log.error("what is owed to the action log is in memory alone", path=str(self._path), cause=str(error))

    def next(self, most: int) -> Sequence[Action]:
        """Return what is to be recorded first; at last how much more there was than is kept."""
        return self._left[:most] or [
            Action("", "daemon", "log.lost", "action log", "failed", LOST, {"times": self._lost})
        ]

    def paid(self, actions: Sequence[Action]) -> None:
        """These, which `next` returned, are recorded; where the daemon dies before all are, that is done again."""
        if self._left and self._left[0] is actions[0]:
            del self._left[: len(actions)]
            self._of_agents -= sum(map(_is_of_agent, actions))
        else:
            self._lost -= int(str(actions[0].details["times"]))
        if not self:
            self.came.clear()
            self._path.unlink(missing_ok=True)
            self._lines = 0

    def _add(self, action: Action) -> bool:
        of_agent = _is_of_agent(action)
        if len(self._left) >= OWED_MAX or (of_agent and self._of_agents >= OF_AGENTS_MAX):
            return False
        self._of_agents += of_agent
        self._left.append(action)
        return True

    def _take_up(self) -> None:
        """Go on with what an earlier daemon owed."""
        try:
            with self._path.open("rb") as file:
                lines = file.read(NOTE_BYTES_MAX).splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            log.error("cannot read what is owed to the action log", path=str(self._path), cause=str(error))
            return
        self._lines = len(lines)
        for line in lines:
            try:
                action = Action(**json.loads(line))
            except (ValueError, TypeError) as error:  # one whose writing a crash or a full disk cut off
                log.error("cannot read an entry that is owed to the action log", cause=str(error))
                self._lost += 1
            else:
                self._lost += not self._add(action)
        if self:
            self.came.set()


def _write(path: Path, actions: Sequence[Action]) -> None:
    with path.open("a", encoding="ascii") as file:
        file.writelines(json.dumps(asdict(action)) + "\n" for action in actions)


def _is_of_agent(action: Action) -> bool:
    return action.actor.startswith("agent:")
