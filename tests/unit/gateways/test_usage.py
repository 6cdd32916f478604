"""What an answer used is read right, however its bytes are split, whatever else is in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_client.egress.request import Dialect
from gateway_client.gateways import prices, sse
from gateway_client.gateways.prices import Price, PriceTable
from gateway_client.gateways.usage import BODY_BYTES_MAX, UsageMeter

CHAT_STREAM = (
    b'data: {"id":"c","model":"gpt-x","choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    b'data: {"id":"c","model":"gpt-x","choices":[{"delta":{"content":"hello w\xc3\xb6rld"}}]}\n\n'
    b': a comment\n\ndata: {"id":"c","choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7,"cost":0.25}}\n\n'
    b"data: [DONE]\n\n"
)
RESPONSES_STREAM = (
    b'event: response.created\r\ndata: {"type":"response.created","response":{"model":"gpt-x","usage":null}}\r\n\r\n'
    b'event: response.output_text.delta\r\ndata: {"type":"response.output_text.delta","delta":"hi"}\r\n\r\n'
    b'event: response.completed\r\ndata: {"type":"response.completed","response":{"model":"gpt-x",'
    b'"usage":{"input_tokens":11,"output_tokens":7,"cost":0.25}}}\r\n\r\n'
)
MESSAGES_STREAM = (
    b'event: message_start\ndata: {"type":"message_start","message":{"model":"gpt-x","usage":{"input_tokens":4,'
    b'"cache_read_input_tokens":5,"cache_creation_input_tokens":2,"output_tokens":1}}}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"hi"}}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
    b'"usage":{"output_tokens":7,"cost":0.25}}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
)
STREAMS = {
    Dialect.OPENAI_CHAT: CHAT_STREAM,
    Dialect.OPENAI_RESPONSES: RESPONSES_STREAM,
    Dialect.ANTHROPIC_MESSAGES: MESSAGES_STREAM,
}


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


@pytest.mark.parametrize("dialect", STREAMS)
@given(cuts=st.lists(st.integers(0, 10_000), max_size=40))
def test_any_split_of_a_stream_says_the_same(dialect: Dialect, cuts: list[int]) -> None:
    meter = UsageMeter(dialect, streaming=True)
    for piece in split(STREAMS[dialect], cuts):
        meter.feed(piece)
    used = meter.result()
    assert used is not None
    assert (used.model, used.input_tokens, used.output_tokens, used.cost_usd) == ("gpt-x", 11, 7, 0.25)
    assert not used.estimated


@given(
    events=st.lists(st.tuples(st.sampled_from(["", "a"]), st.text("ab\u00e9", max_size=9)), max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(0, 10_000), max_size=20),
)
def test_events_do_not_depend_on_the_split(events: list[tuple[str, str]], end: str, cuts: list[int]) -> None:
    stream = "".join(
        (f"event: {name}{end}" if name else "") + f"data: {data}{end}{end}" for name, data in events
    ).encode()  # fmt: skip
    splitter = sse.Splitter()
    found = [event for piece in split(stream, cuts) for event in splitter.feed(piece)] + splitter.finish()
    assert [(event.name, event.data.decode()) for event in found] == events
    assert b"".join(event.raw for event in found) == stream


@pytest.mark.parametrize(
    ("dialect", "usage"),
    [
        (Dialect.OPENAI_CHAT, {"usage": {"prompt_tokens": 11, "completion_tokens": 7}}),
        (Dialect.OPENAI_COMPLETIONS, {"usage": {"prompt_tokens": 11, "completion_tokens": 7}}),
        (Dialect.OPENAI_EMBEDDINGS, {"usage": {"prompt_tokens": 11, "total_tokens": 11}}),
        (Dialect.OPENAI_RESPONSES, {"usage": {"input_tokens": 11, "output_tokens": 7}}),
        (Dialect.ANTHROPIC_MESSAGES, {"usage": {"input_tokens": 9, "cache_read_input_tokens": 2, "output_tokens": 7}}),
        (Dialect.GEMINI_GENERATE, {"usageMetadata": {"promptTokenCount": 11, "candidatesTokenCount": 7}}),
    ],
)
def test_whole_answer(dialect: Dialect, usage: dict[str, Any]) -> None:
    meter = UsageMeter(dialect, streaming=False, model="asked")
    meter.feed(json.dumps({"model": "answered", **usage}).encode())
    used = meter.result()
    assert used is not None
    assert (used.model, used.input_tokens) == ("asked", 11)
    assert used.output_tokens == (0 if dialect is Dialect.OPENAI_EMBEDDINGS else 7)
    assert not used.estimated


def test_stream_without_usage_is_estimated_from_its_text() -> None:
    meter = UsageMeter(Dialect.OPENAI_CHAT, streaming=True, request_bytes=400)
    meter.feed(b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\ndata: [DONE]\n\n' % (b"x" * 41))
    used = meter.result()
    assert used is not None
    assert (used.input_tokens, used.output_tokens, used.estimated) == (100, 11, True)


def test_stream_cut_before_its_end_still_counts() -> None:
    for dialect, stream in STREAMS.items():
        meter = UsageMeter(dialect, streaming=True, request_bytes=40)
        meter.feed(stream[: stream.index(b"hello") + 60 if b"hello" in stream else stream.index(b"hi") + 10])
        used = meter.result()
        assert used is not None
        assert used.estimated
        assert used.input_tokens > 0


def test_cost_of_the_header_wins_over_the_body() -> None:
    meter = UsageMeter(Dialect.OPENAI_CHAT, streaming=True)
    meter.feed(CHAT_STREAM)
    used = meter.result(cost_usd=0.5)
    assert used is not None
    assert (used.cost_usd, used.estimated) == (0.5, False)


def test_price_table_estimates_where_nobody_says() -> None:
    table = PriceTable({"gpt-x": Price(1_000_000, 2_000_000)})
    meter = UsageMeter(Dialect.OPENAI_CHAT, streaming=False, model="openai/gpt-x-2026-01-31", prices=table)
    meter.feed(b'{"usage":{"prompt_tokens":1,"completion_tokens":2}}')
    used = meter.result()
    assert used is not None
    assert (used.cost_usd, used.estimated) == (5.0, True)


@pytest.mark.parametrize("streaming", [False, True])
def test_refused_call_used_nothing(*, streaming: bool) -> None:
    meter = UsageMeter(Dialect.OPENAI_CHAT, streaming, request_bytes=4000)
    meter.feed(b'{"error":{"message":"slow down","type":"rate_limit_error"}}')
    used = meter.result()
    assert used is not None
    assert (used.input_tokens, used.output_tokens, used.cost_usd) == (0, 0, 0.0)


@pytest.mark.parametrize("dialect", [None, Dialect.MODELS, Dialect.ANTHROPIC_COUNT_TOKENS])
def test_endpoint_without_a_model_uses_nothing(dialect: Dialect | None) -> None:
    meter = UsageMeter(dialect, streaming=False, request_bytes=4000)
    meter.feed(b'{"usage":{"input_tokens":5}}')
    assert meter.result() is None


@pytest.mark.parametrize("streaming", [False, True])
def test_answer_beyond_the_limit_is_counted_by_its_bytes(*, streaming: bool) -> None:
    meter = UsageMeter(Dialect.OPENAI_CHAT, streaming)
    piece = b"data: " + b"x" * 65_530
    for _ in range(BODY_BYTES_MAX // len(piece) + 2):
        meter.feed(piece)
    meter.feed(b"\n\n")
    used = meter.result()
    assert used is not None
    assert used.output_tokens >= BODY_BYTES_MAX // 4
    assert used.estimated


@given(st.binary(max_size=300), st.booleans(), st.sampled_from(list(Dialect)))
def test_rubbish_is_survived(data: bytes, streaming: bool, dialect: Dialect) -> None:  # noqa: FBT001 - hypothesis fills it
    meter = UsageMeter(dialect, streaming)
    meter.feed(data)
    used = meter.result()
    assert used is None or (used.input_tokens >= 0 and used.output_tokens >= 0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["usage", "response", "message", "choices", "delta", "type", "model", "input_tokens", "cost"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(st.lists(JSON, max_size=4), st.sampled_from(list(Dialect)))
def test_hostile_json_is_survived(values: list[Any], dialect: Dialect) -> None:
    meter = UsageMeter(dialect, streaming=True)
    for value in values:
        meter.feed(sse.encode(json.dumps(value).encode()))
    used = meter.result()
    assert used is None or (used.input_tokens >= 0 and used.output_tokens >= 0 and (used.cost_usd or 0) >= 0)


def test_shipped_table_knows_models_by_dated_and_prefixed_names() -> None:
    table = prices.load()
    plain = table.find("gpt-4o-mini")
    assert plain == table.find("openai/gpt-4o-mini-2024-07-18") == Price(0.15, 0.6)
    assert plain is not None
    assert plain.cost(1_000_000, 500_000) == pytest.approx(0.45)
    assert table.find("claude-opus-4-5-20251101") == table.find("claude-opus-4-5")
    assert table.find("no-such-model") is None
