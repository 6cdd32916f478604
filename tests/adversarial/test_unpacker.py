"""An unpacker that an image took over: what is left to it, tried from inside, and the same with nothing given up."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandbox import landlock
from tests.support.launcher import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the unpacker gives it up")

# Faulting or harmless where the boundary fails: opened and not written, forked and ended, bound and not connected.
PROGRAM = r"""
import ctypes, errno, json, os, resource, signal, socket, sys
from sandbox import syscalls
from sandbox.images import unpacker
from sandbox.images.limits import ImageLimits

def fork():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)

def write(path, mode=0o600):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, mode, dir_fd=3))

def set_id():
    write("set-id")
    fd = os.open("set-id", os.O_WRONLY, dir_fd=3)
    try:
        os.fchmod(fd, 0o4755)
    finally:
        os.close(fd)

def big(size):
    fd = os.open("big", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=3)
    try:
        os.pwrite(fd, b"x", size)
    finally:
        os.close(fd)

def through_link():
    os.symlink("file", "link", dir_fd=3)
    os.close(os.open("link", os.O_RDONLY, dir_fd=3))

attempts = {
    # What it is for, and has to work.
    "write a file": lambda: write("file"),
    "make a directory": lambda: os.mkdir("directory", dir_fd=3),
    "make a link": lambda: os.symlink("/etc/shadow", "symlink", dir_fd=3),
    "read /etc/passwd": lambda: os.close(os.open("/etc/passwd", os.O_RDONLY)),
    "read what is above": lambda: os.close(os.open("../secret", os.O_RDONLY, dir_fd=3)),
    "write above": lambda: write("../evil"),
    "see /proc": lambda: os.close(os.open("/proc/1/status", os.O_RDONLY)),
    "follow a link": through_link,
    "fork": fork,
    "exec": lambda: os.execve("/nonexistent", ["x"], {}) if os.path.exists("/usr") else os.execve(b"file", ["x"], {}),
    "open a socket": lambda: socket.socket(socket.AF_INET).close(),
    "make a device": lambda: os.mknod("device", 0o20600, os.makedev(1, 3), dir_fd=3),
    "make a fifo": lambda: os.mknod("fifo", 0o10600, dir_fd=3),
    "set a set-id bit": set_id,
    "become root": lambda: os.setresuid(0, 0, 0),
    "signal the daemon": lambda: os.kill(os.getppid(), 0),
    "raise its limits": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, 1 << 40)),
    "a namespace": lambda: syscalls.unshare(syscalls.CLONE_NEWUSER),
    "write beyond the largest file": lambda: big(2 << 20),
}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
channel = socket.socket(fileno=4)
confined = sys.argv[1] == "confined"
write("file")
os.fchown(3, 65534, 65534)
os.chown("file", 65534, 65534, dir_fd=3)
if confined:
    unpacker.give_up_everything("nobody", 3, ImageLimits(unpacked_bytes_max=1 << 20), channel)
reached = []
for name, attempt in attempts.items():
    try:
        attempt()
        reached.append(name)
    except (OSError, ValueError) as error:
        if name == "exec" and getattr(error, "errno", 0) == errno.ENOENT:
            reached.append(name)
channel.send(json.dumps(reached).encode())
"""
MAY = ["write a file", "make a directory", "make a link"]


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sktest-") as name:
        path = Path(name)
        (path / "root").mkdir()
        (path / "secret").write_text("secret")
        yield path


def reached(directory: Path, how: str) -> list[str]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = os.open(directory / "root", os.O_RDONLY | os.O_DIRECTORY)
    place = {"PYTHONPATH": str(ROOT), "A": str(fd), "B": str(theirs.fileno())}
    start = (
        "import os; a, b = os.dup(int(os.environ['A'])), os.dup(int(os.environ['B'])); os.dup2(a, 3); os.dup2(b, 4);"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"{start}\n{PROGRAM}", how],
            pass_fds=(fd, theirs.fileno()),
            env=place,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
        theirs.close()
        found: list[str] = json.loads(ours.recv(65536) or b"null") or [f"{done.returncode}", done.stderr.decode()]
    finally:
        os.close(fd)
        theirs.close()
        ours.close()
    return found


def test_a_taken_over_unpacker_reaches_its_directory_and_nothing_else(directory: Path) -> None:
    found = reached(directory, "confined")
    # Above its directory there is nothing: `..` of the root directory is the root directory.
    assert [name for name in found if name != "write above"] == MAY
    assert sorted(path.name for path in directory.iterdir()) == ["root", "secret"]


def test_the_same_attempts_are_found_where_nothing_is_given_up(directory: Path) -> None:
    found = reached(directory, "free")
    assert set(MAY) < set(found)
    assert "evil" in {path.name for path in directory.iterdir()}
    assert {"read /etc/passwd", "read what is above", "write above", "see /proc", "follow a link", "fork"} < set(found)
    assert {"open a socket", "make a device", "set a set-id bit", "signal the daemon", "exec"} < set(found)


def test_landlock_is_part_of_it_where_the_kernel_has_it() -> None:
    """Said, so that a kernel without it is not mistaken for one with two layers."""
    assert landlock.ABI == 0 or landlock.ABI >= 2
