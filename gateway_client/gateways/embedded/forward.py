"""The forward proxy: from a name a grant allows to a connected socket, and bytes both ways.

The daemon decided *that* this host and port may be reached, and the dialer wrote it into the preface. Here it is
decided *where* that is: the name is resolved once, every address is judged, and the connection goes to a judged
address and no other. So a name that resolves to the host itself, or to another address the second time, leads nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from gateway_client.gateways.embedded.addresses import refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from gateway_client.gateways.embedded.addresses import Address, Network
    from gateway_client.gateways.embedded.config import Pin
    from gateway_client.gateways.preface import Destination

    Resolve = Callable[[str], Awaitable[Sequence[Address]]]

CONNECT_SECONDS_MAX: Final = 10.0
RESOLVE_SECONDS_MAX: Final = 5.0
RESOLUTIONS_MAX: Final = 32  # at once: a look-up blocks a thread
ADDRESSES_TRIED_MAX: Final = 4
IDLE_SECONDS_MAX: Final = 3600.0
SPLICE_BYTES: Final = 64 * 1024
REASON_BYTES_MAX: Final = 1024

OK: Final = b"\x00"


class ForwardError(Exception):
    """Why a destination was not opened, in words an agent may read: no address of the host's network is in it."""


def failed(reason: str) -> bytes:
    """Return the status bytes of a refusal: 0x01, two bytes of length, UTF-8."""
    text = reason.encode("utf-8", "replace")[:REASON_BYTES_MAX]
    return b"\x01" + struct.pack("!H", len(text)) + text


@dataclass(frozen=True, slots=True)
class Rules:
    """The operator's own destinations."""

    hosts: Mapping[str, Pin] = field(default_factory=dict)
    allow_networks: Sequence[Network] = ()


def targets(destination: Destination, resolved: Sequence[Address], rules: Rules) -> list[tuple[Address, int]]:
    """Return the addresses and ports that may be connected to, in order; raises ForwardError where none may. Pure."""
    allowed = []
    refused = set()
    for address in resolved:
        reason = refusal(address, rules.allow_networks)
        if reason is None:
            allowed.append((address, destination.port))
        else:
            refused.add(reason)
    if not allowed:
        why = f"it resolves to a {', '.join(sorted(refused))} address" if refused else "it has no address"
        raise ForwardError(f"cannot reach {destination.host}: {why}")
    return allowed[:ADDRESSES_TRIED_MAX]


class Resolver:
    """Resolves by the host's own resolver, outside the event loop."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(RESOLUTIONS_MAX)

    async def __call__(self, host: str) -> list[Address]:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(RESOLVE_SECONDS_MAX), self._slots:
                found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        except (OSError, UnicodeError, TimeoutError) as error:
            raise ForwardError(f"cannot reach {host}: the name does not resolve") from error
        return list(dict.fromkeys(ip_address(str(address[0])) for *_, address in found))


async def connect(destination: Destination, rules: Rules, resolve: Resolve) -> socket.socket:
    """Return a connected socket to a judged address of the destination; raises ForwardError."""
    pin = rules.hosts.get(destination.host.rstrip("."))
    if pin is not None:
        candidates = [(pin.address, pin.port or destination.port)]
    else:
        candidates = targets(destination, await resolve(destination.host.strip("[]")), rules)
    for address, port in candidates:
        with contextlib.suppress(OSError, TimeoutError):
            return await _open(address, port)
    raise ForwardError(f"cannot reach {destination.host} port {destination.port}: nothing answers there")


async def _open(address: Address, port: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6  # noqa: PLR2004 - IP versions
    opened = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.timeout(CONNECT_SECONDS_MAX):
            # The packed address as text: nothing is left to resolve.
            await asyncio.get_running_loop().sock_connect(opened, (str(address), port))
    except BaseException:
        opened.close()
        raise
    return opened


async def splice(near: tuple[asyncio.StreamReader, asyncio.StreamWriter], far: socket.socket) -> None:
    """Pass bytes both ways until both sides have ended, one has reset, or nothing moved for long."""
    near_reader, near_writer = near
    far_reader, far_writer = await asyncio.open_connection(sock=far, limit=SPLICE_BYTES)
    tasks = [
        asyncio.create_task(_copy(near_reader, far_writer)),
        asyncio.create_task(_copy(far_reader, near_writer)),
    ]
    try:
        # The first that fails (a reset, a limit) ends both; one that ends cleanly leaves the other running.
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        far_writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await _read(reader):
        writer.write(data)
        async with asyncio.timeout(IDLE_SECONDS_MAX):
            await writer.drain()
    writer.write_eof()


async def _read(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(IDLE_SECONDS_MAX):
        return await reader.read(SPLICE_BYTES)
