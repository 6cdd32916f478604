"""No resolved address reaches the host, its neighbours or a metadata service; public ones pass."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_client.gateways.embedded.addresses import METADATA, refusal

ADDRESSES = st.one_of(
    st.integers(0, 2**32 - 1).map(IPv4Address),
    st.integers(0, 2**128 - 1).map(IPv6Address),
    # Half the random IPv6 space is unassigned: aim at the parts in use.
    st.integers(0, 2**125 - 1).map(lambda bits: IPv6Address((1 << 125) | bits)),
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("127.0.0.1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("0.0.0.0", "unspecified"),
        ("0.0.0.1", "this network"),
        ("10.1.2.3", "private"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.168.0.1", "private"),
        ("100.64.0.1", "carrier-grade NAT"),
        ("100.127.255.255", "carrier-grade NAT"),
        ("169.254.1.1", "link-local"),
        ("169.254.169.254", "metadata service"),
        ("168.63.129.16", "metadata service"),
        ("100.100.100.200", "metadata service"),
        ("224.0.0.1", "multicast"),
        ("255.255.255.255", "broadcast"),
        ("240.0.0.1", "reserved"),
        ("192.0.2.1", "documentation"),
        ("198.18.0.1", "benchmarking"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("::127.0.0.1", "outside global unicast"),
        ("::ffff:127.0.0.1", "v4-mapped"),
        ("::ffff:8.8.8.8", "v4-mapped"),
        ("64:ff9b::7f00:1", "NAT64"),
        ("64:ff9b:1::a00:1", "NAT64"),
        ("2002:7f00:1::", "6to4"),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "Teredo"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "scoped address"),
        ("fc00::1", "private"),
        ("fd00:ec2::254", "metadata service"),
        ("fec0::1", "site-local"),
        ("ff02::1", "multicast"),
        ("2001:db8::1", "documentation"),
        ("5f00::1", "outside global unicast"),
    ],
)
def test_special_address_is_refused_by_name(text: str, reason: str) -> None:
    assert refusal(ip_address(text)) == reason


@pytest.mark.parametrize(
    "text",
    ["1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.0", "172.15.255.255", "172.32.0.0", "126.255.255.255",
     "128.0.0.1", "223.255.255.255", "2606:4700:4700::1111", "2a00:1450::200e"],
)  # fmt: skip
def test_public_address_passes(text: str) -> None:
    assert refusal(ip_address(text)) is None


@given(ADDRESSES)
def test_nothing_the_standard_library_calls_special_passes(address: IPv4Address | IPv6Address) -> None:
    special = (
        not address.is_global
        or address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_reserved
        or address.is_unspecified
    )
    assert not special or refusal(address) is not None


@given(st.integers(0, 2**32 - 1).map(IPv4Address))
def test_no_embedding_of_an_ipv4_address_passes(address: IPv4Address) -> None:
    bits = int(address)
    for embedded in (
        IPv6Address(bits),  # compatible
        IPv6Address((0xFFFF << 32) | bits),  # mapped
        IPv6Address((0x64FF9B << 96) | bits),  # NAT64
        IPv6Address((0x2002 << 112) | (bits << 80)),  # 6to4
    ):
        assert refusal(embedded) is not None
        assert refusal(embedded, [ip_network(f"{address}/32")]) is not None


@given(ADDRESSES)
def test_allowed_network_lifts_all_but_metadata_and_no_host(address: IPv4Address | IPv6Address) -> None:
    everything = [ip_network("0.0.0.0/0"), ip_network("::/0")]
    lifted = refusal(address, everything)
    assert lifted is None or lifted in {
        "metadata service", "multicast", "broadcast", "unspecified", "v4-mapped", "v4-translated", "NAT64", "6to4",
        "Teredo",
    }  # fmt: skip


def test_allowed_network_opens_only_itself() -> None:
    allowed = [ip_network("10.20.0.0/16")]
    assert refusal(ip_address("10.20.3.4"), allowed) is None
    assert refusal(ip_address("10.21.0.1"), allowed) == "private"


def test_metadata_stays_refused_inside_an_allowed_network() -> None:
    for address in METADATA:
        assert refusal(address, [ip_network(f"{address}/{address.max_prefixlen}")]) == "metadata service"
