"""What ended agents wrote is kept within limits, and nothing of a live one is touched."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from supervisord.retention import DIRECTORIES_MAX, Left, Retention, surplus

if TYPE_CHECKING:
    from pathlib import Path

NOW = 1_000_000.0


def left(*sizes: int) -> list[Left]:
    """Agents that ended a second after another, the first one last."""
    return [Left(str(number), size, NOW - number) for number, size in enumerate(sizes)]


def test_the_oldest_go_first_and_only_as_many_as_needed() -> None:
    assert surplus(left(10, 10, 10), bytes_max=30, seconds_max=100, now_s=NOW) == []
    assert surplus(left(10, 10, 10), bytes_max=29, seconds_max=100, now_s=NOW) == ["2"]
    # One that is too large for all the room goes, and makes no smaller, older one go.
    assert surplus(left(50, 10, 10), bytes_max=20, seconds_max=100, now_s=NOW) == ["0"]
    assert surplus(left(0, 0, 0), bytes_max=20, seconds_max=1.5, now_s=NOW) == ["2"]
    assert len(surplus(left(*[0] * (DIRECTORIES_MAX + 3)), bytes_max=1, seconds_max=1e9, now_s=NOW)) == 3


async def test_live_ones_and_unfinished_ones_stay(tmp_path: Path) -> None:
    for number, name in enumerate(("live", "old", "new", "begun")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stdout.log").write_bytes(b"x" * 65536)
        if name != "begun":
            (tmp_path / name / "state.json").write_text("{}")
        for entry in (tmp_path / name).iterdir():
            os.utime(entry, (NOW + number, NOW + number))
    keeper = Retention(tmp_path, bytes_max=100_000, seconds_max=1e6, live=lambda: ["live"], now_s=lambda: NOW + 9)
    assert await keeper.sweep() == ["old"]
    assert names(tmp_path) == ["begun", "live", "new"]
    assert await keeper.sweep() == []


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())
