"""HTTP/2 to hosts whose TLS ends in the worker: what was decided is sent, and one clean answer comes back."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import ssl
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

import pytest
from hpack import Decoder

from gateway_client.egress import messages
from gateway_client.egress.authority import SECRET_BYTES, make_authority
from gateway_client.egress.decide import decide
from gateway_client.egress.http2 import informational_max, window_bytes
from gateway_client.egress.messages import HttpVersion, Limits
from gateway_client.gateways import preface as preface_format
from tests.support import http2
from tests.support.egress_plane import Plane, Upstream, running, until
from tests.support.site_authority import SiteAuthority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

HOST = "api.example.com"
HELLO = http2.settings() + http2.frame(http2.SETTINGS, flags=http2.ACK)
OK = HELLO + http2.headers(("content-length", "2")) + http2.data(b"ok", end=True)
Script = "Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]"


def get(path: str = "/v1/a", *, more: str = "", method: str = "GET", body: bytes = b"", close: bool = True) -> bytes:
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    end = "Connection: close\r\n" if close else ""
    return f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\n{length}{more}{end}\r\n".encode() + body


@dataclass
class Side:
    plane: Plane
    agent: ssl.SSLContext
    protocols: list[str | None] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)

    async def connect(self, port: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port or self.plane.port)
        writer.write(f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}:443\r\n\r\n".encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        await writer.start_tls(self.agent, server_hostname=HOST)
        return reader, writer

    async def ask(self, request: bytes, *, port: int = 0, seconds: float = 5) -> bytes:
        """Give all of the answer, and `RESET` after it where it was cut off."""
        reader, writer = await self.connect(port)
        got = b""
        with contextlib.closing(writer):
            writer.write(request)
            try:
                async with asyncio.timeout(seconds):
                    while data := await reader.read(65536):
                        got += data
            except (ConnectionError, ssl.SSLError):
                return got + b"RESET"
        return got

    async def outcome(self) -> messages.Outcome:
        """Give the outcome of the request inside, the last."""
        x = next(ask.x for ask in reversed(self.plane.asks) if ask.request.form == "forward")
        return await until(lambda: next((each for each in self.plane.outcomes if each.x == x), None))


async def opened(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read the preface of the embedded gateway's protocol, and say that the way is open."""
    fixed = await reader.readexactly(preface_format.FIXED_BYTES)
    await reader.readexactly(preface_format.length_after_fixed(fixed))
    writer.write(b"\x00")


@contextlib.asynccontextmanager
async def site(
    tmp_path: Path,
    answer: bytes | Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] = OK,
    *,
    protocols: tuple[str, ...] = ("h2", "http/1.1"),
    port: int = 0,
    authority: SiteAuthority | None = None,
    **more: object,
) -> AsyncIterator[Side]:
    """A plane before a host of TLS: a script, bytes that come after the head of a request, or a server at `port`."""
    sites = authority or SiteAuthority.make(tmp_path)
    context = http2.offering(sites.context(HOST), *protocols)
    agents = make_authority(os.urandom(SECRET_BYTES), "test", since=dt.datetime.now(dt.UTC))
    side = Side(None, ssl.create_default_context(cadata=agents.certificate))  # type: ignore[arg-type]

    async def gateway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await opened(reader, writer)
        if port:
            await relay(reader, writer, port)
            return
        try:
            await writer.start_tls(context)
            side.protocols.append(writer.get_extra_info("ssl_object").selected_alpn_protocol())
            if callable(answer):
                await answer(reader, writer)
                return
            if side.protocols[-1] == "h2":
                assert await reader.readexactly(len(http2.PREFACE)) == http2.PREFACE
                while (await http2.read_frame(reader))[0] != http2.HEADERS:
                    pass
            else:
                side.received.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer)
            await writer.drain()
            while data := await reader.read(65536):
                side.received.append(data)
        except (OSError, asyncio.IncompleteReadError):
            pass

    async with running(
        Upstream(handler=gateway),
        forward_mode=messages.ForwardMode.PREFACE,
        authority=agents,
        ca_file=sites.ca,
        **more,  # type: ignore[arg-type]
    ) as plane:
        plane.grant(f"http:*:https://{HOST}/v1/**")
        side.plane = plane
        yield side


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
            sink.close()

    await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))


def parts(answer: bytes) -> tuple[bytes, bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.lower(), body


# --- which is spoken


async def test_the_host_chooses_and_the_outcome_says_what(tmp_path: Path) -> None:
    async with site(tmp_path) as side:
        head, body = parts(await side.ask(get()))
        assert head.startswith(b"http/1.1 200 ok\r\ncontent-length: 2\r\n")
        assert body == b"ok"
        assert side.protocols == ["h2"]
        outcome = await side.outcome()
        assert (outcome.protocol, outcome.status, outcome.error) == (HttpVersion.HTTP2, 200, "")
        assert outcome.bytes_up > 0 < outcome.bytes_down


@pytest.mark.parametrize("protocols", [("http/1.1",), ()])
async def test_the_twin_a_host_of_http11_or_without_alpn_is_spoken_to_as_before(
    tmp_path: Path, protocols: tuple[str, ...]
) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    async with site(tmp_path, answer, protocols=protocols) as side:
        assert (await side.ask(get())).endswith(b"\r\n\r\nok")
        assert side.received[0].startswith(b"GET /v1/a HTTP/1.1\r\n")
        assert (await side.outcome()).protocol is HttpVersion.HTTP11


async def test_a_websocket_is_offered_http11_alone(tmp_path: Path) -> None:
    more = (
        "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        "Connection: Upgrade\r\n"
    )
    switched = (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\nhello"
    )
    async with site(tmp_path, switched) as side:
        reader, writer = await side.connect()
        writer.write(get(more=more, close=False))
        assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 101 ")
        assert side.protocols == ["http/1.1"]
        writer.close()


# --- a hostile host

BLOCK = http2.block((":status", "200"))
TRAILER = http2.block(("x", "y"))
END = http2.END_HEADERS | http2.END_STREAM
CONTINUED = http2.frame(http2.HEADERS, BLOCK, stream=1)
FLOOD = 20_000


def head_of(*fields: tuple[str, str], flags: int = END) -> bytes:
    return HELLO + http2.frame(http2.HEADERS, http2.block(*fields), flags=flags, stream=1)


BEFORE = {
    "no settings": http2.headers(end=True),
    "HTTP/1.1": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" + bytes(64),
    "an end": HELLO,
    "a long frame": HELLO + http2.frame(http2.HEADERS, bytes(16385), flags=END, stream=1),
    "a frame that never comes": HELLO + b"\xff\xff\xff\x01\x05\x00\x00\x00\x01",
    "CONTINUATION flood": HELLO + CONTINUED + http2.frame(http2.CONTINUATION, stream=1) * FLOOD,
    "long CONTINUATION": HELLO + CONTINUED + http2.frame(http2.CONTINUATION, bytes(16384), stream=1) * 3,
    "naked CONTINUATION": HELLO + http2.frame(http2.CONTINUATION, BLOCK, flags=http2.END_HEADERS, stream=1),
    "within a block": HELLO + CONTINUED + http2.frame(http2.PING, bytes(8)),
    "an unknown one within": HELLO + CONTINUED + http2.frame(0x42),
    "a header bomb": HELLO
    + http2.frame(
        http2.HEADERS, b"\x88\x40\x01a\x7f\xa1\x1e" + b"b" * 4000 + b"\xbe" * 9000, flags=http2.END_HEADERS, stream=1
    ),
    "malformed HPACK": HELLO + http2.frame(http2.HEADERS, b"\xff\xff\xff\xff\xff\xff\xff\xff", flags=END, stream=1),
    "PING flood": HELLO + http2.frame(http2.PING, bytes(8)) * FLOOD,
    "SETTINGS flood": HELLO + http2.settings((4, 1)) * FLOOD,
    "flood of acknowledgements": HELLO + http2.frame(http2.SETTINGS, flags=http2.ACK) * FLOOD,
    "many settings": HELLO + http2.settings(*((n, 1) for n in range(1000, 1065))),
    "flood of what is unknown": HELLO + http2.frame(0x42, b"x") * FLOOD,
    "PRIORITY flood": HELLO + http2.frame(http2.PRIORITY, bytes(5), stream=3) * FLOOD,
    "WINDOW_UPDATE flood": HELLO + http2.window(1, stream=0) * FLOOD,
    "flood of 1xx": HELLO + http2.headers(status="103") * (informational_max + 1),
    "101": HELLO + http2.headers(status="101"),
    "1xx that ends": HELLO + http2.headers(status="103", end=True),
    "RST_STREAM": HELLO + http2.rst(7),
    "GOAWAY with an error": HELLO + http2.goaway(code=11),
    "GOAWAY without us": HELLO + http2.goaway(last=0),
    "short GOAWAY": HELLO + http2.frame(http2.GOAWAY, bytes(4)),
    "push": HELLO + http2.frame(http2.PUSH, b"\x00\x00\x00\x02" + BLOCK, flags=http2.END_HEADERS, stream=1),
    "push switched on": http2.settings((2, 1)),
    "another stream": HELLO + http2.frame(http2.HEADERS, BLOCK, flags=END, stream=3),
    "a stream of its own": HELLO + http2.frame(http2.HEADERS, BLOCK, flags=END, stream=2),
    "a body alone": HELLO + http2.data(b"ok", end=True),
    "a window too wide": HELLO + http2.window(2**31 - 1, stream=0) * 2,
    "a window of nothing": HELLO + http2.window(0),
    "too wide by settings": http2.settings((4, 2**31)),
    "two lengths": HELLO + http2.headers(("content-length", "2"), ("content-length", "2"), end=True),
    "two other lengths": HELLO + http2.headers(("content-length", "2"), ("content-length", "3")),
    "a signed length": HELLO + http2.headers(("content-length", "+2")),
    "a length that never comes": HELLO + http2.headers(("content-length", "2"), end=True),
    "Transfer-Encoding": HELLO + http2.headers(("transfer-encoding", "chunked")),
    "Connection": HELLO + http2.headers(("connection", "x-secret")),
    "upper case": HELLO + http2.headers(("X-A", "b"), end=True),
    "CRLF in a value": HELLO + http2.headers(("x", "a\r\nset-cookie: b=c"), end=True),
    "CRLF in a name": HELLO + http2.headers(("x: y\r\nz", "a"), end=True),
    "a NUL": HELLO + http2.headers(("x", "a\0"), end=True),
    "a control": HELLO + http2.headers(("x", "a\x0bb"), end=True),
    "a name that is no token": HELLO + http2.headers(("x(y)", "a"), end=True),
    "space before": HELLO + http2.headers(("x", " a"), end=True),
    "status after": head_of(("x", "a"), (":status", "200")),
    "status twice": head_of((":status", "200"), (":status", "200")),
    "no status": head_of(("x", "a")),
    "a long status": head_of((":status", "2000")),
    "a status in words": head_of((":status", "OK\r\nX: y")),
    "a request": head_of((":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", "a")),
    "one more pseudo-header": head_of((":status", "200"), (":x", "y")),
}
BEGUN = HELLO + http2.headers()
SIZED = HELLO + http2.headers(("content-length", "5"))
AFTER = {
    "shorter": SIZED + http2.data(b"abc", end=True),
    "longer": SIZED + http2.data(b"abcdef", end=True),
    "longer by one more": SIZED + http2.data(b"abcde") + http2.data(b"f", end=True),
    "RST_STREAM": BEGUN + http2.data(b"abc") + http2.rst(8),
    "RST_STREAM without an error": BEGUN + http2.data(b"abc") + http2.rst(0),
    "GOAWAY with an error": BEGUN + http2.data(b"abc") + http2.goaway(code=2),
    "an end": BEGUN + http2.data(b"abc"),
    "malformed padding": BEGUN + http2.frame(http2.DATA, b"\xffabc", flags=http2.PADDED, stream=1),
    "endless empty DATA": BEGUN + http2.data() * FLOOD,
    "endless padding": BEGUN + http2.data(padding=200) * FLOOD,
    "1xx afterwards": BEGUN + http2.data(b"abc") + http2.headers(status="103"),
    "a second answer": BEGUN + http2.headers(status="201"),
    "trailers that go on": BEGUN + http2.frame(http2.HEADERS, TRAILER, flags=http2.END_HEADERS, stream=1),
    "trailers with a status": BEGUN + http2.trailers((":status", "200")),
    "trailers that do not end": BEGUN
    + http2.frame(http2.HEADERS, TRAILER, flags=http2.END_STREAM, stream=1)
    + http2.frame(http2.CONTINUATION, stream=1) * FLOOD,
    "204 with a body": HELLO + http2.headers(status="204") + http2.data(b"abc", end=True),
}


async def gone_through(tmp_path: Path, scripts: dict[str, bytes], fine: Callable[[bytes], bool]) -> None:
    """Have a host say each in turn to one worker, which is as ever to another agent all the while."""

    async def host(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fields = dict(Decoder().decode((await asked(reader))[1]))
        name = unquote(str(fields[":path"]).removeprefix("/v1/"))
        writer.write(scripts.get(name, OK))
        with contextlib.suppress(OSError):
            await writer.drain()
            while name != "an end" and await reader.read(65536):
                pass

    async with site(tmp_path, host) as side:
        worker, other = side.plane.worker_process.pid, side.plane.listen("ag_other")
        bad = {}
        for name in scripts:
            got = await side.ask(get(f"/v1/{quote(name)}"))
            outcome = await side.outcome()
            if not fine(got) or not outcome.error or "ascii" in outcome.error:
                bad[name] = (got, outcome.error)
            assert (await side.ask(get("/v1/other"), port=other)).endswith(b"\r\n\r\nok")
        assert not bad
        assert side.plane.worker_process.poll() is None
        assert side.plane.worker_process.pid == worker


async def test_what_is_no_answer_is_502(tmp_path: Path) -> None:
    def fine(got: bytes) -> bool:
        head, body = parts(got)
        return head.startswith(b"http/1.1 502 ") and head.count(b"http/1.1 ") == 1 and body.endswith(b"}")

    await gone_through(tmp_path, BEFORE, fine)


async def test_an_answer_that_breaks_off_is_cut_and_never_looks_whole(tmp_path: Path) -> None:
    def fine(got: bytes) -> bool:
        whole = got.endswith(b"0\r\n\r\nRESET")
        return got.endswith(b"RESET") and not whole and got.count(b"HTTP/1.1 ") <= 1

    await gone_through(tmp_path, AFTER, fine)


async def asked(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read preface and frames up to the head of the request; give its flags and block."""
    assert await reader.readexactly(len(http2.PREFACE)) == http2.PREFACE
    while True:
        kind, flags, _, payload = await http2.read_frame(reader)
        if kind == http2.HEADERS:
            return flags, payload


CLEAN = {
    "a sized body": (SIZED + http2.data(b"abcde", end=True), b"content-length: 5", b"abcde"),
    "a body of pieces": (
        BEGUN + http2.data(b"ab") + http2.data(b"cde") + http2.data(end=True),
        b"transfer-encoding: chunked",
        b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n",
    ),
    "trailers": (BEGUN + http2.data(b"ab") + http2.trailers(("x", "y")), b"chunked", b"2\r\nab\r\n0\r\n\r\n"),
    "padding": (SIZED + http2.data(b"abcde", end=True, padding=200), b"content-length: 5", b"abcde"),
    "a farewell in the middle": (
        SIZED + http2.data(b"ab") + http2.goaway(last=2**31 - 1) + http2.goaway() + http2.data(b"cde", end=True),
        b"200 ok",
        b"abcde",
    ),
    "a few 1xx": (
        HELLO + http2.headers(status="103") * 3 + http2.headers(("content-length", "0"), end=True),
        b"200",
        b"",
    ),
    "frames that are ignored": (
        SIZED + http2.frame(0x0A, b"\x00\x00x", stream=1) + http2.frame(0x42) + http2.data(b"abcde", end=True),
        b"200",
        b"abcde",
    ),
    "unknown settings": (http2.settings((0x4A4A, 7), (1, 0), (3, 0), (5, 16384)) + OK, b"200", b"ok"),
    "204": (HELLO + http2.headers(status="204", end=True), b"204 no content", b""),
    "304 with a length": (HELLO + http2.headers(("content-length", "5"), status="304", end=True), b"304", b""),
    "something behind the end": (OK + http2.data(b"evil") + b"HTTP/1.1 200 OK\r\n\r\n", b"200", b"ok"),
    "16000 updates of a table": (
        HELLO + http2.frame(http2.HEADERS, b"\x20" * 16000 + BLOCK, flags=END, stream=1),
        b"200",
        b"0\r\n\r\n",
    ),
}


@pytest.mark.parametrize("name", CLEAN)
async def test_the_twin_what_is_an_answer_passes(tmp_path: Path, name: str) -> None:
    answer, said, body = CLEAN[name]
    async with site(tmp_path, answer) as side:
        head, got = parts(await side.ask(get()))
        assert said in head
        assert got == body
        for hidden in (b"x: y", b"content-length") if b"chunked" in said or b"04" in said else ():
            assert hidden not in head
        assert (await side.outcome()).error == ""


async def test_head_has_the_length_and_no_body_and_the_connection_goes_on(tmp_path: Path) -> None:
    async with site(tmp_path, HELLO + http2.headers(("content-length", "5"), end=True)) as side:
        reader, writer = await side.connect()
        for _ in range(3):
            writer.write(get(method="HEAD", close=False))
            async with asyncio.timeout(5):
                head = await reader.readuntil(b"\r\n\r\n")
            assert b"content-length: 5\r\nconnection: keep-alive\r\n" in head
        assert side.protocols == ["h2"] * 3  # a connection each
        writer.close()


# --- what is sent


async def test_the_request_is_what_was_decided_and_nothing_else(tmp_path: Path) -> None:
    seen: list[tuple[int, list[tuple[str, str]]]] = []
    first: list[tuple[int, bytes]] = []

    async def host(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(len(http2.PREFACE)) == http2.PREFACE
        while True:
            kind, flags, _, payload = await http2.read_frame(reader)
            first.append((kind, payload))
            if kind == http2.HEADERS:
                break
        seen.append((flags, [(str(name), str(value)) for name, value in Decoder().decode(payload)]))
        writer.write(OK)
        await reader.read(65536)

    more = (
        "Connection: close, X-Hop, Content-Length\r\nX-Hop: a\r\nKeep-Alive: 5\r\nTE: trailers\r\n"
        "X-Forwarded-For: b\r\nProxy-Authorization: c\r\nCookie: d=1\r\nCookie: e=2\r\n"
        "Authorization: mine\r\nAccept: */*\r\n"
    )
    async with site(tmp_path, host) as side:
        assert (await side.ask(get("/v1/%7ea/?q=1", more=more, close=False))).endswith(b"ok")
    flags, fields = seen[0]
    assert flags & http2.END_STREAM
    assert fields == [
        (":method", "GET"),
        (":scheme", "https"),
        (":authority", HOST),
        (":path", "/v1/~a/?q=1"),
        ("authorization", "mine"),
        ("accept", "*/*"),
        ("cookie", "d=1; e=2"),
    ]
    told = dict.fromkeys(range(10), b"") | dict(first)
    settings = {told[http2.SETTINGS][n : n + 2]: told[http2.SETTINGS][n + 2 : n + 6] for n in range(0, 42, 6)}
    assert settings[b"\x00\x02"] == bytes(4)  # no push
    assert int.from_bytes(settings[b"\x00\x04"], "big") == window_bytes


@dataclass
class Uploads:
    """A host that makes room as told and notes the body."""

    rooms: tuple[int, ...]
    """Increments, each once what was given before is used up; the last again and again."""
    body: bytes = b""
    pieces: int = 0
    ended: bool = False
    gone: bool = False

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(http2.settings())
        left, rooms = 65535, list(self.rooms)
        try:
            await asked(reader)
            while not self.ended:
                if left <= 0 and rooms:
                    room = rooms.pop(0) if len(rooms) > 1 else rooms[0]
                    writer.write(http2.window(room) + http2.window(room, stream=0))
                    left += room
                kind, flags, _, payload = await http2.read_frame(reader)
                if kind == http2.DATA:
                    self.pieces += 1
                    self.body += payload
                    left -= len(payload)
                    self.ended = bool(flags & http2.END_STREAM)
            writer.write(http2.frame(http2.SETTINGS, flags=http2.ACK) + OK[len(HELLO) :])
            await reader.read(65536)
        except (OSError, asyncio.IncompleteReadError):
            self.gone = True


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_goes_up_as_the_host_makes_room(tmp_path: Path, *, chunked: bool) -> None:
    host, body = Uploads((300, 5000, 70_000)), os.urandom(400_000)
    more = "Transfer-Encoding: chunked\r\n" if chunked else f"Content-Length: {len(body)}\r\n"
    sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    async with site(tmp_path, host) as side:
        got = await side.ask(get(method="POST", more=more) + sent)
        assert got.endswith(b"\r\n\r\nok")
        assert host.ended
        assert host.body == body
        assert (await side.outcome()).bytes_up > len(body)


async def test_a_short_body_goes_up_too_and_an_empty_one_ends_with_the_head(tmp_path: Path) -> None:
    host = Uploads((1,))
    async with site(tmp_path, host) as side:
        assert (await side.ask(get(method="PUT", body=b"abcde"))).endswith(b"ok")
        assert host.body == b"abcde"
    async with site(tmp_path) as side:
        assert (await side.ask(get(method="POST", more="Content-Length: 0\r\n"))).endswith(b"ok")


async def test_a_host_that_makes_room_for_a_byte_at_a_time_is_given_up(tmp_path: Path) -> None:
    host = Uploads((1,))
    async with site(tmp_path, host) as side:
        assert (await side.ask(get(method="PUT", body=bytes(200_000)))).startswith(b"HTTP/1.1 502 ")
        await until(lambda: host.gone)
        assert host.pieces < 600
        assert "comes to nothing" in (await side.outcome()).error


async def test_a_host_that_makes_no_room_is_given_up_in_time(tmp_path: Path) -> None:
    async with site(tmp_path, Uploads(()), limits=Limits(body_seconds_max=0.3)) as side:
        assert (await side.ask(get(method="PUT", body=bytes(200_000)))).startswith(b"HTTP/1.1 502 ")
        assert (await side.outcome()).error == "cannot send body: the host takes none of it"


async def test_a_window_that_shrinks_below_nothing_is_waited_for(tmp_path: Path) -> None:
    got, total = 0, 200_000

    async def until_reply(reader: asyncio.StreamReader, reply: int) -> int:
        """Give how many bytes of the body came before it."""
        count = 0
        while True:
            kind, flags, _, payload = await http2.read_frame(reader)
            count += len(payload) if kind == http2.DATA else 0
            if kind == reply and flags & http2.ACK:
                return count

    async def host(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        writer.write(http2.settings())
        await asked(reader)
        while got < 65535:
            kind, _, _, payload = await http2.read_frame(reader)
            got += len(payload) if kind == http2.DATA else 0
        writer.write(http2.settings((4, 1000)) + http2.window(1 << 20, stream=0) + http2.window(60_000))
        writer.write(http2.frame(http2.PING, bytes(8)))
        assert await until_reply(reader, http2.PING) == 0
        writer.write(http2.window(5000) + http2.frame(http2.PING, bytes(8)))  # 1000 - 65535 + 65000: 465 are left
        got += await until_reply(reader, http2.PING)
        writer.write(http2.window(1 << 20))
        while got < total:
            kind, _, _, payload = await http2.read_frame(reader)
            got += len(payload) if kind == http2.DATA else 0
        writer.write(OK[len(HELLO) :])
        await reader.read(65536)

    async with site(tmp_path, host) as side:
        assert (await side.ask(get(method="PUT", body=bytes(total)))).endswith(b"ok")
        assert got == total


async def test_a_body_that_turns_out_malformed_ends_no_stream(tmp_path: Path) -> None:
    host = Uploads((1 << 20,))
    async with site(tmp_path, host) as side:
        chunk = b"10000\r\n%s\r\n" % bytes(65536)
        request = get(method="POST", more="Transfer-Encoding: chunked\r\n") + chunk * 3 + b"nonsense\r\n"
        assert b"chunk_malformed" in await side.ask(request)
        await until(lambda: host.gone)
        assert not host.ended


async def test_an_early_answer_passes_and_ends_the_connection(tmp_path: Path) -> None:
    async with site(tmp_path, OK) as side:
        reader, writer = await side.connect()
        writer.write(get(method="PUT", more="Content-Length: 500000\r\n", close=False) + bytes(100))
        async with asyncio.timeout(5):
            assert (await reader.read(-1)).endswith(b"ok")
        writer.close()


async def test_expect_is_answered_here_and_not_sent(tmp_path: Path) -> None:
    host = Uploads((100_000,))
    async with site(tmp_path, host) as side:
        reader, writer = await side.connect()
        writer.write(get(method="PUT", more="Content-Length: 3\r\nExpect: 100-continue\r\n"))
        async with asyncio.timeout(5):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"abc")
            assert (await reader.read(-1)).endswith(b"ok")
        assert host.body == b"abc"
        writer.close()


# --- time and amount


async def test_events_pass_at_once_and_a_revocation_cuts_within_100_ms(tmp_path: Path) -> None:
    ended, go_on = asyncio.Event(), asyncio.Event()

    async def host(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(HELLO + http2.headers(("content-type", "text/event-stream")))
        for number in range(3):
            writer.write(http2.data(b"data: %d\n\n" % number))
            await go_on.wait()
            go_on.clear()
        try:
            while await reader.read(65536):
                pass
        except OSError:
            ended.set()

    async with site(tmp_path, host) as side:
        reader, writer = await side.connect()
        writer.write(get(close=False))
        async with asyncio.timeout(5):
            for number in range(3):
                await reader.readuntil(b"data: %d\n\n" % number)
                go_on.set()
        loop = asyncio.get_running_loop()
        began = loop.time()
        side.plane.to_worker(messages.Cut(xs=(side.plane.asks[-1].x,)))
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError, ssl.SSLError)):
            await asyncio.wait_for(reader.readexactly(1000), 5)
        assert loop.time() - began < 0.1
        await asyncio.wait_for(ended.wait(), 1)
        outcome = await side.outcome()
        assert (outcome.status, outcome.error) == (200, "cut")
        writer.close()


async def test_a_slow_agent_slows_the_host_and_then_gets_it_all(tmp_path: Path) -> None:
    sent, total = 0, 40 << 20
    piece = bytes(16384)

    async def host(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        room = {0: 65535, 1: 65535}
        await asked(reader)
        room[1] = window_bytes  # as it was told before
        room[0] = window_bytes
        writer.write(HELLO + http2.headers(("content-length", str(total))))
        while sent < total:
            if min(room.values()) >= len(piece):
                writer.write(http2.data(piece))
                await writer.drain()
                sent += len(piece)
                room = {stream: left - len(piece) for stream, left in room.items()}
                continue
            kind, _, stream, payload = await http2.read_frame(reader)
            if kind == http2.WINDOW:
                room[stream] += int.from_bytes(payload, "big")
        writer.write(http2.data(end=True))
        await reader.read(65536)

    async with site(tmp_path, host) as side:
        reader, writer = await side.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(get())
        last = -1
        while sent > last:  # until it stands still
            last = sent
            await asyncio.sleep(0.3)
        assert 0 < sent < 16 << 20
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(20):
            await reader.readuntil(b"\r\n\r\n")
            assert len(await reader.readexactly(total)) == total
        assert (await side.outcome()).bytes_down > total
        writer.close()


async def test_a_host_that_pings_and_reads_no_reply_does_not_fill_the_memory(tmp_path: Path) -> None:
    sent = 0

    async def host(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await asked(reader)
        writer.write(HELLO + http2.headers())
        some = http2.frame(http2.PING, bytes(8)) * 500 + http2.data(b"x")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            while sent < 400 << 20:
                writer.write(some)
                await writer.drain()
                sent += len(some)

    async with site(tmp_path, host) as side:
        got = await side.ask(get(), seconds=30)
        assert got.endswith(b"RESET")
        assert "reads no reply" in (await side.outcome()).error
        assert sent < 100 << 20


async def test_a_host_that_only_pings_is_silent(tmp_path: Path) -> None:
    async def host(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(HELLO)
        with contextlib.suppress(OSError):
            while True:
                writer.write(http2.frame(http2.PING, bytes(8)))
                await writer.drain()
                await asyncio.sleep(0.02)

    async with site(tmp_path, host, limits=Limits(response_idle_seconds_max=0.5)) as side:
        assert (await side.ask(get())).startswith(b"HTTP/1.1 502 ")
        assert "for too long" in (await side.outcome()).error


@pytest.mark.parametrize("up", [True, False])
async def test_the_bytes_of_a_grant_hold(tmp_path: Path, *, up: bool) -> None:
    host = Uploads((1 << 20,))
    answer: object = host if up else HELLO + http2.headers() + http2.data(bytes(16000)) * 5 + http2.data(end=True)
    async with site(tmp_path, answer) as side:  # type: ignore[arg-type]
        decided = side.plane.view

        def judge(ask: messages.Ask) -> messages.Verdict:
            verdict = decide(ask.request, decided, now=0)
            assert isinstance(verdict, messages.Allow)
            return replace(verdict, bytes_left=40_000)

        side.plane.answer = judge
        got = await side.ask(get(method="PUT", body=bytes(100_000)) if up else get())
        if up:
            assert got.startswith(b"HTTP/1.1 403 ")
            assert b"grant_used_up" in got
            assert len(host.body) < 40_000
            assert not host.ended
        else:
            assert got.endswith(b"RESET")
            assert len(got) < 40_100
        outcome = await side.outcome()
        assert outcome.grant_spent
        assert outcome.bytes_up + outcome.bytes_down <= 40_000
