"""A consistent copy of the state directory while the daemon runs: the database, the log, and the log's public keys.

The database is copied first and the log after it, so that the log knows all that the database does, and more. The key
that signs is not in it: whoever holds a backup can read it and verify it, and cannot write in its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from typing import TYPE_CHECKING, Final

from supervisord.actions.types import Action
from supervisord.errors import Conflict, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from supervisord.actions.log import ActionLog
    from supervisord.store import Store

PIECE_BYTES: Final = 1 << 20
DATABASE: Final = "state.db"
STAGE: Final = ".backup-stage"  # in state_dir, not a name anybody would keep backups under: it is emptied at start


class Backup:
    """Makes copies, one at a time."""

    def __init__(self, *, state_dir: Path, actions: ActionLog, store: Store) -> None:
        self._keys = state_dir / "keys"
        self._stage = state_dir / STAGE
        self._actions = actions
        self._store = store
        self._under_way = False
        shutil.rmtree(self._stage, ignore_errors=True)

    async def pieces(self, actor: str) -> AsyncGenerator[tuple[str, bytes], None]:
        """(path below state_dir, the next bytes of that file), file after file; at least one piece of each."""
        if self._under_way:
            raise Conflict("cannot back up: another backup is under way", remedy="wait for it")
        self._under_way = True
        try:
            await self._actions.record(Action("", actor, "daemon.backup", "state", "allowed"))
            self._stage.mkdir(mode=0o700)
            await self._store.backup(self._stage / DATABASE)
            with contextlib.ExitStack() as opened:
                files = await asyncio.to_thread(self._opened, opened)
                for name, fd, size in files:
                    at = 0
                    while True:
                        piece = await asyncio.to_thread(os.pread, fd, min(PIECE_BYTES, size - at), at)
                        at += len(piece)
                        if len(piece) == 0 and at < size:
                            raise Unavailable(f"cannot back up {name}: it is shorter than it was", remedy="try again")
                        yield name, piece
                        if at >= size:
                            break
        except OSError as error:
            raise Unavailable(f"cannot back up: {error}", remedy="look after the disk of state_dir") from error
        finally:
            shutil.rmtree(self._stage, ignore_errors=True)
            self._under_way = False

    def _opened(self, opened: contextlib.ExitStack) -> list[tuple[str, int, int]]:
        """Each file's name, a descriptor that stays whatever becomes of the name, and how much of it counts."""

        def of(path: Path) -> tuple[int, int]:
            file = opened.enter_context(path.open("rb"))
            return file.fileno(), os.fstat(file.fileno()).st_size

        found = [(DATABASE, *of(self._stage / DATABASE))]
        self._stage.joinpath(DATABASE).unlink()
        found += [(f"log/{name}", fd, size) for name, fd, size in self._actions.snapshot(self._stage, opened)]
        found += [(f"keys/{path.name}", *of(path)) for path in sorted(self._keys.glob("*.pub"))]
        return found
