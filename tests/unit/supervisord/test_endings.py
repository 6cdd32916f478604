"""Ends of grants that the disk does not take: in force, kept over a restart, and written when it does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from gateway_client.egress.scope import parse_scope
from supervisord import endings as module
from supervisord.actions.types import Action, CannotRecord
from supervisord.endings import Endings
from supervisord.ids import AgentId, GrantId
from supervisord.scopes import Ended, Grant
from supervisord.store import CannotStore

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

GRANT = Grant(
    GrantId("gr_" + "a" * 26), AgentId("ag_" + "a" * 26), parse_scope("llm:*"), "uid:0(root)", "", 1.0,
    ended=Ended.REVOKED,
)  # fmt: skip
ACTION = Action(GRANT.agent_id, "uid:0(root)", "grant.revoke", "llm:*", "done", "why", {"relays_cut": 1})


class Disk:
    """Store and log on one disk."""

    def __init__(self, *, full: bool = False) -> None:
        self.full = full
        self.grants: list[Grant] = []
        self.entries: list[Action] = []

    async def save_grant(self, grant: Grant) -> None:
        if self.full:
            raise CannotStore("cannot save a grant: no space")
        self.grants.append(grant)

    async def record(self, action: Action) -> None:
        if self.full:
            raise CannotRecord("cannot record: no space")
        self.entries.append(action)


def endings(disk: Disk, directory: Path) -> Endings:
    return Endings(store=cast("Any", disk), actions=cast("Any", disk), directory=directory / "ended")


async def test_an_end_is_written_once_and_leaves_no_note(tmp_path: Path) -> None:
    disk = Disk()
    assert await endings(disk, tmp_path).write(GRANT, ACTION) == ""
    assert (disk.grants, disk.entries) == ([GRANT], [ACTION])
    assert not (tmp_path / "ended").exists()


async def test_one_that_the_disk_refuses_is_said_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    disk = Disk(full=True)
    kept = endings(disk, tmp_path)
    assert await kept.write(GRANT, ACTION) == "state database and action log"
    assert kept.unwritten() == [GRANT]
    retrying = asyncio.get_running_loop().create_task(kept.retry_forever())
    disk.full = False
    async with asyncio.timeout(5):
        while kept.unwritten():  # noqa: ASYNC110 - the loop that is tested has no event to wait for
            await asyncio.sleep(0.005)
    retrying.cancel()
    assert (disk.grants, disk.entries) == ([GRANT], [ACTION])
    assert list((tmp_path / "ended").iterdir()) == []


async def test_a_daemon_that_starts_anew_knows_what_the_last_one_could_not_write(tmp_path: Path) -> None:
    assert await endings(Disk(full=True), tmp_path).write(GRANT, ACTION)
    (tmp_path / "ended" / "gr_damaged").write_text('{"grant"')
    after = endings(Disk(), tmp_path)
    after.take_up()
    assert after.unwritten() == [GRANT]
