"""Carrying out what `redaction.py` orders: first the order, then a new segment, then the file that holds the entry."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from supervisord.actions import redaction, segments
from supervisord.actions.files import redact_in_segment, segment_paths
from supervisord.actions.types import CannotRecord
from supervisord.errors import Conflict, NotFound, StockadeError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from pathlib import Path

    from supervisord.actions.log import ActionLog
    from supervisord.actions.query import Index
    from supervisord.actions.types import Action, Entry


class Redacting:
    """Of one log; `reading` is held by whoever reads or removes segments, `begin_segment` seals all that there are."""

    def __init__(
        self,
        directory: Path,
        log: ActionLog,
        index: Index,
        *,
        begin_segment: Callable[[], None],
        reading: threading.Lock,
    ) -> None:
        self._directory = directory
        self._log = log
        self._index = index
        self._begin_segment = begin_segment
        self._reading = reading

    async def redact(self, seq: int, *, actor: str, reason: str, needed: Callable[[Action], str]) -> Entry:
        """The order, once it is carried out; where that fails, or a crash comes between, `finish` does it later."""
        found = await self._log.query(after_seq=seq - 1, limit=1) if 1 <= seq <= self._log.size else []
        if not found or found[0].seq != seq:
            raise NotFound(f"cannot redact entry {seq}: it is not there", remedy="see `stockadectl actions`")
        order = redaction.order(found[0], actor=actor, reason=reason)
        if cause := needed(found[0].action):
            raise Conflict(f"cannot redact entry {seq}: {cause}", remedy="try again when that is over")
        frame = await asyncio.wrap_future(self._index.run(lambda: self._index.frame(seq)))
        if len(frame.payload) < segments.MARK_BYTES:
            raise Conflict(f"cannot redact entry {seq}: it is shorter than what would take its place")
        ordered = await self._log.record(order)
        await self._carry_out(ordered, redaction.order_of(ordered.seq, ordered.action))
        return ordered

    async def finish(self) -> int:
        """Carry out every order that no entry says is done; how many that were."""
        pending: dict[int, Entry] = {}
        after_seq = 0
        while page := await self._log.query(verb=redaction.VERB, after_seq=after_seq):
            after_seq = page[-1].seq
            for entry in page:
                if redaction.order_of(entry.seq, entry.action) is not None:
                    pending[entry.seq] = entry
                elif entry.action.verdict == "done" and isinstance(ended := entry.action.details.get("order"), int):
                    pending.pop(ended, None)
        done = 0
        failure: CannotRecord | None = None
        for ordered in pending.values():
            order = redaction.order_of(ordered.seq, ordered.action)
            if order is None or order.of < self._log.first_seq:
                continue  # it has been retired
            try:
                await self._carry_out(ordered, order)
            except CannotRecord as error:
                failure = error  # one that cannot be done keeps no other from being done
            else:
                done += 1
        if failure is not None:
            raise failure
        return done

    async def _carry_out(self, ordered: Entry, order: redaction.Order | None) -> None:
        if order is None:
            raise ValueError(f"entry {ordered.seq} orders nothing")
        try:
            await asyncio.to_thread(self._replace, ordered.seq, order)
        except (OSError, ValueError, segments.Damaged, StockadeError) as error:
            cause = error.message if isinstance(error, StockadeError) else str(error)
            with contextlib.suppress(CannotRecord):
                await self._log.append(redaction.ended(ordered, "failed", cause))
            raise CannotRecord(
                f"cannot redact entry {order.of}, though entry {ordered.seq} orders it: {cause}",
                remedy=f"look after {self._directory}; the next start of the daemon tries again",
            ) from error
        time_ns = order.time_seconds * 10**9
        await asyncio.wrap_future(self._index.run(lambda: self._index.redacted(order.of, time_ns)))
        await self._log.record(redaction.ended(ordered, "done"))

    def _replace(self, order_seq: int, order: redaction.Order) -> None:
        """In a segment that nothing writes any more, and behind a signature that the disk has."""
        self._begin_segment()
        frame = self._index.run(lambda: self._index.frame(order.of)).result()
        if frame.leaf_hash.hex() != order.leaf_hash:
            raise ValueError(f"the order is for the hash {order.leaf_hash}, the entry has {frame.leaf_hash.hex()}")
        with self._reading:
            path = next(path for first, path in reversed(segment_paths(self._directory)) if first <= order.of)
            redact_in_segment(path, frame.offset, segments.Mark(order_seq, order.time_seconds))
