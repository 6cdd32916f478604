"""Who and what an agent can reach: identity, capabilities, sockets, the host, the launcher and other agents."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandbox.plan import Bind
from tests.support.attempt import PRELUDE, ROOT, attempt

if TYPE_CHECKING:
    from tests.support.launcher import Launcher


# --- identity ---


def owners(agent_pid: int) -> set[int]:
    """Host uids of a process and all below it."""
    found: set[int] = set()
    with contextlib.suppress(OSError):  # it ended meanwhile
        found |= {Path(f"/proc/{agent_pid}").stat().st_uid}
        status = Path(f"/proc/{agent_pid}/status").read_text()
        found |= {int(word) for line in status.splitlines() if line.startswith("Uid:") for word in line.split()[1:]}
        for child in Path(f"/proc/{agent_pid}/task/{agent_pid}/children").read_text().split():
            found |= owners(int(child))
    return found


@pytest.mark.parametrize("uid", [0, 1000])
def test_every_process_has_an_id_of_its_own_range(launcher: Launcher, weak_launcher: Launcher, uid: int) -> None:
    agent = launcher.launch(["/bin/sh", "-c", "sleep 1000 & wait"], uid=uid, gid=uid)
    ids = agent.plan.ids
    status = Path(f"/proc/{agent.pid}/status").read_text()
    seen = owners(agent.pid) - {0} if "Uid:\t0" not in status else {0}
    assert seen
    # /proc itself shows pid 1, which may not be dumped, as root's: its credentials are what counts.
    assert all(ids.start <= owner < ids.start + ids.size for owner in seen)
    assert ids.host(65533) in seen
    launcher.kill(agent)
    twin = weak_launcher.launch(["/bin/sleep", "1000"], weaken=("user_namespace",))
    assert not all(twin.plan.ids.start <= owner < twin.plan.ids.start + 65536 for owner in owners(twin.pid))
    weak_launcher.kill(twin)


CAPABILITIES = """
sets = {l.split()[0]: int(l.split()[1], 16) for l in open('/proc/self/status') if l.startswith('Cap')}
assert len(sets) == 5
(reached if any(sets.values()) else refused)(sets)
"""


def test_all_five_capability_sets_are_empty(launcher: Launcher, weak_launcher: Launcher) -> None:
    for uid in (0, 1000):
        assert not attempt(launcher, CAPABILITIES, uid=uid, gid=uid).reached
    assert attempt(weak_launcher, CAPABILITIES, weaken=("capabilities",), uid=0, gid=0).reached


def test_securebits_are_locked(launcher: Launcher, weak_launcher: Launcher) -> None:
    probe = "bits = libc.prctl(27, 0, 0, 0, 0)\n(refused if bits == 0xef else reached)(hex(bits))"
    assert not attempt(launcher, probe, uid=0, gid=0).reached
    assert attempt(weak_launcher, probe, weaken=("capabilities",), uid=0, gid=0).reached


def test_no_new_privs_is_set(launcher: Launcher, weak_launcher: Launcher) -> None:
    probe = "(refused if libc.prctl(39, 0, 0, 0, 0) == 1 else reached)()"
    assert not attempt(launcher, probe).reached
    assert attempt(
        weak_launcher, probe, weaken=("new_privileges", "seccomp", "landlock", "capabilities"), uid=0, gid=0
    ).reached


def test_pid_1_cannot_be_signalled(launcher: Launcher) -> None:
    probe = """
import signal
target = TARGET
try: os.kill(target, 0)
except OSError as e: refused(name(e.errno))
reached()
"""
    for uid in (0, 1000):
        assert not attempt(launcher, probe.replace("TARGET", "1"), uid=uid, gid=uid).reached
    assert attempt(launcher, probe.replace("TARGET", "os.getpid()")).reached


# --- sockets ---

FORBIDDEN = {
    "raw": "2, 3, 1",
    "icmp datagram": "2, 2, 1",
    "packet": "17, 3, 768",
    "mptcp": "2, 1, 262",
    "sctp": "2, 1, 132",
    "udp-lite": "2, 2, 136",
    "vsock": "40, 1, 0",
    "alg": "38, 5, 0",
    "xdp": "44, 3, 0",
    "bluetooth": "31, 3, 0",
    "netfilter netlink": "16, 3, 12",
    "audit netlink": "16, 3, 9",
    "uevent netlink": "16, 3, 15",
    "xfrm netlink": "16, 3, 6",
    "ipv6": "10, 1, 0",
    "key": "15, 3, 2",
    "rds": "21, 5, 0",
    "tipc": "30, 5, 0",
}


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_socket_is_refused(launcher: Launcher, weak_launcher: Launcher, kind: str) -> None:
    """The twin comes as far as the kernel's own answer; where the kernel has no such family both say the same."""
    probe = f"result, error = call(41, {FORBIDDEN[kind]})\n(reached if result >= 0 else refused)(error)"
    inside = attempt(launcher, probe)
    assert not inside.reached
    twin = attempt(weak_launcher, probe, **ROOT)
    unsupported = {"EAFNOSUPPORT", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT"}
    assert twin.reached or twin.detail in unsupported or twin.detail != inside.detail, (inside, twin)
    if kind in ("raw", "packet", "ipv6", "uevent netlink"):
        assert twin.reached


@pytest.mark.parametrize(
    "kind", ["2, 1, 0", "2, 2, 0", "2, 1, 6", "2, 2, 17", "1, 1, 0", "1, 2, 0", "1, 5, 0", "16, 3, 0"]
)
def test_ordinary_sockets_work(launcher: Launcher, kind: str) -> None:
    assert attempt(launcher, f"result, error = call(41, {kind})\n(reached if result >= 0 else refused)(error)").reached


@pytest.mark.parametrize(
    "command",
    [
        "ip link set lo down",
        "ip route add 192.0.2.0/24 dev eth0",
        "ip addr add 192.0.2.1/32 dev eth0",
        "ip link add skt0 type veth peer name skt1",
    ],
)
def test_the_network_cannot_be_changed(launcher: Launcher, weak_launcher: Launcher, command: str) -> None:
    for uid in (0, 1000):
        assert launcher.sh(command, uid=uid, gid=uid).status != {"code": 0, "signal": None}
    # Root of the host, but in the agent's own network namespace.
    assert weak_launcher.sh(command, **ROOT).status == {"code": 0, "signal": None}


CONNECT = """
s = socket.socket()
s.settimeout(3)
try: s.connect(({host!r}, {port}))
except OSError as e: refused(type(e).__name__ + ' ' + str(e.errno))
reached()
"""


def test_loopback_services_of_the_host(launcher: Launcher, weak_launcher: Launcher) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for host in ("127.0.0.1", "198.18.0.1", "0.0.0.0", "localhost"):
            assert not attempt(launcher, CONNECT.format(host=host, port=port)).reached
        assert attempt(weak_launcher, CONNECT.format(host="127.0.0.1", port=port), weaken=("network",)).reached


def test_abstract_sockets_of_the_host(launcher: Launcher, weak_launcher: Launcher) -> None:
    name = "sktest-" + secrets.token_hex(8)
    probe = f"""
s = socket.socket(socket.AF_UNIX)
try: s.connect('\\0{name}')
except OSError as e: refused(name(e.errno))
reached()
"""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name)
        server.listen(4)
        assert not attempt(launcher, probe).reached
        assert attempt(weak_launcher, probe, weaken=("network", "landlock")).reached


SOCKETS = """
found = []
for top in ('/run', '/var', '/tmp', '/dev', '/etc', '/home', '/workspace', '/grants', '/root', '/srv', '/data'):
    for base, directories, files in os.walk(top):
        found += [os.path.join(base, f) for f in files if stat.S_ISSOCK(os.lstat(os.path.join(base, f)).st_mode)]
for path in PATHS:
    if os.path.exists(path): found.append(path)
(reached if found else refused)(found)
"""


def test_daemon_and_launcher_have_no_path_inside(launcher: Launcher, tmp_path: Path) -> None:
    paths = [
        str(launcher.run_dir),
        "/run/stockade",
        "/run/systemd",
        "/run/dbus",
        "/var/run/docker.sock",
        "/run/containerd",
    ]
    probe = SOCKETS.replace("PATHS", repr(paths))
    for uid in (0, 1000):
        assert not attempt(launcher, probe, uid=uid, gid=uid).reached
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        fd = os.open(tmp_path, os.O_PATH)
        bind = Bind(0, "/data", writable=False, owner_uid=0, owner_gid=0)
        assert attempt(launcher, probe, [fd], binds=(bind,)).reached
        os.close(fd)


LISTEN = """
import select
s = socket.create_server(('0.0.0.0', 5555))
print('ready', flush=True)
while True: s.accept()
"""


def test_one_agent_cannot_reach_another(launcher: Launcher) -> None:
    other = launcher.launch(["python3", "-I", "-c", PRELUDE + LISTEN])
    while "ready" not in other.stdout:
        assert not other.stderr
    probe = CONNECT.format(host="198.18.0.2", port=5555)
    assert not attempt(launcher, probe).reached
    # The same from inside the other agent arrives.
    assert "reached" in launcher.exec(other, ["python3", "-I", "-c", PRELUDE + probe])["stdout"]
    launcher.kill(other)


@pytest.mark.parametrize("port", [1, 22, 53, 80, 443, 3127, 3129, 4000, 8080])
def test_no_port_of_the_gate_but_the_proxy(launcher: Launcher, port: int) -> None:
    assert not attempt(launcher, CONNECT.format(host="198.18.0.1", port=port)).reached


def test_the_proxys_port_is_reached(launcher: Launcher) -> None:
    assert attempt(launcher, CONNECT.format(host="198.18.0.1", port=3128)).reached


@pytest.mark.parametrize(
    "host",
    [
        "192.0.2.1",
        "198.51.100.7",
        "203.0.113.9",
        "169.254.169.254",
        "10.0.0.1",
        "198.18.0.3",
        "198.19.0.1",
        "255.255.255.255",
    ],
)
def test_there_is_no_way_anywhere_else(launcher: Launcher, host: str) -> None:
    outcome = attempt(launcher, CONNECT.format(host=host, port=80))
    assert not outcome.reached
    assert (
        "101" in outcome.detail or "113" in outcome.detail or "Permission" in outcome.detail or "13" in outcome.detail
    )


def test_names_are_not_looked_up(launcher: Launcher) -> None:
    probe = """
import time
began = time.monotonic()
try: socket.getaddrinfo('example.com', 80)
except socket.gaierror: (refused if time.monotonic() - began < 1 else reached)('slow')
reached()
"""
    assert not attempt(launcher, probe).reached
    assert attempt(launcher, "socket.getaddrinfo('gateway.internal', 80, socket.AF_INET)\nreached()").reached


# --- System V IPC ---


def test_shared_memory_of_the_host(launcher: Launcher, weak_launcher: Launcher) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    key = secrets.randbelow(1 << 30) + 1
    segment = libc.shmget(key, 4096, 0o1000 | 0o666)
    assert segment >= 0
    try:
        probe = f"result = libc.shmget({key}, 0, 0)\n(reached if result >= 0 else refused)()"
        assert not attempt(launcher, probe).reached
        assert attempt(weak_launcher, probe, weaken=("private_ipc",)).reached
    finally:
        libc.shmctl(segment, 0, None)


def test_the_core_handler_of_the_host_is_not_started(launcher: Launcher, weak_launcher: Launcher) -> None:
    """With a limit of 0 a core_pattern that is a pipe starts its handler as root of the host; with 1 it does not."""
    probe = "import resource\n(refused if resource.getrlimit(resource.RLIMIT_CORE) == (1, 1) else reached)()"
    assert not attempt(launcher, probe).reached
    assert attempt(weak_launcher, probe, weaken=("rlimits",)).reached
