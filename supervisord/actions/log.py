"""The action log: one writer, an append-only RFC 6962 tree in segments, group commit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

from supervisord.actions.types import Action, Durability, Entry, Proof, Report


class ActionLog:
    """The one writer of a log directory. Use it from one asyncio loop; see `record` and `append`."""

    @classmethod
    def open(
        cls,
        directory: Path,
        key: Path,
        *,
        durability: Durability = "batched",
        now_ns: Callable[[], int],
        origin: str = "stockade.local/actions",
        checkpoint_every_entries: int = 1024,
        checkpoint_seconds: float = 1.0,
        on_checkpoint: Callable[[str], None] | None = None,
    ) -> ActionLog:
        """Open or begin the log in `directory`; blocking, so call it before the loop runs or in a thread."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        raise NotImplementedError

    @property
    def public_key(self) -> str:
        raise NotImplementedError

    async def record(self, action: Action) -> Entry:
        """Record `action`; durable when this returns. Raises CannotRecord."""
        raise NotImplementedError

    async def append(self, action: Action) -> Entry:
        """Record `action`; in the file (write(2)) when this returns, durable within 10 ms or 256 entries. Raises CannotRecord."""
        raise NotImplementedError

    async def query(
        self,
        *,
        agent_id: str | None = None,
        verb: str | None = None,
        verdict: str | None = None,
        since_ns: int | None = None,
        until_ns: int | None = None,
        after_seq: int = 0,
        newest_first: bool = False,
        limit: int = 1000,
    ) -> list[Entry]:
        raise NotImplementedError

    def subscribe(self, after_seq: int = 0) -> AsyncIterator[Entry]:
        """Every entry after `after_seq`, then new ones as they come; resume with the last `seq` seen."""
        raise NotImplementedError

    async def checkpoint(self) -> str:
        raise NotImplementedError

    async def verify(self) -> Report:
        raise NotImplementedError

    async def proof(self, seq: int, size: int | None = None) -> Proof:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError
