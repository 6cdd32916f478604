"""Host paths that agents get, opened so that nobody can swap what is behind them (openat(2), path_resolution(7))."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final

from supervisord.callers import Role
from supervisord.errors import InvalidInput, NotFound, PermissionDenied
from supervisord.plan import WORKSPACE, OpenedFile, WantedFile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import PurePosixPath

    from supervisord.callers import Caller

_STEP_FLAGS: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def open_path(path: PurePosixPath) -> int:
    """An O_PATH descriptor of `path`, walked part by part without following a single symbolic link.

    The result of RESOLVE_NO_SYMLINKS (openat2(2)) by plain openat(2). Raises InvalidInput for a link or a relative
    path, NotFound for what is not there.
    """
    if not path.is_absolute() or ".." in path.parts:
        raise InvalidInput(f"cannot open {path}: it is not an absolute path without `..`", remedy="write it in full")
    fd = os.open("/", _STEP_FLAGS | os.O_DIRECTORY)
    for count, part in enumerate(path.parts[1:], start=2):
        try:
            inner = os.open(part, _STEP_FLAGS, dir_fd=fd)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(f"cannot open {path}: {error.strerror}", remedy="correct the path") from error
        except OSError as error:
            raise InvalidInput(f"cannot open {path}: {error.strerror}", remedy="correct the path") from error
        finally:
            os.close(fd)
        fd = inner
        if stat.S_ISLNK(os.fstat(fd).st_mode):
            os.close(fd)
            raise InvalidInput(
                f"cannot open {path}: {'/'.join(path.parts[:count])[1:]} is a symbolic link",
                remedy=f"give the real path, as `realpath {path}` prints it",
            )
    return fd


def file_uid(caller: Caller) -> int:
    """Whose files the caller may hand out: an admin anybody's, as root itself could."""
    return 0 if caller.role is Role.ADMIN else caller.uid


def open_files(wanted: Sequence[WantedFile], *, caller_uid: int | None) -> tuple[tuple[OpenedFile, ...], list[int]]:
    """Open all of `wanted`; gives them and their descriptors, which the receiver closes.

    A caller who is not root (`caller_uid`, None for one without a uid) may only hand out what that uid owns: the daemon
    would otherwise read for them what they cannot. What a policy names was decided by who wrote the policy.
    """
    opened: list[OpenedFile] = []
    fds: list[int] = []
    try:
        for file in wanted:
            fd = open_path(file.path)
            fds.append(fd)
            facts = os.fstat(fd)
            _check(file, facts, caller_uid)
            opened.append(OpenedFile(file, len(fds) - 1, facts.st_uid, facts.st_gid))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return tuple(opened), fds


def _check(file: WantedFile, facts: os.stat_result, caller_uid: int | None) -> None:
    if not (stat.S_ISDIR(facts.st_mode) or stat.S_ISREG(facts.st_mode)):
        raise InvalidInput(
            f"cannot show {file.path} to an agent: it is neither a directory nor a regular file",
            remedy="name a directory or a file",
        )
    if file.target == WORKSPACE and not file.layer and not stat.S_ISDIR(facts.st_mode):
        raise InvalidInput(
            f"cannot show {file.path} as the workspace: it is a file", remedy="name the directory it is in"
        )
    if file.layer and not stat.S_ISDIR(facts.st_mode):
        raise InvalidInput(
            f"cannot keep changes of {file.path} in a layer: it is a file", remedy="name the directory it is in"
        )
    if not file.by_policy and caller_uid not in {0, facts.st_uid}:
        raise PermissionDenied(
            f"cannot show {file.path} to an agent: it is owned by uid {facts.st_uid}, not by you",
            remedy="ask its owner, or have root launch the agent",
        )
