"""The daemon's parts put together and run: the only place that builds and wires objects (beside `__main__`)."""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog
from stockade.v1 import (
    actions_pb2_grpc,
    agents_pb2_grpc,
    changes_pb2_grpc,
    grants_pb2_grpc,
    policies_pb2_grpc,
    registry_pb2_grpc,
    requests_pb2_grpc,
    system_pb2_grpc,
)

from sandbox import seccomp
from sandbox.plan import IDS_PER_AGENT, pack_filters
from supervisord.actions.log import ActionLog
from supervisord.actions.types import Action, CannotReadLog
from supervisord.acts import Acts
from supervisord.agents import Agent, Agents
from supervisord.api import Api, control_listener
from supervisord.authorities import Authorities, read_or_make_secret
from supervisord.budget_watch import BudgetWatch
from supervisord.channel import close_all
from supervisord.config import Config, GatewayKind, OnStop
from supervisord.egress_plane import EgressPlane
from supervisord.endings import Endings
from supervisord.errors import CannotRecord, StockadeError, Unavailable
from supervisord.exchanges import Exchanges, Route
from supervisord.filegrants import FileGrants
from supervisord.gateway_health import GatewayHealth, probe_http
from supervisord.gateway_process import GatewayProcess, GuardrailVerdict, read_secret, user_id
from supervisord.grantable import check_grantable
from supervisord.holds import Holds
from supervisord.homes import Homes
from supervisord.ids import new_grant_id, new_receipt_id, new_request_id
from supervisord.images import Images
from supervisord.killswitch import KillSwitch
from supervisord.launcher_link import LauncherLink, Message
from supervisord.launching import Launching, Variant
from supervisord.layers import Layers
from supervisord.leases import Leases
from supervisord.lifecycle import Event, State, can
from supervisord.limit_actions import met_limit_action, oom_action
from supervisord.log_retention import finish_redactions, retire_forever
from supervisord.outlets import dialer_configuration, worker_configuration
from supervisord.policies import SHIPPED_DIR, PolicyShelf
from supervisord.policy import OnDeny
from supervisord.receipts import Signing
from supervisord.recovery import Kept, Recovery, crash_action, exit_action, exit_of, reach_launcher, row_of
from supervisord.registry import Registry
from supervisord.requests import Requests
from supervisord.retention import Retention
from supervisord.rpc.agents import AgentService
from supervisord.rpc.changes import ChangeService
from supervisord.rpc.governance import ActionService, GrantService, PolicyService, RequestService
from supervisord.rpc.registry import RegistryService
from supervisord.rpc.system import SystemService
from supervisord.scopes import GrantBook
from supervisord.sinks.feed import Sinks
from supervisord.slots import Slots
from supervisord.store import Store
from supervisord.told_calls import ToldCalls
from supervisord.webhook import Webhook

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine

    import grpc

    from supervisord.actions.owed import Owed

log = structlog.get_logger()

# One for all instances of a host, wherever each has its run_dir: they share the ids of the host.
SLOTS_DIR: Final = Path("/run/stockade-slots")
ENDINGS_DIR_NAME: Final = "ended-grants"
LEASES_DIR_NAME: Final = "leases"
LAUNCHER_PAUSE_SECONDS: Final = 0.2
STOP_SECONDS: Final = 2.0
GO_ON_SECONDS: Final = 1.0
ROOM_BYTES_MIN: Final = 256 * 1024


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
        self._frozen: set[str] = set()
        self._adopted: list[str] = []  # whose gates are to be opened
        self._live_ids: set[str] = set()
        self._listed_ids: set[str] = set()

    async def open(self) -> None:
        """Open what every act is written to; raises CannotOpenLog, CannotStore or CannotRecord where that fails."""
        config = self.config
        make_directories(config)
        await asyncio.to_thread(_need_room, config.state_dir)
        self._actions = await asyncio.to_thread(_open_log, config, self._owed)
        self._store = await Store.open(config.state_dir / "state.db")
        await self._actions.pay()
        crash = await crash_action(self._actions, config.instance)
        if crash is not None:
            await self._actions.record(crash)
        await self._actions.record(
            Action("", "daemon", "daemon.start", config.instance, "done", "", {"pid": os.getpid()})
        )

    async def start(self, *, listener: socket.socket | None = None) -> None:
        """Start every part, in the order in which they need each other; raises StockadeError.

        `listener` is the control socket, where there is one.
        """
        config = self.config
        self._told_calls = ToldCalls(self._actions.append_all, call_name=seccomp.call_name)
        self._launcher = LauncherLink(
            path=config.run_dir / "launcher.sock", on_event=self._launcher_event, on_lost=self._launcher_lost
        )
        self._gateway = GatewayProcess(config, self._guardrail) if config.gateway.kind is GatewayKind.EMBEDDED else None
        if self._gateway is not None:
            await self._gateway.start()
        self._endings = Endings(
            store=self._store, actions=self._actions, directory=config.run_dir / "private" / ENDINGS_DIR_NAME
        )
        self._endings.take_up()
        self._agents.on_change.append(self._changed)
        self._registry = Registry(
            await self._store.definitions(),
            store=self._store,
            record=self._actions.record,
            read=self._policies.read_agent,
            now_ns=time.time_ns,
        )
        self._wire(Holds(await self._store.holds()))
        await self._images.start()
        if self._webhook is not None:
            await self._webhook.start()
            self._requests.on_change.append(self._webhook.tell)
        await self._exchanges.ledgers.load()
        await self._budget_watch.load()
        await self._plane.start()
        await self._reach_launcher()
        await self._recover()
        await self._layers.reconcile()
        for work in (
            self._acts.expire_forever,
            self._budget_watch.watch_forever,
            self._gateway_health.watch,
            self._leases.watch_forever,
            self._retention.keep_forever,
            self._layers.expire_forever,
            self._endings.retry_forever,
            self._actions.pay_forever,
        ):
            self._in_background(kept_up(work))
        self._in_background(finish_redactions(self._actions))
        self._in_background(retire_forever(self._actions, config.log))
        self._sinks.start()
        await self._serve(listener)
        log.info("ready", instance=config.instance, control_socket=str(config.run_dir / "control.sock"))

    def _wire(self, holds: Holds) -> None:
        config = self.config
        users = config.users
        for name in (users.egress, users.dialer, users.gateway, users.images):
            user_id(name)
        self._plane = EgressPlane(
            users=users,
            configure=worker_configuration(config),
            dialer=dialer_configuration(config),
            workers=config.egress_workers,
            records=config.run_dir / "processes",
            ca_file=config.gateway.ca_file,
        )
        self._authorities = Authorities(
            read_or_make_secret(config.run_dir / "private" / "authority.secret", os.urandom),
            entropy=os.urandom,
            now_ns=time.time_ns,
        )
        self._authorities.fill()
        self._requests = Requests(
            agents=self._agents,
            actions=self._actions,
            new_id=lambda: new_request_id(os.urandom),
            now_ns=time.time_ns,
            now=time.monotonic,
            policy_of=lambda agent: self._policies.get(agent.what.policy),
            check=lambda scope, policy: check_grantable(scope, policy, config.gateway),
        )
        embedded = config.gateway.kind is GatewayKind.EMBEDDED
        self._exchanges = Exchanges(
            agents=self._agents,
            book=self._book,
            actions=self._actions,
            plane=self._plane,
            requests=self._requests,
            store=self._store,
            route=Route(
                gateway=config.gateway.kind.value,
                preface=embedded,
                forwarding=embedded or bool(config.gateway.forward_proxy),
                allow_networks=config.gateway.allow_networks,
                mcp_servers=tuple(server.name for server in config.gateway.mcp),
            ),
            on_deny=self._on_deny,
            now=time.monotonic,
            label_budgets=config.budgets,
        )
        self._plane.judge = self._exchanges
        self._gateway_health = GatewayHealth(
            self._gateway.probe if self._gateway is not None else self._probe_gateway,
            kind=config.gateway.kind.value,
            seconds=config.gateway.probe_seconds,
            note=self._exchanges.note,
        )
        self._exchanges.gateway = self._gateway_health
        self._webhook = _webhook(config)
        ids = config.agents
        self._slots = Slots(
            SLOTS_DIR,
            instance=config.instance,
            first=ids.uid_first,
            count=(ids.uid_last + 1 - ids.uid_first) // IDS_PER_AGENT,
        )
        self._filters = _compile_filters()
        self._layers = Layers(
            config.scratch_dir / "layers",
            agents=self._agents,
            actions=self._actions,
            launcher=self._launcher,
            keep_seconds=config.scratch.keep_layers_seconds,
            now=time.time,
        )
        self._images = Images(
            directory=config.state_dir / "images",
            records=config.run_dir / "processes",
            user=users.images,
            limits=config.images,
            own=(config.state_dir, config.run_dir),
            record=self._actions.record,
        )
        if config.log.sinks:
            user_id(users.sinks)
        self._sinks = Sinks(config, self._actions, now=time.monotonic)
        self._retention = Retention(
            config.run_dir / "agents",
            bytes_max=config.agents.output_keep_bytes,
            seconds_max=config.agents.output_days * 86400.0,
            live=lambda: {agent.agent_id for agent in self._agents.live()} | self._live_ids | self._listed_ids,
            now_s=time.time,
        )
        self._killswitch = KillSwitch(
            agents=self._agents,
            actions=self._actions,
            launcher=self._launcher,
            plane=self._plane,
            sign=Signing(lambda: self._actions.signer).sign,
            ended=self._gone,
            new_id=lambda: new_receipt_id(os.urandom),
            now_ns=time.time_ns,
        )
        self._launching = Launching(
            config=config,
            agents=self._agents,
            policies=self._policies,
            book=self._book,
            actions=self._actions,
            launcher=self._launcher,
            plane=self._plane,
            exchanges=self._exchanges,
            slots=self._slots,
            holds=holds,
            layers=self._layers,
            homes=Homes(config.scratch_dir / "homes"),
            images=self._images,
            killswitch=self._killswitch,
            authorities=self._authorities,
            filters={name: digest for name, (digest, _) in self._filters.items()},
            entropy=os.urandom,
            now_ns=time.time_ns,
            now=time.monotonic,
        )
        self._holds = holds
        self._files = FileGrants(
            agents=self._agents,
            book=self._book,
            actions=self._actions,
            launcher=self._launcher,
            plane=self._plane,
            store=self._store,
        )
        self._acts = Acts(
            config=config,
            agents=self._agents,
            policies=self._policies,
            book=self._book,
            actions=self._actions,
            launcher=self._launcher,
            plane=self._plane,
            exchanges=self._exchanges,
            requests=self._requests,
            holds=holds,
            store=self._store,
            files=self._files,
            endings=self._endings,
            entropy=os.urandom,
            now_ns=time.time_ns,
        )
        self._budget_watch = BudgetWatch(
            agents=self._agents,
            ledgers=self._exchanges.ledgers,
            launcher=self._launcher,
            store=self._store,
            note=self._exchanges.note,
            freeze=self._acts.freeze,
            kill=self._killswitch.kill,
            now=time.monotonic,
        )
        self._leases = Leases(
            agents=self._agents,
            acts=self._acts,
            killswitch=self._killswitch,
            actions=self._actions,
            directory=config.run_dir / "private" / LEASES_DIR_NAME,
            now=time.monotonic,
        )
        self._agents.on_change.append(self._leases.changed)

    # --- the API

    async def _serve(self, listener: socket.socket | None) -> None:
        self._api = Api(self.config, listener or control_listener(self.config), self._register)
        await self._api.start()

    def _register(self, server: grpc.aio.Server) -> None:
        config = self.config
        agents_pb2_grpc.add_AgentServiceServicer_to_server(
            AgentService(
                agents=self._agents,
                launching=self._launching,
                killswitch=self._killswitch,
                acts=self._acts,
                holds=self._holds,
                policies=self._policies,
                registry=self._registry,
                launcher=self._launcher,
                layers=self._layers,
                ledgers=self._exchanges.ledgers,
                leases=self._leases,
                output_dir=config.run_dir / "agents",
                entropy=os.urandom,
                now_ns=time.time_ns,
            ),
            server,
        )
        changes_pb2_grpc.add_ChangeServiceServicer_to_server(ChangeService(layers=self._layers), server)
        grants_pb2_grpc.add_GrantServiceServicer_to_server(
            GrantService(agents=self._agents, book=self._book, acts=self._acts), server
        )
        requests_pb2_grpc.add_RequestServiceServicer_to_server(
            RequestService(agents=self._agents, requests=self._requests, acts=self._acts), server
        )
        actions_pb2_grpc.add_ActionServiceServicer_to_server(
            ActionService(agents=self._agents, actions=self._actions, sinks=self._sinks), server
        )
        policies_pb2_grpc.add_PolicyServiceServicer_to_server(
            PolicyService(
                config=config, policies=self._policies, agents=self._agents, book=self._book, images=self._images
            ),
            server,
        )
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(
            RegistryService(
                registry=self._registry,
                policies=self._policies,
                agents=self._agents,
                book=self._book,
                ledgers=self._exchanges.ledgers,
                actions=self._actions,
                now_ns=time.time_ns,
            ),
            server,
        )
        system_pb2_grpc.add_SystemServiceServicer_to_server(
            SystemService(
                instance=config.instance,
                state_dir=config.state_dir,
                started_at_ns=self._started_at_ns,
                health=self.health,
                sinks=self._sinks.states,
            ),
            server,
        )

    async def _probe_gateway(self) -> None:
        await probe_http(self.config.gateway.url, self.config.gateway.kind.value)

    def _guardrail(self, verdict: GuardrailVerdict) -> None:
        self._exchanges.guardrail(verdict)

    def health(self) -> dict[str, tuple[bool, str]]:
        """Readiness of each part, and a word where it is not."""
        parts = {"launcher": (self._launcher.connected, "" if self._launcher.connected else "is being reached")}
        parts |= self._plane.health()
        parts["gateway"] = self._gateway_health.report()
        if self._webhook is not None:
            parts["webhook"] = self._webhook.health()
        return parts

    # --- the launcher

    async def _reach_launcher(self) -> None:
        await reach_launcher(
            self._launcher,
            self.config,
            managed=bool(os.environ.get("STOCKADE_LAUNCHER_MANAGED")),
            greet=self._greet,
        )

    async def _greet(self) -> None:
        # Read before the greeting, which brings the agents: what was taken back or spent must not come with them.
        kept = await Kept.read(self._store, unwritten=self._endings.unwritten())
        self._recovery = Recovery(
            agents=self._agents,
            launching=self._launching,
            launcher=self._launcher,
            actions=self._actions,
            slots=self._slots,
            output_dir=self.config.run_dir / "agents",
            kept=kept,
            hold=self._files.hold,
            adopted=self._adopted,
        )
        self._live_ids = set()
        self._listed = await self._recovery.greet(self._files.groups())
        self._listed_ids = {str(entry["agent_id"]) for entry in self._listed}
        self._frozen = {str(entry["agent_id"]) for entry in self._listed if entry.get("state") == "FROZEN"}
        for digest, programs in self._filters.values():
            fd = os.memfd_create("filter", os.MFD_CLOEXEC)
            try:
                os.write(fd, pack_filters(programs))
                await self._launcher.call("filter", (fd,), digest=digest)
            finally:
                os.close(fd)

    async def _recover(self) -> None:
        """Take up what an earlier daemon left; the adopt events have come with the greeting."""
        ended = await self._recovery.find_ended(self._live_ids)
        self._slots.reconcile(agent.what.slot for agent in self._agents.live())
        for agent in self._agents.live():
            if agent.agent_id in self._frozen:
                self._agents.apply(agent, Event.FREEZE)
        await self._files.reconcile(self._listed)
        if self._recovery.adopted or ended or self._recovery.half_built:
            await self._actions.record(
                Action(
                    "",
                    "daemon",
                    "daemon.recover",
                    self.config.instance,
                    "done",
                    "",
                    {
                        "adopted": list(self._recovery.adopted),
                        "ended": [agent.agent_id for agent in ended],
                        "undone": list(self._recovery.half_built),
                    },
                )
            )
        for agent_id in await self._without_launch():
            log.error("an agent runs whose launch is not in the action log", agent=agent_id)
            await self._actions.record(
                Action(agent_id, "daemon", "agent.adopt", "agent", "done", "its launch is not in the action log")
            )
        await self._recovery.open_gates()

    async def _without_launch(self) -> list[str]:
        try:
            return await self._recovery.without_launch()
        except CannotReadLog as error:
            log.error("cannot tell whose launch is in the action log", cause=error.message)
            return []

    def _launcher_event(self, message: Message, fds: list[int]) -> None:
        agent_id = str(message.get("agent_id"))
        match message.get("ev"):
            case "adopt":
                self._live_ids.add(agent_id)
                meta, posture, ids = _object(message, "meta"), _object(message, "posture"), message.get("ids")
                self._recovery.adopt(agent_id, meta, fds, posture=posture, ids=ids if isinstance(ids, int) else None)
                return
            case "exited":
                self._exited(agent_id, message)
            case "met_limit":
                self._met_limit(agent_id, message)
            case "called":
                self._told_calls.tell(agent_id, str(message.get("stream_id")), message.get("events"))
            case "exec_exited":
                status = message.get("status")
                self._acts.exec_ended(
                    str(message.get("stream_id")), exit_of(status if isinstance(status, dict) else {})
                )
            case other:
                log.warning("the launcher sent an unknown event", event=other)
        close_all(fds)

    def _exited(self, agent_id: str, message: Message) -> None:
        """Pid 1 has ended, and nothing of the agent is left on the host."""
        self._live_ids.discard(agent_id)
        self._listed_ids.discard(agent_id)
        agent = self._agents.get(agent_id)
        if agent is None or not agent.live:
            return
        status = message.get("status")
        agent.exit = exit_of(status if isinstance(status, dict) else {}, oom=message.get("oom") is True)
        if not can(agent.state, Event.EXITED):
            return
        self._agents.apply(agent, Event.EXITED)
        if not agent.live:
            self._gone(agent)
            self._in_background(self._record_exit(agent))

    def _met_limit(self, agent_id: str, message: Message) -> None:
        agent, details = self._agents.get(agent_id), message.get("details")
        if agent is None or not isinstance(details, dict):
            return
        action = met_limit_action(agent, str(message.get("kind")), details)
        if action is not None:
            self._in_background(self._actions.note(action))

    async def _record_exit(self, agent: Agent) -> None:
        if agent.exit is not None and agent.exit.out_of_memory:
            await self._actions.note(oom_action(agent))
        await self._actions.note(exit_action(agent))

    def _gone(self, agent: Agent) -> None:
        self._launching.forget(agent)
        self._acts.end_streams(agent)
        self._retention.agent_ended()
        self._files.forget(agent)
        self._requests.end_agent(agent.agent_id)
        self._budget_watch.forget(agent.agent_id)

    def _changed(self, agent: Agent) -> None:
        if agent.state is not State.STARTING and not self._stopping:
            self._in_background(self._keep_history(agent))

    async def _keep_history(self, agent: Agent) -> None:
        try:
            await self._store.save_agent(row_of(agent))
        except StockadeError as error:
            log.error("cannot keep an agent's history", agent=agent.agent_id, cause=error.message)

    def _launcher_lost(self) -> None:
        if not self._stopping:
            log.error("the launcher has gone: launches fail until it is back; agents run on, confined")
            self._acts.end_streams()
            self._in_background(self._reconnect())

    async def _reconnect(self) -> None:
        while not self._stopping:
            await asyncio.sleep(LAUNCHER_PAUSE_SECONDS)
            known = {grant.grant_id for grant in self._book.all()}
            try:
                await self._reach_launcher()
            except StockadeError as error:
                log.error("no launcher", cause=error.message)
                continue
            self._settle_lost()
            await self._files.reconcile(self._listed, known=known)
            await self._recovery.open_gates()
            await self._thaw_unordered()
            await self._actions.note(Action("", "daemon", "launcher.restart", self.config.instance, "done"))
            return

    async def _thaw_unordered(self) -> None:
        """Let go on what a launcher stopped for a moment, to take files away, and died in that moment."""
        for agent in self._agents.live():
            if agent.agent_id in self._frozen and agent.state is State.RUNNING:
                try:
                    await self._launcher.call("thaw", agent_id=agent.agent_id)
                except StockadeError as error:
                    log.error("cannot thaw an agent", agent=agent.agent_id, cause=error.message)

    def _settle_lost(self) -> None:
        """Note the end of agents that a new launcher did not find alive."""
        for agent in self._agents.live():
            # One that the launcher is still ending is not lost: it will say when nothing is left.
            if agent.agent_id not in self._live_ids | self._listed_ids and agent.state is not State.STARTING:
                agent.failure = agent.failure or "it ended while no launcher ran"
                if can(agent.state, Event.LOST):
                    self._agents.apply(agent, Event.LOST)
                    self._gone(agent)
                    self._in_background(self._record_exit(agent))

    # --- end

    async def stop(self) -> None:
        """End in order. Agents run on, confined, unless `[agents] on_stop = "kill"`."""
        self._stopping = True
        await self._api.announce_end()
        if self.config.agents.on_stop is OnStop.KILL:
            await self._killswitch.kill(self._agents.live(), actor="daemon", reason="the daemon stops")
        left = [agent.agent_id for agent in self._agents.live()]
        await self._api.close(STOP_SECONDS)
        for task in self._background:
            task.cancel()
        await self._images.stop()
        if self._webhook is not None:
            await self._webhook.stop()
        if not left:
            await self._plane.stop()
        if self._gateway is not None:
            await self._gateway.stop()
        self._launcher.close()
        await self._told_calls.stop()
        await self._sinks.stop()
        stop = Action("", "daemon", "daemon.stop", self.config.instance, "done", "", {"agents_left": left})
        await self._actions.note(stop, durable=True)
        await self._exchanges.ledgers.close()
        await self._actions.close()
        await self._store.close()
        self._slots.close()

    async def abandon(self) -> None:
        """End what a start that failed had started."""
        self._stopping = True
        for part in (
            getattr(self, name, None) for name in ("_images", "_plane", "_gateway", "_webhook", "_told_calls", "_sinks")
        ):
            if part is not None:
                await part.stop()
        for task in self._background:
            task.cancel()
        for part in (getattr(self, name, None) for name in ("_actions", "_store")):
            if part is not None:
                await part.close()

    async def reload(self) -> None:
        """Read the policies anew (SIGHUP); running agents keep what they were launched with."""
        await asyncio.to_thread(self._policies.load)
        digests = {policy.name: policy.digest for policy in self._policies.list()}
        await self._actions.record(Action("", "daemon", "policy.load", "policies", "done", "", dict(digests)))

    def _on_deny(self, agent: Agent) -> OnDeny:
        try:
            return self._policies.get(agent.what.policy).egress.on_deny
        except StockadeError:
            return OnDeny.DENY

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


def _webhook(config: Config) -> Webhook | None:
    """The webhook, where one is configured; its key is read here and is nowhere else. Raises StockadeError."""
    wanted = config.requests
    if not wanted.webhook_url or wanted.webhook_secret_file is None:
        return None
    user_id(config.users.webhook)
    return Webhook(
        url=wanted.webhook_url,
        key=read_secret(wanted.webhook_secret_file),
        user=config.users.webhook,
        instance=config.instance,
        record=config.run_dir / "processes" / "webhook.json",
        now_ns=time.time_ns,
    )


def make_directories(config: Config) -> None:
    for path, mode in (
        (config.state_dir, 0o700),
        (config.state_dir / "log", 0o700),
        (config.state_dir / "keys", 0o700),
        (config.run_dir, 0o711),
        (config.run_dir / "private", 0o700),
        (config.run_dir / "processes", 0o700),
        (config.run_dir / "agents", 0o700),
    ):
        try:
            path.mkdir(mode=mode, parents=True, exist_ok=True)
            path.chmod(mode)
        except OSError as error:
            raise Unavailable(
                f"cannot use {path}: {error.strerror}", remedy="check state_dir and run_dir in the configuration"
            ) from error


def _need_room(state_dir: Path) -> None:
    """Raise CannotRecord where the first records of a start, and what indexes them, would not all find room."""
    try:
        with tempfile.TemporaryFile(dir=state_dir) as file:
            os.posix_fallocate(file.fileno(), 0, ROOM_BYTES_MIN)
    except OSError as error:
        raise CannotRecord(
            f"cannot record anything in {state_dir}: {error.strerror}", remedy="make room for it"
        ) from error


def _open_log(config: Config, owed: Owed) -> ActionLog:
    return ActionLog.open(
        config.state_dir / "log",
        config.state_dir / "keys" / "log.key",
        durability=config.log.durability.value,
        now_ns=time.time_ns,
        origin=f"stockade/{config.instance}/{os.uname().nodename}",
        checkpoint_every_entries=config.log.checkpoint_entries,
        checkpoint_seconds=config.log.checkpoint_seconds,
        on_checkpoint=lambda note: _publish(note, config),
        owed=owed,
    )


def _publish(note: str, config: Config) -> None:
    """Give a checkpoint to the journal and to the witness directory: whoever kept one finds a rollback."""
    log.info("checkpoint", note=note)
    if config.log.witness_dir is None:
        return
    try:
        with (config.log.witness_dir / f"{config.instance}.checkpoints").open("a", encoding="utf-8") as file:
            file.write(f"{note}\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        log.error("no checkpoint in the witness directory", cause=str(error))


def _compile_filters() -> dict[Variant, tuple[str, tuple[bytes, ...]]]:
    """Every shipped seccomp profile, compiled for what can be told of: {variant: (digest, programs)}."""
    filters = {}
    for path in sorted((SHIPPED_DIR / "seccomp").glob("*.json")):
        profile = seccomp.load(path)
        for execs, refusals in itertools.product((False, True), repeat=2):
            compiled = seccomp.compile(profile, execs=execs, refusals=refusals)
            filters[path.stem, execs, refusals] = (compiled.digest, (compiled.init, *compiled.programs))
    return filters


def _object(message: Message, key: str) -> dict[str, object]:
    value = message.get(key)
    return dict(value) if isinstance(value, dict) else {}
