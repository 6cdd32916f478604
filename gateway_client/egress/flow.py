"""What happens on one connection of an agent: read a head, ask, do what the answer says, and again."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, assert_never

from gateway_client.egress import mcp, mcpcall, websocket
from gateway_client.egress.answering import Answering, UpstreamError
from gateway_client.egress.answers import problem, response
from gateway_client.egress.bodyjson import Scales
from gateway_client.egress.decide import Allow, Reason, Refuse, Reply, Upstream, output_reserved
from gateway_client.egress.exchange import BytesSpent, Event, GrantSpent
from gateway_client.egress.intake import Buffered, Intake
from gateway_client.egress.messages import ForwardMode, HttpVersion
from gateway_client.egress.modelapi import BadCall, Call, Endpoint, check_type, endpoint, reading
from gateway_client.egress.passing import Passing, Switched, open_through_proxy, read_status
from gateway_client.egress.passing_http2 import PassingHttp2
from gateway_client.egress.request import EgressRequest, Form
from gateway_client.egress.sealed import Sealed
from gateway_client.egress.share import Share, metered
from gateway_client.egress.stream import Reset
from gateway_client.egress.terminate import ANY_HTTP, ONLY_HTTP11, open_inside, seal
from gateway_client.egress.tunnel import client_hello, relay
from gateway_client.egress.upstream import GatewayAdapter, Identity, forward_head, model_head
from gateway_client.egress.wire import Head, Reject, WireError
from gateway_client.gateways.usage import UsageMeter

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable

    from gateway_client.egress.exchange import Exchange
    from gateway_client.egress.leaves import Leaves
    from gateway_client.egress.messages import Configure, Usage, Verdict
    from gateway_client.egress.resolver import Resolver
    from gateway_client.egress.stream import Stream
    from gateway_client.egress.target import Authority
    from gateway_client.egress.wire import Headers
    from gateway_client.gateways.prices import PriceTable

self_body_bytes_max: Final = 4 * 1024
connects_nested_max: Final = 2
linger_bytes_max: Final = 1024 * 1024
linger_seconds_max: Final = 2.0
hung_up_seconds: Final = 1.0

Result = TypeVar("Result")

_TLS: Final = b"\x16"  # the type of a handshake record (RFC 8446 section 5.1)
_ACCESS_DENIED: Final = b"\x15\x03\x03\x00\x02\x02\x31"
"""A fatal alert of TLS: a valid request that access control does not let pass (RFC 8446 section 6.2)."""
_OPENED: Final = b"HTTP/1.1 200 Connection established\r\n\r\n"


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


class _Answered(Exception):  # noqa: N818 - control flow inside this module
    """The worker answers with a refusal and closes."""

    def __init__(self, refusal: Refuse | Reject, *, request: str = "") -> None:
        super().__init__()
        self.refusal = refusal
        self.request = request


class Connection:
    """One accepted connection; `run` ends when it is closed."""

    def __init__(self, desk: Desk, agent: Agent, stream: Stream, *, meant: Authority | None = None) -> None:
        self.agent = agent
        self.stream: Stream | Sealed = stream
        self.exchange: Exchange | None = None
        self.upstream: Stream | Sealed | None = None
        self.bare = stream
        self._desk = desk
        self._limits = desk.configuration.limits
        self._intake = Intake(stream, self._limits, agent.buffered, agent.share)
        self._meant = meant
        """Where a connection of transparent mode was meant to go; None: it came to the proxy."""
        self._inside: Authority | None = None
        self._nested = 0
        self._task: asyncio.Task[None] | None = None
        self._was_cut = False
        self._watching: asyncio.TimerHandle | None = None

    def start(self) -> asyncio.Task[None]:
        self._task = asyncio.get_running_loop().create_task(metered(self.run(), self.agent.share))
        self.bare.on_lost = self._cancel
        return self._task

    def cut(self) -> None:
        """Reset both sides now."""
        self._was_cut = True
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

    async def run(self) -> None:
        if self._was_cut:  # before it was open
            self.stream.reset()
            return
        try:
            if self._meant is not None and not await self._begin_at(self._meant):
                return
            while (head := await self._intake.next_head()) is not None:
                keep = await self._serve(head)
                self._intake.release()
                if not keep:
                    break
        except WireError as error:
            self._desk.rejected(self.agent.identity.agent_id, error.reject)
            await self._refuse(error.reject)
        except _Answered as answer:
            await self._refuse(answer.refusal, request=answer.request)
        except (Reset, TimeoutError):
            pass
        finally:
            self._intake.release()
            self.stream.close()

    async def _begin_at(self, meant: Authority) -> bool:
        """Begin a connection that was not made to the proxy: TLS as if by CONNECT, plain HTTP as if inside of one.

        Gives whether requests are to be read from it.
        """
        first = await self.bare.read(self._limits.head_seconds_max)
        self.bare.unread(first)
        self._nested = connects_nested_max
        if not first.startswith(_TLS):
            self._inside = meant
            self._intake.enter(meant)
            return bool(first)
        if self.agent.frozen:
            self.stream.reset()
            return False
        request = EgressRequest(Form.CONNECT, "CONNECT", "tls", meant.host, meant.port, "")
        try:
            async with self._asked(request) as verdict:
                if isinstance(verdict, Allow) and verdict.upstream is Upstream.TUNNEL:
                    await self._tunnel(meant, request, opened=b"")
                    return False
        except _Answered:  # in HTTP, which nobody would read there
            await self._write(_ACCESS_DENIED)
            return False
        if not isinstance(verdict, Allow) or verdict.upstream is not Upstream.TERMINATE or self.agent.leaves is None:
            await self._write(_ACCESS_DENIED)
            return False
        return await self._go_inside_tls(meant, opened=b"")

    # --- serving

    async def _serve(self, head: Head) -> bool:
        """Serve one request; give whether the connection goes on."""
        if self.agent.frozen:
            raise _Answered(Refuse(503, Reason.FROZEN, "the agent is frozen"))
        match head.form:
            case Form.SELF:
                return await self._serve_self(head)
            case Form.MODEL:
                return await self._serve_model(head)
            case Form.MCP:
                return await self._serve_mcp_server(head)
            case Form.FORWARD:
                return await self._serve_forward(head)
            case Form.CONNECT:
                return await self._serve_connect(head)
            case Form.NAME:
                raise RuntimeError("no head is a look-up")
            case _:
                assert_never(head.form)

    async def _serve_self(self, head: Head) -> bool:
        if head.path == mcp.MCP_PATH:
            return await self._serve_mcp(head)
        body = await self._intake.whole_body(head, self_body_bytes_max)
        try:
            text = body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise WireError(Reject(400, "body_malformed", "the body is no UTF-8")) from error
        request = _request(head, query=head.query, body=text, content_length=len(body))
        async with self._asked(request) as verdict:
            if not isinstance(verdict, Reply):
                raise _Answered(_not_possible())
            keep = _keeps(head)
            await self._write(
                response(
                    verdict.status,
                    json.dumps(verdict.body).encode(),
                    content_type="application/json",
                    keep_alive=keep,
                    head_only=head.method == "HEAD",
                )
            )
            if self.exchange is not None:
                self.exchange.status = verdict.status
            return keep

    async def _serve_mcp(self, head: Head) -> bool:
        """Serve one message of the Model Context Protocol: only a tool call is asked about, as what it stands for."""
        if head.method != "POST":  # no stream from here, and no session to end
            raise _Answered(Refuse(405, Reason.SELF_UNKNOWN, "POST one JSON-RPC message"))
        body = await self._intake.whole_body(head, mcp.message_bytes_max)
        read = mcp.read(body, version=_header(head, b"mcp-protocol-version"), origin=_header(head, b"origin"))
        if isinstance(read, mcp.Answered):
            return await self._answer_mcp(head, read)
        request = replace(
            _request(head), method=read.method, path=read.path, query=read.query, body=read.body, has_query=False
        )
        async with self._asked(request, refusals=False) as verdict:
            if isinstance(verdict, Allow):
                raise _Answered(_not_possible())
            answered = read.answer(verdict)
            self._open_exchange.status = verdict.status
            return await self._answer_mcp(head, answered)

    async def _answer_mcp(self, head: Head, answered: mcp.Answered) -> bool:
        keep = _keeps(head)
        await self._write(response(answered.status, answered.body, content_type="application/json", keep_alive=keep))
        return keep

    async def _serve_model(self, head: Head) -> bool:
        where = endpoint(head.method, head.path)
        call = Call(model=where.model if where else "", stream=False, max_tokens=None, body=b"")
        if where is not None and head.method == "POST":
            call = await self._read_call(head, where)
        elif where is not None and head.has_body:
            raise WireError(Reject(400, "body_refused", f"{head.method} has no body here"))
        request = _request(
            head,
            dialect=where.dialect if where else None,
            model=call.model,
            stream=call.stream,
            max_tokens=call.max_tokens,
            choices=call.choices,
            input_tokens=call.input_tokens,
            dropped=call.dropped,
            content_length=len(call.body) if where else head.content_length,
        )
        async with self._asked(request) as verdict:
            if not isinstance(verdict, Allow) or where is None:
                raise _Answered(_not_possible())
            upstream = await self._connect(request)
            return await self._pass_model(head, where, call, upstream)

    async def _read_call(self, head: Head, where: Endpoint) -> Call:
        try:
            check_type(head.headers)
            body = await self._intake.whole_body(head, self._limits.model_body_bytes_max, scales=Scales())
            async with self.agent.parsing:
                steps = reading(where, body)
                while True:
                    try:
                        next(steps)
                    except StopIteration as end:
                        call: Call = end.value
                        return call
                    await asyncio.sleep(0)
        except BadCall as error:
            raise WireError(Reject(error.status, error.reason, str(error))) from error

    async def _pass_model(self, head: Head, where: Endpoint, call: Call, upstream: Stream) -> bool:
        desk, exchange = self._desk, self._open_exchange
        configuration, adapter = desk.configuration, desk.adapter
        target, headers = model_head(
            head, where, body=call.body, adapter=adapter, identity=self.agent.identity, configuration=configuration
        )
        meter = UsageMeter(
            where.dialect, call.stream, model=call.model, request_bytes=len(call.body), prices=desk.prices
        )
        reported: list[Usage | None] = [None]

        def on_headers(status: int, returned: Headers) -> None:
            if status < 400:  # noqa: PLR2004 - an error used nothing, if it does not say otherwise
                meter.output_at_least = output_reserved(call.max_tokens, call.choices)
            texts = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in returned]
            reported[0] = adapter.usage_from(texts)
            exchange.guardrails = adapter.guardrails_from(texts)

        answer = self._answering(head, configuration.credential, on_headers=on_headers, on_body=meter.feed)
        try:
            return await self._pass(answer, self._passing(answer, head, upstream), target, headers, call.body)
        finally:
            said = reported[0]
            # Of an answer that was cut nobody knows what it used: the budget keeps all that was set aside for it.
            if answer.whole or meter.ended:
                exchange.usage = meter.result(
                    cost_usd=said.cost_usd if said else None, cost_estimated=said.estimated if said else False
                )

    async def _serve_mcp_server(self, head: Head) -> bool:
        server, message = mcpcall.server_of(head.path), None
        if server is None or head.query or head.method not in ("GET", "POST", "DELETE"):
            raise WireError(Reject(400, "mcp_malformed", "a server is reached with GET, POST or DELETE of /mcp/SERVER"))
        if head.method == "POST":
            try:
                check_type(head.headers)
                body = await self._intake.whole_body(head, mcpcall.mcp_body_bytes_max, scales=Scales())
                async with self.agent.parsing:
                    message = mcpcall.read_message(body)
            except BadCall as error:
                raise WireError(Reject(error.status, error.reason, str(error))) from error
        elif head.has_body:
            raise WireError(Reject(400, "body_refused", f"{head.method} has no body here"))
        content = message.body if message is not None else b""
        request = _request(
            head,
            server=server,
            rpc_method=message.method if message is not None else "",
            tool=message.name if message is not None else "",
            content_length=len(content),
        )
        async with self._asked(request) as verdict:
            if not isinstance(verdict, Allow):
                raise _Answered(_not_possible())
            upstream = await self._connect(request)
            headers = [(b"host", b"gateway.internal"), *mcpcall.outgoing(head.headers, message)]
            if message is not None:
                headers.append((b"content-length", b"%d" % len(content)))
            headers.append((b"connection", b"close"))
            answer = self._answering(head, on_headers=_nothing)
            passing = self._passing(answer, head, upstream)
            return await self._pass(answer, passing, head.path.encode("ascii"), headers, content)

    async def _serve_forward(self, head: Head) -> bool:
        body = await self._intake.checked_body(head)
        async with self._asked(_request(head)) as verdict:
            if not isinstance(verdict, Allow):
                raise _Answered(_not_possible())
            bare, secure = await self._connect(_request(head)), head.scheme == "https"
            mode = self._desk.configuration.forward_mode
            if secure or mode is ForwardMode.PREFACE:
                await self._open_way(bare, head.authority)
            upstream = await self._seal(bare, head) if secure else bare
            if head.expects_continue and head.content_length is not None:
                self._intake.tell_to_go_on()
            target, headers = forward_head(head, absolute=mode is ForwardMode.PROXY and not secure)
            answer = self._answering(head)
            try:
                return await self._pass(answer, self._passing(answer, head, upstream), target, headers, body)
            except Switched as switched:
                await self._relay_websocket(head, upstream, switched.headers)
                return False

    def _answering(
        self,
        head: Head,
        credential: str = "",
        *,
        on_headers: Callable[[int, Headers], None] | None = None,
        on_body: Callable[[bytes], None] | None = None,
    ) -> Answering:
        return Answering(
            self.stream,
            self._open_exchange,
            self._limits,
            method=head.method,
            http11=head.http11,
            keep_alive=_keeps(head) and not head.upgrade,
            credential=credential,
            on_headers=on_headers,
            on_body=on_body,
        )

    def _passing(self, answer: Answering, head: Head, upstream: Stream | Sealed) -> Passing | PassingHttp2:
        exchange, limits, share = self._open_exchange, self._limits, self.agent.share
        if exchange.protocol is HttpVersion.HTTP2 and isinstance(upstream, Sealed):
            return PassingHttp2(answer, upstream, exchange, limits, share, method=head.method)
        return Passing(answer, upstream, exchange, limits, share, method=head.method)

    async def _pass(
        self,
        answer: Answering,
        passing: Passing | PassingHttp2,
        target: bytes,
        headers: list[tuple[bytes, bytes]],
        body: bytes | AsyncIterator[bytes],
    ) -> bool:
        try:
            return await passing.run(target, headers, body)
        except (UpstreamError, BytesSpent, Reset) as error:
            exchange = self._open_exchange
            exchange.error = str(error) or "the connection was reset"
            if answer.started or self.stream.lost:
                self.stream.reset()  # a cut answer must not look like a whole one
                raise Reset from error
            if isinstance(error, BytesSpent):
                raise _Answered(_spent(error)) from error
            raise _Answered(Refuse(502, Reason.UPSTREAM_FAILED, exchange.error)) from error
        except WireError as error:  # the rest of a long body was malformed: what was begun upstream is cut off
            if self.upstream is not None:
                self.upstream.reset()
            if answer.started:
                self.stream.reset()
                raise Reset from error
            raise

    # --- CONNECT

    async def _serve_connect(self, head: Head) -> bool:
        if self._nested >= connects_nested_max or (self._inside is not None and not self._inside.is_own):
            raise WireError(Reject(400, "connect_nested", "there is no CONNECT inside this tunnel"))
        if head.authority.is_own:
            return await self._go_inside(head.authority)
        request = _request(head)
        async with self._asked(request) as verdict:
            if not isinstance(verdict, Allow):
                raise _Answered(_not_possible())
            if verdict.upstream.opens:
                await self._tunnel(head.authority, request)
                return False
        if verdict.upstream is Upstream.TERMINATE:
            return await self._go_inside_tls(head.authority)
        return await self._go_inside(head.authority)

    async def _go_inside(self, authority: Authority) -> bool:
        """Answer the CONNECT here and parse what is inside: plain HTTP is judged request by request."""
        await self._write(_OPENED)
        self._nested += 1
        self._inside = authority
        self._intake.enter(authority)
        return True

    async def _go_inside_tls(self, authority: Authority, *, opened: bytes = _OPENED) -> bool:
        """Answer the CONNECT here, end TLS, and parse what is inside of it."""
        if self.agent.leaves is None:
            raise _Answered(Refuse(503, Reason.TLS_UNAVAILABLE, "the agent has no authority that could answer TLS"))
        await self._write(opened)
        self._nested = connects_nested_max  # inside of it there is no CONNECT
        self._inside = authority
        try:
            sealed = await open_inside(
                self.bare, self._intake.take_rest(), authority.host, self.agent.leaves, self._limits
            )
        except WireError as error:  # 200 was said: no answer can follow
            self._desk.rejected(self.agent.identity.agent_id, error.reject)
            self.stream.reset()
            raise Reset from error
        self.stream = sealed
        self._intake.enter_sealed(authority, sealed)
        return True

    async def _open_way(self, upstream: Stream, authority: Authority) -> None:
        """Have a raw connection opened to a host, by the preface that was sent or by a CONNECT."""
        seconds = self._limits.dial_seconds_max
        if self._desk.configuration.forward_mode is ForwardMode.PREFACE:
            await self._upstream_step(read_status(upstream, seconds))
        else:
            await self._upstream_step(open_through_proxy(upstream, str(authority), seconds))

    async def _seal(self, upstream: Stream, head: Head) -> Sealed:
        """Speak TLS with the host over the way that was opened to it."""
        desk, offered = self._desk, ONLY_HTTP11 if head.upgrade else ANY_HTTP
        context, seconds = desk.tls if head.upgrade else desk.tls_http2, self._limits.dial_seconds_max
        sealed, spoken = await self._upstream_step(
            seal(upstream, context, head.authority.host, seconds, offered=offered)
        )
        self.upstream, self._open_exchange.protocol = sealed, spoken
        return sealed

    async def _tunnel(self, authority: Authority, request: EgressRequest, *, opened: bytes = _OPENED) -> None:
        exchange, limits, stream = self._open_exchange, self._limits, self.bare
        upstream = await self._connect(request)
        await self._open_way(upstream, authority)
        await self._write(opened)
        exchange.status = 200
        try:
            hello = await client_hello(stream, self._intake.take_rest(), authority.host, limits)
        except WireError as error:  # 200 was said: no answer can follow
            exchange.error = error.reject.reason_code
            self._desk.rejected(self.agent.identity.agent_id, error.reject)
            stream.reset()
            raise Reset from error
        try:
            await exchange.take(len(hello))
        except BytesSpent as error:
            exchange.error = str(error)
            stream.reset()
            raise Reset from error
        upstream.put(hello)
        up_before, down_before = stream.received_bytes - len(hello), upstream.received_bytes
        try:
            await relay(stream, upstream, limits, exchange)
        finally:
            exchange.bytes_up = stream.received_bytes - up_before
            exchange.bytes_down = upstream.received_bytes - down_before
            exchange.error = exchange.used_up or exchange.error

    async def _relay_websocket(self, head: Head, upstream: Stream | Sealed, answered: Headers) -> None:
        exchange = self._open_exchange
        if not websocket.agreed(head.headers, answered):
            exchange.error = "the host agreed to another upgrade than was asked for"
            raise _Answered(Refuse(502, Reason.UPSTREAM_FAILED, exchange.error))
        exchange.status = 101
        agreed = websocket.answer(answered)
        try:
            await exchange.take(len(agreed))
        except BytesSpent as error:
            exchange.error = str(error)
            raise _Answered(_spent(error)) from error
        exchange.bytes_down += len(agreed)
        await self._write(agreed)
        passed = websocket.Relay(self.stream, upstream, self._limits, self.agent.share, take=exchange.take)
        # Frames may have come with the request already; they belong to the host now.
        passed.begun = self._intake.take_rest()
        try:
            await passed.run()
        finally:
            exchange.bytes_up += passed.bytes_up
            exchange.bytes_down += passed.bytes_down
            exchange.error = exchange.used_up or exchange.error

    # --- the exchange

    @property
    def _open_exchange(self) -> Exchange:
        if self.exchange is None:
            raise RuntimeError("cannot go on: no exchange is open")
        return self.exchange

    @contextlib.asynccontextmanager
    async def _asked(self, request: EgressRequest, *, refusals: bool = True) -> AsyncIterator[Verdict]:
        """Ask; a refusal is answered at once, and however it ends the outcome is told exactly once.

        Without `refusals` the caller answers those too, in its own words.
        """
        watch = asyncio.get_running_loop().call_later(hung_up_seconds, self._watch)
        try:
            self.exchange, verdict = await self._desk.ask(self.agent.identity.agent_id, request)
        finally:
            watch.cancel()
            if self._watching is not None:
                self._watching.cancel()
                self._watching = None
        exchange = self.exchange
        try:
            if isinstance(verdict, Refuse) and refusals:
                exchange.status = verdict.status
                raise _Answered(verdict, request=request.object)
            yield verdict
        except _Answered as answer:
            exchange.status = answer.refusal.status
            raise
        except (Reset, TimeoutError, asyncio.CancelledError):
            exchange.error = exchange.error or ("cut" if self._was_cut else "the connection ended early")
            raise
        finally:
            exchange.advance(Event.END)
            upstream, self.upstream, self.exchange = self.upstream, None, None
            self._desk.finish(exchange, upstream)

    def _watch(self) -> None:
        """End what a human is asked for by a client that has hung up: a FIN alone loses no connection.

        One that merely ends its half (shutdown(2)) looks the same: it has its answer within `hung_up_seconds`, or none.
        """
        if self.bare.ended:
            self.cut()
            return
        self._watching = asyncio.get_running_loop().call_later(hung_up_seconds, self._watch)

    async def _connect(self, request: EgressRequest) -> Stream:
        exchange = self._open_exchange
        exchange.advance(Event.ALLOWED)
        try:
            upstream = self.upstream = await self._desk.upstream(exchange)
        except (UpstreamError, TimeoutError) as error:
            exchange.error = str(error) or "the gateway could not be reached in time"
            raise _Answered(Refuse(502, Reason.UPSTREAM_FAILED, exchange.error), request=request.object) from error
        exchange.advance(Event.CONNECTED)
        if self.agent.frozen:
            upstream.freeze(frozen=True)
        return upstream

    async def _upstream_step(self, step: Awaitable[Result]) -> Result:
        try:
            return await step
        except (UpstreamError, Reset, TimeoutError) as error:
            detail = str(error) or "the gateway closed the connection"
            self._open_exchange.error = detail
            raise _Answered(Refuse(502, Reason.UPSTREAM_FAILED, detail)) from error

    # --- writing

    async def _write(self, data: bytes) -> None:
        await self.stream.write(data, self._limits.body_seconds_max)

    async def _refuse(self, refusal: Refuse | Reject, *, request: str = "") -> None:
        """Answer a refusal, then close: what is pipelined behind it is read and dropped, never served."""
        status, body = problem(refusal, request=request)
        with contextlib.suppress(Reset, TimeoutError):
            await self._write(
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


def _request(head: Head, **more: object) -> EgressRequest:
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


def _header(head: Head, wanted: bytes) -> str | None:
    """Give a header's value; doubled ones are joined, so that they are no known value."""
    values = [value for name, value in head.headers if name == wanted]
    return b", ".join(values).decode("latin-1") if values else None


def _nothing(_status: int, _headers: Headers) -> None:
    """Told of the headers; cookies and what is a gateway's own are taken from them as from a model's answer."""


def _keeps(head: Head) -> bool:
    said = b",".join(value for name, value in head.headers if name in (b"connection", b"proxy-connection")).lower()
    return head.http11 and b"close" not in said


def _retry(status: int) -> str:
    return "Retry-After: 1\r\n" if status == 503 else ""  # noqa: PLR2004 - Service Unavailable


def _spent(error: BytesSpent) -> Refuse:
    if isinstance(error, GrantSpent):
        return Refuse(403, Reason.GRANT_USED_UP, str(error))
    return Refuse(429, Reason.BUDGET_EXHAUSTED, str(error))


def _not_possible() -> Refuse:
    return Refuse(503, Reason.DAEMON_GONE, "the answer of the daemon does not fit the request")
