"""OpenAI chat completions (https://platform.openai.com/docs/api-reference/chat)."""

from __future__ import annotations

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
    Role,
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

_ROLES: Final[dict[str, Role]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_FINISH: Final = {
    Stop.END: "stop",
    Stop.TOOL: "tool_calls",
    Stop.LENGTH: "length",
    Stop.REFUSAL: "content_filter",
}
FINISHED: Final = {
    "stop": Stop.END,
    "tool_calls": Stop.TOOL,
    "function_call": Stop.TOOL,
    "length": Stop.LENGTH,
    "content_filter": Stop.REFUSAL,
}


def parse(body: Json) -> Ask:
    messages = fields.objects(body, "messages", most=fields.MESSAGES_MAX)
    if not messages:
        raise bad("messages", "at least one message")
    return Ask(
        dialect=Dialect.OPENAI_CHAT,
        model=fields.model_name(body),
        messages=merge([_message(item, index) for index, item in enumerate(messages)]),
        tools=tuple(_tools(body)),
        tool_choice=_choice(body.get("tool_choice")),
        max_tokens=fields.optional_int(body, "max_completion_tokens") or fields.optional_int(body, "max_tokens"),
        temperature=fields.optional_number(body, "temperature"),
        stream=fields.flag(body, "stream"),
        include_usage=fields.mapping(body.get("stream_options")).get("include_usage") is True,
        body=body,
    )


def _message(item: Json, index: int) -> Message:
    role = _ROLES.get(fields.string(item.get("role")))
    if role is None:
        raise bad(f"messages[{index}].role", f"one of {', '.join(_ROLES)}")
    parts = _content(item.get("content"), f"messages[{index}].content")
    if role == "tool":
        text = "\n".join(part.text for part in parts if isinstance(part, Text))
        return Message("tool", (ToolResult(fields.string(item.get("tool_call_id")), text),))
    if role == "assistant":
        parts += [_call(call) for call in fields.objects(item, "tool_calls", most=fields.TOOLS_MAX)]
    return Message(role, tuple(parts))


def _content(content: object, param: str) -> list[Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return [Text(content)]
    if not isinstance(content, list):
        raise bad(param, "a string or a list of parts")
    parts: list[Part] = []
    for item in content:
        kind = fields.string(fields.mapping(item).get("type"))
        text = fields.mapping(item).get("refusal" if kind == "refusal" else "text")
        parts.append(Text(text) if kind in {"text", "refusal"} and isinstance(text, str) else Other(kind))
    return parts


def _call(call: Json) -> ToolCall:
    if call.get("type") == "custom":
        custom = fields.mapping(call.get("custom"))
        return ToolCall(fields.string(call.get("id")), fields.string(custom.get("name")),
                        fields.string(custom.get("input")), custom=True)  # fmt: skip
    function = fields.mapping(call.get("function"))
    return ToolCall(
        fields.string(call.get("id")), fields.string(function.get("name")), fields.string(function.get("arguments"))
    )


def _tools(body: Json) -> list[Tool]:
    tools = []
    for index, item in enumerate(fields.objects(body, "tools", most=fields.TOOLS_MAX)):
        kind = fields.string(item.get("type"))
        if kind not in {"function", "custom"}:
            continue  # a tool the provider would run itself: no model of ours has one
        inner = fields.mapping(item.get(kind))
        if not fields.string(inner.get("name")):
            raise bad(f"tools[{index}].{kind}.name", "a name")
        tools.append(
            Tool(inner["name"], fields.string(inner.get("description")), fields.mapping(inner.get("parameters")),
                 custom=kind == "custom")
        )  # fmt: skip
    return tools


def _choice(choice: Any) -> str:
    match choice:
        case None:
            return "auto"
        case "auto" | "none" | "required":
            return str(choice)
        case {"function": {"name": str(name)}} | {"custom": {"name": str(name)}}:
            return name
        case _:
            return "auto"


def usage(value: Usage) -> Json:
    return fields.with_cost(
        {
            "prompt_tokens": value.input_tokens,
            "completion_tokens": value.output_tokens,
            "total_tokens": value.input_tokens + value.output_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
        value,
    )


def render(ask: Ask, answer: Answer, seed: str, created: int) -> Json:
    """Return the answer as one object."""
    text = "".join(part.text for part in answer.parts if isinstance(part, Text))
    calls = [part for part in answer.parts if isinstance(part, ToolCall)]
    message: Json = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if calls:
        message["tool_calls"] = [
            _shown_call(call.call_id, call.name, call.arguments, custom=call.custom) for call in calls
        ]
    return {
        "id": f"chatcmpl-{seed}",
        "object": "chat.completion",
        "created": created,
        "model": ask.model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": _FINISH[answer.stop]}],
        "usage": usage(answer.usage),
        "system_fingerprint": None,
    }


def _shown_call(call_id: str, name: str, arguments: str, *, custom: bool) -> Json:
    if custom:
        return {"id": call_id, "type": "custom", "custom": {"name": name, "input": arguments}}
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def error(failure: RequestError) -> Json:
    return openai_error(failure)


def openai_error(failure: RequestError) -> Json:
    kinds = {401: "authentication_error", 404: "invalid_request_error", 429: "rate_limit_error"}
    kind = kinds.get(failure.status, "server_error" if failure.status >= 500 else "invalid_request_error")  # noqa: PLR2004 - HTTP's own border
    return {"error": {"message": failure.message, "type": kind, "param": failure.param, "code": failure.code}}


class Renderer:
    """Chunks of one streamed chat completion."""

    def __init__(self, ask: Ask, seed: str, created: int) -> None:
        self._ask = ask
        self._head = {
            "id": f"chatcmpl-{seed}",
            "object": "chat.completion.chunk",
            "created": created,
            "model": ask.model,
            "system_fingerprint": None,
        }
        self._call = -1
        self._custom = False

    def events(self, delta: Delta) -> bytes:
        match delta:
            case Begin():
                return self._chunk({"role": "assistant", "content": "", "refusal": None})
            case TextDelta(text):
                return self._chunk({"content": text})
            case CallStart(call_id, name, custom):
                self._call += 1
                self._custom = custom
                shown = _shown_call(call_id, name, "", custom=custom)
                return self._chunk({"tool_calls": [{"index": self._call, **shown}]})
            case CallDelta(text):
                piece = {"custom": {"input": text}} if self._custom else {"function": {"arguments": text}}
                return self._chunk({"tool_calls": [{"index": self._call, **piece}]})
            case Done(stop, used):
                return self._end(stop, used)

    def _end(self, stop: Stop, used: Usage) -> bytes:
        if not self._ask.include_usage:
            # In the last chunk rather than one of its own: a client that did not ask for usage reads choices[0].
            return self._chunk({}, finish=_FINISH[stop], usage=usage(used)) + sse.encode(b"[DONE]")
        last = self._chunk({}, finish=_FINISH[stop])
        own = {**self._head, "choices": [], "usage": usage(used)}
        return last + sse.encode(compact(own)) + sse.encode(b"[DONE]")

    def _chunk(self, delta: Json, *, finish: str | None = None, usage: Json | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        chunk: Json = {**self._head, "choices": [choice]}
        if usage is not None or self._ask.include_usage:
            chunk["usage"] = usage
        return sse.encode(compact(chunk))

    def failure(self, message: str) -> bytes:
        shown = {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
        return sse.encode(compact(shown))
