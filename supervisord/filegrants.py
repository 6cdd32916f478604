"""Grants of files to agents that run: shown in the sandbox, taken away again, and compared after a restart.

A grant is in the book only while its mount is there; it is given back only when the launcher has shown that nothing of
it can be opened any more. Where that fails the agent is frozen, and cannot be thawed before it succeeds.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, cast

import structlog

from gateway_client.egress.scope import FsScope, format_scope
from supervisord.actions.types import Action
from supervisord.channel import close_all
from supervisord.errors import CannotLaunch, CannotRevoke, Conflict, StockadeError, Unavailable
from supervisord.hostfiles import open_files
from supervisord.lifecycle import Event, State, can
from supervisord.plan import live_bind, place_of, wanted_file
from supervisord.sharing import check_no_sockets, check_not_shared

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from supervisord.actions.log import ActionLog
    from supervisord.actions.types import JSON
    from supervisord.agents import Agent, Agents
    from supervisord.egress_plane import EgressPlane
    from supervisord.launcher_link import LauncherLink, Reply
    from supervisord.policy import Policy
    from supervisord.scopes import Grant, GrantBook
    from supervisord.store import Store

log = structlog.get_logger()

LAUNCHER_SECONDS_MAX: Final = 5.0
RETRY_SECONDS: Final = 0.1
POSTURE_KEY: Final = "live_files"


class FileGrants:
    """One owner of every live mount; orders for one agent are done one after the other."""

    def __init__(
        self,
        *,
        agents: Agents,
        book: GrantBook,
        actions: ActionLog,
        launcher: LauncherLink,
        plane: EgressPlane,
        store: Store,
    ) -> None:
        self._agents = agents
        self._book = book
        self._actions = actions
        self._launcher = launcher
        self._plane = plane
        self._store = store
        self._locks: dict[str, asyncio.Lock] = {}
        self._left: dict[str, dict[str, None]] = {}
        """Targets, by agent, that should have been taken away and could not be."""
        self._groups: dict[object, int] = {}

    def groups(self) -> tuple[int, ...]:
        """The guard's group that was kept last, for a launcher that has none."""
        return tuple(list(self._groups.values())[-1:])

    def hold(self, launcher: object, fds: Sequence[int]) -> None:
        """Keep a launcher's guard open: what it denies stays denied when that launcher is ended with all it left."""
        for fd in fds:
            close_all([self._groups.pop(launcher)] if launcher in self._groups else [])
            self._groups[launcher] = fd

    def lock(self, agent: Agent) -> asyncio.Lock:
        """Held from the look into the book to the answer of the launcher, so that the two say the same."""
        return self._locks.setdefault(agent.agent_id, asyncio.Lock())

    def forget(self, agent: Agent) -> None:
        """Let go of what is known of an agent that has ended: its mounts went with it."""
        self._locks.pop(agent.agent_id, None)
        self._left.pop(agent.agent_id, None)

    # --- show

    async def show(self, agent: Agent, grant: Grant, policy: Policy, *, file_uid: int) -> dict[str, JSON]:
        """Have the path appear; gives what was mounted where, for the log. Raises StockadeError with nothing left."""
        scope = _files(grant)
        if agent.state not in (State.RUNNING, State.FROZEN):
            raise Conflict(f"cannot grant to {agent.name}: it is {agent.state.value}", remedy="wait until it runs")
        wanted = (wanted_file(scope),)
        if not policy.shared_workspace:
            others = (other.what for other in self._agents.live() if other is not agent)
            check_not_shared(wanted, others, self._book.for_agent)
        opened, fds = open_files(wanted, caller_uid=file_uid)
        try:
            if not policy.allow_sockets:
                await asyncio.to_thread(check_no_sockets, wanted, list(fds))
            bind = live_bind(opened[0], policy)
            order = {name: getattr(bind, name) for name in bind.__slots__}
            reply = await self._launcher.call("show", fds, agent_id=agent.agent_id, bind=order)
            self.hold(reply.body.get("launcher"), reply.fds)
        except (CannotLaunch, Unavailable) as error:
            # It may be there all the same, where the launcher lost its child or died.
            await self._make_sure(agent, scope, error)
            raise Conflict(
                f"cannot grant {format_scope(scope)} to {agent.name}: {_cause(error)}", remedy=error.remedy
            ) from error
        finally:
            close_all(fds)
        return _facts(scope, opened[0].owner_uid, opened[0].owner_gid, reply)

    def note(self, agent: Agent, grant: Grant, facts: Mapping[str, JSON]) -> None:
        """Put a grant that is kept into the agent's posture."""
        self._note(agent, {**self._noted(agent), str(facts["target"]): {"grant_id": grant.grant_id, **facts}})

    async def _make_sure(self, agent: Agent, scope: FsScope, error: StockadeError) -> None:
        if isinstance(error, CannotLaunch) and error.errno:
            return  # the kernel said no, or the launcher before it: nothing was done, or it was undone
        if any(str(place_of(other)) == str(place_of(scope)) for other in self._scopes(agent)):
            return  # the place is another grant's
        try:
            await self._take(agent, str(place_of(scope)))
        except StockadeError as again:
            await self._contain(agent, str(place_of(scope)), again)

    # --- take

    async def take(self, agent: Agent, grant: Grant) -> dict[str, JSON]:
        """Take the path away; gives what was done, for the log. Raises CannotRevoke, and then the agent is frozen."""
        scope = _files(grant)
        target = str(place_of(scope))
        facts: dict[str, JSON] = {"target": target, "mode": _mode(scope)}
        others = [other for other in self._scopes(agent, but=grant) if str(place_of(other)) == target]
        if any(other.writable or not scope.writable for other in others):
            return {**facts, "kept": "another grant covers it"}
        try:
            reply = await self._take(agent, target)
        except StockadeError as error:
            if not agent.live:
                return facts
            await self._contain(agent, target, error)
            raise CannotRevoke(
                f"cannot revoke {format_scope(scope)} from {agent.name}: {_cause(error)}; {agent.name} is "
                f"{agent.state.value}",
                remedy=f"`stockadectl kill {agent.name}`, or revoke it again",
            ) from error
        return {**facts, "processes_killed": cast("JSON", reply.body.get("processes_killed", 0))}

    async def _take(self, agent: Agent, target: str) -> Reply:
        """Order it, also from a launcher that is being started."""
        deadline = asyncio.get_running_loop().time() + LAUNCHER_SECONDS_MAX
        while True:
            try:
                reply = await self._launcher.call("take", agent_id=agent.agent_id, target=target)
            except Unavailable:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self.hold(reply.body.get("launcher"), reply.fds)
                self._left.get(agent.agent_id, {}).pop(target, None)
                self._note(agent, {place: item for place, item in self._noted(agent).items() if place != target})
                return reply

    async def _contain(self, agent: Agent, target: str, error: StockadeError) -> None:
        """Stop an agent that may still have what was taken back."""
        self._left.setdefault(agent.agent_id, {})[target] = None
        self._plane.freeze(agent.agent_id)
        reason = f"{target} could not be taken away: {_cause(error)}"
        verdict = "done"
        try:
            await self._launcher.call("freeze", agent_id=agent.agent_id)
        except StockadeError as again:
            verdict = "failed"
            log.error("cannot freeze an agent that keeps files", agent=agent.agent_id, cause=again.message)
        else:
            if can(agent.state, Event.FREEZE):
                self._agents.apply(agent, Event.FREEZE)
        await self._actions.note(Action(agent.agent_id, "daemon", "agent.freeze", agent.name, verdict, reason))

    async def settle(self, agent: Agent) -> None:
        """Take away what is left from before; raises Conflict while it cannot be, so that nobody thaws the agent.

        Under the agent's lock.
        """
        for target in list(self._left.get(agent.agent_id, ())):
            try:
                await self._take(agent, target)
            except StockadeError as error:
                raise Conflict(
                    f"cannot thaw {agent.name}: {target} could not be taken away: {_cause(error)}",
                    remedy=f"`stockadectl kill {agent.name}`",
                ) from error

    # --- after a restart of the daemon or of the launcher

    async def reconcile(self, listed: Sequence[Mapping[str, object]], *, known: Collection[str] | None = None) -> None:
        """Make book and mounts agree: what has no grant is taken away, a grant without a mount ends.

        `listed` is what the launcher greeted with; `known` the grants from before it did (None: all).
        """
        for entry in listed:
            agent = self._agents.get(str(entry.get("agent_id")))
            if agent is None or agent.state not in (State.RUNNING, State.FROZEN):
                continue
            binds = cast("Sequence[Mapping[str, object]]", entry.get("binds") or ())
            there = {str(bind["target"]) for bind in binds if str(bind["name"]).startswith("fs:")}
            async with self.lock(agent):
                granted = {str(place_of(scope)) for scope in self._scopes(agent)}
                for target in sorted(there - granted):
                    await self._take_unclaimed(agent, target)
                for grant in self._book.for_agent(agent.agent_id):
                    lost = isinstance(grant.scope, FsScope) and str(place_of(grant.scope)) not in there
                    if lost and (known is None or grant.grant_id in known):
                        await self._end_lost(grant)
                noted = {place: item for place, item in self._noted(agent).items() if place in there & granted}
                self._note(agent, noted)

    async def _take_unclaimed(self, agent: Agent, target: str) -> None:
        verdict, reason = "done", "no grant covers it any more"
        try:
            await self._take(agent, target)
        except StockadeError as error:
            verdict, reason = "failed", error.message
            await self._contain(agent, target, error)
        await self._actions.note(Action(agent.agent_id, "daemon", "grant.reconcile", target, verdict, reason))

    async def _end_lost(self, grant: Grant) -> None:
        ended = self._book.revoke(grant.grant_id)
        await self._store.save_grant(ended)
        reason = "what it shows is not in the sandbox"
        await self._actions.note(
            Action(
                grant.agent_id,
                "daemon",
                "grant.revoke",
                format_scope(grant.scope),
                "done",
                reason,
                {"grant_id": grant.grant_id},
            )
        )

    # --- what is known

    def _scopes(self, agent: Agent, *, but: Grant | None = None) -> list[FsScope]:
        grants = self._book.for_agent(agent.agent_id)
        return [g.scope for g in grants if isinstance(g.scope, FsScope) and (but is None or g.grant_id != but.grant_id)]

    def _noted(self, agent: Agent) -> dict[str, dict[str, JSON]]:
        noted = agent.posture.get(POSTURE_KEY)
        items = cast("list[dict[str, JSON]]", noted) if isinstance(noted, list) else []
        return {str(item["target"]): item for item in items}

    def _note(self, agent: Agent, items: Mapping[str, Mapping[str, JSON]]) -> None:
        if dict(items) != self._noted(agent):
            self._agents.describe(agent, POSTURE_KEY, [dict(item) for item in items.values()])


def _files(grant: Grant) -> FsScope:
    if not isinstance(grant.scope, FsScope):
        raise TypeError(f"{grant.grant_id} is no grant of files")
    return grant.scope


def _mode(scope: FsScope) -> str:
    return "rw" if scope.writable else "ro"


def _facts(scope: FsScope, owner_uid: int, owner_gid: int, reply: Reply) -> dict[str, JSON]:
    return {
        "source": str(scope.host_path),
        "target": str(place_of(scope)),
        "place": str(reply.body.get("place")),
        "mode": _mode(scope),
        "owner_uid": owner_uid,
        "owner_gid": owner_gid,
        "degraded": cast("JSON", reply.body.get("degraded") or []),
    }


def _cause(error: StockadeError) -> str:
    return error.message.removeprefix("cannot ")
