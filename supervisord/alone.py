"""One daemon for a name and a run_dir: a second one would take what is the first one's for leftovers."""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from supervisord.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def alone(*, run_dir: Path, marks: Path, instance: str) -> Iterator[None]:
    """Hold run_dir, which exists, and the instance's mark in `marks` (see slots.py); raises Unavailable.

    The kernel lets go of both when this process ends, however it does.
    """
    with ExitStack() as held:
        if not _lock(held, run_dir, os.O_RDONLY | os.O_DIRECTORY):
            raise Unavailable(
                f"cannot use run_dir {run_dir}: another stockaded works in it",
                remedy="stop it, or give this instance a run_dir of its own",
            )
        mark = marks / f".{instance}"
        try:
            marks.mkdir(mode=0o700, parents=True, exist_ok=True)
            free = _lock(held, mark, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise Unavailable(f"cannot use {marks}: {error.strerror}", remedy="make room for it") from error
        if not free:
            raise Unavailable(
                f"cannot start as instance {instance}: another stockaded of this host does already",
                remedy="stop it, or choose another `instance`",
            )
        try:
            yield
        finally:
            if mark.exists() and mark.stat().st_size == 0:  # it came to claim nothing
                mark.unlink()


def _lock(held: ExitStack, path: Path, flags: int) -> bool:
    """Lock what `path` is now, as long as `held` is; False where another process has."""
    while True:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        held.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            if os.path.samestat(os.fstat(fd), path.stat()):
                return True
        except FileNotFoundError:  # it was taken away between the two calls; what is locked is nobody's
            continue
