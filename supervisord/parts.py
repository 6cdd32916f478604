"""Every part of the daemon, built and wired: the only place that does it. Nothing of them runs yet."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandbox import seccomp
from sandbox.plan import IDS_PER_AGENT
from supervisord.acts import Acts
from supervisord.authorities import Authorities, read_or_make_secret
from supervisord.budget_watch import BudgetWatch
from supervisord.config import GatewayKind
from supervisord.egress_plane import EgressPlane
from supervisord.endings import Endings
from supervisord.errors import StockadeError
from supervisord.exchanges import Exchanges, Route
from supervisord.filegrants import FileGrants
from supervisord.gateway_health import GatewayHealth, probe_http
from supervisord.gateway_process import read_secret, user_id
from supervisord.grantable import check_grantable
from supervisord.homes import Homes
from supervisord.ids import AgentId, new_receipt_id, new_request_id
from supervisord.images import Images
from supervisord.killswitch import KillSwitch
from supervisord.launcher_link import LauncherLink
from supervisord.launcher_watch import LauncherWatch
from supervisord.launching import Launching
from supervisord.layers import Layers
from supervisord.leases import Leases
from supervisord.outlets import dialer_configuration, worker_configuration
from supervisord.policies import SHIPPED_DIR
from supervisord.policy import OnDeny
from supervisord.provisions import Provisions
from supervisord.receipts import Signing
from supervisord.requests import Requests
from supervisord.retention import Retention
from supervisord.sinks.feed import Sinks
from supervisord.slots import Slots
from supervisord.told_calls import ToldCalls
from supervisord.webhook import Webhook

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from supervisord.actions.log import ActionLog
    from supervisord.agents import Agent, Agents
    from supervisord.config import Config
    from supervisord.gateway_process import GatewayProcess
    from supervisord.holds import Holds
    from supervisord.launching import Variant
    from supervisord.policies import PolicyShelf
    from supervisord.registry import Registry
    from supervisord.scopes import GrantBook
    from supervisord.store import Store

# One for all instances of a host, wherever each has its run_dir: they share the ids of the host.
SLOTS_DIR: Final = Path("/run/stockade-slots")
ENDINGS_DIR_NAME: Final = "ended-grants"
LEASES_DIR_NAME: Final = "leases"


class Parts:
    """What the daemon is made of, each part with those that it needs; raises StockadeError."""

    def __init__(
        self,
        config: Config,
        *,
        policies: PolicyShelf,
        agents: Agents,
        book: GrantBook,
        actions: ActionLog,
        store: Store,
        gateway: GatewayProcess | None,
        registry: Registry,
        holds: Holds,
        in_background: Callable[[Coroutine[object, object, None]], None],
    ) -> None:
        self.config = config
        self.policies = policies
        self.agents = agents
        self.book = book
        self.actions = actions
        self.store = store
        self.gateway = gateway
        self.registry = registry
        self.holds = holds
        self.launcher = LauncherLink(
            path=config.run_dir / "launcher.sock",
            # Whoever hears it is built last, and needs it.
            on_event=lambda message, fds: self.launcher_watch.heard(message, fds),  # noqa: PLW0108
            on_lost=lambda: self.launcher_watch.lost(),  # noqa: PLW0108
        )
        self.endings = Endings(store=store, actions=actions, directory=config.run_dir / "private" / ENDINGS_DIR_NAME)
        self._build_way_out()
        self._build_host()
        self._build_acts()
        self._build_watches(in_background)

    def _build_way_out(self) -> None:
        """Build what is between agents and the gateway, and who is asked about it."""
        config = self.config
        users = config.users
        for name in (users.egress, users.dialer, users.gateway, users.images):
            user_id(name)
        self.plane = EgressPlane(
            users=users,
            configure=worker_configuration(config),
            dialer=dialer_configuration(config),
            workers=config.egress_workers,
            records=config.run_dir / "processes",
            ca_file=config.gateway.ca_file,
        )
        self.authorities = Authorities(
            read_or_make_secret(config.run_dir / "private" / "authority.secret", os.urandom),
            entropy=os.urandom,
            now_ns=time.time_ns,
        )
        self.authorities.fill()
        self.requests = Requests(
            agents=self.agents,
            actions=self.actions,
            new_id=lambda: new_request_id(os.urandom),
            now_ns=time.time_ns,
            now=time.monotonic,
            policy_of=lambda agent: self.policies.get(agent.what.policy),
            check=lambda scope, policy: check_grantable(scope, policy, config.gateway),
        )
        embedded = config.gateway.kind is GatewayKind.EMBEDDED
        self.exchanges = Exchanges(
            agents=self.agents,
            book=self.book,
            actions=self.actions,
            plane=self.plane,
            requests=self.requests,
            store=self.store,
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
        self.plane.judge = self.exchanges
        self.gateway_health = GatewayHealth(
            self.gateway.probe if self.gateway is not None else self._probe_gateway,
            kind=config.gateway.kind.value,
            seconds=config.gateway.probe_seconds,
            note=self.exchanges.note,
        )
        self.exchanges.gateway = self.gateway_health
        self.webhook = _webhook(config)

    def _build_host(self) -> None:
        """Build what keeps and hands out what the host has."""
        config = self.config
        ids = config.agents
        self.slots = Slots(
            SLOTS_DIR,
            instance=config.instance,
            first=ids.uid_first,
            count=(ids.uid_last + 1 - ids.uid_first) // IDS_PER_AGENT,
        )
        self.filters = _compile_filters()
        self.layers = Layers(
            config.scratch_dir / "layers",
            agents=self.agents,
            actions=self.actions,
            launcher=self.launcher,
            keep_seconds=config.scratch.keep_layers_seconds,
            now=time.time,
        )
        self.images = Images(
            directory=config.state_dir / "images",
            records=config.run_dir / "processes",
            user=config.users.images,
            limits=config.images,
            own=(config.state_dir, config.run_dir),
            record=self.actions.record,
        )
        if config.log.sinks:
            user_id(config.users.sinks)
        self.sinks = Sinks(config, self.actions, now=time.monotonic)
        self.retention = Retention(
            config.run_dir / "agents",
            bytes_max=config.agents.output_keep_bytes,
            seconds_max=config.agents.output_days * 86400.0,
            live=lambda: {agent.agent_id for agent in self.agents.live()} | self.launcher_watch.held_ids,
            now_s=time.time,
        )

    def _build_acts(self) -> None:
        """Build what launches, kills and orders."""
        config = self.config
        self.killswitch = KillSwitch(
            agents=self.agents,
            actions=self.actions,
            launcher=self.launcher,
            plane=self.plane,
            sign=Signing(lambda: self.actions.signer).sign,
            ended=self._gone,
            new_id=lambda: new_receipt_id(os.urandom),
            now_ns=time.time_ns,
            grants=lambda agent_id: len(self.book.for_agent(AgentId(agent_id))),
        )
        self.provisions = Provisions(
            book=self.book,
            launcher=self.launcher,
            plane=self.plane,
            exchanges=self.exchanges,
            slots=self.slots,
            authorities=self.authorities,
        )
        self.launching = Launching(
            config=config,
            agents=self.agents,
            policies=self.policies,
            book=self.book,
            actions=self.actions,
            launcher=self.launcher,
            provisions=self.provisions,
            slots=self.slots,
            holds=self.holds,
            layers=self.layers,
            homes=Homes(config.scratch_dir / "homes"),
            images=self.images,
            killswitch=self.killswitch,
            authorities=self.authorities,
            filters={name: digest for name, (digest, _) in self.filters.items()},
            entropy=os.urandom,
            now_ns=time.time_ns,
            now=time.monotonic,
        )
        self.files = FileGrants(
            agents=self.agents,
            book=self.book,
            actions=self.actions,
            launcher=self.launcher,
            plane=self.plane,
            store=self.store,
        )
        self.acts = Acts(
            config=config,
            agents=self.agents,
            policies=self.policies,
            book=self.book,
            actions=self.actions,
            launcher=self.launcher,
            plane=self.plane,
            exchanges=self.exchanges,
            requests=self.requests,
            holds=self.holds,
            store=self.store,
            files=self.files,
            endings=self.endings,
            entropy=os.urandom,
            now_ns=time.time_ns,
        )

    def _build_watches(self, in_background: Callable[[Coroutine[object, object, None]], None]) -> None:
        """Build what acts by itself."""
        config = self.config
        self.budget_watch = BudgetWatch(
            agents=self.agents,
            ledgers=self.exchanges.ledgers,
            launcher=self.launcher,
            store=self.store,
            note=self.exchanges.note,
            freeze=self.acts.freeze,
            kill=self.killswitch.kill,
            now=time.monotonic,
        )
        self.leases = Leases(
            agents=self.agents,
            acts=self.acts,
            killswitch=self.killswitch,
            actions=self.actions,
            directory=config.run_dir / "private" / LEASES_DIR_NAME,
            now=time.monotonic,
        )
        self.agents.on_change.append(self.leases.changed)
        self.acts.on_freeze.append(self.leases.frozen)
        self.told_calls = ToldCalls(self.actions.append_all, call_name=seccomp.call_name)
        self.launcher_watch = LauncherWatch(
            self.launcher,
            config=config,
            agents=self.agents,
            book=self.book,
            actions=self.actions,
            store=self.store,
            slots=self.slots,
            filters=self.filters.values(),
            provisions=self.provisions,
            files=self.files,
            plane=self.plane,
            acts=self.acts,
            endings=self.endings,
            told_calls=self.told_calls,
            ended=self._gone,
            in_background=in_background,
        )

    def health(self) -> dict[str, tuple[bool, str]]:
        """Readiness of each part, and a word where it is not."""
        parts = {"launcher": (self.launcher.connected, "" if self.launcher.connected else "is being reached")}
        parts |= self.plane.health()
        parts["gateway"] = self.gateway_health.report()
        if self.webhook is not None:
            parts["webhook"] = self.webhook.health()
        return parts

    def _gone(self, agent: Agent) -> None:
        self.provisions.forget(agent)
        self.acts.end_streams(agent)
        self.retention.agent_ended()
        self.files.forget(agent)
        self.requests.end_agent(agent.agent_id)
        self.budget_watch.forget(agent.agent_id)

    def _on_deny(self, agent: Agent) -> OnDeny:
        try:
            return self.policies.get(agent.what.policy).egress.on_deny
        except StockadeError:
            return OnDeny.DENY

    async def _probe_gateway(self) -> None:
        await probe_http(self.config.gateway.url, self.config.gateway.kind.value)


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


def _compile_filters() -> dict[Variant, tuple[str, tuple[bytes, ...]]]:
    """Every shipped seccomp profile, compiled for what can be told of: {variant: (digest, programs)}."""
    filters = {}
    for path in sorted((SHIPPED_DIR / "seccomp").glob("*.json")):
        profile = seccomp.load(path)
        for execs, refusals in itertools.product((False, True), repeat=2):
            compiled = seccomp.compile(profile, execs=execs, refusals=refusals)
            filters[path.stem, execs, refusals] = (compiled.digest, (compiled.init, *compiled.programs))
    return filters
