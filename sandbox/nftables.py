"""The two fixed nftables rule sets, as bytes for one nfnetlink transaction each. Pure; standard library only.

They are the second layer: the empty gate namespace already leads nowhere. What they add: with SO_BINDTODEVICE an
unprivileged program may emit packets to addresses it has no route for (ip(7), since Linux 5.7); these stop at the
agent's own output. Formats: <linux/netfilter/nf_tables.h>, <linux/netfilter/nfnetlink.h>.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from sandbox.netlink import NLM_F_CREATE, attribute, message, nested, numbered, text

_BATCH_BEGIN: Final = 0x10
_BATCH_END: Final = 0x11
_SUBSYSTEM: Final = 10  # NFNL_SUBSYS_NFTABLES
_NEWTABLE: Final = _SUBSYSTEM << 8 | 0
_NEWCHAIN: Final = _SUBSYSTEM << 8 | 3
_NEWRULE: Final = _SUBSYSTEM << 8 | 6
_NFPROTO_INET: Final = 1
_NLM_F_APPEND: Final = 0x800

_HOOK_INPUT, _HOOK_FORWARD, _HOOK_OUTPUT = 1, 2, 3
_DROP, _ACCEPT = 0, 1
_REG_VERDICT, _REG_1 = 0, 1
_META_OIF, _META_NFPROTO, _META_L4PROTO = 5, 15, 16
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_REJECT_TCP_RST: Final = 1
_LOOPBACK_INDEX: Final = 1

TABLE: Final = "stockade"
_NAMES: Final = bytes((198, 19))  # 198.19.0.0/16


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value))


def _body(*attributes: bytes) -> bytes:
    return struct.pack(">BBH", _NFPROTO_INET, 0, 0) + b"".join(attributes)


def _batch(kind: int) -> bytes:
    return message(kind, struct.pack(">BBH", socket.AF_UNSPEC, 0, _SUBSYSTEM))


def _table() -> bytes:
    return message(_NEWTABLE, _body(text(1, TABLE), _u32(2, 0)), flags=NLM_F_CREATE)


def _chain(name: str, hook: int) -> bytes:
    """A base chain of type filter whose policy is drop, for IPv4 and IPv6 alike."""
    return message(
        _NEWCHAIN,
        _body(text(1, TABLE), text(3, name), nested(4, _u32(1, hook), _u32(2, 0)), _u32(5, _DROP), text(7, "filter")),
        flags=NLM_F_CREATE,
    )


def _expression(name: str, *attributes: bytes) -> bytes:
    return nested(1, text(1, name), nested(2, *attributes))


def _equal(value: bytes) -> bytes:
    return _expression("cmp", _u32(1, _REG_1), _u32(2, 0), nested(3, attribute(1, value)))


def _meta(key: int, value: bytes) -> bytes:
    return _expression("meta", _u32(2, key), _u32(1, _REG_1)) + _equal(value)


def _payload(base: int, offset: int, value: bytes) -> bytes:
    load = _expression("payload", _u32(1, _REG_1), _u32(2, base), _u32(3, offset), _u32(4, len(value)))
    return load + _equal(value)


def _accept() -> bytes:
    return _expression("immediate", _u32(1, _REG_VERDICT), nested(2, nested(2, _u32(1, _ACCEPT))))


def _rule(chain: str, *expressions: bytes) -> bytes:
    return message(
        _NEWRULE, _body(text(1, TABLE), text(2, chain), nested(4, *expressions)), flags=NLM_F_CREATE | _NLM_F_APPEND
    )


def _tcp(source: str, destination: str, *, port_offset: int, port: int) -> bytes:
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    return (
        _meta(_META_NFPROTO, bytes([socket.AF_INET]))
        + _meta(_META_L4PROTO, bytes([socket.IPPROTO_TCP]))
        + _payload(_NETWORK_HEADER, 12, addresses)
        + _payload(_TRANSPORT_HEADER, port_offset, struct.pack(">H", port))
    )


def _transaction(*messages: bytes) -> tuple[bytes, int]:
    """The datagram, and the number of its last message that is acknowledged (BATCH_END itself never is)."""
    inner = numbered((_batch(_BATCH_BEGIN), *messages))
    return inner + _batch(_BATCH_END), len(messages) + 1


def _between(address: str, network: bytes, protocol: int, *, out: bool, port: int = 0) -> bytes:
    """Packets of a protocol between the agent's address and a network, given by its first bytes.

    `out` is as the agent sees it; `port` is the far one, 0 for any.
    """
    mine, theirs = (12, 16) if out else (16, 12)
    far = _payload(_TRANSPORT_HEADER, 2 if out else 0, struct.pack(">H", port)) if port else b""
    return (
        _meta(_META_NFPROTO, bytes([socket.AF_INET]))
        + _meta(_META_L4PROTO, bytes([protocol]))
        + _payload(_NETWORK_HEADER, mine, socket.inet_aton(address))
        + _payload(_NETWORK_HEADER, theirs, network)
        + far
    )


def _transparent(chain: str, *, agent: str, gate: str, out: bool) -> tuple[bytes, ...]:
    """What a transparent network has besides: look-ups at the gate, and TCP to the addresses that it makes up."""
    return (
        _rule(chain, _between(agent, socket.inet_aton(gate), socket.IPPROTO_UDP, out=out, port=53), _accept()),
        _rule(chain, _between(agent, socket.inet_aton(gate), socket.IPPROTO_TCP, out=out, port=53), _accept()),
        _rule(chain, _between(agent, _NAMES, socket.IPPROTO_TCP, out=out), _accept()),
    )


def gate_rules(*, agent: str, gate: str, port: int, transparent: bool = False) -> tuple[bytes, int]:
    """In the gate: TCP from the agent to the proxy's port and its answers; nothing else in, out or through."""
    more_in = _transparent("input", agent=agent, gate=gate, out=True) if transparent else ()
    more_out = _transparent("output", agent=agent, gate=gate, out=False) if transparent else ()
    return _transaction(
        _table(),
        _chain("input", _HOOK_INPUT),
        _chain("forward", _HOOK_FORWARD),
        _chain("output", _HOOK_OUTPUT),
        _rule("input", _tcp(agent, gate, port_offset=2, port=port), _accept()),
        _rule("output", _tcp(gate, agent, port_offset=0, port=port), _accept()),
        *more_in,
        *more_out,
    )


def agent_rules(*, agent: str, gate: str, port: int, transparent: bool = False) -> tuple[bytes, int]:
    """In the agent's namespace: loopback and the proxy's port go out; other TCP is refused at once, the rest dropped.

    A reset instead of silence: a program that tries a wrong port must fail now and not in two minutes.
    """
    return _transaction(
        _table(),
        _chain("output", _HOOK_OUTPUT),
        _rule("output", _meta(_META_OIF, struct.pack("=I", _LOOPBACK_INDEX)), _accept()),
        _rule("output", _tcp(agent, gate, port_offset=2, port=port), _accept()),
        *(_transparent("output", agent=agent, gate=gate, out=True) if transparent else ()),
        _rule(
            "output",
            _meta(_META_L4PROTO, bytes([socket.IPPROTO_TCP])),
            _expression("reject", _u32(1, _REJECT_TCP_RST), attribute(2, b"\0")),
        ),
    )
