"""Ways to anything but the proxy's port. Outside addresses are those for documentation and of private networks."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import time
from functools import partial
from typing import Final

from tests.adversarial.probes.inside import PREPARATIONS, Reached, add, facts, name_of, probe, refused

GATE: Final = "198.18.0.1"
LISTENING: Final = (22, 53, 80, 443, 2375, 3129, 8080, 50051)

ADDRESSES: Final = {
    "a documentation address": "192.0.2.1",
    "a second documentation address": "198.51.100.7",
    "a third documentation address": "203.0.113.9",
    "the metadata service": "169.254.169.254",
    "the metadata service of containers": "169.254.170.2",
    "the metadata service in CGNAT": "100.100.100.200",
    "CGNAT": "100.64.0.1",
    "private 10/8": "10.0.0.1",
    "private 172.16/12": "172.16.0.1",
    "docker0": "172.17.0.1",
    "private 192.168/16": "192.168.0.1",
    "libvirt": "192.168.122.1",
    "link-local": "169.254.0.1",
    "a neighbour of the agent": "198.18.0.3",
    "the network of the gate": "198.18.0.0",
    "the transparent range": "198.19.0.1",
}


def _exists() -> None:
    """In an open sandbox: all these addresses are there, with services, and no rule stands in the way."""
    if not facts["open"]:
        return
    subprocess.run(["nft", "flush", "ruleset"], check=False, capture_output=True)
    for address in (*ADDRESSES.values(), GATE):
        subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=False, capture_output=True)
    for address in ("224.0.0.0/4", "255.255.255.255/32"):
        subprocess.run(["ip", "route", "add", address, "dev", "eth0"], check=False, capture_output=True)
    subprocess.run(["ip", "route", "add", "default", "dev", "eth0"], check=False, capture_output=True)
    for port in LISTENING:
        server = socket.create_server(("0.0.0.0", port))
        server.set_inheritable(False)
        _servers.append(server)


_servers: list[socket.socket] = []
PREPARATIONS.append(_exists)


def _tcp(address: str, port: int, *options: tuple[int, int, bytes]) -> str:
    with socket.socket() as sock:
        sock.settimeout(1)

        def act() -> None:
            for level, option, value in options:
                sock.setsockopt(level, option, value)
            sock.connect((address, port))

        return refused(act)


def _udp(address: str, port: int, *options: tuple[int, int, bytes], flags: int = 0, control: bytes = b"") -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:

        def act() -> int:
            for level, option, value in options:
                sock.setsockopt(level, option, value)
            return sock.sendmsg([b"x"], [(0, 8, control)] if control else [], flags, (address, port))  # 8: IP_PKTINFO

        return refused(act)


def _index() -> int:
    return socket.if_nametoindex("eth0")


def _device() -> tuple[int, int, bytes]:
    return (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo" if facts["open"] else b"eth0")


BROADCAST: Final = (socket.SOL_SOCKET, socket.SO_BROADCAST, struct.pack("i", 1))


def _pktinfo() -> bytes:
    return struct.pack("=I4s4s", _index(), bytes(4), bytes(4))


for _name, _address in ADDRESSES.items():
    add(f"TCP to {_name}", partial(_tcp, _address, 80))
    add(f"UDP to {_name}", partial(_udp, _address, 53))


def _tcp_by_device(address: str) -> str:
    return _tcp(address, 80, _device())


def _udp_by_device(address: str, port: int, *options: tuple[int, int, bytes]) -> str:
    return _udp(address, port, *options, _device())


def _udp_by_index(address: str) -> str:
    return _udp(address, 53, control=_pktinfo())


def _udp_by_unicast_if(address: str) -> str:
    return _udp(address, 53, (0, 50, struct.pack("!I", _index())))


def _udp_by_multicast_if(address: str) -> str:
    interface = (0, socket.IP_MULTICAST_IF, struct.pack("=4s4si", bytes(4), bytes(4), _index()))
    return _udp(address, 5353, BROADCAST, interface)


for _name, _address in list(ADDRESSES.items())[:6]:
    add(f"TCP to {_name} by device", partial(_tcp_by_device, _address))
    add(f"UDP to {_name} by device", partial(_udp_by_device, _address, 53), needs="nftables")
    add(f"UDP to {_name} by index", partial(_udp_by_index, _address), needs="nftables")
    add(
        f"UDP to {_name} by IP_UNICAST_IF",
        partial(_udp_by_unicast_if, _address),
        needs="nftables",
    )
    add(f"UDP to {_name} without routing", partial(_udp, _address, 53, flags=socket.MSG_DONTROUTE))
for _name, _address in {
    "all hosts": "224.0.0.1",
    "mDNS": "224.0.0.251",
    "SSDP": "239.255.255.250",
    "everybody": "255.255.255.255",
}.items():
    add(f"datagram to {_name}", partial(_udp, _address, 5353, BROADCAST))
    add(f"datagram to {_name} by device", partial(_udp_by_device, _address, 5353, BROADCAST), needs="nftables")
    add(
        f"datagram to {_name} by the multicast interface",
        partial(_udp_by_multicast_if, _address),
        needs="nftables",
    )

# --- the gate ---

for _port in (1, 22, 25, 53, 80, 111, 443, 2375, 2376, 3127, 3129, 4000, 5432, 6379, 6443, 8080, 9090, 10250, 50051):
    add(
        f"TCP to port {_port} of the gate",
        partial(_tcp, GATE, _port),
        absent=() if _port in LISTENING else ("ECONNREFUSED",),
    )
for _port in (53, 67, 123, 161, 514, 3128, 5353):
    add(f"UDP to port {_port} of the gate", partial(_udp, GATE, _port), needs="nftables")


@probe("scan of the gate: all ports but the proxy's")
def scan() -> str:
    waiting, poll = {}, select.poll()
    ports = [port for port in range(1, 65536, 1 if facts.get("thorough") else 61) if port != 3128]
    for port in (*LISTENING, *ports):
        sock = socket.socket()
        sock.setblocking(False)
        if sock.connect_ex((GATE, port)) in (0, 115):
            waiting[sock.fileno()] = (sock, port)
            poll.register(sock, select.POLLOUT)
        if len(waiting) > 500:
            _settle(waiting, poll)
    until = time.monotonic() + 3
    while waiting and time.monotonic() < until:
        _settle(waiting, poll)
    return "none answers"


def _settle(waiting: dict[int, tuple[socket.socket, int]], poll: select.poll) -> None:
    for fd, _ in poll.poll(100):
        sock, port = waiting.pop(fd)
        poll.unregister(fd)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
            raise Reached(f"port {port}")
        sock.close()


# --- other ways to say where to, or who one is ---


def _spoofed(source: str, *, udp: bool) -> str:
    """Bind to an address that is not one's own (IP_FREEBIND), and speak to the gate."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM) as sock:
        sock.settimeout(1)

        def act() -> None:
            sock.setsockopt(0, 15, 1)
            sock.bind((source, 0))
            sock.connect((GATE, 53 if udp else 8080))
            sock.send(b"x")

        return refused(act)


for _name, _address in {
    "the gate": GATE,
    "another agent": "198.18.0.3",
    "the host": "127.0.0.1",
    "anybody": "192.0.2.1",
}.items():
    add(f"TCP from the address of {_name}", partial(_spoofed, _address, udp=False))
    add(f"UDP from the address of {_name}", partial(_spoofed, _address, udp=True), needs="nftables")


@probe("the proxy takes a connection from an address that is another's", needs="nftables")
def spoofed_to_proxy() -> str:
    with socket.socket() as sock:
        sock.settimeout(1)

        def act() -> None:
            sock.setsockopt(0, 15, 1)
            sock.bind(("192.0.2.1" if facts["open"] else "198.18.0.77", 0))
            sock.connect((GATE, 8080 if facts["open"] else 3128))

        return refused(act)


def _source_route(kind: int, hop: str, target: str) -> str:
    """Loose or strict source routing, with the gate as the first hop."""
    option = bytes([kind, 7, 4]) + socket.inet_aton(target) + b"\0"
    with socket.socket() as sock:
        sock.settimeout(1)

        def act() -> None:
            if not facts["open"]:
                sock.setsockopt(0, socket.IP_OPTIONS, option)
            sock.connect((hop, 80))

        return refused(act)


add("loose source route through the gate", partial(_source_route, 131, GATE, "192.0.2.1"))
add("strict source route through the gate", partial(_source_route, 137, GATE, "192.0.2.1"))


@probe("TCP fast open carries data to an address")
def fast_open() -> str:
    with socket.socket() as sock:
        sock.settimeout(1)
        error = refused(lambda: sock.sendto(b"x", 0x20000000, ("192.0.2.1", 80)))
    if error == "EINPROGRESS":
        raise Reached(error)
    return error


@probe("connecting a socket anew, from loopback to elsewhere")
def connect_anew() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", 9))
        sock.connect_ex(("0.0.0.0", 0))
        return refused(lambda: sock.connect(("192.0.2.1", 53)))


@probe("an IPv6 address on an IPv4 socket", untwinned="the kernel itself refuses it")
def wrong_family() -> str:
    with socket.socket() as sock:
        import ctypes  # noqa: PLC0415 - beside its use

        from tests.adversarial.probes.inside import call  # noqa: PLC0415 - beside its use

        address = struct.pack("=HHI16sI", 10, 80, 0, b"\0" * 10 + b"\xff\xff" + socket.inet_aton("192.0.2.1"), 0)
        buffer = ctypes.create_string_buffer(address)
        result, error = call(42, sock.fileno(), ctypes.addressof(buffer), 28)
        if result >= 0:
            raise Reached
        return error


@probe("there is an IPv6 address", absent=("none",))
def ipv6_address() -> str:
    if os.path.exists("/proc/net/if_inet6"):
        with open("/proc/net/if_inet6") as file:
            if lines := [line for line in file if not line.endswith(" lo\n")]:
                raise Reached(lines[0])
    return "none"


@probe("another route")
def routes() -> str:
    with open("/proc/net/route") as file:
        found = [line.split()[:2] for line in file.read().splitlines()[1:]]
    if found != [["eth0", "010012C6"]]:
        raise Reached(found)
    return "one"


@probe("another interface", twin="shared", absent=("lo and eth0",))
def interfaces() -> str:
    with open("/proc/net/dev") as file:
        names = {line.split(":")[0].strip() for line in file.read().splitlines()[2:]}
    if names - {
        "lo",
        "eth0",
        "tunl0",
        "sit0",
        "gre0",
        "gretap0",
        "erspan0",
        "ip_vti0",
        "ip6_vti0",
        "ip6tnl0",
        "ip6gre0",
    }:
        raise Reached(names)
    return "lo and eth0"


@probe("a name is looked up", untwinned="no name server is anywhere near a test")
def lookup() -> str:
    began = time.monotonic()
    try:
        found = socket.getaddrinfo("probe.example.com", 80)
    except socket.gaierror as error:
        if time.monotonic() - began > 2:
            raise Reached("it waited") from None
        return str(error)
    raise Reached(found)


@probe("a name server on loopback")
def resolver() -> str:
    return _tcp("127.0.0.53", 53)


@probe("services on the host's loopback", twin="shared")
def loopback() -> str:
    for address in ("127.0.0.1", "127.1.2.3", "0.0.0.0", "localhost"):
        _tcp(address, int(facts["port"]))
    return "none"


@probe("a broadcast of the gate's link", needs="nftables")
def link_broadcast() -> str:
    return _udp("198.18.255.255", 9, BROADCAST, _device())


@probe("names of abstract sockets that are not one's own", twin="shared")
def abstract_names() -> str:
    with open("/proc/net/unix") as file:
        names = [line.split()[7] for line in file if "@" in line]
    if names:
        raise Reached(names[:3])
    return "none"


for _name, _socket in {
    "of a test on the host": "",
    "of D-Bus": "/tmp/dbus-sktest",
    "of containerd": "/containerd-shim/sktest.sock",
    "of X": "/tmp/.X11-unix/X0",
    "of LXD": "/var/lib/lxd/command",
}.items():

    def _abstract(path: str = _socket) -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            return refused(lambda: sock.connect("\0" + (path or str(facts["abstract"]))))

    add(f"abstract socket {_name}", _abstract, twin="shared", absent=("ECONNREFUSED",) if _socket else ())

for _path in (
    "/run/docker.sock", "/var/run/docker.sock", "/run/containerd/containerd.sock", "/run/crio/crio.sock",
    "/run/podman/podman.sock", "/run/dbus/system_bus_socket", "/run/systemd/private", "/run/systemd/notify",
    "/run/systemd/journal/socket", "/run/systemd/journal/stdout", "/run/systemd/journal/dev-log", "/dev/log",
    "/run/udev/control", "/run/nscd/socket", "/run/snapd.socket", "/run/libvirt/libvirt-sock",
    "/run/stockade/control.sock", "/run/stockade/launcher.sock", "/tmp/.X11-unix/X0", "/run/user/0/bus",
    "/run/user/1000/bus", "/var/run/nscd/socket", "/run/lvm/lvmpolld.socket", "/run/uuidd/request",
    "/var/lib/kubelet/pod-resources/kubelet.sock",
):  # fmt: skip

    def _named(path: str = _path) -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(1)
            return refused(lambda: sock.connect(path), by=("ENOENT", "ENOTDIR"))

    add(f"socket at {_path}", _named, untwinned="the file system of the host is in no weakened plan")


@probe("a unix socket anywhere in the file system", untwinned="as above; test_reach.py has one with a bind")
def any_socket() -> str:
    import stat  # noqa: PLC0415 - beside its use

    for top in ("/run", "/var", "/tmp", "/dev", "/etc", "/home", "/workspace", "/grants"):
        for base, _, files in os.walk(top):
            for name in files:
                if stat.S_ISSOCK(os.lstat(path := os.path.join(base, name)).st_mode):
                    raise Reached(path)
    return name_of(2)
