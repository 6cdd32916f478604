"""Two daemons never share a run_dir or a name; a mark that claims nothing does not outlive its daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from supervisord.alone import alone
from supervisord.errors import Unavailable

if TYPE_CHECKING:
    from pathlib import Path


def test_a_second_one_is_refused_as_long_as_there_is_a_first(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with alone(run_dir=first, marks=marks, instance="one"):
        with (
            pytest.raises(Unavailable, match="another stockaded works in it"),
            alone(run_dir=first, marks=marks, instance="two"),
        ):
            pytest.fail("the same run_dir")
        with (
            pytest.raises(Unavailable, match="another stockaded of this host"),
            alone(run_dir=second, marks=marks, instance="one"),
        ):
            pytest.fail("the same name")
        with alone(run_dir=second, marks=marks, instance="two"):
            assert {path.name for path in marks.iterdir()} == {".one", ".two"}
    assert list(marks.iterdir()) == []
    with alone(run_dir=first, marks=marks, instance="one"):
        (marks / ".one").write_text("one")  # as what claims id ranges does
    assert [path.read_text() for path in marks.iterdir()] == ["one"]
