"""What was acknowledged as durable survives a power cut: a guest writes a log on a disk of its own, and is switched off."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from supervisord.actions.verify import verify
from tests.second_kernel import uml
from tests.support.log_lives import leaves, live_on

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the guest reads the host's files"),
    pytest.mark.skipif(not uml.KERNEL.exists(), reason=f"needs {uml.KERNEL} (Debian's user-mode-linux)"),
    pytest.mark.skipif(shutil.which("debugfs") is None, reason="needs debugfs (Debian's e2fsprogs)"),
]
DURABLE = b'"durable": true'


def cut(scratch: Path, mode: str, entries: int) -> tuple[list[dict[str, Any]], Path]:
    """What a writer in the guest said before its power went, and what was on its disk."""
    console, disk = uml.cut(
        scratch,
        *("-m", "tests.support.log_writer", "/mnt/disk", mode),
        enough=lambda printed: printed.count(DURABLE) >= entries,
        seconds_max=300,
    )
    lines = [line.strip() for line in console.split(b"\n")[:-1]]
    said = [json.loads(line) for line in lines if line.startswith(b'{"seq"')]
    checked = subprocess.run(["e2fsck", "-f", "-y", str(disk)], capture_output=True, text=True, check=False)
    assert checked.returncode in (0, 1), checked.stdout  # 1: the journal was played, as a mount would
    (left := scratch / "left").mkdir()
    subprocess.run(["debugfs", "-R", f"rdump / {left}", str(disk)], capture_output=True, check=True)
    return said, left


def lost(said: list[dict[str, Any]], left: Path) -> list[int]:
    found = leaves(left) if (left / "log" / "segments").is_dir() else {}
    return [line["seq"] for line in said if line["durable"] and found.get(line["seq"]) != line["leaf"]]


def test_no_entry_that_was_acknowledged_as_durable_is_lost(tmp_path: Path) -> None:
    said, left = cut(tmp_path, "stream", 400)
    durable = [line["seq"] for line in said if line["durable"]]
    assert len(durable) >= 400
    assert lost(said, left) == []
    # Also where the next daemon has mended what was torn.
    entry = asyncio.run(live_on(left, 1))
    assert entry.seq > max(durable)
    report = verify(left / "log", left / "key.pub")
    assert report.ok, report.problem
    assert lost(said, left) == []


def test_without_its_syncs_it_would_be(tmp_path: Path) -> None:
    said, left = cut(tmp_path, "unsynced", 100)
    assert lost(said, left) != []
