"""Strict parsing: what is refused, what the limits are, and that what is sent on reads back as what was decided."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_client.egress.messages import Configure, Limits
from gateway_client.egress.modelapi import endpoint
from gateway_client.egress.request import Form
from gateway_client.egress.target import Authority
from gateway_client.egress.upstream import HeaderList, Identity, forward_head, model_head
from gateway_client.gateways.litellm import LiteLLM
from tests.support.reading import read

HOST = b"Host: gateway.internal:3128\r\n"


def code(data: bytes, **more: object) -> str:
    whole = read(data, **more)  # type: ignore[arg-type]
    bytewise = read(data, step=1, **more)  # type: ignore[arg-type]
    assert whole.reject is not None
    assert bytewise.reject is not None
    assert whole.reject.reason_code == bytewise.reject.reason_code
    assert not whole.bodies
    return whole.reject.reason_code


MALFORMED = {
    "bare LF": (b"GET / HTTP/1.1\n" + HOST + b"\r\n", "head_malformed"),
    "bare CR": (b"GET / HTTP/1.1\r\nA: b\rc\r\n" + HOST + b"\r\n", "head_malformed"),
    "LF at the end": (b"GET / HTTP/1.1\r\n" + HOST + b"\n", "head_malformed"),
    "NUL": (b"GET / HTTP/1.1\r\nA: \0\r\n" + HOST + b"\r\n", "head_malformed"),
    "non-ASCII": (b"GET / HTTP/1.1\r\nA: \xc3\xa4\r\n" + HOST + b"\r\n", "head_malformed"),
    "control": (b"GET / HTTP/1.1\r\nA: \x0b\r\n" + HOST + b"\r\n", "head_malformed"),
    "folded line": (b"GET / HTTP/1.1\r\nHost:\r\n gateway.internal\r\n\r\n", "head_malformed"),
    "space before colon": (b"GET / HTTP/1.1\r\nHost : gateway.internal\r\n\r\n", "host_missing"),
    "no colon": (b"GET / HTTP/1.1\r\n" + HOST + b"nonsense\r\n\r\n", "head_malformed"),
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", "host_missing"),
    "two Hosts": (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", "header_doubled"),
    "another Host": (b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n", "host_mismatch"),
    "Host beside target": (b"GET http://a.example/ HTTP/1.1\r\nHost: b.example\r\n\r\n", "host_mismatch"),
    "Host with userinfo": (b"GET / HTTP/1.1\r\nHost: x@gateway.internal\r\n\r\n", "authority_malformed"),
    "userinfo": (b"GET http://a@b.example/ HTTP/1.1\r\nHost: b.example\r\n\r\n", "authority_malformed"),
    "backslash": (b"GET http://a.example\\@b.example/ HTTP/1.1\r\nHost: b.example\r\n\r\n", "*"),
    "fragment": (b"GET http://a.example#@b.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", "*"),
    "fragment in path": (b"GET /#x HTTP/1.1\r\n" + HOST + b"\r\n", "path_malformed"),
    "https absolute": (b"GET https://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", "scheme_refused"),
    "file scheme": (b"GET file:///etc/passwd HTTP/1.1\r\nHost: a.example\r\n\r\n", "scheme_refused"),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", "scheme_refused"),
    "CL and TE": (
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "framing_ambiguous",
    ),
    "CL twice": (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\na", "header_doubled"),
    "CL list": (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 0, 0\r\n\r\n", "framing_ambiguous"),
    "CL signed": (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: +1\r\n\r\na", "framing_ambiguous"),
    "CL hex": (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 0x1\r\n\r\na", "framing_ambiguous"),
    "TE twice": (
        b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
        "header_doubled",
    ),
    "TE list": (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", "framing_ambiguous"),
    "TE odd": (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: xchunked\r\n\r\n", "framing_ambiguous"),
    "TE in 1.0": (b"POST / HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n", "framing_ambiguous"),
    "upgrade": (b"GET / HTTP/1.1\r\n" + HOST + b"Upgrade: websocket\r\n\r\n", "upgrade_refused"),
    "h2c": (b"GET / HTTP/1.1\r\n" + HOST + b"Upgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n", "upgrade_refused"),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "version_refused"),
    "HTTP/0.9": (b"GET /\r\n\r\n", "version_refused"),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\n" + HOST + b"\r\n", "version_refused"),
    "two spaces": (b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", "version_refused"),
    "TRACE": (b"TRACE / HTTP/1.1\r\n" + HOST + b"\r\n", "method_refused"),
    "lower-case method": (b"get / HTTP/1.1\r\n" + HOST + b"\r\n", "not_http"),
    "SOCKS4": (b"\x04\x01\x00\x50", "not_http"),
    "SOCKS5": (b"\x05\x01\x00", "not_http"),
    "TLS": (b"\x16\x03\x01\x00\x05hello", "not_http"),
    "empty line first": (b"\r\nGET / HTTP/1.1\r\n" + HOST + b"\r\n", "not_http"),
    "CONNECT without port": (b"CONNECT a.example HTTP/1.1\r\nHost: a.example\r\n\r\n", "port_missing"),
    "CONNECT port 0": (b"CONNECT a.example:0 HTTP/1.1\r\nHost: a.example:0\r\n\r\n", "port_malformed"),
    "CONNECT port 65536+443": (b"CONNECT a.example:65979 HTTP/1.1\r\nHost: a.example\r\n\r\n", "port_malformed"),
    "CONNECT to a URL": (b"CONNECT http://a.example:80/ HTTP/1.1\r\nHost: a.example\r\n\r\n", "authority_malformed"),
    "CONNECT with another Host": (b"CONNECT a.example:443 HTTP/1.1\r\nHost: b.example:443\r\n\r\n", "host_mismatch"),
    "CONNECT with a body": (
        b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\nContent-Length: 1\r\n\r\na",
        "framing_ambiguous",
    ),
    "expectation": (b"POST / HTTP/1.1\r\n" + HOST + b"Expect: magic\r\nContent-Length: 1\r\n\r\n", "expect_refused"),
    "odd address": (b"GET http://2130706433/ HTTP/1.1\r\nHost: 2130706433\r\n\r\n", "address_spelling"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_is_refused_however_it_arrives(name: str) -> None:
    data, expected = MALFORMED[name]
    assert code(data) == expected or expected == "*"


@pytest.mark.parametrize(
    "body",
    [
        b"5\nhello\r\n0\r\n\r\n",
        b"5\r\nhelloX\r\n0\r\n\r\n",
        b"5;a=b\r\nhello\r\n0\r\n\r\n",
        b" 5\r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"-1\r\n\r\n",
        b"5 \r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"+5\r\nhello\r\n",
        b"0\r\nTrailer: x\r\n\r\n",
        b"00\r\n\r\n",
        b"\r\n",
        b"123456789\r\n",
        b"5\r\nhello\r\r\n",
        b"0\r\n\n",
    ],
)
def test_chunk_tricks_are_refused(body: bytes) -> None:
    head = b"POST http://a.example/ HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert code(head + body) in ("chunk_malformed", "trailer_refused", "body_malformed")


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=5), st.integers(1, 30))
def test_bodies_and_what_follows_them_are_told_apart_at_every_split(chunks: list[bytes], step: int) -> None:
    body = b"".join(chunks)
    chunked = b"".join(b"%X\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    head = b"POST http://a.example/ HTTP/1.1\r\nHost: a.example\r\n"
    data = (
        head
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + chunked
        + head
        + b"Content-Length: %d\r\n\r\n" % len(body)
        + body
        + b"GET http://a.example/last HTTP/1.1\r\nHost: a.example\r\n\r\n"
    )
    result = read(data, step=step)
    assert result.reject is None
    assert result.bodies == [body, body, b""]
    assert result.heads[2].path == "/last"


def test_limits_hold_at_the_limit_and_one_beyond() -> None:
    limits = Limits(header_bytes_max=200, header_count_max=3, request_line_bytes_max=60)
    line = b"GET /v1/models HTTP/1.1\r\n" + HOST

    def head_of(size: int) -> bytes:
        return line + b"A: " + b"x" * (size - len(line) - 3 - 4) + b"\r\n\r\n"

    assert len(head_of(200)) == 200
    assert read(head_of(200), limits=limits).heads
    assert code(head_of(201), limits=limits) == "head_too_long"
    assert code(line + b"A: " + b"x" * 10_000, limits=limits) == "head_too_long"
    assert read(line + b"A: b\r\nC: d\r\n\r\n", limits=limits).heads
    assert code(line + b"A: b\r\nC: d\r\nE: f\r\n\r\n", limits=limits) == "too_many_headers"
    long_path = b"GET /" + b"a" * (60 - 14) + b" HTTP/1.1\r\n" + HOST + b"\r\n"
    assert len(long_path.partition(b"\r\n")[0]) == 60
    assert read(long_path, limits=limits).heads
    assert code(long_path.replace(b"GET /", b"GET /a"), limits=limits) == "request_line_too_long"


def test_a_megabyte_of_header_at_once_is_refused() -> None:
    assert code(b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"x" * (1 << 20) + b"\r\n\r\n") == "head_too_long"


def test_inside_a_connect_only_its_own_host_is_spoken_to() -> None:
    inside = Authority("a.example", 8080)
    result = read(b"GET /x HTTP/1.1\r\nHost: a.example:8080\r\n\r\n", inside=inside)
    assert (result.heads[0].form, result.heads[0].authority) == (Form.FORWARD, inside)
    assert code(b"GET /x HTTP/1.1\r\nHost: a.example:80\r\n\r\n", inside=inside) == "host_mismatch"
    assert code(b"GET /x HTTP/1.1\r\nHost: gateway.internal:3128\r\n\r\n", inside=inside) == "host_mismatch"


def test_the_proxy_knows_itself_in_every_form() -> None:
    for target in (
        b"/v1/models",
        b"http://gateway.internal:3128/v1/models",
        b"http://GATEWAY.internal.:3128/v1/models",
    ):
        assert read(b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n").heads[0].form is Form.MODEL
    assert read(b"GET /.stockade/v1/whoami HTTP/1.1\r\n" + HOST + b"\r\n").heads[0].form is Form.SELF


names = st.from_regex(rb"[A-Za-z][A-Za-z0-9-]{0,15}", fullmatch=True)
values = st.from_regex(rb"[!-~]([ !-~]{0,20}[!-~])?", fullmatch=True)
paths = st.from_regex(r"/[A-Za-z0-9._~!$&'()*+,;=:@/-]{0,20}(%[2-7][0-9a-f]){0,3}", fullmatch=True)
queries = st.from_regex(r"[A-Za-z0-9._~=&?/-]{0,15}", fullmatch=True)


@given(
    st.sampled_from(["GET", "POST", "PUT"]),
    paths,
    queries,
    st.lists(st.tuples(names, values), max_size=6),
    st.booleans(),
)
def test_what_is_sent_on_reads_back_as_exactly_what_was_decided(
    method: str,
    path: str,
    query: str,
    headers: list[tuple[bytes, bytes]],
    absolute: bool,  # noqa: FBT001
) -> None:
    target = f"http://API.Example.com.:8080{path}" + (f"?{query}" if query else "")
    data = f"{method} {target} HTTP/1.1\r\nHost: api.example.com:8080\r\n".encode()
    data += b"".join(b"%s: %s\r\n" % pair for pair in headers) + b"\r\n"
    result = read(data)
    if not result.heads:
        return  # refused: nothing is sent on
    head = result.heads[0]
    sent = written(head.method, *forward_head(head, absolute=absolute))
    # Behind a proxy of the operator's: absolute-form. Behind the embedded gateway: origin-form for the one authority.
    again = read(sent, inside=None if absolute else head.authority).heads[0]
    assert (again.form, again.method, again.authority, again.path, again.query) == (
        head.form,
        head.method,
        head.authority,
        head.path,
        head.query,
    )
    # To any other parser too.
    other = h11.Connection(h11.SERVER)
    other.receive_data(sent)
    event = other.next_event()
    assert isinstance(event, h11.Request)
    assert [value for name, value in event.headers if name == b"host"] == [b"api.example.com:8080"]


def written(method: str, target: bytes, headers: HeaderList, body: bytes = b"") -> bytes:
    client = h11.Connection(h11.CLIENT)
    request = client.send(h11.Request(method=method.encode(), target=target, headers=headers))
    return (request or b"") + body


@given(
    st.lists(st.tuples(st.one_of(names, st.sampled_from([b"X-LiteLLM-Tags", b"Authorization", b"X-Api-Key"])), values))
)
def test_a_model_call_carries_our_identity_alone(headers: list[tuple[bytes, bytes]]) -> None:
    data = b"GET /v1/models?key=secret&limit=2 HTTP/1.1\r\n" + HOST
    data += b"".join(b"%s: %s\r\n" % pair for pair in headers) + b"\r\n"
    result = read(data)
    if not result.heads:
        return
    head = result.heads[0]
    where = endpoint(head.method, head.path)
    assert where is not None
    target, sent = model_head(
        head,
        where,
        body=b"",
        adapter=LiteLLM(),
        identity=Identity("ag_1", "one"),
        configuration=Configure(gateway="litellm", host="gw:4000", base_path="/proxy", credential="sk-ours"),
    )
    assert target == b"/proxy/v1/models?limit=2"
    assert [value for name, value in sent if name == b"authorization"] == [b"Bearer sk-ours"]
    assert [value for name, value in sent if name == b"x-api-key"] == [b"sk-ours"]
    assert [value for name, value in sent if name == b"x-litellm-customer-id"] == [b"one"]
    assert [value for name, value in sent if name == b"host"] == [b"gw:4000"]
