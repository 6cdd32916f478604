"""What happens on one connection of an agent: read a head, ask, do what the answer says, and again."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol, assert_never

from gateway_client.egress import tls
from gateway_client.egress.answers import problem, response
from gateway_client.egress.decide import Allow, Reason, Refuse, Reply, Upstream
from gateway_client.egress.exchange import Event
from gateway_client.egress.messages import ForwardMode
from gateway_client.egress.modelapi import BadCall, Call, Endpoint, endpoint, read_call
from gateway_client.egress.passing import Passing, UpstreamError, open_through_proxy, read_status
from gateway_client.egress.request import EgressRequest, Form
from gateway_client.egress.stream import Reset
from gateway_client.egress.upstream import GatewayAdapter, Identity, forward_head, model_head
from gateway_client.egress.wire import End, Head, Reject, RequestReader, WireError
from gateway_client.gateways.usage import UsageMeter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway_client.egress.exchange import Exchange
    from gateway_client.egress.messages import Configure, Usage, Verdict
    from gateway_client.egress.stream import Stream
    from gateway_client.egress.target import Authority
    from gateway_client.egress.wire import Headers
    from gateway_client.gateways.prices import PriceTable

self_body_bytes_max: Final = 8 * 1024
forward_body_peek_bytes_max: Final = 64 * 1024
connects_nested_max: Final = 2
linger_bytes_max: Final = 1024 * 1024
linger_seconds_max: Final = 2.0

_OPENED: Final = b"HTTP/1.1 200 Connection established\r\n\r\n"
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(slots=True)
class Agent:
    """Whom a listener serves."""

    identity: Identity
    frozen: bool = False
    connections: set[Connection] = field(default_factory=set)


class Desk(Protocol):
    """What a connection needs of the worker it lives in."""

    configuration: Configure
    adapter: GatewayAdapter
    prices: PriceTable

    async def ask(self, agent_id: str, request: EgressRequest) -> tuple[Exchange, Verdict]: ...

    async def upstream(self, exchange: Exchange) -> Stream: ...

    def finish(self, exchange: Exchange, upstream: Stream | None) -> None: ...

    def rejected(self, agent_id: str, reject: Reject) -> None: ...


class _Answered(Exception):  # noqa: N818 - control flow inside this module
    """The worker answers with a refusal and closes."""

    def __init__(self, refusal: Refuse | Reject, *, request: str = "") -> None:
        super().__init__()
        self.refusal = refusal
        self.request = request


class Connection:
    """One accepted connection; `run` ends when it is closed."""

    def __init__(self, desk: Desk, agent: Agent, stream: Stream) -> None:
        self.agent = agent
        self.stream = stream
        self.exchange: Exchange | None = None
        self.upstream: Stream | None = None
        self._desk = desk
        self._limits = desk.configuration.limits
        self._reader = RequestReader(self._limits)
        self._inside: Authority | None = None
        self._nested = 0
        self._task: asyncio.Task[None] | None = None
        self._was_cut = False

    def start(self) -> asyncio.Task[None]:
        self._task = asyncio.get_running_loop().create_task(self.run())
        self.stream.on_lost = self._cancel
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
            while (head := await self._next_head()) is not None:
                if not await self._serve(head):
                    break
        except WireError as error:
            self._desk.rejected(self.agent.identity.agent_id, error.reject)
            await self._refuse(error.reject)
        except _Answered as answer:
            await self._refuse(answer.refusal, request=answer.request)
        except (Reset, TimeoutError):
            pass
        finally:
            self.stream.close()

    # --- reading

    async def _next_head(self) -> Head | None:
        """Give the next head, or None where the agent has ended or sent nothing for long."""
        loop = asyncio.get_running_loop()
        deadline: float | None = None
        while True:
            head = self._reader.next_head()
            if head is not None:
                return head
            if deadline is None and self._reader.has_bytes:
                deadline = loop.time() + self._limits.head_seconds_max
            seconds = self._limits.idle_seconds_max if deadline is None else deadline - loop.time()
            try:
                data = await self.stream.read(max(seconds, 0.001))
            except TimeoutError as error:
                if deadline is None:
                    return None
                raise WireError(Reject(408, "head_too_slow", "the head did not come in time")) from error
            if not data:
                return None
            self._reader.feed(data)

    async def _body(self) -> AsyncIterator[bytes]:
        while True:
            piece = self._reader.next_body()
            if piece is End.OF_BODY:
                return
            if piece is not None:
                yield piece
                continue
            data = await self.stream.read(self._limits.body_seconds_max)
            if not data:
                raise Reset
            self._reader.feed(data)

    async def _whole_body(self, head: Head, bytes_max: int) -> bytes:
        too_large = WireError(Reject(413, "body_too_large", f"the body is over {bytes_max} bytes"))
        if head.content_length is not None and head.content_length > bytes_max:
            raise too_large
        if head.expects_continue:
            self.stream.put(_CONTINUE)
        body = bytearray()
        try:
            async for piece in self._body():
                body += piece
                if len(body) > bytes_max:
                    raise too_large
        except TimeoutError as error:
            raise WireError(Reject(408, "body_too_slow", "the body did not come in time")) from error
        return bytes(body)

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
            case Form.FORWARD:
                return await self._serve_forward(head)
            case Form.CONNECT:
                return await self._serve_connect(head)
            case _:
                assert_never(head.form)

    async def _serve_self(self, head: Head) -> bool:
        body = await self._whole_body(head, self_body_bytes_max)
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

    async def _serve_model(self, head: Head) -> bool:
        where = endpoint(head.method, head.path)
        call = Call(model=where.model if where else "", stream=False, max_tokens=None, body=b"")
        if where is not None and head.method == "POST":
            body = await self._whole_body(head, self._limits.model_body_bytes_max)
            try:
                call = read_call(where, body)
            except BadCall as error:
                raise WireError(Reject(400, error.reason, str(error))) from error
        elif where is not None and head.has_body:
            raise WireError(Reject(400, "body_refused", f"{head.method} has no body here"))
        request = _request(
            head,
            dialect=where.dialect if where else None,
            model=call.model,
            stream=call.stream,
            max_tokens=call.max_tokens,
            content_length=len(call.body) if where else head.content_length,
        )
        async with self._asked(request) as verdict:
            if not isinstance(verdict, Allow) or where is None:
                raise _Answered(_not_possible())
            upstream = await self._connect(request)
            return await self._pass_model(head, where, call, upstream)

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

        def on_headers(_status: int, returned: Headers) -> None:
            reported[0] = adapter.usage_from([(n.decode("latin-1"), v.decode("latin-1")) for n, v in returned])

        passing = Passing(
            self.stream,
            upstream,
            exchange,
            self._limits,
            method=head.method,
            http11=head.http11,
            keep_alive=_keeps(head),
            credential=configuration.credential,
            on_headers=on_headers,
            on_body=meter.feed,
        )
        try:
            return await self._pass(passing, target, headers, call.body)
        finally:
            said = reported[0]
            exchange.usage = meter.result(
                cost_usd=said.cost_usd if said else None, cost_estimated=said.estimated if said else False
            )

    async def _serve_forward(self, head: Head) -> bool:
        body: bytes | None = b""
        begun = bytearray()
        pieces = self._body()
        if head.content_length is None:
            # A chunked body can turn out malformed: what is short is read whole before anything leaves.
            if head.expects_continue:
                self.stream.put(_CONTINUE)
            body = await self._peek_body(pieces, begun)
        elif head.has_body:
            body = None
        async with self._asked(_request(head)) as verdict:
            if not isinstance(verdict, Allow):
                raise _Answered(_not_possible())
            upstream = await self._connect(_request(head))
            mode = self._desk.configuration.forward_mode
            if mode is ForwardMode.PREFACE:
                await self._upstream_step(read_status(upstream, self._limits.dial_seconds_max))
            if head.expects_continue and head.content_length is not None:
                self.stream.put(_CONTINUE)
            target, headers = forward_head(head, absolute=mode is ForwardMode.PROXY)
            passing = Passing(
                self.stream,
                upstream,
                self._open_exchange,
                self._limits,
                method=head.method,
                http11=head.http11,
                keep_alive=_keeps(head),
                credential="",
            )
            return await self._pass(passing, target, headers, _joined(bytes(begun), pieces) if body is None else body)

    @staticmethod
    async def _peek_body(pieces: AsyncIterator[bytes], begun: bytearray) -> bytes | None:
        """Give the body if it is short; else None, with its beginning in `begun`."""
        async for piece in pieces:
            begun += piece
            if len(begun) > forward_body_peek_bytes_max:
                return None
        return bytes(begun)

    async def _pass(
        self, passing: Passing, target: bytes, headers: list[tuple[bytes, bytes]], body: bytes | AsyncIterator[bytes]
    ) -> bool:
        try:
            return await passing.run(target, headers, body)
        except (UpstreamError, Reset) as error:
            exchange = self._open_exchange
            exchange.error = str(error) or "the connection was reset"
            if passing.started or self.stream.lost:
                self.stream.reset()  # a cut answer must not look like a whole one
                raise Reset from error
            raise _Answered(Refuse(502, Reason.UPSTREAM_FAILED, exchange.error)) from error
        except WireError as error:  # the rest of a long body was malformed: what was begun upstream is cut off
            if self.upstream is not None:
                self.upstream.reset()
            if passing.started:
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
            if verdict.upstream is not Upstream.INSPECT:
                await self._tunnel(head, request)
                return False
        return await self._go_inside(head.authority)

    async def _go_inside(self, authority: Authority) -> bool:
        """Answer the CONNECT here and parse what is inside: plain HTTP is judged request by request."""
        rest = self._reader.take_rest()
        await self._write(_OPENED)
        self._nested += 1
        self._inside = authority
        self._reader = RequestReader(self._limits, inside=authority)
        self._reader.feed(rest)
        return True

    async def _tunnel(self, head: Head, request: EgressRequest) -> None:
        exchange, limits = self._open_exchange, self._limits
        upstream = await self._connect(request)
        if self._desk.configuration.forward_mode is ForwardMode.PREFACE:
            await self._upstream_step(read_status(upstream, limits.dial_seconds_max))
        else:
            await self._upstream_step(open_through_proxy(upstream, str(head.authority), limits.dial_seconds_max))
        await self._write(_OPENED)
        exchange.status = 200
        hello = await self._client_hello(head.authority.host)
        upstream.put(hello)
        up_before, down_before = self.stream.received_bytes - len(hello), upstream.received_bytes
        try:
            await self._relay(upstream)
        finally:
            exchange.bytes_up = self.stream.received_bytes - up_before
            exchange.bytes_down = upstream.received_bytes - down_before

    async def _client_hello(self, host: str) -> bytes:
        """Give the first bytes of the tunnel once they are a ClientHello for the host; else nothing has gone up."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.head_seconds_max
        data = self._reader.take_rest()
        while True:
            found = tls.peek(data)
            if isinstance(found, tls.Hello) and tls.fits(found, host):
                return data
            if found is not tls.Peek.NEED_MORE:
                code = "sni_mismatch" if isinstance(found, tls.Hello) else "not_tls"
                self._open_exchange.error = code
                self._desk.rejected(
                    self.agent.identity.agent_id, Reject(400, code, "the tunnel did not begin with TLS for its host")
                )
                self.stream.reset()
                raise Reset
            more = await self.stream.read(max(deadline - loop.time(), 0.001))
            if not more:
                raise Reset
            data += more

    async def _relay(self, upstream: Stream) -> None:
        """Relay until both sides ended, one is lost, or nothing moved for long."""
        end = self.stream.splice(upstream)
        moved = -1
        while not end.done():
            await asyncio.wait((end,), timeout=self._limits.tunnel_idle_seconds_max)
            now = self.stream.received_bytes + upstream.received_bytes
            if now == moved:
                return
            moved = now

    # --- the exchange

    @property
    def _open_exchange(self) -> Exchange:
        if self.exchange is None:
            raise RuntimeError("cannot go on: no exchange is open")
        return self.exchange

    @contextlib.asynccontextmanager
    async def _asked(self, request: EgressRequest) -> AsyncIterator[Verdict]:
        """Ask; a refusal is answered at once, and however it ends the outcome is told exactly once."""
        self.exchange, verdict = await self._desk.ask(self.agent.identity.agent_id, request)
        exchange = self.exchange
        try:
            if isinstance(verdict, Refuse):
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

    async def _connect(self, request: EgressRequest) -> Stream:
        exchange = self._open_exchange
        exchange.advance(Event.ALLOWED)
        try:
            self.upstream = await self._desk.upstream(exchange)
        except (UpstreamError, TimeoutError) as error:
            exchange.error = str(error) or "the gateway could not be reached in time"
            raise _Answered(Refuse(502, Reason.UPSTREAM_FAILED, exchange.error), request=request.object) from error
        exchange.advance(Event.CONNECTED)
        if self.agent.frozen:
            self.upstream.freeze(frozen=True)
        return self.upstream

    async def _upstream_step(self, step: object) -> None:
        try:
            await step  # type: ignore[misc]
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


def _keeps(head: Head) -> bool:
    said = b",".join(value for name, value in head.headers if name in (b"connection", b"proxy-connection")).lower()
    return head.http11 and b"close" not in said


async def _joined(begun: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if begun:
        yield begun
    async for piece in pieces:
        yield piece


def _retry(status: int) -> str:
    return "Retry-After: 1\r\n" if status == 503 else ""  # noqa: PLR2004 - Service Unavailable


def _not_possible() -> Refuse:
    return Refuse(503, Reason.DAEMON_GONE, "the answer of the daemon does not fit the request")
