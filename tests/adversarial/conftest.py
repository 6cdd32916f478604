"""Fixtures of the tests that start sandboxes, and of those that unpack images."""

# ruff: noqa: ASYNC240 - files of a test, and nobody else in its loop

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from supervisord.images import Images
from tests.support.image_store import LIMITS, VICTIM, Place
from tests.support.launcher import Launcher

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from supervisord.actions.types import Action


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
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    (tmp_path / "records").mkdir()
    tmp_path.chmod(0o700)
    Path(VICTIM).mkdir(mode=0o777, exist_ok=True)
    Path(VICTIM).chmod(0o777)  # where the attempts would reach it, nothing but the unpacker stops them
    actions: list[Action] = []

    async def keep(action: Action) -> None:
        actions.append(action)

    images = Images(
        directory=tmp_path / "images",
        records=tmp_path / "records",
        user="stockade-images",
        limits=LIMITS,
        own=(),
        record=keep,
    )
    await images.start()
    before = len(list(Path("/proc/self/fd").iterdir()))
    place = Place(tmp_path, images, actions)
    try:
        yield place
        assert list(Path(VICTIM).iterdir()) == []
        assert place.half() == []
        assert list((tmp_path / "records").iterdir()) == []
        assert len(list(Path("/proc/self/fd").iterdir())) <= before
    finally:
        await images.stop()
        for left in Path(VICTIM).iterdir():
            left.unlink()
        Path(VICTIM).rmdir()
