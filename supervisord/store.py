"""What must outlive the daemon: grants, holds, the history of agents, the next uid slot; in SQLite, in one thread.

Write-ahead log with synchronous=FULL: a call that returned is on the disk. What lives (processes, descriptors) is the
launcher's to know; what happened is the action log's.
"""

import asyncio
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar, cast

from supervisord.budgets import Amounts
from supervisord.definitions import DefinitionRow
from supervisord.errors import ErrorCode, StockadeError
from supervisord.holds import Hold, Kind
from supervisord.ids import AgentId, GrantId
from supervisord.scopes import Ended, Grant

if TYPE_CHECKING:
    from supervisord.terms import JsonValue

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
AGENTS_KEPT_MAX: Final = 10_000
ENDED_GRANTS_KEPT_MAX: Final = 10_000
LIST_ROWS_MAX: Final = 10_000
LABEL_MARKS_KEPT_MAX: Final = 10_000
BUSY_SECONDS: Final = 5.0
INTEGER_MAX: Final = 2**63 - 1
_FILE_MODE: Final = 0o600

# One step for each version; a step that was released is never changed. `user_version` counts the steps done.
MIGRATIONS: Final = (
    """
    CREATE TABLE grants (
        grant_id TEXT PRIMARY KEY, agent_id TEXT NOT NULL, ended TEXT, uses INTEGER NOT NULL,
        boot_id TEXT NOT NULL, record TEXT NOT NULL
    ) STRICT;
    CREATE INDEX grants_agent ON grants (agent_id);
    CREATE TABLE holds (
        hold_id TEXT PRIMARY KEY, kind TEXT NOT NULL, subject TEXT NOT NULL, reason TEXT NOT NULL,
        held_by TEXT NOT NULL, held_at_ns INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE agents (
        agent_id TEXT PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL, started_at_ns INTEGER,
        ended_at_ns INTEGER, record TEXT NOT NULL
    ) STRICT;
    CREATE INDEX agents_name ON agents (name);
    CREATE TABLE postures (agent_id TEXT PRIMARY KEY, live INTEGER NOT NULL, posture TEXT NOT NULL) STRICT;
    CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
    """,
    """
    CREATE TABLE spent (
        agent_id TEXT PRIMARY KEY, llm_tokens INTEGER NOT NULL, cost_microusd INTEGER NOT NULL,
        requests INTEGER NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE definitions (
        name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, text TEXT NOT NULL,
        directory TEXT NOT NULL, registered_by TEXT NOT NULL, registered_at_ns INTEGER NOT NULL,
        deprecated TEXT NOT NULL, deprecated_by TEXT NOT NULL, deprecated_at_ns INTEGER,
        PRIMARY KEY (name, version)
    ) STRICT;
    """,
    """
    CREATE TABLE label_spent (
        label TEXT NOT NULL, period TEXT NOT NULL, since TEXT NOT NULL, llm_tokens INTEGER NOT NULL,
        cost_microusd INTEGER NOT NULL, requests INTEGER NOT NULL, PRIMARY KEY (label, period)
    ) STRICT;
    CREATE TABLE budget_marks (
        subject TEXT NOT NULL, use TEXT NOT NULL, what TEXT NOT NULL, PRIMARY KEY (subject, use, what)
    ) STRICT;
    """,
    """
    ALTER TABLE spent ADD COLUMN egress_bytes INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE label_spent ADD COLUMN egress_bytes INTEGER NOT NULL DEFAULT 0;
    """,
    "ALTER TABLE holds ADD COLUMN ticket TEXT NOT NULL DEFAULT '';",
)

T = TypeVar("T")
_DefinitionRow = tuple[str, int, str, str, str, str, int, str, str, int | None]
_HoldRow = tuple[str, Kind, str, str, str, int, str]


class CannotStore(StockadeError):  # noqa: N818 - read at the raise, as in supervisord.errors
    """The state database did not take or give a record."""

    code: ClassVar[ErrorCode] = ErrorCode.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class AgentRow:
    """One agent's history; `record` is JSON of its owner's making (description, exit, posture, spend)."""

    agent_id: str
    name: str
    state: str
    started_at_ns: int | None
    ended_at_ns: int | None
    record: Mapping[str, object] = field(default_factory=dict)


class Store:
    """The state database; every call runs in its thread, in the order of the calls. All raise CannotStore."""

    def __init__(self, path: Path, database: sqlite3.Connection, executor: ThreadPoolExecutor, boot_id: str) -> None:
        """Use `open`."""
        self._path = path
        self._database = database
        self._executor = executor
        self._boot_id = boot_id
        self._closed = False

    @classmethod
    async def open(cls, path: Path, *, boot_id: str | None = None) -> "Store":
        """The database at `path`, made or brought to this version; `boot_id` is the kernel's unless given."""
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        loop = asyncio.get_running_loop()
        try:
            database = await loop.run_in_executor(executor, _open, path)
            boot = boot_id if boot_id is not None else BOOT_ID.read_text(encoding="ascii").strip()
        except (sqlite3.Error, OSError, _TooNew) as error:
            executor.shutdown(wait=False)
            raise CannotStore(
                f"cannot open the state database {path}: {error}",
                remedy="check the disk; where the file is damaged, bring back a backup (OPERATING) or move it away",
            ) from error
        store = cls(path, database, executor, boot)
        await store.prune()
        return store

    async def close(self) -> None:
        if not self._closed:
            await self._run("close", self._database.close)
            self._closed = True
            self._executor.shutdown(wait=False)

    # --- grants

    async def save_grant(self, grant: Grant) -> None:
        """Insert or replace."""
        values = (
            grant.grant_id,
            grant.agent_id,
            grant.ended.value if grant.ended else None,
            grant.uses,
            self._boot_id,
            json.dumps(grant.to_json()),
        )
        await self._write("save a grant", "INSERT OR REPLACE INTO grants VALUES (?, ?, ?, ?, ?, ?)", [values])

    async def update_uses(self, uses: Mapping[GrantId, int]) -> None:
        """Keep how often grants were used, in one transaction."""
        values = [(count, grant_id) for grant_id, count in uses.items()]
        await self._write("count uses of grants", "UPDATE grants SET uses = max(uses, ?) WHERE grant_id = ?", values)

    async def revoke(self, grant_id: GrantId, why: Ended = Ended.REVOKED) -> None:
        """End a grant; one that ended before keeps its reason."""
        sql = "UPDATE grants SET ended = ? WHERE grant_id = ? AND ended IS NULL"
        await self._write("end a grant", sql, [(why.value, grant_id)])

    async def grants(self) -> list[Grant]:
        """Every grant that is kept, ended ones too, in the order of saving.

        An expiry on the monotonic clock means nothing after a reboot, and no agent survives one: a grant with an expiry
        that was saved in another boot comes back as ended with its agent.
        """
        found = []
        sql = "SELECT record, uses, ended, boot_id FROM grants ORDER BY rowid"
        for record, uses, why, boot_id in await self._read("list grants", sql):
            fields = cast("dict[str, JsonValue]", {**_record("grant", record), "uses": uses, "ended": why})
            grant = Grant.from_json(fields)
            if boot_id != self._boot_id and grant.ended is None and grant.expires_mono is not None:
                grant = replace(grant, ended=Ended.AGENT_ENDED)
            found.append(grant)
        return found

    # --- budgets

    async def save_spent(self, agent_id: AgentId, amounts: Amounts) -> None:
        """Insert or replace what an agent has used of its budget at most."""
        values = (agent_id, *_stored(amounts))
        await self._write("keep what was spent", "INSERT OR REPLACE INTO spent VALUES (?, ?, ?, ?, ?)", [values])

    async def drop_spent(self, agent_id: AgentId) -> None:
        """Forget what an agent has used, and what was said and done about it."""
        await self._write("forget what was spent", "DELETE FROM spent WHERE agent_id = ?", [(agent_id,)])
        await self._write("forget what was said of it", "DELETE FROM budget_marks WHERE subject = ?", [(agent_id,)])

    async def spent(self) -> dict[AgentId, Amounts]:
        rows = await self._read(
            "list what was spent", "SELECT agent_id, llm_tokens, cost_microusd, requests, egress_bytes FROM spent"
        )
        return {AgentId(str(agent_id)): Amounts(*cast("list[int]", amounts)) for agent_id, *amounts in rows}

    async def save_label_spent(self, label: str, period: str, since: str, amounts: Amounts) -> None:
        """Insert or replace what the agents of a label have used of its budget at most, since that period began."""
        sql = "INSERT OR REPLACE INTO label_spent VALUES (?, ?, ?, ?, ?, ?, ?)"
        await self._write("keep what a label spent", sql, [(label, period, since, *_stored(amounts))])

    async def label_spent(self) -> dict[tuple[str, str], tuple[str, Amounts]]:
        """What was used by label and period, and since when."""
        rows = await self._read("list what labels spent", "SELECT * FROM label_spent")
        return {
            (str(label), str(period)): (str(since), Amounts(*cast("list[int]", amounts)))
            for label, period, since, *amounts in rows
        }

    async def save_budget_mark(self, subject: str, use: str, what: str) -> None:
        """Keep that something was said or done about a budget, so that it is not again."""
        sql = "INSERT OR IGNORE INTO budget_marks VALUES (?, ?, ?)"
        await self._write("keep what was done about a budget", sql, [(subject, use, what)])

    async def budget_marks(self) -> set[tuple[str, str, str]]:
        rows = await self._read("list what was done about budgets", "SELECT subject, use, what FROM budget_marks")
        return {(str(subject), str(use), str(what)) for subject, use, what in rows}

    # --- holds

    async def save_hold(self, hold: Hold) -> None:
        values = (hold.hold_id, hold.kind, hold.subject, hold.reason, hold.held_by, hold.held_at_ns, hold.ticket)
        await self._write("save a hold", "INSERT OR REPLACE INTO holds VALUES (?, ?, ?, ?, ?, ?, ?)", [values])

    async def release_hold(self, hold_id: str) -> None:
        await self._write("release a hold", "DELETE FROM holds WHERE hold_id = ?", [(hold_id,)])

    async def holds(self) -> list[Hold]:
        sql = (
            "SELECT hold_id, kind, subject, reason, held_by, held_at_ns, ticket FROM holds ORDER BY held_at_ns, hold_id"
        )
        rows = cast("list[_HoldRow]", await self._read("list holds", sql))
        return [Hold(*row) for row in rows]

    # --- definitions of the registry

    async def save_definition(self, row: DefinitionRow) -> None:
        """Insert, or say that one that is there is deprecated; what it says is never written over."""
        sql = """INSERT INTO definitions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
                 ON CONFLICT (name, version) DO UPDATE SET deprecated = excluded.deprecated,
                 deprecated_by = excluded.deprecated_by, deprecated_at_ns = excluded.deprecated_at_ns
                 WHERE digest = excluded.digest"""
        await self._write("save a definition", sql, [astuple(row)])

    async def definitions(self) -> list[DefinitionRow]:
        rows = await self._read("list definitions", "SELECT * FROM definitions ORDER BY name, version")
        return [DefinitionRow(*cast("_DefinitionRow", row)) for row in rows]

    # --- agents

    async def save_agent(self, row: AgentRow) -> None:
        """Insert or replace."""
        values = (row.agent_id, row.name, row.state, row.started_at_ns, row.ended_at_ns, json.dumps(dict(row.record)))
        await self._write("save an agent", "INSERT OR REPLACE INTO agents VALUES (?, ?, ?, ?, ?, ?)", [values])

    async def agents(self, *, limit: int = 2048) -> list[AgentRow]:
        """The agents saved last, oldest first."""
        sql = f"SELECT * FROM (SELECT rowid AS r, {_AGENT} FROM agents ORDER BY r DESC LIMIT ?) ORDER BY r"  # noqa: S608 - a constant
        rows = await self._read("list agents", sql, min(limit, LIST_ROWS_MAX))
        return [_agent_row(row[1:]) for row in rows]

    async def agent(self, agent_id: str) -> AgentRow | None:
        sql = f"SELECT {_AGENT} FROM agents WHERE agent_id = ?"  # noqa: S608 - a constant
        rows = await self._read("find an agent", sql, agent_id)
        return _agent_row(rows[0]) if rows else None

    # --- postures: which controls were in force when an agent was launched

    async def save_posture(self, agent_id: str, posture: Mapping[str, object], *, live: bool) -> None:
        """Insert or replace."""
        values = (agent_id, int(live), json.dumps(dict(posture)))
        await self._write("save a posture", "INSERT OR REPLACE INTO postures VALUES (?, ?, ?)", [values])

    async def postures(self) -> dict[str, dict[str, object]]:
        """The postures of live agents and of those that ended last, by agent id."""
        sql = "SELECT agent_id, posture FROM postures ORDER BY live DESC, rowid DESC LIMIT ?"
        rows = await self._read("list postures", sql, LIST_ROWS_MAX)
        return {str(agent_id): _record("posture", text) for agent_id, text in rows}

    # --- the rest

    async def next_slot(self, count: int) -> int:
        """The next uid slot below `count`, round and round, so that a range rests long before it is used again."""
        sql = """INSERT INTO counters VALUES ('slot', 0)
                 ON CONFLICT (name) DO UPDATE SET value = (value + 1) % ? RETURNING value"""

        def take() -> int:
            with self._database:
                (value,) = self._database.execute(sql, (count,)).fetchone()
            return int(value) % count

        return await self._run("take a uid slot", take)

    async def backup(self, target: Path) -> None:
        """A consistent copy in `target`, which must not exist."""

        def copy() -> None:
            target.touch(mode=_FILE_MODE, exist_ok=False)
            other = sqlite3.connect(target)
            try:
                self._database.backup(other)
            finally:
                other.close()

        await self._run(f"back up to {target}", copy)

    async def prune(self) -> None:
        """Drop the oldest history beyond what is kept; live grants and agents stay."""

        def drop() -> None:
            with self._database:
                for sql, kept in _PRUNE:
                    self._database.execute(sql, (kept,))

        await self._run("drop old history", drop)

    async def _write(self, what: str, sql: str, rows: Sequence[tuple[object, ...]]) -> None:
        def write() -> None:
            with self._database:
                self._database.executemany(sql, rows)

        await self._run(what, write)

    async def _read(self, what: str, sql: str, *values: str | int) -> list[tuple[object, ...]]:
        return await self._run(what, lambda: self._database.execute(sql, values).fetchall())

    async def _run(self, what: str, job: Callable[[], T]) -> T:
        if self._closed:
            raise CannotStore(f"cannot {what}: the state database is closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, job)
        except (sqlite3.Error, OSError) as error:
            raise CannotStore(
                f"cannot {what} in the state database: {error}", remedy=f"look after the disk of {self._path}"
            ) from error


class _TooNew(Exception):  # noqa: N818 - becomes CannotStore
    pass


_PRUNE: Final = (
    (
        # Of agents that live all are kept: forgotten, a revoked grant of the launch would be given again.
        """DELETE FROM grants WHERE ended IS NOT NULL AND rowid NOT IN
           (SELECT rowid FROM grants WHERE ended IS NOT NULL ORDER BY rowid DESC LIMIT ?)
           AND agent_id NOT IN (SELECT agent_id FROM agents WHERE ended_at_ns IS NULL)""",
        ENDED_GRANTS_KEPT_MAX,
    ),
    (
        """DELETE FROM agents WHERE ended_at_ns IS NOT NULL AND rowid NOT IN
           (SELECT rowid FROM agents WHERE ended_at_ns IS NOT NULL ORDER BY rowid DESC LIMIT ?)""",
        AGENTS_KEPT_MAX,
    ),
    (
        """DELETE FROM spent WHERE agent_id IN (SELECT agent_id FROM agents WHERE ended_at_ns IS NOT NULL)
           AND rowid NOT IN (SELECT rowid FROM spent ORDER BY rowid DESC LIMIT ?)""",
        0,
    ),
    (
        """DELETE FROM budget_marks WHERE subject IN (SELECT agent_id FROM agents WHERE ended_at_ns IS NOT NULL)
           OR (subject LIKE 'label:%' AND rowid NOT IN
           (SELECT rowid FROM budget_marks WHERE subject LIKE 'label:%' ORDER BY rowid DESC LIMIT ?))""",
        LABEL_MARKS_KEPT_MAX,
    ),
    (
        """DELETE FROM postures WHERE live = 0 AND rowid NOT IN
           (SELECT rowid FROM postures WHERE live = 0 ORDER BY rowid DESC LIMIT ?)""",
        AGENTS_KEPT_MAX,
    ),
)
_AGENT: Final = "agent_id, name, state, started_at_ns, ended_at_ns, record"


def _open(path: Path) -> sqlite3.Connection:
    path.touch(mode=_FILE_MODE)
    database = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise _TooNew(f"it is of version {version}, this program knows {len(MIGRATIONS)}")
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            # One transaction, so that a crash leaves the old version or the new one.
            database.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
    except BaseException:
        database.close()
        raise
    return database


def _stored(amounts: Amounts) -> tuple[int, int, int, int]:
    """Amounts as SQLite takes them: its integers end at 2^63, and an amount beyond every budget is as good."""
    return (
        min(amounts.llm_tokens, INTEGER_MAX),
        min(amounts.cost_microusd, INTEGER_MAX),
        min(amounts.requests, INTEGER_MAX),
        min(amounts.egress_bytes, INTEGER_MAX),
    )


def _agent_row(row: tuple[object, ...]) -> AgentRow:
    agent_id, name, state, started, ended, record = row
    return AgentRow(
        str(agent_id),
        str(name),
        str(state),
        started if isinstance(started, int) else None,
        ended if isinstance(ended, int) else None,
        _record("agent", record),
    )


def _record(what: str, text: object) -> dict[str, object]:
    try:
        value = json.loads(str(text))
    except ValueError as error:
        raise CannotStore(f"cannot read the {what} in the state database: {error}") from error
    if not isinstance(value, dict):
        raise CannotStore(f"cannot read the {what} in the state database: it is not an object")
    return value
