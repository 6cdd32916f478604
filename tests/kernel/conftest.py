"""Fixtures of the tests that start sandboxes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.support.binds import OWNER, Shared
from tests.support.inside import Inside
from tests.support.launcher import Launcher

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    if os.geteuid() != 0:
        pytest.skip("needs root: starts sandboxes")
    with Launcher.start() as launcher:
        yield launcher


@pytest.fixture(scope="module")
def weak_launcher() -> Iterator[Launcher]:
    """One that also performs plans that leave controls out, for the negative twins."""
    if os.geteuid() != 0:
        pytest.skip("needs root: starts sandboxes")
    with Launcher.start(weakened=True) as launcher:
        yield launcher


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    shared = Shared(tmp_path / "shared")
    shared.path.mkdir()
    shared.add("note", "from the host")
    shared.add("sub/inner", "further in")
    shared.add("run.sh", "#!/bin/sh\necho ran\n", 0o755)
    os.chown(shared.path, OWNER, OWNER)
    return shared


@pytest.fixture
def inside(launcher: Launcher) -> Iterator[Inside]:
    inside = Inside.start(launcher)
    yield inside
    launcher.kill(inside.agent)
