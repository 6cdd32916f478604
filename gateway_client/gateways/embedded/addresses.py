"""Which resolved addresses the forward proxy may connect to. Pure: addresses in, a verdict out.

A granted *name* says nothing about where it points: `internal.attacker.example` may resolve to 127.0.0.1 or to the
metadata service. So the addresses are judged, after resolution, and the connection goes to exactly the judged one.
The tables are the IANA special-purpose registries (RFC 6890, RFC 8190) and the metadata addresses of the big clouds,
two of which lie in public space.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

METADATA: Final = frozenset(
    ip_address(text)
    for text in (
        "169.254.169.254",  # AWS, Google, Azure, DigitalOcean, OpenStack
        "169.254.169.253",  # AWS resolver
        "169.254.170.2",  # AWS container credentials
        "169.254.170.23",  # AWS pod identity
        "169.254.0.23",  # Tencent
        "100.100.100.200",  # Alibaba
        "168.63.129.16",  # Azure's host agent: public space
        "192.0.0.192",  # Oracle
        "fd00:ec2::254",  # AWS
        "fd00:ec2::253",
        "fd00:ec2::23",
        "fd20:ce::254",  # Google
    )
)

# No network the operator could allow makes sense of these.
_NEVER: Final[tuple[tuple[Network, str], ...]] = (
    (ip_network("0.0.0.0/32"), "unspecified"),
    (ip_network("224.0.0.0/4"), "multicast"),
    (ip_network("255.255.255.255/32"), "broadcast"),
    (ip_network("::/128"), "unspecified"),
    (ip_network("ff00::/8"), "multicast"),
    # An IPv4 address in IPv6 clothes would be judged by the wrong table; the plain spelling is to be granted instead.
    (ip_network("::ffff:0:0/96"), "v4-mapped"),
    (ip_network("::ffff:0:0:0/96"), "v4-translated"),
    (ip_network("64:ff9b::/96"), "NAT64"),
    (ip_network("64:ff9b:1::/48"), "NAT64"),
    (ip_network("2002::/16"), "6to4"),
    (ip_network("2001::/32"), "Teredo"),
)

_SPECIAL: Final[tuple[tuple[Network, str], ...]] = (
    (ip_network("0.0.0.0/8"), "this network"),
    (ip_network("10.0.0.0/8"), "private"),
    (ip_network("100.64.0.0/10"), "carrier-grade NAT"),
    (ip_network("127.0.0.0/8"), "loopback"),
    (ip_network("169.254.0.0/16"), "link-local"),
    (ip_network("172.16.0.0/12"), "private"),
    (ip_network("192.0.0.0/24"), "protocol assignments"),
    (ip_network("192.0.2.0/24"), "documentation"),
    (ip_network("192.88.99.0/24"), "6to4 relay"),
    (ip_network("192.168.0.0/16"), "private"),
    (ip_network("198.18.0.0/15"), "benchmarking"),
    (ip_network("198.51.100.0/24"), "documentation"),
    (ip_network("203.0.113.0/24"), "documentation"),
    (ip_network("240.0.0.0/4"), "reserved"),
    (ip_network("::1/128"), "loopback"),
    (ip_network("fc00::/7"), "private"),
    (ip_network("fe80::/10"), "link-local"),
    (ip_network("fec0::/10"), "site-local"),
    (ip_network("2001::/23"), "protocol assignments"),
    (ip_network("2001:db8::/32"), "documentation"),
    (ip_network("3fff::/20"), "documentation"),
)

_IPV6_GLOBAL: Final = IPv6Network("2000::/3")


def refusal(address: Address, allow_networks: Sequence[Network] = ()) -> str | None:
    """Say why `address` may not be connected to, or None when it may.

    `allow_networks` are the operator's; they lift every refusal but those for metadata services (which are reached
    only by an entry in `hosts`) and for addresses that are no single host.
    """
    if address in METADATA:
        return "metadata service"
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return "scoped address"
    never = _reason(address, _NEVER)
    if never is not None or any(address in network for network in allow_networks):
        return never
    special = _reason(address, _SPECIAL)
    if special is None and isinstance(address, IPv6Address) and address not in _IPV6_GLOBAL:
        return "outside global unicast"
    return special


def _reason(address: Address, table: Sequence[tuple[Network, str]]) -> str | None:
    return next((reason for network, reason in table if address in network), None)
