"""Ends of grants that are in force and may not be written down yet: a full disk must not give a scope back.

An end counts in memory first, then here. Where state database or action log cannot take it, a note in the run
directory (a file system of its own, and gone with the agents at a reboot) keeps it over a restart of the daemon, and
both are tried again until they have it.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import structlog

from supervisord.actions.types import Action
from supervisord.errors import InvalidInput, StockadeError
from supervisord.scopes import Grant

if TYPE_CHECKING:
    from pathlib import Path

    from supervisord.actions.log import ActionLog
    from supervisord.ids import GrantId
    from supervisord.store import Store

log = structlog.get_logger()

RETRY_SECONDS: Final = 1.0
NOTE_BYTES_MAX: Final = 1 << 20


@dataclass(slots=True)
class Unwritten:
    """An end, and where it is still to be written."""

    grant: Grant
    action: Action
    stored: bool = False
    recorded: bool = False

    @property
    def missing(self) -> str:
        places = [name for name, done in (("state database", self.stored), ("action log", self.recorded)) if not done]
        return " and ".join(places)


class Endings:
    """Writes ends of grants down, however long it takes."""

    def __init__(self, *, store: Store, actions: ActionLog, directory: Path) -> None:
        self._store = store
        self._actions = actions
        self._directory = directory
        self._left: dict[GrantId, Unwritten] = {}
        self._came = asyncio.Event()

    async def write(self, grant: Grant, action: Action) -> str:
        """Write an end that is in force down. Gives where that failed and is tried again; empty where it is done."""
        end = self._left.get(grant.grant_id) or Unwritten(grant, action)
        await self._try(end)
        if end.missing:
            self._left[grant.grant_id] = end
            self._note(end)
            self._came.set()
        return end.missing

    def unwritten(self) -> list[Grant]:
        """The ends that the state database may not have."""
        return [end.grant for end in self._left.values()]

    def take_up(self) -> None:
        """Try again from now on what an earlier daemon could not write."""
        for path in sorted(self._directory.iterdir()) if self._directory.is_dir() else ():
            try:
                with path.open("rb") as file:
                    kept = json.loads(file.read(NOTE_BYTES_MAX))
                grant = Grant.from_json(kept["grant"])
                end = Unwritten(grant, Action(**kept["action"]), bool(kept["stored"]), bool(kept["recorded"]))
            except (OSError, ValueError, KeyError, TypeError, InvalidInput) as error:
                log.error("cannot read the note of an ended grant", path=str(path), cause=str(error))
                continue
            self._left[grant.grant_id] = end
            self._came.set()

    async def retry_forever(self) -> None:
        """Try again what could not be written; runs as long as the daemon."""
        while True:
            await self._came.wait()
            await asyncio.sleep(RETRY_SECONDS)
            for end in list(self._left.values()):
                try:
                    await self._try(end)
                except Exception:
                    log.exception("an ended grant is not written down", grant=end.grant.grant_id)
                if not end.missing:
                    del self._left[end.grant.grant_id]
                    (self._directory / end.grant.grant_id).unlink(missing_ok=True)
            if not self._left:
                self._came.clear()

    async def _try(self, end: Unwritten) -> None:
        try:
            if not end.stored:
                await self._store.save_grant(end.grant)
                end.stored = True
            if not end.recorded:
                await self._actions.record(end.action)
                end.recorded = True
        except StockadeError as error:
            log.error("an ended grant is not written down yet", grant=end.grant.grant_id, cause=error.message)

    def _note(self, end: Unwritten) -> None:
        value = {
            "grant": end.grant.to_json(),
            "action": asdict(end.action),
            "stored": end.stored,
            "recorded": end.recorded,
        }
        path = self._directory / end.grant.grant_id
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            temporary = self._directory.with_name(f"{self._directory.name}.new")
            temporary.write_text(json.dumps(value))
            temporary.replace(path)
        except OSError as error:
            log.error("an ended grant is kept in memory alone", grant=end.grant.grant_id, cause=str(error))
