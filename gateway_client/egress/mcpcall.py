"""One message of the Model Context Protocol over streamable HTTP: what an agent does with it, and the body to send.

Pure. https://modelcontextprotocol.io/specification/2025-11-25/basic/transports. What is decided is the method and, for
calls, the name of the tool; what is sent is written from the parsed value, so no server reads another one. Batches went
out of the protocol in 2025-06-18 and are refused, as are names that stand twice and methods unknown here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from gateway_client.egress.bodyjson import BadCall, write_object

mcp_body_bytes_max: Final = 4 * 1024 * 1024
MCP_ROOT: Final = "/mcp/"
TOOL_NAME: Final = re.compile(r"[A-Za-z0-9._/-]{1,128}")
SERVER_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,100}")
uri_chars_max: Final = 2048

SESSION: Final = frozenset(
    {
        "",  # the answer to a question of the server's, or GET and DELETE of the session
        "initialize",
        "logging/setLevel",
        "notifications/cancelled",
        "notifications/initialized",
        "notifications/progress",
        "notifications/roots/list_changed",
        "ping",
        "server/discover",
        "tools/list",
    }
)
"""What whoever holds any scope on a server may do: it calls no tool and reads nothing of the server's."""

# Where the name of what is read stands; lists have none. A scope must say `resources/` or `prompts/` itself.
_NAMED: Final = {
    "resources/read": "uri",
    "resources/subscribe": "uri",
    "resources/unsubscribe": "uri",
    "prompts/get": "name",
}
_LISTS: Final = frozenset({"resources/list", "resources/templates/list", "prompts/list"})

_HEADERS: Final = frozenset(
    {b"accept", b"content-type", b"last-event-id", b"mcp-protocol-version", b"mcp-session-id", b"user-agent"}
)
_HEADER_PREFIX: Final = b"mcp-param-"


@dataclass(frozen=True, slots=True)
class Message:
    """`name` is what scopes are compared with: a tool, or `resources/URI`, `prompts/NAME`; empty for sessions."""

    method: str
    name: str
    shown: str
    """The name as the protocol's own header has it."""
    body: bytes


def server_of(path: str) -> str | None:
    """Give the server that a path names; None where it is no `/mcp/SERVER`."""
    name = path.removeprefix(MCP_ROOT)
    return name if path.startswith(MCP_ROOT) and SERVER_NAME.fullmatch(name) else None


def read_message(body: bytes) -> Message:
    """Read one JSON-RPC message; raise BadCall with what is wrong."""
    document = _document(body)
    if document.get("jsonrpc") != "2.0":
        raise BadCall("mcp_malformed", "the body is no JSON-RPC 2.0 message")
    number = document.get("id")
    if number is not None and (isinstance(number, bool) or not isinstance(number, str | int)):
        raise BadCall("mcp_malformed", "the id is neither a text nor a whole number")
    method = document.get("method")
    if method is None:
        if number is None or ("result" in document) == ("error" in document):
            raise BadCall("mcp_malformed", "the message is neither a request nor an answer")
        return Message("", "", "", write_object(document))
    params = document.get("params", {})
    if not isinstance(method, str) or not isinstance(params, dict) or "result" in document or "error" in document:
        raise BadCall("mcp_malformed", "the message is no request")
    name, shown = _name(method, params)
    return Message(method, name, shown, write_object(document))


def _name(method: str, params: dict[str, Any]) -> tuple[str, str]:
    if method in SESSION:
        return "", ""
    if method == "tools/call":
        tool = params.get("name")
        if not isinstance(tool, str) or not TOOL_NAME.fullmatch(tool):
            raise BadCall("mcp_malformed", "the call names no tool, or one with characters a tool's name may not have")
        return tool, tool
    if method in _LISTS:
        return method.partition("/")[0] + "/", ""
    if method in _NAMED:
        named = params.get(_NAMED[method])
        if not isinstance(named, str) or not named or len(named) > uri_chars_max or not named.isprintable():
            raise BadCall("mcp_malformed", f"{method} names nothing that can be read")
        return f"{method.partition('/')[0]}/{named}", named
    raise BadCall("mcp_method_refused", "the method is not one that is passed on", status=403)


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(
            body.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refused, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise BadCall("mcp_malformed", "the body is no JSON, or a name stands in it twice") from error
    if not isinstance(document, dict):
        raise BadCall("mcp_malformed", "the body is no single message: batches are refused")
    return document


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("twice")
    return document


def _refused(name: str) -> Any:
    raise ValueError(name)


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(text)
    return number


def outgoing(headers: tuple[tuple[bytes, bytes], ...], message: Message | None) -> list[tuple[bytes, bytes]]:
    """Give the headers that go with a message: those the protocol has, and what it mirrors as it was decided."""
    sent = [(name, value) for name, value in headers if name in _HEADERS or name.startswith(_HEADER_PREFIX)]
    named = {name for name, _ in headers}
    if message is not None and b"mcp-method" in named:
        sent.append((b"mcp-method", message.method.encode("ascii")))
    if message is not None and b"mcp-name" in named and message.shown.isascii() and message.shown:
        sent.append((b"mcp-name", message.shown.encode("ascii")))
    return sent


def glob_covers(glob: str, name: str) -> bool:
    """Whether a scope's glob covers a name. `*` means tools: resources and prompts take a glob that says so."""
    for kind in ("resources/", "prompts/"):
        if name.startswith(kind) and not glob.startswith(kind):
            return False
    regex = ".*".join(re.escape(part) for part in re.split(r"\*+", glob))
    return re.fullmatch(regex, name, re.DOTALL) is not None
