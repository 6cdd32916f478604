"""Old segments go, and the log still verifies, proves and answers; what nobody retired is missed."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pymerkle  # type: ignore[import-untyped]  # it has no types
import pytest

from supervisord.actions import merkle
from supervisord.actions.retiring import Sealed, retired
from supervisord.actions.verify import verify
from tests.unit.actions.conftest import act

if TYPE_CHECKING:
    from pathlib import Path

    from supervisord.actions.log import ActionLog
    from supervisord.actions.types import Report
    from tests.unit.actions.conftest import Open

KEPT_BYTES = 3000
SIX = [Sealed(10 * n + 1, 10 * n + 10, 100, 1000.0 * n) for n in range(6)]


@pytest.mark.parametrize(
    ("keep_seconds", "keep_bytes", "count"),
    [(0, 0, 0), (2500, 0, 4), (1, 0, 6), (10_000, 0, 0), (0, 350, 3), (0, 50, 6), (0, 650, 0), (2500, 250, 4)],
)
def test_what_is_to_go(keep_seconds: float, keep_bytes: int, count: int) -> None:
    found = retired(SIX, open_bytes=50, now_seconds=6001, keep_seconds=keep_seconds, keep_bytes=keep_bytes)
    assert found == count


def check(tmp_path: Path, kept: str | list[str] | None = None) -> Report:
    return verify(tmp_path / "log", tmp_path / "key.pub", kept=kept)


async def fill(log: ActionLog, count: int) -> None:
    for number in range(count):
        await log.record(act(number))


async def independent(log: ActionLog, size: int) -> pymerkle.InmemoryTree:
    theirs = pymerkle.InmemoryTree(algorithm="sha256")
    for seq in range(1, size + 1):
        theirs.append_entry((await log.proof(seq, size)).entry)
    return theirs


async def root_of(log: ActionLog, size: int) -> bytes:
    return await asyncio.wrap_future(log._index.run(lambda: merkle.range_root(0, size, log._index.node)))


async def test_the_rest_verifies_and_says_from_where_on_content_is_there(open_log: Open, tmp_path: Path) -> None:
    log = open_log(segment_bytes=2000)
    await fill(log, 30)
    early = await log.checkpoint()
    await fill(log, 30)
    theirs = await independent(log, 60)
    entry = await log.retire(keep_seconds=0, keep_bytes=KEPT_BYTES)
    assert entry is not None
    assert entry.action.verb == "log.retire"
    last = entry.action.details["last_seq"]
    assert isinstance(last, int)
    assert log.first_seq == last + 1 > 30
    assert sum(path.stat().st_size for path in (tmp_path / "log/segments").iterdir()) < 2 * KEPT_BYTES
    assert (await log.query())[0].seq == last + 1
    assert await log.retire(keep_seconds=0, keep_bytes=10**6) is None
    newest = await log.checkpoint()
    # Proofs from and of what is gone are as an independent tree has them.
    for old in (1, 30, last, last + 1, 60):
        path = await log.consistency(old, 61)
        proven = await log.proof(61, 61)
        assert merkle.consistency_holds(old, 61, await root_of(log, old), proven.root, path)
    assert await root_of(log, 60) == theirs.get_root()
    await log.close()
    report = check(tmp_path)
    assert (report.ok, report.size, report.first_seq, report.problem) == (True, 61, last + 1, "")
    assert check(tmp_path, [early, newest]).ok
    assert "nothing can be compared" in check(tmp_path, early).problem


@pytest.mark.parametrize("index", ["kept", "lost"])
async def test_a_log_goes_on_behind_what_was_retired(open_log: Open, tmp_path: Path, index: str) -> None:
    log = open_log(segment_bytes=2000)
    await fill(log, 60)
    theirs = await independent(log, 60)
    await log.retire(keep_seconds=0, keep_bytes=KEPT_BYTES)
    first = log.first_seq
    await log.close()
    if index == "lost":
        for path in (tmp_path / "log").glob("index*"):
            path.unlink()
    log = open_log(segment_bytes=2000)
    for _ in range(12):
        await log.append_all([act(number) for number in range(50)])
        await log.checkpoint()
    assert (await log.query())[0].seq == first
    assert await root_of(log, 60) == theirs.get_root()
    for seq in (first, 60, 300, 600):
        proof = await log.proof(seq)
        assert merkle.inclusion_holds(seq - 1, proof.size, proof.leaf_hash, proof.path, proof.root)
        assert await log.consistency(seq)
    assert (await log.verify()).ok
    await log.retire(keep_seconds=0, keep_bytes=KEPT_BYTES)
    assert (await log.verify()).ok
    await log.close()
    assert check(tmp_path).ok


async def test_segments_that_nobody_retired_are_missed(open_log: Open, tmp_path: Path) -> None:
    log = open_log(segment_bytes=2000)
    await fill(log, 60)
    await log.retire(keep_seconds=0, keep_bytes=KEPT_BYTES)
    await fill(log, 30)
    await log.close()
    assert check(tmp_path).ok
    path = min((tmp_path / "log" / "segments").iterdir())
    path.unlink()
    found = check(tmp_path)
    assert ".seg at offset 0: entries" in found.problem
    assert "no entry says that they were retired" in found.problem


async def test_what_is_old_goes(open_log: Open, tmp_path: Path) -> None:
    log = open_log(segment_bytes=2000)
    await fill(log, 40)
    paths = sorted((tmp_path / "log" / "segments").iterdir())
    for path in paths[:2]:
        os.utime(path, (1, 1))
    for path in paths[2:]:
        os.utime(path, (1_790_000_500, 1_790_000_500))
    entry = await log.retire(keep_seconds=86400, keep_bytes=0)
    assert entry is not None
    assert entry.action.details["segments"] == 2
    await log.close()
    assert check(tmp_path).ok
