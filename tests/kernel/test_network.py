"""An agent's network seen from outside: what a program in the agent's namespace reaches, and what it does not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandbox.netlink import Netlink, NetlinkError, link_up, numbered
from sandbox.netpool import CannotMakeNetwork, Net, Pool
from sandbox.network import CannotInspect, inspect

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

PORT = 3128


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool("tnet", PORT, 2)
    yield made
    made.close()


@pytest.fixture
def net(pool: Pool) -> Iterator[Net]:
    taken = pool.take()
    yield taken
    taken.close()


@pytest.fixture
def layered(net: Net) -> Net:
    """A network whose second layer is in force; a kernel without nftables for IPv4 has the first alone."""
    if net.firewall != "nftables":
        pytest.skip(f"no second layer in this kernel: {net.firewall}")
    return net


def enter(fd: int, *command: str, uid: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command in the namespace behind `fd`, as an unprivileged user where `uid` is given."""
    drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
    return subprocess.run(
        ["nsenter", f"--net=/proc/{os.getpid()}/fd/{fd}", *drop, *command],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def attempt(fd: int, program: str, uid: int = 65534) -> str:
    """The errno name or result that a Python program printed inside the namespace."""
    prelude = "import errno, socket\ndef name(e): return errno.errorcode.get(e.errno, type(e).__name__)\n"
    done = enter(fd, sys.executable, "-I", "-S", "-c", prelude + textwrap.dedent(program), uid=uid)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def connect(fd: int, address: str, port: int, *, device: str = "") -> str:
    bind = f"s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, {device!r}.encode())" if device else ""
    return attempt(
        fd,
        f"""
        s = socket.socket()
        s.settimeout(2)
        {bind}
        try:
            s.connect(({address!r}, {port}))
            print("connected")
        except OSError as e:
            print(name(e))
        """,
    )


def test_the_proxy_port_is_reachable_and_the_listener_knows_who_came(net: Net) -> None:
    listener = socket.socket(fileno=os.dup(net.listener))
    listener.settimeout(5)
    assert connect(net.agent_ns, "198.18.0.1", PORT) == "connected"
    accepted, peer = listener.accept()
    assert peer[0] == "198.18.0.2"
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    accepted.close()
    listener.close()


def test_there_is_exactly_one_route_and_it_leads_to_the_gate(net: Net) -> None:
    lines = enter(net.agent_ns, "ip", "route").stdout.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("198.18.0.1 dev eth0")
    assert net.facts()["routes"] == ["198.18.0.1 dev eth0 scope link src 198.18.0.2"]


@pytest.mark.parametrize("port", [1, 22, 80, 443, 3127, 3129, 8080, 65535])
def test_no_other_port_of_the_gate_answers_and_the_refusal_is_immediate(net: Net, port: int) -> None:
    begin = time.monotonic()
    assert connect(net.agent_ns, "198.18.0.1", port) == "ECONNREFUSED"
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize(
    "address", ["192.0.2.1", "198.51.100.1", "203.0.113.1", "169.254.169.254", "198.18.0.3", "198.19.0.1", "224.0.0.1"]
)
def test_every_other_address_is_unreachable_at_once(net: Net, address: str) -> None:
    assert connect(net.agent_ns, address, PORT) == "ENETUNREACH"


def test_binding_to_the_device_does_not_get_around_the_missing_route(layered: Net) -> None:
    net = layered
    assert connect(net.agent_ns, "192.0.2.1", 80, device="eth0") == "ECONNREFUSED"
    assert connect(net.agent_ns, "198.18.0.1", PORT, device="eth0") == "connected"  # the twin: the option itself works


def test_broadcast_and_multicast_datagrams_do_not_leave(layered: Net) -> None:
    net = layered
    result = attempt(
        net.agent_ns,
        """
        seen = []
        for address in ("255.255.255.255", "224.0.0.251", "198.18.0.1"):
            s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            try:
                s.sendto(b"x", (address, 53)); seen.append("sent")
            except OSError as e:
                seen.append(name(e))
        print(*seen)
        """,
    )
    assert result == "EPERM EPERM EPERM"


def test_only_packets_to_the_proxy_port_are_seen_in_the_gate(layered: Net) -> None:
    """A capture at the far end while the agent tries everything: nothing but TCP to the proxy's port, and no ARP."""
    net = layered
    sniff = """
        import sys
        s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        s.bind(("gate0", 0))
        print("ready", flush=True)
        s.settimeout(0.2)
        end = sys.stdin.fileno()
        import select
        odd = good = 0
        while True:
            if select.select([end], [], [], 0)[0]:
                break
            try:
                frame, where = s.recvfrom(2048)
            except TimeoutError:
                continue
            if where[2] == 4:  # PACKET_OUTGOING
                continue
            tcp = frame[12:14] == b"\\x08\\x00" and frame[23] == 6
            if tcp and frame[36:38] == (3128).to_bytes(2, "big"):
                good += 1
            else:
                odd += 1
        print(good > 0, odd)
    """
    gate = f"/proc/{os.getpid()}/fd/{net.gate_ns}"
    command = ["nsenter", f"--net={gate}", sys.executable, "-I", "-S", "-c", "import socket\n" + textwrap.dedent(sniff)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as capture:
        assert capture.stdout is not None
        assert capture.stdin is not None
        assert capture.stdout.readline() == "ready\n"
        assert connect(net.agent_ns, "198.18.0.1", PORT) == "connected"
        for port in (22, 80, 3129):
            connect(net.agent_ns, "198.18.0.1", port)
        connect(net.agent_ns, "192.0.2.1", 80, device="eth0")
        test_broadcast_and_multicast_datagrams_do_not_leave(net)
        time.sleep(0.3)  # not waiting for a condition: time in which a stray packet would arrive
        out, _ = capture.communicate("end\n", timeout=10)
    assert out.strip() == "True 0"


def test_ipv6_is_off_on_both_ends(net: Net) -> None:
    for fd in (net.agent_ns, net.gate_ns):
        assert enter(fd, "ip", "-6", "address").stdout == ""
        assert enter(fd, "cat", "/proc/sys/net/ipv6/conf/all/disable_ipv6").stdout.strip() in {"1", ""}


def test_neither_namespace_forwards_whatever_the_host_does(net: Net) -> None:
    for fd in (net.agent_ns, net.gate_ns):
        assert enter(fd, "cat", "/proc/sys/net/ipv4/ip_forward").stdout.strip() == "0"


def test_neighbours_are_permanent_on_both_ends(net: Net) -> None:
    for fd in (net.agent_ns, net.gate_ns):
        neighbours = json.loads(enter(fd, "ip", "-j", "neigh").stdout)
        assert [entry["state"] for entry in neighbours] == [["PERMANENT"]]


def test_loopback_works_and_low_ports_can_be_bound_without_privilege(net: Net) -> None:
    result = attempt(
        net.agent_ns,
        """
        server = socket.create_server(("127.0.0.1", 80))
        client = socket.create_connection(("127.0.0.1", 80), timeout=2)
        print(server.accept()[1][0])
        """,
    )
    assert result == "127.0.0.1"


def test_a_service_on_every_address_of_the_host_is_not_reachable(net: Net) -> None:
    """The gate's reason to exist: with the veth's end in the host's namespace this would connect."""
    with socket.create_server(("0.0.0.0", 0)) as service:
        port = service.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=2):
            pass  # the twin: it does answer on the host
        for address in ("127.0.0.1", "198.18.0.1"):
            assert connect(net.agent_ns, address, port) == "ECONNREFUSED"


def test_two_agents_have_the_same_addresses_and_do_not_see_each_other(pool: Pool) -> None:
    first, second = pool.take(), pool.take()
    try:
        listener = socket.socket(fileno=os.dup(second.listener))
        listener.settimeout(0.3)
        assert connect(first.agent_ns, "198.18.0.1", PORT) == "connected"
        with listener, pytest.raises(TimeoutError):
            listener.accept()
    finally:
        first.close()
        second.close()


def test_the_firewall_alone_would_hold_the_gate(layered: Net) -> None:
    """The second layer by itself: a service in the gate on another port stays unreachable."""
    net = layered
    command = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{net.gate_ns}", sys.executable, "-I", "-S", "-c"]
    program = "import socket; s = socket.create_server(('198.18.0.1', 8080)); print('up', flush=True); input()"
    with subprocess.Popen([*command, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        assert service.stdout.readline() == "up\n"
        enter(net.agent_ns, "nft", "flush", "ruleset")
        assert connect(net.agent_ns, "198.18.0.1", 8080) == "TimeoutError"
        enter(net.gate_ns, "nft", "flush", "ruleset")
        assert connect(net.agent_ns, "198.18.0.1", 8080) == "connected"  # the twin: it was the rules
        service.communicate("\n", timeout=5)


def test_without_the_second_layer_the_gate_alone_leads_nowhere(net: Net) -> None:
    """The twin of the second layer: packets may reach the gate, and nothing there takes them further."""
    for fd in (net.agent_ns, net.gate_ns):
        if net.firewall == "nftables":
            enter(fd, "nft", "flush", "ruleset")
    with socket.create_server(("0.0.0.0", 0)) as service:
        for address, port in (("192.0.2.1", 80), ("198.18.0.1", service.getsockname()[1])):
            assert connect(net.agent_ns, address, port, device="eth0") in {
                "TimeoutError",
                "ECONNREFUSED",
                "EHOSTUNREACH",
            }
    assert connect(net.agent_ns, "198.18.0.1", PORT) == "connected"


def test_closing_shuts_every_copy_of_the_listener(pool: Pool) -> None:
    net = pool.take()
    with socket.socket(fileno=os.dup(net.listener)) as copy:
        copy.settimeout(2)
        agent = os.dup(net.agent_ns)
        net.close()
        with pytest.raises(OSError, match="Invalid argument"):
            copy.accept()
        assert connect(agent, "198.18.0.1", PORT) in {"ECONNREFUSED", "TimeoutError"}
        os.close(agent)


def test_making_and_closing_leaves_the_caller_where_it_was_and_the_host_as_it_was(pool: Pool) -> None:
    def host() -> tuple[str, int, int]:
        return (
            str(Path("/proc/self/ns/net").readlink()),
            len(socket.if_nameindex()),
            sum(1 for _ in Path("/proc/self/fd").iterdir()),
        )

    before = host()
    for net in [pool.take() for _ in range(10)]:
        net.close()
    assert host() == before


def test_refill_is_bounded_by_budget_and_size(pool: Pool) -> None:
    assert [pool.refill(1), pool.refill(5), pool.refill(5)] == [1, 1, 0]
    assert len(pool) == 2
    pool.take().close()
    assert len(pool) == 1


def test_a_failure_undoes_everything_and_is_told_by_take_not_by_refill() -> None:
    """Out of descriptors half-way: nothing is left open, the caller is back home, and the error says what to do."""
    program = """
        import os, resource
        from sandbox.netpool import CannotMakeNetwork, Pool
        pool = Pool("tnet", 3128, 4)
        home, fds = os.readlink("/proc/self/ns/net"), set(os.listdir("/proc/self/fd"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for room in range(1, 8):
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(fds) - 1 + room, hard))
            try:
                pool.take().close()
            except CannotMakeNetwork as error:
                assert "cannot make an agent's network" in str(error), error
                assert pool.refill(1) == 0
            else:
                assert room > 5, room
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert os.readlink("/proc/self/ns/net") == home, room
            assert set(os.listdir("/proc/self/fd")) == fds, room
        pool.take().close()
        assert pool.refill(1) == 1
        pool.close()
        print("clean")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.strip() == "clean", done.stderr
    assert CannotMakeNetwork is not None


def test_a_refused_message_is_named(net: Net) -> None:
    assert net.listener >= 0
    with Netlink() as route, pytest.raises(NetlinkError, match="message 2 of 2"):
        route.perform(numbered((link_up(1), link_up(2**30))), last=2, what="a link that is not there")


def test_inspection_by_other_code_sees_what_posture_says(net: Net) -> None:
    seen = inspect(net.agent_ns)
    assert seen.interfaces == ("eth0", "lo")
    assert seen.addresses == ("127.0.0.1/8 dev lo", "198.18.0.2/32 dev eth0")
    assert seen.routes == ("198.18.0.1 dev eth0",)
    assert seen.neighbours == ("198.18.0.1 dev eth0 lladdr 02:00:00:00:00:01",)
    gate = inspect(net.gate_ns)
    assert gate.interfaces == ("gate0", "lo")
    assert gate.routes == ("198.18.0.2 dev gate0",)
    with open("/dev/null", "rb") as file, pytest.raises(CannotInspect, match="cannot look into"):  # noqa: PTH123
        inspect(file.fileno())


def test_reconcile_removes_what_was_named_by_hand_and_nothing_else() -> None:
    """In a network and mount namespace of its own: the host's /run/netns is not touched."""
    script = """
        set -e
        mount -t tmpfs none /run
        for i in ns-t1-ag_dead ns-t1-ag_live ns-t2-ag_dead; do ip netns add stockade-${i#ns-}; done
        ip netns add other
        ip link add a0 type veth peer name a1
        ip link add b0 type veth peer name b1
        ip link set a0 alias stockade-t1
        ip link set b0 alias stockade-t11
        "$1" -c "from sandbox.network import reconcile; print(*reconcile('t1', {'ag_live'}), sep='\\n')"
        ip netns list | sed 's/ .*//' | sort
        ip -br link | sed 's/[@ ].*//' | sort
        "$1" -c "from sandbox.network import reconcile; print(len(reconcile('t1', {'ag_live'})))"
    """
    done = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", textwrap.dedent(script), "sh", sys.executable],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "veth a0",
        "network namespace stockade-t1-ag_dead",
        *["other", "stockade-t1-ag_live", "stockade-t2-ag_dead"],
        *["b0", "b1", "lo"],
        "0",
    ]
