"""The files of an image on disk, below one directory; no name of an image is ever resolved through a link.

Each step of a path is opened by itself with O_NOFOLLOW below the directory before (openat(2)); openat2(2) would do it
in one call, but a service manager that keeps set-id bits off its services answers ENOSYS to it (RestrictSUIDSGID=).
"""

# ruff: noqa: PTH208 - descriptors: pathlib knows no dir_fd

import contextlib
import os
import stat
from collections.abc import Callable, Iterable
from typing import Final

from sandbox.images.entries import Parts
from sandbox.images.limits import BadImage, printable

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_IMPLIED_MODE: Final = 0o755
_MTIME_MAX: Final = 1 << 33


class Tree:
    """Writes below `root`; `enter` is told of each file or directory that is made, and raises where it is too many."""

    def __init__(self, root: int, enter: Callable[[], None]) -> None:
        self._root = root
        self._enter = enter
        self._modes: dict[Parts, int] = {(): _IMPLIED_MODE}
        self._touched: set[Parts] = set()
        self._parent: tuple[Parts, int] | None = None

    def begin_layer(self) -> None:
        self._touched = set()

    # --- making

    def directory(self, parts: Parts, mode: int) -> None:
        if parts:
            parent, name = self._above(parts)
            found = _kind(name, parent)
            if found is not None and not stat.S_ISDIR(found):
                self._remove(name, parent)
                found = None
            if found is None:
                self._enter()
                os.mkdir(name, 0o700, dir_fd=parent)
        self._modes[parts] = mode
        self._touch(parts)

    def file(self, parts: Parts, chunks: Iterable[bytes], *, mode: int, mtime: int) -> None:
        parent, name = self._free(parts)
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        try:
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    view = view[os.write(fd, view) :]
            os.fchmod(fd, mode)
            # Compiled Python names the time of its source: without it every start would compile anew.
            seconds = min(max(mtime, 0), _MTIME_MAX)
            os.utime(fd, (seconds, seconds))
        finally:
            os.close(fd)

    def symlink(self, parts: Parts, text: bytes) -> None:
        parent, name = self._free(parts)
        os.symlink(text, name, dir_fd=parent)

    def hardlink(self, parts: Parts, target: Parts) -> None:
        """Give a regular file of this image another name; raises `BadImage` for anything else."""
        shown = printable(b"/".join(target))
        if not target or target == parts:
            raise BadImage(f"hard link {printable(b'/'.join(parts))}: its target {shown} is no file")
        above = self._open(target[:-1], make=False)
        try:
            found = None if above is None else _kind(target[-1], above)
            if above is None or found is None or not stat.S_ISREG(found):
                raise BadImage(
                    f"hard link {printable(b'/'.join(parts))}: its target {shown} is no regular file of the image"
                )
            parent, name = self._free(parts)
            os.link(target[-1], name, src_dir_fd=above, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            if above is not None:
                os.close(above)

    # --- whiteouts

    def remove(self, parts: Parts) -> None:
        """Take away what lower layers have there; what this layer made stays."""
        self._forget()
        parent = self._open(parts[:-1], make=False)
        if parent is None:
            return
        try:
            self._clear_entry(parent, parts)
        finally:
            os.close(parent)

    def empty(self, parts: Parts) -> None:
        """Take away what lower layers have in the directory."""
        self._forget()
        fd = self._open(parts, make=False)
        if fd is None:
            return
        try:
            self._clear(fd, parts)
        finally:
            os.close(fd)

    def _clear(self, fd: int, parts: Parts) -> None:
        for name in os.listdir(fd):
            self._clear_entry(fd, (*parts, os.fsencode(name)))

    def _clear_entry(self, parent: int, parts: Parts) -> None:
        name = parts[-1]
        if parts not in self._touched:
            if _kind(name, parent) is not None:
                self._remove(name, parent)
            return
        found = _kind(name, parent)
        if found is not None and stat.S_ISDIR(found):
            fd = os.open(name, _DIRECTORY, dir_fd=parent)
            try:
                self._clear(fd, parts)
            finally:
                os.close(fd)

    # --- the end

    def finish(self) -> None:
        """Give every directory its mode; until now all of them were the unpacker's alone."""
        self._forget()
        for parts in sorted(self._modes, key=len, reverse=True):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, BadImage):
                fd = self._open(parts, make=False)
                if fd is not None:
                    try:
                        os.fchmod(fd, self._modes[parts])
                    finally:
                        os.close(fd)

    # --- walking

    def _free(self, parts: Parts) -> tuple[int, bytes]:
        """Return the directory for a new entry and its name there, where nothing is any more."""
        if not parts:
            raise BadImage("entry .: the root of an image is a directory")
        parent, name = self._above(parts)
        if _kind(name, parent) is not None:
            self._remove(name, parent)
        self._enter()
        self._touch(parts)
        return parent, name

    def _above(self, parts: Parts) -> tuple[int, bytes]:
        """Return the directory that holds an entry, made where it is missing; the descriptor stays this object's."""
        above = parts[:-1]
        if self._parent is None or self._parent[0] != above:
            self._forget()
            fd = self._open(above, make=True)
            assert fd is not None  # noqa: S101 - it is made
            self._parent = (above, fd)
        return self._parent[1], parts[-1]

    def _open(self, parts: Parts, *, make: bool) -> int | None:
        fd = os.dup(self._root)
        for depth, name in enumerate(parts, start=1):
            try:
                found = _kind(name, fd)
                if found is None and not make:
                    return None
                if found is None:
                    self._enter()
                    os.mkdir(name, 0o700, dir_fd=fd)
                    self._modes[parts[:depth]] = _IMPLIED_MODE
                elif not stat.S_ISDIR(found):
                    what = "symbolic link" if stat.S_ISLNK(found) else "file"
                    raise BadImage(
                        f"entry {printable(b'/'.join(parts))}: it leads through the {what} "
                        f"{printable(b'/'.join(parts[:depth]))}"
                    )
                inner = os.open(name, _DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = inner
        return fd

    def _remove(self, name: bytes, parent: int) -> None:
        found = _kind(name, parent)
        if found is not None and stat.S_ISDIR(found):
            fd = os.open(name, _DIRECTORY, dir_fd=parent)
            try:
                for inner in os.listdir(fd):
                    self._remove(os.fsencode(inner), fd)
            finally:
                os.close(fd)
            os.rmdir(name, dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)

    def _forget(self) -> None:
        """Let go of the directory used last: another one may be at its path soon."""
        if self._parent is not None:
            os.close(self._parent[1])
            self._parent = None

    def _touch(self, parts: Parts) -> None:
        while parts not in self._touched:
            self._touched.add(parts)
            parts = parts[:-1]


def _kind(name: bytes, parent: int) -> int | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None
