"""Self-service as an MCP server: one JSON-RPC message in, an answer or one typed self-service request out. Pure.

Streamable HTTP (https://modelcontextprotocol.io/specification/2025-11-25/basic/transports) in its plainest form: a
message a POST, an answer as JSON, no session, no stream from here to the agent. The worker reads these bytes, so that
the daemon gets the same few typed requests as from `/.stockade/v1/`. There is no tool that grants, and there cannot be
one: those requests can only ask.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from gateway_client.egress.decide import SELF_PREFIX

if TYPE_CHECKING:
    from gateway_client.egress.decide import Refuse, Reply

MCP_PATH: Final = "/.stockade/mcp"
VERSIONS: Final = ("2025-11-25", "2025-06-18", "2025-03-26")
"""Newest first; of these the handshake chooses, and nothing here differs between them."""
API_VERSION: Final = "1"
"""Of these tools: the v1 of `/.stockade/v1/`."""
ORIGINS: Final = ("http://gateway.internal:3128", "http://gateway.internal")

message_bytes_max: Final = 16 * 1024
id_chars_max: Final = 128
wait_seconds_max: Final = 60
scope_chars_max: Final = 2048
reason_chars_max: Final = 500

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
UNSUPPORTED_VERSION: Final = -32022

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)

Json = dict[str, Any]
Id = str | int | None


@dataclass(frozen=True, slots=True)
class Answered:
    """The worker's own answer; without a body where the message wants none."""

    status: int
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call as the self-service request it stands for; `answer` makes its result."""

    message_id: Id
    method: str
    path: str
    query: str = ""
    body: str = ""

    def answer(self, verdict: Reply | Refuse) -> Answered:
        """Give the tool's result: what the daemon said, as text and as data; a refusal is the tool's error."""
        said: Json
        if hasattr(verdict, "body"):
            said, failed = verdict.body, False
        else:
            said, failed = {"reason_code": str(verdict.reason_code), "detail": verdict.detail}, True
        text = json.dumps(said)
        return _result(
            self.message_id,
            {"content": [{"type": "text", "text": text}], "structuredContent": said, "isError": failed},
        )


@dataclass(frozen=True, slots=True)
class _Text:
    """An argument that is text."""

    chars_max: int
    says: str
    required: bool = False


@dataclass(frozen=True, slots=True)
class _Whole:
    """An argument that is a whole number."""

    most: int
    says: str
    required: bool = False


@dataclass(frozen=True, slots=True)
class _Tool:
    says: str
    arguments: dict[str, _Text | _Whole]
    reads_only: bool = True

    def schema(self) -> Json:
        properties: Json = {}
        for name, kind in self.arguments.items():
            match kind:
                case _Text():
                    properties[name] = {"type": "string", "maxLength": kind.chars_max, "description": kind.says}
                case _Whole():
                    properties[name] = {
                        "type": "integer",
                        "minimum": 0,
                        "maximum": kind.most,
                        "description": kind.says,
                    }
        required = [name for name, kind in self.arguments.items() if kind.required]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


TOOLS: Final = {
    "my_scopes": _Tool(
        "List the scopes you hold: what you may reach, until when, how often. Comes in pages: `next` is for `after`.",
        {"after": _Text(64, "the grant_id to go on after")},
    ),
    "request_scope": _Tool(
        "Ask a human for a scope you lack, for example http:GET:https://api.example.com/v1/**. Ask for as little as "
        "you need and say why. Gives a request_id; the answer comes later: use wait_for_request.",
        {
            "scope": _Text(scope_chars_max, "as a denial names it", required=True),
            "reason": _Text(reason_chars_max, "why you need it, in a sentence", required=True),
        },
        reads_only=False,
    ),
    "wait_for_request": _Tool(
        "Wait for the answer to a request of yours. Its state is pending, approved, denied or expired; `reason` is the "
        "human's.",
        {
            "request_id": _Text(64, "from request_scope", required=True),
            "wait_seconds": _Whole(wait_seconds_max, "how long to wait at most; 30 where left out"),
        },
    ),
    "my_budget": _Tool("Tell what is left of your budget; null is without limit.", {}),
}


class _Bad(ValueError):  # noqa: N818 - named for what it says
    def __init__(
        self, status: int, code: int, message: str, *, message_id: Id = None, data: Json | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message_id, self.data = status, code, message_id, data


def read(body: bytes, *, version: str | None, origin: str | None) -> Answered | Call:
    """Read one message. `version` and `origin` are the headers MCP-Protocol-Version and Origin, None without."""
    try:
        return _read(body, version, origin)
    except _Bad as bad:
        error: Json = {"code": bad.code, "message": str(bad)}
        if bad.data is not None:
            error["data"] = bad.data
        return Answered(bad.status, json.dumps({"jsonrpc": "2.0", "id": bad.message_id, "error": error}).encode())


def _read(body: bytes, version: str | None, origin: str | None) -> Answered | Call:
    # The specification asks for it (DNS rebinding); a browser inside the sandbox is the one who could send another.
    if origin is not None and origin not in ORIGINS:
        raise _Bad(403, INVALID_REQUEST, "this Origin may not use the server")
    message = _message(body)
    message_id = message.get("id")
    if version is not None and version not in VERSIONS:
        raise _Bad(
            400,
            UNSUPPORTED_VERSION,
            "this version of the protocol is not served",
            message_id=message_id,
            data={"supported": list(VERSIONS), "requested": version[:32]},
        )
    method, params = message.get("method"), message.get("params", {})
    if method is None and ("result" in message or "error" in message):
        return Answered(202)  # an answer, and nothing was asked of the agent
    if not isinstance(method, str) or not isinstance(params, dict):
        raise _Bad(400, INVALID_REQUEST, "a method is text and its params are an object", message_id=message_id)
    if "id" not in message:
        return Answered(202)  # a notification: there is nothing that one could change here
    if message_id is None:
        raise _Bad(400, INVALID_REQUEST, "the id of a request is not null")
    return _do(message_id, method, params)


def _message(body: bytes) -> Json:
    try:
        message = json.loads(body, object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _Bad(400, PARSE_ERROR, "the body is not one JSON message") from error
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
        raise _Bad(400, INVALID_REQUEST, "the body is not one JSON-RPC 2.0 message; there are no batches")
    if not _is_id(message.get("id")):
        raise _Bad(400, INVALID_REQUEST, f"an id is a whole number or at most {id_chars_max} characters")
    return message


def _do(message_id: Id, method: str, params: Json) -> Answered | Call:
    match method:
        case "initialize":
            return _result(message_id, _greeting(params))
        case "ping":
            return _result(message_id, {})
        case "tools/list":
            return _result(message_id, {"tools": [_listed(name, tool) for name, tool in TOOLS.items()]})
        case "tools/call":
            return _call(message_id, params)
        case _:
            raise _Bad(200, METHOD_NOT_FOUND, "there is no such method here", message_id=message_id)


def _greeting(params: Json) -> Json:
    wanted = params.get("protocolVersion")
    return {
        "protocolVersion": wanted if wanted in VERSIONS else VERSIONS[0],
        "capabilities": {"tools": {"listChanged": False}},
        "serverInfo": {"name": "stockade", "version": API_VERSION},
        "instructions": "Ask here for what you are denied. A human answers; nothing here grants anything by itself.",
    }


def _listed(name: str, tool: _Tool) -> Json:
    return {
        "name": name,
        "description": tool.says,
        "inputSchema": tool.schema(),
        "annotations": {"readOnlyHint": tool.reads_only, "destructiveHint": False, "openWorldHint": False},
    }


def _call(message_id: Id, params: Json) -> Call:
    name, given = params.get("name"), params.get("arguments", {})
    tool = TOOLS.get(name) if isinstance(name, str) else None
    if tool is None:
        raise _Bad(200, INVALID_PARAMS, "there is no such tool", message_id=message_id)
    arguments = _arguments(tool, given, message_id)
    match name:
        case "my_scopes":
            after = arguments.get("after", "")
            query = f"after={quote(after, safe='')}" if after else ""
            return Call(message_id, "GET", f"{SELF_PREFIX}scopes", query=query)
        case "my_budget":
            return Call(message_id, "GET", f"{SELF_PREFIX}budget")
        case "request_scope":
            return Call(message_id, "POST", f"{SELF_PREFIX}requests", body=json.dumps(arguments))
        case _:
            request_id = arguments["request_id"]
            if _ID.fullmatch(request_id) is None:
                raise _Bad(200, INVALID_PARAMS, "this is no request_id", message_id=message_id)
            wait = arguments.get("wait_seconds", 30)
            return Call(message_id, "GET", f"{SELF_PREFIX}requests/{request_id}", query=f"wait={wait}s")


def _arguments(tool: _Tool, given: object, message_id: Id) -> Json:
    if given is None:
        given = {}
    if not isinstance(given, dict) or not given.keys() <= tool.arguments.keys():
        raise _Bad(200, INVALID_PARAMS, "the tool has no such arguments", message_id=message_id)
    for name, kind in tool.arguments.items():
        value = given.get(name)
        if value is None:
            if kind.required:
                raise _Bad(200, INVALID_PARAMS, f"{name} is missing", message_id=message_id)
            continue
        match kind:
            case _Text():
                fits = isinstance(value, str) and 0 < len(value) <= kind.chars_max
            case _Whole():
                fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= kind.most
        if not fits:
            raise _Bad(200, INVALID_PARAMS, f"{name} is of the wrong type or too large", message_id=message_id)
    return {name: value for name, value in given.items() if value is not None}


def _result(message_id: Id, result: Json) -> Answered:
    return Answered(200, json.dumps({"jsonrpc": "2.0", "id": message_id, "result": result}).encode())


def _is_id(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= id_chars_max
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)


def _object(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")  # two readers would see two messages
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
