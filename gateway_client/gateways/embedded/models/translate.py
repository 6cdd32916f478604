"""A question as another dialect's request, and that dialect's events as deltas. Pure.

Only what the dialects share is translated: text, tools, calls and their results. Anything else is refused by name
rather than dropped: a model that silently did not see an image would answer wrongly.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from gateway_client.gateways.embedded.conversation import (
    Ask,
    Begin,
    CallDelta,
    CallStart,
    Delta,
    Done,
    Message,
    Other,
    RequestError,
    Stop,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
)
from gateway_client.gateways.embedded.dialects import fields
from gateway_client.gateways.embedded.dialects.chat import FINISHED
from gateway_client.gateways.embedded.dialects.messages import STOPPED

if TYPE_CHECKING:
    from gateway_client.gateways.embedded.dialects.fields import Json
    from gateway_client.gateways.sse import Event

MAX_TOKENS_DEFAULT: Final = 8_192  # the messages dialect demands a number
# Thoughts are the model's own notes: leaving them out changes no fact the model is told.
_LEFT_OUT: Final = frozenset({"thinking", "redacted_thinking", "reasoning", "item_reference"})


def check(ask: Ask) -> None:
    """Raise RequestError where the question holds something that cannot be put in another dialect."""
    for message in ask.messages:
        for part in message.parts:
            if isinstance(part, Other) and part.kind not in _LEFT_OUT:
                raise RequestError(
                    f"cannot send {part.kind or 'an unnamed part'} to model {ask.model}: it is reached in another "
                    "dialect, which takes text and tools only",
                    code="unsupported_content",
                )


def chat_body(ask: Ask, model: str) -> Json:
    """Return the question as a streaming chat completion."""
    check(ask)
    body: Json = {
        "model": model,
        "messages": [shown for message in ask.messages for shown in _chat_messages(message)],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ask.tools:
        body["tools"] = [
            {"type": "function", "function": {"name": tool.name, "description": tool.description,
                                              "parameters": dict(tool.schema) or {"type": "object", "properties": {}}}}
            for tool in ask.tools
        ]  # fmt: skip
        named = ask.tool_choice not in ("auto", "none", "required")
        choice = {"type": "function", "function": {"name": ask.tool_choice}} if named else ask.tool_choice
        body["tool_choice"] = choice
    if ask.max_tokens is not None:
        body["max_tokens"] = ask.max_tokens
    if ask.temperature is not None:
        body["temperature"] = ask.temperature
    return body


def _chat_messages(message: Message) -> list[Json]:
    results: list[Json] = [
        {"role": "tool", "tool_call_id": part.call_id, "content": part.text}
        for part in message.parts
        if isinstance(part, ToolResult)
    ]
    calls = [
        {"id": part.call_id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}}
        for part in message.parts
        if isinstance(part, ToolCall)
    ]
    text = message.text
    if message.role == "tool":
        return results + ([{"role": "user", "content": text}] if text else [])
    shown: Json = {"role": message.role, "content": text if text or not calls else None}
    if calls:
        shown["tool_calls"] = calls
    return [shown] if text or calls else []


def messages_body(ask: Ask, model: str) -> Json:
    """Return the question as a streaming message."""
    check(ask)
    system = "\n\n".join(message.text for message in ask.messages if message.role == "system")
    turns: list[Json] = []
    for message in ask.messages:
        content = [block for part in message.parts if (block := _block(part)) is not None]
        role = "assistant" if message.role == "assistant" else "user"
        if message.role == "system" or not content:
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += content
        else:
            turns.append({"role": role, "content": content})
    body: Json = {
        "model": model,
        "max_tokens": ask.max_tokens or MAX_TOKENS_DEFAULT,
        "messages": turns,
        "stream": True,
    }
    if system:
        body["system"] = system
    if ask.temperature is not None:
        body["temperature"] = ask.temperature
    if ask.tools:
        body["tools"] = [
            {"name": tool.name, "description": tool.description,
             "input_schema": dict(tool.schema) or {"type": "object", "properties": {}}}
            for tool in ask.tools
        ]  # fmt: skip
        plain = {"auto": "auto", "none": "none", "required": "any"}.get(ask.tool_choice)
        body["tool_choice"] = {"type": plain} if plain else {"type": "tool", "name": ask.tool_choice}
    return body


def _block(part: object) -> Json | None:
    match part:
        case Text(text) if text:
            return {"type": "text", "text": text}
        case ToolCall(call_id, name, arguments):
            try:
                value = json.loads(arguments or "{}")
            except ValueError:
                value = None
            return {"type": "tool_use", "id": call_id, "name": name,
                    "input": value if isinstance(value, dict) else {"input": arguments}}  # fmt: skip
        case ToolResult(call_id, text, failed):
            return {"type": "tool_result", "tool_use_id": call_id, "content": text, "is_error": failed}
        case _:
            return None


def _object(event: Event) -> Json:
    if event.cut:
        raise RequestError("cannot read the model's answer: an event is too large", status=502)
    try:
        value: Any = json.loads(event.data)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"cannot read the model's answer: {error}", status=502) from error
    if not isinstance(value, dict):
        raise RequestError("cannot read the model's answer: an event is no object", status=502)
    return value


class ChatReader:
    """Turns the events of a streamed chat completion into deltas."""

    def __init__(self, input_tokens: int) -> None:
        self._input_tokens = input_tokens
        self._output_tokens = 0
        self._begun = False
        self._call = -1
        self._stop = Stop.END

    def read(self, event: Event) -> list[Delta]:
        if not event.data or event.data == b"[DONE]":
            return []
        chunk = _object(event)
        if "error" in chunk:
            failure = fields.mapping(chunk["error"])
            raise RequestError(f"cannot get an answer: {fields.string(failure.get('message'))[:500]}", status=502)
        usage = fields.mapping(chunk.get("usage"))
        self._input_tokens = usage.get("prompt_tokens") or self._input_tokens
        self._output_tokens = usage.get("completion_tokens") or self._output_tokens
        deltas: list[Delta] = [] if self._begun else [Begin(self._input_tokens)]
        self._begun = True
        for choice in chunk.get("choices") or []:
            deltas += self._choice(fields.mapping(choice))
        return deltas

    def _choice(self, choice: Json) -> list[Delta]:
        deltas: list[Delta] = []
        piece = fields.mapping(choice.get("delta"))
        if text := fields.string(piece.get("content")):
            deltas.append(TextDelta(text))
        for call in piece.get("tool_calls") or []:
            function = fields.mapping(fields.mapping(call).get("function"))
            index = call.get("index", 0)
            if index > self._call:
                self._call = index
                deltas.append(CallStart(fields.string(call.get("id")), fields.string(function.get("name"))))
            elif index < self._call:
                raise RequestError("cannot read the model's answer: its tool calls are interleaved", status=502)
            if arguments := fields.string(function.get("arguments")):
                deltas.append(CallDelta(arguments))
        self._stop = FINISHED.get(fields.string(choice.get("finish_reason")), self._stop)
        return deltas

    def done(self) -> Done:
        return Done(self._stop, Usage(self._input_tokens, self._output_tokens))


class MessagesReader:
    """Turns the events of a streamed message into deltas."""

    def __init__(self, input_tokens: int) -> None:
        self._input_tokens = input_tokens
        self._output_tokens = 0
        self._stop = Stop.END

    def read(self, event: Event) -> list[Delta]:
        deltas: list[Delta] = []
        match _object(event) if event.data else {}:
            case {"type": "message_start", "message": {"usage": dict(usage)}}:
                self._take(usage)
                deltas = [Begin(self._input_tokens)]
            case {"type": "content_block_start", "content_block": {"type": "tool_use", "id": call_id, "name": name}}:
                deltas = [CallStart(str(call_id), str(name))]
            case {"type": "content_block_delta", "delta": {"type": "text_delta", "text": str(text)}}:
                deltas = [TextDelta(text)]
            case {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": str(text)}}:
                deltas = [CallDelta(text)] if text else []
            case {"type": "message_delta", "delta": dict(delta), **rest}:
                self._take(fields.mapping(rest.get("usage")))
                self._stop = STOPPED.get(fields.string(delta.get("stop_reason")), self._stop)
            case {"type": "error", "error": {"message": str(message)}}:
                raise RequestError(f"cannot get an answer: {message[:500]}", status=502)
            case _:
                pass  # pings, ends of blocks, thoughts
        return deltas

    def _take(self, usage: Json) -> None:
        cached = sum(usage.get(key) or 0 for key in ("cache_creation_input_tokens", "cache_read_input_tokens"))
        if usage.get("input_tokens"):
            self._input_tokens = usage["input_tokens"] + cached
        self._output_tokens = usage.get("output_tokens") or self._output_tokens

    def done(self) -> Done:
        return Done(self._stop, Usage(self._input_tokens, self._output_tokens))
