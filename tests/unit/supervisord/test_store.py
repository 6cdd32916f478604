"""The state database: what was saved is there after a restart, a reboot ends what hung on the clock, damage is said."""

from __future__ import annotations

import sqlite3
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from gateway_client.egress.scope import parse_scope
from supervisord.budgets import Amounts
from supervisord.holds import Hold
from supervisord.ids import AgentId, GrantId
from supervisord.scopes import Ended, Grant
from supervisord.store import MIGRATIONS, AgentRow, CannotStore, Store

if TYPE_CHECKING:
    from pathlib import Path

AGENT = AgentId("ag_" + "a" * 26)
GRANT = Grant(
    grant_id=GrantId("gr_" + "a" * 26),
    agent_id=AGENT,
    scope=parse_scope("http:GET:https://a.example/v1/**"),
    by="uid:0(root)",
    reason="a look",
    created_at=1.5,
    expires_mono=99.25,
    expires_at=1_790_000_000.5,
    max_uses=3,
)
HOLD = Hold("ho_x", "label", "team=a", "incident 7", "uid:0(root)", 1_790_000_000_000_000_001)


async def reopened(store: Store, path: Path, boot_id: str = "one") -> Store:
    await store.close()
    return await Store.open(path, boot_id=boot_id)


async def test_grants_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = await Store.open(path, boot_id="one")
    lasting = replace(GRANT, grant_id=GrantId("gr_" + "b" * 26), expires_mono=None, expires_at=None)
    await store.save_grant(GRANT)
    await store.save_grant(lasting)
    await store.update_uses({GRANT.grant_id: 2})
    await store.update_uses({GRANT.grant_id: 1})  # late news never gives a use back
    store = await reopened(store, path)
    assert await store.grants() == [replace(GRANT, uses=2), lasting]
    await store.revoke(GRANT.grant_id)
    await store.revoke(GRANT.grant_id, Ended.EXPIRED)
    assert [grant.ended for grant in await store.grants()] == [Ended.REVOKED, None]
    await store.close()


async def test_a_reboot_ends_what_the_monotonic_clock_measured(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = await Store.open(path, boot_id="one")
    await store.save_grant(GRANT)
    await store.save_grant(replace(GRANT, grant_id=GrantId("gr_" + "b" * 26), expires_mono=None, expires_at=None))
    store = await reopened(store, path, boot_id="two")
    assert [grant.ended for grant in await store.grants()] == [Ended.AGENT_ENDED, None]
    await store.close()


async def test_holds_agents_and_postures_survive(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = await Store.open(path, boot_id="one")
    await store.save_hold(HOLD)
    await store.save_hold(replace(HOLD, hold_id="ho_y"))
    await store.release_hold("ho_y")
    row = AgentRow(AGENT, "reader", "EXITED", 1, 2, {"exit": {"code": 0}, "command": ["a", "\udcff"]})
    await store.save_agent(replace(row, state="RUNNING", ended_at_ns=None))
    await store.save_agent(row)
    await store.save_posture(AGENT, {"filter": "sha256:x"}, live=True)
    store = await reopened(store, path)
    assert await store.holds() == [HOLD]
    assert await store.agent(AGENT) == row
    assert await store.agents() == [row]
    assert await store.agent("ag_none") is None
    assert await store.postures() == {AGENT: {"filter": "sha256:x"}}
    await store.close()


async def test_slots_go_round(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = await Store.open(path, boot_id="one")
    taken = [await store.next_slot(3) for _ in range(4)]
    store = await reopened(store, path)
    assert [*taken, await store.next_slot(3)] == [0, 1, 2, 0, 1]
    await store.close()


async def test_a_backup_is_whole_and_private(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "state.db", boot_id="one")
    await store.save_grant(GRANT)
    await store.backup(tmp_path / "copy.db")
    await store.save_hold(HOLD)
    with pytest.raises(CannotStore, match=r"copy\.db"):
        await store.backup(tmp_path / "copy.db")
    await store.close()
    assert stat.S_IMODE((tmp_path / "copy.db").stat().st_mode) == 0o600
    copy = await Store.open(tmp_path / "copy.db", boot_id="one")
    assert (await copy.grants(), await copy.holds()) == ([GRANT], [])
    await copy.close()


async def test_damaged_and_newer_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"not a database, but long enough to be read as one" * 40)
    with pytest.raises(CannotStore, match="not a database"):
        await Store.open(path)
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    database.close()
    with pytest.raises(CannotStore, match="version"):
        await Store.open(path)
    with pytest.raises(CannotStore):
        await Store.open(tmp_path / "none" / "state.db")


async def test_what_was_spent_under_a_version_that_knew_no_bytes_is_still_spent(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    before = next(number for number, script in enumerate(MIGRATIONS) if "egress_bytes" in script)
    with sqlite3.connect(path) as database:
        database.executescript("".join(MIGRATIONS[:before]) + f"PRAGMA user_version = {before};")
        database.execute("INSERT INTO spent VALUES (?, 1, 2, 3)", (AGENT,))
        database.execute("INSERT INTO label_spent VALUES ('team=a', 'day', '2026-01-01', 4, 5, 6)")
    database.close()
    store = await Store.open(path, boot_id="one")
    assert await store.spent() == {AGENT: Amounts(1, 2, 3, 0)}
    assert await store.label_spent() == {("team=a", "day"): ("2026-01-01", Amounts(4, 5, 6, 0))}
    await store.save_spent(AGENT, Amounts(1, 2, 3, 2**70))
    assert (await store.spent())[AGENT].egress_bytes == 2**63 - 1
    await store.close()


async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "state.db", boot_id="one")
    await store.close()
    await store.close()
    with pytest.raises(CannotStore, match="closed"):
        await store.save_hold(HOLD)
