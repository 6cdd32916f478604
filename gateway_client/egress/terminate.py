"""TLS that ends here: what is inside an agent's tunnel is read as HTTP, and goes on over TLS of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway_client.egress.answering import UpstreamError
from gateway_client.egress.messages import HttpVersion
from gateway_client.egress.sealed import BrokenSeal, ClientEngine, Sealed, ServerEngine
from gateway_client.egress.stream import Reset
from gateway_client.egress.target import BadTarget, address_of, normalise_host
from gateway_client.egress.tunnel import client_hello
from gateway_client.egress.wire import Reject, WireError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

    from gateway_client.egress.leaves import Leaves
    from gateway_client.egress.messages import Limits
    from gateway_client.egress.stream import Stream

ONLY_HTTP11: Final = (HttpVersion.HTTP11,)
"""Offered to gateways, and where a WebSocket is asked for: its upgrade is of HTTP/1.1."""
ANY_HTTP: Final = (HttpVersion.HTTP2, HttpVersion.HTTP11)


async def open_inside(stream: Stream, begun: bytes, host: str, leaves: Leaves, limits: Limits) -> Sealed:
    """Give the inside of a tunnel to `host`, of which `begun` was read; raise WireError where it is not TLS for it."""
    hello = await client_hello(stream, begun, host, limits)
    engine = ServerEngine(leaves.context(host))
    sealed = Sealed(stream, engine)
    try:
        await sealed.shake(hello, limits.head_seconds_max)
    except BrokenSeal as error:
        raise WireError(Reject(400, "tls_failed", f"the client ended TLS: {error}")) from error
    # A second hello (RFC 8446 section 4.1.2) was read by OpenSSL alone: it may not have named another host.
    if not _is_for(engine.server_name, host):
        raise WireError(Reject(400, "sni_mismatch", "the server name in TLS is not the host of the tunnel"))
    return sealed


def _is_for(name: str | None, host: str) -> bool:
    if name is None:
        return address_of(host) is not None
    try:
        return normalise_host(name) == host
    except BadTarget:
        return False


async def seal(
    upstream: Stream, context: ssl.SSLContext, host: str, seconds: float, *, offered: Sequence[HttpVersion]
) -> tuple[Sealed, HttpVersion]:
    """Give TLS with `host` over a connection to it, verified, and what it chose of `offered`; raise UpstreamError."""
    engine = ClientEngine(context, host, offered)
    sealed = Sealed(upstream, engine)
    try:
        await sealed.shake(b"", seconds)
    except BrokenSeal as error:
        raise UpstreamError(f"cannot speak TLS with {host}: {error}") from error
    except (Reset, TimeoutError) as error:
        raise UpstreamError(f"cannot speak TLS with {host}: it closed the connection or was too slow") from error
    return sealed, engine.chosen
