"""Passes one exchange on over HTTP/2: one connection to the host, one stream, then both are over.

Flow control holds both ways: a body goes up as the host makes room, and room for more of the answer is made once the
agent has taken what came. Frames that move nothing neither prolong an exchange nor let it last.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from typing import TYPE_CHECKING, Final

from gateway_client.egress.answering import UpstreamError
from gateway_client.egress.http2 import BadAnswer, BadRequest, Head, Http2Client, Piece, Step, request_fields
from gateway_client.egress.share import metered
from gateway_client.egress.stream import Reset

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway_client.egress.answering import Answering
    from gateway_client.egress.exchange import Exchange
    from gateway_client.egress.messages import Limits
    from gateway_client.egress.sealed import Sealed
    from gateway_client.egress.share import Share
    from gateway_client.egress.upstream import HeaderList

replies_unread_bytes_max: Final = 64 * 1024
"""Replies to the host's frames that gather while it reads nothing."""


class PassingHttp2:
    """One request over HTTP/2 and its answer. Nothing of the answer reaches the agent before its head is whole."""

    def __init__(
        self,
        answer: Answering,
        upstream: Sealed,
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
        self._client = Http2Client()
        self._up_hash = hashlib.sha256()
        self._going_up = asyncio.Lock()
        self._replies_unread = 0
        self._room: asyncio.Future[None] | None = None
        self._moved_at = 0.0

    async def run(self, target: bytes, headers: HeaderList, body: bytes | AsyncIterator[bytes]) -> bool:
        """Pass it on; give whether the agent's connection can be kept. Raise UpstreamError where the host failed."""
        self._moved()
        try:
            fields = request_fields(self._method, target, headers)
        except BadRequest as error:
            raise UpstreamError(str(error)) from error
        self._client.begin(fields, end=not body)
        await self._up()
        if not body:
            return await self._read_answer(pump=None)
        pieces = _one(body) if isinstance(body, bytes) else body
        pump = asyncio.get_running_loop().create_task(metered(self._pump(pieces), self._share))
        pump.add_done_callback(self._pump_ended)
        try:
            return await self._read_answer(pump=pump)
        finally:
            pump.cancel()

    def _moved(self) -> None:
        self._moved_at = asyncio.get_running_loop().time()

    async def _up(self) -> int:
        """Send what has gathered, in its order also where bytes have to be waited for; give how much it was."""
        async with self._going_up:
            data = self._client.outgoing()
            if data:
                await self._exchange.take(len(data))
                self._exchange.bytes_up += len(data)
                self._upstream.put(data)
            return len(data)

    # --- the body going up

    async def _pump(self, body: AsyncIterator[bytes]) -> None:
        client, seconds = self._client, self._limits.body_seconds_max
        try:
            async for data in body:
                sent = 0
                while sent < len(data):
                    piece = data[sent : sent + await self._wait_for_room()]
                    sent += len(piece)
                    self._up_hash.update(piece)
                    client.send(piece, moving=sent == len(data))
                    await self._up()
                    self._moved()
                    await self._write_out(seconds)
            client.end()
            await self._up()
        except BadAnswer as error:
            raise UpstreamError(f"cannot send body: {error}") from error

    async def _wait_for_room(self) -> int:
        while not (room := self._client.room):
            self._room = asyncio.get_running_loop().create_future()
            try:
                await asyncio.wait_for(self._room, self._limits.body_seconds_max)
            except TimeoutError as error:
                raise UpstreamError("cannot send body: the host takes none of it") from error
        return room

    async def _write_out(self, seconds: float) -> None:
        try:
            await self._upstream.write(b"", seconds)
        except TimeoutError as error:
            raise UpstreamError("cannot send body: the host takes none of it") from error

    def _pump_ended(self, pump: asyncio.Task[None]) -> None:
        """Wake who waits for the answer where the body will not be whole: there is none to come."""
        if not pump.cancelled() and pump.exception() is not None:
            self._upstream.reset()

    # --- the answer coming down

    async def _read_answer(self, *, pump: asyncio.Task[None] | None) -> bool:
        """Read the answer while the body may still be going up: a host may answer early."""
        answer = self._answer
        try:
            while True:
                await self._share.breathe()  # while bytes are there nothing below has to wait
                event = self._step()
                if event is Step.NEED_MORE:
                    await self._reply()
                    await self._feed(pump)
                elif isinstance(event, Head):
                    self._moved()
                    if event.ended and event.length and not answer.is_bodyless(event.status):
                        raise UpstreamError("cannot read answer: it is shorter than it said")
                    await answer.head(event.status, event.headers)
                elif isinstance(event, Piece):
                    self._moved()
                    await answer.data(event.data)
                    self._client.passed_on(event)
                elif event is Step.END_OF_BODY:
                    await answer.end()
                    whole = pump is None or (pump.done() and not pump.cancelled() and pump.exception() is None)
                    return answer.keep_alive and whole
        except BadAnswer as error:
            raise UpstreamError(f"cannot read answer: {error}") from error
        finally:
            self._exchange.request_sha256 = self._up_hash.hexdigest()
            self._exchange.response_sha256 = answer.sha256

    def _step(self) -> Head | Piece | Step:
        event = self._client.step()
        if self._room is not None and not self._room.done() and self._client.room:
            self._room.set_result(None)
        return event

    async def _reply(self) -> None:
        """Send what h2 replies to what was read; without waiting for the host, which may wait for us to read first."""
        sent = await self._up()
        if not sent:
            return
        self._replies_unread = 0 if self._upstream.writable else self._replies_unread + sent
        if self._replies_unread > replies_unread_bytes_max:
            raise UpstreamError("cannot read answer: the host sends frame after frame and reads no reply")

    async def _feed(self, pump: asyncio.Task[None] | None) -> None:
        _raise_of(pump)
        try:
            data = await self._read()
        except Reset as error:
            _raise_of(pump)
            raise UpstreamError("cannot read answer: the host reset the connection") from error
        if not data:
            raise UpstreamError("cannot read answer: the host closed the connection")
        self._client.feed(data)

    async def _read(self) -> bytes:
        """Read while the exchange moves either way; a host that only pings says nothing."""
        now = asyncio.get_running_loop().time
        while (left := self._moved_at + self._limits.response_idle_seconds_max - now()) > 0:
            with contextlib.suppress(TimeoutError):
                return await self._upstream.read(left)
        raise UpstreamError("cannot read answer: the host sent nothing of it for too long")


def _raise_of(pump: asyncio.Task[None] | None) -> None:
    if pump is not None and pump.done() and not pump.cancelled() and (problem := pump.exception()) is not None:
        raise problem


async def _one(body: bytes) -> AsyncIterator[bytes]:
    yield body
