"""Opening a log directory: begin a new one, or find where the last writer stopped and whether that can be trusted."""

import contextlib
import fcntl
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from supervisord.actions import keys, segments
from supervisord.actions.check import Altered, Checker
from supervisord.actions.checkpoint import Checkpoint, Signer, Verifier, open_checkpoint
from supervisord.actions.files import (
    LOCK,
    SEGMENTS,
    TORN,
    CheckpointFile,
    SegmentFile,
    read_checkpoint,
    read_rotations,
    segment_paths,
    sync_directory,
)
from supervisord.actions.merkle import EMPTY_ROOT, Frontier
from supervisord.actions.types import JSON, BadNote, CannotOpenLog, DamagedLog

_DIRECTORY_MODE: Final = 0o700
_REMEDY: Final = (
    "run `stockadectl log verify DIR --public-key log.key.pub` on it, keep the directory as evidence, and move it away"
    " to begin a new log"
)


@dataclass(frozen=True, slots=True)
class Opened:
    """Where writing goes on."""

    lock: int  # a descriptor; the directory is ours while it is open
    segment: SegmentFile
    checkpoint: CheckpointFile
    tree: Frontier
    sealed: int  # entries that a checkpoint covers
    dropped: dict[str, JSON] = field(default_factory=dict)  # what a crash left unfinished; empty when nothing


def open_directory(directory: Path, signer: Signer, first: Verifier | None = None) -> Opened:
    """`first` is the log's first key, where it had another.

    Raises CannotOpenLog where the directory is in use, DamagedLog where it holds what no crash can explain.
    """
    try:
        directory.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        (directory / SEGMENTS).mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotOpenLog(f"cannot open the action log in {directory}: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in (directory / SEGMENTS).glob("*.new"):
            left.unlink()  # a segment whose making a crash interrupted; nothing was recorded in it
        if segment_paths(directory):
            return _continue(directory, signer.verifier, first or signer.verifier, lock)
        return _begin(directory, signer, lock)
    except BlockingIOError as error:
        os.close(lock)
        raise CannotOpenLog(
            f"cannot open the action log in {directory}: another process writes it", remedy="stop the other daemon"
        ) from error
    except OSError as error:
        os.close(lock)
        raise CannotOpenLog(f"cannot open the action log in {directory}: {error}") from error
    except CannotOpenLog:
        os.close(lock)
        raise


def _begin(directory: Path, signer: Signer, lock: int) -> Opened:
    note = read_checkpoint(directory)
    if note and _vouched(note, signer.verifier).size:
        raise _refused(directory, "its segments are gone, but its checkpoint file says that there were entries")
    tree = Frontier()
    note = signer.sign(Checkpoint(signer.verifier.name, 0, EMPTY_ROOT).text())
    segment = SegmentFile.create(directory, tree, note)
    checkpoint = CheckpointFile(directory)
    checkpoint.write(note)
    checkpoint.sync()
    sync_directory(directory)
    return Opened(lock, segment, checkpoint, tree, 0)


def _continue(directory: Path, verifier: Verifier, first: Verifier, lock: int) -> Opened:
    first_seq, path = segment_paths(directory)[-1]
    note = read_checkpoint(directory)
    if not note:
        if first_seq == 1 and _only_begun(path):
            note = None  # a crash came between the first segment and the checkpoint file
        else:
            raise _refused(directory, "its checkpoint file is missing, so it may have been cut")
    data = path.read_bytes()
    checker, end, damage = _read(directory, path, data, verifier, first_seq)
    vouched = None
    if note:
        # A crash between a new key's first segment and its checkpoint file leaves there what the old key signed.
        former = keys.reachable(first, read_rotations(directory)) if _only_begun(path) else ()
        vouched = _vouched(note, verifier, *former)
    if vouched is not None:
        try:
            if vouched.size >= checker.tree.size:
                checker.check(vouched, offset=end)
        except Altered as error:
            raise _refused(directory, f"{path.name} at offset {error.offset}: {error.cause}") from error
    dropped = _drop(directory, path, data, end, damage) if damage is not None else {}
    segment = SegmentFile(path, first_seq, end=end)
    return Opened(lock, segment, CheckpointFile(directory), checker.final_tree(), checker.tree.size, dropped)


def _read(
    directory: Path, path: Path, data: bytes, verifier: Verifier, first_seq: int
) -> tuple[Checker, int, segments.Damaged | None]:
    """Check the last segment; where its whole frames end; what stands there if anything does."""
    try:
        header = segments.parse_header(data)
        if header.first_seq != first_seq:
            raise segments.Damaged(0, f"it is the segment of entry {header.first_seq}", torn=False)
    except segments.Damaged as error:
        # A segment gets its name when it is on the disk, so no crash does this.
        raise _refused(directory, f"{path.name}: {error.cause}") from error
    checker = Checker(verifier, header.tree(), shallow=True)
    end = header.length
    try:
        for frame in segments.frames(data, header.length):
            checker.take(frame)
            end = frame.offset + segments.FRAME_HEADER_BYTES + len(frame.payload)
    except Altered as error:
        raise _refused(directory, f"{path.name} at offset {error.offset}: {error.cause}") from error
    except segments.Damaged as error:
        if any(_is_checkpoint(frame, verifier) for frame in segments.intact_frames_after(data, error.offset)):
            entry = f"entry {checker.size + 1} is damaged: {error.cause}"
            cause = f"{path.name} at offset {error.offset}: {entry}, and a signed checkpoint follows"
            raise _refused(directory, cause) from error
        return checker, end, error
    if end == header.length:
        raise _refused(directory, f"{path.name}: its first checkpoint is missing")
    return checker, end, None


def _drop(directory: Path, path: Path, data: bytes, end: int, damage: segments.Damaged) -> dict[str, JSON]:
    """Cut the tail off, but keep it as evidence, and tell what is to be recorded about it."""
    tail = data[end:]
    saved = directory / TORN / f"{path.stem}-{end}"
    saved.parent.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
    copied = False
    with contextlib.suppress(OSError):  # a full disk must not keep the daemon down for a copy of what is void
        saved.write_bytes(tail)
        copied = True
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, end)
        os.fsync(fd)
    finally:
        os.close(fd)
    return {
        "segment": path.name,
        "offset": end,
        "bytes": len(tail),
        "sha256": hashlib.sha256(tail).hexdigest(),
        "cause": damage.cause,
        "torn": damage.torn,
        "intact_frames": sum(1 for _ in segments.intact_frames_after(tail, 0)),
        "saved": f"{TORN}/{saved.name}" if copied else "",
    }


def _only_begun(path: Path) -> bool:
    data = path.read_bytes()
    try:
        found = list(segments.frames(data, segments.parse_header(data).length))
    except segments.Damaged:
        return False
    return all(frame.kind is segments.Kind.CHECKPOINT for frame in found)


def _vouched(note: str, *verifiers: Verifier) -> Checkpoint:
    try:
        return keys.open_by_any(note, verifiers)
    except BadNote as error:
        raise DamagedLog(f"cannot trust the log's checkpoint file: {error.message}", remedy=_REMEDY) from error


def _is_checkpoint(frame: segments.Frame, verifier: Verifier) -> bool:
    if frame.kind is not segments.Kind.CHECKPOINT:
        return False
    try:
        open_checkpoint(frame.payload.decode("utf-8", "replace"), verifier)
    except BadNote:
        return False
    return True


def _refused(directory: Path, cause: str) -> DamagedLog:
    return DamagedLog(f"cannot continue the action log in {directory}: {cause}", remedy=_REMEDY)
