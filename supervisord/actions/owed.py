"""What has happened and the log did not take: kept until it does, since nobody can refuse it any more.

A launch or a grant that cannot be recorded is not done. A kill is done all the same, an agent ends, an exec fails: each
is owed to the log. A file in the run directory (a file system of its own) keeps that over a restart of the daemon, not
over one of the host.
"""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from supervisord.actions import encoding
from supervisord.actions.types import Action

log = structlog.get_logger()

RETRY_SECONDS: Final = 1.0
OWED_MAX: Final = 8192
OF_AGENTS_MAX: Final = 4096  # what agents do fills a part: no kill is lost because of it
NOTE_BYTES_MAX: Final = 64 << 20
LOST: Final = "more happened while the log could not be written than is kept: so many entries are lost"
HAPPENED: Final = "happened_at"
_LOST: Final = "lost"
_NS_PER_SECOND: Final = 10**9


class Owed:
    """In memory, and in the file `path`; beyond its bounds it is a number."""

    def __init__(self, path: Path, *, now_ns: Callable[[], int]) -> None:
        self._path = path
        self._now_ns = now_ns
        self._left: list[Action] = []
        self._of_agents = 0
        self._lost = 0
        self._lost_said = 0  # of them, in the file
        self._lines = 0  # in the file
        self._behind = False  # the file lacks something, or ends in a part of a line
        self._tried_ns = 0
        self._taken_up = 0  # of the first, so many are from an earlier daemon
        self.came = asyncio.Event()
        self._take_up()

    def __len__(self) -> int:
        return len(self._left) + bool(self._lost)

    def keep(self, action: Action, *, cause: str) -> None:
        """Owe it, with the time at which it happened: the entry will have that of its recording."""
        log.error("what happened is not in the action log yet", verb=action.verb, agent=action.agent_id, cause=cause)
        self.came.set()
        try:
            action = self._dated(action)
        except (ValueError, TypeError, RecursionError) as error:
            # No log will ever take it, and all that comes after would wait behind it.
            log.error("what happened is no entry", verb=action.verb, cause=str(error))
            self._lost += 1
            return
        if not self._add(action):
            self._lost += 1
        elif self._behind:
            if self._now_ns() - self._tried_ns >= RETRY_SECONDS * _NS_PER_SECOND:
                self.save()
        elif self._lines >= 2 * OWED_MAX:  # most are recorded, as a disk took one now and then
            self._behind = True
            self.save()
        else:
            self._behind = True  # where a part of the line is written, nothing may come behind it
            try:
                self._path.parent.mkdir(mode=0o700, exist_ok=True)
                _write(self._path, [action])
            except OSError as error:
                self._failed(error)
            else:
                self._behind = False
                self._lines += 1
        if self._behind and not _is_of_agent(action):
            # The journal is then what remains of it, where the daemon dies before there is room.
            log.error("what is not in the action log yet is in memory alone", entry=asdict(action))

    def save(self) -> None:
        """Have the file say what is owed and how much is lost: its disk may have room again."""
        if self._behind:
            self._write_anew()
        elif self._lost != self._lost_said:
            self._behind = True
            try:
                self._path.parent.mkdir(mode=0o700, exist_ok=True)
                _write_line(self._path, {_LOST: self._lost - self._lost_said})
            except OSError as error:
                self._failed(error)
            else:
                self._behind, self._lost_said, self._lines = False, self._lost, self._lines + 1

    def _write_anew(self) -> None:
        """Have the file say all of it, or what it said."""
        fresh = self._path.with_suffix(".new")
        try:
            if self:
                self._path.parent.mkdir(mode=0o700, exist_ok=True)
                fresh.unlink(missing_ok=True)
                _write(fresh, self._left)
                _write_line(fresh, {_LOST: self._lost})
                fresh.replace(self._path)
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)  # it takes the room that the next try needs
            self._failed(error)
        else:
            self._behind, self._lines, self._lost_said = False, len(self._left) + 1, self._lost

    async def leave_out(self, recorded: Callable[[Action], Awaitable[bool]]) -> None:
        """Forget what an earlier daemon recorded and died before it could forget it: the first ones, in their order."""
        low, high = 0, self._taken_up
        while low < high:
            middle = (low + high) // 2
            if await recorded(self._left[middle]):
                low = middle + 1
            else:
                high = middle
        self._taken_up = 0
        if low:
            self.paid(self._left[:low])

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
            self._behind = True
        if not self:
            self.came.clear()
            self._behind = True
            self.save()

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
                data = file.read(NOTE_BYTES_MAX)
        except FileNotFoundError:
            return
        except OSError as error:
            log.error("cannot read what is owed to the action log", path=str(self._path), cause=str(error))
            return
        lines = data.splitlines()
        self._lines = len(lines)
        self._behind = not data.endswith(b"\n")
        for line in lines:
            try:
                value = json.loads(line)
                if _LOST in value:
                    self._lost += int(value[_LOST])
                    self._lost_said = self._lost
                    continue
                action = Action(**value)
            except (ValueError, TypeError) as error:  # one whose writing a crash or a full disk cut off
                log.error("cannot read an entry that is owed to the action log", cause=str(error))
                self._lost += 1
            else:
                self._lost += not self._add(action)
        self._taken_up = len(self._left)
        if self:
            self.came.set()

    def _dated(self, action: Action) -> Action:
        """As an entry holds it, with the time at which it happened, which tells it from all others."""
        at = datetime.fromtimestamp(self._now_ns() / _NS_PER_SECOND, UTC).isoformat(timespec="microseconds")
        happened = {HAPPENED: at.replace("+00:00", "Z")}
        _, action = encoding.encode(0, 0, replace(action, details={**action.details, **happened}))
        return replace(action, details={**action.details, **happened})  # also where the details had to be cut

    def _failed(self, error: OSError) -> None:
        self._tried_ns = self._now_ns()
        log.error("what is owed to the action log is in memory alone", path=str(self._path), cause=str(error))


def _write(path: Path, actions: Sequence[Action]) -> None:
    with path.open("a", encoding="ascii") as file:
        file.writelines(json.dumps(asdict(action)) + "\n" for action in actions)


def _write_line(path: Path, value: dict[str, int]) -> None:
    with path.open("a", encoding="ascii") as file:
        file.write(json.dumps(value) + "\n")


def _is_of_agent(action: Action) -> bool:
    return action.actor.startswith("agent:")
