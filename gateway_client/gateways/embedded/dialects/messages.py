"""Anthropic messages (https://docs.anthropic.com/en/api/messages)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from gateway_client.egress.request import Dialect
from gateway_client.gateways import sse
from gateway_client.gateways.embedded.conversation import (
    Answer,
    Ask,
    Begin,
    CallDelta,
    CallStart,
    Delta,
    Done,
    Message,
    Other,
    Part,
    Stop,
    Text,
    TextDelta,
    Tool,
    ToolCall,
    ToolResult,
    Usage,
    merge,
)
from gateway_client.gateways.embedded.dialects import fields
from gateway_client.gateways.embedded.dialects.fields import Json, bad, compact

if TYPE_CHECKING:
    from gateway_client.gateways.embedded.conversation import RequestError

_STOP: Final = {
    Stop.END: "end_turn",
    Stop.TOOL: "tool_use",
    Stop.LENGTH: "max_tokens",
    Stop.REFUSAL: "refusal",
}
STOPPED: Final = {
    "end_turn": Stop.END,
    "stop_sequence": Stop.END,
    "pause_turn": Stop.END,
    "tool_use": Stop.TOOL,
    "max_tokens": Stop.LENGTH,
    "model_context_window_exceeded": Stop.LENGTH,
    "refusal": Stop.REFUSAL,
}
_ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


def parse(body: Json, *, counting: bool = False) -> Ask:
    """Return the question; `counting` is count_tokens, which has no max_tokens."""
    items = fields.objects(body, "messages", most=fields.MESSAGES_MAX)
    if not items:
        raise bad("messages", "at least one message")
    max_tokens = fields.optional_int(body, "max_tokens")
    if max_tokens is None and not counting:
        raise bad("max_tokens", "a value: the field is required")
    messages = [_message(item, index) for index, item in enumerate(items)]
    system = _content(body.get("system"), "system")
    if system:
        messages.insert(0, Message("system", tuple(system)))
    return Ask(
        dialect=Dialect.ANTHROPIC_MESSAGES,
        model=fields.model_name(body),
        messages=merge(messages),
        tools=tuple(_tools(body)),
        tool_choice=_choice(body.get("tool_choice")),
        max_tokens=max_tokens,
        temperature=fields.optional_number(body, "temperature"),
        stream=fields.flag(body, "stream"),
        include_usage=True,
        body=body,
    )


def _message(item: Json, index: int) -> Message:
    role = item.get("role")
    parts = _content(item.get("content"), f"messages[{index}].content")
    match role:
        case "assistant" | "system":
            return Message(role, tuple(parts))
        case "user":
            # Results come in a user message, at times with text beside them: the turn is the tool's all the same.
            return Message("tool" if any(isinstance(part, ToolResult) for part in parts) else "user", tuple(parts))
        case _:
            raise bad(f"messages[{index}].role", "user or assistant")


def _content(content: object, param: str) -> list[Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return [Text(content)] if content else []
    if not isinstance(content, list):
        raise bad(param, "a string or a list of blocks")
    return [_block(fields.mapping(item), f"{param}[{index}]") for index, item in enumerate(content)]


def _block(block: Json, param: str) -> Part:
    match block:
        case {"type": "text", "text": str(text)}:
            return Text(text)
        case {"type": "tool_use", "id": str(call_id), "name": str(name), "input": dict(arguments)}:
            return ToolCall(call_id, name, compact(arguments).decode())
        case {"type": "tool_result", "tool_use_id": str(call_id)}:
            parts = _content(block.get("content"), f"{param}.content")
            text = "\n".join(part.text for part in parts if isinstance(part, Text))
            return ToolResult(call_id, text, failed=block.get("is_error") is True)
        case {"type": "text" | "tool_use" | "tool_result"} | {"type": ""}:
            raise bad(param, "a complete block")
        case {"type": str(kind)}:
            return Other(kind)
        case _:
            raise bad(param, "a block with a type")


def _tools(body: Json) -> list[Tool]:
    return [
        Tool(
            fields.text(item, "name"), fields.string(item.get("description")), fields.mapping(item.get("input_schema"))
        )
        for item in fields.objects(body, "tools", most=fields.TOOLS_MAX)
        # Tools with a type of their own run at the provider; no model of ours has one.
        if item.get("type") in (None, "custom")
    ]


def _choice(choice: Any) -> str:
    match choice:
        case {"type": "any"}:
            return "required"
        case {"type": "none"}:
            return "none"
        case {"type": "tool", "name": str(name)}:
            return name
        case _:
            return "auto"


def usage(value: Usage) -> Json:
    return fields.with_cost(
        {
            "input_tokens": value.input_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": value.output_tokens,
        },
        value,
    )


def _input(arguments: str) -> Json:
    """Return the arguments as the object this dialect demands; free text goes into `input`."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {"input": arguments}
    return value if isinstance(value, dict) else {"input": value}


def render(ask: Ask, answer: Answer, seed: str, created: int) -> Json:  # noqa: ARG001 - the three dialects are called alike
    """Return the answer as one object."""
    content: list[Json] = []
    for part in answer.parts:
        match part:
            case Text(text):
                content.append({"type": "text", "text": text})
            case ToolCall(call_id, name, arguments):
                content.append({"type": "tool_use", "id": call_id, "name": name, "input": _input(arguments)})
    return {
        "id": f"msg_{seed}",
        "type": "message",
        "role": "assistant",
        "model": ask.model,
        "content": content,
        "stop_reason": _STOP[answer.stop],
        "stop_sequence": None,
        "usage": usage(answer.usage),
    }


def error(failure: RequestError) -> Json:
    kind = _ERROR_TYPES.get(failure.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": failure.message}}


class Renderer:
    """Events of one streamed message."""

    def __init__(self, ask: Ask, seed: str, created: int) -> None:  # noqa: ARG002 - the three dialects are called alike
        self._ask = ask
        self._seed = seed
        self._index = -1
        self._open: str | None = None

    def events(self, delta: Delta) -> bytes:
        match delta:
            case Begin(input_tokens):
                return self._begin(input_tokens)
            case TextDelta(text):
                start = b"" if self._open == "text" else self._start({"type": "text", "text": ""})
                return start + self._piece({"type": "text_delta", "text": text})
            case CallStart(call_id, name):
                return self._start({"type": "tool_use", "id": call_id, "name": name, "input": {}})
            case CallDelta(text):
                return self._piece({"type": "input_json_delta", "partial_json": text})
            case Done(stop, used):
                last = {"delta": {"stop_reason": _STOP[stop], "stop_sequence": None}, "usage": usage(used)}
                return self._stop() + self._event("message_delta", last) + self._event("message_stop", {})

    def _begin(self, input_tokens: int) -> bytes:
        message: Json = {
            "id": f"msg_{self._seed}",
            "type": "message",
            "role": "assistant",
            "model": self._ask.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage(Usage(input_tokens, 1)),
        }
        return self._event("message_start", {"message": message}) + self._event("ping", {})

    def _start(self, block: Json) -> bytes:
        closing = self._stop()
        self._index += 1
        self._open = block["type"]
        return closing + self._event("content_block_start", {"index": self._index, "content_block": block})

    def _piece(self, delta: Json) -> bytes:
        return self._event("content_block_delta", {"index": self._index, "delta": delta})

    def _stop(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return self._event("content_block_stop", {"index": self._index})

    def _event(self, name: str, value: Json) -> bytes:
        return sse.encode(compact({"type": name, **value}), name=name)

    def failure(self, message: str) -> bytes:
        return self._event("error", {"error": {"type": "api_error", "message": message}})
