from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.scripted_api import Api, scripted_api

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    with scripted_api(tmp_path / "control.sock") as served:
        monkeypatch.setenv("STOCKADE_SOCKET", str(served.socket))
        yield served
