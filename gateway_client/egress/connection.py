"""One connection of an agent: what is open on it, how the daemon is asked about it, and how it is refused and cut."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from gateway_client.egress.answering import UpstreamError
from gateway_client.egress.answers import problem, response
from gateway_client.egress.decide import Reason, Refuse
from gateway_client.egress.exchange import BytesSpent, Event, GrantSpent
from gateway_client.egress.intake import Buffered, Intake
from gateway_client.egress.messages import CUT
from gateway_client.egress.request import EgressRequest
from gateway_client.egress.share import Share, metered
from gateway_client.egress.stream import Reset

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Coroutine

    from gateway_client.egress.exchange import Exchange
    from gateway_client.egress.leaves import Leaves
    from gateway_client.egress.messages import Configure, Verdict
    from gateway_client.egress.resolver import Resolver
    from gateway_client.egress.sealed import Sealed
    from gateway_client.egress.stream import Stream
    from gateway_client.egress.target import Authority
    from gateway_client.egress.upstream import GatewayAdapter, Identity
    from gateway_client.egress.wire import Head, Reject
    from gateway_client.gateways.prices import PriceTable

linger_bytes_max: Final = 1024 * 1024
linger_seconds_max: Final = 2.0
hung_up_seconds: Final = 1.0

Result = TypeVar("Result")


@dataclass(slots=True)
class Agent:
    """Whom a listener serves."""

    identity: Identity
    share: Share
    frozen: bool = False
    resolver: Resolver | None = None
    """None: its network is not transparent."""
    leaves: Leaves | None = None
    """None: its TLS cannot be looked into."""
    buffered: Buffered = field(default_factory=Buffered)
    connections: set[Connection] = field(default_factory=set)
    parsing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One body of an agent is taken apart at a time: parsed it is many times its size."""


class Desk(Protocol):
    """What a connection needs of the worker it lives in."""

    configuration: Configure
    adapter: GatewayAdapter
    prices: PriceTable
    tls: ssl.SSLContext
    """What gateways and hosts are verified with; it offers HTTP/1.1."""
    tls_http2: ssl.SSLContext
    """The same, offering HTTP/2 before it."""

    async def ask(self, agent_id: str, request: EgressRequest) -> tuple[Exchange, Verdict]: ...

    async def upstream(self, exchange: Exchange) -> Stream: ...

    def finish(self, exchange: Exchange, upstream: Stream | Sealed | None) -> None: ...

    def rejected(self, agent_id: str, reject: Reject) -> None: ...


class Refused(Exception):  # noqa: N818 - control flow
    """The worker answers with a refusal and closes."""

    def __init__(self, refusal: Refuse | Reject, *, request: str = "") -> None:
        super().__init__()
        self.refusal = refusal
        self.request = request


class Connection:
    """One accepted connection of an agent, and the exchange that is open on it."""

    def __init__(self, desk: Desk, agent: Agent, stream: Stream, *, meant: Authority | None = None) -> None:
        self.agent = agent
        self.stream: Stream | Sealed = stream
        self.exchange: Exchange | None = None
        self.upstream: Stream | Sealed | None = None
        self.bare = stream
        self.desk = desk
        self.limits = desk.configuration.limits
        self.intake = Intake(stream, self.limits, agent.buffered, agent.share)
        self.meant = meant
        """Where a connection of transparent mode was meant to go; None: it came to the proxy."""
        self.inside: Authority | None = None
        """Where the tunnel leads that is taken apart here."""
        self.nested = 0
        """How many tunnels are around the next request."""
        self._task: asyncio.Task[None] | None = None
        self.was_cut = False
        self._watching: asyncio.TimerHandle | None = None

    def start(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Do `work`, which is cancelled when the connection is lost or cut."""
        self._task = asyncio.get_running_loop().create_task(metered(work, self.agent.share))
        self.bare.on_lost = self._cancel
        return self._task

    def cut(self) -> None:
        """Reset both sides now."""
        self.was_cut = True
        self.stream.reset()
        if self.upstream is not None:
            self.upstream.reset()
        if self._task is not None:
            self._task.cancel()

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def freeze(self, *, frozen: bool) -> None:
        self.stream.freeze(frozen=frozen)
        if self.upstream is not None:
            self.upstream.freeze(frozen=frozen)

    @property
    def open_exchange(self) -> Exchange:
        if self.exchange is None:
            raise RuntimeError("cannot go on: no exchange is open")
        return self.exchange

    @contextlib.asynccontextmanager
    async def asked(self, request: EgressRequest, *, refusals: bool = True) -> AsyncIterator[Verdict]:
        """Ask; a refusal is answered at once, and however it ends the outcome is told exactly once.

        Without `refusals` the caller answers those too, in its own words.
        """
        watch = asyncio.get_running_loop().call_later(hung_up_seconds, self._watch)
        try:
            self.exchange, verdict = await self.desk.ask(self.agent.identity.agent_id, request)
        finally:
            watch.cancel()
            if self._watching is not None:
                self._watching.cancel()
                self._watching = None
        exchange = self.exchange
        try:
            if isinstance(verdict, Refuse) and refusals:
                exchange.status = verdict.status
                raise Refused(verdict, request=request.object)
            yield verdict
        except Refused as answer:
            exchange.status = answer.refusal.status
            raise
        except (Reset, TimeoutError, asyncio.CancelledError):
            exchange.error = exchange.error or (CUT if self.was_cut else "the connection ended early")
            raise
        finally:
            exchange.advance(Event.END)
            upstream, self.upstream, self.exchange = self.upstream, None, None
            self.desk.finish(exchange, upstream)

    def _watch(self) -> None:
        """End what a human is asked for by a client that has hung up: a FIN alone loses no connection.

        One that merely ends its half (shutdown(2)) looks the same: it has its answer within `hung_up_seconds`, or none.
        """
        if self.bare.ended:
            self.cut()
            return
        self._watching = asyncio.get_running_loop().call_later(hung_up_seconds, self._watch)

    async def connect(self, request: EgressRequest) -> Stream:
        """Have what was allowed connected to the gateway."""
        exchange = self.open_exchange
        exchange.advance(Event.ALLOWED)
        try:
            upstream = self.upstream = await self.desk.upstream(exchange)
        except (UpstreamError, TimeoutError) as error:
            exchange.error = str(error) or "the gateway could not be reached in time"
            raise Refused(Refuse(502, Reason.UPSTREAM_FAILED, exchange.error), request=request.object) from error
        exchange.advance(Event.CONNECTED)
        if self.agent.frozen:
            exchange.error = "the agent is frozen"  # since this was asked; nothing has been sent
            raise Refused(Refuse(503, Reason.FROZEN, exchange.error), request=request.object)
        return upstream

    async def upstream_step(self, step: Awaitable[Result]) -> Result:
        """Await a step on the way to a host; one that fails is answered as the gateway's failure."""
        try:
            return await step
        except (UpstreamError, Reset, TimeoutError) as error:
            detail = str(error) or "the gateway closed the connection"
            self.open_exchange.error = detail
            raise Refused(Refuse(502, Reason.UPSTREAM_FAILED, detail)) from error

    async def write(self, data: bytes) -> None:
        await self.stream.write(data, self.limits.body_seconds_max)

    async def refuse(self, refusal: Refuse | Reject, *, request: str = "") -> None:
        """Answer a refusal, then close: what is pipelined behind it is read and dropped, never served."""
        status, body = problem(refusal, request=request)
        with contextlib.suppress(Reset, TimeoutError):
            await self.write(
                response(status, body, content_type="application/problem+json", keep_alive=False, extra=_retry(status))
            )
            self.stream.end()
            # Closing with unread bytes would send RST, and the answer could be lost on its way.
            loop = asyncio.get_running_loop()
            deadline, dropped = loop.time() + linger_seconds_max, 0
            while dropped < linger_bytes_max and loop.time() < deadline:
                data = await self.stream.read(max(deadline - loop.time(), 0.001))
                if not data:
                    break
                dropped += len(data)


def request_of(head: Head, **more: object) -> EgressRequest:
    values: dict[str, object] = {"content_length": head.content_length, **more}
    return EgressRequest(
        form=head.form,
        method=head.method,
        scheme=head.scheme,
        host=head.authority.host,
        port=head.authority.port,
        path=head.path,
        has_query=bool(head.query),
        **values,  # type: ignore[arg-type]
    )


def keeps(head: Head) -> bool:
    """Whether the connection is to go on after the answer."""
    said = b",".join(value for name, value in head.headers if name in (b"connection", b"proxy-connection")).lower()
    return head.http11 and b"close" not in said


def _retry(status: int) -> str:
    return "Retry-After: 1\r\n" if status == 503 else ""  # noqa: PLR2004 - Service Unavailable


def spent(error: BytesSpent) -> Refuse:
    if isinstance(error, GrantSpent):
        return Refuse(403, Reason.GRANT_USED_UP, str(error))
    return Refuse(429, Reason.BUDGET_EXHAUSTED, str(error))


def not_possible() -> Refuse:
    return Refuse(503, Reason.DAEMON_GONE, "the answer of the daemon does not fit the request")
