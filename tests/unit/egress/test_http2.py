"""HTTP/2 as values: a decided request is the one that arrives, and a legal answer reads the same in HTTP/1.1."""

from __future__ import annotations

import http.client
import io
from typing import TYPE_CHECKING, Any

import h11
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded, TrailersReceived
from hypothesis import given
from hypothesis import strategies as st

from gateway_client.egress.frames import (
    BadFrames,
    FrameReader,
    continuations_max,
    frame_bytes_max,
    frames_idle_max,
    header_block_bytes_max,
    settings_max,
)
from gateway_client.egress.http2 import BadRequest, Http2Client, request_fields
from gateway_client.egress.target import Authority
from gateway_client.egress.upstream import forward_head
from tests.support import http2
from tests.support.http2_passing import passed
from tests.support.reading import read

if TYPE_CHECKING:
    from gateway_client.egress.wire import Head

PLACE = Authority("api.example.com", 443)
TOKENS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.!#$%&'*+^`|~", min_size=1, max_size=20)
VALUES = st.text([chr(n) for n in range(0x20, 0x7F)] + ["\t"], max_size=60).map(lambda text: text.strip(" \t"))
VALUES_BACK = st.text([chr(n) for n in range(0x20, 0x100) if n != 0x7F] + ["\t"], max_size=60).map(
    lambda text: text.strip(" \t")
)
HOPS = ["connection", "keep-alive", "proxy-connection", "te", "trailer", "upgrade", "transfer-encoding", "expect"]


class Server:
    """The state machine of h2's other side: it decodes what we sent."""

    def __init__(self) -> None:
        self.connection = H2Connection(H2Configuration(client_side=False, header_encoding=None))
        self.connection.initiate_connection()
        self.fields: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.ended = False
        self.trailers = False

    def receive(self, data: bytes) -> None:
        for event in self.connection.receive_data(data):
            match event:
                case RequestReceived():
                    assert not self.fields
                    self.fields = [(bytes(name), bytes(value)) for name, value in event.headers or ()]
                case DataReceived():
                    self.body += event.data or b""
                    self.connection.acknowledge_received_data(event.flow_controlled_length or 0, 1)
                case StreamEnded():
                    self.ended = True
                case TrailersReceived():
                    self.trailers = True


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Give a request of HTTP/1.1 as an agent may send it inside of TLS, and its body."""
    method = draw(st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PROPFIND"]))
    path = "/" + draw(st.text("abc/%2e7~._-ü?&=+:@".replace("ü", ""), max_size=30))
    names = st.one_of(
        TOKENS, st.sampled_from([*HOPS[:5], "cookie", "Cookie", "X-Forwarded-For", "content-type", "Via"])
    )
    lines = draw(st.lists(st.tuples(names, VALUES), max_size=8))
    body = draw(st.binary(max_size=200)) if draw(st.booleans()) else b""
    head = [f"{method} {path} HTTP/1.1", "Host: API.example.com"]
    head += [f"{name}: {value}" for name, value in lines]
    if draw(st.booleans()):
        head.append("Transfer-Encoding: chunked")
        sent = (b"%x\r\n%s\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"
    else:
        head += [f"Content-Length: {len(body)}"] if body else []
        sent = body
    return "\r\n".join(head).encode() + b"\r\n\r\n" + sent, body


@given(requests())
def test_a_decided_request_is_what_the_other_side_decodes(request: tuple[bytes, bytes]) -> None:
    sent, body = request
    found = read(sent, inside=PLACE, secure=True)
    if found.reject is not None:  # not every path is one
        return
    (head,), (got,) = found.heads, found.bodies
    assert got == body
    target, headers = forward_head(head, absolute=False)
    server, client = Server(), Http2Client()
    client.begin(request_fields(head.method, target, headers), end=not body)
    if body:
        assert client.room == 0  # before the other side has said what it takes
        client.feed(server.connection.data_to_send())
        client.step()
        assert client.room >= len(body)
        client.send(body, moving=True)
        client.end()
    server.receive(client.outgoing())
    same(server, head, body, headers)


def same(server: Server, head: Head, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    pseudo = {name: value for name, value in server.fields if name.startswith(b":")}
    assert pseudo == {
        b":method": head.method.encode(),
        b":scheme": b"https",
        b":authority": b"api.example.com",
        b":path": (head.path + (f"?{head.query}" if head.query else "")).encode(),
    }
    assert [name for name, _ in server.fields[:4]] == [b":method", b":scheme", b":authority", b":path"]
    plain = [pair for pair in server.fields if not pair[0].startswith(b":")]
    assert not {name for name, _ in plain} & {*(name.encode() for name in HOPS), b"host"}
    left = {b"host", b"connection", b"transfer-encoding", b"upgrade", b"cookie"}
    assert [pair for pair in plain if pair[0] != b"cookie"] == [pair for pair in headers if pair[0] not in left]
    cookies = [value for name, value in headers if name == b"cookie" and value]
    assert [value for name, value in plain if name == b"cookie"] == ([b"; ".join(cookies)] if cookies else [])
    assert (server.body, server.ended, server.trailers) == (body, True, False)


@pytest.mark.parametrize(
    ("method", "target", "more"),
    [
        ("GET", b"/", [(b"x", b"a\r\nb")]),
        ("GET", b"/", [(b"x", b"a\nb")]),
        ("GET", b"/", [(b"x", b"a\0")]),
        ("GET", b"/", [(b"x", b" a")]),
        ("GET", b"/", [(b"x", b"\xc3\xa4")]),
        ("GET", b"/", [(b"X", b"a")]),
        ("GET", b"/", [(b":path", b"/other")]),
        ("GET", b"/", [(b"", b"a")]),
        ("GET", b"/", [(b"host", b"other.example")]),
        ("GET", b"/", [(b"content-length", b"1"), (b"content-length", b"2")]),
        ("GET", b"/a b", []),
        ("GET", b"http://other.example/", []),
        ("GET", b"*", []),
        ("get", b"/", []),
        ("CONNECT", b"/", []),
        ("GET\r\n", b"/", []),
    ],
)
def test_what_is_no_request_is_not_sent(method: str, target: bytes, more: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(BadRequest):
        request_fields(method, target, [(b"host", b"api.example.com"), *more])
    done = passed(b"", method=method, target=target, headers=[(b"host", b"api.example.com"), *more])
    assert done.error.startswith("cannot send request")
    assert not done.sent


# --- answers


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, int, list[tuple[str, str]], bytes]:
    """Give the bytes of a legal answer by h2's other side, its status, fields and body."""
    server, client = Server(), Http2Client()
    client.begin(request_fields("GET", b"/", [(b"host", b"a.example")]), end=True)
    server.receive(client.outgoing())
    connection = server.connection
    status = draw(st.one_of(st.integers(200, 599), st.sampled_from([200, 204, 304])))
    names = TOKENS.filter(lambda name: name not in {*HOPS, "content-length", "cookie"} and "proxy" not in name)
    fields = draw(st.lists(st.tuples(names, VALUES_BACK), max_size=8))
    pieces = [] if status in (204, 304) else draw(st.lists(st.binary(max_size=300), max_size=6))
    body = b"".join(pieces)
    sized = draw(st.booleans()) and status not in (204, 304)
    length = [("content-length", str(len(body)))] if sized else []
    for _ in range(draw(st.integers(0, 3))):
        connection.send_headers(1, [(":status", "103"), ("link", "x")])
    sent = [(":status", str(status)), *fields, *length]
    encoded: list[tuple[bytes, bytes]] = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent]
    connection.send_headers(1, encoded, end_stream=not pieces)
    for number, piece in enumerate(pieces):
        last = number + 1 == len(pieces)
        connection.send_data(1, piece, pad_length=draw(st.one_of(st.none(), st.integers(0, 255))))
        if draw(st.booleans()):
            connection.ping(bytes(8))
        if last and draw(st.booleans()):
            connection.send_headers(1, [("x-trailer", "a")], end_stream=True)
        elif last:
            connection.end_stream(1)
    return connection.data_to_send(), status, [*fields, *length], body


def by_h11(got: bytes, method: str = "GET") -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(got)
    response, body = client.next_event(), b""
    assert isinstance(response, h11.Response)
    while not isinstance(event := client.next_event(), h11.EndOfMessage):
        assert isinstance(event, h11.Data), event
        body += bytes(event.data)
    assert not event.headers
    assert client.trailing_data == (b"", False)
    return response.status_code, [(bytes(name), bytes(value)) for name, value in response.headers], body


def by_http_client(got: bytes, method: str = "GET") -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    class Socket:
        def makefile(self, _: str) -> io.BytesIO:
            return io.BytesIO(got)

    endpoint: Any = Socket()
    response = http.client.HTTPResponse(endpoint, method=method)
    response.begin()
    body = response.read()
    fields = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in response.getheaders()]
    return response.status, fields, body


@given(answers(), st.integers(1, 400))
def test_a_legal_answer_reads_the_same_in_http11(
    answer: tuple[bytes, int, list[tuple[str, str]], bytes], step: int
) -> None:
    said, status, fields, body = answer
    done = passed(said, step=step)
    assert done.error == ""
    own = {b"connection", b"transfer-encoding"}
    expected = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
    found = by_h11(done.got)
    assert found[0] == status
    assert [pair for pair in found[1] if pair[0] not in own] == expected
    assert found[2] == body
    again = by_http_client(done.got)
    assert (again[0], again[2]) == (status, body)
    # http.client breaks lines where str does: what it reads of values in ASCII is the same.
    if all(value.isascii() for _, value in fields):
        assert [pair for pair in again[1] if pair[0] not in own] == expected
    assert done.exchange.bytes_down == len(done.got)
    assert done.exchange.bytes_up == len(done.sent)


def test_an_old_client_gets_a_body_without_a_length_to_the_end_of_the_connection() -> None:
    said = http2.settings() + http2.headers() + http2.data(b"abc", end=True)
    done = passed(said, http11=False)
    assert done.got.endswith(b"connection: close\r\n\r\nabc")
    assert b"transfer-encoding" not in done.got


# --- bounds


def bounded(said: bytes) -> bool:
    """Whether a reader takes it, at every split the same."""
    found = []
    for step in (1 << 20, 7):
        reader = FrameReader()
        try:
            for start in range(0, len(said), step):
                reader.feed(said[start : start + step])
                while reader.next_frame() is not None:
                    pass
            found.append(True)
        except BadFrames:
            found.append(False)
    assert found[0] == found[1]
    return found[0]


def continued(count: int, each: int = 1) -> bytes:
    more = [http2.frame(http2.CONTINUATION, bytes(each), stream=1) for _ in range(count - 1)]
    last = http2.frame(http2.CONTINUATION, bytes(each), flags=http2.END_HEADERS, stream=1)
    return http2.settings() + http2.frame(http2.HEADERS, stream=1) + b"".join(more) + last


@pytest.mark.parametrize(
    ("most", "beyond"),
    [
        (continued(continuations_max), continued(continuations_max + 1)),
        (continued(2, header_block_bytes_max // 2), continued(3, header_block_bytes_max // 3 + 1)),
        (
            http2.settings() + http2.frame(http2.DATA, bytes(frame_bytes_max), stream=1),
            http2.settings() + http2.frame(http2.DATA, bytes(frame_bytes_max + 1), stream=1),
        ),
        (
            http2.settings() + http2.frame(http2.PING, bytes(8)) * (frames_idle_max - 1),
            http2.settings() + http2.frame(http2.PING, bytes(8)) * frames_idle_max,
        ),
        (http2.settings(*[(9, 1)] * settings_max), http2.settings(*[(9, 1)] * (settings_max + 1))),
    ],
)
def test_limits_hold_at_the_limit_and_not_beyond(most: bytes, beyond: bytes) -> None:
    assert bounded(most)
    assert not bounded(beyond)


def test_what_is_too_long_is_refused_before_it_is_gathered() -> None:
    reader = FrameReader()
    reader.feed(http2.settings() + (frame_bytes_max + 1).to_bytes(3, "big") + bytes(6))
    assert reader.next_frame() is not None
    with pytest.raises(BadFrames):
        reader.next_frame()


def test_of_settings_only_what_matters_is_kept() -> None:
    reader = FrameReader()
    reader.feed(http2.settings((1, 0), (4, 7), (0x9999, 1), (2, 0), (3, 5)))
    assert reader.next_frame() == http2.settings((4, 7), (2, 0))


BLOCKS = st.one_of(
    st.sampled_from([http2.block((":status", "200")), http2.block((":status", "103")), http2.block(("a", "b"))]),
    st.binary(max_size=30),
)
FRAMES = st.one_of(
    st.builds(
        lambda kind, flags, stream, payload: http2.frame(kind, payload, flags=flags, stream=stream),
        st.integers(0, 12),
        st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 4, 5])),
        st.sampled_from([0, 1, 1, 1, 2, 3]),
        st.one_of(BLOCKS, st.integers(0, 40).map(bytes)),
    ),
    st.sampled_from([http2.headers(), http2.headers(("content-length", "3")), http2.data(b"abc"), http2.goaway()]),
)


@given(st.lists(FRAMES, max_size=12).map(b"".join), st.integers(1, 20))
def test_any_frames_are_an_answer_or_none_and_the_same_at_every_split(said: bytes, step: int) -> None:
    whole, pieces = passed(http2.settings() + said), passed(http2.settings() + said, step=step)
    assert (whole.got, whole.error) == (pieces.got, pieces.error)
    if not whole.error:
        by_h11(whole.got)


@given(st.binary(max_size=300), st.integers(1, 20))
def test_any_bytes_are_an_answer_or_none_and_the_same_at_every_split(data: bytes, step: int) -> None:
    whole, pieces = passed(http2.settings() + data), passed(http2.settings() + data, step=step)
    assert (whole.got, whole.error) == (pieces.got, pieces.error)
    assert whole.error
