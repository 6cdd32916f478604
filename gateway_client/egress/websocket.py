"""WebSocket (RFC 6455): what an upgrade looks like, what proves that the host agreed, and the relay after it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from typing import TYPE_CHECKING, Final

from gateway_client.egress.exchange import BytesSpent
from gateway_client.egress.share import metered
from gateway_client.egress.stream import Reset
from gateway_client.egress.upstream import returned_headers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from gateway_client.egress.messages import Limits
    from gateway_client.egress.sealed import Sealed
    from gateway_client.egress.share import Share
    from gateway_client.egress.stream import Stream
    from gateway_client.egress.wire import Headers

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY: Final = re.compile(rb"[A-Za-z0-9+/]{22}==")
BODYLESS: Final = frozenset({b"content-length", b"transfer-encoding"})


def asked_for(method: bytes, headers: Mapping[bytes, bytes]) -> bool:
    """Whether a head with an Upgrade asks for a WebSocket, and for nothing else."""
    words = {word.strip().lower() for word in headers.get(b"connection", b"").split(b",")}
    return (
        method == b"GET"
        and headers[b"upgrade"].lower() == b"websocket"
        and b"upgrade" in words
        and headers.get(b"sec-websocket-version") == b"13"
        and _KEY.fullmatch(headers.get(b"sec-websocket-key", b"")) is not None
        and not BODYLESS & headers.keys()
    )


def agreed(asked: Headers, answered: Headers) -> bool:
    """Whether an answer 101 is to this request: whoever made it has read the key (RFC 6455 section 4.1)."""
    key = next(value for name, value in asked if name == b"sec-websocket-key")
    proof = base64.b64encode(hashlib.sha1(key + _GUID).digest())  # noqa: S324 - as the RFC has it; it guards nothing
    upgrades = [value.lower() for name, value in answered if name == b"upgrade"]
    proofs = [value for name, value in answered if name == b"sec-websocket-accept"]
    return upgrades == [b"websocket"] and proofs == [proof]


def answer(headers: Headers) -> bytes:
    """Give the 101 that the agent gets."""
    passed = returned_headers(headers, credential="", keep_cookies=True)
    passed = [(name, value) for name, value in passed if name not in BODYLESS]
    passed += [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
    return b"HTTP/1.1 101 Switching Protocols\r\n" + b"".join(b"%s: %s\r\n" % pair for pair in passed) + b"\r\n"


class Relay:
    """Passes bytes both ways until one side ends or nothing moved for long; counts them."""

    def __init__(
        self,
        agent: Stream | Sealed,
        upstream: Stream | Sealed,
        limits: Limits,
        share: Share,
        *,
        take: Callable[[int], Awaitable[None]],
    ) -> None:
        """`take` returns once a piece may pass, and raises BytesSpent where it may not."""
        self._agent = agent
        self._upstream = upstream
        self._limits = limits
        self._share = share
        self._take = take
        self.begun = b""
        """What the agent had sent already."""
        self.bytes_up = 0
        self.bytes_down = 0

    async def run(self) -> None:
        """Relay; raise Reset where a side was cut off and TimeoutError where one does not take what it is sent."""
        loop = asyncio.get_running_loop()
        if self.begun:
            await self._spend(len(self.begun))
            self.bytes_up += len(self.begun)
            await self._upstream.write(self.begun, self._limits.body_seconds_max)
        tasks = [loop.create_task(metered(self._pump(up=up), self._share)) for up in (True, False)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _spend(self, count: int) -> None:
        try:
            await self._take(count)
        except BytesSpent as error:
            self._agent.reset()
            self._upstream.reset()
            raise Reset from error

    async def _pump(self, *, up: bool) -> None:
        near, far = (self._agent, self._upstream) if up else (self._upstream, self._agent)
        while True:
            moved = self.bytes_up + self.bytes_down
            try:
                data = await near.read(self._limits.tunnel_idle_seconds_max)
            except TimeoutError:
                if moved == self.bytes_up + self.bytes_down:
                    return
                continue
            if not data:
                return
            await self._spend(len(data))
            if up:
                self.bytes_up += len(data)
            else:
                self.bytes_down += len(data)
            await far.write(data, self._limits.body_seconds_max)
            await self._share.breathe()
