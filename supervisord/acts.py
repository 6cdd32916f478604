"""What operators order beside launch and kill: freeze, thaw, grant, revoke, hold, release, enter."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog

from gateway_client.egress.scope import FsScope, Scope, format_scope
from supervisord.actions.types import Action
from supervisord.agents import Exit
from supervisord.approvals import Agreed, Offer, check_alone
from supervisord.errors import CannotRevoke, Conflict, NotFound, StockadeError, Unavailable
from supervisord.grantable import check_grantable
from supervisord.ids import GrantId, StreamId, new_stream_id
from supervisord.ids import shown as shown_id
from supervisord.lifecycle import Event, State, can
from supervisord.plan import check_order, live_scope
from supervisord.scopes import REASON_CHARACTERS_MAX, TICKET_CHARACTERS_MAX
from supervisord.terms import NO_TERMS, Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from sandbox.plan import Tty
    from supervisord.actions.log import ActionLog
    from supervisord.actions.types import JSON
    from supervisord.agents import Agent, Agents
    from supervisord.config import Config
    from supervisord.egress_plane import EgressPlane
    from supervisord.endings import Endings
    from supervisord.exchanges import Exchanges
    from supervisord.filegrants import FileGrants
    from supervisord.holds import Hold, Holds
    from supervisord.launcher_link import LauncherLink
    from supervisord.plan import LaunchOrder
    from supervisord.policies import PolicyShelf
    from supervisord.policy import Policy
    from supervisord.question import Request
    from supervisord.requests import Requests
    from supervisord.scopes import Grant, GrantBook
    from supervisord.store import Store

log = structlog.get_logger()

T = TypeVar("T")

STREAMS_KEPT_MAX: Final = 4096
CUT_SECONDS_MAX: Final = 2.0
LAUNCHER_SECONDS_MAX: Final = 5.0
RETRY_SECONDS: Final = 0.1
EXPIRY_PAUSE_SECONDS: Final = 0.5
OBJECT_CHARACTERS_MAX: Final = 512


@dataclass(slots=True)
class Stream:
    """A program that was started in a running sandbox."""

    stream_id: StreamId
    agent: Agent
    exit: Exit | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class KilledExec:
    """What ending one exec found."""

    processes: int
    verified_empty: bool
    left_pids: tuple[int, ...] = ()


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
        files: FileGrants,
        endings: Endings,
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
        self._files = files
        self._endings = endings
        self._tasks: set[asyncio.Task[Any]] = set()
        self._turns: dict[str, asyncio.Lock] = {}
        self._entropy = entropy
        self._now_ns = now_ns
        self.on_freeze: list[Callable[[Agent], None]] = []
        """Who is told of an agent that was ordered to stand still, also of one that did so already."""
        self.streams: dict[str, Stream] = {}
        self.expiry_changed = asyncio.Event()

    # --- freeze

    async def freeze(self, agents: Sequence[Agent], *, actor: str, reason: str) -> None:
        """Stop every process of these agents and close their gates; raises Conflict for one that cannot be frozen."""
        await self._whole(self._switch(agents, Event.FREEZE, actor=actor, reason=reason))

    async def thaw(
        self, agents: Sequence[Agent], *, actor: str, reason: str, wanted: Callable[[], bool] = lambda: True
    ) -> None:
        """Let these agents go on, where that is still `wanted` when their turn comes; raises Conflict."""
        await self._whole(self._switch(agents, Event.THAW, actor=actor, reason=reason, wanted=wanted))

    async def _switch(
        self,
        agents: Sequence[Agent],
        event: Event,
        *,
        actor: str,
        reason: str,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        # All at once, and each whatever becomes of the others: who is to stand still must not wait for one that cannot.
        done = await asyncio.gather(
            *(self._switch_one(agent, event, actor=actor, reason=reason, wanted=wanted) for agent in agents),
            return_exceptions=True,
        )
        for failure in done:
            if failure is not None:
                raise failure

    async def _switch_one(
        self, agent: Agent, event: Event, *, actor: str, reason: str, wanted: Callable[[], bool]
    ) -> None:
        if not can(agent.state, event):
            raise Conflict(
                f"cannot {event.value} {agent.name}: it is {agent.state.value}", remedy="see `stockadectl status`"
            )
        if event is Event.FREEZE:
            await self._switch_in_turn(agent, event, actor=actor, reason=reason, wanted=wanted)
            return
        async with self._files.lock(agent):  # what cannot be taken back freezes the agent under the same lock
            await self._files.settle(agent)
            await self._switch_in_turn(agent, event, actor=actor, reason=reason, wanted=wanted)

    async def _switch_in_turn(
        self, agent: Agent, event: Event, *, actor: str, reason: str, wanted: Callable[[], bool]
    ) -> None:
        """Do it when no other order for this agent is half done: gate, processes and table all show the last one."""
        verb = f"agent.{event.value}"
        await self._actions.record(Action(agent.agent_id, actor, verb, agent.name, "allowed", reason))
        if event is Event.FREEZE:
            self._plane.freeze(agent.agent_id)  # the gate first: what runs on until frozen can send nothing
        async with self._turns.setdefault(agent.agent_id, asyncio.Lock()):
            if event is Event.FREEZE:
                self._plane.freeze(agent.agent_id)  # again: a thaw that was half done has opened it
            elif not wanted():
                why = "somebody ordered it to stand still"
                await self._actions.note(Action(agent.agent_id, actor, verb, agent.name, "failed", why))
                return
            await self._perform(agent, event, actor=actor, reason=reason)

    async def _perform(self, agent: Agent, event: Event, *, actor: str, reason: str) -> None:
        verb = f"agent.{event.value}"
        try:
            await self._order(event, agent)
        except StockadeError as error:
            await self._actions.note(Action(agent.agent_id, actor, verb, agent.name, "failed", error.message))
            if event is Event.THAW:
                raise
            cause = error.message.removeprefix("cannot ")
            raise Unavailable(
                f"cannot freeze {agent.name}: {cause}; it runs, and its gate is closed",
                remedy="freeze it again, which a thaw undoes, or kill it",
            ) from error
        if event is Event.THAW:
            self._plane.thaw(agent.agent_id)
        if can(agent.state, event):
            self._agents.apply(agent, event)
        if event is Event.FREEZE:
            for tell in self.on_freeze:
                tell(agent)
        await self._actions.note(Action(agent.agent_id, actor, verb, agent.name, "done", reason))

    async def _order(self, event: Event, agent: Agent) -> None:
        """Have the launcher do it, also one that is being started."""
        deadline = asyncio.get_running_loop().time() + LAUNCHER_SECONDS_MAX
        while True:
            try:
                await self._launcher.call(event.value, agent_id=agent.agent_id)
            except Unavailable:
                if not can(agent.state, event) or asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return

    # --- grants

    async def grant(
        self,
        agent: Agent,
        scope: Scope,
        *,
        actor: str,
        file_uid: int,
        reason: str = "",
        ticket: str = "",
        terms: Terms = NO_TERMS,
        grant_id: str = "",
    ) -> Grant:
        """Give a running agent a scope; files are those that `file_uid` may hand out. Raises StockadeError."""
        policy = self._policies.get(agent.what.policy)
        try:
            check_alone(actor, launched_by=agent.what.launched_by, policy=policy.name, rules=policy.grants)
        except StockadeError as error:
            scope_text = format_scope(scope)
            await self._actions.note(Action(agent.agent_id, actor, "grant.create", scope_text, "denied", error.message))
            raise
        return await self._give(
            agent,
            Agreed(scope, terms, (actor,), reason, ticket),
            file_uid=file_uid,
            actor=actor,
            grant_id=grant_id,
            verb="grant.create",
            more={},
        )

    async def _give(
        self,
        agent: Agent,
        agreed: Agreed,
        *,
        actor: str,
        file_uid: int,
        grant_id: str,
        verb: str,
        more: Mapping[str, JSON],
    ) -> Grant:
        """Make a grant of what was agreed; `actor` is the one who gave the last word."""
        scope, terms, reason = agreed.scope, agreed.terms, agreed.reason
        policy = self._policies.get(agent.what.policy)
        check_grantable(scope, policy, self._config.gateway)
        if isinstance(scope, FsScope):
            scope = live_scope(scope)
        details: dict[str, JSON] = {"ttl_seconds": terms.ttl_seconds, "max_uses": terms.max_uses}
        details |= terms.to_json() | dict(more)
        if agreed.ticket:
            details["ticket"] = agreed.ticket
        await self._actions.record(Action(agent.agent_id, actor, verb, format_scope(scope), "allowed", reason, details))

        def add() -> Grant:
            if not agent.live:
                raise Conflict(f"cannot grant to {agent.name}: it is {agent.state.value}", remedy="launch it anew")
            return self._book.add(
                agent.agent_id,
                scope,
                by=", ".join(agreed.by),
                reason=reason[:REASON_CHARACTERS_MAX],
                ticket=agreed.ticket[:TICKET_CHARACTERS_MAX],
                ttl_seconds=terms.ttl_seconds,
                max_uses=terms.max_uses,
                max_bytes=terms.max_bytes,
                max_cost_microusd=terms.max_cost_microusd,
                grant_id=GrantId(grant_id) if grant_id else None,
            )

        if isinstance(scope, FsScope):
            try:
                grant, mounted = await self._whole(self._show(agent, policy, add, grant_id, file_uid=file_uid))
            except StockadeError as error:
                await self._actions.note(
                    Action(agent.agent_id, actor, verb, format_scope(scope), "failed", error.message, details)
                )
                raise
            details |= mounted
        else:
            grant = add()
        self.expiry_changed.set()
        done: dict[str, JSON] = {"grant_id": grant.grant_id, **details}
        try:
            if not isinstance(scope, FsScope):
                await self._store.save_grant(grant)
            await self._actions.append(Action(agent.agent_id, actor, verb, format_scope(scope), "done", reason, done))
        except StockadeError as error:
            # Whoever is told that it failed must not have given anything.
            await self._whole(self._revoke(grant, actor="daemon", reason=error.message))
            raise
        return grant

    async def _show(
        self, agent: Agent, policy: Policy, add: Callable[[], Grant], grant_id: str, *, file_uid: int
    ) -> tuple[Grant, dict[str, JSON]]:
        """Add a grant of files and show them, both or neither; a retry finds what is there."""
        async with self._files.lock(agent):
            again = bool(grant_id) and self._book.knows(GrantId(grant_id))
            grant = add()
            if again:
                return grant, {}
            try:
                mounted = await self._files.show(agent, grant, policy, file_uid=file_uid)
            except BaseException:
                self._book.withdraw(grant.grant_id)
                raise
            try:
                await self._store.save_grant(grant)
            except StockadeError:
                await self._files.take(agent, grant)
                self._book.withdraw(grant.grant_id)
                raise
            self._files.note(agent, grant, mounted)
            return grant, mounted

    async def _whole(self, work: Coroutine[object, object, T]) -> T:
        """Have it done to its end, also when the caller goes away meanwhile."""
        task = asyncio.get_running_loop().create_task(work)
        self._keep(task)
        return await asyncio.shield(task)

    def _keep(self, task: asyncio.Task[T]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def approve(self, request_id: str, offer: Offer, *, file_uid: int) -> tuple[Request, Grant | None]:
        """Approve for one person; the grant is there once as many have as the policy wants. Raises StockadeError."""

        async def make(request: Request, agreed: Agreed) -> Grant:
            more: dict[str, JSON] = {
                "request_id": request.request_id,
                "digest": request.digest,
                "approved_by": list(agreed.by),
                "asked": format_scope(request.scope),
            }
            reason = f"request {request.request_id}" + (f": {agreed.reason}" if agreed.reason else "")
            return await self._give(
                self._agents.find_live(request.agent_id),
                replace(agreed, reason=reason),
                actor=offer.by,
                file_uid=file_uid,
                grant_id="",
                verb="request.approve",
                more=more,
            )

        # To its end, also when the caller goes away meanwhile: a grant never stands beside a pending request.
        return await self._whole(self._requests.approve(request_id, offer, grant=make))

    async def revoke(self, grant_id: str, *, actor: str, reason: str) -> tuple[Grant, int, str]:
        """Take a grant back: from now on nothing passes on it, and what is open on it is reset.

        Gives the grant, how many connections were reset, and what of it is not certain yet (empty: all is done). In
        force before anything is written: a disk that takes no record must not keep a gate open. One of files ends when
        they are proven to be gone, else it stays and CannotRevoke is raised.
        """
        grant = self._book.get(GrantId(grant_id))
        # To its end, also when the caller goes away meanwhile.
        return await self._whole(self._revoke(grant, actor=actor, reason=reason))

    async def _revoke(self, grant: Grant, *, actor: str, reason: str) -> tuple[Grant, int, str]:
        taken: dict[str, JSON] = {}
        if isinstance(grant.scope, FsScope):
            grant, taken = await self._take(grant, actor=actor)
        else:
            grant = self._book.revoke(grant.grant_id)
        relays, warning = await self._end(grant, "grant.revoke", actor, reason, taken)
        return grant, relays, warning

    async def _end(
        self, grant: Grant, verb: str, actor: str, reason: str, taken: dict[str, JSON] | None = None
    ) -> tuple[int, str]:
        """Cut what is open on a grant that has ended, and write the end down."""
        cut = self._exchanges.cut_grant(grant.grant_id)
        details: dict[str, JSON] = {"grant_id": grant.grant_id, "relays_cut": cut.relays, **(taken or {})}
        scope = format_scope(grant.scope)
        missing = await self._endings.write(grant, Action(grant.agent_id, actor, verb, scope, "done", reason, details))
        warnings = [f"in force, but not in the {missing} yet: it is tried again until it is"] if missing else []
        if cut.confirmed:
            _, late = await asyncio.wait(cut.confirmed, timeout=CUT_SECONDS_MAX)
            if late:
                log.error("the dialer has not confirmed a cut", grant=grant.grant_id)
                warnings.append("the dialer has not confirmed that every connection is shut down")
        return cut.relays, "; ".join(warnings)

    async def _take(self, grant: Grant, *, actor: str) -> tuple[Grant, dict[str, JSON]]:
        agent = self._agents.get(grant.agent_id)
        if agent is None or not agent.live:
            return self._book.revoke(grant.grant_id), {}
        async with self._files.lock(agent):
            grant = self._book.get(grant.grant_id)
            if grant.ended is not None:
                return grant, {}
            try:
                taken = await self._files.take(agent, grant)
            except StockadeError as error:
                await self._note_failure(grant, "grant.revoke", actor, error.message)
                raise
            return self._book.revoke(grant.grant_id), taken

    async def _note_failure(self, grant: Grant, verb: str, actor: str, reason: str) -> None:
        details: dict[str, JSON] = {"grant_id": grant.grant_id}
        await self._actions.note(
            Action(grant.agent_id, actor, verb, format_scope(grant.scope), "failed", reason, details)
        )

    async def _expired(self, grant: Grant) -> None:
        """Note the end of a grant whose time is up; of files, have them taken away first."""
        agent = self._agents.get(grant.agent_id)
        taken: dict[str, JSON] = {}
        try:
            if isinstance(grant.scope, FsScope) and agent is not None and agent.live:
                async with self._files.lock(agent):
                    taken = await self._files.take(agent, grant)
            await self._end(grant, "grant.expire", "daemon", "", taken)
        except CannotRevoke as error:
            await self._note_failure(grant, "grant.expire", "daemon", error.message)
        except Exception:
            log.exception("an expiry is not complete", grant=grant.grant_id)

    async def expire_forever(self) -> None:
        """End grants when their time is up, unasked; runs as long as the daemon, whatever fails for one of them."""
        while True:
            try:
                await self._until_expiry()
                for grant in self._book.expire():
                    # Each by itself: files or a disk that are slow keep no other grant from ending.
                    self._keep(asyncio.get_running_loop().create_task(self._expired(grant)))
            except Exception:
                log.exception("expiry failed, and is tried again")
                await asyncio.sleep(EXPIRY_PAUSE_SECONDS)

    async def _until_expiry(self) -> None:
        due = self._book.next_expiry()
        self.expiry_changed.clear()
        try:
            delay = None if due is None else max(due - asyncio.get_running_loop().time(), 0.0)
            async with asyncio.timeout(delay):
                await self.expiry_changed.wait()
        except TimeoutError:
            pass  # the time is up

    # --- holds

    async def hold(self, hold: Hold) -> Hold:
        await self._actions.record(
            Action(
                "",
                hold.held_by,
                "hold.create",
                f"{hold.kind}:{hold.subject}",
                "done",
                hold.reason,
                {"hold_id": hold.hold_id, "ticket": hold.ticket},
            )
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
            await self._actions.note(
                Action(agent.agent_id, actor, "exec.fail", shown, "failed", error.message, details)
            )
            raise
        return stream

    async def kill_exec(self, agent: Agent, stream_id: str, *, actor: str, reason: str) -> KilledExec:
        """End what one exec started and nothing else; raises NotFound where the agent has no such stream.

        What an exec left runs on when the daemon is restarted, which then knows it from the launcher alone.
        """
        reply = await self._launcher.call("end_exec", agent_id=agent.agent_id, stream_id=stream_id)
        stream = self.streams.get(stream_id)
        if reply.body.get("known") is not True and (stream is None or stream.agent is not agent):
            raise NotFound(
                f"cannot end stream {shown_id(stream_id)} of {agent.name}: there is none",
                remedy="see `stockadectl actions NAME --verb exec.start`",
            )
        left = reply.body.get("left")
        killed = KilledExec(
            int(str(reply.body.get("processes_killed", 0))),
            reply.body.get("verified_empty") is True,
            tuple(int(str(pid)) for pid in left) if isinstance(left, list) else (),
        )
        details: dict[str, JSON] = {
            "stream_id": stream_id,
            "processes_killed": killed.processes,
            "verified_empty": killed.verified_empty,
        }
        verdict = "done" if killed.verified_empty else "failed"
        await self._actions.note(Action(agent.agent_id, actor, "exec.kill", stream_id, verdict, reason, details))
        return killed

    def end_streams(self, agent: Agent | None = None) -> None:
        """End what was entered into this agent, or into any: with the agent, or with the launcher that held it.

        A program that exec started dies with its launcher (sandbox/attach.py), and nobody is left to say so.
        """
        if agent is not None:
            self._turns.pop(agent.agent_id, None)
        for stream in list(self.streams.values()):
            if (agent is None or stream.agent is agent) and not stream.ended.is_set():
                self.exec_ended(stream.stream_id, Exit(None, signal.SIGKILL))

    def exec_ended(self, stream_id: str, result: Exit) -> None:
        stream = self.streams.get(stream_id)
        if stream is not None:
            stream.exit = result
            stream.ended.set()
