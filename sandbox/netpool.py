"""Ready-made agent networks: an agent namespace, an empty gate, the veth between them and the proxy's listener.

Nothing here has a name on the host: namespaces are held by descriptor, both veth ends are born inside them, so a
launcher that dies leaves nothing to clean up. Every agent has the same addresses, because nothing is shared that could
tell them apart: which listener accepted says who the agent is.

The calling thread walks through the new namespaces and comes back; the caller is single-threaded (the launcher).
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandbox import netlink, nftables, transparent
from sandbox.netlink import Netlink
from sandbox.syscalls import CLONE_NEWNET, setns, unshare

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

AGENT_ADDRESS: Final = "198.18.0.2"
GATE_ADDRESS: Final = "198.18.0.1"
AGENT_INTERFACE: Final = "eth0"
GATE_INTERFACE: Final = "gate0"
LISTENER_BACKLOG_MAX: Final = 128
_IP_FREEBIND: Final = 15  # <linux/in.h>; the socket module of Python 3.11 does not have it

# Clear of the fall-back tunnel devices (sit0, tunl0 …) that some kernels put into every new namespace at 2 and up.
_INDEX: Final = 100
_LOOPBACK_INDEX: Final = 1
_AGENT_MAC: Final = bytes.fromhex("020000000002")
_GATE_MAC: Final = bytes.fromhex("020000000001")

_SYSCTL: Final = "/proc/sys/net/"
# "all" sets "default" too (addrconf_disable_ipv6), so links made later have it off from their birth.
_IPV6: Final = ("ipv6/conf/all/disable_ipv6", "1")
# A new namespace copies IPv4's settings from the host's (net.core.devconf_inherit_init_net), and a host with containers
# forwards. Redirects and source checks need no setting: the only peer is the other end, which cannot send either.
_FORWARD: Final = ("ipv4/ip_forward", "0")
_GATE_ONLY: Final = ("ipv4/icmp_echo_ignore_all", "1")
_AGENT_ONLY: Final = ("ipv4/ip_unprivileged_port_start", "0")  # ports below 1024 are the agent's own to bind

_AGENT_UP: Final = (netlink.link_up(_LOOPBACK_INDEX), netlink.address(AGENT_ADDRESS, prefix=32, index=_INDEX))
_AGENT_NEIGHBOUR: Final = netlink.permanent_neighbour(GATE_ADDRESS, mac=_GATE_MAC, index=_INDEX)
_AGENT_MESSAGES: Final = (
    *_AGENT_UP,
    netlink.host_route(GATE_ADDRESS, index=_INDEX, source=AGENT_ADDRESS),
    _AGENT_NEIGHBOUR,
)
_AGENT_TRANSPARENT: Final = (
    *_AGENT_UP,
    transparent.agent_route(GATE_ADDRESS, index=_INDEX, source=AGENT_ADDRESS),
    _AGENT_NEIGHBOUR,
)
_GATE_MESSAGES: Final = (
    netlink.address(GATE_ADDRESS, prefix=32, index=_INDEX),
    netlink.host_route(AGENT_ADDRESS, index=_INDEX, source=GATE_ADDRESS),
    netlink.permanent_neighbour(AGENT_ADDRESS, mac=_AGENT_MAC, index=_INDEX),
)


def alias(instance: str) -> str:
    """The name that the gate's end of every veth of an instance carries."""
    return f"stockade-{instance}"


class CannotMakeNetwork(RuntimeError):  # noqa: N818 - reads as what happened
    """An agent's network could not be made; nothing of it is left."""


@dataclass(slots=True)
class Net:
    """One agent's network, held by descriptors: closing them is what destroys it."""

    agent_ns: int
    gate_ns: int
    listener: int
    proxy_port: int
    ipv6: str
    firewall: str
    transparent: bool = False

    def facts(self) -> dict[str, object]:
        """What posture says about the network; every value is one that was set, not one that was hoped for."""
        route = f"{GATE_ADDRESS} dev {AGENT_INTERFACE} scope link src {AGENT_ADDRESS}"
        if self.transparent:
            network = f"{transparent.NETWORK}/{transparent.NETWORK_PREFIX}"
            route = f"{network} via {GATE_ADDRESS} dev {AGENT_INTERFACE} src {AGENT_ADDRESS} onlink"
        return {
            "interface": AGENT_INTERFACE,
            "address": f"{AGENT_ADDRESS}/32",
            "routes": [route],
            "gate_interface": GATE_INTERFACE,
            "gate_address": f"{GATE_ADDRESS}/32",
            "proxy": f"{GATE_ADDRESS}:{self.proxy_port}",
            "ip_forward": False,
            "ipv6": self.ipv6,
            "firewall": self.firewall,
        }

    def close(self) -> None:
        """Let go of everything. The listener is shut down first, so that copies of it elsewhere stop accepting too."""
        if self.listener >= 0:
            duplicate = socket.socket(fileno=self.listener)
            with contextlib.suppress(OSError):  # ENOTCONN where it was shut before; closing goes on either way
                duplicate.shutdown(socket.SHUT_RDWR)
            duplicate.close()
        for fd in (self.agent_ns, self.gate_ns):
            if fd >= 0:
                os.close(fd)
        self.listener = self.agent_ns = self.gate_ns = -1


class Pool:
    """Up to `size` networks made ahead of need; without one in stock, `take()` makes one on the spot."""

    def __init__(self, instance: str, proxy_port: int, size: int) -> None:
        self.instance = instance
        self._port = proxy_port
        self._size = size
        self._stock: list[Net] = []
        self._broken = False
        # The alias says whose it is, should an operator ever move it out of its namespace (sandbox/network.py).
        self._gate_messages = (netlink.link_up(_INDEX, alias=alias(instance)), *_GATE_MESSAGES)
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        # Where IPv6 is a module it could be loaded later, and then come up in namespaces that exist: load it now.
        with contextlib.suppress(OSError):
            socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
        self._ipv6_present = Path(_SYSCTL, "ipv6/conf/all/disable_ipv6").exists()
        self._rules = {
            see_through: (
                nftables.agent_rules(agent=AGENT_ADDRESS, gate=GATE_ADDRESS, port=proxy_port, transparent=see_through),
                nftables.gate_rules(agent=AGENT_ADDRESS, gate=GATE_ADDRESS, port=proxy_port, transparent=see_through),
            )
            for see_through in (False, True)
        }

    def __len__(self) -> int:
        return len(self._stock)

    def take(self, *, transparent: bool = False) -> Net:
        """A network of one's own, ready-made or made now (transparent ones always are); the caller closes it."""
        if self._stock and not transparent:
            return self._stock.pop()
        net = self._make(transparent=transparent)
        self._broken = False
        return net

    def refill(self, budget: int = 1) -> int:
        """Make up to `budget` networks towards `size`; the number made.

        A failure is not raised here, where no launch waits for it: refilling stops until a `take()` has worked again,
        and that `take()` is what reports the cause.
        """
        made = 0
        while made < budget and len(self._stock) < self._size and not self._broken:
            try:
                self._stock.insert(0, self._make())
            except CannotMakeNetwork:
                self._broken = True
                break
            made += 1
        return made

    def open_gate(self, listener: int, ports: Sequence[int]) -> dict[int, int]:
        """Make the sockets of a transparent network that `listener` is in, by port; raises OSError."""
        return transparent.open_sockets(self._home, listener, GATE_ADDRESS, ports)

    def close(self) -> None:
        while self._stock:
            self._stock.pop().close()
        if self._home >= 0:
            os.close(self._home)
            self._home = -1

    def _make(self, *, transparent: bool = False) -> Net:
        with contextlib.ExitStack() as undo:
            try:
                with self._back_home():
                    return self._build(undo, see_through=transparent)
            except OSError as error:
                raise CannotMakeNetwork(
                    f"cannot make an agent's network: {error}; see `stockadectl doctor` for what this host lacks"
                ) from error

    @contextlib.contextmanager
    def _back_home(self) -> Iterator[None]:
        try:
            yield
        finally:
            # Not caught by anyone: a launcher that cannot leave an agent's namespace must not go on.
            setns(self._home, CLONE_NEWNET)

    def _build(self, undo: contextlib.ExitStack, *, see_through: bool) -> Net:
        """In the gate, then in the agent's namespace. Sockets stay in the namespace they were made in."""
        with contextlib.ExitStack() as done:
            gate_ns = self._enter_new(undo, _GATE_ONLY)
            gate_route = done.enter_context(Netlink())
            gate_filter = _netfilter(done)
            listener = _listen(self._port)
            undo.callback(listener.close)

            agent_ns = self._enter_new(undo, _AGENT_ONLY)
            agent_route = done.enter_context(Netlink())
            agent_filter = _netfilter(done)
            pair = netlink.veth(
                AGENT_INTERFACE,
                index=_INDEX,
                mac=_AGENT_MAC,
                peer_name=GATE_INTERFACE,
                peer_index=_INDEX,
                peer_mac=_GATE_MAC,
                peer_namespace=gate_ns,
            )
            # The second layer before the link exists, so that there is no moment without it.
            agent_rules, gate_rules = self._rules[see_through]
            firewall = _load(agent_filter, agent_rules) or _load(gate_filter, gate_rules) or "nftables"
            messages: tuple[bytes, ...] = (pair, *(_AGENT_TRANSPARENT if see_through else _AGENT_MESSAGES))
            agent_route.perform(netlink.numbered(messages), last=len(messages), what="the agent's namespace")
            messages = (*self._gate_messages, *(transparent.gate_messages() if see_through else ()))
            gate_route.perform(netlink.numbered(messages), last=len(messages), what="the gate")
        undo.pop_all()
        ipv6 = "disabled" if self._ipv6_present else "not in this kernel"
        return Net(agent_ns, gate_ns, listener.detach(), self._port, ipv6, firewall, see_through)

    def _enter_new(self, undo: contextlib.ExitStack, extra: tuple[str, str]) -> int:
        unshare(CLONE_NEWNET)
        fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        undo.callback(os.close, fd)
        # IPv6 before any link: bringing one up would give it a fe80:: address at once.
        for name, value in (*((_IPV6,) if self._ipv6_present else ()), _FORWARD, extra):
            _write_sysctl(name, value)
        return fd


def _write_sysctl(name: str, value: str) -> None:
    fd = os.open(_SYSCTL + name, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode("ascii"))
    finally:
        os.close(fd)


def _listen(port: int) -> socket.socket:
    """The proxy's listener in the current namespace, bound before the address exists (IP_FREEBIND, ip(7))."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit it; without it a small answer waits about 40 ms for Nagle and a delayed ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind((GATE_ADDRESS, port))
        listener.listen(LISTENER_BACKLOG_MAX)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _netfilter(done: contextlib.ExitStack) -> Netlink | str:
    try:
        return done.enter_context(Netlink(netlink.NETLINK_NETFILTER))
    except OSError as error:
        return f"missing: {error.strerror}"


def _load(filter_socket: Netlink | str, rules: tuple[bytes, int]) -> str:
    """Empty when the rules are in force, otherwise why not. They are the second layer: posture says it is missing."""
    if isinstance(filter_socket, str):
        return filter_socket
    datagram, last = rules
    try:
        filter_socket.perform(datagram, last=last, what="the nftables rules")
    except OSError as error:
        return f"missing: {error.strerror}"
    return ""
