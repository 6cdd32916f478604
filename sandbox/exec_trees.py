"""What one exec started, in a group of its own below its agent's, so that it can be ended by itself.

Whatever a process does, its descendants are in its group (cgroups(7)): sessions of their own, ignored signals and
parents that are gone change nothing. The limits are the agent's. A group of which nothing is left is the next exec's,
so that as a rule none is made or removed while somebody waits; whose it is says an attribute that a restarted launcher
reads.
"""

import contextlib
import errno
import os
from collections.abc import Collection
from typing import Final

PREFIX: Final = "exec-"
LABEL: Final = "trusted.stockade.stream"
PIDS_READ_BYTES_MAX: Final = 1 << 20


class Tree:
    """One group, in the v2 tree that every layout has."""

    __slots__ = ("fd", "killed", "name")

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.killed = False
        self.fd = fd  # also for clone3

    def label(self, stream_id: str) -> None:
        os.setxattr(self.fd, LABEL, stream_id.encode())

    def labelled(self) -> str:
        """Return whose it is, or nothing where it is nobody's."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return os.getxattr(self.fd, LABEL).decode()
        return ""

    def kill(self) -> None:
        """SIGKILL to every process of it and below, also to those that are being forked."""
        self.killed = True
        fd = os.open("cgroup.kill", os.O_WRONLY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            os.write(fd, b"1")
        finally:
            os.close(fd)

    def populated(self) -> bool:
        return b"populated 1" in self._read("cgroup.events")

    def pids(self) -> list[int]:
        return [int(word) for word in self._read("cgroup.procs").split()]

    def _read(self, name: str) -> bytes:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            return b""  # removed with the agent's own group
        try:
            text = b""
            while len(text) < PIDS_READ_BYTES_MAX and (piece := os.read(fd, 1 << 16)):
                text += piece
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return b""
        else:
            return text
        finally:
            os.close(fd)


class Trees:
    """The trees of one agent; `parent` is the directory of its group, which stays somebody else's."""

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self._made = 0
        self._spare: Tree | None = None
        self.of: dict[str, Tree] = {}  # by stream: also of one that has ended and left something

    @classmethod
    def found(cls, parent: int) -> "Trees":
        """Take up what an earlier launcher made; of the streams themselves nothing is left but their descendants."""
        trees = cls(parent)
        for name in os.listdir(parent):
            number = name.removeprefix(PREFIX)
            if number == name or not number.isdecimal():
                continue
            trees._made = max(trees._made, int(number))
            tree = Tree(name, _open(parent, name))
            tree.killed = True  # it may have been, and is nobody's again
            if tree.populated():
                trees.of[tree.labelled() or name] = tree
            else:
                trees._remove(tree)
        return trees

    def take(self) -> Tree:
        """Return an empty one, most often of an exec that is over; raises `OSError`."""
        tree, self._spare = self._spare, None
        return self._make() if tree is None else tree

    def keep(self, tree: Tree, stream_id: str) -> None:
        """Note whose it is."""
        self.of[stream_id] = tree
        with contextlib.suppress(OSError):  # then a restarted launcher can end it with its agent only
            tree.label(stream_id)

    def left(self, stream_id: str) -> bool:
        """Return whether processes of a stream are there."""
        tree = self.of.get(stream_id)
        return tree is not None and tree.populated()

    def give_back(self, tree: Tree) -> None:
        """Keep it for the next exec: nothing is in it.

        Not one that was killed: newer kernels kill also what is cloned into it later (6.18, `kill_seq` of
        kernel/cgroup/cgroup.c, which is compared with that of the parent's group).
        """
        if self._spare is None and not tree.killed:
            self._spare = tree
            with contextlib.suppress(OSError):
                tree.label("")
        else:
            self._remove(tree)

    def drop(self, streams: Collection[str]) -> None:
        """Give back those of which nothing is left, save of these streams."""
        for stream_id, tree in list(self.of.items()):
            if stream_id not in streams and not tree.populated():
                del self.of[stream_id]
                self.give_back(tree)

    def close(self) -> None:
        """Let go of them; they are removed with the agent's group."""
        spare = [] if self._spare is None else [self._spare]
        for tree in (*self.of.values(), *spare):
            os.close(tree.fd)
        self.of.clear()
        self._spare = None

    def _make(self) -> Tree:
        self._made += 1
        name = f"{PREFIX}{self._made}"
        os.mkdir(name, 0o755, dir_fd=self._parent)
        return Tree(name, _open(self._parent, name))

    def _remove(self, tree: Tree) -> None:
        os.close(tree.fd)
        with contextlib.suppress(OSError):  # a zombie is in it still: then with the agent's own group
            os.rmdir(tree.name, dir_fd=self._parent)


def _open(parent: int, name: str) -> int:
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=parent)
