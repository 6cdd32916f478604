"""The action log: one writer, an append-only RFC 6962 tree in segments, group commit."""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Final

from supervisord.actions import files, keys, merkle, segments
from supervisord.actions.check import RETIRE_VERB
from supervisord.actions.checkpoint import Signer, size_of
from supervisord.actions.files import load_signer, read_checkpoint, remove_segments, segment_paths
from supervisord.actions.owed import HAPPENED, OWED_MAX, RETRY_SECONDS, Owed
from supervisord.actions.query import Index, Query, Row
from supervisord.actions.recovery import Opened, open_directory
from supervisord.actions.redacting import Redacting
from supervisord.actions.retiring import Sealed, retired
from supervisord.actions.types import (
    JSON,
    Action,
    CannotOpenLog,
    CannotReadLog,
    CannotRecord,
    Durability,
    Entry,
    Proof,
    Report,
)
from supervisord.actions.verify import Until, verify
from supervisord.actions.writer import Settings, Writer

SEGMENT_BYTES_MAX: Final = 16 * 1024 * 1024
SUBSCRIBER_ENTRIES: Final = 256
OWED_ENTRIES: Final = 256
ROTATING_SECONDS: Final = 0.01
CLOCK_STEP_NS: Final = 3600 * 10**9  # the clock may have been set back since it happened
_VERIFY_PAUSE_SECONDS: Final = 0.0005


class ActionLog:
    """The one writer of a log directory; `record` and `append` may be awaited in any asyncio loop.

    When the disk refuses, both raise CannotRecord until it takes a write again; the first entry then is `log.recover`,
    which says how many actions were refused. Of these `note` keeps what has happened all the same, and has it recorded
    after that. Where a *sync* failed, the entries in question are in the file and stay
    there, though who waited for them was told CannotRecord: as with any commit that fails, only "yes" is certain.
    `log.recover` names them as doubtful.
    """

    def __init__(
        self,
        directory: Path,
        key: Path,
        signer: Signer,
        opened: Opened,
        index: Index,
        *,
        settings: Settings,
        listeners: "_Listeners",
        owed: Owed,
    ) -> None:
        """Use `open`."""
        self._owed = owed
        self._directory = directory
        self._key = key
        self._key_lock = threading.Lock()
        self._reading = threading.Lock()  # held by who reads all segments: none may go meanwhile
        self._signer = signer
        self._directory_lock = opened.lock
        self._index = index
        self._listeners = listeners
        self._now_ns = settings.now_ns
        self._writer = Writer(signer, opened, settings)
        self._writer.start(opened.dropped)
        self._closed = False
        self._redacting = Redacting(directory, self, index, begin_segment=self._begin_segment, reading=self._reading)

    @classmethod
    def open(
        cls,
        directory: Path,
        key: Path,
        *,
        durability: Durability = "batched",
        now_ns: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
        origin: str = "stockade.local/actions",
        checkpoint_every_entries: int = 1024,
        checkpoint_seconds: float = 1.0,
        segment_bytes: int = SEGMENT_BYTES_MAX,
        on_checkpoint: Callable[[str], None] | None = None,
        owed: Owed | None = None,
    ) -> "ActionLog":
        """Continue or begin the log in `directory`; it waits for disks, so call it before the loop runs.

        Makes an Ed25519 key in `key` (mode 0600) and its public half in `<key>.pub` where there is none. A tail that a
        crash left is cut off, kept in `torn/` and told in a `log.recover` entry. `on_checkpoint` gets each signed
        checkpoint in the log's thread and must not block. `owed` is what an earlier log did not take; without one, it
        is kept beside the directory. Raises DamagedLog for damage that no crash explains, CannotOpenLog where the
        directory or the key cannot be used.
        """
        owed = Owed(directory.with_name(f"{directory.name}-owed"), now_ns=now_ns) if owed is None else owed
        _settle(directory, key)
        signer = load_signer(key, origin=origin)
        opened = open_directory(directory, signer, files.first_public(key))
        index = Index(directory)
        listeners = _Listeners()

        def on_rows(rows: list[Row]) -> None:
            index.add(rows)
            listeners.tell()

        settings = Settings(
            strict=durability == "strict",
            now_ns=now_ns,
            monotonic=monotonic,
            checkpoint_every_entries=checkpoint_every_entries,
            checkpoint_seconds=checkpoint_seconds,
            segment_bytes=segment_bytes,
            on_checkpoint=on_checkpoint,
            on_rows=on_rows,
        )
        index.start(opened.tree.size)
        return cls(directory, key, signer, opened, index, settings=settings, listeners=listeners, owed=owed)

    @property
    def size(self) -> int:
        """Entries in the files."""
        return self._writer.size

    @property
    def first_seq(self) -> int:
        """The oldest entry that is still in the files."""
        return next((first for first, _ in segment_paths(self._directory)), 1)

    @property
    def signer(self) -> Signer:
        """The log's key, which also signs receipts."""
        return self._signer

    @property
    def public_key(self) -> str:
        """The key that verifies this log, in its C2SP form."""
        return self._signer.verifier.text()

    async def record(self, action: Action) -> Entry:
        """Record `action`; durable and under a signed checkpoint when this returns. Raises CannotRecord."""
        return await self._writer.submit(action, asyncio.get_running_loop())

    async def append(self, action: Action) -> Entry:
        """Record `action`; written when this returns, durable within 10 ms or 256 entries. Raises CannotRecord.

        What is written survives any death of the daemon, not a power cut; until the next checkpoint or `record` no
        signature covers it, so that cutting it off is not found. It does not yield to the loop, save in a
        strict log, where it is `record`, and while a new segment is begun.
        """
        entries = self._writer.append((action,))
        return await self.record(action) if entries is None else entries[0]

    async def append_all(self, actions: Sequence[Action]) -> list[Entry]:
        """As `append`, for several at once with one write(2). Raises CannotRecord; then none of them counts."""
        entries = self._writer.append(actions)
        if entries is None:
            loop = asyncio.get_running_loop()
            return list(await asyncio.gather(*[self._writer.submit(action, loop) for action in actions]))
        return entries

    async def note(self, action: Action, *, durable: bool = False) -> None:
        """Record what has happened and cannot be refused any more: now, or else as soon as the log takes it."""
        if self._owed:  # in its turn
            self._owed.keep(action, cause="something before it is not there either")
            return
        try:
            await (self.record(action) if durable else self.append(action))
        except CannotRecord as error:
            self._owed.keep(action, cause=error.message)

    async def pay(self) -> None:
        """Record what is owed, in its order and each once. Raises CannotRecord."""
        await self._owed.leave_out(self._recorded)
        while self._owed:
            actions = self._owed.next(OWED_ENTRIES)
            # All of them or none, each of which was counted as refused once, when it was.
            if self._writer.append(actions, again=True) is None:
                await asyncio.sleep(ROTATING_SECONDS)
            else:
                self._owed.paid(actions)

    async def pay_forever(self) -> None:
        """Try again for as long as something is owed; runs as long as the daemon."""
        while True:
            await self._owed.came.wait()
            await asyncio.sleep(RETRY_SECONDS)
            with contextlib.suppress(CannotRecord):
                await self.pay()
            self._owed.save()

    async def _recorded(self, action: Action) -> bool:
        """Tell whether the log has this very entry, where it can be read."""
        try:
            happened = datetime.fromisoformat(str(action.details.get(HAPPENED)))
            found = await self.query(
                agent_id=action.agent_id,
                verb=action.verb,
                since_ns=int(happened.timestamp() * 1e9) - CLOCK_STEP_NS,
                limit=OWED_MAX,
            )
        except (CannotReadLog, ValueError):
            return False
        return any(entry.action == action for entry in found)

    async def query(
        self,
        *,
        agent_id: str | None = None,
        verb: str | None = None,
        verdict: str | None = None,
        since_ns: int | None = None,
        until_ns: int | None = None,
        after_seq: int = 0,
        newest_first: bool = False,
        limit: int = 1000,
        agent_ids: frozenset[str] | None = None,
    ) -> list[Entry]:
        """Entries that match, by seq; at most `limit` (at most 10,000). `verb` may be a prefix that ends in a dot.

        Sees everything that was recorded before the call. Raises CannotReadLog.
        """
        query = Query(agent_id, verb, verdict, since_ns, until_ns, after_seq, newest_first, limit, agent_ids)
        return await asyncio.wrap_future(self._index.run(lambda: self._index.entries(query)))

    async def subscribe(self, after_seq: int = 0) -> AsyncIterator[Entry]:
        """Every entry after `after_seq`, then new ones as they come, without end until the log closes.

        Resume with the last `seq` seen. A slow reader costs nothing: it is fed from the files, a page at a time.
        """
        async for page in self.pages(after_seq):
            for entry in page:
                yield entry

    async def pages(self, after_seq: int = 0, limit: int = SUBSCRIBER_ENTRIES) -> AsyncIterator[list[Entry]]:
        """As `subscribe`, as many at once as there are, at most `limit`."""
        with self._listeners.listening() as event:
            while not self._closed:
                event.clear()
                try:
                    page = await self.query(after_seq=after_seq, limit=limit)
                except CannotReadLog:
                    if self._closed:
                        return
                    raise
                if page:
                    after_seq = page[-1].seq
                    yield page
                else:
                    await event.wait()

    async def checkpoint(self) -> str:
        """A signed checkpoint (C2SP tlog-checkpoint) over everything recorded before the call. Raises CannotRecord."""
        return await asyncio.to_thread(self._writer.seal)

    async def retire(self, *, keep_seconds: float, keep_bytes: int) -> Entry | None:
        """Remove sealed segments that are older or more than to be kept; the entry that says so, where any were.

        The tree goes on over them: the first segment left begins with their subtrees, under a signature, and the entry
        is durable before the first of them is removed. Raises CannotRecord; then all are still there.
        """
        paths = segment_paths(self._directory)
        found = await asyncio.to_thread(_sealed, paths)
        count = retired(
            found,
            open_bytes=paths[-1][1].stat().st_size if paths else 0,
            now_seconds=self._now_ns() / 1e9,
            keep_seconds=keep_seconds,
            keep_bytes=keep_bytes,
        )
        if not count:
            return None
        last_seq = found[count - 1].last_seq
        details: dict[str, JSON] = {
            "first_seq": found[0].first_seq,
            "last_seq": last_seq,
            "segments": count,
            "bytes": sum(segment.size_bytes for segment in found[:count]),
        }
        entry = await self.record(Action("", "daemon", RETIRE_VERB, "action log", "done", "", details))
        await asyncio.wrap_future(self._index.run(lambda: self._index.retire(last_seq)))
        await asyncio.to_thread(self._remove, [path for _, path in paths[:count]])
        return entry

    async def redact(
        self, seq: int, *, actor: str, reason: str, needed: Callable[[Action], str] = lambda _: ""
    ) -> Entry:
        """Take the content of entry `seq` away for good; the entry that orders it.

        `needed` says why an entry cannot go, where it cannot. Raises NotFound, Conflict or CannotRecord.
        """
        return await self._redacting.redact(seq, actor=actor, reason=reason, needed=needed)

    async def finish_redactions(self) -> int:
        """Do what was ordered and, for a crash or a disk, not done; how many that were. Raises CannotRecord."""
        return await self._redacting.finish()

    async def rotate_key(self, *, actor: str, reason: str) -> Entry:
        """Go on with a new key; the entry that hands over to it, signed by the old one. Raises CannotRecord."""
        return await asyncio.to_thread(self._rotate_key, actor, reason)

    async def verify(self, *, kept: str | None = None) -> Report:
        """Check all files up to now, as `verify.verify` does offline."""
        return await asyncio.to_thread(self._verify, kept)

    async def proof(self, seq: int, size: int | None = None) -> Proof:
        """The inclusion proof of entry `seq` in the tree of `size` entries.

        Without a size it is that of a new checkpoint, which comes with the proof. Raises ValueError for an entry or
        tree that is not there.
        """
        note = ""
        if size is None:
            note = await self.checkpoint()
            size = size_of(note)
        if not 1 <= seq <= size <= self._writer.size:
            raise ValueError(f"cannot prove entry {seq} in a tree of {size}: the log has {self._writer.size} entries")
        index, total = self._index, size

        def prove() -> Proof:
            path = merkle.inclusion_path(seq - 1, total, index.node)
            root = merkle.range_root(0, total, index.node)
            return Proof(seq, total, index.payload(seq), index.node(0, seq - 1), root, path, note)

        return await asyncio.wrap_future(index.run(prove))

    async def consistency(self, old: int, size: int | None = None) -> tuple[bytes, ...]:
        """The proof (RFC 6962 section 2.1.2) that the tree of `size` entries continues that of `old`."""
        index, total = self._index, self._writer.size if size is None else size
        if not 1 <= old <= total <= self._writer.size:
            raise ValueError(f"cannot prove {total} entries from {old}: the log has {self._writer.size}")
        return await asyncio.wrap_future(index.run(lambda: merkle.consistency_path(old, total, index.node)))

    async def root(self, size: int) -> bytes:
        """The RFC 6962 root of the first `size` entries."""
        index = self._index
        if not 1 <= size <= self._writer.size:
            raise ValueError(f"cannot give the root of {size} entries: the log has {self._writer.size}")
        return await asyncio.wrap_future(index.run(lambda: merkle.range_root(0, size, index.node)))

    def snapshot(self, stage: Path, opened: contextlib.ExitStack) -> list[tuple[str, int, int]]:
        """The log's files as of now: name, descriptor, and how many bytes belong to it; closed with `opened`.

        `stage` is an empty directory for the checkpoint that belongs to them. Waits for the disk.
        """
        with self._reading:  # nothing is retired or redacted meanwhile; after it the descriptors keep what was there
            with contextlib.suppress(CannotRecord):  # a full disk is no reason not to take what is there away
                self._writer.seal()
            last, end, note = self._writer.position()
            (stage / files.CHECKPOINT).write_text(note or read_checkpoint(self._directory) or "", encoding="utf-8")
            paths = [path for first, path in segment_paths(self._directory) if first <= last]
            paths += [path for path in (self._directory / files.ROTATIONS, stage / files.CHECKPOINT) if path.exists()]
            found = []
            for path in paths:
                fd = opened.enter_context(path.open("rb")).fileno()
                written = segments.first_seq_of(path.name) == last
                below = "" if segments.first_seq_of(path.name) is None else f"{files.SEGMENTS}/"
                found.append((f"{below}{path.name}", fd, end if written else os.fstat(fd).st_size))
        return found

    async def close(self) -> None:
        """Make everything durable, sign a last checkpoint, let the directory go. Nothing can be recorded after."""
        if self._closed:
            return
        self._closed = True
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._writer.close()
        self._listeners.tell()
        self._index.close()
        os.close(self._directory_lock)

    def _remove(self, paths: Sequence[Path]) -> None:
        with self._reading:
            remove_segments(paths)

    def _rotate_key(self, actor: str, reason: str) -> Entry:
        with self._key_lock:
            old = self._signer
            try:
                new = files.make_next_key(self._key, old.verifier.name)
                note = keys.rotation_note(new.verifier, old)
                files.add_rotation(self._directory, note)
            except OSError as error:
                raise CannotRecord(f"cannot make a new log key: {error}", remedy=f"look after {self._key}") from error
            details = {"old": old.verifier.text(), "new": new.verifier.text(), "note": note}
            entry = self._writer.hand_over(new, Action("", actor, keys.VERB, "log key", "done", reason, details))
            self._signer = new
            try:
                files.put_next_key_in_place(self._key, new)
            except OSError as error:
                raise CannotRecord(
                    f"cannot put the new log key in place, though it is in use: {error}",
                    remedy=f"make room for {self._key}; the next start puts it there",
                ) from error
            return entry

    def _begin_segment(self) -> None:
        with self._key_lock:
            self._writer.begin_segment()

    def _verify(self, kept: str | None) -> Report:
        with self._reading:
            return self._verify_all(kept)

    def _verify_all(self, kept: str | None) -> Report:
        with contextlib.suppress(CannotRecord):  # a full disk is no reason not to verify
            self._writer.seal()
        first_seq, end, note = self._writer.position()
        until = Until(first_seq, end, note or read_checkpoint(self._directory))
        # Python's threads take turns: let the loop have its own between entries.
        return verify(
            self._directory,
            files.first_public(self._key),
            kept=kept,
            until=until,
            pause=lambda: time.sleep(_VERIFY_PAUSE_SECONDS),
        )


def _settle(directory: Path, key: Path) -> None:
    try:
        files.settle_rotation(directory, key)
    except OSError as error:
        raise CannotOpenLog(
            f"cannot use the log key {key}: {error}", remedy="check the file and its directory"
        ) from error


def _sealed(paths: Sequence[tuple[int, Path]]) -> list[Sealed]:
    found = []
    for (first, path), (following, _) in pairwise(paths):
        status = path.stat()
        found.append(Sealed(first, following - 1, status.st_size, status.st_mtime))
    return found


class _Listeners:
    """Who waits for new entries; told from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        with self._lock:
            self._events[event] = asyncio.get_running_loop()
        try:
            yield event
        finally:
            with self._lock:
                del self._events[event]

    def tell(self) -> None:
        if not self._events:
            return
        with self._lock:
            for event, loop in self._events.items():
                if not event.is_set():
                    with contextlib.suppress(RuntimeError):  # its loop is closed
                        loop.call_soon_threadsafe(event.set)
