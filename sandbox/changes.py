"""What an agent changed in an overlay workspace: found by walking its layer, shown as differences, made real on order.

The layer was written by the agent and is hostile: names of any bytes, links to anywhere, fifos that block whoever opens
them, trees of any size, files of any length. So: every path is resolved below one of two directory descriptors, with no
link followed and no mount crossed (openat2(2)); nothing is opened before it is known to be a regular file, and then
without blocking; entries, depth, bytes read and bytes reported are bounded. Set-id bits, devices, fifos and sockets are
never made. The marks in the layer are those of overlayfs with `userxattr`: a character device 0/0 is a deletion, and a
directory with `user.overlay.opaque` hides what is below it.

Runs in a process of its own (changes_worker.py), which has the owner's ids and nothing else.
"""

# ruff: noqa: PTH208 - descriptors and bytes of any kind: pathlib knows neither

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from sandbox import syscalls

DEPTH_MAX: Final = 128
PATH_BYTES_MAX: Final = 4000
PIECE_BYTES: Final = 1 << 20
LINK_BYTES_MAX: Final = 4096

_BENEATH: Final = (
    syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV
)
_OPAQUE: Final = "user.overlay.opaque"

Kind = Literal["added", "modified", "deleted"]
Type = Literal["file", "directory", "symlink", "fifo", "socket", "device"]
# Of a directory of the layer, what the workspace has in the same place: shown where the layer has nothing of its own,
# hidden by a directory that was made anew, or nothing at all.
Shows = Literal["merged", "hidden", "nothing"]
MADE: Final = ("file", "directory", "symlink")  # what can be applied


class TooMuch(Exception):  # noqa: N818 - reads as what the layer is
    """The layer is larger than what is looked at; the text says in what."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much of a layer is looked at."""

    entries_max: int = 100_000
    read_bytes_max: int = 8 << 30


@dataclass(frozen=True, slots=True)
class Seen:
    """What was there when it was looked at; another `identity` is another thing."""

    type: Type
    mode: int
    size: int
    identity: tuple[int, int]  # device, inode
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Seen":
        kind, mode = _type(status.st_mode), stat.S_IMODE(status.st_mode)
        identity = (status.st_dev, status.st_ino)
        return cls(kind, mode, status.st_size, identity, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Change:
    """One path that would be another after an apply. `conflict` says why it is not the agent's alone any more."""

    path: str
    kind: Kind
    type: Type
    size: int = 0
    mode: int = 0
    sha256: str = ""
    link: str = ""
    notes: tuple[str, ...] = ()
    conflict: str = ""
    refused: str = ""
    below: Seen | None = None  # what the workspace has there

    def facts(self) -> tuple[str, ...]:
        """What makes it this change and no other, for a digest of all of them."""
        return (self.path, self.kind, self.type, f"{self.mode:o}", str(self.size), self.sha256, self.link)


def digest(changes: Sequence[Change]) -> str:
    """Name a list of changes, so that what is applied is what was shown."""
    total = hashlib.sha256()
    for change in changes:
        for text in change.facts():
            raw = os.fsencode(text)
            total.update(len(raw).to_bytes(8, "big") + raw)
    return f"sha256:{total.hexdigest()}"


def _type(mode: int) -> Type:
    for test, name in (
        (stat.S_ISREG, "file"),
        (stat.S_ISDIR, "directory"),
        (stat.S_ISLNK, "symlink"),
        (stat.S_ISFIFO, "fifo"),
        (stat.S_ISSOCK, "socket"),
    ):
        if test(mode):
            return name  # type: ignore[return-value]  # they are the words of Type
    return "device"


def _whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def open_below(top: int, path: str, flags: int) -> int:
    """Open below a directory; no link is followed, no mount crossed, and a fifo does not block."""
    quiet = 0 if flags & os.O_PATH else os.O_NONBLOCK | os.O_NOCTTY
    return syscalls.openat2(top, path or ".", flags | os.O_NOFOLLOW | quiet, resolve=_BENEATH)


def look(top: int, path: str) -> os.stat_result | None:
    """What is there, links not followed; None for nothing. Raises OSError, ELOOP where a link is on the way."""
    try:
        fd = open_below(top, path, os.O_PATH)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


@dataclass(slots=True)
class Walk:
    """Looks for the changes; `upper` is the layer, `lower` the workspace, both descriptors of directories."""

    upper: int
    lower: int
    since_ns: int
    bounds: Bounds
    entries: int = 0
    read_bytes: int = 0
    _names: set[str] = field(default_factory=set)

    def changes(self) -> Iterator[Change]:
        """Yield every change, a directory before what is in it. Raises TooMuch."""
        yield from self._directory("", 0, "merged")

    def _count(self, number: int = 1) -> None:
        self.entries += number
        if self.entries > self.bounds.entries_max:
            raise TooMuch(f"more than {self.bounds.entries_max} entries")

    def _list(self, top: int, path: str) -> list[str]:
        fd = open_below(top, path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            names = []
            with os.scandir(fd) as entries:
                for entry in entries:
                    self._count()
                    names.append(entry.name)
        finally:
            os.close(fd)
        return sorted(names)

    def _directory(self, path: str, depth: int, shows: Shows) -> Iterator[Change]:
        if depth > DEPTH_MAX:
            raise TooMuch(f"more than {DEPTH_MAX} directories deep")
        names = self._list(self.upper, path)
        if shows == "hidden":
            yield from self._hidden(path, set(names))
        for name in names:
            inner = f"{path}/{name}" if path else name
            if len(os.fsencode(inner)) > PATH_BYTES_MAX:
                raise TooMuch(f"a path of more than {PATH_BYTES_MAX} bytes")
            status = look(self.upper, inner)
            if status is not None:
                yield from self._entry(inner, status, depth, shows)

    def _hidden(self, path: str, kept: set[str]) -> Iterator[Change]:
        """What a directory that was made anew no longer has of the workspace's."""
        below = self._below(path)
        if isinstance(below, str) or below is None or below.type != "directory":
            return
        for name in self._list(self.lower, path):
            if name not in kept:
                yield from self._deletion(f"{path}/{name}" if path else name)

    def _entry(self, path: str, status: os.stat_result, depth: int, shows: Shows) -> Iterator[Change]:
        if _whiteout(status):
            if shows != "nothing":
                yield from self._deletion(path)
            return
        below = None if shows == "nothing" else self._below(path)
        if isinstance(below, str):
            yield Change(path, "modified", _type(status.st_mode), status.st_size, conflict=below, refused=below)
            return
        if stat.S_ISDIR(status.st_mode):
            through = below is not None and below.type == "directory"
            if not through or below is None or below.mode & 0o777 != status.st_mode & 0o777:
                yield self._made(path, status, below)
            inner: Shows = "nothing" if not through else "hidden" if self._is_opaque(path) else shows
            yield from self._directory(path, depth + 1, inner)
            return
        change = self._made(path, status, below)
        if not self._same(change, below):
            yield change

    def _below(self, path: str) -> Seen | str | None:
        """What the workspace has there: nothing, something, or why it cannot be looked at."""
        try:
            status = look(self.lower, path)
        except OSError as error:
            return _why(error)
        return None if status is None else Seen.of(status)

    def _is_opaque(self, path: str) -> bool:
        fd = open_below(self.upper, path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return os.getxattr(fd, _OPAQUE) == b"y"
        except OSError:
            return False
        finally:
            os.close(fd)

    def _made(self, path: str, status: os.stat_result, below: Seen | None) -> Change:
        """The change that this entry of the layer stands for."""
        kind: Kind = "added" if below is None else "modified"
        type_ = _type(status.st_mode)
        notes = []
        if status.st_mode & 0o6000:
            notes.append("set-id bits are dropped")
        if below is not None and below.type != type_:
            notes.append(f"replaces a {below.type}")
        size = status.st_size if type_ == "file" else 0
        sha256, link, refused = "", "", ""
        if type_ == "file":
            sha256, refused = self._hash(path, size)
        elif type_ == "symlink":
            link = self._link(path)
            if leads_outside(path, link):
                notes.append("leads outside of the workspace")
        elif type_ != "directory":
            refused = f"a {type_} is never made"
        mode = status.st_mode & 0o777 if type_ != "symlink" else 0
        conflict = self._conflict(path, below, whole=below is not None and type_ != "directory")
        return Change(path, kind, type_, size, mode, sha256, link, tuple(notes), conflict, refused, below)

    def _deletion(self, path: str) -> Iterator[Change]:
        below = self._below(path)
        if below is None:
            return
        if isinstance(below, str):
            yield Change(path, "deleted", "file", conflict=below, refused=below)
            return
        conflict = self._conflict(path, below, whole=True)
        yield Change(path, "deleted", below.type, below.size, conflict=conflict, below=below)

    def _conflict(self, path: str, below: Seen | None, *, whole: bool) -> str:
        """Why the workspace is not what the agent was given: its own change time, or one in the tree that would go."""
        if below is None:
            return ""
        if below.type != "directory":
            return "changed in the workspace since the launch" if below.changed_ns >= self.since_ns else ""
        if not whole:
            return ""
        for inner, seen in self._tree(path, 0):
            if seen.changed_ns >= self.since_ns:
                return f"{inner} changed in the workspace since the launch"
        return ""

    def _tree(self, path: str, depth: int) -> Iterator[tuple[str, Seen]]:
        if depth > DEPTH_MAX:
            raise TooMuch(f"more than {DEPTH_MAX} directories deep")
        below = self._below(path)
        if below is None or isinstance(below, str):
            return
        yield path, below
        if below.type == "directory":
            for name in self._list(self.lower, path):
                yield from self._tree(f"{path}/{name}", depth + 1)

    def _hash(self, path: str, size: int) -> tuple[str, str]:
        self.read_bytes += size
        if self.read_bytes > self.bounds.read_bytes_max:
            self.read_bytes -= size
            return "", f"more than {self.bounds.read_bytes_max} bytes to read"
        try:
            total = hashlib.sha256()
            for piece in pieces(self.upper, path):
                total.update(piece)
        except OSError as error:
            return "", _why(error)
        return total.hexdigest(), ""

    def _link(self, path: str) -> str:
        fd = open_below(self.upper, path, os.O_PATH)
        try:
            return os.readlink("", dir_fd=fd)[:LINK_BYTES_MAX]
        finally:
            os.close(fd)

    def _same(self, change: Change, below: Seen | None) -> bool:
        """Whether the workspace has the very same there: a file that was opened for writing and left as it was."""
        if below is None or below.type != change.type or change.type not in MADE:
            return False
        if change.type == "symlink":
            fd = open_below(self.lower, change.path, os.O_PATH)
            try:
                return os.readlink("", dir_fd=fd) == change.link
            finally:
                os.close(fd)
        if below.mode & 0o777 != change.mode or below.size != change.size or not change.sha256:
            return False
        try:
            total = hashlib.sha256()
            for piece in pieces(self.lower, change.path):
                total.update(piece)
        except OSError:
            return False
        return total.hexdigest() == change.sha256


def pieces(top: int, path: str, bytes_max: int | None = None) -> Iterator[bytes]:
    """Yield the content of a regular file below a directory. Raises OSError for anything else."""
    fd = open_below(top, path, os.O_RDONLY)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        left = status.st_size if bytes_max is None else min(status.st_size, bytes_max)
        while left > 0:
            piece = os.read(fd, min(PIECE_BYTES, left))
            if not piece:
                return
            left -= len(piece)
            yield piece
    finally:
        os.close(fd)


def leads_outside(path: str, target: str) -> bool:
    """Whether a link names something that is not below the workspace, by its words alone."""
    if target.startswith("/"):
        return True
    depth = path.count("/")
    for part in target.split("/"):
        if part == "..":
            depth -= 1
        elif part not in ("", "."):
            depth += 1
        if depth < 0:
            return True
    return False


def wanted(path: str, chosen: Sequence[str]) -> bool:
    """Whether a path is one that was chosen, or below one; nothing chosen means all."""
    return not chosen or any(path == one or path.startswith(f"{one}/") for one in chosen)


def _why(error: OSError) -> str:
    match error.errno:
        case errno.ELOOP:
            return "a symbolic link of the workspace is on the way"
        case errno.EXDEV:
            return "another file system of the host is on the way"
        case _:
            return os.strerror(error.errno or errno.EIO)


@dataclass(slots=True)
class Apply:
    """Makes changes real, one by one; each is there as a whole or not at all."""

    upper: int
    lower: int
    force: bool
    _number: int = 0

    def perform(self, change: Change) -> tuple[str, str]:
        """Return (outcome, why): `applied`, `conflict`, `refused` or `failed`."""
        if change.refused:
            return "refused", change.refused
        if change.conflict and not self.force:
            return "conflict", change.conflict
        try:
            return self._act(change)
        except OSError as error:
            return "failed", _why(error)

    def _act(self, change: Change) -> tuple[str, str]:
        parent, _, name = change.path.rpartition("/")
        place = self._parent(parent)
        try:
            moved = self._moved(place, name, change)
            if moved and not self.force:
                return "conflict", moved
            if change.kind == "deleted":
                _remove(place, name)
            elif change.type == "directory":
                self._make_directory(place, name, change)
            else:
                self._make_file(place, name, change)
        finally:
            os.close(place)
        return "applied", ""

    def _moved(self, place: int, name: str, change: Change) -> str:
        """Why the workspace is another than when it was looked at, a moment ago."""
        now = look(place, name)
        if (now is None) != (change.below is None):
            return "it appeared meanwhile" if now is not None else "it went meanwhile"
        if now is not None and change.below is not None:
            seen = Seen.of(now)
            # A directory changes as its entries are applied; a change time also with another link to the same file.
            same = seen.type == "directory" or seen.modified_ns == change.below.modified_ns
            if seen.identity != change.below.identity or not same:
                return "it changed meanwhile"
        return ""

    def _parent(self, path: str) -> int:
        """Open the directory that a path is in; what is missing of it is made, as the layer has it."""
        try:
            return open_below(self.lower, path, os.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError:
            above, _, name = path.rpartition("/")
            place = self._parent(above)
            try:
                status = look(self.upper, path)
                os.mkdir(name, 0o755 if status is None else status.st_mode & 0o777, dir_fd=place)
                return open_below(place, name, os.O_PATH | os.O_DIRECTORY)
            finally:
                os.close(place)

    def _make_directory(self, place: int, name: str, change: Change) -> None:
        if change.below is not None and change.below.type != "directory":
            _remove(place, name)
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, change.mode, dir_fd=place)
        fd = open_below(place, name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fchmod(fd, change.mode)
        finally:
            os.close(fd)

    def _make_file(self, place: int, name: str, change: Change) -> None:
        self._number += 1
        temporary = f".stockade-apply-{os.getpid()}-{self._number}-{os.urandom(6).hex()}"
        try:
            if change.type == "symlink":
                os.symlink(change.link, temporary, dir_fd=place)
            else:
                self._copy(place, temporary, change)
            if change.below is not None and change.below.type == "directory":
                _remove(place, name)
            if change.below is None and not self.force:
                # link(2) and not rename(2): what somebody made there meanwhile is not overwritten.
                os.link(temporary, name, src_dir_fd=place, dst_dir_fd=place, follow_symlinks=False)
                os.unlink(temporary, dir_fd=place)
            else:
                os.rename(temporary, name, src_dir_fd=place, dst_dir_fd=place)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=place)
            raise

    def _copy(self, place: int, temporary: str, change: Change) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600, dir_fd=place)
        try:
            total = hashlib.sha256()
            for piece in pieces(self.upper, change.path, change.size):
                total.update(piece)
                view = memoryview(piece)
                while view:
                    view = view[os.write(fd, view) :]
            if total.hexdigest() != change.sha256:
                raise OSError(errno.ESTALE, "the layer changed")
            os.fchmod(fd, change.mode)
            os.fsync(fd)
        finally:
            os.close(fd)


def _remove(place: int, name: str, depth: int = 0) -> None:
    """Remove an entry and all below it; links are removed, not followed."""
    if depth > DEPTH_MAX:
        raise OSError(errno.ENAMETOOLONG, "too many directories deep")
    status = look(place, name)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(name, dir_fd=place)
        return
    fd = open_below(place, name, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for inner in os.listdir(fd):
            _remove(fd, inner, depth + 1)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=place)
