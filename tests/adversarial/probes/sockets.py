"""Kinds of sockets, socket options, netlink and interface requests."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from functools import partial
from typing import Final

from tests.adversarial.probes.inside import Reached, add, call, judge, judged, name_of, probe, refused, text

UNSUPPORTED: Final = ("EAFNOSUPPORT", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT", "EINVAL", "EPERM", "EPROTOTYPE", "ENOENT")

FAMILIES: Final = {
    "ax25": 3, "ipx": 4, "appletalk": 5, "netrom": 6, "bridge": 7, "atmpvc": 8, "x25": 9, "inet6": 10, "rose": 11,
    "decnet": 12, "netbeui": 13, "security": 14, "key": 15, "packet": 17, "ash": 18, "econet": 19, "atmsvc": 20,
    "rds": 21, "sna": 22, "irda": 23, "pppox": 24, "wanpipe": 25, "llc": 26, "infiniband": 27, "mpls": 28, "can": 29,
    "tipc": 30, "bluetooth": 31, "iucv": 32, "rxrpc": 33, "isdn": 34, "phonet": 35, "ieee802154": 36, "caif": 37,
    "alg": 38, "nfc": 39, "vsock": 40, "kcm": 41, "qipcrtr": 42, "smc": 43, "xdp": 44, "mctp": 45,
    "of number 46": 46, "of number 255": 255,
}  # fmt: skip


def _family(family: int) -> str:
    """Try every type, with the protocols that families have."""
    error = ""
    for kind in (1, 2, 3, 4, 5, 6, 10):
        for protocol in (0, 1, 2, 6, 17, 58, 768):
            result, error = call(41, family, kind, protocol)
            if result >= 0:
                raise Reached(f"type {kind}, protocol {protocol}")
    return error


for _name, _number in FAMILIES.items():
    add(f"socket {_name}", partial(_family, _number), absent=UNSUPPORTED)

# Within the families that are open, and with bits that a careless filter does not look at.
KINDS: Final[dict[str, tuple[int, int, int]]] = {
    "inet raw tcp": (2, 3, 6),
    "inet raw igmp": (2, 3, 2),
    "inet raw anything": (2, 3, 255),
    "inet raw, close on exec": (2, 3 | 0o2000000, 1),
    "inet rdm": (2, 4, 0),
    "inet seqpacket": (2, 5, 0),
    "inet sctp, one to many": (2, 5, 132),
    "inet dccp": (2, 6, 33),
    "inet l2tp": (2, 2, 115),
    "inet smc": (2, 1, 256),
    "inet mptcp, not blocking": (2, 1 | 0o4000, 262),
    "inet icmp, close on exec": (2, 2 | 0o2000000, 1),
    "inet of the packet type, which the kernel turns into a packet socket": (2, 10, 768),
    "packet, with high bits": (1 << 32 | 17, 3, 768),
    "inet6, with high bits": (1 << 32 | 10, 1, 0),
    "raw, with high bits": (1 << 32 | 2, 1 << 32 | 3, 1),
    "icmp, with high bits": (2, 2, 1 << 32 | 1),
    "netlink audit, with high bits": (16, 3, 1 << 32 | 9),
}
for _name, _kind in KINDS.items():
    add(f"socket {_name}", partial(judged, UNSUPPORTED, 41, *_kind), absent=UNSUPPORTED)

NETLINK: Final = {
    "usersock": 2, "firewall": 3, "sock_diag": 4, "nflog": 5, "xfrm": 6, "selinux": 7, "iscsi": 8, "audit": 9,
    "fib lookup": 10, "connector": 11, "netfilter": 12, "uevent": 15, "generic": 16, "scsi transport": 18,
    "ecryptfs": 19, "rdma": 20, "crypto": 21, "smc": 22,
}  # fmt: skip
for _name, _number in NETLINK.items():
    add(f"netlink {_name}", partial(judged, UNSUPPORTED, 41, 16, 2, _number), absent=UNSUPPORTED)


def _pair(family: int, kind: int, protocol: int) -> str:
    two = (ctypes.c_int * 2)()
    return judge(call(53, family, kind, protocol, ctypes.addressof(two)))


for _name, _kind in {
    "inet": (2, 1, 0),
    "inet6": (10, 1, 0),
    "netlink": (16, 3, 0),
    "tipc": (30, 1, 0),
    "packet": (17, 3, 768),
    "inet, with high bits": (1 << 32 | 2, 1, 0),
}.items():
    add(f"socketpair {_name}", partial(_pair, *_kind))

# --- options that need a capability ---

OPTIONS: Final[dict[str, tuple[int, int, bytes]]] = {
    "IPT_SO_SET_REPLACE (CVE-2021-22555)": (0, 64, b"\0" * 96),
    "IPT_SO_GET_INFO as a set": (0, 65, b"\0" * 96),
    "ARPT_SO_SET_REPLACE": (0, 96, b"\0" * 96),
    "EBT_SO_SET_ENTRIES": (0, 128, b"\0" * 96),
    "IP_VS_SO_SET_ADD": (0, 1154, b"\0" * 96),
    "IP_IPSEC_POLICY": (0, 16, b"\0" * 200),
    "IP_XFRM_POLICY": (0, 17, b"\0" * 200),
    "IP_TRANSPARENT": (0, 19, b"\1\0\0\0"),
    "MRT_INIT": (0, 200, b"\1\0\0\0"),
    "SO_DEBUG": (1, 1, b"\1\0\0\0"),
    "SO_MARK": (1, 36, b"\1\0\0\0"),
    "SO_PRIORITY 7": (1, 12, struct.pack("i", 7)),
    "SO_BUSY_POLL_BUDGET": (1, 70, struct.pack("i", 60000)),
    "TCP_REPAIR": (6, 19, b"\1\0\0\0"),
}


def _option(level: int, option: int, value: bytes) -> str:
    with socket.socket() as sock:
        return refused(lambda: sock.setsockopt(level, option, value), by=("EPERM", "EACCES", "ENOPROTOOPT", "ENOTSUP"))


for _name, _option_value in OPTIONS.items():
    add(f"setsockopt {_name}", partial(_option, *_option_value), absent=("ENOPROTOOPT", "ENOTSUP"))


def _buffer(option: int, shown: int) -> str:
    """Ask for a larger buffer; that nothing is answered says nothing, so it is looked at afterwards."""
    with socket.socket() as sock:
        before = sock.getsockopt(1, shown)
        with contextlib.suppress(OSError):
            sock.setsockopt(1, option, struct.pack("i", 1 << 24))
        after = sock.getsockopt(1, shown)
    if after > before:
        raise Reached(after)
    return "as it was"


for _name, _option_shown in {
    "SO_SNDBUF": (7, 7),
    "SO_RCVBUF": (8, 8),
    "SO_SNDBUFFORCE": (32, 7),
    "SO_RCVBUFFORCE": (33, 8),
}.items():
    add(f"a larger buffer by {_name}", partial(_buffer, *_option_shown))


# --- credentials of unix sockets ---


def _credentials(pid: int, uid: int, gid: int) -> str:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    two.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    ucred = struct.pack("iII", pid or os.getpid(), os.getuid() if uid < 0 else uid, os.getgid() if gid < 0 else gid)
    return refused(lambda: one.sendmsg([b"x"], [(socket.SOL_SOCKET, 2, ucred)]))


add("forge the pid that a unix socket tells", partial(_credentials, 1, -1, -1))
add("forge the uid that a unix socket tells", partial(_credentials, 0, 65533, -1))
add("forge the gid that a unix socket tells", partial(_credentials, 0, -1, 65533))

# --- netlink writes ---

MESSAGES: Final = {
    "RTM_NEWLINK": 16, "RTM_DELLINK": 17, "RTM_SETLINK": 19, "RTM_NEWADDR": 20, "RTM_DELADDR": 21, "RTM_NEWROUTE": 24,
    "RTM_DELROUTE": 25, "RTM_NEWNEIGH": 28, "RTM_DELNEIGH": 29, "RTM_NEWRULE": 32, "RTM_DELRULE": 33,
    "RTM_NEWQDISC": 36, "RTM_DELQDISC": 37, "RTM_NEWTCLASS": 40, "RTM_NEWTFILTER": 44, "RTM_NEWACTION": 48,
    "RTM_SETNEIGHTBL": 67, "RTM_NEWADDRLABEL": 72, "RTM_SETDCB": 79, "RTM_NEWMDB": 84, "RTM_NEWNSID": 88,
    "RTM_NEWCHAIN": 100, "RTM_NEWNEXTHOP": 104, "RTM_NEWLINKPROP": 108, "RTM_NEWVLAN": 112, "RTM_NEWTUNNEL": 120,
}  # fmt: skip


def netlink(kind: int, body: bytes, flags: int = 0) -> int:
    """Give the errno with which the kernel answers a message of NETLINK_ROUTE."""
    message = struct.pack("=IHHII", 16 + len(body), kind, 0x5 | flags, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.settimeout(5)
        sock.send(message)
        return -int(struct.unpack_from("=i", sock.recv(65536), 16)[0])


def _message(kind: int) -> str:
    """Send a message too short to do anything: who may not is told so before it is looked at."""
    return judge((-1, name_of(netlink(kind, bytes(4)))), by=("EPERM",))


for _name, _number in MESSAGES.items():
    add(f"netlink write {_name}", partial(_message, _number))


@probe("netlink write of a whole route")
def route() -> str:
    body = struct.pack("=BBBBBBBBI", 2, 24, 0, 0, 254, 4, 253, 1, 0)
    body += struct.pack("=HH4s", 8, 1, socket.inet_aton("192.0.2.0")) + struct.pack("=HHI", 8, 4, 1)
    return judge((-1 if (code := netlink(24, body, 0x600)) else 0, name_of(code)), by=("EPERM",))


@probe("netlink: hear of all network namespaces")
def all_namespaces() -> str:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        return refused(lambda: sock.setsockopt(270, 8, 1), by=("EPERM",))


@probe("netlink: speak to a group")
def speak_to_group() -> str:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        return refused(lambda: sock.sendto(struct.pack("=IHHII", 16, 16, 1, 1, 0), (0, 1)), by=("EPERM",))


# --- interface requests ---

REQUESTS: Final = {
    "SIOCADDRT": 0x890B, "SIOCDELRT": 0x890C, "SIOCSIFFLAGS": 0x8914, "SIOCSIFADDR": 0x8916, "SIOCSIFDSTADDR": 0x8918,
    "SIOCSIFBRDADDR": 0x891A, "SIOCSIFNETMASK": 0x891C, "SIOCSIFMTU": 0x8922, "SIOCSIFNAME": 0x8923,
    "SIOCSIFHWADDR": 0x8924, "SIOCSIFHWBROADCAST": 0x8937, "SIOCSIFTXQLEN": 0x8943, "SIOCDARP": 0x8953,
    "SIOCSARP": 0x8955, "SIOCSIFMAP": 0x8971, "SIOCADDMULTI": 0x8931, "SIOCDELMULTI": 0x8932, "SIOCBRADDBR": 0x89A0,
    "SIOCBRADDIF": 0x89A2, "SIOCBONDENSLAVE": 0x8990, "SIOCSHWTSTAMP": 0x89B0, "SIOCSIFVLAN": 0x8983,
}  # fmt: skip


def _interface(request: int) -> str:
    """Ask for a change to an interface that there is not, or to an address of no family."""
    empty = (0x890B, 0x890C, 0x8953, 0x8955)  # routes and neighbours: of no family
    pointer = text(bytes(128) if request in empty else b"sktest0".ljust(128, b"\0"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return judge(call(16, sock.fileno(), request, pointer), by=("EPERM", "ENOTTY", "ENOPKG"))


for _name, _number in REQUESTS.items():
    add(f"interface request {_name}", partial(_interface, _number), absent=("ENOTTY", "EINVAL", "ENOPKG"))
