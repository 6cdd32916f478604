"""Mounts, /proc, devices and set-id bits: what an agent can see and change of the host's files."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandbox.plan import Bind
from tests.support.attempt import ROOT, attempt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.launcher import Launcher

OPEN_PROC = ROOT | {"weaken": (*ROOT["weaken"], "hidden_proc")}


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[tuple[Path, int, Bind]]:
    path = tmp_path / "work"
    path.mkdir()
    os.chown(path, 1000, 1000)
    fd = os.open(path, os.O_PATH)
    yield path, fd, Bind(0, "/workspace", writable=True, owner_uid=1000, owner_gid=1000)
    os.close(fd)


@pytest.mark.parametrize("path", ["/usr/bin/env", "/bin/ls", "/etc/services", "/etc/passwd"])
def test_the_root_is_not_writable(launcher: Launcher, weak_launcher: Launcher, path: str) -> None:
    """Opened for writing and closed again; nothing is written even by the twin."""
    probe = f"opens({path!r}, os.O_WRONLY)"
    assert not attempt(launcher, probe).reached
    assert not attempt(launcher, probe, uid=0, gid=0).reached
    if path in ("/usr/bin/env", "/bin/ls"):
        twin = ROOT | {"weaken": (*ROOT["weaken"], "read_only_root")}
        assert attempt(weak_launcher, probe, **twin).reached


def test_landlock_holds_where_the_mounts_do_not(weak_launcher: Launcher) -> None:
    weaken = ("seccomp", "capabilities", "user_namespace", "new_privileges", "read_only_root")
    probe = "opens('/usr/bin/env', os.O_WRONLY)"
    outcome = attempt(weak_launcher, probe, weaken=weaken, uid=0, gid=0)
    assert (outcome.reached, outcome.detail) == (False, "/usr/bin/env: EACCES")
    assert attempt(weak_launcher, probe, weaken=(*weaken, "landlock"), uid=0, gid=0).reached


@pytest.mark.parametrize(
    "path",
    [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/kernel/hostname",
        "/proc/sys/vm/overcommit_memory",
        "/proc/sys/net/ipv4/ip_forward",
        "/proc/sys/fs/binfmt_misc/register",
        "/proc/sysrq-trigger",
    ],
)
def test_settings_of_the_kernel_do_not_open_for_writing(launcher: Launcher, weak_launcher: Launcher, path: str) -> None:
    probe = f"opens({path!r}, os.O_WRONLY)"
    for uid in (0, 1000):
        assert not attempt(launcher, probe, uid=uid, gid=uid).reached
    if Path(path).exists():
        assert attempt(weak_launcher, probe, **OPEN_PROC).reached


@pytest.mark.parametrize(
    "name", ["kcore", "kmsg", "keys", "kallsyms", "timer_list", "slabinfo", "vmallocinfo", "config.gz"]
)
def test_what_shows_the_kernel_is_masked(launcher: Launcher, weak_launcher: Launcher, name: str) -> None:
    probe = f"opens('/proc/{name}', os.O_RDONLY | os.O_NONBLOCK)"
    for uid in (0, 1000):
        assert not attempt(launcher, probe, uid=uid, gid=uid).reached
    if Path("/proc", name).exists():
        assert attempt(weak_launcher, probe, **OPEN_PROC).reached


@pytest.mark.parametrize("path", ["/sys/kernel", "/sys/fs/cgroup/cgroup.procs", "/sys/class/dmi", "/sys/kernel/debug"])
def test_there_is_no_sys(launcher: Launcher, path: str) -> None:
    assert not attempt(launcher, f"(reached if os.path.exists({path!r}) else refused)()").reached
    assert attempt(launcher, "(reached if os.path.exists('/sys') else refused)()").reached


PROCESSES = """
mine = {str(os.getpid()), str(os.getppid())}
others = [e for e in os.listdir('/proc') if e.isdigit() and e not in mine]
(reached if others else refused)(others[:5])
"""


def test_only_own_processes_are_seen(launcher: Launcher, weak_launcher: Launcher) -> None:
    for uid in (0, 1000):
        assert not attempt(launcher, PROCESSES, uid=uid, gid=uid).reached
    assert attempt(weak_launcher, PROCESSES, weaken=("private_pid", "hidden_proc")).reached


@pytest.mark.parametrize("entry", ["cmdline", "environ", "root", "cwd", "exe", "fd", "maps", "ns/mnt", "mem"])
def test_nothing_of_the_launcher_in_proc_1(launcher: Launcher, weak_launcher: Launcher, entry: str) -> None:
    probe = f"""
try: os.stat('/proc/1/{entry}', follow_symlinks=True)
except OSError as e: refused(name(e.errno))
reached()
"""
    for uid in (0, 1000):
        assert not attempt(launcher, probe, uid=uid, gid=uid).reached
    assert attempt(weak_launcher, probe, **OPEN_PROC).reached


DEVICES = """
found = set()
for top, directories, files in os.walk('/dev'):
    for entry in files + directories:
        mode = os.lstat(os.path.join(top, entry)).st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode): found.add(os.path.relpath(os.path.join(top, entry), '/dev'))
extra = found - {'null', 'zero', 'full', 'random', 'urandom', 'tty', 'pts/ptmx', 'pts/0'}
missing = {'null', 'zero', 'full', 'random', 'urandom', 'tty', 'pts/ptmx'} - found
assert not missing, missing
(reached if extra else refused)(sorted(extra)[:5])
"""


def test_six_devices_and_no_more(launcher: Launcher, weak_launcher: Launcher) -> None:
    assert not attempt(launcher, DEVICES).reached
    assert attempt(weak_launcher, DEVICES, weaken=("devices",)).reached


MKNOD = """
for place in ('/tmp', '/workspace', '/dev/shm', '/home/agent'):
    try: os.mknod(place + '/sktest', 0o600 | KIND, os.makedev(1, 3))
    except OSError as e: error = name(e.errno)
    else: reached(place)
refused(error)
"""


@pytest.mark.parametrize("kind", ["stat.S_IFCHR", "stat.S_IFBLK"])
def test_no_device_can_be_made(launcher: Launcher, weak_launcher: Launcher, kind: str) -> None:
    probe = MKNOD.replace("KIND", kind)
    for uid in (0, 1000):
        assert not attempt(launcher, probe, uid=uid, gid=uid).reached
    assert attempt(weak_launcher, probe, **ROOT).reached


FLAGS = """
bad = []
for line in open('/proc/self/mountinfo'):
    fields = line.split(); place, options = fields[4], set(fields[5].split(','))
    device = place.startswith('/dev/') and place != '/dev/shm'
    if 'nosuid' not in options or ('nodev' not in options and not device): bad.append(place)
    if any(f.startswith(('shared:', 'master:')) for f in fields[6:fields.index('-')]): bad.append(place + ' shared')
(reached if bad else refused)(bad)
"""


def test_every_mount_is_nosuid_nodev_and_private(launcher: Launcher, weak_launcher: Launcher) -> None:
    assert not attempt(launcher, FLAGS).reached
    assert attempt(weak_launcher, FLAGS, weaken=("mount_flags",)).reached


HOST_ROOT = """
found = [line.split()[4] for line in open('/proc/self/mountinfo')
         if line.split()[3] == '/' and line.split(' - ')[1].split()[0] not in ('proc', 'tmpfs', 'devpts')]
for path in ('/..', '/../..', '/proc/self/root/..', '/proc/self/cwd/../..'):
    if os.stat(path).st_ino != os.stat('/').st_ino: found.append(path)
(reached if found else refused)(found)
"""


def test_the_old_root_is_gone(launcher: Launcher) -> None:
    assert not attempt(launcher, HOST_ROOT).reached
    root = os.open("/", os.O_PATH)
    bind = Bind(0, "/host", writable=False, owner_uid=0, owner_gid=0)
    assert attempt(launcher, HOST_ROOT, [root], binds=(bind,)).reached
    os.close(root)


DESCRIPTORS = """
listing = os.open('/proc/self/fd', os.O_RDONLY)
fds = {int(e) for e in os.listdir(listing)} - {listing}
extra = {fd: os.readlink(f'/proc/self/fd/{fd}') for fd in fds - {0, 1, 2} if os.path.exists(f'/proc/self/fd/{fd}')}
assert fds >= {0, 1, 2}
targets = [os.readlink(f'/proc/self/fd/{fd}') for fd in (0, 1, 2)]
outside = [t for t in targets if t != '/dev/null' and not t.startswith('pipe:')]
(reached if extra or outside else refused)([extra, outside])
"""


def test_no_descriptor_of_the_host_is_inherited(launcher: Launcher) -> None:
    assert not attempt(launcher, DESCRIPTORS).reached
    assert attempt(launcher, "os.open('/etc', os.O_RDONLY)\n" + DESCRIPTORS).reached


# --- set-id bits on files that reach the host's disk ---

SET_ID = {
    "chmod": "os.chmod(make(), MODE)",
    "fchmod": "os.fchmod(os.open(make(), os.O_RDONLY), MODE)",
    "fchmodat": "os.chmod('f', MODE, dir_fd=os.open('.', os.O_RDONLY)) if make() else None",
    "fchmodat2": "make(); p = ctypes.create_string_buffer(b'f'); fail(call(452, -100, ctypes.addressof(p), MODE, 0))",
    "open": "os.open('f', os.O_CREAT | os.O_WRONLY, MODE)",
    "creat": "p = ctypes.create_string_buffer(b'f'); fail(call(85, ctypes.addressof(p), MODE))",
    "mkdir": "os.mkdir('f', MODE)",
    "mknod": "os.mknod('f', stat.S_IFREG | MODE)",
}


@pytest.mark.parametrize("bit", [0o4755, 0o2755], ids=["setuid", "setgid"])
@pytest.mark.parametrize("way", SET_ID)
def test_no_set_id_bit_reaches_the_disk(
    launcher: Launcher, weak_launcher: Launcher, workspace: tuple[Path, int, Bind], way: str, bit: int
) -> None:
    """`nosuid` inside does not stop the bit from being there for the host to trip over."""
    path, fd, bind = workspace
    probe = f"""
MODE = {bit}
def make():
    open('f', 'w').close(); return 'f'
def fail(result):
    if result[0] < 0: raise OSError(getattr(errno, result[1]), 'refused')
os.umask(0)
try:
    {SET_ID[way]}
except OSError as e: refused(name(e.errno))
reached(oct(os.stat('f').st_mode)) if os.stat('f').st_mode & 0o6000 else refused('bit dropped')
"""
    inside = attempt(launcher, probe, [fd], binds=(bind,))
    assert not inside.reached
    if (path / "f").exists():
        assert not (path / "f").stat().st_mode & (stat.S_ISUID | stat.S_ISGID)
        (path / "f").rmdir() if (path / "f").is_dir() else (path / "f").unlink()
    twin = attempt(weak_launcher, probe, [fd], binds=(bind,), weaken=("seccomp",))
    dropped_by_kernel = way == "mkdir"  # mkdir(2) ignores all but the permission bits and the sticky bit
    assert twin.reached or dropped_by_kernel, twin


def test_links_planted_in_a_workspace_lead_nowhere(
    launcher: Launcher, workspace: tuple[Path, int, Bind], tmp_path: Path
) -> None:
    """A bind below the workspace is placed without following what an agent left there."""
    path, fd, bind = workspace
    (path / "in").symlink_to("/etc")
    other = tmp_path / "other"
    other.mkdir()
    other_fd = os.open(other, os.O_PATH)
    inner = Bind(1, "/workspace/in/x", writable=False, owner_uid=0, owner_gid=0)
    from tests.support.launcher import LauncherError  # noqa: PLC0415 - beside its use

    with pytest.raises(LauncherError, match="cannot bind /workspace/in/x"):
        launcher.build(launcher.plan(["/bin/true"], binds=(bind, inner)), [fd, other_fd])
    (path / "in").unlink()
    with pytest.raises(LauncherError, match="there is no such place"):
        launcher.build(launcher.plan(["/bin/true"], binds=(bind, inner)), [fd, other_fd])
    (path / "in" / "x").mkdir(parents=True)
    agent = launcher.sh("ls -d /workspace/in/x", [fd, other_fd], binds=(bind, inner))
    os.close(other_fd)
    assert agent.stdout == "/workspace/in/x\n"
    assert not (Path("/etc") / "x").exists()
