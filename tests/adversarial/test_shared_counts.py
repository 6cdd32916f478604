"""Attempts to use up what the kernel counts for the whole host, or charges to no cgroup."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.attempt import PRELUDE, attempt

if TYPE_CHECKING:
    from tests.support.launcher import Launcher

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")


def said(launcher: Launcher, probe: str, **changes: Any) -> str:
    return launcher.run(["python3", "-I", "-c", PRELUDE + probe], **changes).stdout.strip()


INOTIFY = """
import time
count = 0
while libc.inotify_init() >= 0 and count < 5000: count += 1
print(count, flush=True)
time.sleep(1000)
"""


def test_inotify_instances_are_the_agents_own(launcher: Launcher) -> None:
    """Each has the host's limit for one user to itself: the user namespace is not owned by root."""
    limit = int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())
    first = launcher.launch(["python3", "-I", "-c", PRELUDE + INOTIFY])
    deadline = time.monotonic() + 10
    while not first.stdout.strip():
        assert time.monotonic() < deadline, first.stderr
        time.sleep(0.01)
    assert int(first.stdout) == limit
    second = launcher.launch(["python3", "-I", "-c", PRELUDE + INOTIFY])
    while not second.stdout.strip():
        assert time.monotonic() < deadline, second.stderr
        time.sleep(0.01)
    assert int(second.stdout) == limit
    launcher.kill(first)
    launcher.kill(second)


SIGNALS = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
count = 0
while libc.sigqueue(os.getpid(), signal.SIGRTMIN, 0) == 0 and count < 100000: count += 1
print(count)
"""


def test_pending_signals_are_few(launcher: Launcher) -> None:
    assert 0 < int(said(launcher, SIGNALS)) <= 8192


TERMINALS = """
count = 0
try:
    while count < 3000:
        os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY); count += 1
except OSError as e: print(count, name(e.errno))
"""


def test_terminals_are_a_share(launcher: Launcher) -> None:
    assert said(launcher, TERMINALS) == "64 ENOSPC"


BUFFER = """
a, b = socket.socketpair()
before = b.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
for option in (socket.SO_RCVBUF, 33): b.setsockopt(socket.SOL_SOCKET, option, 1 << 22)
after = b.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
(reached if after > before else refused)(after)
"""


def test_buffers_of_sockets_do_not_grow_and_nobody_fails_for_it(launcher: Launcher, weak_launcher: Launcher) -> None:
    assert not attempt(launcher, BUFFER).reached
    assert attempt(weak_launcher, BUFFER.replace(", 33)", ",)"), weaken=("seccomp",)).reached


UNREAD = """
import time
kept = []
request = struct.pack('IHHII', 32, 18, 1, 1, 0) + struct.pack('BxHiII', 0, 0, 1, 0, 0)
for number in range(4000):
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    s.setblocking(False)
    kept.append(s)
    try:
        for _ in range(COUNT): s.send(request)
    except OSError: pass
print('all', flush=True)
time.sleep(1000)
"""


def test_replies_that_nobody_reads_end_the_agent(launcher: Launcher) -> None:
    """No cgroup counts them; programs read them."""
    flood = launcher.launch(["python3", "-I", "-c", PRELUDE + UNREAD.replace("COUNT", "400")])
    launcher.wait(flood)
    assert flood.status == {"code": None, "signal": 9}
    assert flood.oom
    # The twin: as many sockets with one reply each are nobody's trouble.
    few = launcher.launch(["python3", "-I", "-c", PRELUDE + UNREAD.replace("COUNT", "1").replace("4000", "1000")])
    deadline = time.monotonic() + 10
    while "all" not in few.stdout:
        assert time.monotonic() < deadline, few.stderr
        time.sleep(0.01)
    time.sleep(1.5)  # it has been looked at
    assert launcher.kill(few)["processes_killed"] > 0


FLAGS = {
    "memfd_create MFD_HUGETLB": (319, "BAD, 4"),
    "mmap MAP_HUGETLB": (9, "0, 0, 3, 0x40022, -1, 0"),
    "shmget SHM_HUGETLB": (29, "0, 0, 0o5600"),
    "renameat2 RENAME_WHITEOUT": (316, "-1, BAD, -1, BAD, 4"),
    "clone CLONE_PARENT": (56, "0x8000 | 0x10000, 0, 0, 0, 0"),
}
ANSWERS = {"ENOMEM", "ENOSYS", "EINVAL", "EPERM"}
NEAR = {
    "memfd_create MFD_HUGETLB": "BAD, 1",
    "renameat2 RENAME_WHITEOUT": "-1, BAD, -1, BAD, 1",
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_taken_out_of_calls_that_are_allowed(launcher: Launcher, name: str) -> None:
    number, arguments = FLAGS[name]
    assert attempt(launcher, f"judge(*call({number}, {arguments}), by={sorted(ANSWERS)})").detail in ANSWERS
    if name in NEAR:  # and only they: the kernel looks at the same call without the flag
        assert attempt(launcher, f"judge(*call({number}, {NEAR[name]}))").detail in ("EFAULT", "EBADF")


@pytest.mark.parametrize("name", ["pressure/memory", "cmdline"])
def test_what_steers_or_shows_the_host_does_not_open(launcher: Launcher, weak_launcher: Launcher, name: str) -> None:
    flags = "os.O_WRONLY" if "/" in name else "os.O_RDONLY"
    assert not attempt(launcher, f"opens('/proc/{name}', {flags})").reached
    probe = f"opens('/proc/{name}', {flags})"
    assert attempt(weak_launcher, probe, weaken=("hidden_proc", "landlock", "user_namespace")).reached


CONNECTIONS = """
import time
server = socket.socket(); server.bind(('127.0.0.1', 0)); server.listen(100)
kept, held = [], 0
for _ in range(COUNT):
    s = socket.create_connection(server.getsockname())
    kept += [s, server.accept()[0]]
    s.setblocking(False)
    try:
        while held < 1 << 29: held += s.send(b'x' * 65536)
    except BlockingIOError: pass
print(held >> 20)
"""


def test_what_connections_hold_unread_is_limited(launcher: Launcher) -> None:
    """A quarter of the memory limit on v1, a part of it on v2; a few connections hold what they like."""
    agent = launcher.run(["python3", "-I", "-c", PRELUDE + CONNECTIONS.replace("COUNT", "60")])
    most = agent.plan.limits.memory_bytes >> 20
    if agent.status == {"code": 0, "signal": None}:
        assert int(agent.stdout) < most * 3 // 4
    else:
        assert agent.oom
    assert int(said(launcher, CONNECTIONS.replace("COUNT", "2"))) > 0


PROJECTS = """
try:
    fd = os.open('/proc/self/projid_map', os.O_WRONLY)
    os.write(fd, b'0 0 100')
except OSError as e: refused(name(e.errno))
reached()
"""


def test_project_ids_of_the_host_cannot_be_mapped(launcher: Launcher) -> None:
    assert not attempt(launcher, PROJECTS).reached
