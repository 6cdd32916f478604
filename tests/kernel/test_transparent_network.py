"""A transparent network seen from outside: what is made up ends in the gate, and nothing else has changed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from sandbox.netpool import GATE_ADDRESS, Net, Pool

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool("ttrans", 3128, 0)
    yield made
    made.close()


@pytest.fixture
def net(pool: Pool) -> Iterator[Net]:
    taken = pool.take(transparent=True)
    yield taken
    taken.close()


@pytest.fixture
def gate(pool: Pool, net: Net) -> Iterator[list[socket.socket]]:
    """The name server's socket, the listeners of 80 and 443, and the name server's for connections."""
    made = pool.open_gate(net.listener, (80, 443))
    sockets = [socket.socket(fileno=made[port]) for port in (0, 80, 443, 53)]
    for each in sockets:
        each.settimeout(5)
    yield sockets
    for each in sockets:
        each.close()


def enter(fd: int, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["nsenter", f"--net=/proc/{os.getpid()}/fd/{fd}", *command],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def dial(net: Net, address: str, port: int, *, udp: bool = False) -> str:
    """What connect(2) says in the agent's namespace: ok, or the error's name; a datagram is sent as well."""
    kind = "DGRAM" if udp else "STREAM"
    code = f"""
        import errno, socket
        s = socket.socket(socket.AF_INET, socket.SOCK_{kind})
        s.settimeout(2)
        try:
            s.connect(("{address}", {port}))
            s.send(b"hello")
            print("ok")
        except OSError as e:
            print(errno.errorcode.get(e.errno, type(e).__name__))
    """
    return enter(net.agent_ns, sys.executable, "-c", textwrap.dedent(code)).stdout.strip()


def test_there_is_still_one_route(net: Net) -> None:
    routes = enter(net.agent_ns, "ip", "-4", "route").stdout.split("\n")
    assert [route.split() for route in routes if route] == [
        ["198.18.0.0/15", "via", GATE_ADDRESS, "dev", "eth0", "proto", "static", "src", "198.18.0.2", "onlink"]
    ]


@pytest.mark.parametrize(("address", "port"), [("198.19.0.1", 443), ("198.19.255.254", 80)])
def test_a_made_up_address_is_accepted_in_the_gate_which_sees_it(
    net: Net, gate: list[socket.socket], address: str, port: int
) -> None:
    assert dial(net, address, port) == "ok"
    accepted, peer = gate[1 if port == 80 else 2].accept()
    with accepted:
        assert (accepted.getsockname(), peer[0]) == ((address, port), "198.18.0.2")
        assert accepted.recv(5) == b"hello"


def test_look_ups_reach_the_name_server(net: Net, gate: list[socket.socket]) -> None:
    assert dial(net, GATE_ADDRESS, 53, udp=True) == "ok"
    assert gate[0].recv(10) == b"hello"


def test_look_ups_reach_the_name_server_by_connections_too(net: Net, gate: list[socket.socket]) -> None:
    assert dial(net, GATE_ADDRESS, 53) == "ok"
    accepted, peer = gate[3].accept()
    with accepted:
        assert (accepted.getsockname(), peer[0]) == ((GATE_ADDRESS, 53), "198.18.0.2")
        assert accepted.recv(5) == b"hello"


def test_a_scope_of_port_53_shares_its_listener(pool: Pool, net: Net) -> None:
    made = pool.open_gate(net.listener, (443, 53))
    assert list(made) == [0, 53, 443]
    with socket.socket(fileno=made[53]) as listener:
        listener.settimeout(5)
        for address in (GATE_ADDRESS, "198.19.0.1"):
            assert dial(net, address, 53) == "ok"
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockname() == (address, 53)
    for port in (0, 443):
        os.close(made[port])


def test_the_proxy_still_answers(net: Net) -> None:
    assert dial(net, GATE_ADDRESS, 3128) == "ok"


@pytest.mark.parametrize(
    ("address", "port", "answer"),
    [
        ("198.19.0.1", 22, "ECONNREFUSED"),
        ("198.19.0.1", 53, "ECONNREFUSED"),
        ("192.0.2.1", 443, "ENETUNREACH"),
        ("8.8.8.8", 53, "ENETUNREACH"),
        ("198.20.0.1", 443, "ENETUNREACH"),
    ],
)
def test_nothing_else_is_reachable(net: Net, gate: list[socket.socket], address: str, port: int, answer: str) -> None:
    assert len(gate) == 4
    assert dial(net, address, port) == answer


@pytest.mark.parametrize(("address", "port"), [(GATE_ADDRESS, 80), (GATE_ADDRESS, 443), ("198.18.0.9", 443)])
def test_of_the_network_itself_only_the_proxy_answers(
    net: Net, gate: list[socket.socket], address: str, port: int
) -> None:
    """With the first layer alone it leads nowhere too: to a listener that knows no such name, or to nobody."""
    if net.firewall == "nftables":
        assert dial(net, address, port) == "ECONNREFUSED"
        return
    assert dial(net, address, port) == ("ok" if address == GATE_ADDRESS else "TimeoutError")
    if address == GATE_ADDRESS:
        accepted, _ = gate[1 if port == 80 else 2].accept()
        with accepted:
            assert accepted.getsockname() == (address, port)


@pytest.mark.parametrize(("address", "port"), [("198.19.0.1", 443), ("198.19.0.1", 53), (GATE_ADDRESS, 123)])
def test_other_datagrams_do_not_arrive(net: Net, gate: list[socket.socket], address: str, port: int) -> None:
    if net.firewall != "nftables":
        pytest.skip(f"no second layer in this kernel: {net.firewall}")
    assert dial(net, address, port, udp=True) == "EPERM"
    gate[0].settimeout(0.05)
    with pytest.raises(TimeoutError):
        gate[0].recv(10)


def test_the_gate_forwards_nothing_and_has_no_other_neighbour(net: Net) -> None:
    assert enter(net.gate_ns, "cat", "/proc/sys/net/ipv4/ip_forward").stdout.strip() == "0"
    for namespace in (net.gate_ns, net.agent_ns):
        neighbours = enter(namespace, "ip", "neighbour").stdout.split("\n")
        assert [line.split()[-1] for line in neighbours if line] == ["PERMANENT"]


def test_the_sockets_of_a_plain_network_cannot_be_asked_for_twice(pool: Pool, net: Net) -> None:
    first = pool.open_gate(net.listener, (443,))
    with pytest.raises(OSError, match="Address already in use"):
        pool.open_gate(net.listener, (443,))
    for fd in first.values():
        os.close(fd)
    again = pool.open_gate(net.listener, (443,))
    assert list(again) == [0, 53, 443]
    for fd in again.values():
        os.close(fd)
    assert socket.if_nameindex()  # and the caller is where it was
