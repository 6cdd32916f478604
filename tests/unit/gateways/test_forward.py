"""Which addresses the forward proxy takes out of what a name resolved to, and that it asks only once."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_client.gateways.embedded import forward
from gateway_client.gateways.embedded.addresses import Address, refusal
from gateway_client.gateways.embedded.config import Pin
from gateway_client.gateways.preface import Destination

EXAMPLE = Destination("tcp", "example.test", 443)


@given(st.lists(st.ip_addresses(), max_size=8))
def test_no_refused_address_is_ever_tried(resolved: list[Address]) -> None:
    good = [address for address in resolved if refusal(address) is None]
    if not good:
        with pytest.raises(forward.ForwardError):
            forward.targets(EXAMPLE, resolved, forward.Rules())
        return
    assert forward.targets(EXAMPLE, resolved, forward.Rules()) == [(address, 443) for address in good][:4]


def test_mixed_answer_leaves_the_public_one() -> None:
    resolved = [ip_address("127.0.0.1"), ip_address("93.184.215.14"), ip_address("10.0.0.1")]
    assert forward.targets(EXAMPLE, resolved, forward.Rules()) == [(ip_address("93.184.215.14"), 443)]


def test_refusal_names_the_reason_and_no_address() -> None:
    with pytest.raises(forward.ForwardError) as refused:
        forward.targets(EXAMPLE, [ip_address("10.1.2.3"), ip_address("169.254.169.254")], forward.Rules())
    assert str(refused.value) == "cannot reach example.test: it resolves to a metadata service, private address"


async def test_name_is_resolved_once_and_the_judged_address_is_connected_to() -> None:
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as allowed:
        port = allowed.getsockname()[1]

        async def resolve(host: str) -> list[Address]:
            asked.append(host)
            # A second look-up would lead elsewhere: DNS rebinding.
            return [ip_address("127.0.0.1")] if len(asked) == 1 else [ip_address("169.254.169.254")]

        rules = forward.Rules(allow_networks=[ip_network("127.0.0.1/32")])
        opened = await forward.connect(Destination("tcp", "example.test", port), rules, resolve)
        with opened:
            assert opened.getpeername() == ("127.0.0.1", port)
    assert asked == ["example.test"]


async def test_pinned_name_is_never_resolved() -> None:
    async def resolve(host: str) -> list[Address]:
        raise AssertionError(host)

    with socket.create_server(("127.0.0.1", 0)) as pinned:
        port = pinned.getsockname()[1]
        rules = forward.Rules(hosts={"example.test": Pin(ip_address("127.0.0.1"), port)})
        for host in ("example.test", "example.test."):
            with await forward.connect(Destination("tcp", host, 443), rules, resolve) as opened:
                assert opened.getpeername() == ("127.0.0.1", port)


def test_reason_is_framed_and_bounded() -> None:
    assert forward.failed("no") == b"\x01\x00\x02no"
    assert len(forward.failed("x" * 5000)) == 3 + forward.REASON_BYTES_MAX
