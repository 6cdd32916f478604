"""Rotation: never more than the limit, and always the newest bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox.stdio import RotatingFile

if TYPE_CHECKING:
    from pathlib import Path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(chunks=st.lists(st.binary(max_size=40), max_size=20), limit=st.integers(min_value=1, max_value=30))
def test_the_newest_bytes_are_kept_within_the_limit(tmp_path: Path, chunks: list[bytes], limit: int) -> None:
    path = tmp_path / "log"
    for old in (path, tmp_path / "log.1"):
        old.unlink(missing_ok=True)
    file = RotatingFile(str(path), limit)
    for chunk in chunks:
        file.write(chunk)
    file.close()
    older = tmp_path / "log.1"
    kept = (older.read_bytes() if older.exists() else b"") + path.read_bytes()
    written = b"".join(chunks)
    assert len(kept) <= 2 * limit
    assert written.endswith(kept)
    assert len(kept) >= min(len(written), limit)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("")
    (tmp_path / "log").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"):
        RotatingFile(str(tmp_path / "log"), 10)
