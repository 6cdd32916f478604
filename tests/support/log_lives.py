"""The lives of a log writer that is killed again and again, and what was acknowledged in any of them."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supervisord.actions import segments
from supervisord.actions.log import ActionLog
from supervisord.actions.types import Action, Entry
from supervisord.actions.verify import verify

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]


def start(directory: Path, mode: str, prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    command = [*prefix, sys.executable, "-m", "tests.support.log_writer", str(directory), mode]
    # Not buffered: after a readline, communicate() knows nothing of what else had been read.
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)


def said(out: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.split(b"\n")[:-1]]


def leaves(directory: Path) -> dict[int, str]:
    found: dict[int, str] = {}
    for path in sorted((directory / "log" / "segments").glob(f"*{segments.SUFFIX}")):
        data = path.read_bytes()
        for frame in segments.frames(data, segments.parse_header(data).length):
            if frame.kind is segments.Kind.ENTRY:
                found[len(found) + 1] = frame.leaf_hash.hex()
    return found


def acknowledged(lines: list[dict[str, Any]]) -> dict[int, str]:
    return {line["seq"]: line["leaf"] for line in lines if "seq" in line}


async def live_on(directory: Path, turn: int) -> Entry:
    log = ActionLog.open(directory / "log", directory / "key", now_ns=time.time_ns, segment_bytes=8000)
    entry = await log.record(Action("", "daemon", "daemon.start", f"life {turn}", "done"))
    await log.close()
    return entry


class Lives:
    """One log that is opened again and again; `kept` has every entry that was acknowledged in any life."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kept: dict[int, str] = {}

    def end_one(self, seconds: float, turn: int) -> None:
        """Have a writer write, kill it after so long, and see that all that was acknowledged is there, at its place."""
        process = start(self.directory, "stream")
        assert process.stdout is not None
        try:
            first = process.stdout.readline()
            time.sleep(seconds)
        finally:
            process.send_signal(signal.SIGKILL)
            rest, errors = process.communicate()
        assert first, errors.decode()[-2000:]
        self.kept |= acknowledged(said(first + rest))
        entry = asyncio.run(live_on(self.directory, turn))
        self.kept[entry.seq] = entry.leaf_hash.hex()
        report = verify(self.directory / "log", self.directory / "key.pub")
        assert report.ok, report.problem
        found = leaves(self.directory)
        lost = {seq for seq, leaf in self.kept.items() if found.get(seq) != leaf}
        assert not lost, f"acknowledged, and lost or moved: {sorted(lost)[:10]}"
