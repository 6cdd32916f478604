"""Where a granted path appears, and how book and mounts are made to agree."""

from __future__ import annotations

import time
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest

from gateway_client.egress.scope import FsScope, format_scope, parse_scope
from supervisord.agents import Agent, Agents, Description
from supervisord.errors import CannotRevoke, Conflict, InvalidInput, Unavailable
from supervisord.filegrants import FileGrants
from supervisord.ids import AgentId, AgentName, GrantId
from supervisord.launcher_link import LauncherFailed, Reply
from supervisord.lifecycle import Event, State
from supervisord.plan import live_scope
from supervisord.scopes import GrantBook

if TYPE_CHECKING:
    from collections.abc import Callable

    from supervisord.actions.types import Action
    from supervisord.scopes import Grant

AGENT = AgentId("ag_" + "a" * 26)


def fs(text: str) -> FsScope:
    scope = parse_scope(text)
    assert isinstance(scope, FsScope)
    return scope


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("fs:ro:/data/x", "fs:ro:/data/x"),
        ("fs:rw:/srv/logs", "fs:rw:/srv/logs"),
        ("fs:ro:/tmp/x", "fs:ro:/tmp/x"),
        ("fs:ro:/var/tmp/x", "fs:ro:/var/tmp/x"),
        ("fs:ro:/home/alice/x", "fs:ro:/home/alice/x"),
        ("fs:ro:/data/x=/in/agent", "fs:ro:/data/x=/in/agent"),
        ("fs:ro:/data/x=/data/x", "fs:ro:/data/x"),
        ("fs:ro:/etc/hosts", "fs:ro:/etc/hosts=/grants/etc/hosts"),
        ("fs:ro:/usr/share", "fs:ro:/usr/share=/grants/usr/share"),
        ("fs:ro:/lib32", "fs:ro:/lib32=/grants/lib32"),
        ("fs:ro:/dev/shm/x", "fs:ro:/dev/shm/x=/grants/dev/shm/x"),
        ("fs:rw:/home/agent/x", "fs:rw:/home/agent/x=/grants/home/agent/x"),
        ("fs:rw:/workspace", "fs:rw:/workspace=/grants/workspace"),
        ("fs:ro:/grants/x", "fs:ro:/grants/x=/grants/grants/x"),
        ("fs:ro:/data/x=/grants/y", "fs:ro:/data/x=/grants/y"),
    ],
)
def test_where_a_path_will_be_is_written_out_where_it_is_another(asked: str, given: str) -> None:
    assert format_scope(live_scope(fs(asked))) == given
    assert live_scope(live_scope(fs(asked))) == live_scope(fs(asked))


@pytest.mark.parametrize("place", ["/etc/x", "/usr", "/proc/x", "/grants", "/workspace", "/home/agent/x", "/"])
def test_some_places_are_nobodys_to_choose(place: str) -> None:
    with pytest.raises(InvalidInput, match="cannot grant fs:ro:/data"):
        live_scope(FsScope(writable=False, host_path=PurePosixPath("/data"), inside=PurePosixPath(place)))


def test_uses_of_files_are_not_counted_and_a_withdrawn_grant_never_was() -> None:
    book = GrantBook(now=time.monotonic, wall=time.time, new_id=lambda: GrantId("gr_1"))
    with pytest.raises(InvalidInput, match="not counted"):
        book.add(AGENT, fs("fs:ro:/data"), by="x", max_uses=1)
    grant = book.add(AGENT, fs("fs:ro:/data"), by="x")
    book.withdraw(grant.grant_id)
    assert book.all(include_ended=True) == ()
    assert book.for_agent(AGENT) == ()
    assert not book.knows(grant.grant_id)


# --- book and mounts ---


class Launcher:
    """What the launcher would answer, and what it was ordered."""

    def __init__(self) -> None:
        self.orders: list[tuple[str, Any]] = []
        self.answer: Callable[[str], None] = lambda _op: None

    async def call(self, op: str, /, _fds: object = (), **fields: Any) -> Reply:
        self.orders.append((op, fields.get("target")))
        self.answer(op)
        return Reply({"ok": True, "processes_killed": 0}, ())


class Rest:
    """Log, store and egress plane, as far as they are spoken to."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self.saved: list[Grant] = []
        self.frozen: list[str] = []

    async def note(self, action: Action) -> None:
        self.actions.append(action)

    async def save_grant(self, grant: Grant) -> None:
        self.saved.append(grant)

    def freeze(self, agent_id: str) -> None:
        self.frozen.append(agent_id)


class World:
    def __init__(self) -> None:
        self.launcher, self.rest = Launcher(), Rest()
        self.agents = Agents(now_ns=time.time_ns)
        numbers = iter(range(100))
        self.now = 0.0
        self.book = GrantBook(now=lambda: self.now, wall=time.time, new_id=lambda: GrantId(f"gr_{next(numbers)}"))
        values: dict[str, Any] = dict.fromkeys(Description.__dataclass_fields__, "")
        values |= {"agent_id": AGENT, "name": AgentName("a"), "labels": {}, "command": ("x",), "grants": (), "slot": 0}
        self.agent = Agent(Description(**values))
        self.agents.add(self.agent)
        self.agents.apply(self.agent, Event.EXEC_OK)
        rest: Any = self.rest
        launcher: Any = self.launcher
        self.files = FileGrants(
            agents=self.agents, book=self.book, actions=rest, launcher=launcher, plane=rest, store=rest
        )

    def listed(self, *targets: str, name: str = "fs:ro:/x") -> list[dict[str, object]]:
        binds = [{"target": target, "name": name} for target in targets]
        return [{"agent_id": AGENT, "binds": binds}]


@pytest.fixture
def world() -> World:
    return World()


async def test_a_mount_without_a_grant_is_taken_and_a_grant_without_a_mount_ends(world: World) -> None:
    kept = world.book.add(AGENT, fs("fs:ro:/data/kept"), by="x")
    lost = world.book.add(AGENT, fs("fs:ro:/data/lost"), by="x")
    expired = world.book.add(AGENT, fs("fs:ro:/data/old"), by="x", ttl_seconds=1)
    other = world.book.add(AGENT, parse_scope("llm:*"), by="x")
    world.now = 2
    await world.files.reconcile(world.listed("/data/kept", "/data/old", "/data/unknown"))
    assert world.launcher.orders == [("take", "/data/old"), ("take", "/data/unknown")]
    assert {g.grant_id for g in world.book.for_agent(AGENT)} == {kept.grant_id, other.grant_id}
    assert [g.grant_id for g in world.rest.saved] == [lost.grant_id]
    assert [a.verb for a in world.rest.actions] == ["grant.reconcile", "grant.reconcile", "grant.revoke"]
    assert [g.grant_id for g in world.book.expire()] == [expired.grant_id]


async def test_a_workspace_is_no_grant_and_a_grant_made_meanwhile_is_not_lost(world: World) -> None:
    fresh = world.book.add(AGENT, fs("fs:ro:/data/fresh"), by="x")
    await world.files.reconcile(world.listed("/workspace", name="workspace"), known=set())
    assert world.launcher.orders == []
    assert world.book.for_agent(AGENT) == (fresh,)


async def test_what_cannot_be_taken_freezes_the_agent_and_keeps_it_so(world: World) -> None:
    grant = world.book.add(AGENT, fs("fs:rw:/data"), by="x")

    def refuse(op: str) -> None:
        if op == "take":
            raise LauncherFailed({"message": "cannot take /data away: busy", "errno": "EBUSY"})

    world.launcher.answer = refuse
    with pytest.raises(CannotRevoke, match=r"cannot revoke fs:rw:/data from a: take /data away: busy; a is FROZEN"):
        await world.files.take(world.agent, grant)
    assert world.agent.state is State.FROZEN
    assert world.rest.frozen == [AGENT]
    assert world.book.for_agent(AGENT) == (grant,)
    with pytest.raises(Conflict, match="cannot thaw a"):
        await world.files.settle(world.agent)
    world.launcher.answer = lambda _op: None
    await world.files.settle(world.agent)
    await world.files.settle(world.agent)
    assert [op for op, _ in world.launcher.orders] == ["take", "freeze", "take", "take"]


async def test_a_launcher_that_is_away_is_waited_for(world: World) -> None:
    grant = world.book.add(AGENT, fs("fs:ro:/data"), by="x")
    tries = iter((True, True, False))

    def away(_op: str) -> None:
        if next(tries):
            raise Unavailable("cannot reach the launcher: it has gone")

    world.launcher.answer = away
    assert (await world.files.take(world.agent, grant))["target"] == "/data"
    assert world.agent.state is State.RUNNING


async def test_a_place_that_another_grant_covers_is_not_taken(world: World) -> None:
    writes = world.book.add(AGENT, fs("fs:rw:/data"), by="x")
    reads = world.book.add(AGENT, fs("fs:ro:/data"), by="x")
    assert "kept" in await world.files.take(world.agent, reads)
    assert world.launcher.orders == []
    assert "kept" not in await world.files.take(world.agent, writes), "reading is no reason to leave it writable"
    assert world.launcher.orders == [("take", "/data")]
