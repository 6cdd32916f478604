"""What an agent gets of what a host says over HTTP/2: the code that passes it on, without sockets."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gateway_client.egress.answering import Answering, UpstreamError
from gateway_client.egress.exchange import Exchange
from gateway_client.egress.messages import Limits
from gateway_client.egress.passing_http2 import PassingHttp2
from gateway_client.egress.share import Share, Thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

HEAD = [(b"host", b"api.example.com"), (b"connection", b"close")]


@dataclass
class Ends:
    """Both ends: what the host says, piece by piece, and what each gets."""

    said: deque[bytes]
    sent: bytearray = field(default_factory=bytearray)
    agent: bytearray = field(default_factory=bytearray)
    writable: bool = True

    def put(self, data: bytes) -> None:
        self.sent += data

    async def read(self, seconds: float) -> bytes:
        assert seconds > 0
        return self.said.popleft() if self.said else b""

    async def write(self, data: bytes, seconds: float) -> None:
        assert seconds > 0
        self.sent += data

    def reset(self) -> None:
        self.said.clear()


@dataclass
class Agent:
    got: bytearray

    async def write(self, data: bytes, seconds: float) -> None:
        assert seconds > 0
        self.got += data


@dataclass
class Passed:
    got: bytes
    sent: bytes
    error: str
    """Empty: the answer is whole."""
    exchange: Exchange


def passed(
    said: bytes,
    *,
    step: int = 1 << 20,
    method: str = "GET",
    http11: bool = True,
    target: bytes = b"/",
    headers: list[tuple[bytes, bytes]] | None = None,
    body: bytes | AsyncIterator[bytes] = b"",
) -> Passed:
    """Pass a request on to a host that says this, in pieces of `step` bytes, and then closes the connection."""
    ends = Ends(deque(said[start : start + step] for start in range(0, len(said), step)))
    got = bytearray()
    exchange = Exchange(x=1, agent_id="ag", started=0.0)

    async def run() -> str:
        share = Share(asyncio.get_running_loop(), Thread())
        agent: Any = Agent(got)
        upstream: Any = ends
        answer = Answering(agent, exchange, Limits(), method=method, http11=http11, keep_alive=http11, credential="")
        passing = PassingHttp2(answer, upstream, exchange, Limits(), share, method=method)
        try:
            await passing.run(target, headers or HEAD, body)
        except UpstreamError as error:
            assert not answer.whole
            return str(error) or "?"
        assert answer.whole
        return ""

    error = asyncio.run(run())
    return Passed(bytes(got), bytes(ends.sent), error, exchange)
