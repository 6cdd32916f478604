"""The network namespace that stands for the host during a test run, and what is seen on its way out.

A run as root moves into it before the first test: loopback, and a default route into a link that leads nowhere. So no
test reaches a network that is not its own, and every frame that leaves "the host" is seen.
"""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Final

from sandbox.syscalls import CLONE_NEWNET, unshare

UPLINK: Final = "uplink0"
FRAMES_MAX: Final = 1000
_ETH_P_ALL: Final = 3
_ADDRESS: Final = "192.0.2.2/32"  # TEST-NET-1, RFC 5737
# A link without IPv6 says nothing by itself, and without ARP the frame itself is sent, once.
_SETUP: Final = f"""
set -e
ip link set lo up
ip link add {UPLINK} type veth peer name uplink1
for link in {UPLINK} uplink1; do
    [ ! -e /proc/sys/net/ipv6 ] || echo 1 > /proc/sys/net/ipv6/conf/$link/disable_ipv6
    ip link set $link arp off up
done
ip address add {_ADDRESS} dev {UPLINK}
ip route add default dev {UPLINK}
"""

_outside = -1


class Uplink:
    """What left the stand-in for the host, frame by frame, since `enter`."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        self._socket.setblocking(False)
        self._socket.bind((UPLINK, _ETH_P_ALL))

    def frames(self) -> list[str]:
        """Gives the first bytes of those not yet given, FRAMES_MAX at most."""
        found: list[str] = []
        while len(found) < FRAMES_MAX:
            try:
                found.append(self._socket.recv(2048)[:64].hex())
            except BlockingIOError:
                break
        return found


def enter() -> Uplink:
    """Move this process, and all it starts from now on, into a stand-in for the host; for a process of one thread."""
    global _outside  # noqa: PLW0603 - one process has one way back
    _outside = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    unshare(CLONE_NEWNET)
    subprocess.run(["sh", "-c", _SETUP], check=True, timeout=10)
    for server in _name_servers():
        subprocess.run(["ip", "address", "replace", f"{server}/32", "dev", "lo"], check=True, timeout=10)
    return Uplink()


def _name_servers() -> list[str]:
    """The host's, of IPv4: in the stand-in they are itself, and nobody listens there, so a look-up fails at once."""
    lines = (line.split() for line in Path("/etc/resolv.conf").read_text().splitlines())
    servers = [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]
    return [server for server in servers if ":" not in server]


def outside() -> list[str]:
    """Gives the start of a command that shall run on the real host's network: what fetches packages, and no test."""
    return [] if _outside < 0 else ["nsenter", f"--net=/proc/{os.getpid()}/fd/{_outside}"]
