"""The daemon as a whole: opened, started, reloaded and stopped, each in order."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Final

import structlog

from supervisord.actions.types import JSON, Action
from supervisord.agents import Agent, Agents
from supervisord.api import Api, control_listener
from supervisord.config import Config, GatewayKind, OnStop
from supervisord.errors import StockadeError
from supervisord.gateway_process import GatewayProcess, GuardrailVerdict
from supervisord.holds import Holds
from supervisord.ids import new_grant_id
from supervisord.lifecycle import State
from supervisord.log_retention import finish_redactions, retire_forever
from supervisord.opening import make_directories, need_room, open_log
from supervisord.parts import Parts
from supervisord.policies import PolicyShelf
from supervisord.recovery import crash_action, digest_of, policies_before, row_of
from supervisord.registry import Registry
from supervisord.rpc.services import register
from supervisord.scopes import GrantBook
from supervisord.store import Store

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine

    import grpc

    from supervisord.actions.owed import Owed

log = structlog.get_logger()

STOP_SECONDS: Final = 2.0
GO_ON_SECONDS: Final = 1.0


class Daemon:
    """One instance. `start` returns when everything is ready, `stop` when everything it should end has ended."""

    def __init__(self, config: Config, owed: Owed) -> None:
        """`owed` is what happened before the log could be opened."""
        self.config = config
        self._owed = owed
        self._policies = PolicyShelf(config.policy_dirs, gateway=config.gateway)
        self._agents = Agents(now_ns=time.time_ns)
        self._book = GrantBook(now=time.monotonic, wall=time.time, new_id=lambda: new_grant_id(os.urandom))
        self._started_at_ns = time.time_ns()
        self._background: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._said_start = False
        self._gateway: GatewayProcess | None = None

    async def open(self) -> None:
        """Open what every act is written to; raises CannotOpenLog, CannotStore or CannotRecord where that fails."""
        config = self.config
        make_directories(config)
        await asyncio.to_thread(need_room, config.state_dir)
        self._actions = await asyncio.to_thread(open_log, config, self._owed)
        self._store = await Store.open(config.state_dir / "state.db")
        await self._actions.pay()
        crash = await crash_action(self._actions, config.instance)
        if crash is not None:
            await self._actions.record(crash)
        digests = self._digests()
        facts: dict[str, JSON] = {"pid": os.getpid(), "policies": digest_of(digests)}
        before = await policies_before(self._actions)
        await self._actions.record(Action("", "daemon", "daemon.start", config.instance, "done", "", facts))
        self._said_start = True
        if before not in ("", facts["policies"]):
            reason = "they changed while no daemon ran"
            await self._actions.record(Action("", "daemon", "policy.load", "policies", "done", reason, digests))

    async def start(self, *, listener: socket.socket | None = None) -> None:
        """Start every part, in the order in which they need each other; raises StockadeError.

        `listener` is the control socket, where there is one.
        """
        config = self.config
        self._tell_broken()
        self._gateway = GatewayProcess(config, self._guardrail) if config.gateway.kind is GatewayKind.EMBEDDED else None
        if self._gateway is not None:
            await self._gateway.start()
        self._agents.on_change.append(self._changed)
        parts = self._parts = Parts(
            config,
            policies=self._policies,
            agents=self._agents,
            book=self._book,
            actions=self._actions,
            store=self._store,
            gateway=self._gateway,
            registry=Registry(
                await self._store.definitions(),
                store=self._store,
                record=self._actions.record,
                read=self._policies.read_agent,
                now_ns=time.time_ns,
            ),
            holds=Holds(await self._store.holds()),
            in_background=self._in_background,
        )
        parts.endings.take_up()
        await parts.images.start()
        if parts.webhook is not None:
            await parts.webhook.start()
            parts.requests.on_change.append(parts.webhook.tell)
        await parts.exchanges.ledgers.load()
        await parts.budget_watch.load()
        await parts.plane.start()
        await parts.launcher_watch.reach()
        await parts.launcher_watch.recover()
        await parts.layers.reconcile()
        for work in (
            parts.acts.expire_forever,
            parts.budget_watch.watch_forever,
            parts.gateway_health.watch,
            parts.leases.watch_forever,
            parts.retention.keep_forever,
            parts.layers.expire_forever,
            parts.endings.retry_forever,
            self._actions.pay_forever,
        ):
            self._in_background(kept_up(work))
        self._in_background(finish_redactions(self._actions))
        self._in_background(retire_forever(self._actions, config.log))
        parts.sinks.start()
        await self._serve(parts, listener)
        log.info("ready", instance=config.instance, control_socket=str(config.run_dir / "control.sock"))

    async def _serve(self, parts: Parts, listener: socket.socket | None) -> None:
        def add_services(server: grpc.aio.Server) -> None:
            register(server, parts, started_at_ns=self._started_at_ns)

        self._api = Api(self.config, listener or control_listener(self.config), add_services)
        await self._api.start()

    def _guardrail(self, verdict: GuardrailVerdict) -> None:
        self._parts.exchanges.guardrail(verdict)

    def _changed(self, agent: Agent) -> None:
        if agent.state is not State.STARTING and not self._stopping:
            self._in_background(self._keep_history(agent))

    async def _keep_history(self, agent: Agent) -> None:
        try:
            await self._store.save_agent(row_of(agent))
        except StockadeError as error:
            log.error("cannot keep an agent's history", agent=agent.agent_id, cause=error.message)

    async def stop(self) -> None:
        """End in order. Agents run on, confined, unless `[agents] on_stop = "kill"`."""
        parts = self._parts
        self._stopping = True
        parts.launcher_watch.stop()
        await self._api.announce_end()
        if self.config.agents.on_stop is OnStop.KILL:
            await parts.killswitch.kill(self._agents.live(), actor="daemon", reason="the daemon stops")
        left = [agent.agent_id for agent in self._agents.live()]
        await self._api.close(STOP_SECONDS)
        for task in self._background:
            task.cancel()
        await parts.images.stop()
        if parts.webhook is not None:
            await parts.webhook.stop()
        if not left:
            await parts.plane.stop()
        if self._gateway is not None:
            await self._gateway.stop()
        parts.launcher.close()
        await parts.told_calls.stop()
        await parts.sinks.stop()
        stop = Action("", "daemon", "daemon.stop", self.config.instance, "done", "", {"agents_left": left})
        await self._actions.note(stop, durable=True)
        await parts.exchanges.ledgers.close()
        await self._actions.close()
        await self._store.close()
        parts.slots.close()

    async def abandon(self) -> None:
        """End what a start that failed had started."""
        self._stopping = True
        parts: Parts | None = getattr(self, "_parts", None)
        if parts is not None:
            parts.launcher_watch.stop()
            await parts.images.stop()
            await parts.plane.stop()
        if self._gateway is not None:
            await self._gateway.stop()
        if parts is not None:
            if parts.webhook is not None:
                await parts.webhook.stop()
            await parts.told_calls.stop()
            await parts.sinks.stop()
        for task in self._background:
            task.cancel()
        if self._said_start:  # else the next one would take it for a crash
            stop = Action("", "daemon", "daemon.stop", self.config.instance, "failed", "it could not start")
            await self._actions.note(stop, durable=True)
        for part in (getattr(self, name, None) for name in ("_actions", "_store")):
            if part is not None:
                await part.close()

    async def reload(self) -> None:
        """Read the policies anew (SIGHUP); running agents keep what they were launched with."""
        await asyncio.to_thread(self._policies.load)
        self._tell_broken()
        await self._actions.record(Action("", "daemon", "policy.load", "policies", "done", "", self._digests()))

    def _digests(self) -> dict[str, JSON]:
        return {policy.name: policy.digest for policy in self._policies.list()}

    def _tell_broken(self) -> None:
        for broken in self._policies.broken():
            log.warning("a policy cannot be used", file=broken.source, cause=broken.error.message)

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def kept_up(work: Callable[[], Coroutine[object, object, None]]) -> None:
    """Do what never ends; trouble that it does not expect must not end the lease, budget or expiry that it watches."""
    while True:
        try:
            return await work()
        except Exception:
            log.exception("a task of the daemon failed, and goes on", task=work.__qualname__)
            await asyncio.sleep(GO_ON_SECONDS)
