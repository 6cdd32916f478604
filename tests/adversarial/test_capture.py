"""A packet capture while an agent tries everything: in its gate, and in the namespace that stands for the host."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support import battery
from tests.support.launcher import Launcher

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: captures packets"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86_64: the numbers are of this machine"),
]

SIOCGSKNS = 0x894C  # the network namespace of a socket

# Counts frames until its input ends: those of TCP from the agent to the proxy's port, and all others, which it shows.
SNIFF = """
import json, select, socket, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
print("ready", flush=True)
good, odd, ending = 0, [], False
while True:
    ready, _, _ = select.select([s, *([] if ending else [sys.stdin])], [], [], 0.3)
    if sys.stdin in ready:
        ending = True
        continue
    if s not in ready:
        if ending: break
        continue
    frame, where = s.recvfrom(2048)
    if where[2] == 4 and where[0] == "gate0": continue  # PACKET_OUTGOING: the answers of the gate
    tcp = frame[12:14] == b"\\x08\\x00" and frame[23] == 6
    ours = frame[14] == 0x45 and frame[26:34] == socket.inet_aton("198.18.0.2") + socket.inet_aton("198.18.0.1")
    if tcp and ours and frame[36:38] == (3128).to_bytes(2, "big"):
        good += 1
    else:
        odd.append([where[0], frame[:40].hex()])
print(json.dumps([good, len(odd), odd[:5]]))
"""


@contextmanager
def capture(namespace: str, found: list[object]) -> Iterator[None]:
    command = ["nsenter", f"--net={namespace}", sys.executable, "-I", "-S", "-c", SNIFF]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            out, _ = process.communicate("", timeout=30)
            found.extend(json.loads(out))


@pytest.fixture
def standing_in() -> Iterator[tuple[Launcher, str]]:
    """A launcher whose host has one more link, with a route for everything, in a network namespace of its own."""
    # Held by a process of its own: the launcher is in other namespaces while it makes agents' networks.
    command = ["unshare", "--net", "sh", "-c", "echo ready; read line"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        namespace = f"/proc/{holder.pid}/ns/net"
        script = """
            set -e
            [ ! -e /proc/sys/net/ipv6 ] || echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6
            ip link add uplink0 type veth peer name uplink1
            for link in lo uplink0 uplink1; do ip link set $link up; done
            ip address add 192.0.2.2/32 dev uplink0
            ip route add default dev uplink0
            # Until the kernel has taken note of its carrier, a link drops what is sent.
            until=$(($(date +%s) + 5))
            while ! ip -br link show uplink0 | grep -q ' UP '; do [ "$(date +%s)" -lt "$until" ]; done
        """
        subprocess.run(["nsenter", f"--net={namespace}", "sh", "-c", script], check=True, timeout=10)
        try:
            with Launcher.start(wrapper=["nsenter", f"--net={namespace}"]) as launcher:
                yield launcher, namespace
        finally:
            holder.communicate("\n", timeout=5)


def test_a_whole_run_of_attempts_sends_packets_to_the_proxy_only(standing_in: tuple[Launcher, str]) -> None:
    launcher, host = standing_in
    agent = launcher.launch(["/bin/sleep", "1000"])
    gate = fcntl.ioctl(agent.listener, SIOCGSKNS)
    in_gate: list[object] = []
    in_host: list[object] = []
    join = (
        "import socket, struct\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.setsockopt(0, socket.IP_ADD_MEMBERSHIP,"
        " struct.pack('=4s4si', socket.inet_aton('239.1.2.3'), bytes(4), socket.if_nametoindex('eth0')))\n"
    )
    try:
        with battery.bait() as given, capture(host, in_host), capture(f"/proc/{os.getpid()}/fd/{gate}", in_gate):
            output = launcher.exec(agent, battery.program(given | {"thorough": True}))["stdout"]
            assert len(battery.results(output)) == len(battery.PROBES)
            launcher.exec(agent, ["/usr/bin/python3", "-I", "-c", join])  # makes the kernel itself send IGMP
            connect = "import socket; socket.create_connection(('198.18.0.1', 3128), 5)"
            assert launcher.exec(agent, ["/usr/bin/python3", "-I", "-c", connect])["status"]["code"] == 0
    finally:
        os.close(gate)
        launcher.kill(agent)
    assert in_gate[1:] == [0, []]
    assert isinstance(in_gate[0], int)
    assert in_gate[0] > 0, "the twin: what does go to the proxy is seen"
    assert in_host == [0, 0, []]


def test_the_capture_sees_what_leaves_the_host(standing_in: tuple[Launcher, str]) -> None:
    """The twin of the host's side: a datagram to a documentation address, into a link that leads nowhere."""
    _, host = standing_in
    seen: list[object] = []
    send = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))"
    with capture(host, seen):
        command = ["nsenter", f"--net={host}", sys.executable, "-I", "-S", "-c", send]
        subprocess.run(command, check=True, timeout=10)
    assert isinstance(seen[1], int)
    assert seen[1] > 0


def test_the_capture_sees_what_reaches_the_gate(standing_in: tuple[Launcher, str]) -> None:
    """The twin of the gate's side: without its second layer the agent's datagrams come to the gate, and no further."""
    launcher, host = standing_in
    agent = launcher.launch(["/bin/sleep", "1000"])
    flush = ["nsenter", f"--net=/proc/{agent.pid}/ns/net", "nft", "flush", "ruleset"]
    subprocess.run(flush, check=True, timeout=10)
    gate = fcntl.ioctl(agent.listener, SIOCGSKNS)
    in_gate: list[object] = []
    in_host: list[object] = []
    names = [f"UDP to {what} by device" for what in ("a documentation address", "the metadata service")]
    try:
        with battery.bait() as given, capture(host, in_host), capture(f"/proc/{os.getpid()}/fd/{gate}", in_gate):
            launcher.exec(agent, battery.program(given, names))
    finally:
        os.close(gate)
        launcher.kill(agent)
    assert isinstance(in_gate[1], int)
    assert in_gate[1] > 0
    assert in_host == [0, 0, []], "the gate leads nowhere, with or without rules"
