"""Unix sockets in what agents see of the host's files: a way around every other border.

A socket that has a path is reached by whoever may write to it, in whatever network namespace and through read-only
mounts too (unix(7)). So a tree with a socket in it is not shown, and two agents share no tree that one of them can
write to: they could pass each other descriptors, their gate's connections among them (SCM_RIGHTS). A policy can allow
either. What a program of the host makes in a tree later is not seen here (docs/THREAT_MODEL.md).
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from gateway_client.egress.scope import FsScope
from supervisord.errors import Conflict, InvalidInput, StockadeError
from supervisord.scopes import read_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from supervisord.agents import Description
    from supervisord.ids import AgentId
    from supervisord.plan import WantedFile
    from supervisord.scopes import Grant

ENTRIES_MAX: Final = 20_000
LOOK_SECONDS_MAX: Final = 0.5
DEPTH_MAX: Final = 64
_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Tree:
    path: PurePosixPath
    writable: bool


def trees(what: Description, granted: Iterable[Grant] = ()) -> list[Tree]:
    """What a live agent sees of the host's files, from its launch and by what was granted since (pure)."""
    found = [Tree(PurePosixPath(what.workspace), what.workspace_mode == "rw")] if what.workspace else []
    for grant in what.grants:
        try:
            scope = read_scope(grant.scope)
        except StockadeError:
            continue  # of another version
        if isinstance(scope, FsScope):
            found.append(Tree(scope.host_path, scope.writable))
    scopes = [grant.scope for grant in granted]
    return found + [Tree(scope.host_path, scope.writable) for scope in scopes if isinstance(scope, FsScope)]


def check_not_shared(
    wanted: Iterable[WantedFile], others: Iterable[Description], granted: Callable[[AgentId], Iterable[Grant]]
) -> None:
    """Raise Conflict where a tree overlaps one of another agent's and either can be written to (pure)."""
    mine = [Tree(file.path, file.writable) for file in wanted]
    for other in others if mine else ():
        for theirs in trees(other, granted(other.agent_id)):
            for ours in mine:
                overlap = theirs.path.is_relative_to(ours.path) or ours.path.is_relative_to(theirs.path)
                if overlap and (ours.writable or theirs.writable):
                    raise Conflict(
                        f"cannot show {ours.path}: agent {other.name} has {theirs.path}, and one of them can write to"
                        " it; through a socket there they could act for each other",
                        remedy="give each a directory of its own, both :ro, or set shared_workspace in the policy",
                    )


def check_no_sockets(wanted: Sequence[WantedFile], fds: Sequence[int]) -> bool:
    """Look for sockets in what is about to be shown; False where it was too much to look at all of it.

    Raises InvalidInput that names the first one.
    """
    deadline = time.monotonic() + LOOK_SECONDS_MAX
    left = ENTRIES_MAX
    for file, fd in zip(wanted, fds, strict=False):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            left = _look(file, fd, left, deadline)
    return left > 0


def _look(file: WantedFile, fd: int, left: int, deadline: float) -> int:
    """Gives how many more entries may be looked at; nothing is followed, and no other file system entered."""
    device = os.fstat(fd).st_dev
    todo = [(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), ".")]
    try:
        while todo and left > 0:
            directory, where = todo.pop()
            try:
                if os.fstat(directory).st_dev != device:
                    continue
                with os.scandir(directory) as entries:
                    for entry in entries:
                        left -= 1
                        if left <= 0 or time.monotonic() > deadline:
                            return 0
                        path = f"{where}/{entry.name}"
                        if entry.is_dir(follow_symlinks=False):
                            if len(todo) >= DEPTH_MAX * 16 or path.count("/") > DEPTH_MAX:
                                return 0
                            todo.append((os.open(entry.name, _FLAGS, dir_fd=directory), path))
                        elif _is_socket(entry):
                            raise InvalidInput(
                                f"cannot show {file.path}: {path[2:]} in it is a socket of a program of the host, which"
                                " the agent could use",
                                remedy="end that program or move its socket, or set allow_sockets in the policy",
                            )
            except OSError:
                continue  # it went away, or changed into something else, meanwhile
            finally:
                os.close(directory)
    finally:
        for directory, _ in todo:
            os.close(directory)
    return left


def _is_socket(entry: os.DirEntry[str]) -> bool:
    if entry.is_file(follow_symlinks=False) or entry.is_symlink():
        return False  # known without a look at the inode
    return stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode)
