"""A plane before a host that speaks HTTP/2 in TLS that ends in the worker."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gateway_client.egress import messages
from gateway_client.egress.authority import SECRET_BYTES, make_authority
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
        found: messages.Outcome = await until(lambda: next((each for each in self.plane.outcomes if each.x == x), None))
        return found


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


async def asked(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read preface and frames up to the head of the request; give its flags and block."""
    assert await reader.readexactly(len(http2.PREFACE)) == http2.PREFACE
    while True:
        kind, flags, _, payload = await http2.read_frame(reader)
        if kind == http2.HEADERS:
            return flags, payload
