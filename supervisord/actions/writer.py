"""The log's writer: group commit, checkpoints, new segments, and what happens when the disk refuses.

Two threads write. `append` writes at once in the caller's thread, because one write(2) into the page cache costs less
than waking another thread. The writer's own thread does all that waits for a disk: it writes what `submit` left, syncs,
answers all who waited with one call into their loop, signs checkpoints and begins segments.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from supervisord.actions import encoding, merkle, segments
from supervisord.actions.checkpoint import Checkpoint, Signer
from supervisord.actions.files import SegmentFile
from supervisord.actions.query import Row
from supervisord.actions.recovery import Opened
from supervisord.actions.types import JSON, Action, CannotRecord, Entry

SYNC_SECONDS: Final = 0.010
SYNC_ENTRIES: Final = 256
# What may wait for a disk that has become slow; beyond it the log refuses.
UNSYNCED_BYTES_MAX: Final = 32 * 1024 * 1024
PENDING_ENTRIES_MAX: Final = 65_536
REPAIR_SECONDS: Final = 0.25
SEAL_WAIT_SECONDS_MAX: Final = 30.0
_IDLE_SECONDS: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Settings:
    strict: bool
    now_ns: Callable[[], int]
    monotonic: Callable[[], float]
    checkpoint_every_entries: int
    checkpoint_seconds: float
    segment_bytes: int
    on_checkpoint: Callable[[str], None] | None
    on_rows: Callable[[list[Row]], None]


class _Waiter(NamedTuple):
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Entry]
    entry: Entry


class _Pending(NamedTuple):
    entry: Entry
    frame: bytes
    waiter: _Waiter | None


@dataclass(slots=True)
class _HandOver:
    """A new segment: under a new key, with the entry that hands over to it, or as it is.

    `moved` where it was begun, else `failure`.
    """

    signer: Signer | None = None
    action: Action | None = None
    done: threading.Event = field(default_factory=threading.Event)
    written: Entry | None = None
    entry: Entry | None = None
    moved: bool = False
    failure: OSError | None = None


class Position(NamedTuple):
    """How far the files reach."""

    first_seq: int  # of the current segment
    end: int  # bytes in it
    note: str  # the newest checkpoint that this writer signed, or ""


class Writer:
    """Takes actions in the order of its lock; an entry's seq, its place in the tree and in the file are one order."""

    def __init__(self, signer: Signer, opened: Opened, settings: Settings) -> None:
        self._signer = signer
        self._settings = settings
        self._checkpoint_file = opened.checkpoint
        # All below is guarded by the lock.
        self.lock = threading.Lock()
        self._wake = threading.Condition(self.lock)
        self._sealing = threading.Condition(self.lock)
        self._segment = opened.segment
        self._directory = opened.segment.path.parent.parent
        self._tree = opened.tree
        self._pending: list[_Pending] = []
        self._waiting: list[_Waiter] = []  # written, not yet durable
        self._unsynced = 0
        self._dirty_since: float | None = None
        self._urged = False  # the writer's thread knows that a sync is due
        self._sealed = opened.sealed
        self._sealed_at = settings.monotonic()
        self._note = ""
        self._note_wanted = False
        self._note_dirty_since: float | None = None
        self._seal_failure: OSError | None = None
        self._rotating = False
        self._rotate_at = settings.segment_bytes
        self._broken: OSError | None = None
        self._refused = 0
        self._refused_told: int | None = None  # what a pending log.recover says
        self._doubtful: tuple[int, int] | None = None
        self._closing = False
        self._handing: _HandOver | None = None
        self._thread = threading.Thread(target=self._work, name="log-writer", daemon=True)

    @property
    def size(self) -> int:
        """Entries in the files."""
        return self._tree.size

    def start(self, dropped: dict[str, JSON]) -> None:
        if dropped:
            with self.lock, contextlib.suppress(CannotRecord):
                action = _recover_action("a crash left an unfinished tail, which was cut off", dropped)
                self._pending.append(_Pending(*self._make(action), None))
                self._flush()
        self._thread.start()

    def submit(self, action: Action, loop: asyncio.AbstractEventLoop) -> asyncio.Future[Entry]:
        """A future that is done when the action is durable. Raises CannotRecord, and so does the future."""
        future: asyncio.Future[Entry] = loop.create_future()
        with self.lock:
            self._admit(action)
            entry, frame = self._make(action)
            self._pending.append(_Pending(entry, frame, _Waiter(loop, future, entry)))
            self._wake.notify()
        return future

    def append(self, actions: Sequence[Action], *, again: bool = False) -> list[Entry] | None:
        """Write the actions now, in one go; None while that would mean to wait for a disk. Raises CannotRecord.

        `again` for those that were refused before, and are counted; nobody waits for them, so that a strict log takes
        them as well: in one go, all or none.
        """
        entries: list[Entry] = []
        with self.lock:
            if self._rotating or (self._settings.strict and not again):
                return None
            count, told, refused = len(self._pending), self._refused_told, self._refused
            try:
                for action in actions:
                    self._admit(action)
                    entry, frame = self._make(action)
                    self._pending.append(_Pending(entry, frame, None))
                    entries.append(entry)
            except CannotRecord:
                del self._pending[count:]
                self._refused_told = told
                if again:
                    self._refused = refused
                raise
            try:
                self._flush()
            except CannotRecord:
                if again:
                    self._refused -= len(actions)
                raise
            if self._dirty_since is None:
                self._dirty_since = self._settings.monotonic()
                self._wake.notify()
            elif self._unsynced >= SYNC_ENTRIES and not self._urged:
                self._urged = True
                self._wake.notify()
        return entries

    def seal(self) -> str:
        """A checkpoint over everything taken before the call; waits for the disk. Raises CannotRecord."""
        with self.lock:
            goal = self._tree.size + len(self._pending)
            self._note_wanted = not (self._sealed >= goal and self._note)
            self._seal_failure = None
            self._wake.notify()
            self._sealing.wait_for(
                lambda: (self._sealed >= goal and self._note) or self._seal_failure or self._closing,
                timeout=SEAL_WAIT_SECONDS_MAX,
            )
            if self._sealed < goal or not self._note:
                cause = self._seal_failure or self._broken or "the disk does not answer, or the log is closing"
                raise CannotRecord(
                    f"cannot sign a checkpoint of {goal} entries: {cause}", remedy=f"look after {self._directory}"
                )
            return self._note

    def hand_over(self, signer: Signer, action: Action) -> Entry:
        """Record `action` under the present key, and go on with `signer` in a new segment. Raises CannotRecord."""
        handing = _HandOver(signer, action)
        with self.lock:
            self._admit(action)
            self._handing = handing
            self._wake.notify()
        handing.done.wait(SEAL_WAIT_SECONDS_MAX)
        with self.lock:
            if self._handing is handing:
                self._handing = None  # nobody has begun it
            if handing.entry is None:
                cause = handing.failure or self._broken or "the disk does not answer, or the log is closing"
                raise CannotRecord(
                    f"cannot hand the action log over to a new key: {cause}", remedy=f"look after {self._directory}"
                )
            return handing.entry

    def begin_segment(self) -> None:
        """Go on in a new segment: all before is sealed, under a signed checkpoint, and durable. Raises CannotRecord."""
        handing = _HandOver()
        with self.lock:
            if self._segment.first_seq == self._tree.size + 1 and not self._pending:
                return  # nothing was recorded since the last one was begun
            self._handing = handing
            self._wake.notify()
        handing.done.wait(SEAL_WAIT_SECONDS_MAX)
        with self.lock:
            if self._handing is handing:
                self._handing = None
            if not handing.moved:
                cause = handing.failure or self._broken or "the disk does not answer, or the log is closing"
                raise CannotRecord(
                    f"cannot begin a new segment of the action log: {cause}", remedy=f"look after {self._directory}"
                )

    def position(self) -> Position:
        with self.lock:
            return Position(self._segment.first_seq, self._segment.end, self._note)

    def close(self) -> None:
        """Make everything durable and sign a last checkpoint; idempotent."""
        with self.lock:
            if self._closing:
                return
            self._closing = True
            self._wake.notify()
            self._sealing.notify_all()
        self._thread.join()
        self._segment.close()
        self._checkpoint_file.close()

    # Under the lock, in any thread.

    def _admit(self, action: Action) -> None:
        if self._closing:
            raise CannotRecord(f"cannot record {action.verb}: the action log is closed")
        cause = ""
        if self._broken is not None:
            cause = f"its disk failed: {self._broken}"
        elif self._segment.kept_bytes > UNSYNCED_BYTES_MAX or len(self._pending) >= PENDING_ENTRIES_MAX:
            cause = "its disk does not keep up"
        if cause:
            self._refused += 1
            raise CannotRecord(
                f"cannot record {action.verb} in the action log: {cause}", remedy=f"look after {self._directory}"
            )
        if self._refused and self._refused_told is None:
            self._refused_told = self._refused
            details: dict[str, JSON] = {"refused": self._refused}
            if self._doubtful is not None:
                details["doubtful"] = list(self._doubtful)
            action = _recover_action("the action log records again", details)
            self._pending.append(_Pending(*self._make(action), None))

    def _make(self, action: Action) -> tuple[Entry, bytes]:
        seq = self._tree.size + len(self._pending) + 1
        time_ns = self._settings.now_ns()
        try:
            payload, action = encoding.encode(seq, time_ns, action)
        except (ValueError, TypeError, RecursionError) as error:
            raise CannotRecord(f"cannot record {action.verb}: its details are not JSON: {error}") from error
        leaf = merkle.leaf_hash(payload)
        return Entry(seq, time_ns, action, leaf), segments.entry_frame(payload, leaf)

    def _flush(self) -> None:
        """Write all that is pending. Raises CannotRecord for the caller; everybody else in it is told."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        told, self._refused_told = self._refused_told, None
        try:
            offset = self._segment.write(b"".join([item.frame for item in pending]))
        except OSError as error:
            self._refused += len(pending) - (told is not None)
            failure = CannotRecord(
                f"cannot write the action log: {error.strerror}", remedy=f"make space for {self._directory}"
            )
            _answer([item.waiter for item in pending if item.waiter is not None], failure)
            raise failure from error
        if told is not None:
            self._refused -= told
            self._doubtful = None
        rows: list[Row] = []
        first_seq = self._segment.first_seq
        for entry, frame, waiter in pending:
            action = entry.action
            self._tree.add(entry.leaf_hash)
            agent_id, verb, verdict = map(encoding.to_bytes, (action.agent_id, action.verb, action.verdict))
            rows.append((entry.seq, entry.time_ns, agent_id, verb, verdict, first_seq, offset, entry.leaf_hash))
            offset += len(frame)
            if waiter is not None:
                self._waiting.append(waiter)
        self._unsynced += len(pending)
        self._settings.on_rows(rows)

    def _is_due(self) -> bool:
        if self._broken is not None:
            return self._closing
        if self._pending or self._waiting or self._note_wanted or self._closing or self._handing is not None:
            return True
        return self._unsynced >= SYNC_ENTRIES

    def _patience(self) -> float:
        """Seconds until something is to be done even if nobody asks."""
        if self._broken is not None:
            return REPAIR_SECONDS
        now = self._settings.monotonic()
        dirty = [since for since in (self._dirty_since, self._note_dirty_since) if since is not None]
        if dirty:
            return max(0.0, min(dirty) + SYNC_SECONDS - now)
        if self._tree.size > self._sealed:
            return max(0.0, self._sealed_at + self._settings.checkpoint_seconds - now)
        return _IDLE_SECONDS

    # In the writer's thread.

    def _work(self) -> None:
        while True:
            with self.lock:
                # An append that finds the log idle wakes this thread for its patience to become shorter.
                while not self._is_due():
                    patience = self._patience()
                    if patience <= 0 or not self._wake.wait(timeout=patience):
                        break
                closing, broken = self._closing, self._broken is not None
            if broken:
                self._repair()
            else:
                self._commit(last=closing)
            with self.lock:
                if closing and (self._broken is not None or not (self._pending or self._waiting)):
                    return

    def _commit(self, *, last: bool) -> None:
        with self.lock:
            handing, self._handing = self._handing, None
        try:
            self._commit_all(handing, last=last)
        finally:
            if handing is not None:
                handing.done.set()

    def _commit_all(self, handing: _HandOver | None, *, last: bool) -> None:
        """Write, sync, answer, and what else is due: a checkpoint, a new segment, a new key."""
        settings = self._settings
        with self.lock:
            if handing is not None and handing.action is not None:
                handing.written, frame = self._make(handing.action)
                self._pending.append(_Pending(handing.written, frame, None))
            with contextlib.suppress(CannotRecord):  # who waited has been told
                self._flush()
            if handing is not None and handing.written is not None and handing.written.seq > self._tree.size:
                handing = None  # it could not be written
            waiting, self._waiting = self._waiting, []
            unsynced, self._unsynced, self._dirty_since, self._urged = self._unsynced, 0, None, False
            # From here until the new segment is there nobody else writes: `append` hands over to `submit`.
            self._rotating = handing is not None or self._segment.end >= self._rotate_at
            tree, segment = self._tree.copy(), self._segment
        if (unsynced or waiting) and not self._synced(segment, waiting, tree):
            self._rotating = False
            return
        behind = tree.size - self._sealed
        late = settings.monotonic() - self._sealed_at >= settings.checkpoint_seconds
        due = behind >= settings.checkpoint_every_entries or (behind and late)
        if due or self._note_wanted or self._rotating or last:
            self._sign(tree, segment)
        if self._rotating or last:
            self._synced(segment, [], tree)
            with contextlib.suppress(OSError):
                self._checkpoint_file.sync()
        self._sync_note(now=last)
        if self._rotating:
            self._rotate(tree, segment, handing)

    def _synced(self, segment: SegmentFile, waiting: list[_Waiter], tree: merkle.Frontier) -> bool:
        """Make durable what is written and answer who waited for it; `tree` is what was written before the call."""
        try:
            segment.sync(self.lock)
        except OSError as error:
            with self.lock:
                self._broken = error
            try:
                # At once: often the failure is over, or was about pages that can be written again.
                segment.repair(self.lock)
            except OSError:
                self._doubt(waiting, error)
                return False
            with self.lock:
                self._broken = None
        if waiting:
            try:
                self._vouch(tree)
            except OSError as error:
                self._doubt(waiting, error)
                return False
        _answer(waiting, None)
        return True

    def _vouch(self, tree: merkle.Frontier) -> None:
        """Sign what is durable into the checkpoint file before anybody is told that it is. Raises OSError.

        Else a tail that holds a launch or a grant could be cut off behind the last checkpoint, and nothing would show
        it. Written, the note survives any death of the daemon; it is synced within SYNC_SECONDS and not here, since a
        second fdatasync a commit took 0.3 to 4 ms of every launch.
        """
        note = self._signer.sign(Checkpoint(self._signer.verifier.name, tree.size, tree.root()).text())
        self._checkpoint_file.write(note)
        with self.lock:
            if self._note_dirty_since is None:
                self._note_dirty_since = self._settings.monotonic()

    def _sync_note(self, *, now: bool) -> None:
        since = self._note_dirty_since
        if since is None or not (now or self._settings.monotonic() - since >= SYNC_SECONDS):
            return
        with self.lock:
            self._note_dirty_since = None
        with contextlib.suppress(OSError):  # the next note is written over this one, and synced again
            self._checkpoint_file.sync()

    def _doubt(self, waiting: list[_Waiter], error: OSError) -> None:
        with self.lock:
            pending, self._pending = self._pending, []
            waiting, self._waiting = waiting + self._waiting, []
            self._refused += len(pending) + len(waiting)
            self._refused_told = None
            self._unsynced += 1  # not everything is durable
            if waiting:
                first = self._doubtful[0] if self._doubtful else waiting[0].entry.seq
                self._doubtful = (first, waiting[-1].entry.seq)
            self._seal_failure = error
            self._sealing.notify_all()
        failure = CannotRecord(
            f"cannot make the action log durable: {error.strerror}", remedy=f"look after the disk of {self._directory}"
        )
        _answer(waiting + [item.waiter for item in pending if item.waiter is not None], failure)

    def _repair(self) -> None:
        try:
            self._segment.repair(self.lock)
        except OSError as error:
            with self.lock:
                self._broken = error
            return
        with self.lock:
            self._broken, self._unsynced, self._dirty_since = None, 0, None

    def _sign(self, tree: merkle.Frontier, segment: SegmentFile) -> None:
        """Sign `tree`, all of which is durable: a crash must never leave a checkpoint over what it took."""
        note = self._signer.sign(Checkpoint(self._signer.verifier.name, tree.size, tree.root()).text())
        failure: OSError | None = None
        try:
            with self.lock:
                segment.write(segments.checkpoint_frame(note))
        except OSError as error:
            failure = error
        try:
            self._checkpoint_file.write(note)  # needs no free space, so it is written in any case
        except OSError as error:
            failure = failure or error
        with self.lock:
            self._sealed_at = self._settings.monotonic()
            self._note_wanted = False
            self._seal_failure = failure
            if failure is None:
                self._note, self._sealed = note, tree.size
            self._sealing.notify_all()
        if failure is None and self._settings.on_checkpoint is not None:
            self._settings.on_checkpoint(note)

    def _rotate(self, tree: merkle.Frontier, old: SegmentFile, handing: _HandOver | None) -> None:
        """Begin a segment; where the log is handed over, it begins with the same tree under the new key."""
        new: SegmentFile | None = None
        signer, note = self._signer, self._note
        if handing is not None and handing.signer is not None:
            signer = handing.signer
            note = signer.sign(Checkpoint(signer.verifier.name, tree.size, tree.root()).text())
        if self._broken is None and self._sealed == tree.size:
            try:
                new = SegmentFile.create(self._directory, tree, note)
            except OSError as error:  # the old one goes on, and this is tried again later
                if handing is not None:
                    handing.failure = error
        with self.lock:
            self._rotating = False
            if new is None:
                self._rotate_at = old.end + (0 if handing is not None else self._settings.segment_bytes // 4)
                return
            self._segment, self._rotate_at = new, self._settings.segment_bytes
            self._signer, self._note = signer, note
        old.close()
        if handing is not None:
            handing.entry, handing.moved = handing.written, True
            with contextlib.suppress(OSError):  # the next checkpoint is written over it
                self._checkpoint_file.write(note)
                self._checkpoint_file.sync()
            if self._settings.on_checkpoint is not None:
                self._settings.on_checkpoint(note)


def _recover_action(reason: str, details: dict[str, JSON]) -> Action:
    return Action("", "daemon", "log.recover", "action log", "done", reason, details)


def _answer(waiters: list[_Waiter], failure: CannotRecord | None) -> None:
    """One call into each loop, however many wait there."""
    loops: dict[asyncio.AbstractEventLoop, list[_Waiter]] = {}
    for waiter in waiters:
        loops.setdefault(waiter.loop, []).append(waiter)
    for loop, group in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(_resolve, group, failure)


def _resolve(group: list[_Waiter], failure: CannotRecord | None) -> None:
    for _, future, entry in group:
        if future.done():
            continue  # cancelled; the entry stays recorded
        if failure is None:
            future.set_result(entry)
        else:
            future.set_exception(CannotRecord(failure.message, remedy=failure.remedy))
