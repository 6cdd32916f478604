"""Writes an answer to an agent in HTTP/1.1, chunk by chunk as it comes, whatever the other side spoke."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Final

from gateway_client.egress.answers import phrase
from gateway_client.egress.upstream import Redactor, returned_headers

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway_client.egress.exchange import Exchange
    from gateway_client.egress.messages import Limits
    from gateway_client.egress.sealed import Sealed
    from gateway_client.egress.stream import Stream
    from gateway_client.egress.wire import Headers

_NO_CONTENT: Final = (204, 304)


class UpstreamError(Exception):
    """The gateway answered nothing that can be passed on."""


class Answering:
    """One answer: `head`, `data` as often as some comes, `end`; each may raise what ends it, BytesSpent too."""

    def __init__(
        self,
        agent: Stream | Sealed,
        exchange: Exchange,
        limits: Limits,
        *,
        method: str,
        http11: bool,
        keep_alive: bool,
        credential: str,
        on_headers: Callable[[int, Headers], None] | None = None,
        on_body: Callable[[bytes], None] | None = None,
    ) -> None:
        self._agent = agent
        self._exchange = exchange
        self._limits = limits
        self._method = method
        self._http11 = http11
        self._on_headers = on_headers
        self._on_body = on_body
        self._credential = credential
        self._redactor = Redactor(credential)
        self._hash = hashlib.sha256()
        self._chunked = False
        self._length: int | None = None
        """Bytes of the body still to come, where the agent was told a length."""
        self.keep_alive = keep_alive
        self.whole = False
        """Whether the answer came to its end."""
        self.started = False
        """Whether the agent has got bytes of an answer."""

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def is_bodyless(self, status: int) -> bool:
        """Whether nothing follows the head of such an answer, whatever it says (RFC 9112 section 6.3)."""
        return self._method == "HEAD" or status in _NO_CONTENT

    async def head(self, status: int, headers: Headers) -> None:
        """Write the head; `headers` have at most one length and name no coding but chunked."""
        self._exchange.status = status
        if self._on_headers is not None:
            self._on_headers(status, headers)
        passed = returned_headers(headers, credential=self._credential, keep_cookies=not self._on_headers)
        bodyless = self.is_bodyless(status)
        if status in _NO_CONTENT:  # a length there is read by some clients, and no body follows
            passed = [(name, value) for name, value in passed if name != b"content-length"]
        lengths = [int(value) for name, value in passed if name == b"content-length"]
        sized = bool(lengths)
        self._length = 0 if bodyless else lengths[0] if sized else None
        if not bodyless and not sized:
            if self._http11:
                self._chunked = True
                passed.append((b"transfer-encoding", b"chunked"))
            else:
                self.keep_alive = False
        passed.append((b"connection", b"keep-alive" if self.keep_alive else b"close"))
        line = f"HTTP/1.1 {status} {phrase(status)}\r\n".encode("ascii")
        head = line + b"".join(b"%s: %s\r\n" % pair for pair in passed) + b"\r\n"
        await self._exchange.take(len(head))
        self.started = True
        await self._write(head)

    async def data(self, data: bytes) -> None:
        if self._exchange.first_byte is None:
            self._exchange.first_byte = asyncio.get_running_loop().time()
        if self._on_body is not None:
            self._on_body(data)
        await self._clean(self._redactor.feed(data))

    async def end(self) -> None:
        await self._clean(self._redactor.end())
        if self._length:
            raise UpstreamError("cannot pass answer: it is shorter than it said")
        if self._chunked:
            await self._down(b"0\r\n\r\n")
        self.whole = True

    async def _clean(self, data: bytes) -> None:
        if data:
            self._hash.update(data)
            if self._length is not None:
                self._length -= len(data)
                if self._length < 0:
                    raise UpstreamError("cannot pass answer: it is longer than it said")
            await self._down(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

    async def _down(self, data: bytes) -> None:
        await self._exchange.take(len(data))
        await self._write(data)

    async def _write(self, data: bytes) -> None:
        self._exchange.bytes_down += len(data)
        await self._agent.write(data, self._limits.body_seconds_max)
