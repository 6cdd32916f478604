"""OpenAI responses (https://platform.openai.com/docs/api-reference/responses), without server-side state.

Nothing is stored, so `previous_response_id`, `conversation` and `background` are refused by name: a client that got a
silent answer to half its conversation would be worse off.
"""

from __future__ import annotations

from typing import Any

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
    RequestError,
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
from gateway_client.gateways.embedded.dialects.chat import openai_error
from gateway_client.gateways.embedded.dialects.fields import Json, bad, compact


def parse(body: Json) -> Ask:
    for name in ("previous_response_id", "conversation", "background", "prompt"):
        if body.get(name):
            raise RequestError(
                f"cannot use {name}: this gateway stores no responses; send the whole conversation as input",
                param=name,
                code="unsupported_parameter",
            )
    messages = _input(body.get("input"))
    if not messages:
        raise bad("input", "a string or a list with at least one item")
    instructions = body.get("instructions")
    if isinstance(instructions, str) and instructions:
        messages.insert(0, Message("system", (Text(instructions),)))
    return Ask(
        dialect=Dialect.OPENAI_RESPONSES,
        model=fields.model_name(body),
        messages=merge(messages),
        tools=tuple(_tools(body)),
        tool_choice=_choice(body.get("tool_choice")),
        max_tokens=fields.optional_int(body, "max_output_tokens"),
        temperature=fields.optional_number(body, "temperature"),
        stream=fields.flag(body, "stream"),
        include_usage=True,
        body=body,
    )


def _input(value: object) -> list[Message]:
    if isinstance(value, str):
        return [Message("user", (Text(value),))]
    if not isinstance(value, list) or len(value) > fields.MESSAGES_MAX:
        raise bad("input", f"a string or a list of at most {fields.MESSAGES_MAX} items")
    return [_item(fields.mapping(item), f"input[{index}]") for index, item in enumerate(value)]


def _item(item: Json, param: str) -> Message:
    match item:
        case {"type": "function_call", "call_id": str(call_id), "name": str(name), "arguments": str(arguments)}:
            return Message("assistant", (ToolCall(call_id, name, arguments),))
        case {"type": "custom_tool_call", "call_id": str(call_id), "name": str(name), "input": str(text)}:
            return Message("assistant", (ToolCall(call_id, name, text, custom=True),))
        case {"type": "function_call_output" | "custom_tool_call_output", "call_id": str(call_id)}:
            parts = _content(item.get("output"), f"{param}.output")
            text = "\n".join(part.text for part in parts if isinstance(part, Text))
            return Message("tool", (ToolResult(call_id, text),))
        case {"role": "user" | "assistant" | "system" as role}:
            return Message(role, tuple(_content(item.get("content"), f"{param}.content")))
        case {"role": "developer"}:
            return Message("system", tuple(_content(item.get("content"), f"{param}.content")))
        case {"type": str(kind)}:
            return Message("assistant", (Other(kind),))  # reasoning, calls of tools the provider runs
        case _:
            raise bad(param, "an item with a role or a type")


def _content(content: object, param: str) -> list[Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return [Text(content)]
    if not isinstance(content, list):
        raise bad(param, "a string or a list of parts")
    parts: list[Part] = []
    for item in content:
        match fields.mapping(item):
            case {"type": "input_text" | "output_text" | "text", "text": str(text)}:
                parts.append(Text(text))
            case {"type": "refusal", "refusal": str(text)}:
                parts.append(Text(text))
            case {"type": str(kind)}:
                parts.append(Other(kind))
            case _:
                raise bad(param, "parts with a type")
    return parts


def _tools(body: Json) -> list[Tool]:
    return [
        Tool(fields.text(item, "name"), fields.string(item.get("description")),
             fields.mapping(item.get("parameters")), custom=item["type"] == "custom")
        for item in fields.objects(body, "tools", most=fields.TOOLS_MAX)
        if item.get("type") in ("function", "custom")
    ]  # fmt: skip


def _choice(choice: Any) -> str:
    match choice:
        case "none" | "required":
            return str(choice)
        case {"type": "function" | "custom", "name": str(name)}:
            return name
        case _:
            return "auto"


def usage(value: Usage) -> Json:
    return fields.with_cost(
        {
            "input_tokens": value.input_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": value.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": value.input_tokens + value.output_tokens,
        },
        value,
    )


def _response(ask: Ask, seed: str, created: int) -> Json:
    body = ask.body
    return {
        "id": f"resp_{seed}",
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": ask.max_tokens,
        "model": ask.model,
        "output": [],
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 1.0 if ask.temperature is None else ask.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto" if body.get("tool_choice") is None else body["tool_choice"],
        "tools": body.get("tools") or [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": None,
        "user": None,
        "metadata": fields.mapping(body.get("metadata")),
    }


def _ended(response: Json, output: list[Json], stop: Stop, used: Usage) -> Json:
    cut = {Stop.LENGTH: "max_output_tokens", Stop.REFUSAL: "content_filter"}.get(stop)
    return {
        **response,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": cut} if cut else None,
        "output": output,
        "usage": usage(used),
    }


def _message_item(item_id: str, text: str) -> Json:
    return {
        "id": item_id,
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [_text_part(text)],
    }


def _text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(item_id: str, call: ToolCall) -> Json:
    kind, field = ("custom_tool_call", "input") if call.custom else ("function_call", "arguments")
    return {
        "id": item_id,
        "type": kind,
        "status": "completed",
        "call_id": call.call_id,
        "name": call.name,
        field: call.arguments,
    }


def _item_id(part: Text | ToolCall, seed: str, index: int) -> str:
    prefix = "msg" if isinstance(part, Text) else "ctc" if part.custom else "fc"
    return f"{prefix}_{seed}{index:02d}"


def _output_item(part: Text | ToolCall, seed: str, index: int) -> Json:
    item_id = _item_id(part, seed, index)
    return _message_item(item_id, part.text) if isinstance(part, Text) else _call_item(item_id, part)


def render(ask: Ask, answer: Answer, seed: str, created: int) -> Json:
    """Return the answer as one object."""
    output = [_output_item(part, seed, index) for index, part in enumerate(answer.parts)]
    return _ended(_response(ask, seed, created), output, answer.stop, answer.usage)


def error(failure: RequestError) -> Json:
    return openai_error(failure)


class Renderer:
    """Events of one streamed response, numbered."""

    def __init__(self, ask: Ask, seed: str, created: int) -> None:
        self._seed = seed
        self._response = _response(ask, seed, created)
        self._sequence = 0
        self._output: list[Json] = []
        self._open: Text | ToolCall | None = None
        self._pieces: list[str] = []

    def events(self, delta: Delta) -> bytes:
        match delta:
            case Begin():
                return self._event("response.created", response=self._response) + self._event(
                    "response.in_progress", response=self._response
                )
            case TextDelta(text):
                start = b"" if isinstance(self._open, Text) else self._start(Text(""))
                self._pieces.append(text)
                return start + self._event(
                    "response.output_text.delta", **self._place(), content_index=0, delta=text, logprobs=[]
                )
            case CallStart(call_id, name, custom):
                return self._start(ToolCall(call_id, name, "", custom=custom))
            case CallDelta(text):
                self._pieces.append(text)
                return self._event(f"{self._call_event()}.delta", **self._place(), delta=text)
            case Done(stop, used):
                closing = self._stop()
                ended = _ended(self._response, self._output, stop, used)
                return closing + self._event(f"response.{ended['status']}", response=ended)

    def _place(self) -> Json:
        assert self._open is not None  # noqa: S101 - a delta follows its start: collect() relies on the same
        return {
            "item_id": _item_id(self._open, self._seed, len(self._output)),
            "output_index": len(self._output),
        }

    def _call_event(self) -> str:
        custom = isinstance(self._open, ToolCall) and self._open.custom
        return "response.custom_tool_call_input" if custom else "response.function_call_arguments"

    def _start(self, part: Text | ToolCall) -> bytes:
        closing = self._stop()
        self._open = part
        index = len(self._output)
        item = {**_output_item(part, self._seed, index), "status": "in_progress"}
        if isinstance(part, ToolCall):
            return closing + self._event("response.output_item.added", output_index=index, item=item)
        item["content"] = []
        return (
            closing
            + self._event("response.output_item.added", output_index=index, item=item)
            + self._event("response.content_part.added", **self._place(), content_index=0, part=_text_part(""))
        )

    def _stop(self) -> bytes:
        part, text, place = self._open, "".join(self._pieces), self._place() if self._open is not None else {}
        self._pieces.clear()
        match part:
            case None:
                return b""
            case Text():
                part = Text(text)
                ending = self._event(
                    "response.output_text.done", **place, content_index=0, text=text, logprobs=[]
                ) + self._event("response.content_part.done", **place, content_index=0, part=_text_part(text))
            case ToolCall(call_id, name, _, custom):
                part = ToolCall(call_id, name, text, custom=custom)
                value = {"input": text} if custom else {"name": name, "arguments": text}
                ending = self._event(f"{self._call_event()}.done", **place, **value)
        index = len(self._output)
        item = _output_item(part, self._seed, index)
        self._open = None
        self._output.append(item)
        return ending + self._event("response.output_item.done", output_index=index, item=item)

    def _event(self, kind: str, /, **value: Any) -> bytes:
        sequence, self._sequence = self._sequence, self._sequence + 1
        return sse.encode(compact({"type": kind, "sequence_number": sequence, **value}), name=kind)

    def failure(self, message: str) -> bytes:
        failed = {**self._response, "status": "failed", "error": {"code": "server_error", "message": message}}
        return self._event("response.failed", response=failed)
