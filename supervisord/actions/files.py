"""The log's files: key pair, segment being written, checkpoint beside it."""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from supervisord.actions import keys, segments
from supervisord.actions.checkpoint import NOTE_BYTES_MAX, Signer, Verifier, open_checkpoint
from supervisord.actions.merkle import Frontier
from supervisord.actions.types import BadNote, CannotOpenLog

SEGMENTS: Final = "segments"
TORN: Final = "torn"
NEW: Final = ".new"  # a segment that is being made; opening removes what a crash left of one
CHECKPOINT: Final = "checkpoint"
INDEX: Final = "index.sqlite"
LOCK: Final = "lock"
ROTATIONS: Final = "rotations"
ROTATIONS_BYTES_MAX: Final = 1 << 20

_KEY_MODE: Final = 0o600
_PUBLIC_MODE: Final = 0o644
_FILE_MODE: Final = 0o600
_KEY_BYTES_MAX: Final = 8192
_OTHERS: Final = 0o077


def load_signer(key: Path, *, origin: str) -> Signer:
    """The key at `key`, made where there is none, named as its .pub file says. Raises CannotOpenLog."""
    public = public_path(key)
    try:
        if not key.exists():
            private = Ed25519PrivateKey.generate()
            _create(public, (Signer.of(origin, private).verifier.text() + "\n").encode(), _PUBLIC_MODE)
            _create(key, _pem(private), _KEY_MODE)
        if key.stat().st_mode & _OTHERS:
            raise CannotOpenLog(f"cannot use the log key {key}: others may read it", remedy=f"chmod 600 {key}")
        loaded = serialization.load_pem_private_key(key.read_bytes()[:_KEY_BYTES_MAX], password=None)
        if not isinstance(loaded, Ed25519PrivateKey):
            raise CannotOpenLog(f"cannot use the log key {key}: it is not an Ed25519 key", remedy="move it away")
        name = read_public(public).name if public.exists() else origin
        signer = Signer.of(name, loaded)
        if not public.exists():
            _create(public, (signer.verifier.text() + "\n").encode(), _PUBLIC_MODE)
    except (OSError, ValueError) as error:
        raise CannotOpenLog(
            f"cannot use the log key {key}: {error}", remedy="check the file and its directory"
        ) from error
    if read_public(public) != signer.verifier:
        raise CannotOpenLog(
            f"cannot use the log key {key}: {public} belongs to another key",
            remedy="bring back the key that belongs to it, or move both and the log directory away to begin a new log",
        )
    return signer


def public_path(key: Path) -> Path:
    return key.with_name(key.name + ".pub")


def first_public_path(key: Path) -> Path:
    """The log's first public key, beside one that came later; what verifies the whole log."""
    return key.with_name(key.name + ".first.pub")


def next_path(key: Path) -> Path:
    """A key that the log is being handed over to."""
    return key.with_name(key.name + ".next")


def first_public(key: Path) -> Verifier:
    first = first_public_path(key)
    return read_public(first if first.exists() else public_path(key))


def make_next_key(key: Path, name: str) -> Signer:
    """A new key, on the disk but not in use. Raises OSError."""
    private = Ed25519PrivateKey.generate()
    _create(next_path(key), _pem(private), _KEY_MODE, replace=True)
    sync_directory(key.parent)
    return Signer.of(name, private)


def put_next_key_in_place(key: Path, new: Signer) -> None:
    """Make the next key the log's; each step may be the last before a crash, and all may be done again."""
    first, public = first_public_path(key), public_path(key)
    if not first.exists():
        _create(first.with_suffix(".new"), public.read_bytes(), _PUBLIC_MODE, replace=True)
        first.with_suffix(".new").rename(first)
    if read_public(public) != new.verifier:
        _create(public.with_suffix(".new"), (new.verifier.text() + "\n").encode(), _PUBLIC_MODE, replace=True)
        public.with_suffix(".new").rename(public)
    next_path(key).rename(key)
    sync_directory(key.parent)


def settle_rotation(directory: Path, key: Path) -> None:
    """End what a crash left of a key's rotation: the last segment shows whether the new key was in use."""
    waiting = next_path(key)
    if not waiting.exists():
        return
    new: Signer | None = None
    with contextlib.suppress(ValueError, TypeError):
        loaded = serialization.load_pem_private_key(waiting.read_bytes()[:_KEY_BYTES_MAX], password=None)
        if isinstance(loaded, Ed25519PrivateKey):
            new = Signer.of(read_public(public_path(key)).name, loaded)
    if new is not None and _begins_with(directory, new.verifier):
        put_next_key_in_place(key, new)
    else:
        waiting.unlink()


def _begins_with(directory: Path, verifier: Verifier) -> bool:
    """Whether the last segment's first checkpoint is signed by this key."""
    paths = segment_paths(directory)
    if not paths:
        return False
    data = paths[-1][1].read_bytes()
    try:
        frame = segments.frame_at(data, segments.parse_header(data).length)
        open_checkpoint(frame.payload.decode("utf-8", "replace"), verifier)
    except (segments.Damaged, BadNote):
        return False
    return True


def add_rotation(directory: Path, note: str) -> None:
    """Keep a note by which a key hands over; durable. Raises OSError."""
    with _opened(directory / ROTATIONS, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as fd:
        os.write(fd, f"{note}\n".encode())
        os.fsync(fd)
    sync_directory(directory)


def _pem(private: Ed25519PrivateKey) -> bytes:
    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_public(path: Path) -> Verifier:
    return Verifier.parse(path.read_bytes()[:_KEY_BYTES_MAX].decode("utf-8", "replace"))


def segment_paths(directory: Path) -> list[tuple[int, Path]]:
    """First seq and path of each segment, in order; other files are not segments."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in (directory / SEGMENTS).iterdir():
            first = segments.first_seq_of(path.name)
            if first is not None:
                found.append((first, path))
    return sorted(found)


def redact_in_segment(path: Path, offset: int, mark: segments.Mark) -> None:
    """Put a redaction's frame in the place of the entry's at `offset` of a sealed segment; durable when this returns.

    By a new file and rename, so that a crash leaves the old segment or the new one. Does nothing where it is redacted
    already. Raises OSError, or ValueError where there is no entry, or one too short for a mark.
    """
    data = path.read_bytes()
    frame = segments.frame_at(data, offset)
    if frame.kind is segments.Kind.REDACTED:
        return
    if frame.kind is not segments.Kind.ENTRY:
        raise ValueError(f"there is no entry at {offset} of {path.name}")
    redacted = segments.redacted_frame(frame, mark)
    kept, temporary = path.stat(), path.with_suffix(NEW)
    try:
        _create(temporary, data[:offset] + redacted + data[offset + len(redacted) :], _FILE_MODE, replace=True)
        os.utime(temporary, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # by it, retention knows when the segment ended
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_segments(paths: Sequence[Path]) -> None:
    """Oldest first, so that what a crash leaves is still one piece."""
    for path in paths:
        path.unlink(missing_ok=True)
        sync_directory(path.parent)


def read_checkpoint(directory: Path) -> str | None:
    """The note in the checkpoint file, None where there is no such file."""
    try:
        return (directory / CHECKPOINT).read_bytes()[:NOTE_BYTES_MAX].decode("utf-8", "replace")
    except FileNotFoundError:
        return None


def read_rotations(directory: Path) -> list[str]:
    """The notes by which the log's keys handed over, oldest first."""
    try:
        with (directory / ROTATIONS).open("rb") as file:
            return keys.notes_in(file.read(ROTATIONS_BYTES_MAX).decode("utf-8", "replace"))
    except FileNotFoundError:
        return []


def sync_directory(path: Path) -> None:
    with _opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


class CheckpointFile:
    """The newest checkpoint, rewritten in place.

    In place and not by rename, because then it needs no free space; the text never gets shorter, and less than a
    sector is written, so a crash leaves the old or the new one. It is written after what it covers is durable: a log
    that ends before it was cut.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / CHECKPOINT
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)

    def write(self, note: str) -> None:
        os.pwrite(self._fd, note.encode(), 0)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class SegmentFile:
    """The segment at the end of the log. The log's lock guards all but the disk's part of `sync`.

    Frames are kept in memory until they are durable. After a failed fdatasync the kernel may have dropped them from the
    page cache and reports the failure only once, and to this descriptor (fsyncgate; Rebello et al., ATC 2020). So the
    descriptor is given up: `repair` writes the kept frames again through a new one, which makes the pages dirty again,
    and only its fdatasync counts.
    """

    def __init__(self, path: Path, first_seq: int, *, end: int) -> None:
        self.path = path
        self.first_seq = first_seq
        self.end = end
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._durable = end
        self._kept: list[bytes] = []
        self.kept_bytes = 0

    @classmethod
    def create(cls, directory: Path, tree: Frontier, note: str) -> "SegmentFile":
        """A new segment that begins with `tree` and a checkpoint over it; durable when this returns."""
        first_seq = tree.size + 1
        path = directory / SEGMENTS / segments.file_name(first_seq)
        content = segments.header(tree) + segments.checkpoint_frame(note)
        temporary = path.with_suffix(NEW)
        try:
            _create(temporary, content, _FILE_MODE, replace=True)
            temporary.rename(path)
            sync_directory(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        return cls(path, first_seq, end=len(content))

    def write(self, data: bytes) -> int:
        """Append `data`; returns its offset. After an OSError the file is as it was before."""
        at, view = self.end, memoryview(data)
        try:
            while view:
                written = os.pwrite(self._fd, view, at)
                at += written
                view = view[written:]
        except OSError:
            # What was written of it would read as a torn tail; where even this fails, the next write covers it.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.end)
            raise
        offset, self.end = self.end, at
        self._kept.append(data)
        self.kept_bytes += len(data)
        return offset

    def sync(self, lock: threading.Lock) -> None:
        """Make durable what was written until now; takes `lock`, but not while the disk works."""
        with lock:
            end, kept, self._kept = self.end, self._kept, []
        try:
            os.fdatasync(self._fd)
        except OSError:
            with lock:
                self._kept[:0] = kept
            raise
        with lock:
            self._durable = end
            self.kept_bytes -= sum(map(len, kept))

    def repair(self, lock: threading.Lock) -> None:
        """After a failed sync: write what is not durable again, through a new descriptor. No `write` meanwhile."""
        with lock:
            at, content = self._durable, b"".join(self._kept)
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            view = memoryview(content)
            while view:
                written = os.pwrite(fd, view, at)
                at += written
                view = view[written:]
            os.fdatasync(fd)
        except OSError:
            os.close(fd)
            raise
        with lock:
            os.close(self._fd)
            self._fd, self._durable, self._kept, self.kept_bytes = fd, at, [], 0

    def close(self) -> None:
        os.close(self._fd)


def _create(path: Path, content: bytes, mode: int, *, replace: bool = False) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if replace else os.O_EXCL)
    with _opened(path, flags, mode) as fd:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)


@contextlib.contextmanager
def _opened(path: Path, flags: int, mode: int = _FILE_MODE) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        yield fd
    finally:
        os.close(fd)
