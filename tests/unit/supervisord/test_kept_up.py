"""What watches leases, budgets and expiries goes on after trouble that nobody expected."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from supervisord import daemon
from supervisord.daemon import kept_up

if TYPE_CHECKING:
    import pytest


async def test_trouble_ends_a_round_and_not_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "GO_ON_SECONDS", 0)
    rounds: list[int] = []

    async def watch_forever() -> None:
        rounds.append(len(rounds))
        if len(rounds) < 3:
            raise KeyError("nobody expected this")
        await asyncio.Event().wait()

    watching = asyncio.create_task(kept_up(watch_forever))
    for _ in range(20):
        await asyncio.sleep(0)
    assert rounds == [0, 1, 2]
    watching.cancel()
    await asyncio.wait({watching})
    assert watching.cancelled(), "its twin: the end of the daemon ends it"
