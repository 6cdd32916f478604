"""What our encoders write is read back by pyroute2's decoders, which were written by other people."""

import struct

import pytest
from pyroute2.netlink.nfnetlink.nftsocket import nft_chain_msg, nft_rule_msg  # type: ignore[import-untyped]  # ships no types
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg  # type: ignore[import-untyped]  # ships no types
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg  # type: ignore[import-untyped]  # ships no types
from pyroute2.netlink.rtnl.ndmsg import ndmsg  # type: ignore[import-untyped]  # ships no types
from pyroute2.netlink.rtnl.rtmsg import rtmsg  # type: ignore[import-untyped]  # ships no types

from sandbox import netlink, nftables

MAC = bytes.fromhex("020000000002")
PEER_MAC = bytes.fromhex("020000000001")


def split(datagram: bytes) -> list[tuple[int, int, int, bytes]]:
    """(type, flags, sequence, whole message) of each message in a datagram."""
    found, offset = [], 0
    while offset < len(datagram):
        length, kind, flags, sequence, _ = struct.unpack_from("=IHHII", datagram, offset)
        found.append((kind, flags, sequence, datagram[offset : offset + length]))
        offset += (length + 3) & ~3
    return found


def test_veth_names_both_ends_and_puts_the_peer_into_the_gate() -> None:
    raw = netlink.veth(
        "eth0", index=100, mac=MAC, peer_name="gate0", peer_index=101, peer_mac=PEER_MAC, peer_namespace=7
    )
    link = ifinfmsg(raw)
    link.decode()
    assert link["index"] == 100
    assert link.get_attr("IFLA_IFNAME") == "eth0"
    assert link.get_attr("IFLA_ADDRESS") == "02:00:00:00:00:02"
    info = link.get_attr("IFLA_LINKINFO")
    assert info.get_attr("IFLA_INFO_KIND") == "veth"
    peer = info.get_attr("IFLA_INFO_DATA").get_attr("VETH_INFO_PEER")
    assert (peer["index"], peer.get_attr("IFLA_IFNAME")) == (101, "gate0")
    assert peer.get_attr("IFLA_NET_NS_FD") == 7
    assert peer["flags"] & netlink.IFF_UP == 0
    assert link["flags"] & netlink.IFF_UP


def test_address_route_and_neighbour_say_what_they_were_given() -> None:
    address = ifaddrmsg(netlink.address("198.18.0.2", prefix=32, index=100))
    address.decode()
    assert (address["prefixlen"], address["index"], address.get_attr("IFA_LOCAL")) == (32, 100, "198.18.0.2")
    route = rtmsg(netlink.host_route("198.18.0.1", index=100, source="198.18.0.2"))
    route.decode()
    assert (route["dst_len"], route["table"], route.get_attr("RTA_DST")) == (32, 254, "198.18.0.1")
    assert (route.get_attr("RTA_OIF"), route.get_attr("RTA_PREFSRC")) == (100, "198.18.0.2")
    assert route.get_attr("RTA_GATEWAY") is None
    neighbour = ndmsg(netlink.permanent_neighbour("198.18.0.1", mac=PEER_MAC, index=100))
    neighbour.decode()
    assert (neighbour["state"], neighbour["ifindex"]) == (netlink.NUD_PERMANENT, 100)
    assert (neighbour.get_attr("NDA_DST"), neighbour.get_attr("NDA_LLADDR")) == ("198.18.0.1", "02:00:00:00:00:01")


def test_numbered_asks_for_one_acknowledgement_at_the_end() -> None:
    messages = split(netlink.numbered((netlink.link_up(1), netlink.link_up(2), netlink.link_up(3))))
    assert [sequence for _, _, sequence, _ in messages] == [1, 2, 3]
    assert [bool(flags & netlink.NLM_F_ACK) for _, flags, _, _ in messages] == [False, False, True]


@pytest.mark.parametrize("length", range(9))
def test_attribute_is_padded_but_says_its_true_length(length: int) -> None:
    raw = netlink.attribute(3, b"x" * length)
    assert len(raw) % 4 == 0
    assert struct.unpack_from("=HH", raw) == (4 + length, 3)


@pytest.mark.parametrize("rules", [nftables.gate_rules, nftables.agent_rules])
def test_every_chain_of_the_rules_drops_by_default(rules) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    datagram, last = rules(agent="198.18.0.2", gate="198.18.0.1", port=3128)
    messages = split(datagram)
    kinds = [kind for kind, _, _, _ in messages]
    assert kinds[0] == 0x10, "a transaction begins"
    assert kinds[-1] == 0x11, "and ends, else the kernel throws it away"
    assert [sequence for _, flags, sequence, _ in messages if flags & netlink.NLM_F_ACK] == [last]
    chains = [raw for kind, _, _, raw in messages if kind == 0xA03]
    assert chains
    for raw in chains:
        chain = nft_chain_msg(raw)
        chain.decode()
        assert chain.get_attr("NFTA_CHAIN_POLICY") == 0  # NF_DROP


def test_the_gate_accepts_one_port_only() -> None:
    datagram, _ = nftables.gate_rules(agent="198.18.0.2", gate="198.18.0.1", port=3128)
    for kind, _, _, raw in split(datagram):
        if kind != 0xA06:
            continue
        rule = nft_rule_msg(raw)
        rule.decode()
        names = [item.get_attr("NFTA_EXPR_NAME") for item in rule.get_attr("NFTA_RULE_EXPRESSIONS")]
        assert names == ["meta", "cmp", "meta", "cmp", "payload", "cmp", "payload", "cmp", "immediate"]
        assert struct.pack(">H", 3128) in raw
