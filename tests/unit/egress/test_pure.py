"""The small pure parts: frames, ClientHello, model bodies, the redactor, the lifecycle."""

from __future__ import annotations

import contextlib
import itertools
import json
import ssl
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_client.egress import messages, tls
from gateway_client.egress.exchange import NEXT, Event, State, WrongOrder, transition
from gateway_client.egress.modelapi import BadCall, Endpoint, endpoint, read_call
from gateway_client.egress.request import Dialect, EgressRequest, Form
from gateway_client.egress.upstream import Redactor

CHAT = Endpoint(Dialect.OPENAI_CHAT, "/v1/chat/completions")

REQUEST = EgressRequest(Form.MODEL, "POST", "http", "gateway.internal", 3128, "/v1/x", dialect=Dialect.OPENAI_CHAT)


# --- frames


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (messages.Ask(1, "ag", REQUEST), messages.FROM_WORKER_TO_DAEMON),
        (messages.Outcome(1, "ag", 200, 1, 2, 3, messages.Usage("m", 1, 2, 0.5)), messages.FROM_WORKER_TO_DAEMON),
        (
            messages.Outcome(1, "ag", 200, 1, 2, 3, protocol=messages.HttpVersion.HTTP2),
            messages.FROM_WORKER_TO_DAEMON,
        ),
        (messages.Answer(1, messages.Reply(200, {"a": [1, {"b": None}]})), messages.FROM_DAEMON_TO_WORKER),
        (messages.Answer(1, messages.Refuse(403, "x", "y", "llm:z")), messages.FROM_DAEMON_TO_WORKER),
        (messages.Answer(1, messages.Allow("gr", messages.Upstream.API)), messages.FROM_DAEMON_TO_WORKER),
        (
            messages.Configure("embedded", "h", limits=messages.Limits(header_bytes_max=1)),
            messages.FROM_DAEMON_TO_WORKER,
        ),
        (messages.Cut(xs=(1, 2)), messages.FROM_DAEMON_TO_WORKER),
        (
            messages.Dial(
                "w", 1, "ag", messages.Upstream.TUNNEL, messages.Preface("ag", "n", 1, "tcp:a:1", {"k": "v"})
            ),
            messages.FROM_DAEMON_TO_DIALER,
        ),
    ],
)
def test_a_message_comes_back_as_it_was(message: object, expected: tuple[type[Any], ...]) -> None:
    assert messages.decode(messages.encode(message), expected) == message


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b'{"m":"Nothing"}',
        b'{"m":"Configure","gateway":"x","host":"y"}',
        b'{"m":"Ready"}',
        b'{"m":"Ready","pid":"1","uid":1,"posture":[]}',
        b'{"m":"Ready","pid":true,"uid":1,"posture":[]}',
        b'{"m":"Ready","pid":1,"uid":1,"posture":[1]}',
        b'{"m":"Ready","pid":1,"uid":1,"posture":[],"more":1}',
        b'{"m":"Ask","x":1,"agent_id":"a","request":{"form":"other"}}',
        b"[" * 50_000,
        b" " * 70_000,
    ],
)
def test_a_frame_that_is_no_message_is_refused(frame: bytes) -> None:
    with pytest.raises(messages.BadFrame):
        messages.decode(frame, messages.FROM_WORKER_TO_DAEMON)


def test_a_frame_is_bounded_at_the_sender() -> None:
    with pytest.raises(messages.BadFrame):
        messages.encode(messages.UpstreamFailed(1, "x" * messages.frame_bytes_max))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=10,
    )
)
def test_decoding_is_total(value: object) -> None:
    for name in ("Ask", "Outcome", "Ready"):
        frame = json.dumps({"m": name, "x": value, "request": value, "pid": value}).encode()
        with contextlib.suppress(messages.BadFrame):
            messages.decode(frame, messages.FROM_WORKER_TO_DAEMON)


# --- TLS


@cache
def hello(name: str | None) -> bytes:
    """The first flight of a real TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def test_the_name_of_a_real_client_hello_is_read_and_every_prefix_asks_for_more() -> None:
    data = hello("Example.COM")
    assert tls.peek(data) == tls.Hello("example.com")
    assert {tls.peek(data[:length]) for length in range(len(data))} == {tls.Peek.NEED_MORE}
    assert tls.peek(hello(None)) == tls.Hello(None)


def test_a_hello_split_over_records_is_read_whole() -> None:
    data = hello("example.com")
    message = data[5:]
    records = b"".join(
        b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part for part in (message[:3], message[3:50], message[50:])
    )
    assert tls.peek(records) == tls.Hello("example.com")


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1",
        b"\x15\x03\x01\x00\x02",
        b"\x16\x02\x00\x00\x05",
        b"\x16\x03\x01\xff\xff",
        b"\x16\x03\x01\x00\x05\x02",
    ],
)
def test_what_is_no_client_hello_is_known_early(data: bytes) -> None:
    assert tls.peek(data) is tls.Peek.NOT_TLS


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 255))
def test_peeking_is_total(noise: bytes, position: int, byte: int) -> None:
    tls.peek(b"\x16\x03\x01" + noise)
    data = bytearray(hello("example.com"))
    data[position % len(data)] = byte
    tls.peek(bytes(data))


def test_a_hello_in_crumbs_is_refused_and_every_byte_is_read_once() -> None:
    data = hello("example.com")
    crumbs = [b"\x16\x03\x01\x00\x01" + data[at : at + 1] for at in range(5, len(data))]
    peeker = tls.Peeker()
    found = [peeker.feed(crumb) for crumb in crumbs[: tls.records_max + 1]]
    assert found == [tls.Peek.NEED_MORE] * tls.records_max + [tls.Peek.NOT_TLS]
    size = -(-(len(data) - 5) // tls.records_max)
    parts = [data[at : at + size] for at in range(5, len(data), size)]
    peeker = tls.Peeker()
    records = b"".join(b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part for part in parts)
    assert [peeker.feed(records[at : at + 1]) for at in range(len(records))][-1] == tls.Hello("example.com")


def test_an_address_has_no_server_name() -> None:
    assert tls.fits(tls.Hello(None), "8.8.8.8")
    assert not tls.fits(tls.Hello("a.example"), "8.8.8.8")
    assert not tls.fits(tls.Hello(None), "a.example")
    assert tls.fits(tls.Hello("a.example"), "a.example")


# --- model calls


@pytest.mark.parametrize(
    ("method", "path", "dialect", "mapped"),
    [
        ("POST", "/v1/chat/completions", Dialect.OPENAI_CHAT, "/v1/chat/completions"),
        ("POST", "/chat/completions", Dialect.OPENAI_CHAT, "/v1/chat/completions"),
        ("POST", "/v1/messages", Dialect.ANTHROPIC_MESSAGES, "/v1/messages"),
        ("POST", "/v1/messages/count_tokens", Dialect.ANTHROPIC_COUNT_TOKENS, "/v1/messages/count_tokens"),
        ("GET", "/v1/models", Dialect.MODELS, "/v1/models"),
        ("GET", "/models/a/b", Dialect.MODELS, "/v1/models/a/b"),
        (
            "POST",
            "/v1beta/models/g-1:streamGenerateContent",
            Dialect.GEMINI_GENERATE,
            "/v1beta/models/g-1:streamGenerateContent",
        ),
    ],
)
def test_model_endpoints(method: str, path: str, dialect: Dialect, mapped: str) -> None:
    found = endpoint(method, path)
    assert found is not None
    assert (found.dialect, found.path) == (dialect, mapped)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/chat/completions"),
        ("POST", "/v1/models"),
        ("POST", "/key/generate"),
        ("POST", "/v1/v1/messages"),
        ("POST", "/v1/messages/"),
        ("POST", "//v1/messages"),
        ("GET", "/v1/model/info"),
        ("POST", "/v1/mcp/tools"),
        ("DELETE", "/v1/models/x"),
        ("POST", "/v1/messages/batches"),
        ("GET", "/health"),
        ("GET", "/v1beta/models/g:generateContent"),
    ],
)
def test_nothing_else_of_the_gateway_is_a_model_endpoint(method: str, path: str) -> None:
    assert endpoint(method, path) is None


def test_fields_a_gateway_would_believe_are_dropped_and_all_others_kept() -> None:
    keep = {"model": "m", "messages": [{"role": "user", "content": "\ud800 ü"}], "temperature": 0.5, "tools": []}
    drop = {
        "api_base": "x",
        "API_KEY": "x",
        "base_url": "x",
        "tags": ["x"],
        "user": "x",
        "metadata": {"tags": ["x"]},
        "litellm_metadata": {},
        "fallbacks": ["x"],
        "mock_response": "x",
        "aws_region_name": "x",
        "user_config": {},
    }
    call = read_call(CHAT, json.dumps(keep | drop).encode())
    assert json.loads(call.body) == keep
    anthropic = Endpoint(Dialect.ANTHROPIC_MESSAGES, "/v1/messages")
    call = read_call(anthropic, json.dumps({"model": "m", "metadata": {"user_id": "u", "tags": 1}}).encode())
    assert json.loads(call.body)["metadata"] == {"user_id": "u"}


def test_model_stream_and_tokens_are_read() -> None:
    call = read_call(CHAT, b'{"model":"openai/m-1","stream":true,"max_completion_tokens":7}')
    assert (call.model, call.stream, call.max_tokens) == ("openai/m-1", True, 7)
    gemini = endpoint("POST", "/v1beta/models/g-1:streamGenerateContent")
    assert gemini is not None
    call = read_call(gemini, b'{"contents":[]}')
    assert (call.model, call.stream) == ("g-1", True)


def test_the_last_of_two_models_is_judged_and_it_alone_is_sent() -> None:
    call = read_call(CHAT, b'{"model":"cheap","model":"dear"}')
    assert (call.model, json.loads(call.body), call.body.count(b"model")) == ("dear", {"model": "dear"}, 1)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b"{}",
        b'{"model":1}',
        b'{"model":"a*"}',
        b'{"model":"m","stream":"yes"}',
        b'{"model":"m","max_tokens":-1}',
        b'{"model":"m","max_tokens":"9"}',
        b'{"model":"m","x":NaN}',
        b'{"a":' * 100_000,
    ],
)
def test_a_body_that_is_no_call_is_refused(body: bytes) -> None:
    with pytest.raises(BadCall):
        read_call(CHAT, body)


# --- the redactor


@given(st.lists(st.sampled_from([b"s", b"sk", b"-se", b"cret", b"sk-secret", b"x", b"sk-sk-secret"]), max_size=20))
def test_the_credential_never_comes_back_at_any_split_and_nothing_else_changes(pieces: list[bytes]) -> None:
    redactor = Redactor("sk-secret")
    out = b"".join([redactor.feed(piece) for piece in pieces] + [redactor.end()])
    data = b"".join(pieces)
    assert out == data.replace(b"sk-secret", b"*" * 9)


def test_what_cannot_be_the_credential_is_not_held_back() -> None:
    redactor = Redactor("sk-secret")
    assert redactor.feed(b"data: 1\n\n") == b"data: 1\n\n"
    assert redactor.feed(b"data: sk-") == b"data: "
    assert redactor.feed(b"other") == b"sk-other"


# --- the lifecycle


def test_every_pair_of_state_and_event_is_in_the_table_or_refused() -> None:
    for state, event in itertools.product(State, Event):
        if (state, event) in NEXT:
            assert transition(state, event) is NEXT[state, event]
        else:
            with pytest.raises(WrongOrder):
                transition(state, event)
    assert not [event for event in Event if (State.ENDED, event) in NEXT]
    assert [state for state in State if (state, Event.CONNECTED) in NEXT] == [State.DIALING]
