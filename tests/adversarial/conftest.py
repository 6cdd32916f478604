"""Fixtures of the tests that start sandboxes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.support.launcher import Launcher

if TYPE_CHECKING:
    from collections.abc import Iterator


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
