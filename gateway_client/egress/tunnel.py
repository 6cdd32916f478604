"""An opaque tunnel: TLS for its own host and nothing else, then bytes both ways."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gateway_client.egress import tls
from gateway_client.egress.intake import read_seconds_min
from gateway_client.egress.stream import Reset
from gateway_client.egress.wire import Reject, WireError

if TYPE_CHECKING:
    from gateway_client.egress.exchange import Exchange
    from gateway_client.egress.messages import Limits
    from gateway_client.egress.stream import Stream


async def client_hello(stream: Stream, begun: bytes, host: str, limits: Limits) -> bytes:
    """Give the first bytes of the tunnel once they are a ClientHello for the host; raise WireError if they are not."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limits.head_seconds_max
    data = bytearray(begun)
    peeker = tls.Peeker()
    found = peeker.feed(begun)
    while True:
        if isinstance(found, tls.Hello):
            if tls.fits(found, host):
                return bytes(data)
            raise WireError(Reject(400, "sni_mismatch", "the server name in TLS is not the host of the tunnel"))
        if found is tls.Peek.NOT_TLS:
            raise WireError(Reject(400, "not_tls", "the tunnel did not begin with TLS"))
        more = await stream.read(max(deadline - loop.time(), read_seconds_min))
        if not more:
            raise Reset
        data += more
        found = peeker.feed(more)


async def relay(stream: Stream, upstream: Stream, limits: Limits, exchange: Exchange) -> None:
    """Relay until both sides ended, one is lost, the bytes of grant or budget are spent, or nothing moved for long."""
    end = stream.splice(upstream, exchange.allowance, exchange.loan)
    moved = -1
    while not end.done():
        await asyncio.wait((end,), timeout=limits.tunnel_idle_seconds_max)
        now = stream.received_bytes + upstream.received_bytes
        if now == moved:
            return
        moved = now
