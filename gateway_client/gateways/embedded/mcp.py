"""MCP servers behind the gateway: it holds their credentials, and holds an agent to what the preface says it may call.

The daemon decided already, on what a worker told; here the tools of the preface are compared once more with the body
that is sent, lists of tools are cut to them, and a session belongs to the agent that began it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

import structlog

from gateway_client.egress.bodyjson import BadCall
from gateway_client.egress.mcpcall import SESSION, glob_covers, read_message
from gateway_client.gateways import sse
from gateway_client.gateways.embedded import http_client
from gateway_client.gateways.embedded.dialects.fields import compact

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gateway_client.gateways.embedded.config import McpServer
    from gateway_client.gateways.embedded.http import Headers, Request, Responder
    from gateway_client.gateways.preface import Mcp

SESSIONS_MAX: Final = 4096
SESSIONS_PER_AGENT_MAX: Final = 64
SESSION_ID_BYTES_MAX: Final = 256
ANSWER_BYTES_MAX: Final = 32 * 1024 * 1024

_JSON: Final = (b"content-type", b"application/json")
_SESSION: Final = b"mcp-session-id"
_UP: Final = frozenset(
    {b"accept", b"content-type", b"last-event-id", b"mcp-protocol-version", b"mcp-method", b"mcp-name", _SESSION}
)
_UP_PREFIX: Final = b"mcp-param-"
_DOWN: Final = frozenset({b"content-type", b"cache-control", b"allow", b"retry-after", _SESSION})
# JSON-RPC 2.0 leaves -32000 to -32099 to implementations.
_REFUSED: Final = -32003

_log = structlog.get_logger()


class RefusedError(Exception):
    """What is answered instead of asking the server."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Sessions:
    """Whose a session of a server is; the oldest are forgotten, and their agents begin new ones."""

    def __init__(self) -> None:
        self._owner: OrderedDict[tuple[str, bytes], str] = OrderedDict()

    def begun(self, server: str, session: bytes, agent_id: str) -> None:
        """Take note of a session; raises RefusedError where another agent has one of that name."""
        if len(session) > SESSION_ID_BYTES_MAX or self._owner.get((server, session), agent_id) != agent_id:
            raise RefusedError(502, "the server gave a session that cannot be used")
        self._owner[server, session] = agent_id
        self._owner.move_to_end((server, session))
        own = [key for key, owner in self._owner.items() if owner == agent_id]
        for key in own[: max(0, len(own) - SESSIONS_PER_AGENT_MAX)]:
            del self._owner[key]
        while len(self._owner) > SESSIONS_MAX:
            self._owner.popitem(last=False)

    def check(self, server: str, session: bytes | None, agent_id: str) -> None:
        """Raise RefusedError where a session is not this agent's: to it there is none (the specification's 404)."""
        if session is not None and self._owner.get((server, session)) != agent_id:
            raise RefusedError(404, "there is no such session; begin a new one")

    def ended(self, server: str, session: bytes | None) -> None:
        if session is not None:
            self._owner.pop((server, session), None)


class McpGateway:
    """Passes messages to the configured servers."""

    def __init__(self, servers: Iterable[McpServer]) -> None:
        self._servers = {server.name: server for server in servers}
        self._sessions = Sessions()

    async def handle(self, request: Request, respond: Responder, *, allow: Mcp, agent_id: str) -> None:
        """Answer one request of an agent."""
        try:
            await self._pass(request, respond, allow, agent_id)
        except RefusedError as refused:
            _log.info("refused", agent_id=agent_id, server=allow.server, reason=refused.message)
            error = {"jsonrpc": "2.0", "id": None, "error": {"code": _REFUSED, "message": refused.message}}
            await respond.whole(refused.status, (_JSON,), compact(error))

    async def _pass(self, request: Request, respond: Responder, allow: Mcp, agent_id: str) -> None:
        server = self._servers.get(allow.server)
        if server is None or request.path != f"/mcp/{allow.server}":
            raise RefusedError(404, "there is no such MCP server behind the gateway")
        check_call(request, allow)
        session = request.header(_SESSION)
        self._sessions.check(server.name, session, agent_id)
        headers: Headers = tuple(
            (name, value) for name, value in request.headers if name in _UP or name.startswith(_UP_PREFIX)
        )
        if server.key:
            headers += ((b"authorization", b"Bearer " + server.key.encode()),)
        asking = http_client.ask(server.url, request.method, "", headers, request.body)
        try:
            async with asking as response:
                await self._answer(response, respond, allow, agent_id)
        except http_client.ProviderError as error:
            if respond.started:
                raise OSError(str(error)) from error
            raise RefusedError(502, "the MCP server cannot be reached") from error
        if request.method == "DELETE":
            self._sessions.ended(server.name, session)

    async def _answer(self, response: http_client.Response, respond: Responder, allow: Mcp, agent_id: str) -> None:
        begun = response.header(_SESSION)
        if begun is not None:
            self._sessions.begun(allow.server, begun, agent_id)
        headers: Headers = tuple((name, value) for name, value in response.headers if name in _DOWN)
        if (response.header(b"content-type") or b"").startswith(b"text/event-stream"):
            await respond.start(response.status, headers)
            splitter = sse.Splitter()
            async for piece in response.pieces():
                for event in splitter.feed(piece):
                    await respond.send(cut_event(event, allow))
            for event in splitter.finish():
                await respond.send(cut_event(event, allow))
            await respond.end()
            return
        body = await response.read(bytes_max=ANSWER_BYTES_MAX)
        await respond.whole(response.status, headers, cut_json(body, allow) if body else body)


def check_call(request: Request, allow: Mcp) -> None:
    """Raise RefusedError for a body that uses what the preface does not allow."""
    if request.method != "POST":
        return
    try:
        message = read_message(request.body)
    except BadCall as error:
        raise RefusedError(error.status, str(error)) from error
    if message.method not in SESSION and not any(glob_covers(glob, message.name) for glob in allow.tools):
        raise RefusedError(403, "the agent has no grant for what the message uses")


def cut_event(event: sse.Event, allow: Mcp) -> bytes:
    """Return an event with lists of tools cut to what is granted; one too large to be read is dropped."""
    if event.cut:
        return b": an event was too large\n\n"
    if b'"tools"' not in event.data:
        return event.raw
    lines = [line for line in event.raw.splitlines() if line.startswith((b"id:", b"retry:"))]
    kept = b"".join(line + b"\n" for line in lines)
    return kept + sse.encode(cut_json(event.data, allow), name=event.name)


def cut_json(body: bytes, allow: Mcp) -> bytes:
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        return b"{}" if b'"tools"' in body else body
    match value:
        case {"result": {"tools": list(tools)} as result}:
            result["tools"] = [tool for tool in tools if _granted(tool, allow)]
            return compact(value)
        case _:
            return body


def _granted(tool: Any, allow: Mcp) -> bool:
    name = tool.get("name") if isinstance(tool, dict) else None
    return isinstance(name, str) and any(glob_covers(glob, name) for glob in allow.tools)
