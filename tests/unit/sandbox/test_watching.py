"""The launcher's side of the watcher, where something fails."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from sandbox import sync, watching
from sandbox.loop import Loop
from sandbox.sync import StepError
from sandbox.watching import Watching

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Times(Loop):
    """A loop of which nothing is called; what is due later is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.dues: list[Callable[[], None]] = []

    def later(self, seconds: float, due: Callable[[], None]) -> int:
        self.dues.append(due)
        return super().later(seconds, due)


def test_a_watcher_is_tried_again_also_where_descriptors_have_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Times()
    held = Watching(loop, str(tmp_path / "watched"))

    def none_left() -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(sync, "pair", none_left)
    with pytest.raises(StepError, match="cannot start watcher: Too many open files"):
        held.ensure()
    held._again()
    for _ in range(3):
        (due,) = loop.dues
        loop.dues.clear()
        due()
    started: list[bool] = []
    monkeypatch.setattr(watching.Watching, "_start", lambda _self: started.append(True))
    loop.dues.pop()()
    assert started == [True]
    held.close()
