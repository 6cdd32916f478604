"""The worker's state: which listener is whose, what was asked, which sockets came. It decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import errno
import logging
import os
import resource
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Final, assert_never

from gateway_client.egress import flow, messages
from gateway_client.egress.allowance import Allowance, Loan, Moved
from gateway_client.egress.answering import UpstreamError
from gateway_client.egress.answers import problem, response
from gateway_client.egress.codec import BadFrame
from gateway_client.egress.connection import Agent, Connection
from gateway_client.egress.decide import BUDGET_SPENT, Allow, Reason, Refuse
from gateway_client.egress.exchange import Exchange
from gateway_client.egress.leaves import Leaves
from gateway_client.egress.link import Link
from gateway_client.egress.names import MADE_UP, NAMES_PORT
from gateway_client.egress.resolver import Resolver
from gateway_client.egress.share import Share, Thread, metered
from gateway_client.egress.stream import Stream
from gateway_client.egress.target import Authority
from gateway_client.egress.upstream import Identity
from gateway_client.egress.wire import Reject

if TYPE_CHECKING:
    import ssl
    from collections.abc import Coroutine, Mapping

    from gateway_client.egress.request import EgressRequest
    from gateway_client.egress.sealed import Sealed
    from gateway_client.egress.upstream import GatewayAdapter
    from gateway_client.gateways.prices import PriceTable

_log: Final = logging.getLogger(__name__)

accepts_per_turn_max: Final = 64
rejected_seconds_min: Final = 1.0
accept_pause_seconds: Final = 0.1
descriptors_reserved: Final = 32
"""For channels, listeners of new agents and what is on its way."""
descriptors_per_connection: Final = 2
connections_per_agent_min: Final = 4

# accept(2): these say that the socket is no listener any more. All others pass, or are of one connection.
_LISTENER_OVER: Final = frozenset({errno.EINVAL, errno.EBADF, errno.ENOTSOCK, errno.EOPNOTSUPP})


@dataclass(frozen=True, slots=True)
class Door:
    """Where an agent's connections come in: its proxy's port, or one of a transparent network's."""

    agent_id: str
    port: int = 0


class Worker:
    """Serves listeners and speaks with daemon and dialer; everything happens on one event loop."""

    def __init__(
        self,
        daemon: socket.socket,
        dialer: socket.socket,
        *,
        tls: ssl.SSLContext,
        tls_http2: ssl.SSLContext,
        adapters: Mapping[str, GatewayAdapter],
        prices: PriceTable,
        descriptors_max: int,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.tls = tls
        self.tls_http2 = tls_http2
        self._adapters = adapters
        self.prices = prices
        self.adapter: GatewayAdapter = next(iter(adapters.values()))
        self.configuration = messages.Configure(gateway="", host="")
        self._agents: dict[str, Agent] = {}
        self._listeners: dict[Door, socket.socket] = {}
        self._exchanges: dict[int, Exchange] = {}
        self._answers: dict[int, asyncio.Future[messages.Verdict]] = {}
        self._upstreams: dict[int, asyncio.Future[int] | None] = {}
        """The descriptor each exchange waits for; None once it is taken."""
        self._connections: dict[int, Connection] = {}
        self._rejects: dict[str, tuple[float, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._allowances: dict[tuple[str, str], Allowance] = {}
        self._loans: dict[str, Loan] = {}
        self._open_of: dict[str, int] = {}
        """How many exchanges of each agent are open."""
        self._next_x = 1
        self._thread = Thread()
        self._descriptors_max = min(descriptors_max, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        self.over = asyncio.Event()
        """Set when there is nothing left to do: the daemon is gone, and so is every agent it was to be answered for."""
        self._daemon = Link(self._loop, daemon, on_frame=self._from_daemon, on_gone=self._daemon_gone)
        self._dialer = Link(self._loop, dialer, on_frame=self._from_dialer, on_gone=self._dialer_gone)

    def ready(self, posture: tuple[str, ...]) -> None:
        self._tell(messages.Ready(pid=os.getpid(), uid=os.getuid(), posture=posture))

    # --- channels

    def _tell(self, message: messages.FromWorkerToDaemon) -> None:
        self._daemon.send(messages.encode(message))

    def _from_daemon(self, frame: bytes, fds: list[int]) -> None:
        try:
            message: messages.FromDaemonToWorker = messages.decode(frame, messages.FROM_DAEMON_TO_WORKER)
        except BadFrame as error:
            # A daemon of another version: going on would be guessing.
            self._daemon.close()
            _log.error("%s", error)
        else:
            if isinstance(message, messages.Listen):
                if fds:
                    self._listen(message, fds.pop(0))
                else:
                    _log.error("cannot listen for %s: its socket did not come", message.agent_id)
            elif isinstance(message, messages.Gate) and fds:
                self._gate(message, fds.pop(0))
            self._obey(message)
        for fd in fds:
            os.close(fd)

    def _obey(self, message: messages.FromDaemonToWorker) -> None:
        match message:
            case messages.Listen() | messages.Gate():
                pass
            case messages.Configure():
                self.configuration = message
                self.adapter = self._adapters.get(message.gateway, self.adapter)
            case messages.Unlisten():
                self._unlisten(message.agent_id)
            case messages.Answer():
                waiter = self._answers.get(message.x)
                if waiter is not None and not waiter.done():
                    waiter.set_result(message.verdict)
            case messages.Lend():
                self._lend(message)
            case messages.Cut():
                self._cut(message)
            case messages.Freeze():
                self._freeze(message.agent_id, frozen=True)
            case messages.Thaw():
                self._freeze(message.agent_id, frozen=False)
            case _:
                assert_never(message)

    def _lend(self, message: messages.Lend) -> None:
        loan = self._loan(message.agent_id)
        loan.lend(message.count, last=message.last)
        if message.agent_id not in self._open_of:  # it ended while this was on its way
            self._end_loan(message.agent_id)

    def _loan(self, agent_id: str) -> Loan:
        """Give what counts the bytes of an agent; anew where the one before is used up."""
        loan = self._loans.get(agent_id)
        if loan is None or loan.spent:

            def tell(moved: Moved) -> None:
                self._tell(messages.Moved(agent_id, moved.used, moved.back, moved.want))

            self._loans[agent_id] = loan = Loan(tell, self._cut_loan)
        return loan

    def _end_loan(self, agent_id: str) -> None:
        loan = self._loans.pop(agent_id, None)
        if loan is not None:
            loan.end()

    def _cut_loan(self, loan: Loan) -> None:
        """Reset whatever is open on a budget that is used up; what waits for bytes of it ends by itself."""
        for agent in self._agents.values():
            for connection in list(agent.connections):
                exchange = connection.exchange
                if exchange is not None and exchange.loan is loan and not exchange.waiting:
                    exchange.error = BUDGET_SPENT
                    connection.cut()

    def _daemon_gone(self) -> None:
        """Nothing can be recorded any more: cut what is open, and answer 503 from here on."""
        for waiter in self._answers.values():
            if not waiter.done():
                waiter.set_result(_daemon_gone())
        for agent in self._agents.values():
            for connection in list(agent.connections):
                if connection.upstream is not None:
                    connection.cut()
        self._end_if_alone()

    def _end_if_alone(self) -> None:
        if self._daemon.gone and not self._listeners:
            self.over.set()

    def _from_dialer(self, frame: bytes, fds: list[int]) -> None:
        try:
            message: messages.FromDialerToWorker = messages.decode(frame, messages.FROM_DIALER_TO_WORKER)
        except BadFrame as error:
            self._dialer.close()
            _log.error("%s", error)
            return
        waiter = self._upstreams.get(message.x)
        if isinstance(message, messages.UpstreamFailed):
            if waiter is not None and not waiter.done():
                waiter.set_exception(UpstreamError(message.error))
        elif waiter is not None and not waiter.done() and fds:
            waiter.set_result(fds.pop(0))
        elif waiter is not None and not waiter.done():
            waiter.set_exception(UpstreamError("the proxy has too many connections open"))
        else:
            self._dialer.send(messages.encode(messages.Done(message.x)))
        for fd in fds:
            os.close(fd)

    def _dialer_gone(self) -> None:
        for waiter in self._upstreams.values():
            if waiter is not None and not waiter.done():
                waiter.set_exception(UpstreamError("the dialer is gone"))

    # --- agents

    def _listen(self, message: messages.Listen, fd: int) -> None:
        self._unlisten(message.agent_id)
        listener = socket.socket(fileno=fd)
        listener.setblocking(False)
        identity = Identity(agent_id=message.agent_id, name=message.name, labels=message.labels)
        authority = message.authority
        leaves = None if authority is None else Leaves(authority, now=_utc_now)
        self._agents[message.agent_id] = Agent(identity, Share(self._loop, self._thread), leaves=leaves)
        self._listen_at(Door(message.agent_id), listener)

    def _listen_at(self, door: Door, listener: socket.socket) -> None:
        self._listeners[door] = listener
        self._loop.add_reader(listener.fileno(), self._accept, door, listener)

    def _gate(self, message: messages.Gate, fd: int) -> None:
        """Serve a socket of a transparent network; one of an agent that has gone meanwhile is closed."""
        endpoint = socket.socket(fileno=fd)
        agent = self._agents.get(message.agent_id)
        door = Door(message.agent_id, message.port)
        if agent is None or (agent.resolver is not None if not message.port else door in self._listeners):
            endpoint.close()
        elif message.port:
            endpoint.setblocking(False)
            self._listen_at(door, endpoint)
        else:
            agent.resolver = Resolver(self, agent, endpoint)

    def _unlisten(self, agent_id: str) -> None:
        for door in [door for door in self._listeners if door.agent_id == agent_id]:
            self._close_listener(door)
        agent = self._agents.pop(agent_id, None)
        self._rejects.pop(agent_id, None)
        for key in [key for key in self._allowances if key[0] == agent_id]:
            del self._allowances[key]
        if agent is not None:
            if agent.resolver is not None:
                agent.resolver.close()
            for connection in list(agent.connections):
                connection.cut()

    def _close_listener(self, door: Door) -> None:
        listener = self._listeners.pop(door, None)
        if listener is not None:
            self._loop.remove_reader(listener.fileno())
            listener.close()
        self._end_if_alone()

    def _accept(self, door: Door, listener: socket.socket) -> None:
        for _ in range(accepts_per_turn_max):
            try:
                accepted, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in _LISTENER_OVER:
                    # Launcher or dialer shut the listener down. Left in the loop it would be readable for ever.
                    self._close_listener(door)
                else:
                    self._pause(door, listener, error)
                return
            agent = self._agents.get(door.agent_id)
            if agent is not None and door.port == NAMES_PORT and not _made_up(accepted):
                if self._full(agent) or agent.resolver is None or not agent.resolver.serve(accepted):
                    _reset(accepted)
                continue
            if agent is None or self._full(agent):
                _turn_away(accepted)
                continue
            meant = self._meant(agent, accepted) if door.port else None
            if door.port and meant is None:
                accepted.close()
                continue
            # Counted here, not in the task: a burst is accepted before any task runs.
            connection = Connection(self, agent, Stream(), meant=meant)
            agent.connections.add(connection)
            self._spawn(metered(self._adopt(agent, connection, accepted), agent.share))

    def _meant(self, agent: Agent, accepted: socket.socket) -> Authority | None:
        """Tell where a connection to a made-up address was meant to go; None where no name has that address."""
        address, port = accepted.getsockname()
        name = None if agent.resolver is None else agent.resolver.names.name(address)
        if name is None:
            self.rejected(
                agent.identity.agent_id, Reject(403, "address_unknown", "the address stands for no name that was told")
            )
            return None
        return Authority(name, port)

    def _full(self, agent: Agent) -> bool:
        lines = 0 if agent.resolver is None else agent.resolver.lines
        return len(agent.connections) + lines >= self._connections_max()

    def _connections_max(self) -> int:
        """Give how many connections one agent may have: no agent gets at what the others need of the descriptors."""
        free = self._descriptors_max - descriptors_reserved - len(self._listeners)
        fair = free // (descriptors_per_connection * max(len(self._agents), 1))
        return min(self.configuration.limits.connections_per_agent_max, max(fair, connections_per_agent_min))

    def _pause(self, door: Door, listener: socket.socket, error: OSError) -> None:
        """Look away from a listener for a moment: it stays readable, and accepting fails until something is closed."""
        _log.warning("cannot accept for %s: %s", door.agent_id, error.strerror)
        self._loop.remove_reader(listener.fileno())
        self._loop.call_later(accept_pause_seconds, self._resume, door, listener)

    def _resume(self, door: Door, listener: socket.socket) -> None:
        if self._listeners.get(door) is listener:
            self._loop.add_reader(listener.fileno(), self._accept, door, listener)

    async def _adopt(self, agent: Agent, connection: Connection, accepted: socket.socket) -> None:
        stream = connection.bare
        accepted.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(lambda: stream, accepted)
            await connection.start(flow.run(connection))
        except (OSError, asyncio.CancelledError):
            stream.close()
        except Exception:  # noqa: BLE001 - whatever it is, the other agents are not to feel it
            # A fault of ours on one connection ends that connection, and is said.
            _log.exception("cannot serve connection")
            stream.reset()
        finally:
            agent.connections.discard(connection)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _cut(self, message: messages.Cut) -> None:
        agent = self._agents.get(message.agent_id)
        if agent is not None:
            for connection in list(agent.connections):
                connection.cut()
            if agent.resolver is not None:
                agent.resolver.cut()
        wanted = set(message.xs)
        if wanted:
            for each in self._agents.values():
                for connection in list(each.connections):
                    if connection.exchange is not None and connection.exchange.x in wanted:
                        connection.cut()

    def _freeze(self, agent_id: str, *, frozen: bool) -> None:
        agent = self._agents.get(agent_id)
        if agent is not None:
            agent.frozen = frozen
            for connection in agent.connections:
                connection.freeze(frozen=frozen)
            if agent.resolver is not None:
                agent.resolver.freeze(frozen=frozen)

    # --- what a connection asks of its worker

    async def ask(self, agent_id: str, request: EgressRequest) -> tuple[Exchange, messages.Verdict]:
        """Ask the daemon; the verdict is a 503 where it is gone, silent, or asked too much."""
        x, self._next_x = self._next_x, self._next_x + 1
        exchange = Exchange(x=x, agent_id=agent_id, started=self._loop.time())
        limits = self.configuration.limits
        if self._daemon.gone:
            return exchange, _daemon_gone()
        if len(self._exchanges) >= limits.exchanges_per_worker_max:
            return exchange, Refuse(503, Reason.LIMIT, "the proxy serves too many requests now")
        waiter: asyncio.Future[messages.Verdict] = self._loop.create_future()
        self._exchanges[x] = exchange
        self._open_of[agent_id] = self._open_of.get(agent_id, 0) + 1
        self._answers[x] = waiter
        self._upstreams[x] = self._loop.create_future()
        self._tell(messages.Ask(x=x, agent_id=agent_id, request=request))
        timer = self._loop.call_later(limits.answer_seconds_max, _give_up, waiter)
        try:
            verdict = await waiter
        except asyncio.CancelledError:
            exchange.error = "the connection ended before the answer"
            self.finish(exchange, None)
            raise
        finally:
            timer.cancel()
            self._answers.pop(x, None)
        if isinstance(verdict, Allow) and verdict.bytes_left is not None:
            # Counted on from what it was when this worker first heard of it: the daemon hears of bytes afterwards.
            key = (agent_id, verdict.grant_id)
            exchange.allowance = self._allowances.setdefault(key, Allowance(verdict.bytes_left))
        if isinstance(verdict, Allow) and verdict.lent:
            exchange.loan = self._loan(agent_id)
        return exchange, verdict

    async def upstream(self, exchange: Exchange) -> Stream:
        """Give the socket that the dialer passes for an exchange; raise UpstreamError or TimeoutError."""
        if self._dialer.gone:
            raise UpstreamError("the dialer is gone")
        async with asyncio.timeout(self.configuration.limits.dial_seconds_max):
            waiter = self._upstreams[exchange.x]
            if waiter is None:
                raise UpstreamError("the socket was taken already")
            fd = await waiter
        self._upstreams[exchange.x] = None
        endpoint = socket.socket(fileno=fd)
        endpoint.setblocking(False)
        stream = Stream()
        if endpoint.family == socket.AF_UNIX:
            await self._loop.create_unix_connection(lambda: stream, sock=endpoint)
            return stream
        name = self.configuration.tls_server_name
        try:
            await self._loop.create_connection(
                lambda: stream, sock=endpoint, ssl=self.tls if name else None, server_hostname=name
            )
        except OSError as error:
            endpoint.close()
            raise UpstreamError(
                f"cannot speak TLS with the gateway: {error.strerror or type(error).__name__}"
            ) from error
        return stream

    def finish(self, exchange: Exchange, upstream: Stream | Sealed | None) -> None:
        """Close the upstream side, let the dialer drop its duplicate, tell the daemon the outcome."""
        if upstream is not None:
            if exchange.error:
                upstream.reset()
            else:
                upstream.close()
        if exchange.x in self._upstreams:
            waiter = self._upstreams.pop(exchange.x)
            if waiter is None or waiter.done():
                self._dialer.send(messages.encode(messages.Done(exchange.x)))
            if waiter is not None and not waiter.cancel() and not waiter.cancelled() and waiter.exception() is None:
                os.close(waiter.result())  # it came, and nobody was there to take it
        if self._exchanges.pop(exchange.x, None) is not None:
            left = self._open_of[exchange.agent_id] - 1
            if left:
                self._open_of[exchange.agent_id] = left
            else:
                del self._open_of[exchange.agent_id]
                self._end_loan(exchange.agent_id)
            self._tell(exchange.outcome(now=self._loop.time()))

    def rejected(self, agent_id: str, reject: Reject) -> None:
        """Tell the daemon of malformed input, at most once a second for an agent."""
        now = self._loop.time()
        last, count = self._rejects.get(agent_id, (-rejected_seconds_min, 0))
        count += 1
        if now - last < rejected_seconds_min:
            self._rejects[agent_id] = (last, count)
            return
        self._rejects[agent_id] = (now, 0)
        self._tell(
            messages.Rejected(
                agent_id=agent_id,
                status=reject.status,
                reason_code=reject.reason_code,
                detail=reject.detail,
                count=count,
            )
        )


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _give_up(waiter: asyncio.Future[messages.Verdict]) -> None:
    if not waiter.done():
        waiter.set_result(Refuse(503, Reason.DAEMON_GONE, "the daemon did not answer in time"))


def _daemon_gone() -> Refuse:
    return Refuse(503, Reason.DAEMON_GONE, "the daemon is not there to record it, so nothing may leave")


def _made_up(accepted: socket.socket) -> bool:
    """Tell whether a connection was made to an address that stands for a name, and not to the gate's own."""
    return IPv4Address(accepted.getsockname()[0]) in MADE_UP


def _reset(accepted: socket.socket) -> None:
    """Close a connection so that nothing of it is left to wait for."""
    with accepted, contextlib.suppress(OSError):
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _turn_away(accepted: socket.socket) -> None:
    status, body = problem(Refuse(503, Reason.LIMIT, "the agent has too many connections open"))
    with accepted:
        accepted.setblocking(False)
        with contextlib.suppress(OSError):
            accepted.recv(64 * 1024)  # what is unread at close turns the answer into a reset
        try:
            accepted.send(response(status, body, content_type="application/problem+json", keep_alive=False))
        except OSError:
            return
