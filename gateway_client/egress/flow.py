"""What happens on one connection of an agent: read a head, ask, do what the answer says, and again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, assert_never

from gateway_client.egress import onward, selfservice
from gateway_client.egress.connection import Refused, not_possible, request_of
from gateway_client.egress.decide import Allow, Reason, Refuse, Upstream
from gateway_client.egress.exchange import BytesSpent
from gateway_client.egress.request import EgressRequest, Form
from gateway_client.egress.stream import Reset
from gateway_client.egress.terminate import open_inside
from gateway_client.egress.tunnel import client_hello, relay
from gateway_client.egress.wire import Head, Reject, WireError

if TYPE_CHECKING:
    from gateway_client.egress.connection import Connection
    from gateway_client.egress.target import Authority

connects_nested_max: Final = 2

_TLS: Final = b"\x16"  # the type of a handshake record (RFC 8446 section 5.1)
_ACCESS_DENIED: Final = b"\x15\x03\x03\x00\x02\x02\x31"
"""A fatal alert of TLS: a valid request that access control does not let pass (RFC 8446 section 6.2)."""
_OPENED: Final = b"HTTP/1.1 200 Connection established\r\n\r\n"


async def run(connection: Connection) -> None:
    """Serve a connection until it is closed."""
    if connection.was_cut:  # before it was open
        connection.stream.reset()
        return
    try:
        if connection.meant is not None and not await _begin_at(connection, connection.meant):
            return
        while (head := await connection.intake.next_head()) is not None:
            keep = await _serve(connection, head)
            connection.intake.release()
            if not keep:
                break
    except WireError as error:
        connection.desk.rejected(connection.agent.identity.agent_id, error.reject)
        await connection.refuse(error.reject)
    except Refused as answer:
        await connection.refuse(answer.refusal, request=answer.request)
    except (Reset, TimeoutError):
        pass
    finally:
        connection.intake.release()
        connection.stream.close()


async def _begin_at(connection: Connection, meant: Authority) -> bool:
    """Begin a connection that was not made to the proxy: TLS as if by CONNECT, plain HTTP as if inside of one.

    Gives whether requests are to be read from it.
    """
    first = await connection.bare.read(connection.limits.head_seconds_max)
    connection.bare.unread(first)
    connection.nested = connects_nested_max
    if not first.startswith(_TLS):
        connection.inside = meant
        connection.intake.enter(meant)
        return bool(first)
    if connection.agent.frozen:
        connection.stream.reset()
        return False
    request = EgressRequest(Form.CONNECT, "CONNECT", "tls", meant.host, meant.port, "")
    try:
        async with connection.asked(request) as verdict:
            if isinstance(verdict, Allow) and verdict.upstream is Upstream.TUNNEL:
                await _tunnel(connection, meant, request, opened=b"")
                return False
    except Refused:  # in HTTP, which nobody would read there
        await connection.write(_ACCESS_DENIED)
        return False
    if not isinstance(verdict, Allow) or verdict.upstream is not Upstream.TERMINATE or connection.agent.leaves is None:
        await connection.write(_ACCESS_DENIED)
        return False
    return await _go_inside_tls(connection, meant, opened=b"")


async def _serve(connection: Connection, head: Head) -> bool:
    """Serve one request; give whether the connection goes on."""
    if connection.agent.frozen:
        raise Refused(Refuse(503, Reason.FROZEN, "the agent is frozen"))
    match head.form:
        case Form.SELF:
            return await selfservice.serve(connection, head)
        case Form.MODEL:
            return await onward.serve_model(connection, head)
        case Form.MCP:
            return await onward.serve_mcp(connection, head)
        case Form.FORWARD:
            return await onward.serve_host(connection, head)
        case Form.CONNECT:
            return await _serve_connect(connection, head)
        case Form.NAME:
            raise RuntimeError("no head is a look-up")
        case _:
            assert_never(head.form)


async def _serve_connect(connection: Connection, head: Head) -> bool:
    if connection.nested >= connects_nested_max or (connection.inside is not None and not connection.inside.is_own):
        raise WireError(Reject(400, "connect_nested", "there is no CONNECT inside this tunnel"))
    if head.authority.is_own:
        return await _go_inside(connection, head.authority)
    request = request_of(head)
    async with connection.asked(request) as verdict:
        if not isinstance(verdict, Allow):
            raise Refused(not_possible())
        if verdict.upstream.opens:
            await _tunnel(connection, head.authority, request)
            return False
    if verdict.upstream is Upstream.TERMINATE:
        return await _go_inside_tls(connection, head.authority)
    return await _go_inside(connection, head.authority)


async def _go_inside(connection: Connection, authority: Authority) -> bool:
    """Answer the CONNECT here and parse what is inside: plain HTTP is judged request by request."""
    await connection.write(_OPENED)
    connection.nested += 1
    connection.inside = authority
    connection.intake.enter(authority)
    return True


async def _go_inside_tls(connection: Connection, authority: Authority, *, opened: bytes = _OPENED) -> bool:
    """Answer the CONNECT here, end TLS, and parse what is inside of it."""
    if connection.agent.leaves is None:
        raise Refused(Refuse(503, Reason.TLS_UNAVAILABLE, "the agent has no authority that could answer TLS"))
    await connection.write(opened)
    connection.nested = connects_nested_max  # inside of it there is no CONNECT
    connection.inside = authority
    try:
        sealed = await open_inside(
            connection.bare, connection.intake.take_rest(), authority.host, connection.agent.leaves, connection.limits
        )
    except WireError as error:  # 200 was said: no answer can follow
        connection.desk.rejected(connection.agent.identity.agent_id, error.reject)
        connection.stream.reset()
        raise Reset from error
    connection.stream = sealed
    connection.intake.enter_sealed(authority, sealed)
    return True


async def _tunnel(
    connection: Connection, authority: Authority, request: EgressRequest, *, opened: bytes = _OPENED
) -> None:
    exchange, limits, stream = connection.open_exchange, connection.limits, connection.bare
    upstream = await connection.connect(request)
    await onward.open_way(connection, upstream, authority)
    await connection.write(opened)
    exchange.status = 200
    try:
        hello = await client_hello(stream, connection.intake.take_rest(), authority.host, limits)
    except WireError as error:  # 200 was said: no answer can follow
        exchange.error = error.reject.reason_code
        connection.desk.rejected(connection.agent.identity.agent_id, error.reject)
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
