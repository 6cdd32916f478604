"""Passes one exchange on over HTTP/1.1: the written request up, the answer down as it comes, chunk by chunk."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import TYPE_CHECKING, Final

import h11

from gateway_client.egress.answering import UpstreamError
from gateway_client.egress.share import metered
from gateway_client.egress.stream import Reset
from gateway_client.egress.wire import h11_feed_bytes_max

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway_client.egress.answering import Answering
    from gateway_client.egress.exchange import Exchange
    from gateway_client.egress.messages import Limits
    from gateway_client.egress.sealed import Sealed
    from gateway_client.egress.share import Share
    from gateway_client.egress.stream import Stream
    from gateway_client.egress.upstream import HeaderList
    from gateway_client.egress.wire import Headers

response_head_bytes_max: Final = 64 * 1024
status_detail_bytes_max: Final = 1024
informational_max: Final = 8
"""Answers of the 100s before the real one."""

_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")
_LENGTHS: Final = re.compile(rb"^content-length[ \t]*:[ \t]*([^\n]*?)[ \t]*$", re.IGNORECASE | re.MULTILINE)


class Switched(Exception):  # noqa: N818 - named for what it says
    """The host answered 101 to a request that asked for it; what follows is in no HTTP."""

    def __init__(self, headers: Headers) -> None:
        super().__init__()
        self.headers = headers


class Passing:
    """One request over HTTP/1.1 and its answer. Nothing of the answer reaches the agent before its head is whole."""

    def __init__(
        self,
        answer: Answering,
        upstream: Stream | Sealed,
        exchange: Exchange,
        limits: Limits,
        share: Share,
        *,
        method: str,
    ) -> None:
        self._answer = answer
        self._upstream = upstream
        self._exchange = exchange
        self._limits = limits
        self._share = share
        self._method = method
        self._client = h11.Connection(h11.CLIENT, max_incomplete_event_size=response_head_bytes_max)
        self._up_hash = hashlib.sha256()
        self._head_seen = bytearray()
        self._informational = 0

    async def run(self, target: bytes, headers: HeaderList, body: bytes | AsyncIterator[bytes]) -> bool:
        """Pass it on; give whether the agent's connection can be kept. Raise UpstreamError where the gateway failed."""
        request = h11.Request(method=self._method.encode("ascii"), target=target, headers=headers)
        await self._up(self._client.send(request))
        if isinstance(body, bytes):
            await self._send_body(body)
            await self._up(self._client.send(h11.EndOfMessage()))
            return await self._read_answer(pump=None)
        pump = asyncio.get_running_loop().create_task(metered(self._pump(body), self._share))
        pump.add_done_callback(self._pumped)
        try:
            return await self._read_answer(pump=pump)
        finally:
            pump.cancel()

    async def _up(self, data: bytes | None) -> None:
        if data:
            await self._exchange.take(len(data))
            self._exchange.bytes_up += len(data)
            self._upstream.put(data)

    async def _send_body(self, data: bytes) -> None:
        if data:
            self._up_hash.update(data)
            await self._up(self._client.send(h11.Data(data=data)))

    async def _pump(self, body: AsyncIterator[bytes]) -> None:
        async for data in body:
            await self._send_body(data)
            await self._upstream.write(b"", self._limits.body_seconds_max)
        await self._up(self._client.send(h11.EndOfMessage()))

    def _pumped(self, pump: asyncio.Task[None]) -> None:
        """Wake whoever waits for an answer to a body that will never be whole."""
        if not pump.cancelled() and pump.exception() is not None:
            self._upstream.reset()

    async def _read_answer(self, *, pump: asyncio.Task[None] | None) -> bool:
        """Read the answer while the body may still be going up: a gateway may answer early."""
        try:
            while True:
                event = await self._next_event(pump)
                if isinstance(event, h11.Response):
                    await self._head(event)
                elif isinstance(event, h11.Data):
                    await self._answer.data(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    await self._answer.end()
                    whole = pump is None or (pump.done() and not pump.cancelled() and pump.exception() is None)
                    return self._answer.keep_alive and whole
        except h11.RemoteProtocolError as error:
            raise UpstreamError("cannot read answer: the gateway broke off or sent no HTTP") from error
        finally:
            self._exchange.request_sha256 = self._up_hash.hexdigest()
            self._exchange.response_sha256 = self._answer.sha256

    async def _next_event(self, pump: asyncio.Task[None] | None) -> h11.Event:
        while True:
            await self._share.breathe()  # while bytes are there nothing below has to wait
            event = self._client.next_event()
            if isinstance(event, h11.InformationalResponse) and event.status_code == 101:  # noqa: PLR2004 - RFC 9110 15.2.2
                self._upstream.unread(bytes(self._client.trailing_data[0]))
                raise Switched(tuple((bytes(name), bytes(value)) for name, value in event.headers))
            if isinstance(event, h11.InformationalResponse):
                self._informational += 1
                self._forget_head()
                if self._informational > informational_max:
                    raise UpstreamError("cannot read answer: the gateway sent one interim answer after another")
            if isinstance(event, h11.Event) and not isinstance(event, h11.InformationalResponse):
                if isinstance(event, h11.ConnectionClosed):
                    raise UpstreamError("cannot read answer: the gateway closed the connection")
                return event
            if event is not h11.NEED_DATA and not isinstance(event, h11.InformationalResponse):
                raise UpstreamError("cannot read answer: the gateway switched protocols")
            if event is h11.NEED_DATA:
                await self._feed(pump)

    def _forget_head(self) -> None:
        """Forget the head of an interim answer alone: the real one may have come behind it in the same piece."""
        end = _HEAD_END.search(self._head_seen)
        del self._head_seen[: end.end() if end else len(self._head_seen)]

    async def _feed(self, pump: asyncio.Task[None] | None) -> None:
        _raise_problem(pump)
        try:
            data = await self._upstream.read(self._limits.response_idle_seconds_max)
        except Reset as error:
            _raise_problem(pump)
            raise UpstreamError("cannot read answer: the gateway reset the connection") from error
        except TimeoutError as error:
            raise UpstreamError("cannot read answer: the gateway sent nothing for too long") from error
        if not self._answer.started:
            self._head_seen += data[:h11_feed_bytes_max]
        self._client.receive_data(data[:h11_feed_bytes_max])
        self._upstream.unread(data[h11_feed_bytes_max:])

    async def _head(self, response: h11.Response) -> None:
        headers: Headers = tuple((bytes(name), bytes(value)) for name, value in response.headers)
        self._refuse_ambiguous(response, headers)
        await self._answer.head(response.status_code, headers)

    def _refuse_ambiguous(self, response: h11.Response, headers: Headers) -> None:
        """Refuse what two programs could read as one answer or as two (RFC 9112 section 6.3)."""
        head = bytes(self._head_seen).replace(b"\r\n", b"\n").partition(b"\n\n")[0]
        self._head_seen.clear()
        values: list[bytes] = _LENGTHS.findall(head)  # as written: h11 merges lengths that are the same
        coded = any(name == b"transfer-encoding" for name, _ in headers)
        if len(values) > 1 or any(not value.isdigit() for value in values):
            raise UpstreamError("cannot read answer: the gateway told more than one length")
        if coded and (values or response.http_version != b"1.1"):
            raise UpstreamError("cannot read answer: the gateway told a length and a transfer coding")
        if response.http_version not in (b"1.0", b"1.1"):
            raise UpstreamError("cannot read answer: the gateway spoke another version of HTTP")


def _raise_problem(pump: asyncio.Task[None] | None) -> None:
    if pump is not None and pump.done() and not pump.cancelled() and (problem := pump.exception()) is not None:
        raise problem


async def read_status(upstream: Stream, seconds: float) -> None:
    """Read the one status the embedded gateway puts before a raw connection; raise UpstreamError with its words."""
    data = await upstream.read(seconds)
    while data[:1] == b"\x01" and (len(data) < 3 or len(data) < 3 + int.from_bytes(data[1:3], "big")):  # noqa: PLR2004
        more = await upstream.read(seconds)
        if not more or len(data) > status_detail_bytes_max:
            break
        data += more
    if data[:1] == b"\x00":
        upstream.unread(data[1:])
        return
    detail = data[3 : 3 + status_detail_bytes_max].decode("utf-8", "replace")
    raise UpstreamError(detail or "the gateway closed the connection")


async def open_through_proxy(upstream: Stream, authority: str, seconds: float) -> None:
    """Have a forward proxy open a tunnel (RFC 9110 §9.3.6); raise UpstreamError with its status where it will not."""
    client = h11.Connection(h11.CLIENT, max_incomplete_event_size=response_head_bytes_max)
    name = authority.encode("ascii")
    upstream.put(client.send(h11.Request(method=b"CONNECT", target=name, headers=[(b"host", name)])) or b"")
    upstream.put(client.send(h11.EndOfMessage()) or b"")
    try:
        while True:
            event = client.next_event()
            if isinstance(event, h11.Response):
                break
            if event is h11.NEED_DATA:
                client.receive_data(await upstream.read(seconds))
            elif not isinstance(event, h11.InformationalResponse):
                raise UpstreamError("the forward proxy closed the connection")
    except h11.RemoteProtocolError as error:
        raise UpstreamError("the forward proxy sent no HTTP") from error
    if not 200 <= event.status_code < 300:  # noqa: PLR2004 - a 2xx opens the tunnel
        raise UpstreamError(f"the forward proxy answered {event.status_code}")
    upstream.unread(bytes(client.trailing_data[0]))
