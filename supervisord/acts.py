"""What operators order beside launch and kill: freeze, thaw, grant, revoke, hold, release, enter."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog

from gateway_client.egress.scope import FsScope, McpScope, Scope, format_scope
from supervisord.actions.types import Action, CannotRecord
from supervisord.agents import Exit
from supervisord.errors import Conflict, InvalidInput, StockadeError
from supervisord.ids import GrantId, StreamId, new_stream_id
from supervisord.lifecycle import Event, State, can
from supervisord.plan import check_order
from supervisord.scopes import check_ceiling, check_scopes_reachable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sandbox.plan import Tty
    from supervisord.actions.log import ActionLog
    from supervisord.actions.types import JSON
    from supervisord.agents import Agent, Agents
    from supervisord.config import Config
    from supervisord.egress_plane import EgressPlane
    from supervisord.exchanges import Exchanges
    from supervisord.holds import Hold, Holds
    from supervisord.launcher_link import LauncherLink
    from supervisord.plan import LaunchOrder
    from supervisord.policies import PolicyShelf
    from supervisord.requests import Request, Requests
    from supervisord.scopes import Grant, GrantBook
    from supervisord.store import Store

log = structlog.get_logger()

STREAMS_KEPT_MAX: Final = 4096
OBJECT_CHARACTERS_MAX: Final = 512


@dataclass(slots=True)
class Stream:
    """A program that was started in a running sandbox."""

    stream_id: StreamId
    agent: Agent
    exit: Exit | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Acts:
    """Every order is recorded before it is done; what was done is in the log when this returns."""

    def __init__(
        self,
        *,
        config: Config,
        agents: Agents,
        policies: PolicyShelf,
        book: GrantBook,
        actions: ActionLog,
        launcher: LauncherLink,
        plane: EgressPlane,
        exchanges: Exchanges,
        requests: Requests,
        holds: Holds,
        store: Store,
        entropy: Callable[[int], bytes],
        now_ns: Callable[[], int],
    ) -> None:
        self._config = config
        self._agents = agents
        self._policies = policies
        self._book = book
        self._actions = actions
        self._launcher = launcher
        self._plane = plane
        self._exchanges = exchanges
        self._requests = requests
        self._holds = holds
        self._store = store
        self._entropy = entropy
        self._now_ns = now_ns
        self.streams: dict[str, Stream] = {}
        self.expiry_changed = asyncio.Event()

    # --- freeze

    async def freeze(self, agents: Sequence[Agent], *, actor: str, reason: str) -> None:
        """Stop every process of these agents and close their gates; raises Conflict for one that cannot be frozen."""
        await self._switch(agents, Event.FREEZE, actor=actor, reason=reason)

    async def thaw(self, agents: Sequence[Agent], *, actor: str, reason: str) -> None:
        await self._switch(agents, Event.THAW, actor=actor, reason=reason)

    async def _switch(self, agents: Sequence[Agent], event: Event, *, actor: str, reason: str) -> None:
        for agent in agents:
            if not can(agent.state, event):
                raise Conflict(
                    f"cannot {event.value} {agent.name}: it is {agent.state.value}",
                    remedy="see `stockadectl status`",
                )
        for agent in agents:
            await self._actions.record(
                Action(agent.agent_id, actor, f"agent.{event.value}", agent.name, "allowed", reason)
            )
            if event is Event.FREEZE:
                self._plane.freeze(agent.agent_id)  # the gate first: what runs on until frozen can send nothing
            await self._launcher.call(event.value, agent_id=agent.agent_id)
            if event is Event.THAW:
                self._plane.thaw(agent.agent_id)
            if can(agent.state, event):
                self._agents.apply(agent, event)
            await self._actions.append(
                Action(agent.agent_id, actor, f"agent.{event.value}", agent.name, "done", reason)
            )

    # --- grants

    async def grant(
        self,
        agent: Agent,
        scope: Scope,
        *,
        actor: str,
        reason: str = "",
        ttl_seconds: float | None = None,
        max_uses: int | None = None,
        grant_id: str = "",
        verb: str = "grant.create",
    ) -> Grant:
        """Give a running agent a scope; raises StockadeError with the remedy."""
        if isinstance(scope, FsScope | McpScope):
            raise InvalidInput(
                f"cannot grant {format_scope(scope)} to a running agent: this version takes fs: scopes at launch only,"
                " and serves no mcp: scopes",
                remedy="launch with --scope, or grant an http:, tls: or llm: scope",
            )
        policy = self._policies.get(agent.what.policy)
        check_ceiling(scope, policy.ceiling)
        check_scopes_reachable((scope,), self._config.gateway)
        details: dict[str, JSON] = {"ttl_seconds": ttl_seconds, "max_uses": max_uses}
        await self._actions.record(Action(agent.agent_id, actor, verb, format_scope(scope), "allowed", reason, details))
        if not agent.live:
            raise Conflict(f"cannot grant to {agent.name}: it is {agent.state.value}", remedy="launch it anew")
        grant = self._book.add(
            agent.agent_id,
            scope,
            by=actor,
            reason=reason,
            ttl_seconds=ttl_seconds,
            max_uses=max_uses,
            grant_id=GrantId(grant_id) if grant_id else None,
        )
        try:
            await self._store.save_grant(grant)
        except StockadeError:
            self._book.revoke(grant.grant_id)
            raise
        self.expiry_changed.set()
        done: dict[str, JSON] = {"grant_id": grant.grant_id, **details}
        await self._actions.append(Action(agent.agent_id, actor, verb, format_scope(scope), "done", reason, done))
        return grant

    async def approve(
        self, request_id: str, *, actor: str, shown_scope: str, ttl_seconds: float | None, max_uses: int | None
    ) -> tuple[Request, Grant]:
        async def make(request: Request) -> Grant:
            return await self.grant(
                self._agents.find_live(request.agent_id),
                request.scope,
                actor=actor,
                reason=f"request {request.request_id}",
                ttl_seconds=ttl_seconds,
                max_uses=max_uses,
                verb="request.approve",
            )

        return await self._requests.approve(request_id, actor=actor, shown_scope=shown_scope, grant=make)

    async def revoke(self, grant_id: str, *, actor: str, reason: str) -> tuple[Grant, int]:
        """Take a grant back: from now on nothing passes on it, and what is open on it is reset."""
        grant = self._book.revoke(GrantId(grant_id))
        cut = self._exchanges.cut_grant(grant.grant_id)
        # Closed first, recorded after: a log that cannot take the entry must not keep a gate open.
        await self._store.save_grant(grant)
        details: dict[str, JSON] = {"grant_id": grant.grant_id, "relays_cut": cut}
        await self._actions.record(
            Action(grant.agent_id, actor, "grant.revoke", format_scope(grant.scope), "done", reason, details)
        )
        return grant, cut

    async def expire_forever(self) -> None:
        """End grants when their time is up, unasked; runs as long as the daemon."""
        while True:
            due = self._book.next_expiry()
            self.expiry_changed.clear()
            try:
                delay = None if due is None else max(due - asyncio.get_running_loop().time(), 0.0)
                async with asyncio.timeout(delay):
                    await self.expiry_changed.wait()
            except TimeoutError:
                pass  # the time is up
            for grant in self._book.expire():
                cut = self._exchanges.cut_grant(grant.grant_id)
                details: dict[str, JSON] = {"grant_id": grant.grant_id, "relays_cut": cut}
                try:
                    await self._store.save_grant(grant)
                    await self._actions.record(
                        Action(grant.agent_id, "daemon", "grant.expire", format_scope(grant.scope), "done", "", details)
                    )
                except StockadeError as error:
                    log.error("an expiry is not recorded", grant=grant.grant_id, cause=error.message)

    # --- holds

    async def hold(self, hold: Hold) -> Hold:
        await self._actions.record(
            Action("", hold.held_by, "hold.create", f"{hold.kind}:{hold.subject}", "done", hold.reason)
        )
        await self._store.save_hold(hold)
        self._holds.add(hold)
        return hold

    async def release(self, hold_id: str, *, actor: str, reason: str) -> Hold:
        hold = self._holds.releasable(hold_id, actor=actor)
        await self._actions.record(
            Action("", actor, "hold.release", f"{hold.kind}:{hold.subject}", "done", reason, {"hold_id": hold_id})
        )
        await self._store.release_hold(hold_id)
        self._holds.remove(hold_id)
        return hold

    # --- exec

    async def exec(
        self,
        agent: Agent,
        order: LaunchOrder,
        *,
        actor: str,
        env: Mapping[str, str],
        cwd: str,
        tty: Tty | None,
        stdin: bool,
    ) -> Stream:
        """Start a further program in the agent's sandbox, as confined as the agent; raises StockadeError."""
        check_order(order)
        if agent.state is not State.RUNNING:
            raise Conflict(
                f"cannot enter {agent.name}: it is {agent.state.value}", remedy="only a running agent can be entered"
            )
        stream_id = new_stream_id(self._entropy)
        shown = " ".join(order.command)[:OBJECT_CHARACTERS_MAX]
        details: dict[str, JSON] = {"stream_id": stream_id, "tty": tty is not None}
        await self._actions.record(Action(agent.agent_id, actor, "exec.start", shown, "allowed", "", details))
        stream = Stream(stream_id, agent)
        self.streams[stream_id] = stream
        while len(self.streams) > STREAMS_KEPT_MAX:
            del self.streams[next(iter(self.streams))]
        try:
            await self._launcher.call(
                "exec",
                agent_id=agent.agent_id,
                stream_id=stream_id,
                argv=list(order.command),
                env=list(env.items()),
                cwd=cwd,
                tty=None if tty is None else {"rows": tty.rows, "cols": tty.cols},
                stdin=stdin,
            )
        except StockadeError as error:
            del self.streams[stream_id]
            try:
                await self._actions.append(
                    Action(agent.agent_id, actor, "exec.fail", shown, "failed", error.message, details)
                )
            except CannotRecord as unrecorded:
                log.error("a failed exec is not in the action log", cause=unrecorded.message)
            raise
        return stream

    def end_streams(self, agent: Agent | None = None) -> None:
        """End what was entered into this agent, or into any: with the agent, or with the launcher that held it.

        A program that exec started dies with its launcher (sandbox/attach.py), and nobody is left to say so.
        """
        for stream in list(self.streams.values()):
            if (agent is None or stream.agent is agent) and not stream.ended.is_set():
                self.exec_ended(stream.stream_id, Exit(None, signal.SIGKILL))

    def exec_ended(self, stream_id: str, result: Exit) -> None:
        stream = self.streams.get(stream_id)
        if stream is not None:
            stream.exit = result
            stream.ended.set()
