"""An index over the segments for queries: a thread with an SQLite file that can be thrown away and is rebuilt.

Rows say where an entry lies; what a query returns is read from the segments and checked against its hash, so a
tampered index can hide entries from a query, never change one. `verify` does not use it.
"""

import contextlib
import json
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final, TypeVar

from supervisord.actions import encoding, redaction, segments
from supervisord.actions.files import INDEX, segment_paths
from supervisord.actions.merkle import node_hash
from supervisord.actions.types import CannotReadLog, Entry
from supervisord.errors import Conflict, NotFound

LIMIT_MAX: Final = 10_000
QUEUE_ROWS_MAX: Final = 100_000  # beyond it rows are read from the segments again
BATCH_ROWS_MAX: Final = 5_000
GATHER_SECONDS: Final = 0.02
RETRY_SECONDS: Final = 0.5
OPEN_FILES_MAX: Final = 16
READ_BYTES: Final = 1024  # most entries fit
FRAME_BYTES_MAX: Final = segments.FRAME_HEADER_BYTES + segments.PAYLOAD_BYTES_MAX
# Roots of complete subtrees of 2**TILE_LEVEL leaves are stored, so that a proof reads few leaves.
TILE_LEVEL: Final = 8
_VERSION: Final = 2
_SCHEMA: Final = f"""
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY, time_ns INTEGER NOT NULL, agent_id BLOB NOT NULL, verb BLOB NOT NULL,
    verdict BLOB NOT NULL, segment INTEGER NOT NULL, offset INTEGER NOT NULL, leaf BLOB NOT NULL
);
CREATE INDEX entries_agent ON entries (agent_id, seq);
CREATE INDEX entries_verb ON entries (verb, seq);
CREATE TABLE tiles (number INTEGER PRIMARY KEY, hash BLOB NOT NULL);
CREATE TABLE subtrees (level INTEGER NOT NULL, number INTEGER NOT NULL, hash BLOB NOT NULL,
    PRIMARY KEY (level, number));
PRAGMA user_version = {_VERSION};
"""

# Rows go in many a statement: each statement lets go of Python's lock once, and with one for each row the threads that
# record and the index's would hand it to and fro at every entry.
INSERT_ROWS: Final = 128
_VALUES: Final = "(?, ?, ?, ?, ?, ?, ?, ?)"
_INSERT: Final = f"INSERT INTO entries VALUES {_VALUES}"  # noqa: S608 - question marks only
_INSERT_MANY: Final = f"INSERT INTO entries VALUES {', '.join([_VALUES] * INSERT_ROWS)}"  # noqa: S608 - as above

Row = tuple[int, int, bytes, bytes, bytes, int, int, bytes]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for; None is anything. A verb that ends in a dot is a prefix; one without a dot is that too."""

    agent_id: str | None = None
    verb: str | None = None
    verdict: str | None = None
    since_ns: int | None = None
    until_ns: int | None = None
    after_seq: int = 0
    newest_first: bool = False
    limit: int = 1000
    agent_ids: frozenset[str] | None = None  # any of these

    def sql(self) -> tuple[str, list[bytes | int | str]]:
        where, values = ["seq > ?", "segment > 0"], list[bytes | int | str]([self.after_seq])
        for column, text in (("agent_id", self.agent_id), ("verdict", self.verdict)):
            if text is not None:
                where.append(f"{column} = ?")
                values.append(encoding.to_bytes(text))
        if self.verb is not None:
            word = encoding.to_bytes(self.verb.removesuffix("."))
            ways = ["verb = ?"] if not self.verb.endswith(".") else []
            values += (word for _ in ways)
            if b"." not in word or not ways:
                ways.append("verb >= ? AND verb < ?")
                values += (word + b".", word + b"/")  # "/" follows "." in ASCII
            where.append(f"({' OR '.join(ways)})")
        if self.agent_ids is not None:
            # One value, however many: a statement has room for some thousand.
            where.append("agent_id IN (SELECT CAST(value AS BLOB) FROM json_each(?))")
            values.append(json.dumps(sorted(self.agent_ids)))
        for condition, number in (("time_ns >= ?", self.since_ns), ("time_ns < ?", self.until_ns)):
            if number is not None:
                where.append(condition)
                values.append(number)
        order = "DESC" if self.newest_first else "ASC"
        values.append(max(0, min(self.limit, LIMIT_MAX)))
        # Only fixed words and question marks are put together here.
        sql = f"SELECT seq, segment, offset FROM entries WHERE {' AND '.join(where)} ORDER BY seq {order} LIMIT ?"  # noqa: S608
        return sql, values


def verb_fits(verb: str, wanted: str) -> bool:
    """What `Query` does, for one verb; an empty word is anything."""
    if wanted.endswith("."):
        return verb.startswith(wanted)
    return wanted in ("", verb) or ("." not in wanted and verb.startswith(f"{wanted}."))


class Index:
    """The index's thread. `add` never blocks on it; `run` answers once it has seen everything added before."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._condition = threading.Condition()
        self._rows: deque[Row] = deque()
        self._jobs: deque[tuple[int, Callable[[], None], Callable[[BaseException], None]]] = deque()
        self._size = 0  # entries in the log
        self._stop = False
        self._files: dict[int, int] = {}
        self._database: sqlite3.Connection | None = None
        self._indexed = 0
        self._base = 0  # entries before the first segment that there was when this index began
        self._thread = threading.Thread(target=self._work, name="log-index", daemon=True)

    def start(self, size: int) -> None:
        self._size = size
        self._thread.start()

    def add(self, rows: Sequence[Row]) -> None:
        """Rows of entries that are in the file now, in order."""
        with self._condition:
            idle = not self._rows
            self._size = rows[-1][0]
            if len(self._rows) < QUEUE_ROWS_MAX:
                self._rows.extend(rows)
            if idle:
                self._condition.notify()

    def run(self, job: Callable[[], T]) -> "Future[T]":
        """The job's result, run in the index's thread when all entries added so far are indexed."""
        future: Future[T] = Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except Exception as error:  # noqa: BLE001 - handed to whoever waits for the future
                    future.set_exception(error)

        def fail(error: BaseException) -> None:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

        with self._condition:
            if self._stop:
                raise CannotReadLog("cannot query the action log: it is closed")
            self._jobs.append((self._size, work, fail))
            self._condition.notify()
        return future

    def close(self) -> None:
        with self._condition:
            self._stop = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

    # In the thread from here on.

    def entries(self, query: Query) -> list[Entry]:
        sql, values = query.sql()
        return [self._read(*row) for row in self._sql(sql, values)]

    def payload(self, seq: int) -> bytes:
        """An entry's canonical bytes."""
        (row,) = self._sql("SELECT segment, offset, 0 FROM entries WHERE seq = ?", [seq])
        self._read(seq, row[0], row[1])
        frame = self._frame(row[0], row[1])
        if frame.kind is segments.Kind.REDACTED:
            order = segments.mark_of(frame).order
            raise Conflict(
                f"cannot prove entry {seq}: its content was redacted, as entry {order} orders",
                remedy="proofs that were taken before still hold, and `log verify` still covers its hash",
            )
        return frame.payload

    def frame(self, seq: int) -> segments.Frame:
        """The frame of an entry as it is in its segment."""
        segment, offset = self._place(seq)
        return self._frame(segment, offset)

    def redacted(self, seq: int, time_ns: int) -> None:
        """Have an entry's row say what is left of it, and its segment be opened anew: it is another file now."""
        if self._database is None:
            raise CannotReadLog("cannot redact an entry in the index: it is not open")
        segment, _ = self._place(seq)
        if segment in self._files:
            os.close(self._files.pop(segment))
        word = encoding.to_bytes(redaction.REDACTED)
        self._database.execute(
            "UPDATE entries SET time_ns = ?, agent_id = x'', verb = ?, verdict = ? WHERE seq = ?",
            [time_ns, word, word, seq],
        )

    def retire(self, last_seq: int) -> None:
        """Forget what the entries up to `last_seq` said; their hashes stay, for proofs."""
        if self._database is None:
            raise CannotReadLog("cannot retire entries: the index is not open")
        self._database.execute(
            "UPDATE entries SET segment = 0, offset = 0, time_ns = 0, agent_id = x'', verb = x'', verdict = x'' "
            "WHERE seq <= ? AND segment > 0",
            [last_seq],
        )
        for segment in [each for each in self._files if each <= last_seq]:
            os.close(self._files.pop(segment))

    def node(self, level: int, index: int) -> bytes:
        """The root of a complete subtree, for `merkle`."""
        if (index << level) < self._base:
            found = self._sql("SELECT hash FROM subtrees WHERE level = ? AND number = ?", [level, index])
            if found:
                return bytes(found[0][0])
        if level > TILE_LEVEL or (level and index << level < self._base < index + 1 << level):
            return node_hash(self.node(level - 1, 2 * index), self.node(level - 1, 2 * index + 1))
        if level == TILE_LEVEL:
            found = self._sql("SELECT hash FROM tiles WHERE number = ?", [index])
            if found:
                return bytes(found[0][0])
        first, count = (index << level) + 1, 1 << level
        rows = self._sql("SELECT leaf FROM entries WHERE seq >= ? AND seq < ? ORDER BY seq", [first, first + count])
        if len(rows) != count:
            raise CannotReadLog(f"cannot prove an entry: the index lacks entries near {first}", remedy="restart")
        hashes = [bytes(row[0]) for row in rows]
        while len(hashes) > 1:
            hashes = [node_hash(hashes[at], hashes[at + 1]) for at in range(0, len(hashes), 2)]
        return hashes[0]

    def _work(self) -> None:
        try:
            while True:
                try:
                    self._open()
                    while self._step():
                        pass
                except (sqlite3.Error, OSError, segments.Damaged, CannotReadLog) as error:
                    # Recording goes on, it does not need the index; queries fail until this thread succeeds again.
                    self._fail_jobs(f"its index failed: {error}")
                    self._discard(damaged=type(error) is sqlite3.DatabaseError)
                    with self._condition:
                        if self._condition.wait_for(lambda: self._stop, timeout=RETRY_SECONDS):
                            break
                else:
                    break
        finally:
            self._fail_jobs("it is closed")
            self._discard(damaged=False)
            for fd in self._files.values():
                os.close(fd)

    def _fail_jobs(self, cause: str) -> None:
        with self._condition:
            jobs = list(self._jobs)
            self._jobs.clear()
            self._rows.clear()  # they are read from the segments when the index works again
        for _, _, fail in jobs:
            fail(CannotReadLog(f"cannot query the action log: {cause}", remedy=f"look after {self._directory}"))

    def _discard(self, *, damaged: bool) -> None:
        """Close the database, and remove it where it is damaged: it is made again from the segments."""
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None
        if damaged:
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    (self._directory / (INDEX + suffix)).unlink()

    def _step(self) -> bool:
        with self._condition:
            self._condition.wait_for(lambda: self._rows or self._jobs or self._stop or self._indexed < self._size)
            if not self._jobs and not self._stop:
                # Gather: one transaction for many rows, and fewer switches away from the threads that record.
                self._condition.wait_for(lambda: self._jobs or self._stop, timeout=GATHER_SECONDS)
            rows = [self._rows.popleft() for _ in range(min(len(self._rows), BATCH_ROWS_MAX))]
            jobs = [self._jobs.popleft() for _ in range(len(self._jobs)) if self._jobs[0][0] <= self._indexed]
            stop = self._stop and not rows and not jobs and not self._jobs
            size = self._size
        for _, work, _ in jobs:
            work()
        if rows and rows[0][0] <= self._indexed:
            rows = [row for row in rows if row[0] > self._indexed]
        if rows and rows[0][0] == self._indexed + 1:
            self._insert(rows)
        elif rows or (not self._rows and self._indexed < size):
            self._catch_up()
        return not stop

    def _open(self) -> None:
        path = self._directory / INDEX
        try:
            self._database = self._connect(path)
            (self._indexed,) = self._database.execute("SELECT coalesce(max(seq), 0) FROM entries").fetchone()
        except sqlite3.OperationalError:
            raise  # a full disk, say: there is nothing wrong with the file
        except sqlite3.DatabaseError:
            self._indexed = -1
        if not 0 <= self._indexed <= self._size:
            # Damaged, of another version, or of entries that a crash took: begin again.
            self._discard(damaged=True)
            self._database = self._connect(path)
            self._indexed = 0
        self._begin_behind_retired()

    def _begin_behind_retired(self) -> None:
        """Where a new index finds no first segments: their subtrees are in the header of the first that there is."""
        database, paths = self._database, segment_paths(self._directory)
        if database is None or not paths:
            return
        if self._indexed == 0 and paths[0][0] > 1:
            tree = segments.parse_header(paths[0][1].read_bytes()).tree()
            at = 0
            for level in reversed(range(tree.size.bit_length())):
                if tree.size >> level & 1:
                    root = tree.hashes[(tree.size >> level + 1).bit_count()]
                    database.execute("INSERT OR REPLACE INTO subtrees VALUES (?, ?, ?)", (level, at >> level, root))
                    at += 1 << level
            self._indexed = tree.size
        (self._base,) = database.execute("SELECT coalesce(max((number + 1) << level), 0) FROM subtrees").fetchone()
        self._indexed = max(self._indexed, self._base)
        if paths[0][0] > 1:
            last_seq = paths[0][0] - 1
            if self._sql("SELECT segment, 0, 0 FROM entries WHERE seq = ? AND segment > 0", [last_seq]):
                self.retire(last_seq)  # a crash came between the entry and this

    def _connect(self, path: Path) -> sqlite3.Connection:
        path.touch(mode=0o600)
        database = sqlite3.connect(path, isolation_level=None)
        database.execute("PRAGMA synchronous = OFF")  # it can be rebuilt
        database.execute("PRAGMA journal_mode = WAL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            database.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
        elif version != _VERSION:
            database.close()
            raise sqlite3.DatabaseError("another version")
        return database

    def _sql(self, sql: str, values: Sequence[bytes | int | str] = ()) -> list[tuple[int, int, int]]:
        if self._database is None:
            raise CannotReadLog("cannot query the action log: its index is not open")
        return self._database.execute(sql, values).fetchall()

    def _insert(self, rows: list[Row]) -> None:
        database = self._database
        if database is None:
            raise CannotReadLog("cannot index the action log: its index is not open")
        database.execute("BEGIN")
        whole = len(rows) - len(rows) % INSERT_ROWS
        for at in range(0, whole, INSERT_ROWS):
            database.execute(_INSERT_MANY, list(chain.from_iterable(rows[at : at + INSERT_ROWS])))
        database.executemany(_INSERT, rows[whole:])
        last = rows[-1][0]
        for number in range(self._indexed >> TILE_LEVEL, last >> TILE_LEVEL):
            database.execute("INSERT INTO tiles VALUES (?, ?)", (number, self.node(TILE_LEVEL, number)))
        database.execute("COMMIT")
        self._indexed = last

    def _catch_up(self) -> None:
        """Index what the queue no longer holds, or what was recorded before this index began, a batch at a time."""
        wanted = self._indexed + 1
        start = [(first, path) for first, path in segment_paths(self._directory) if first <= wanted][-1:]
        if not start:
            raise CannotReadLog(f"cannot index entry {wanted}: there is no segment that holds it")
        first, path = start[0]
        rows: list[Row] = []
        data = path.read_bytes()
        seq = first - 1
        try:
            for frame in segments.frames(data, segments.parse_header(data).length):
                if frame.kind is segments.Kind.CHECKPOINT:
                    continue
                seq += 1
                if seq < wanted:
                    continue
                rows.append(_row(seq, first, frame))
        except segments.Damaged as error:
            # The writer may be in the middle of the last frame; anything else shows as no progress.
            if not error.torn or not rows:
                raise
        except encoding.NotCanonical as error:
            raise CannotReadLog(f"cannot index entry {seq}: {error}") from error
        if not rows:
            raise CannotReadLog(f"cannot index entry {wanted}: it is not in {path.name}", remedy="run log verify")
        self._insert(rows)

    def _frame(self, segment: int, offset: int) -> segments.Frame:
        fd = self._file(segment)
        data = os.pread(fd, READ_BYTES, offset)
        try:
            return segments.frame_at(data, 0, base=offset)
        except segments.Damaged as error:
            if not error.torn or len(data) < READ_BYTES:
                raise
        return segments.frame_at(os.pread(fd, FRAME_BYTES_MAX, offset), 0, base=offset)

    def _read(self, seq: int, segment: int, offset: int) -> Entry:
        try:
            frame = self._frame(segment, offset)
            if frame.kind is segments.Kind.REDACTED:
                mark = segments.mark_of(frame)
                ordered = self._read(mark.order, *self._place(mark.order))
                return redaction.shown(seq, frame.leaf_hash, mark, ordered)
            found, time_ns, action = encoding.decode(frame.payload)
        except (segments.Damaged, encoding.NotCanonical) as error:
            raise CannotReadLog(f"cannot read entry {seq}: {error}", remedy="run `stockadectl log verify`") from error
        if found != seq:
            raise CannotReadLog(f"cannot read entry {seq}: entry {found} is in its place", remedy="run log verify")
        return Entry(seq, time_ns, action, frame.leaf_hash)

    def _place(self, seq: int) -> tuple[int, int]:
        found = self._sql("SELECT segment, offset, 0 FROM entries WHERE seq = ? AND segment > 0", [seq])
        if not found:
            raise NotFound(f"cannot find entry {seq}: it was retired", remedy="see `stockadectl log status`")
        return found[0][0], found[0][1]

    def _file(self, segment: int) -> int:
        fd = self._files.get(segment)
        if fd is None:
            if len(self._files) >= OPEN_FILES_MAX:
                os.close(self._files.pop(next(iter(self._files))))
            path = next(path for first, path in segment_paths(self._directory) if first == segment)
            fd = self._files[segment] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return fd


def _row(seq: int, segment: int, frame: segments.Frame) -> Row:
    """The row of entry `seq`, from its frame."""
    if frame.kind is segments.Kind.REDACTED:
        time_ns, word = segments.mark_of(frame).time_seconds * 10**9, encoding.to_bytes(redaction.REDACTED)
        return seq, time_ns, b"", word, word, segment, frame.offset, frame.leaf_hash
    found, time_ns, action = encoding.decode(frame.payload)
    if found != seq:
        raise CannotReadLog(f"cannot index entry {seq}: entry {found} is in its place")
    agent_id, verb, verdict = map(encoding.to_bytes, (action.agent_id, action.verb, action.verdict))
    return seq, time_ns, agent_id, verb, verdict, segment, frame.offset, frame.leaf_hash
