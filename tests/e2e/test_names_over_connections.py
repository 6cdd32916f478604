"""Look-ups over connections (RFC 7766): a real worker, hostile clients, and the same answers as by datagram."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from typing import TYPE_CHECKING

from gateway_client.egress import messages, resolver
from gateway_client.egress.names import framed
from tests.support.egress_plane import AGENT, Plane, Upstream, running, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

HOST = "api.example.com"
SECONDS = 5.0


def question(name: str, kind: int = 1, number: int = 7) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">HHHHHH", number, 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)


def said(answer: bytes) -> tuple[int, int, str]:
    """Number, code, and the address where there is one."""
    number, flags, _, answers = struct.unpack(">HHHH", answer[:8])
    return number, flags & 15, socket.inet_ntoa(answer[-4:]) if answers else ""


class Names:
    """The name server of the plane's agent, at 127.0.0.1 as if that were its gate."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.datagrams.bind(("127.0.0.1", 0))
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(1024)
        self.port = self.listener.getsockname()[1]

    def open(self) -> None:
        self.plane.to_worker(messages.Gate(AGENT, 0), fd=self.datagrams.fileno())
        self.plane.to_worker(messages.Gate(AGENT, 53), fd=self.listener.fileno())
        address = self.datagrams.getsockname()
        for each in (self.datagrams, self.listener):
            each.close()
        self.by_datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.by_datagram.connect(address)
        self.by_datagram.setblocking(False)

    async def datagram(self, query: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.by_datagram, query)
        async with asyncio.timeout(SECONDS):
            return await loop.sock_recv(self.by_datagram, 1024)

    async def connect(self) -> Line:
        return Line(*await asyncio.open_connection("127.0.0.1", self.port))


class Line:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> bytes:
        async with asyncio.timeout(SECONDS):
            return await self.reader.readexactly(int.from_bytes(await self.reader.readexactly(2), "big"))

    async def ended(self, seconds: float = SECONDS) -> bytes:
        """Give what comes before the end."""
        async with asyncio.timeout(seconds):
            try:
                return await self.reader.read(-1)
            except ConnectionResetError:
                return b""

    def close(self) -> None:
        self.writer.close()


@contextlib.asynccontextmanager
async def named(*scopes: str) -> AsyncIterator[Names]:
    async with running(Upstream()) as plane:
        plane.grant(*scopes)
        names = Names(plane)
        names.open()
        yield names
        names.by_datagram.close()


async def test_every_question_has_the_answer_it_has_by_datagram() -> None:
    async with named(f"tls:{HOST}:443", "http:GET:http://plain.example.com/**") as names:
        line = await names.connect()
        for name, kind in (
            (HOST, 1), (HOST.upper(), 1), ("plain.example.com", 1), ("other.example.com", 1), (HOST, 28), (HOST, 16),
            ("tunnel.example", 16), ("10.0.0.1", 1), (HOST, 1),
        ):  # fmt: skip
            line.send(framed(question(name, kind)))
            assert await line.answer() == await names.datagram(question(name, kind))
        line.close()
    objects = [ask.request.object for ask in names.plane.asks]
    assert objects[::2] == objects[1::2], "and is asked about and on record the same"
    assert objects.count("LOOKUP other.example.com") == 2


async def test_several_at_once_are_answered_in_order_and_in_pieces() -> None:
    async with named(f"tls:{HOST}:443") as names:
        line = await names.connect()
        data = b"".join(framed(question(HOST, kind, number)) for number, kind in enumerate([1, 28] * 20))
        for start in range(0, len(data), 17):
            line.send(data[start : start + 17])
            await asyncio.sleep(0)
        answers = [said(await line.answer()) for _ in range(40)]
        assert answers == [(number, 0, "" if number % 2 else "198.19.0.1") for number in range(40)]
        line.writer.write_eof()
        assert await line.ended() == b""


async def test_half_a_message_is_ended_and_asks_nothing() -> None:
    async with named(f"tls:{HOST}:443") as names:
        began = time.monotonic()
        whole = framed(question(HOST))
        lines = [await names.connect() for _ in range(4)]
        for line, part in zip(lines, (b"\0", b"\0\x20", whole[:-1], whole + whole[:3]), strict=True):
            line.send(part)
        assert said(await lines[-1].answer()) == (7, 0, "198.19.0.1")
        ended = await asyncio.gather(*(line.ended(resolver.query_seconds_max + SECONDS) for line in lines))
        assert ended == [b""] * 4
        assert time.monotonic() - began >= resolver.query_seconds_max
        half = await names.connect()
        half.send(whole[:5])
        half.writer.write_eof()
        assert await half.ended() == b""
    assert [ask.request.object for ask in names.plane.asks] == [f"LOOKUP {HOST}"]


async def test_slow_bytes_do_not_prolong_a_look_up() -> None:
    async with named(f"tls:{HOST}:443") as names:
        line, began = await names.connect(), time.monotonic()
        fine = await names.connect()

        async def drip() -> None:
            for byte in framed(question(HOST)) * 100:
                line.send(bytes([byte]))
                await asyncio.sleep(0.3)

        dripping = asyncio.create_task(drip())
        fine.send(framed(question(HOST)))
        assert said(await fine.answer()) == (7, 0, "198.19.0.1")
        assert await line.ended(resolver.query_seconds_max + SECONDS) == b""
        assert resolver.query_seconds_max <= time.monotonic() - began
        dripping.cancel()


async def test_a_length_that_no_look_up_has_ends_the_connection_at_once() -> None:
    async with named(f"tls:{HOST}:443") as names:
        for first in (b"\xff\xff" + b"x" * 65535, b"\x02\x01", b"\0\0", b"\0\x0b" + b"x" * 11):
            line, began = await names.connect(), time.monotonic()
            line.send(first)
            assert await line.ended() == b""
            assert time.monotonic() - began < resolver.query_seconds_max
        assert await until(lambda: names.plane.rejected)
        assert names.plane.rejected[0].reason_code == "look_up_malformed"
        # The twin: the longest that a look-up may be.
        line = await names.connect()
        padded = question(HOST)
        line.send(framed(padded + b"\0" * (512 - len(padded))))
        assert said(await line.answer()) == (7, 0, "198.19.0.1")
        line.close()
    assert len(names.plane.asks) == 1


async def test_an_answer_instead_of_a_question_ends_it() -> None:
    async with named(f"tls:{HOST}:443") as names:
        line = await names.connect()
        answer = bytearray(question(HOST))
        answer[2] |= 0x80
        line.send(framed(bytes(answer)))
        assert await line.ended() == b""


async def test_a_thousand_connections_leave_one_agent_eight_and_others_served() -> None:
    async with named(f"tls:{HOST}:443") as names:
        opened = await asyncio.gather(*(names.connect() for _ in range(1000)), return_exceptions=True)
        lines = [each for each in opened if isinstance(each, Line)]
        for line in lines:
            with contextlib.suppress(OSError):
                line.send(framed(question(HOST)))

        async def answered(line: Line) -> bool:
            try:
                return said(await line.answer()) == (7, 0, "198.19.0.1")
            except (OSError, asyncio.IncompleteReadError):
                return False

        assert sum(await asyncio.gather(*map(answered, lines))) == resolver.lines_max
        # The proxy serves on, and datagrams are answered; when they have gone there is room again.
        assert (await names.plane.exchange(b"GET http://gateway.internal:3128/.stockade/v1/whoami HTTP/1.1\r\n"
                                           b"Host: gateway.internal:3128\r\nConnection: close\r\n\r\n")).startswith(
            b"HTTP/1.1 200 "
        )  # fmt: skip
        assert said(await names.datagram(question(HOST))) == (7, 0, "198.19.0.1")
        for line in lines:
            line.close()

        async def room() -> bool:
            try:
                line = await names.connect()
            except OSError:
                return False
            with contextlib.closing(line):
                line.send(framed(question(HOST)))
                return await answered(line)

        deadline = time.monotonic() + SECONDS
        while not await room():
            assert time.monotonic() < deadline


async def test_connections_and_datagrams_have_one_rate() -> None:
    async with named() as names:
        began = time.monotonic()
        lines = [await names.connect() for _ in range(resolver.lines_max)]
        many = 40
        for line in lines:
            line.send(framed(question("none.example", 28)) * many)
        for line in lines:
            for _ in range(many):
                assert said(await line.answer()) == (7, 0, "")
        turns = len(lines) * many / resolver.look_ups_per_turn_max
        assert time.monotonic() - began >= (turns - 1) * resolver.turn_seconds
        for line in lines:
            line.close()


async def test_who_reads_no_answers_is_ended() -> None:
    async with named() as names:
        loop = asyncio.get_running_loop()
        with socket.socket() as endpoint:
            endpoint.setblocking(False)
            endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(endpoint, ("127.0.0.1", names.port))
            # More than fits into the sockets: at some point the worker reads no more of it.
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(0.5):
                    await loop.sock_sendall(endpoint, framed(question("none.example", 28)) * 200_000)
        line = await names.connect()
        line.send(framed(question("none.example", 28)))
        assert said(await line.answer()) == (7, 0, "")
        line.close()


async def test_a_frozen_agent_has_no_answer_and_a_cut_resets() -> None:
    async with named(f"tls:{HOST}:443") as names:
        line = await names.connect()
        line.send(framed(question(HOST)))
        await line.answer()
        names.plane.to_worker(messages.Freeze(AGENT))
        await asyncio.sleep(0.05)
        line.send(framed(question(HOST)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await line.reader.read(1)
        assert len(names.plane.asks) == 1
        names.plane.to_worker(messages.Thaw(AGENT))
        assert said(await line.answer()) == (7, 0, "198.19.0.1")
        names.plane.to_worker(messages.Cut(agent_id=AGENT))
        assert await line.ended() == b""
