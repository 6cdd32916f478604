"""One HTTP/1.1 request to a provider, on h11: a connection each, never shared between agents."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import h11

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway_client.gateways.embedded.http import Headers

CONNECT_SECONDS_MAX: Final = 15.0
IDLE_SECONDS_MAX: Final = 600.0  # a model may think for minutes before its first word
HEAD_BYTES_MAX: Final = 64 * 1024
READ_BYTES: Final = 16 * 1024


class ProviderError(Exception):
    """The provider could not be reached or spoke no HTTP."""


@dataclass(frozen=True, slots=True)
class Url:
    """Where a provider is; `base` has no slash at its end."""

    host: str
    port: int
    tls: bool
    base: str

    @classmethod
    def parse(cls, text: str) -> Url:
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError(f"cannot read url {text!r}: expected http(s)://host[:port][/path]")
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, parts.path.rstrip("/"))

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


@cache
def tls_context() -> ssl.SSLContext:
    """Load the host's certificates once; called before the uid is dropped."""
    return ssl.create_default_context()


class Response:
    def __init__(self, head: h11.Response, wire: h11.Connection, reader: asyncio.StreamReader) -> None:
        self.status = head.status_code
        self.headers: Headers = tuple(head.headers)
        self._wire = wire
        self._reader = reader

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        while isinstance(event := await _next_event(self._wire, self._reader), h11.Data):
            yield bytes(event.data)
        if not isinstance(event, h11.EndOfMessage):
            raise ProviderError("the connection ended inside the answer")

    async def read(self, *, bytes_max: int) -> bytes:
        body = bytearray()
        async for piece in self.pieces():
            body += piece
            if len(body) > bytes_max:
                raise ProviderError(f"the answer is larger than {bytes_max} bytes")
        return bytes(body)


def post(url: Url, path: str, headers: Headers, body: bytes) -> AbstractAsyncContextManager[Response]:
    """Send a POST and hand out the response once its head is there."""
    return ask(url, "POST", path, headers, body)


@asynccontextmanager
async def ask(url: Url, method: str, path: str, headers: Headers, body: bytes) -> AsyncIterator[Response]:
    """Send a request and hand out the response once its head is there."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS_MAX):
            reader, writer = await asyncio.open_connection(
                url.host, url.port, ssl=tls_context() if url.tls else None, limit=READ_BYTES * 4
            )
    except (OSError, TimeoutError) as error:
        raise ProviderError(f"cannot connect to {url.host}:{url.port}: {error or 'timed out'}") from error
    try:
        wire = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)
        own: Headers = (
            (b"host", url.host_header.encode("idna" if not url.host.isascii() else "ascii")),
            *(((b"content-length", str(len(body)).encode()),) if method == "POST" else ()),
            (b"accept-encoding", b"identity"),
            (b"connection", b"close"),
        )
        sent = h11.Request(method=method, target=(url.base + path) or "/", headers=[*own, *headers])
        writer.write((wire.send(sent) or b"") + ((wire.send(h11.Data(data=body)) or b"") if body else b""))
        wire.send(h11.EndOfMessage())
        await writer.drain()
        head = await _next_event(wire, reader)
        while isinstance(head, h11.InformationalResponse):
            head = await _next_event(wire, reader)
        if not isinstance(head, h11.Response):
            raise ProviderError("the connection ended before an answer")
        yield Response(head, wire, reader)
    except (OSError, TimeoutError, h11.RemoteProtocolError) as error:
        raise ProviderError(f"cannot read the answer of {url.host}: {error or 'timed out'}") from error
    finally:
        writer.transport.abort()


async def _next_event(
    wire: h11.Connection, reader: asyncio.StreamReader
) -> type[h11.NEED_DATA | h11.PAUSED] | h11.Event:
    while (event := wire.next_event()) is h11.NEED_DATA:
        async with asyncio.timeout(IDLE_SECONDS_MAX):
            wire.receive_data(await reader.read(READ_BYTES))
    return event
