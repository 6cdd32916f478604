"""What an agent asks about itself: its own API and the same as an MCP server, answered by the daemon."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from gateway_client.egress import mcp
from gateway_client.egress.answers import response
from gateway_client.egress.connection import Refused, keeps, not_possible, request_of
from gateway_client.egress.decide import Allow, Reason, Refuse, Reply
from gateway_client.egress.wire import Head, Reject, WireError

if TYPE_CHECKING:
    from gateway_client.egress.connection import Connection

self_body_bytes_max: Final = 4 * 1024


async def serve(connection: Connection, head: Head) -> bool:
    """Serve one request; give whether the connection goes on."""
    if head.path == mcp.MCP_PATH:
        return await _serve_mcp(connection, head)
    body = await connection.intake.whole_body(head, self_body_bytes_max)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise WireError(Reject(400, "body_malformed", "the body is no UTF-8")) from error
    request = request_of(head, query=head.query, body=text, content_length=len(body))
    async with connection.asked(request) as verdict:
        if not isinstance(verdict, Reply):
            raise Refused(not_possible())
        keep = keeps(head)
        await connection.write(
            response(
                verdict.status,
                json.dumps(verdict.body).encode(),
                content_type="application/json",
                keep_alive=keep,
                head_only=head.method == "HEAD",
            )
        )
        if connection.exchange is not None:
            connection.exchange.status = verdict.status
        return keep


async def _serve_mcp(connection: Connection, head: Head) -> bool:
    """Serve one message of the Model Context Protocol: only a tool call is asked about, as what it stands for."""
    if head.method != "POST":  # no stream from here, and no session to end
        raise Refused(Refuse(405, Reason.SELF_UNKNOWN, "POST one JSON-RPC message"))
    body = await connection.intake.whole_body(head, mcp.message_bytes_max)
    read = mcp.read(body, version=_header(head, b"mcp-protocol-version"), origin=_header(head, b"origin"))
    if isinstance(read, mcp.Answered):
        return await _answer_mcp(connection, head, read)
    request = replace(
        request_of(head), method=read.method, path=read.path, query=read.query, body=read.body, has_query=False
    )
    async with connection.asked(request, refusals=False) as verdict:
        if isinstance(verdict, Allow):
            raise Refused(not_possible())
        answered = read.answer(verdict)
        connection.open_exchange.status = verdict.status
        return await _answer_mcp(connection, head, answered)


async def _answer_mcp(connection: Connection, head: Head, answered: mcp.Answered) -> bool:
    keep = keeps(head)
    await connection.write(response(answered.status, answered.body, content_type="application/json", keep_alive=keep))
    return keep


def _header(head: Head, wanted: bytes) -> str | None:
    """Give a header's value; doubled ones are joined, so that they are no known value."""
    values = [value for name, value in head.headers if name == wanted]
    return b", ".join(values).decode("latin-1") if values else None
