"""The daemon's end of the sinks: a task and a process for each, fed from the log's files and never in the log's way.

At least once: a sink's cursor moves only behind what its process says was taken, and what lies between a cursor on the
disk and a death is sent again. A sink that fails is tried for ever, more and more seldom; that it fails is an entry.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import structlog

from supervisord.actions.types import Action
from supervisord.config import SinkKind
from supervisord.gateway_process import read_secret
from supervisord.processes import Child, end_leftover, python, spawn_connected

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from supervisord.actions.log import ActionLog
    from supervisord.actions.types import Entry
    from supervisord.config import Config, SinkConfig

log = structlog.get_logger()

FILE_FD: Final = 4
BATCH_ENTRIES: Final = 128
BATCH_BYTES_MAX: Final = 1 << 20
ANSWER_BYTES_MAX: Final = 64 * 1024
ANSWER_SECONDS_MAX: Final = 30.0
READY_SECONDS_MAX: Final = 20.0
BACKOFF_SECONDS: Final = (0.2, 0.5, 1.0, 2.0, 5.0, 15.0, 30.0)
FAILURES_TOLD: Final = 3  # in a row, before an entry says that a sink fails
TOLD_SECONDS: Final = 60.0  # at least, between two such entries of one sink
CURSOR_SECONDS: Final = 1.0
BEHIND_ENTRIES_MAX: Final = 10_000
VERB: Final = "log.sink"
FILES: Final = (SinkKind.JSONL, SinkKind.OCSF)


class SinkFailed(Exception):  # noqa: N818 - a finding; its text is shown
    pass


@dataclass(frozen=True, slots=True)
class SinkState:
    """`behind` entries wait for it; `cause` says why where it fails."""

    name: str
    kind: str
    delivered_seq: int
    behind: int
    failing: bool
    cause: str


class Cursor:
    """How far a sink is, in a file of its own: `SEQ LEAF-HASH`, so that a log begun anew is noticed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seq, self.leaf = 0, ""
        with contextlib.suppress(FileNotFoundError, ValueError):
            seq, leaf = path.read_text().split()
            self.seq, self.leaf = int(seq), leaf
        self._kept = self.seq

    def move(self, seq: int, leaf: str) -> None:
        self.seq, self.leaf = seq, leaf

    def keep(self) -> None:
        """Make it durable; a cursor that cannot be kept costs duplicates and nothing else."""
        if self._kept == self.seq:
            return
        seq, temporary = self.seq, self._path.with_suffix(".new")
        try:
            with temporary.open("w") as file:
                file.write(f"{seq} {self.leaf}\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._path)
        except OSError as error:
            log.error("cannot keep the cursor of a sink", sink=self._path.stem, cause=error.strerror)
            return
        self._kept = seq


class Feed:
    """One sink: its process, its cursor, its state."""

    def __init__(self, config: Config, sink: SinkConfig, actions: ActionLog, *, now: Callable[[], float]) -> None:
        self._config = config
        self._sink = sink
        self._actions = actions
        self._now = now
        self._record = config.run_dir / "processes" / f"sink-{sink.name}.json"
        self._cursor = Cursor(config.state_dir / "sinks" / f"{sink.name}.cursor")
        self._cursor_kept_at = now()
        self._failures = 0
        self._failing = False
        self._told_at: float | None = None
        self._cause = ""
        self._inode: tuple[int, int] | None = None

    def state(self) -> SinkState:
        behind = max(0, self._actions.size - self._cursor.seq)
        late = behind > BEHIND_ENTRIES_MAX
        cause = self._cause or (f"it is {behind} entries behind" if late else "")
        return SinkState(self._sink.name, self._sink.kind.value, self._cursor.seq, behind, self._failing or late, cause)

    async def run(self) -> None:
        """Feed it until cancelled."""
        try:
            while True:
                try:
                    await self._session()
                except Exception as error:  # noqa: BLE001 - whatever it is: it is shown, told, and tried again
                    await self._failed(str(error))
                else:
                    return  # the log has closed
                await asyncio.sleep(BACKOFF_SECONDS[min(self._failures, len(BACKOFF_SECONDS)) - 1])
        finally:
            self._cursor.keep()

    async def _session(self) -> None:
        """One life of its process: start it, and feed it until it or the log ends."""
        await self._check_cursor()
        end_leftover(self._record)
        child, reader, writer = await self._start()
        try:
            async for page in self._actions.pages(self._cursor.seq, BATCH_ENTRIES):
                for batch in batches(page):
                    await self._deliver(batch, reader, writer)
        finally:
            writer.close()
            await child.end()
            self._record.unlink(missing_ok=True)

    async def _check_cursor(self) -> None:
        """Begin anew where the cursor is of another log."""
        seq = self._cursor.seq
        if seq == 0:
            return
        found = await self._actions.query(after_seq=seq - 1, limit=1) if seq <= self._actions.size else []
        known = found[0].leaf_hash.hex() if found and found[0].seq == seq else self._cursor.leaf
        if seq > self._actions.size or known != self._cursor.leaf:
            log.error("the cursor of a sink is of another log: it gets everything again", sink=self._sink.name)
            self._cursor.move(0, "")

    async def _start(self) -> tuple[Child, asyncio.StreamReader, asyncio.StreamWriter]:
        sink, fds = self._sink, {}
        begin = {
            "kind": sink.kind.value,
            "address": sink.address,
            "url": sink.url,
            "header": read_secret(sink.header_file) if sink.header_file is not None else "",
            "tls": sink.tls,
            "ca_file": str(sink.ca_file or ""),
            "cert_file": str(sink.cert_file or ""),
            "key_file": str(sink.key_file or ""),
            "user": self._config.users.sinks,
            "host": os.uname().nodename,
            "instance": self._config.instance,
            "origin": self._actions.signer.verifier.name,
            "key": self._actions.public_key,
        }
        if sink.kind in FILES:
            fds[FILE_FD] = self._open_file()
        try:
            child, ours = spawn_connected(
                f"sink {sink.name}",
                python("supervisord.sinks.process"),
                fds=fds,
                kind=socket.SOCK_STREAM,
                record=self._record,
            )
        finally:
            if FILE_FD in fds:
                os.close(fds[FILE_FD])
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=ANSWER_BYTES_MAX)
        try:
            said = await self._ask(begin, reader, writer, READY_SECONDS_MAX)
            if said.get("ready") is not True:
                raise SinkFailed(str(said.get("error", "its process made no sense")))
        except BaseException:
            writer.close()
            await child.end()
            raise
        return child, reader, writer

    def _open_file(self) -> int:
        """The file, made where there is none; no link is followed and nothing but a regular file is written."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(str(self._sink.path), flags, 0o640)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise SinkFailed(f"{self._sink.path} is no regular file")
        self._inode = (found.st_dev, found.st_ino)
        return fd

    def _was_rotated(self) -> bool:
        if self._inode is None or self._sink.path is None:
            return False
        try:
            found = self._sink.path.stat()
        except OSError:
            return True
        return (found.st_dev, found.st_ino) != self._inode

    async def _deliver(
        self, batch: Sequence[Entry], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self._was_rotated():
            raise SinkRotated
        if batch[0].seq > self._cursor.seq + 1:
            gone = f"entries {self._cursor.seq + 1} to {batch[0].seq - 1} were retired before it took them"
            log.error("a sink misses entries", sink=self._sink.name, cause=gone)
            await self._tell("failed", gone)
            self._cursor.move(batch[0].seq - 1, "")
        said = await self._ask({"entries": list(map(record_of, batch))}, reader, writer, ANSWER_SECONDS_MAX)
        reached = said.get("ack")
        for entry in batch:
            if isinstance(reached, int) and entry.seq == reached:
                self._cursor.move(entry.seq, entry.leaf_hash.hex())
        if "failed" in said or self._cursor.seq != batch[-1].seq:
            raise SinkFailed(str(said.get("failed", "its process made no sense")))
        await self._well()
        if self._now() - self._cursor_kept_at >= CURSOR_SECONDS:
            self._cursor_kept_at = self._now()
            await asyncio.to_thread(self._cursor.keep)

    async def _ask(
        self, message: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float
    ) -> dict[str, Any]:
        try:
            async with asyncio.timeout(seconds):
                writer.write(json.dumps(message).encode() + b"\n")
                await writer.drain()
                said = json.loads(await reader.readline() or b"{}")
        except TimeoutError as error:
            raise SinkFailed(f"it took nothing for {seconds:.0f} seconds") from error
        except (ValueError, RecursionError) as error:
            raise SinkFailed("its process made no sense") from error
        if not isinstance(said, dict) or not said:
            raise SinkFailed("its process ended without a word")
        return said

    async def _failed(self, cause: str) -> None:
        if cause == ROTATED:
            self._failures = 1
            return
        self._failures += 1
        self._cause = cause
        log.warning("a sink fails", sink=self._sink.name, cause=cause, failures=self._failures)
        if self._failing or self._failures < FAILURES_TOLD:
            return
        self._failing = True
        if self._told_at is None or self._now() - self._told_at >= TOLD_SECONDS:
            self._told_at = self._now()
            await self._tell("failed", cause)

    async def _well(self) -> None:
        told, self._failures, self._cause = self._failing, 0, ""
        if told:
            self._failing = False
            await self._tell("done", "it takes entries again")

    async def _tell(self, verdict: str, reason: str) -> None:
        details = {"kind": self._sink.kind.value, "delivered_seq": self._cursor.seq, "size": self._actions.size}
        await self._actions.note(Action("", "daemon", VERB, self._sink.name, verdict, reason, details))


ROTATED: Final = "its file was moved away"


class SinkRotated(SinkFailed):
    """Somebody moved the file away: a new process gets the new one."""

    def __init__(self) -> None:
        super().__init__(ROTATED)


class Sinks:
    """All of them."""

    def __init__(self, config: Config, actions: ActionLog, *, now: Callable[[], float]) -> None:
        directory = config.state_dir / "sinks"
        if config.log.sinks:
            directory.mkdir(mode=0o700, exist_ok=True)
        self._feeds = [Feed(config, sink, actions, now=now) for sink in config.log.sinks]
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(feed.run()) for feed in self._feeds]

    def states(self) -> list[SinkState]:
        return [feed.state() for feed in self._feeds]

    async def stop(self) -> None:
        """End the processes; what they have not taken is sent after the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def record_of(entry: Entry) -> dict[str, Any]:
    """The entry as its process hears it; bytes that were no UTF-8 are shown as escapes."""
    action = entry.action
    names = ("agent_id", "actor", "verb", "object", "verdict", "reason")
    texts = {name: getattr(action, name).encode("utf-8", "backslashreplace").decode() for name in names}
    return {
        "seq": entry.seq,
        "time_ns": entry.time_ns,
        "leaf_hash": entry.leaf_hash.hex(),
        "details": dict(action.details),
        **texts,
    }


def batches(page: Sequence[Entry]) -> list[list[Entry]]:
    """The page in parts that fit a message."""
    parts: list[list[Entry]] = [[]]
    used = 0
    for entry in page:
        weight = 512 + sum(map(len, (entry.action.object, entry.action.reason, str(entry.action.details))))
        if parts[-1] and used + weight > BATCH_BYTES_MAX:
            parts.append([])
            used = 0
        parts[-1].append(entry)
        used += weight
    return parts
