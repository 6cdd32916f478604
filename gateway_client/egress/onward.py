"""What goes on to the gateway: calls of models and MCP servers, and requests to hosts.

Each `serve_` gives whether the connection goes on.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gateway_client.egress import mcpcall, websocket
from gateway_client.egress.answering import Answering, UpstreamError
from gateway_client.egress.bodyjson import Scales
from gateway_client.egress.connection import Refused, keeps, not_possible, request_of, spent
from gateway_client.egress.decide import Allow, Reason, Refuse, output_reserved
from gateway_client.egress.exchange import BytesSpent
from gateway_client.egress.messages import ForwardMode, HttpVersion
from gateway_client.egress.modelapi import BadCall, Call, Endpoint, check_type, endpoint, reading
from gateway_client.egress.passing import Passing, Switched, open_through_proxy, read_status
from gateway_client.egress.passing_http2 import PassingHttp2
from gateway_client.egress.sealed import Sealed
from gateway_client.egress.stream import Reset
from gateway_client.egress.terminate import ANY_HTTP, ONLY_HTTP11, seal
from gateway_client.egress.upstream import forward_head, model_head
from gateway_client.egress.wire import Head, Reject, WireError
from gateway_client.gateways.usage import UsageMeter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway_client.egress.connection import Connection
    from gateway_client.egress.messages import Usage
    from gateway_client.egress.stream import Stream
    from gateway_client.egress.target import Authority
    from gateway_client.egress.wire import Headers


async def serve_model(connection: Connection, head: Head) -> bool:
    where = endpoint(head.method, head.path)
    call = Call(model=where.model if where else "", stream=False, max_tokens=None, body=b"")
    if where is not None and head.method == "POST":
        call = await _read_call(connection, head, where)
    elif where is not None and head.has_body:
        raise WireError(Reject(400, "body_refused", f"{head.method} has no body here"))
    request = request_of(
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
    async with connection.asked(request) as verdict:
        if not isinstance(verdict, Allow) or where is None:
            raise Refused(not_possible())
        upstream = await connection.connect(request)
        return await _pass_model(connection, head, where, call, upstream)


async def _read_call(connection: Connection, head: Head, where: Endpoint) -> Call:
    try:
        check_type(head.headers)
        body = await connection.intake.whole_body(head, connection.limits.model_body_bytes_max, scales=Scales())
        async with connection.agent.parsing:
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


async def _pass_model(connection: Connection, head: Head, where: Endpoint, call: Call, upstream: Stream) -> bool:
    desk, exchange = connection.desk, connection.open_exchange
    configuration, adapter = desk.configuration, desk.adapter
    target, headers = model_head(
        head, where, body=call.body, adapter=adapter, identity=connection.agent.identity, configuration=configuration
    )
    meter = UsageMeter(where.dialect, call.stream, model=call.model, request_bytes=len(call.body), prices=desk.prices)
    reported: list[Usage | None] = [None]

    def on_headers(status: int, returned: Headers) -> None:
        if status < 400:  # noqa: PLR2004 - an error used nothing, if it does not say otherwise
            meter.output_at_least = output_reserved(call.max_tokens, call.choices)
        texts = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in returned]
        reported[0] = adapter.usage_from(texts)
        exchange.guardrails = adapter.guardrails_from(texts)

    answer = _answering(connection, head, configuration.credential, on_headers=on_headers, on_body=meter.feed)
    try:
        passing = _passing(connection, answer, head, upstream)
        return await _pass(connection, answer, passing.run(target, headers, call.body))
    finally:
        said = reported[0]
        # Of an answer that was cut nobody knows what it used: the budget keeps all that was set aside for it.
        if answer.whole or meter.ended:
            exchange.usage = meter.result(
                cost_usd=said.cost_usd if said else None, cost_estimated=said.estimated if said else False
            )


async def serve_mcp(connection: Connection, head: Head) -> bool:
    server, message = mcpcall.server_of(head.path), None
    if server is None or head.query or head.method not in ("GET", "POST", "DELETE"):
        raise WireError(Reject(400, "mcp_malformed", "a server is reached with GET, POST or DELETE of /mcp/SERVER"))
    if head.method == "POST":
        try:
            check_type(head.headers)
            body = await connection.intake.whole_body(head, mcpcall.mcp_body_bytes_max, scales=Scales())
            async with connection.agent.parsing:
                message = mcpcall.read_message(body)
        except BadCall as error:
            raise WireError(Reject(error.status, error.reason, str(error))) from error
    elif head.has_body:
        raise WireError(Reject(400, "body_refused", f"{head.method} has no body here"))
    content = message.body if message is not None else b""
    request = request_of(
        head,
        server=server,
        rpc_method=message.method if message is not None else "",
        tool=message.name if message is not None else "",
        content_length=len(content),
    )
    async with connection.asked(request) as verdict:
        if not isinstance(verdict, Allow):
            raise Refused(not_possible())
        upstream = await connection.connect(request)
        headers = [(b"host", b"gateway.internal"), *mcpcall.outgoing(head.headers, message)]
        if message is not None:
            headers.append((b"content-length", b"%d" % len(content)))
        headers.append((b"connection", b"close"))
        answer = _answering(connection, head, on_headers=_nothing)
        passing = _passing(connection, answer, head, upstream)
        return await _pass(connection, answer, passing.run(head.path.encode("ascii"), headers, content))


async def serve_host(connection: Connection, head: Head) -> bool:
    body = await connection.intake.checked_body(head)
    async with connection.asked(request_of(head)) as verdict:
        if not isinstance(verdict, Allow):
            raise Refused(not_possible())
        bare, secure = await connection.connect(request_of(head)), head.scheme == "https"
        mode = connection.desk.configuration.forward_mode
        if secure or mode is ForwardMode.PREFACE:
            await open_way(connection, bare, head.authority)
        upstream = await _seal(connection, bare, head) if secure else bare
        if head.expects_continue and head.content_length is not None:
            connection.intake.tell_to_go_on()
        target, headers = forward_head(head, absolute=mode is ForwardMode.PROXY and not secure)
        answer = _answering(connection, head)
        try:
            passing = _passing(connection, answer, head, upstream)
            return await _pass(connection, answer, passing.run(target, headers, body))
        except Switched as switched:
            await _relay_websocket(connection, head, upstream, switched.headers)
            return False


async def open_way(connection: Connection, upstream: Stream, authority: Authority) -> None:
    """Have a raw connection opened to a host, by the preface that was sent or by a CONNECT."""
    seconds = connection.limits.dial_seconds_max
    if connection.desk.configuration.forward_mode is ForwardMode.PREFACE:
        await connection.upstream_step(read_status(upstream, seconds))
    else:
        await connection.upstream_step(open_through_proxy(upstream, str(authority), seconds))


async def _seal(connection: Connection, upstream: Stream, head: Head) -> Sealed:
    """Speak TLS with the host over the way that was opened to it."""
    desk, offered = connection.desk, ONLY_HTTP11 if head.upgrade else ANY_HTTP
    context, seconds = desk.tls if head.upgrade else desk.tls_http2, connection.limits.dial_seconds_max
    sealed, spoken = await connection.upstream_step(
        seal(upstream, context, head.authority.host, seconds, offered=offered)
    )
    connection.upstream, connection.open_exchange.protocol = sealed, spoken
    return sealed


async def _relay_websocket(connection: Connection, head: Head, upstream: Stream | Sealed, answered: Headers) -> None:
    exchange = connection.open_exchange
    if not websocket.agreed(head.headers, answered):
        exchange.error = "the host agreed to another upgrade than was asked for"
        raise Refused(Refuse(502, Reason.UPSTREAM_FAILED, exchange.error))
    exchange.status = 101
    agreed = websocket.answer(answered)
    try:
        await exchange.take(len(agreed))
    except BytesSpent as error:
        exchange.error = str(error)
        raise Refused(spent(error)) from error
    exchange.bytes_down += len(agreed)
    await connection.write(agreed)
    passed = websocket.Relay(connection.stream, upstream, connection.limits, connection.agent.share, take=exchange.take)
    # Frames may have come with the request already; they belong to the host now.
    passed.begun = connection.intake.take_rest()
    try:
        await passed.run()
    finally:
        exchange.bytes_up += passed.bytes_up
        exchange.bytes_down += passed.bytes_down
        exchange.error = exchange.used_up or exchange.error


def _answering(
    connection: Connection,
    head: Head,
    credential: str = "",
    *,
    on_headers: Callable[[int, Headers], None] | None = None,
    on_body: Callable[[bytes], None] | None = None,
) -> Answering:
    return Answering(
        connection.stream,
        connection.open_exchange,
        connection.limits,
        method=head.method,
        http11=head.http11,
        keep_alive=keeps(head) and not head.upgrade,
        credential=credential,
        on_headers=on_headers,
        on_body=on_body,
    )


def _passing(
    connection: Connection, answer: Answering, head: Head, upstream: Stream | Sealed
) -> Passing | PassingHttp2:
    exchange, limits, share = connection.open_exchange, connection.limits, connection.agent.share
    if exchange.protocol is HttpVersion.HTTP2 and isinstance(upstream, Sealed):
        return PassingHttp2(answer, upstream, exchange, limits, share, method=head.method)
    return Passing(answer, upstream, exchange, limits, share, method=head.method)


async def _pass(connection: Connection, answer: Answering, passed: Awaitable[bool]) -> bool:
    """Await the end of what is passed on; of what fails before anything was answered, the answer is a refusal."""
    try:
        return await passed
    except (UpstreamError, BytesSpent, Reset) as error:
        exchange = connection.open_exchange
        exchange.error = str(error) or "the connection was reset"
        if answer.started or connection.stream.lost:
            connection.stream.reset()  # a cut answer must not look like a whole one
            raise Reset from error
        if isinstance(error, BytesSpent):
            raise Refused(spent(error)) from error
        raise Refused(Refuse(502, Reason.UPSTREAM_FAILED, exchange.error)) from error
    except WireError as error:  # the rest of a long body was malformed: what was begun upstream is cut off
        if connection.upstream is not None:
            connection.upstream.reset()
        if answer.started:
            connection.stream.reset()
            raise Reset from error
        raise


def _nothing(_status: int, _headers: Headers) -> None:
    """Told of the headers; cookies and what is a gateway's own are taken from them as from a model's answer."""
