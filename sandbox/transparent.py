"""Transparent networks: an agent that knows of no proxy finds a name server and addresses that all end in its gate.

The agent's one route leads to 198.18.0.0/15 by the gate; there 198.19.0.0/16 is local as a whole (AnyIP: a route of
type local in the table of that name), so a listener on any address accepts for all of it, and getsockname(2) says which
was meant. No address translation, no connection tracking, nothing is forwarded. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from typing import TYPE_CHECKING, Final

from sandbox import netlink
from sandbox.syscalls import CLONE_NEWNET, setns

if TYPE_CHECKING:
    from collections.abc import Sequence

NETWORK: Final = "198.18.0.0"
NETWORK_PREFIX: Final = 15
NAMES_NETWORK: Final = "198.19.0.0"
NAMES_PREFIX: Final = 16
NAMES_PORT: Final = 53
PORTS: Final = (80, 443)
PORTS_MAX: Final = 10
BACKLOG_MAX: Final = 128

_SIOCGSKNS: Final = 0x894C  # <linux/sockios.h>: a descriptor of the namespace a socket is in
_LOOPBACK_INDEX: Final = 1


def gate_messages() -> tuple[bytes, ...]:
    """What makes all the synthetic addresses the gate's own."""
    return (
        netlink.link_up(_LOOPBACK_INDEX),
        netlink.local_route(NAMES_NETWORK, prefix=NAMES_PREFIX, index=_LOOPBACK_INDEX),
    )


def agent_route(gate: str, *, index: int, source: str) -> bytes:
    """The agent's one route: to the gate and the addresses in it, by the gate, whose neighbour entry is permanent."""
    return netlink.gateway_route(NETWORK, prefix=NETWORK_PREFIX, gateway=gate, index=index, source=source)


def open_sockets(home: int, gate_listener: int, gate: str, ports: Sequence[int]) -> dict[int, int]:
    """Make the name server's sockets and a listener for each port in the gate that a listener is in.

    Gives their descriptors by port: 0 is the name server's for datagrams, 53 the one for connections, which also takes
    those to made-up addresses where 53 is one of the ports. `home` is the network namespace to come back to. Raises
    OSError with nothing left.
    """
    if not ports or len(ports) > PORTS_MAX or len(set(ports)) != len(ports):
        raise ValueError(f"cannot open gate: from 1 to {PORTS_MAX} different ports")
    with contextlib.ExitStack() as undo:
        namespace = fcntl.ioctl(gate_listener, _SIOCGSKNS)
        undo.callback(os.close, namespace)
        made = contextlib.ExitStack()
        undo.push(made)
        setns(namespace, CLONE_NEWNET)
        try:
            names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            made.callback(names.close)
            names.bind((gate, NAMES_PORT))
            sockets = {0: names}
            for port in (NAMES_PORT, *(port for port in ports if port != NAMES_PORT)):
                listener = socket.socket(
                    socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
                )
                made.callback(listener.close)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                listener.bind(("" if port in ports else gate, port))
                listener.listen(BACKLOG_MAX)
                sockets[port] = listener
        finally:
            # Not caught by anyone: a launcher that cannot leave an agent's namespace must not go on.
            setns(home, CLONE_NEWNET)
        made.pop_all()
        return {port: each.detach() for port, each in sockets.items()}
