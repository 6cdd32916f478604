"""A log with its own clock in a directory of the test's own."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from supervisord.actions.log import ActionLog
from supervisord.actions.types import Action

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SECOND = 1_000_000_000


class Open(Protocol):
    def __call__(self, **settings: Any) -> ActionLog: ...


@pytest.fixture
def clock() -> Callable[[], int]:
    ticks = itertools.count(1_790_000_000)
    return lambda: next(ticks) * SECOND


@pytest.fixture
def open_log(tmp_path: Path, clock: Callable[[], int]) -> Open:
    def open_it(**settings: Any) -> ActionLog:
        return ActionLog.open(tmp_path / "log", tmp_path / "key", now_ns=clock, **settings)

    return open_it


def act(number: int = 0, agent: str = "ag_a", verb: str = "egress.request", verdict: str = "allowed") -> Action:
    return Action(agent, f"agent:{agent}", verb, f"http://a.example/{number}", verdict, "", {"number": number})
