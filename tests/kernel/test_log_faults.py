"""The action log when its process is killed and when its disk is full or fails: nothing acknowledged is ever lost."""

from __future__ import annotations

import os
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from supervisord.actions import segments
from supervisord.actions.verify import verify
from tests.support.log_lives import Lives, acknowledged, leaves, said, start

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Each round is a process start; set higher for a long run.
KILLS = int(os.environ.get("STOCKADE_LOG_KILLS", "12"))
WRITER_SECONDS_MAX = 60


def finish(directory: Path, mode: str, prefix: Sequence[str] = ()) -> list[dict[str, Any]]:
    process = start(directory, mode, prefix)
    out, errors = process.communicate(timeout=WRITER_SECONDS_MAX)
    assert process.returncode == 0, errors.decode()[-2000:]
    return said(out)


def test_what_was_acknowledged_survives_kill_9_at_any_moment(tmp_path: Path) -> None:
    """The same log is opened again and again; every entry that was acknowledged in any life is in it, at its place."""
    seed = int(os.environ.get("STOCKADE_SEED", "0")) or random.SystemRandom().getrandbits(32)
    moments = random.Random(seed)  # noqa: S311 - not a secret; printed so that a failure can be repeated
    lives = Lives(tmp_path)
    for turn in range(KILLS):
        try:
            lives.end_one(moments.uniform(0, 0.15), turn)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, turn {turn}: {error}") from error
    assert len(lives.kept) > 10 * KILLS


def test_a_full_disk_refuses_and_recovers(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: mounts a tmpfs in a mount namespace of its own")
    small = tmp_path / "small"
    small.mkdir()
    lines = finish(small, "small")
    refused = [line["refused"] for line in lines if "refused" in line]
    assert len(refused) >= 2
    assert all("No space left on device" in text for text in refused)
    # Full: everything that was acknowledged verifies, and half an entry is not there.
    at_refusal = next(index for index, line in enumerate(lines) if "refused" in line)
    before = acknowledged(lines[:at_refusal])
    full = next(line for line in lines if "verified" in line)
    assert full["verified"], full["problem"]
    assert full["size"] >= max(before)
    # Freed: it records again, and says for how many it did not.
    after = acknowledged(lines[at_refusal:])
    assert len(after) >= 20
    (recovered,) = next(line["recovered"] for line in lines if "recovered" in line)
    assert recovered["refused"] >= len(refused)
    assert lines[-1]["offline"], lines[-1]["problem"]
    assert lines[-1]["size"] == max(after)
    assert not any(small.iterdir()), "the tmpfs was seen outside its namespace"


def repair(calls: list[str]) -> list[str]:
    """What a thread did from the reopening of a segment on that followed its first failed sync."""
    failed = next((at for at, call in enumerate(calls) if "INJECTED" in call), len(calls))
    behind = calls[failed:]
    reopened = ("openat" in call and "O_RDWR" in call and segments.SUFFIX in call for call in behind)
    return behind[next((at for at, found in enumerate(reopened) if found), len(behind)) :]


@pytest.mark.parametrize(
    ("when", "refusals"),
    [("3..4", True), ("3", False)],
    ids=["a sync and its repair fail", "one sync fails and its repair does not"],
)
def test_a_failed_sync_is_told_and_never_trusted(tmp_path: Path, when: str, *, refusals: bool) -> None:
    """EIO from fdatasync: the descriptor is given up, and what it should have kept is written again and synced anew."""
    strace = shutil.which("strace")
    assert strace is not None, "install strace"
    trace = tmp_path / "trace"
    inject = [strace, "-ff", "-qq", "-o", str(trace), "-e", "trace=fdatasync,openat,pwrite64,close"]
    # The segment's syncs alone: those of the checkpoint file come when they come.
    inject += ["-e", f"inject=fdatasync:error=EIO:when={when}"]
    inject += ["-P", str(tmp_path / "log" / "segments" / segments.file_name(1))]
    lines = finish(tmp_path, "failing", inject)
    # A file for each thread. The failure is answered by a new descriptor of the same segment, a write of the same bytes
    # and a sync of those.
    repairs = [behind for path in tmp_path.glob("trace.*") if (behind := repair(path.read_text().splitlines()))]
    assert len(repairs) == 1
    fd = repairs[0][0].rpartition("= ")[2]
    assert any(f"pwrite64({fd}," in call for call in repairs[0])
    assert any(f"fdatasync({fd})" in call for call in repairs[0])
    refused = [line["refused"] for line in lines if "refused" in line]
    assert bool(refused) == refusals
    assert all("Input/output error" in text for text in refused)
    recovered = next(line["recovered"] for line in lines if "recovered" in line)
    assert len(recovered) == (1 if refusals else 0)
    kept = acknowledged(lines)
    assert len(kept) == 10
    report = verify(tmp_path / "log", tmp_path / "key.pub")
    assert report.ok, report.problem
    found = leaves(tmp_path)
    assert {seq: found[seq] for seq in kept} == kept
    if refusals:
        first, last = recovered[0]["doubtful"]
        assert 1 <= first <= last < max(kept)
