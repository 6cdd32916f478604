"""What a daemon is while it can record nothing: it shows the agents that live, kills them, and refuses all else.

Nothing may happen unrecorded but a kill (DESIGN section 6), and a daemon that does not start could not even kill. So a
daemon whose disk is full, or fails, or whose action log is damaged, starts this; agents have no egress meanwhile. What
is killed is recorded as soon as a log is open again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn

import grpc
import structlog
from stockade.v1 import agents_pb2_grpc, system_pb2_grpc

from supervisord.actions.files import load_signer, settle_rotation
from supervisord.agents import Agents
from supervisord.api import Api
from supervisord.channel import close_all
from supervisord.config import OnStop
from supervisord.egress_plane import shut_listener
from supervisord.errors import CannotRecord, StockadeError
from supervisord.ids import new_receipt_id
from supervisord.killswitch import KillSwitch
from supervisord.launcher_link import LauncherLink, Message
from supervisord.lifecycle import Event, can
from supervisord.processes import end_leftover
from supervisord.receipts import Signing
from supervisord.recovery import exit_of, reach_launcher, take_up
from supervisord.rpc.killing import KillingService
from supervisord.rpc.system import SystemService

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from supervisord.actions.owed import Owed
    from supervisord.actions.types import Action
    from supervisord.agents import Agent
    from supervisord.config import Config

log = structlog.get_logger()

STOP_SECONDS: Final = 1.0
RECONNECT_SECONDS: Final = 0.5
MEND: Final = "make room for state_dir, or mend what is named there"
ALLOWED: Final = frozenset(
    {
        *(f"/stockade.v1.AgentService/{method}" for method in ("ListAgents", "GetAgent", "Kill")),
        *(f"/stockade.v1.SystemService/{method}" for method in ("Version", "Doctor", "Ready")),
        *(f"/grpc.health.v1.Health/{method}" for method in ("Check", "List", "Watch")),
    }
)


class KillOnly:
    """One instance without its records; `cause` is why, `remedy` what ends it, `entropy` makes ids."""

    def __init__(
        self, config: Config, cause: str, *, remedy: str = MEND, owed: Owed, entropy: Callable[[int], bytes]
    ) -> None:
        self._config = config
        self._cause = cause
        self._remedy = remedy
        self._owed = owed
        self._agents = Agents(now_ns=time.time_ns)
        self._half_built: set[str] = set()
        self._guard: list[int] = []
        self._entropy = entropy
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, listener: socket.socket) -> None:
        """Take up the living agents and serve; raises StockadeError."""
        config = self._config
        log.error("the daemon starts in kill-only mode", cause=self._cause)
        key = config.state_dir / "keys" / "log.key"
        with contextlib.suppress(OSError):
            settle_rotation(config.state_dir / "log", key)
        signer = load_signer(key, origin=f"stockade/{config.instance}")
        for record in (config.run_dir / "processes").glob("egress-*.json"):
            end_leftover(record)
        self._launcher = LauncherLink(
            path=config.run_dir / "launcher.sock", on_event=self._launcher_event, on_lost=self._launcher_lost
        )
        await self._reach_launcher()
        self._killswitch = KillSwitch(
            agents=self._agents,
            actions=self,
            launcher=self._launcher,
            plane=self,
            sign=Signing(lambda: signer).sign,
            ended=_let_go,
            new_id=lambda: new_receipt_id(self._entropy),
            now_ns=time.time_ns,
        )
        self._api = Api(config, listener, self._register, interceptors=[Refusing(self._cause, self._remedy)])
        await self._api.start(serving=False)

    def _register(self, server: grpc.aio.Server) -> None:
        agents_pb2_grpc.add_AgentServiceServicer_to_server(
            KillingService(agents=self._agents, killswitch=self._killswitch), server
        )
        system_pb2_grpc.add_SystemServiceServicer_to_server(
            SystemService(
                instance=self._config.instance,
                state_dir=self._config.state_dir,
                started_at_ns=time.time_ns(),
                sinks=tuple,
                health=self._health,
            ),
            server,
        )

    def _health(self) -> dict[str, tuple[bool, str]]:
        return {
            "records": (False, f"kill-only mode: {self._cause}"),
            "launcher": (self._launcher.connected, "" if self._launcher.connected else "is being reached"),
        }

    async def stop(self, *, ending: bool) -> None:
        """Let everything go; `ending` where the daemon ends, and not where it starts in full."""
        self._stopping = True
        await self._api.announce_end()
        if ending and self._config.agents.on_stop is OnStop.KILL:
            await self._killswitch.kill(self._agents.live(), actor="daemon", reason="the daemon stops")
        await self._api.close(STOP_SECONDS)
        for task in self._tasks:
            task.cancel()
        self._launcher.close()
        close_all(self._guard)
        for agent in self._agents.live():
            _let_go(agent)

    # --- what the kill switch needs of log and egress plane

    async def note(self, action: Action, *, durable: bool = False) -> None:  # noqa: ARG002 - as a log has it
        """Keep it for the log that is opened next."""
        self._owed.keep(action, cause=self._cause)

    async def cut(self, agent_id: str) -> None:
        """Shut the agent's listener; no worker runs that could have accepted anything."""
        agent = self._agents.get(agent_id)
        if agent is not None and agent.listener is not None:
            shut_listener(agent.listener)

    # --- the launcher

    async def _reach_launcher(self) -> None:
        await reach_launcher(
            self._launcher,
            self._config,
            managed=bool(os.environ.get("STOCKADE_LAUNCHER_MANAGED")),
            greet=self._greet,
        )

    async def _greet(self) -> None:
        # The guard of files that agents were given is held for a launcher that may come after this one (filegrants.py).
        reply = await self._launcher.call("hello", self._guard)
        if reply.fds:
            close_all(self._guard)
            self._guard = list(reply.fds)
        listed = reply.body.get("agents")
        for entry in listed if isinstance(listed, list) else ():
            if entry.get("state") in ("BUILDING", "BUILT"):
                self._half_built.add(str(entry["agent_id"]))
                await self._launcher.call("abort", agent_id=str(entry["agent_id"]))

    def _launcher_event(self, message: Message, fds: list[int]) -> None:
        agent_id, meta, status = str(message.get("agent_id")), message.get("meta"), message.get("status")
        agent = self._agents.get(agent_id)
        match message.get("ev"):
            case "adopt" if agent is None and agent_id not in self._half_built:
                take_up(self._agents, agent_id, meta if isinstance(meta, dict) else {}, fds)
                return
            case "exited" if agent is not None and agent.live:
                agent.exit = exit_of(status if isinstance(status, dict) else {})
                if can(agent.state, Event.EXITED):
                    self._agents.apply(agent, Event.EXITED)
                    if not agent.live:
                        _let_go(agent)
        close_all(fds)

    def _launcher_lost(self) -> None:
        if not self._stopping:
            task = asyncio.get_running_loop().create_task(self._reconnect())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _reconnect(self) -> None:
        while not self._stopping:
            await asyncio.sleep(RECONNECT_SECONDS)
            try:
                await self._reach_launcher()
            except (OSError, StockadeError) as error:
                log.error("no launcher", cause=str(error))
            else:
                return


class Refusing(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Answers every method that could not be recorded with the reason."""

    def __init__(self, cause: str, remedy: str) -> None:
        self._cause = cause
        self._remedy = remedy

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method
        if method in ALLOWED:
            return await continuation(handler_call_details)

        async def refuse(_request: object, _context: object) -> NoReturn:
            raise CannotRecord(
                f"cannot serve {method.rpartition('/')[2]}: the daemon can only kill now, since {self._cause}",
                remedy=f"{self._remedy}; the daemon then goes on by itself",
            )

        # Of one shape for all: a refusal needs no request and sends no message.
        return grpc.unary_unary_rpc_method_handler(refuse)


def _let_go(agent: Agent) -> None:
    close_all([fd for fd in (agent.pidfd, agent.listener) if fd is not None])
    agent.pidfd = agent.listener = None
