"""The registry: definitions by name and version, which never change, kept in the store and told to the action log."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

import structlog

from supervisord.actions.types import Action
from supervisord.definitions import Definition, DefinitionRow, choose, read_reference
from supervisord.errors import Conflict, Exhausted, InvalidInput, StockadeError
from supervisord.policy import AgentSpec

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from supervisord.actions.types import JSON, Entry
    from supervisord.store import Store

log = structlog.get_logger()

DEFINITIONS_MAX: Final = 4096


class Registry:
    """Every definition. `read` gives the agent of a text, as `PolicyShelf.check` does."""

    def __init__(
        self,
        rows: Sequence[DefinitionRow],
        *,
        store: Store,
        record: Callable[[Action], Awaitable[Entry]],
        read: Callable[[str, str, PurePosixPath | None], AgentSpec],
        now_ns: Callable[[], int],
    ) -> None:
        self._store = store
        self._record = record
        self._read = read
        self._now_ns = now_ns
        self._lock = asyncio.Lock()
        self._rows: dict[str, dict[int, DefinitionRow]] = {}
        # What their texts say, read when somebody asks: all at a start would keep agents waiting for the daemon.
        self._opened: dict[str, Definition] = {}
        for row in rows:
            self._rows.setdefault(row.name, {})[row.version] = row

    def rows(self, name: str = "") -> list[DefinitionRow]:
        """As they are kept, by name, then version; those of one name where it is given."""
        names = [name] if name else sorted(self._rows)
        return [versions[each] for key in names if (versions := self._rows.get(key)) for each in sorted(versions)]

    async def definitions(self, rows: Sequence[DefinitionRow]) -> list[Definition]:
        """What these say; in a thread, since each text takes some milliseconds to read."""
        unread = [row for row in rows if row.reference not in self._opened]
        if unread:
            for definition in await asyncio.to_thread(lambda: [self._read_row(row) for row in unread]):
                self._opened.setdefault(definition.reference, definition)
        # The rows as they are now: one may have been deprecated meanwhile.
        return [self._definition(self._rows[row.name][row.version]) for row in rows]

    def find(self, reference: str) -> Definition:
        """The definition of `NAME[@VERSION]`; raises NotFound or InvalidInput."""
        name, version = read_reference(reference)
        return self._definition(choose(self.rows(name), name, version))

    def get(self, reference: str) -> Definition | None:
        """The definition of `NAME@VERSION`, where the registry has it."""
        name, _, version = reference.partition("@")
        row = self._rows.get(name, {}).get(int(version)) if version.isdecimal() else None
        return None if row is None else self._definition(row)

    async def add(self, text: str, spec: AgentSpec, *, directory: str, actor: str) -> tuple[Definition, bool]:
        """Take a definition in, or find it there; `spec` is what `text` says. Raises Conflict, Exhausted, CannotRecord.

        The same file with a relative workspace, in another directory, is another agent.
        """
        row = DefinitionRow(
            name=spec.name,
            version=spec.version,
            digest=spec.digest,
            text=text,
            directory=directory,
            registered_by=actor,
            registered_at_ns=self._now_ns(),
            deprecated=spec.deprecated,
            deprecated_by=actor if spec.deprecated else "",
            deprecated_at_ns=self._now_ns() if spec.deprecated else None,
        )
        async with self._lock:
            known = self._rows.get(spec.name, {}).get(spec.version)
            if known is not None:
                return self._same(self._definition(known), spec), True
            if sum(map(len, self._rows.values())) >= DEFINITIONS_MAX:
                raise Exhausted(
                    f"cannot register {row.reference}: the registry has {DEFINITIONS_MAX} definitions",
                    remedy="use the names that are there; a definition is for a kind of agent, not for each launch",
                )
            await self._write("registry.add", row, actor=actor, reason="")
            self._rows.setdefault(row.name, {})[row.version] = row
            self._opened[row.reference] = Definition(row, spec)
        return self._definition(row), False

    async def deprecate(self, reference: str, *, actor: str, reason: str) -> Definition:
        """Say why a version should not be launched any more; raises NotFound, Conflict, CannotRecord."""
        name, version = read_reference(reference)
        if version is None:
            raise InvalidInput(
                f"cannot deprecate {name}: which version is not said",
                remedy=f"write {name}@VERSION; `stockadectl registry list {name}` shows them",
            )
        if not reason:
            raise InvalidInput(f"cannot deprecate {reference}: there is no reason", remedy="say why with --reason")
        async with self._lock:
            known = choose(self.rows(name), name, version)
            if known.deprecated:
                raise Conflict(
                    f"cannot deprecate {reference}: it is deprecated already, by {known.deprecated_by}",
                    remedy="register another version to bring it back",
                )
            row = replace(known, deprecated=reason, deprecated_by=actor, deprecated_at_ns=self._now_ns())
            await self._write("registry.deprecate", row, actor=actor, reason=reason)
            self._rows[row.name][row.version] = row
        return self._definition(row)

    async def _write(self, verb: str, row: DefinitionRow, *, actor: str, reason: str) -> None:
        """Record the act, do it, and record where it could not be done."""
        details: dict[str, JSON] = {"name": row.name, "version": row.version, "digest": row.digest}
        await self._record(Action("", actor, verb, row.reference, "done", reason, details))
        try:
            await self._store.save_definition(row)
        except StockadeError as error:
            await self._record(Action("", actor, verb, row.reference, "failed", error.message, details))
            raise

    def _same(self, known: Definition, spec: AgentSpec) -> Definition:
        if known.row.digest == spec.digest and known.spec.workspace == spec.workspace:
            return known
        newest = max(self._rows[spec.name])
        raise Conflict(
            f"cannot register {known.reference}: the registry has it with another content ({known.row.digest})",
            remedy=f"a version never changes: give this one `version: {newest + 1}`",
        )

    def _definition(self, row: DefinitionRow) -> Definition:
        known = self._opened.get(row.reference)
        if known is None or known.row != row:
            # A version never changes but in what is said of it: its text is read once.
            known = self._read_row(row) if known is None else replace(known, row=row)
            self._opened[row.reference] = known
        return known

    def _read_row(self, row: DefinitionRow) -> Definition:
        """A kept row with what it says; one that this version of the program cannot read is kept, and refused."""
        directory = PurePosixPath(row.directory) if row.directory else None
        try:
            spec = self._read(row.text, row.reference, directory)
            if spec.digest != row.digest:
                raise InvalidInput(f"its text is not what was registered, which is {row.digest}")
            return Definition(row, spec)
        except StockadeError as error:
            log.error("a registered definition cannot be used", definition=row.reference, cause=error.message)
            return Definition(row, AgentSpec(name=row.name, version=row.version, digest=row.digest), error.message)
