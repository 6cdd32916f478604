"""Raw rtnetlink and nfnetlink: the hot path that makes an agent's network in about a millisecond.

Pure encoders (bytes in, bytes out) and one small socket. Standard library only: the launcher imports this as root.
Formats: rtnetlink(7), netlink(7), <linux/rtnetlink.h>, <linux/if_link.h>, <linux/veth.h>.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from types import TracebackType

NETLINK_ROUTE: Final = 0
NETLINK_NETFILTER: Final = 12

NLM_F_REQUEST: Final = 0x01
NLM_F_ACK: Final = 0x04
NLM_F_EXCL: Final = 0x200
NLM_F_CREATE: Final = 0x400
NLMSG_ERROR: Final = 2
NLA_F_NESTED: Final = 0x8000

RTM_NEWLINK: Final = 16
RTM_NEWADDR: Final = 20
RTM_NEWROUTE: Final = 24
RTM_NEWNEIGH: Final = 28

IFF_UP: Final = 0x1
IFLA_ADDRESS: Final = 1
IFLA_IFNAME: Final = 3
IFLA_LINKINFO: Final = 18
IFLA_IFALIAS: Final = 20
IFLA_NET_NS_FD: Final = 28
IFLA_INFO_KIND: Final = 1
IFLA_INFO_DATA: Final = 2
VETH_INFO_PEER: Final = 1

IFA_ADDRESS: Final = 1
IFA_LOCAL: Final = 2
RTA_DST: Final = 1
RTA_OIF: Final = 4
RTA_PREFSRC: Final = 7
NDA_DST: Final = 1
NDA_LLADDR: Final = 2

NUD_PERMANENT: Final = 0x80
RT_TABLE_MAIN: Final = 254
RTPROT_STATIC: Final = 4
RT_SCOPE_LINK: Final = 253
RTN_UNICAST: Final = 1
RTN_LOCAL: Final = 2
RTA_GATEWAY: Final = 5
RT_TABLE_LOCAL: Final = 255
RT_SCOPE_UNIVERSE: Final = 0
RT_SCOPE_HOST: Final = 254
RTNH_F_ONLINK: Final = 4

_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_IFINFO: Final = struct.Struct("=BxHiII")
_IFADDR: Final = struct.Struct("=BBBBI")
_RTMSG: Final = struct.Struct("=BBBBBBBBI")
_NDMSG: Final = struct.Struct("=BxxxiHBB")
_ERROR: Final = struct.Struct("=i")
_ANSWER_BYTES_MAX: Final = 32768
_ANSWERS_MAX: Final = 256


class NetlinkError(OSError):
    """The kernel refused one message; `strerror` says which, `errno` why."""


def attribute(kind: int, payload: bytes) -> bytes:
    """One netlink attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode("ascii") + b"\0")


def message(kind: int, body: bytes, *, flags: int = 0, sequence: int = 0) -> bytes:
    """One netlink message: header and body, padded to four bytes."""
    return _HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | flags, sequence, 0) + body + b"\0" * (-len(body) % 4)


def veth(
    name: str, *, index: int, mac: bytes, peer_name: str, peer_index: int, peer_mac: bytes, peer_namespace: int
) -> bytes:
    """A veth pair made up at once: `name` in the socket's namespace, the peer in the namespace behind a descriptor.

    Indexes are given, so that nothing has to be asked back; both MAC addresses are given, so that each side's
    neighbour entry can be permanent. `name` comes up; the peer does not yet (it would have no other end: ENOTCONN).
    """
    peer = (
        _IFINFO.pack(socket.AF_UNSPEC, 0, peer_index, 0, 0)
        + text(IFLA_IFNAME, peer_name)
        + attribute(IFLA_ADDRESS, peer_mac)
        + attribute(IFLA_NET_NS_FD, struct.pack("=I", peer_namespace))
    )
    body = (
        _IFINFO.pack(socket.AF_UNSPEC, 0, index, IFF_UP, IFF_UP)
        + text(IFLA_IFNAME, name)
        + attribute(IFLA_ADDRESS, mac)
        + nested(
            IFLA_LINKINFO,
            text(IFLA_INFO_KIND, "veth"),
            nested(IFLA_INFO_DATA, attribute(VETH_INFO_PEER | NLA_F_NESTED, peer)),
        )
    )
    return message(RTM_NEWLINK, body, flags=NLM_F_CREATE | NLM_F_EXCL)


def link_up(index: int, *, alias: str = "") -> bytes:
    name = text(IFLA_IFALIAS, alias) if alias else b""
    return message(RTM_NEWLINK, _IFINFO.pack(socket.AF_UNSPEC, 0, index, IFF_UP, IFF_UP) + name)


def address(local: str, *, prefix: int, index: int) -> bytes:
    packed = socket.inet_aton(local)
    body = _IFADDR.pack(socket.AF_INET, prefix, 0, 0, index)
    return message(
        RTM_NEWADDR,
        body + attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed),
        flags=NLM_F_CREATE | NLM_F_EXCL,
    )


def host_route(destination: str, *, index: int, source: str) -> bytes:
    """A route in the main table to one address on the link, with the source address fixed."""
    body = _RTMSG.pack(socket.AF_INET, 32, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, RT_SCOPE_LINK, RTN_UNICAST, 0)
    attributes = (
        attribute(RTA_DST, socket.inet_aton(destination)),
        attribute(RTA_OIF, struct.pack("=I", index)),
        attribute(RTA_PREFSRC, socket.inet_aton(source)),
    )
    return message(RTM_NEWROUTE, body + b"".join(attributes), flags=NLM_F_CREATE | NLM_F_EXCL)


def gateway_route(destination: str, *, prefix: int, gateway: str, index: int, source: str) -> bytes:
    """A route to a network by a gateway that needs no other route to be reached (RTNH_F_ONLINK)."""
    body = _RTMSG.pack(
        socket.AF_INET, prefix, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, RT_SCOPE_UNIVERSE, RTN_UNICAST, RTNH_F_ONLINK
    )
    attributes = (
        attribute(RTA_DST, socket.inet_aton(destination)),
        attribute(RTA_OIF, struct.pack("=I", index)),
        attribute(RTA_GATEWAY, socket.inet_aton(gateway)),
        attribute(RTA_PREFSRC, socket.inet_aton(source)),
    )
    return message(RTM_NEWROUTE, body + b"".join(attributes), flags=NLM_F_CREATE | NLM_F_EXCL)


def local_route(destination: str, *, prefix: int, index: int) -> bytes:
    """Make a whole network local to the namespace: packets to any address of it are received."""
    body = _RTMSG.pack(socket.AF_INET, prefix, 0, 0, RT_TABLE_LOCAL, RTPROT_STATIC, RT_SCOPE_HOST, RTN_LOCAL, 0)
    attributes = (attribute(RTA_DST, socket.inet_aton(destination)), attribute(RTA_OIF, struct.pack("=I", index)))
    return message(RTM_NEWROUTE, body + b"".join(attributes), flags=NLM_F_CREATE | NLM_F_EXCL)


def permanent_neighbour(target: str, *, mac: bytes, index: int) -> bytes:
    """A neighbour that is never asked for: without it the global table (gc_thresh3 1024) fails near 512 agents."""
    body = _NDMSG.pack(socket.AF_INET, index, NUD_PERMANENT, 0, 0)
    return message(
        RTM_NEWNEIGH,
        body + attribute(NDA_DST, socket.inet_aton(target)) + attribute(NDA_LLADDR, mac),
        flags=NLM_F_CREATE | NLM_F_EXCL,
    )


def numbered(messages: tuple[bytes, ...]) -> bytes:
    """The messages as one datagram: numbered from 1, and only the last asks for an acknowledgement.

    The kernel handles them in order and reports every failure whether or not it was asked to acknowledge.
    """
    parts = []
    for number, item in enumerate(messages, start=1):
        length, kind, flags, _, port = _HEADER.unpack_from(item)
        if number == len(messages):
            flags |= NLM_F_ACK
        parts.append(_HEADER.pack(length, kind, flags, number, port) + item[16:])
    return b"".join(parts)


class Netlink:
    """A netlink socket in the calling thread's network namespace, which it keeps whatever the thread does later."""

    def __init__(self, protocol: int = NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)

    def perform(self, datagram: bytes, *, last: int, what: str) -> None:
        """Send a datagram made by `numbered()`; return when message number `last` was done, raise at the first refusal.

        The kernel works inside send(2), so every answer is there when it returns, and nothing here can wait.
        """
        self._socket.send(datagram)
        for _ in range(_ANSWERS_MAX):
            answers = self._socket.recv(_ANSWER_BYTES_MAX, socket.MSG_DONTWAIT)
            offset = 0
            while offset + 16 <= len(answers):
                length, kind, _, sequence, _ = _HEADER.unpack_from(answers, offset)
                if kind == NLMSG_ERROR:
                    code = -_ERROR.unpack_from(answers, offset + 16)[0]
                    if code:
                        raise NetlinkError(
                            code, f"cannot set up {what}: message {sequence} of {last}: {os.strerror(code)}"
                        )
                    if sequence == last:
                        return
                if length < 16:  # noqa: PLR2004 - the size of a header; a kernel that answers less is not one
                    break
                offset += (length + 3) & ~3
        raise NetlinkError(errno.EPROTO, f"cannot set up {what}: no acknowledgement from the kernel")

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
