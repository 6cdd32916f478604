"""What a hostile host says over HTTP/2 is no answer or one that is cut, never two; and others mind none of it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from hpack import Decoder

from gateway_client.egress.http2 import informational_max
from tests.support import http2
from tests.support.http2_plane import HELLO, OK, asked, get, parts, site

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

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
    "a body before its answer": HELLO + http2.data(b"ok") + http2.headers(end=True),
    "a window too wide": HELLO + http2.window(2**31 - 1, stream=0) * 2,
    "a window of nothing": HELLO + http2.window(0),
    "too wide by settings": http2.settings((4, 2**31)),
    "two lengths": HELLO
    + http2.headers(("content-length", "2"), ("content-length", "2"))
    + http2.data(b"ok", end=True),
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
    "shorter, with trailers": SIZED + http2.data(b"abc") + http2.trailers(("x", "y")),
    "longer": SIZED + http2.data(b"abcdef", end=True),
    "longer by one more": SIZED + http2.data(b"abcde") + http2.data(b"f", end=True),
    "RST_STREAM": BEGUN + http2.data(b"abc") + http2.rst(8),
    "RST_STREAM without an error": BEGUN + http2.data(b"abc") + http2.rst(0),
    "GOAWAY with an error": BEGUN + http2.data(b"abc") + http2.goaway(code=2),
    "an end": BEGUN + http2.data(b"abc"),
    "malformed padding": BEGUN + http2.frame(http2.DATA, b"\xffabc", flags=http2.PADDED, stream=1),
    "endless empty DATA": BEGUN + http2.data() * FLOOD,
    "PING for every byte": BEGUN + (http2.frame(http2.PING, bytes(8)) * 100 + http2.data(b"x")) * 100,
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


def saying(scripts: dict[str, bytes]) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """A host that says what is there for the last part of the path, and `OK` for others."""

    async def host(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fields = dict(Decoder().decode((await asked(reader))[1], raw=True))
        name = unquote(fields[b":path"].decode().removeprefix("/v1/"))
        writer.write(scripts.get(name, OK))
        with contextlib.suppress(OSError):
            await writer.drain()
            while name != "an end" and await reader.read(65536):
                pass

    return host


async def gone_through(tmp_path: Path, scripts: dict[str, bytes], fine: Callable[[bytes], bool]) -> None:
    """Have a host say each in turn to one worker, which is as ever to another agent all the while."""
    async with site(tmp_path, saying(scripts)) as side:
        worker, other = side.plane.worker_process.pid, side.plane.listen("ag_other")
        bad = {}
        for name in scripts:
            got = await side.ask(get(f"/v1/{quote(name)}"))
            outcome = await side.outcome()
            if not fine(got) or not outcome.error:
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


async def test_the_twin_what_is_an_answer_passes(tmp_path: Path) -> None:
    async with site(tmp_path, saying({name: answer for name, (answer, _, _) in CLEAN.items()})) as side:
        for name, (_, said, body) in CLEAN.items():
            head, got = parts(await side.ask(get(f"/v1/{quote(name)}")))
            assert (name, got) == (name, body)
            assert said in head
            hidden = b"content-length" if b"chunked" in said or b"04" in said else b"x: y"
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
