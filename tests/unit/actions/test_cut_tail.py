"""A tail cut off behind the segments' last checkpoint: found, as far as anybody was told that it is durable."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

import pytest

from supervisord.actions import segments
from supervisord.actions.log import ActionLog
from supervisord.actions.types import Action, CannotOpenLog
from supervisord.actions.verify import verify

if TYPE_CHECKING:
    from pathlib import Path

LAUNCH = Action("ag_x", "uid:0(root)", "agent.launch", "true", "allowed")
CALL = Action("ag_x", "agent:ag_x", "egress.request", "http://a.example/", "allowed")


def opened(directory: Path) -> ActionLog:
    return ActionLog.open(
        directory / "log",
        directory / "key",
        now_ns=time.time_ns,
        checkpoint_every_entries=1000,
        checkpoint_seconds=60.0,
    )


def killed(directory: Path) -> Path:
    """The files as a daemon leaves them that is killed now."""
    copy = directory / "killed"
    shutil.copytree(directory / "log", copy / "log")
    for key in directory.glob("key*"):
        shutil.copy(key, copy)
    return copy


def cut(directory: Path, entries: int) -> None:
    """Cut the segment so that this many entries are left."""
    (path,) = (directory / "log" / "segments").iterdir()
    data = path.read_bytes()
    end = header = segments.parse_header(data).length
    left = entries + 1  # and the checkpoint that a segment begins with
    for frame in segments.frames(data, header):
        if not left:
            break
        left -= 1
        end = frame.offset + segments.FRAME_HEADER_BYTES + len(frame.payload)
    path.write_bytes(data[:end])


@pytest.mark.parametrize("left", [0, 1, 2])
async def test_entries_that_were_acknowledged_cannot_be_cut_off_unseen(tmp_path: Path, left: int) -> None:
    log = opened(tmp_path)
    for _ in range(3):
        await log.record(LAUNCH)
    copy = killed(tmp_path)
    assert verify(copy / "log", copy / "key.pub").ok
    cut(copy, left)
    report = verify(copy / "log", copy / "key.pub")
    assert not report.ok
    assert f"entries {left + 1} to 3 are gone" in report.problem
    assert "at offset" in report.problem
    with pytest.raises(CannotOpenLog, match="are gone"):
        opened(copy)
    await log.close()


async def test_a_daemon_that_is_killed_leaves_a_log_that_goes_on(tmp_path: Path) -> None:
    log = opened(tmp_path)
    for _ in range(3):
        await log.record(LAUNCH)
        await log.append(CALL)
    copy = killed(tmp_path)
    await log.close()
    again = opened(copy)
    assert (await again.record(LAUNCH)).seq == 7
    assert (await again.verify()).ok
    await again.close()
    report = verify(copy / "log", copy / "key.pub")
    assert (report.ok, report.sealed) == (True, 7)


async def test_what_nobody_waited_for_is_covered_by_the_next_that_somebody_does(tmp_path: Path) -> None:
    log = opened(tmp_path)
    await log.record(LAUNCH)
    await log.append(CALL)
    copy = killed(tmp_path)
    cut(copy, 1)
    # The window that is left, and documented: an entry that nobody was told is durable.
    assert verify(copy / "log", copy / "key.pub").ok
    shutil.rmtree(copy)
    await log.record(LAUNCH)
    copy = killed(tmp_path)
    cut(copy, 1)
    assert not verify(copy / "log", copy / "key.pub").ok
    await log.close()
