"""What must hold of every input of what reads an agent's bytes, or a host's: `TARGETS[name](data)` raises where not.

Each takes any bytes. Refusing is fine, by the parser's own error; anything else that is raised is a finding.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import h11

from gateway_client.egress import mcpcall, names, scope, target, tls
from gateway_client.egress.bodyjson import BadCall
from gateway_client.egress.request import Form
from gateway_client.egress.upstream import forward_head
from tests.support import http2
from tests.support.http2_passing import passed
from tests.support.reading import read

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway_client.egress.wire import Head

SEEDS: Final[dict[str, tuple[bytes, ...]]] = {
    "wire": (
        b"\x01GET http://a.example/x?y=%7e HTTP/1.1\r\nHost: a.example\r\nA: b\r\n\r\n",
        b"\x07CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\nrest",
        (
            b"\x03POST http://a.example/ HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3\r\nabc\r\n0\r\n\r\n"
        ),
        (
            b"\x05POST /v1/messages HTTP/1.1\r\nHost: gateway.internal:3128\r\nContent-Length: 2\r\n\r\n"
            b"{}GET / HTTP/1.1\r\n\r\n"
        ),
    ),
    "target": (b"API.Example.com.:8080/a/../%2e/%41", b"[::ffff:7f00:1]:443/", b"0x7f.1/", b"xn--bcher-kva.example/b"),
    "hello": (
        b"\x05\x16\x03\x01\x00\x2f\x01\x00\x00\x2b\x03\x03" + bytes(32) + b"\x00\x00\x02\x13\x01\x01\x00\x00\x00",
    ),
    "query": (b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x07example\x00\x00\x01\x00\x01",),
    "mcp": (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search","arguments":{}}}',),
    "scope": (
        b"http:GET,HEAD:https://*.a.example/v1/**",
        b"llm:model=gpt-*",
        b"tls:a.example:443",
        b"mcp:tickets/search",
    ),
    "http2": (
        b"\x00" + http2.headers(("content-length", "2"), ("a", "b")) + http2.data(b"ok", end=True),
        b"\x21"
        + http2.headers(status="103")
        + http2.headers()
        + http2.data(b"x", padding=3)
        + http2.trailers(("c", "d")),
        b"\x43" + http2.headers(("content-length", "9"), end=True),
        b"\x80" + http2.window(9) + http2.goaway() + http2.frame(http2.PING, bytes(8)) + http2.headers() + http2.rst(2),
    ),
}


def wire(data: bytes) -> None:
    """The same at every split; and what is sent on reads back as what was decided."""
    if not data:
        return
    step, stream = data[0] + 1, data[1:]
    whole = read(stream)
    pieces = read(stream, step=step)
    assert (whole.heads, whole.bodies) == (pieces.heads, pieces.bodies), "another reading at another split"
    assert (whole.reject and whole.reject.reason_code) == (pieces.reject and pieces.reject.reason_code)
    for head in whole.heads:
        if head.form is Form.CONNECT:
            continue
        for absolute in (True, False):
            # Behind a proxy: absolute-form. Behind the embedded gateway: origin-form for the one authority.
            sent = _written(head, *forward_head(head, absolute=absolute))
            (again,) = read(sent, inside=None if absolute else head.authority).heads
            decided = (head.method, head.authority, head.path, head.query)
            assert (again.method, again.authority, again.path, again.query) == decided


def _written(head: Head, line: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
    fields = b"".join(b"%s: %s\r\n" % pair for pair in headers)
    return b"%s %s HTTP/1.1\r\n%s\r\n" % (head.method.encode(), line, fields)


def normal(data: bytes) -> None:
    """What is normal is its own normal form."""
    authority, slash, path = data.decode("latin-1").partition("/")
    with contextlib.suppress(target.BadTarget):
        found = target.parse_authority(authority, default=80)
        assert target.normalise_host(found.host) == found.host
    with contextlib.suppress(target.BadTarget):
        once = target.normalise_path(slash + path)
        assert target.normalise_path(once) == once


def hello(data: bytes) -> None:
    """The same ClientHello, however it comes."""
    if not data:
        return
    step, stream = data[0] + 1, data[1:]
    peeker = tls.Peeker()
    found = peeker.feed(b"")
    for start in range(0, len(stream), step):
        found = peeker.feed(stream[start : start + step])
        if found is not tls.Peek.NEED_MORE:
            break
    assert tls.peek(stream) == found, "another reading at another split"


def query(data: bytes) -> None:
    """A question, an answer to send back, or nothing; never an error. On a connection the same at any split."""
    names.read_query(data)
    if data:
        step, stream = data[0] + 1, data[1:]
        whole = _framed([stream])
        assert _framed([stream[start : start + step] for start in range(0, len(stream), step)]) == whole


def _framed(pieces: list[bytes]) -> list[bytes]:
    coming, found = names.Framed(), []
    with contextlib.suppress(names.BadLength):
        for piece in pieces:
            coming.feed(piece)
            while (message := coming.next()) is not None:
                found.append(message)
    return found


def mcp(data: bytes) -> None:
    """A message that is sent on reads back as itself."""
    with contextlib.suppress(BadCall):
        found = mcpcall.read_message(data)
        again = mcpcall.read_message(found.body)
        assert (again.method, again.name, again.body) == (found.method, found.name, found.body)


def written_scope(data: bytes) -> None:
    """A scope in its written form is the same scope, and covers itself."""
    with contextlib.suppress(scope.BadScope):
        found = scope.parse_scope(data.decode("latin-1"))
        text = scope.format_scope(found)
        assert scope.parse_scope(text) == found
        assert scope.includes(found, found)


def answer_over_http2(data: bytes) -> None:
    """The same at every split; and what an agent gets, if it is whole, is one answer and nothing behind it."""
    if not data:
        return
    step, method = (data[0] & 0x1F) + 1, ("GET", "HEAD", "POST", "GET")[data[0] >> 6]
    stream = http2.settings() + data[1:]
    found, pieces = passed(stream, method=method), passed(stream, method=method, step=step)
    assert (found.got, found.error) == (pieces.got, pieces.error), "another reading at another split"
    assert found.exchange.bytes_down == len(found.got)
    if found.error:
        assert not found.got.endswith(b"\r\n0\r\n\r\n") or b"transfer-encoding: chunked" not in found.got
        return
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(found.got)
    while not isinstance(event := client.next_event(), h11.EndOfMessage):
        assert isinstance(event, h11.Response | h11.Data), event
    assert not event.headers
    assert client.trailing_data == (b"", False), "something is behind the answer"


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "wire": wire,
    "target": normal,
    "hello": hello,
    "query": query,
    "mcp": mcp,
    "scope": written_scope,
    "http2": answer_over_http2,
}
