"""Attacks on the runtime itself, at the moments when a process of the host becomes one of the sandbox."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandbox.plan import Bind, Rootfs
from tests.support.attempt import PRELUDE, ROOT, TALLY, attempt
from tests.support.launcher import LauncherError

if TYPE_CHECKING:
    from tests.support.launcher import Launcher

# --- directory descriptors that a runtime leaks (CVE-2024-21626) ---

# Climbs from the working directory; who arrives at the host's root came in by another way than the sandbox's.
CLIMB = """
host = {host}
here = os.open('.', os.O_PATH)
try: os.getcwd()
except OSError: reached('a directory outside of the root')
if os.readlink('/proc/self/cwd') == '/' and not os.path.samefile('.', '/'): reached('a root of its own')
for _ in range(40):
    status = os.fstat(here)
    if [status.st_dev, status.st_ino] == host: reached('the root of the host')
    here = os.open('..', os.O_PATH, dir_fd=here)
refused(os.getcwd())
"""


def climb() -> str:
    root = Path("/").stat()
    return CLIMB.format(host=[root.st_dev, root.st_ino])


WAYS_IN = ["/proc/self/fd/{}", "/proc/self/fd/{}/..", "/proc/thread-self/fd/{}", "/dev/fd/{}"]


@pytest.mark.parametrize("way", WAYS_IN)
def test_no_working_directory_by_a_descriptor_of_the_runtime(launcher: Launcher, way: str) -> None:
    """At launch and by exec, for every descriptor that either might hold at that moment."""
    agent = launcher.launch(["/bin/sleep", "1000"])
    command = ["python3", "-I", "-c", PRELUDE + climb()]
    for number in range(24):
        cwd = way.format(number)
        with contextlib.suppress(LauncherError):  # what cannot be entered
            assert not attempt(launcher, climb(), cwd=cwd).reached, cwd
        with contextlib.suppress(LauncherError):
            assert '["reached"' not in launcher.exec(agent, command, cwd=cwd)["stdout"], cwd
    launcher.kill(agent)
    TALLY.refused += 2


def test_the_root_of_the_host_is_known_where_it_is_reached(launcher: Launcher) -> None:
    """The twin: with the host's root bound, the same climb finds it."""
    root = os.open("/", os.O_PATH)
    bind = Bind(0, "/host", writable=False, owner_uid=0, owner_gid=0)
    assert attempt(launcher, climb(), [root], binds=(bind,), cwd="/host").reached
    os.close(root)


# --- the program of the runtime (CVE-2019-5736) ---

OVERWRITE = """
import errno
try: os.close(os.open('/proc/self/exe', os.O_WRONLY))
except OSError as e: (reached if e.errno == errno.ETXTBSY else refused)(name(e.errno))  # ETXTBSY comes after permission
reached('opened')
"""


@pytest.mark.parametrize("program", ["/proc/self/exe", "/proc/thread-self/exe"])
def test_the_runtimes_own_program_cannot_be_overwritten(
    launcher: Launcher, weak_launcher: Launcher, program: str
) -> None:
    """Started as /proc/self/exe, the program is the interpreter of the launcher, on the host's own mount."""
    command = [program, "-I", "-c", PRELUDE + OVERWRITE]
    for uid in (0, 1000):
        agent = launcher.run(command, uid=uid, gid=uid)
        assert '["refused"' in agent.stdout, (agent.status, agent.stderr)
        agent = launcher.launch(["/bin/sleep", "1000"], uid=uid, gid=uid)
        assert '["refused"' in launcher.exec(agent, command)["stdout"]
        launcher.kill(agent)
        TALLY.refused += 2
    twin = weak_launcher.run(command, **ROOT)
    assert '["reached"' in twin.stdout, (twin.status, twin.stderr)
    TALLY.twins += 1


WATCH = """
import time
def look(pid):
    try: links = [os.readlink(f'/proc/{pid}/fd/{fd}') for fd in os.listdir(f'/proc/{pid}/fd')]
    except OSError: return
    foreign = [l for l in links if l.startswith(('socket:', 'anon_inode:', 'net:', 'mnt:', 'user:', '/memfd:'))]
    if foreign: reached(foreign[:3])
print('ready', flush=True)
own, until = os.getpid(), time.monotonic() + SECONDS
while time.monotonic() < until:
    # Its number is the next one; asked for directly, since a listing of /proc takes longer than it lives.
    for entry in os.listdir('/proc'):
        if entry.isdigit() and int(entry) not in (1, own): look(entry)
refused('nothing of the runtime')
"""


def test_the_process_that_exec_makes_shows_nothing_before_it_is_the_agents(
    launcher: Launcher, weak_launcher: Launcher
) -> None:
    """While operators start programs inside, the agent looks for descriptors of the helper on its way in."""

    def watched(where: Launcher, **changes: Any) -> str:
        agent = where.launch(["python3", "-I", "-c", PRELUDE + WATCH.replace("SECONDS", "1.5")], **changes)
        while "ready" not in agent.stdout:
            assert not agent.stderr, agent.stderr
        for _ in range(60):
            if '["' in agent.stdout:
                break
            with contextlib.suppress(LauncherError):  # it may have ended meanwhile
                where.exec(agent, ["/bin/true"])
        where.wait(agent)
        return agent.stdout

    assert '["refused"' in watched(launcher)
    assert '["refused"' in watched(launcher, uid=0, gid=0)
    assert '["reached"' in watched(weak_launcher, **ROOT | {"weaken": (*ROOT["weaken"], "hidden_proc")})
    TALLY.refused += 2
    TALLY.twins += 1


# --- programs that gain rights when they are executed ---

SHOW = """
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(void) {
    char line[256], word[64] = "";
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status)) sscanf(line, "CapEff: %63s", word);
    printf("%d %d %d\\n", geteuid(), getegid(), strspn(word, "0") != strlen(word));
    return 0;
}
"""


@pytest.fixture(scope="module")
def privileged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system with one program in several guises: set-uid, set-gid, with capabilities, and plain."""
    root = tmp_path_factory.mktemp("root")
    for name in ("bin", "proc", "dev", "etc", "tmp"):
        (root / name).mkdir()
    source = root / "show.c"
    source.write_text(SHOW)
    plain = root / "bin" / "plain"
    subprocess.run(["gcc", "-static", "-o", plain, source], check=True, timeout=60)
    for name, mode in (("setuid", 0o4755), ("setgid", 0o2755), ("capable", 0o755)):
        program = root / "bin" / name
        program.write_bytes(plain.read_bytes())
        program.chmod(mode)
    all_of_them = struct.pack("<IIIII", 0x02000001, 1 << 21, 0, 0, 0)
    os.setxattr(root / "bin" / "capable", "security.capability", all_of_them)
    return root


@pytest.mark.parametrize("guise", ["setuid", "setgid", "capable"])
def test_a_privileged_program_of_the_root_is_inert(
    launcher: Launcher, weak_launcher: Launcher, privileged: Path, guise: str
) -> None:
    def shown(where: Launcher, program: str, **changes: Any) -> str:
        fd = os.open(privileged, os.O_PATH)
        try:
            agent = where.run([f"/bin/{program}"], [fd], rootfs=Rootfs(kind="directory", fd=0), **changes)
        finally:
            os.close(fd)
        assert agent.status == {"code": 0, "signal": None}, (agent.status, agent.stderr)
        return agent.stdout

    assert shown(launcher, guise) == "1000 1000 0\n"
    TALLY.refused += 1
    weaken = (*ROOT["weaken"], "mount_flags")
    assert shown(weak_launcher, "plain", weaken=weaken) == "1000 1000 0\n"
    found = {"setuid": "0 1000 1\n", "setgid": "1000 0 0\n", "capable": "1000 1000 1\n"}
    assert shown(weak_launcher, guise, weaken=weaken) == found[guise]
    TALLY.twins += 1


def test_two_agents_share_no_id_of_the_host(launcher: Launcher) -> None:
    agents = [launcher.launch(["/bin/sleep", "1000"]) for _ in range(3)]
    ids = [agent.posture["ids"] for agent in agents]
    ranges = [set(range(each["start"], each["start"] + each["size"])) for each in ids]
    assert not ranges[0] & ranges[1]
    assert not ranges[1] & ranges[2]
    assert all(set(each["uid"]) <= whole for each, whole in zip(ids, ranges, strict=True))
    for agent in agents:
        launcher.kill(agent)
