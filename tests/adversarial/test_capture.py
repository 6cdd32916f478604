"""A packet capture while an agent tries everything: in its gate, and on the way out of what stands for the host.

Both look on during every other test too: tests/conftest.py and tests/support/gates.py. Here are their twins.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.conftest import UPLINK
from tests.support import battery
from tests.support.launcher import Launcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.gates import Gates

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: captures packets"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86_64: the numbers are of this machine"),
]

JOIN = """
import socket, struct
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
group, index = socket.inet_aton('239.1.2.3'), socket.if_nametoindex('eth0')
s.setsockopt(0, socket.IP_ADD_MEMBERSHIP, struct.pack('=4s4si', group, bytes(4), index))
"""


@pytest.fixture
def own() -> Iterator[Launcher]:
    """A launcher whose gates nobody else's frames are in."""
    with Launcher.start() as launcher:
        yield launcher


def gates_of(launcher: Launcher) -> Gates:
    assert launcher.gates is not None, "needs nftables"
    return launcher.gates


def soon(get: Callable[[], list[str]], seconds: float = 5) -> list[str]:
    deadline = time.monotonic() + seconds
    while not (found := get()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def test_a_whole_run_of_attempts_sends_packets_to_the_proxy_only(own: Launcher, request: pytest.FixtureRequest) -> None:
    agent = own.launch(["/bin/sleep", "1000"])
    with battery.bait() as given:
        output = own.exec(agent, battery.program(given | {"thorough": True}))["stdout"]
    assert len(battery.results(output)) == len(battery.PROBES)
    own.exec(agent, ["/usr/bin/python3", "-I", "-c", JOIN])  # makes the kernel itself send IGMP
    connect = "import socket; socket.create_connection(('198.18.0.1', 3128), 5)"
    assert own.exec(agent, ["/usr/bin/python3", "-I", "-c", connect])["status"]["code"] == 0
    own.kill(agent)
    gates = gates_of(own)
    own.close()
    assert gates.seen > 0
    assert request.config.stash[UPLINK].frames() == []


def test_the_capture_sees_what_reaches_the_gate(own: Launcher, request: pytest.FixtureRequest) -> None:
    """The twin of the gate's side: without its second layer the agent's datagrams come to the gate, and no further."""
    agent = own.launch(["/bin/sleep", "1000"])
    flush = ["nsenter", f"--net=/proc/{agent.pid}/ns/net", "nft", "flush", "ruleset"]
    subprocess.run(flush, check=True, timeout=10)
    names = [f"UDP to {what} by device" for what in ("a documentation address", "the metadata service")]
    with battery.bait() as given:

        def send() -> list[str]:
            own.exec(agent, battery.program(given, names))
            return soon(gates_of(own).frames, 0.5)

        assert soon(send, 30), "more than once: the gate may be looked into only now"
    own.kill(agent)
    while soon(gates_of(own).frames, 1):  # the other one
        pass
    own.close()
    assert request.config.stash[UPLINK].frames() == [], "the gate leads nowhere, with or without rules"


def test_the_capture_sees_what_leaves_the_host(request: pytest.FixtureRequest) -> None:
    """The twin of the host's side: a datagram to a documentation address, into a link that leads nowhere."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("192.0.2.1", 9))
    assert soon(request.config.stash[UPLINK].frames)
