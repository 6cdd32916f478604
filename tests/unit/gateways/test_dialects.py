"""The three dialects: what is streamed is what is answered whole, and no body makes a parser fall over."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    RequestError,
    Stop,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
    collect,
)
from gateway_client.gateways.embedded.dialects import MODULES
from gateway_client.gateways.embedded.models import translate

NAMES = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
OBJECTS = st.dictionaries(NAMES, st.text(max_size=8) | st.integers(), max_size=3).map(json.dumps)


def without_neighbouring_texts(parts: list[Text | ToolCall]) -> tuple[Text | ToolCall, ...]:
    """Drop a text that follows a text: streamed, the two are one."""
    before = [None, *parts]
    return tuple(
        part
        for last, part in zip(before, parts, strict=False)
        if not (isinstance(part, Text) and isinstance(last, Text))
    )


PARTS = st.lists(
    st.one_of(
        st.builds(Text, st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)),
        st.builds(ToolCall, st.from_regex(r"call_[a-z0-9]{6}", fullmatch=True), NAMES, OBJECTS),
    ),
    max_size=5,
).map(without_neighbouring_texts)
ANSWERS = st.builds(
    Answer,
    PARTS,
    st.sampled_from(list(Stop)),
    st.builds(Usage, st.integers(1, 10**6), st.integers(1, 10**6), st.none() | st.floats(0, 100)),
)


def deltas(answer: Answer, size: int) -> list[Delta]:
    pieces: list[Delta] = [Begin(answer.usage.input_tokens)]
    for part in answer.parts:
        text = part.text if isinstance(part, Text) else part.arguments
        if isinstance(part, ToolCall):
            pieces.append(CallStart(part.call_id, part.name, part.custom))
        for at in range(0, len(text), size):
            piece = text[at : at + size]
            pieces.append(TextDelta(piece) if isinstance(part, Text) else CallDelta(piece))
    return [*pieces, Done(answer.stop, answer.usage)]


def streamed(dialect: Dialect, answer: Answer, size: int, **more: Any) -> list[sse.Event]:
    renderer = MODULES[dialect].Renderer(Ask(dialect, "m", (), **more), "0" * 24, 1)
    data = b"".join(renderer.events(delta) for delta in deltas(answer, size))
    splitter = sse.Splitter()
    return splitter.feed(data) + splitter.finish()


@given(ANSWERS, st.integers(1, 7), st.booleans())
async def test_chat_stream_holds_the_answer(answer: Answer, size: int, include_usage: bool) -> None:  # noqa: FBT001 - hypothesis fills it
    events = streamed(Dialect.OPENAI_CHAT, answer, size, include_usage=include_usage)
    assert events[-1].data == b"[DONE]"
    reader = translate.ChatReader(0)
    read = [delta for event in events for delta in reader.read(event)]
    assert isinstance(read[0], Begin)

    async def again() -> Any:
        for delta in [*read, reader.done()]:
            yield delta

    found = await collect(again())
    # Chat has one text beside the calls, so order between the two is not kept.
    assert "".join(p.text for p in found.parts if isinstance(p, Text)) == "".join(
        p.text for p in answer.parts if isinstance(p, Text)
    )
    assert [p for p in found.parts if isinstance(p, ToolCall)] == [p for p in answer.parts if isinstance(p, ToolCall)]
    assert found.stop is answer.stop
    assert (found.usage.input_tokens, found.usage.output_tokens) == (
        answer.usage.input_tokens,
        answer.usage.output_tokens,
    )
    for event in events[:-1]:
        assert json.loads(event.data)["choices"] or include_usage


@given(ANSWERS, st.integers(1, 7))
async def test_messages_stream_holds_the_answer(answer: Answer, size: int) -> None:
    events = streamed(Dialect.ANTHROPIC_MESSAGES, answer, size)
    assert [event.name for event in events] == [json.loads(event.data)["type"] for event in events]
    assert (events[0].name, events[-1].name) == ("message_start", "message_stop")
    blocks = [json.loads(e.data)["index"] for e in events if e.name in ("content_block_start", "content_block_stop")]
    assert blocks == [index for number in range(len(answer.parts)) for index in (number, number)]
    reader = translate.MessagesReader(0)
    read = [delta for event in events for delta in reader.read(event)]

    async def again() -> Any:
        for delta in [*read, reader.done()]:
            yield delta

    found = await collect(again())
    assert found.parts == answer.parts
    assert found.stop is answer.stop


@given(ANSWERS, st.integers(1, 7))
def test_responses_stream_ends_with_the_whole_answer(answer: Answer, size: int) -> None:
    events = [json.loads(event.data) for event in streamed(Dialect.OPENAI_RESPONSES, answer, size)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    whole = MODULES[Dialect.OPENAI_RESPONSES].render(Ask(Dialect.OPENAI_RESPONSES, "m", ()), answer, "0" * 24, 1)
    assert events[-1]["response"] == whole
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == whole["output"]
    added = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
    assert added == [item["id"] for item in whole["output"]]
    assert len(set(added)) == len(added)


def test_custom_tool_call_keeps_its_free_text() -> None:
    answer = Answer((ToolCall("call_1", "apply_patch", "*** Begin", custom=True),), Stop.TOOL, Usage(1, 1))
    events = [json.loads(event.data) for event in streamed(Dialect.OPENAI_RESPONSES, answer, 4)]
    item = events[-1]["response"]["output"][0]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "apply_patch", "*** Begin")
    assert [e["delta"] for e in events if e["type"] == "response.custom_tool_call_input.delta"] == ["*** ", "Begi", "n"]


CONVERSATION: dict[Dialect, dict[str, Any]] = {
    Dialect.OPENAI_CHAT: {
        "model": "m",
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "List"}]},
            {"role": "assistant", "content": None,
             "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "ls", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "a.log"},
        ],
        "tools": [{"type": "function", "function": {"name": "ls", "parameters": {"type": "object"}}}],
    },
    Dialect.OPENAI_RESPONSES: {
        "model": "m",
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "List"}]},
            {"type": "function_call", "call_id": "c1", "name": "ls", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "a.log"},
        ],
        "tools": [{"type": "function", "name": "ls", "parameters": {"type": "object"}}, {"type": "web_search"}],
    },
    Dialect.ANTHROPIC_MESSAGES: {
        "model": "m",
        "max_tokens": 5,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "List"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "ls", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1",
                                          "content": [{"type": "text", "text": "a.log"}]}]},
        ],
        "tools": [{"name": "ls", "input_schema": {"type": "object"}}, {"type": "web_search_20250305", "name": "w"}],
    },
}  # fmt: skip


@pytest.mark.parametrize("dialect", CONVERSATION)
def test_one_conversation_is_one_value_in_every_dialect(dialect: Dialect) -> None:
    parsed = MODULES[dialect].parse(CONVERSATION[dialect])
    assert [(message.role, message.text) for message in parsed.messages] == [
        ("system", "Be brief."), ("user", "List"), ("assistant", ""), ("tool", ""),
    ]  # fmt: skip
    (call,) = parsed.messages[2].parts
    assert isinstance(call, ToolCall)
    assert (call.call_id, call.name, json.loads(call.arguments)) == ("c1", "ls", {"a": 1})
    assert parsed.messages[3].parts == (ToolResult("c1", "a.log"),)
    assert [(tool.name, tool.schema) for tool in parsed.tools] == [("ls", {"type": "object"})]


@pytest.mark.parametrize("dialect", CONVERSATION)
def test_translation_to_another_dialect_and_back_keeps_the_conversation(dialect: Dialect) -> None:
    parsed = MODULES[dialect].parse(CONVERSATION[dialect])
    chat = MODULES[Dialect.OPENAI_CHAT].parse(translate.chat_body(parsed, "m"))
    messages = MODULES[Dialect.ANTHROPIC_MESSAGES].parse(translate.messages_body(parsed, "m"))

    def normal(ask: Ask) -> list[Any]:
        return [
            (message.role, [(p.name, json.loads(p.arguments)) if isinstance(p, ToolCall) else p for p in message.parts])
            for message in ask.messages
        ]

    assert normal(chat) == normal(messages) == normal(parsed)


KEYS = [
    "model", "messages", "input", "role", "content", "type", "text", "tools", "name", "function", "tool_calls",
    "call_id", "id", "arguments", "output", "system", "max_tokens", "stream", "tool_choice", "tool_use_id",
]  # fmt: skip
WORDS = ["user", "assistant", "tool", "function", "text", "tool_use", "tool_result", "function_call", "custom"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(WORDS) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=25,
)


@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=8), st.sampled_from(list(MODULES)))
def test_any_body_is_a_question_or_an_error_of_the_dialect(body: dict[str, Any], dialect: Dialect) -> None:
    body = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}], "input": "x", **body}
    failure = None
    try:
        assert MODULES[dialect].parse(body).messages
    except RequestError as error:
        failure = error
    if failure is not None:
        assert failure.status == 400
        assert failure.message.startswith("cannot ")
        assert MODULES[dialect].error(failure)["error"]["message"] == failure.message


def test_state_the_gateway_does_not_keep_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="cannot use previous_response_id"):
        MODULES[Dialect.OPENAI_RESPONSES].parse({"model": "m", "input": "x", "previous_response_id": "resp_1"})
