"""Files shown to a sandbox that runs, and taken away: what its processes can and cannot do, whatever they hold."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import stat
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandbox import landlock, sync
from sandbox.guard import make_group
from sandbox.plan import BINDS_MAX, Bind
from supervisord.errors import StockadeError
from supervisord.hostfiles import open_path
from tests.support.inside import Inside
from tests.support.launcher import ROOT, Launcher, LauncherError

if TYPE_CHECKING:
    from collections.abc import Iterator

OWNER = 1000
ROUNDS = 20
MEDIAN_SECONDS_MAX = 0.050
DENIED = {"EPERM", "EACCES"}
GONE = {"ENOENT"}


@dataclass
class Shared:
    """A directory on the host that belongs to somebody."""

    path: Path

    def add(self, name: str, text: str, mode: int = 0o644) -> Path:
        file = self.path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        for each in (file, file.parent):
            os.chown(each, OWNER, OWNER)
        file.chmod(mode)
        return file


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    shared = Shared(tmp_path / "shared")
    shared.path.mkdir()
    shared.add("note", "from the host")
    shared.add("sub/inner", "further in")
    shared.add("run.sh", "#!/bin/sh\necho ran\n", 0o755)
    os.chown(shared.path, OWNER, OWNER)
    return shared


@pytest.fixture
def inside(launcher: Launcher) -> Iterator[Inside]:
    inside = Inside.start(launcher)
    yield inside
    launcher.kill(inside.agent)


def show(inside: Inside, path: Path, target: str, **bind: Any) -> dict[str, Any]:
    """Show a host path the way the daemon does; refuses what it refuses."""
    fd = open_path(path)  # type: ignore[arg-type]  # a pure path is enough
    try:
        wanted = Bind(0, target, writable=bind.pop("writable", False), owner_uid=OWNER, owner_gid=OWNER)
        order = dataclasses.asdict(dataclasses.replace(wanted, **bind))
        return inside.launcher.request("show", [fd], agent_id=inside.agent.agent_id, bind=order)
    finally:
        os.close(fd)


def take(inside: Inside, target: str) -> dict[str, Any]:
    return inside.launcher.request("take", agent_id=inside.agent.agent_id, target=target)


def mounts(inside: Inside) -> list[str]:
    """Mount points of the agent, as the host sees them."""
    lines = Path(f"/proc/{inside.agent.pid}/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines]


# --- appear and vanish ---


def test_a_directory_appears_read_only_and_vanishes(inside: Inside, shared: Shared) -> None:
    assert inside.refuses("os.listdir('/data')") == "ENOENT"
    assert show(inside, shared.path, "/data/x")["place"] == "/data/x"
    assert inside.ask("open('/data/x/note').read()") == "from the host"
    assert inside.ask("open('/data/x/sub/inner').read()") == "further in"
    assert inside.ask("os.stat('/data/x/note').st_uid") == OWNER, "shown as the agent's own"
    assert inside.refuses("open('/data/x/note', 'a')") == "EROFS"
    assert inside.refuses("os.mkdir('/data/x/made')") == "EROFS"
    assert "/data/x" in mounts(inside)
    answer = take(inside, "/data/x")
    assert (answer["already"], answer["processes_killed"]) == (False, 0)
    assert inside.refuses("os.stat('/data/x')") == "ENOENT"
    assert inside.refuses("os.stat('/data')") == "ENOENT", "not even the empty place is left"
    assert "/data/x" not in mounts(inside)
    assert (shared.path / "note").read_text() == "from the host"
    assert take(inside, "/data/x")["already"] is True


def test_a_writable_directory_is_written_under_landlock_too(inside: Inside, shared: Shared) -> None:
    """A Landlock domain does not grow: the mount is below /grants, where it lets the agent write, and a link leads."""
    place = show(inside, shared.path, "/data/x", writable=True)["place"]
    assert place == ("/grants/data/x" if landlock.ABI else "/data/x")
    inside.ask(
        "open('/data/x/made', 'w').write('inside'); os.mkdir('/data/x/dir'); os.rename('/data/x/made', '/data/x/dir/m')"
    )
    assert (shared.path / "dir" / "m").read_text() == "inside"
    assert (shared.path / "dir" / "m").stat().st_uid == OWNER
    take(inside, "/data/x")
    assert inside.refuses("os.lstat('/data/x')") == "ENOENT"
    assert inside.ask("os.listdir('/grants')") == []
    # Nothing else became writable.
    assert inside.refuses("os.mkdir('/grants/own')") in {"EROFS", "EACCES"}
    assert inside.refuses("os.mkdir('/own')") in {"EROFS", "EACCES"}


def test_the_root_is_sealed_again_and_never_writable_for_the_agent(inside: Inside, shared: Shared) -> None:
    """While places are made the root file system is open for root of the host: the agent tries all the time."""
    inside.ask(
        "child = os.fork()\n"
        "if child == 0:\n"
        "    end = time.monotonic() + 2\n"
        "    while time.monotonic() < end:\n"
        "        for act in (lambda: os.mkdir('/own'), lambda: open('/etc/own', 'w'),\n"
        "                    lambda: os.rename('/data', '/other'), lambda: os.symlink('/etc', '/data/y')):\n"
        "            try: act()\n"
        "            except OSError: continue\n"
        "            open('/tmp/reached', 'w').close()\n"
        "    os._exit(0)"
    )
    for _ in range(ROUNDS):
        show(inside, shared.path, "/data/x")
        take(inside, "/data/x")
    inside.ask("os.waitpid(child, 0)")
    assert inside.ask("os.path.exists('/tmp/reached')") is False
    root = next(
        line for line in Path(f"/proc/{inside.agent.pid}/mountinfo").read_text().splitlines() if " / / " in line
    )
    assert "ro" in root.split()[5].split(",")


def test_a_file_appears_and_vanishes(inside: Inside, shared: Shared) -> None:
    show(inside, shared.path / "note", "/data/one")
    assert inside.ask("open('/data/one').read()") == "from the host"
    assert inside.refuses("open('/data/one', 'a')") in {"EROFS", "EACCES"}
    inside.ask("held = os.open('/data/one', os.O_PATH)")
    take(inside, "/data/one")
    assert inside.refuses("os.stat('/data/one')") == "ENOENT"
    assert inside.refuses("open(f'/proc/self/fd/{held}').read()") in DENIED


def test_a_process_that_exec_starts_sees_it_too(inside: Inside, shared: Shared) -> None:
    show(inside, shared.path, "/data/x")
    done = inside.launcher.exec(inside.agent, ["/bin/cat", "/data/x/note"])
    assert done["stdout"] == "from the host"
    take(inside, "/data/x")
    done = inside.launcher.exec(inside.agent, ["/bin/cat", "/data/x/note"])
    assert done["status"] == {"code": 1, "signal": None}


def test_it_is_there_and_gone_within_a_blink(inside: Inside, shared: Shared) -> None:
    shown, taken = [], []
    for _ in range(ROUNDS):
        began = time.monotonic()
        show(inside, shared.path, "/data/x", writable=True)
        shown.append(time.monotonic() - began)
        began = time.monotonic()
        take(inside, "/data/x")
        taken.append(time.monotonic() - began)
    assert statistics.median(shown) < MEDIAN_SECONDS_MAX
    assert statistics.median(taken) < MEDIAN_SECONDS_MAX


def test_two_beside_each_other_leave_one_by_one(inside: Inside, shared: Shared) -> None:
    show(inside, shared.path, "/data/a")
    show(inside, shared.path / "sub", "/data/b/c")
    take(inside, "/data/a")
    assert inside.ask("sorted(os.listdir('/data'))") == ["b"]
    take(inside, "/data/b/c")
    assert inside.refuses("os.stat('/data')") == "ENOENT"


# --- what is held ---

# Each is done with something held since before: a directory descriptor, an O_PATH one, the working directory.
BY_DIRECTORY = {
    "open to read": "os.close(os.open('note', os.O_RDONLY, dir_fd=D))",
    "open a directory": "os.close(os.open('.', os.O_RDONLY | os.O_DIRECTORY, dir_fd=D))",
    "list": "os.listdir(f'/proc/self/fd/{D}')",
    "open further in": "os.close(os.open('sub/inner', os.O_RDONLY, dir_fd=D))",
    "by /proc": "open(f'/proc/self/fd/{D}/note').read()",
    "execute": "subprocess.check_output(['./run.sh'], cwd=f'/proc/self/fd/{D}', text=True)",
    "O_PATH, then open": "open('/proc/self/fd/%d' % os.open('note', os.O_PATH, dir_fd=D)).read()",
    "map": "mmap.mmap(os.open('note', os.O_RDONLY, dir_fd=D), 0, prot=mmap.PROT_READ).close()",
}
BY_DIRECTORY_WRITING = {
    "create": "os.close(os.open('new', os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=D))",
    "open to write": "os.close(os.open('note', os.O_WRONLY, dir_fd=D))",
    "mkdir": "os.mkdir('made', dir_fd=D)",
    "rename": "os.rename('note', 'other', src_dir_fd=D, dst_dir_fd=D)",
    "unlink": "os.unlink('note', dir_fd=D)",
    "rmdir": "os.rmdir('empty', dir_fd=D)",
    "symlink": "os.symlink('/etc', 'link', dir_fd=D)",
    "link": "os.link('note', 'hard', src_dir_fd=D, dst_dir_fd=D)",
    "mknod": "os.mknod('fifo', 0o600 | stat.S_IFIFO, dir_fd=D)",
    "chmod": "os.chmod('note', 0o600, dir_fd=D)",
    "utime": "os.utime('note', dir_fd=D)",
    "truncate": "os.truncate(f'/proc/self/fd/{D}/note', 0)",
    "setxattr": "os.setxattr(f'/proc/self/fd/{D}/note', 'user.x', b'y')",
    "bind a socket": "os.chdir(f'/proc/self/fd/{D}'); socket.socket(socket.AF_UNIX).bind('sock')",
}


@pytest.mark.parametrize("held", ["os.O_RDONLY", "os.O_PATH"])
@pytest.mark.parametrize("writable", [False, True], ids=["ro", "rw"])
def test_nothing_opens_by_a_descriptor_or_directory_that_is_held(
    inside: Inside, shared: Shared, held: str, *, writable: bool
) -> None:
    show(inside, shared.path, "/data/x", writable=writable)
    inside.ask(f"D = os.open('/data/x', {held} | os.O_DIRECTORY)")
    for name, code in BY_DIRECTORY.items():
        assert inside.refuses(code) == "", f"{name} works while it is granted, or the test shows nothing"
    take(inside, "/data/x")
    for name, code in BY_DIRECTORY.items():
        assert inside.refuses(code) in DENIED, name


@pytest.mark.parametrize("name", BY_DIRECTORY_WRITING)
def test_nothing_changes_by_a_directory_that_is_held(inside: Inside, shared: Shared, name: str) -> None:
    code = BY_DIRECTORY_WRITING[name]
    (shared.path / "empty").mkdir()
    twin = shared.path.parent / "twin"
    shutil.copytree(shared.path, twin)
    for each in (twin, *twin.rglob("*"), shared.path / "empty"):
        os.chown(each, OWNER, OWNER)
    show(inside, twin, "/data/twin", writable=True)
    show(inside, shared.path, "/data/x", writable=True)
    inside.ask("D = os.open('/data/twin', os.O_PATH | os.O_DIRECTORY)")
    assert inside.refuses(code) == "", "it works where it is granted, or the test shows nothing"
    inside.ask("os.chdir('/'); D = os.open('/data/x', os.O_PATH | os.O_DIRECTORY)")
    before = tree(shared.path)
    take(inside, "/data/x")
    assert inside.refuses(code) in DENIED | {"EROFS"}
    assert tree(shared.path) == before


def tree(path: Path) -> list[tuple[str, int, int, int]]:
    return sorted(
        (str(p.relative_to(path)), p.lstat().st_mode, p.lstat().st_size, p.lstat().st_mtime_ns) for p in path.rglob("*")
    )


def test_nothing_opens_from_a_working_directory_inside(inside: Inside, shared: Shared) -> None:
    show(inside, shared.path, "/data/x", writable=True)
    inside.ask("os.chdir('/data/x/sub')")
    assert inside.ask("open('inner').read()") == "further in"
    take(inside, "/data/x")
    for code in ("open('inner')", "os.listdir('.')", "open('../note')", "open('new', 'w')", "os.mkdir('made')"):
        assert inside.refuses(code) in DENIED | {"EROFS", "ENOENT"}, code
    assert inside.refuses("open('/proc/self/cwd/inner').read()") in DENIED
    assert inside.refuses("subprocess.run(['../run.sh'])") in DENIED
    assert inside.ask("os.chdir('/') or open('/etc/hostname').read()"), "all else works as before"


def test_a_chain_of_processes_that_hold_it_is_denied(inside: Inside, shared: Shared) -> None:
    """A descriptor that is on its way in a socket is found by nobody; the mark does not need to."""
    show(inside, shared.path, "/data/x")
    inside.ask(
        "a, b = socket.socketpair(); d = os.open('/data/x', os.O_RDONLY)\nsocket.send_fds(a, [b'.'], [d]); os.close(d)"
    )
    take(inside, "/data/x")
    inside.ask("D = socket.recv_fds(b, 1, 1)[1][0]")
    assert inside.refuses("os.open('note', os.O_RDONLY, dir_fd=D)") in DENIED


def test_what_is_open_for_reading_stays_open(inside: Inside, shared: Shared) -> None:
    """Said in docs: a read descriptor may go on reading that one file; on some kernels its reads are denied as well."""
    show(inside, shared.path, "/data/x")
    inside.ask("held = os.open('/data/x/note', os.O_RDONLY)")
    take(inside, "/data/x")
    assert inside.refuses("os.pread(held, 4, 0)") in {"", "EPERM"}
    assert inside.refuses("open(f'/proc/self/fd/{held}').read()") in DENIED


def test_who_writes_on_is_killed_and_nobody_else(inside: Inside, shared: Shared) -> None:
    """A descriptor that writes keeps the mount writable for everybody who holds a directory in it: it has to go."""
    show(inside, shared.path, "/data/x", writable=True)
    inside.ask(
        "D = os.open('/data/x', os.O_PATH); read = os.open('/data/x/note', os.O_RDONLY)\n"
        "os.set_inheritable(read, True)\n"
        "writer = subprocess.Popen(['sleep', '100'], stdout=open('/data/x/log', 'w'))\n"
        "reader = subprocess.Popen(['sleep', '100'], pass_fds=[read])"
    )
    assert take(inside, "/data/x")["processes_killed"] == 1
    assert inside.ask("writer.wait(5)") == -9
    assert inside.ask("reader.poll()") is None
    assert inside.refuses("os.mkdir('made', dir_fd=D)") == "EROFS"
    assert inside.ask("1 + 1") == 2, "thawed again"


def test_a_mapping_that_writes_is_a_writer(inside: Inside, shared: Shared) -> None:
    show(inside, shared.path, "/data/x", writable=True)
    inside.ask(
        "D = os.open('/data/x', os.O_PATH); child = os.fork()\n"
        "if child == 0:\n"
        "    fd = os.open('/data/x/note', os.O_RDWR); m = mmap.mmap(fd, 4); os.close(fd); time.sleep(100)\n"
    )
    inside.ask("[time.sleep(0.01) for _ in range(500) if '/note' not in open(f'/proc/{child}/maps').read()][:0]")
    take(inside, "/data/x")
    assert inside.ask("os.waitpid(child, 0)[1]") == 9
    assert inside.refuses("os.mkdir('made', dir_fd=D)") == "EROFS"


def test_a_writer_that_nobody_can_find_leaves_the_agent_frozen(launcher: Launcher, shared: Shared) -> None:
    """In flight in a socket of its own: not in any table of descriptors. The revocation is not claimed."""
    inside = Inside.start(launcher)
    show(inside, shared.path, "/data/x", writable=True)
    inside.ask(
        "a, b = socket.socketpair(); f = os.open('/data/x/log', os.O_CREAT | os.O_WRONLY)\n"
        "socket.send_fds(a, [b'.'], [f]); os.close(f)"
    )
    with pytest.raises(LauncherError, match="stays open for writing"):
        take(inside, "/data/x")
    listed = launcher.request("hello")["agents"]
    mine = next(entry for entry in listed if entry["agent_id"] == inside.agent.agent_id)
    assert mine["state"] == "FROZEN"
    assert [bind["target"] for bind in mine["binds"]] == ["/data/x"]
    # Opens are denied all the same, for whoever should thaw it.
    launcher.request("thaw", agent_id=inside.agent.agent_id)
    assert inside.refuses("open('/data/x/note')") in DENIED
    inside.ask("os.close(socket.recv_fds(b, 1, 1)[1][0])")
    assert take(inside, "/data/x")["already"] is False
    launcher.kill(inside.agent)


def test_a_frozen_agent_is_shown_and_taken_from(inside: Inside, shared: Shared) -> None:
    launcher, agent = inside.launcher, inside.agent
    launcher.request("freeze", agent_id=agent.agent_id)
    show(inside, shared.path, "/data/x", writable=True)
    launcher.request("thaw", agent_id=agent.agent_id)
    inside.ask("f = open('/data/x/new', 'w'); child = os.fork()\nif child == 0:\n    time.sleep(100)\nf.close()")
    launcher.request("freeze", agent_id=agent.agent_id)
    assert take(inside, "/data/x")["processes_killed"] == 1
    state = next(a["state"] for a in launcher.request("hello")["agents"] if a["agent_id"] == agent.agent_id)
    assert state == "FROZEN", "who was frozen before stays frozen"
    launcher.request("thaw", agent_id=agent.agent_id)
    assert inside.ask("os.waitpid(child, 0)[1]") == 9


def test_a_bind_of_the_launch_is_taken_as_well(launcher: Launcher, shared: Shared) -> None:
    fd = os.open(shared.path, os.O_PATH)
    bind = Bind(0, "/data/x", writable=True, owner_uid=OWNER, owner_gid=OWNER, name="fs:rw:/data/x")
    inside = Inside.start(launcher, fds=[fd], binds=(bind,))
    os.close(fd)
    inside.ask("D = os.open('/data/x', os.O_PATH); os.mkdir('/data/x/made')")
    take(inside, "/data/x")
    assert inside.refuses("os.stat('/data/x')") == "ENOENT"
    assert inside.refuses("os.open('note', os.O_RDONLY, dir_fd=D)") in DENIED
    assert inside.refuses("os.mkdir('again', dir_fd=D)") == "EROFS"
    launcher.kill(inside.agent)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_bind_that_the_agent_moved_about_is_taken_where_it_is(
    shared: Shared, tmp_path: Path, *, restarted: bool
) -> None:
    """Above a bind of the launch an agent may rename what is its own; the mount goes along, and is found by its id."""
    work = tmp_path / "work"
    (work / "in" / "x y").mkdir(parents=True)
    for each in (work, work / "in", work / "in" / "x y"):
        os.chown(each, OWNER, OWNER)
    fds = [os.open(path, os.O_PATH) for path in (work, shared.path)]
    binds = tuple(
        Bind(index, target, writable=True, owner_uid=OWNER, owner_gid=OWNER, name=name)
        for index, (target, name) in enumerate((("/workspace", "workspace"), ("/workspace/in/x y", "fs:rw:/data")))
    )
    with Launcher.start() as launcher:
        inside = Inside.start(launcher, fds=fds, binds=binds)
        inside.ask("os.rename('/workspace/in', '/workspace/out')")
        assert inside.ask("open('/workspace/out/x y/note').read()") == "from the host"
        if restarted:
            launcher.restart(kill=True)
            launcher.request("hello")
        assert take(inside, "/workspace/in/x y")["already"] is False
        assert not [mount for mount in mounts(inside) if "out" in mount]
        done = launcher.exec(inside.agent, ["/bin/cat", "/workspace/out/x y/note"])
        assert done["status"]["code"] == 1
        assert (work / "out" / "x y").is_dir(), "what is on somebody's disk is not ours to remove"
    for fd in fds:
        os.close(fd)


# --- the end of the launcher, of the guard, of the agent ---


def test_a_later_launcher_takes_away_what_an_earlier_one_showed(shared: Shared) -> None:
    with Launcher.start() as launcher:
        inside = Inside.start(launcher)
        show(inside, shared.path, "/data/x", writable=True)
        show(inside, shared.path, "/data/gone")
        inside.ask("D = os.open('/data/x', os.O_PATH); G = os.open('/data/gone', os.O_PATH)")
        take(inside, "/data/gone")
        launcher.restart(kill=True)
        listed = launcher.request("hello")["agents"]
        assert [bind["target"] for bind in listed[0]["binds"]] == ["/data/x"]
        fresh = launcher.exec(inside.agent, ["/bin/sh", "-c", "cat /data/x/note; ls /data/gone"])
        assert fresh["stdout"] == "from the host"
        # What was taken before stays denied: nobody has to be there for it.
        assert denied_by(launcher, inside, "G")
        take(inside, "/data/x")
        assert denied_by(launcher, inside, "D")
        again = launcher.exec(inside.agent, ["/bin/sh", "-c", "cat /data/x/note"])
        assert again["status"]["code"] == 1


def denied_by(launcher: Launcher, inside: Inside, name: str) -> bool:
    """Whether the agent, whose input went with the earlier launcher, is refused by what it holds: asked by exec."""
    number = {"D": 3, "G": 4}[name]
    script = f"cat /proc/{{}}/fd/{number}/note"
    pids = launcher.exec(inside.agent, ["/bin/sh", "-c", "pgrep python3"])["stdout"].split()
    done = launcher.exec(inside.agent, ["/bin/sh", "-c", script.format(pids[0])])
    assert "No such file" not in done["stderr"], done
    return done["status"]["code"] == 1 and "not permitted" in done["stderr"]


def guards(launcher: Launcher) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(launcher.run_dir).encode() in words and any(word.endswith(b"denier.py") for word in words):
                found.append(int(entry.name))
    return found


def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def test_the_guard_is_started_again_and_ends_with_the_last_of_them(shared: Shared) -> None:
    with Launcher.start() as launcher:
        inside = Inside.start(launcher)
        show(inside, shared.path, "/data/x")
        inside.ask("D = os.open('/data/x', os.O_PATH)")
        take(inside, "/data/x")
        until(lambda: len(guards(launcher)) == 1)
        (first,) = guards(launcher)
        os.kill(first, 9)
        assert inside.refuses("os.open('note', os.O_RDONLY, dir_fd=D)") in DENIED, "asked meanwhile, answered after"
        until(lambda: guards(launcher) not in ([], [first]))
        launcher.restart(kill=True)
        assert len(guards(launcher)) == 1, "it outlives its launcher while the agent lives"
        launcher.kill(inside.agent)
        until(lambda: guards(launcher) == [])


# Execs the launcher with a descriptor of the test's process, as systemd does with one from its store.
STORED = """
import ctypes, os, sys
pid, fd, *command = sys.argv[1:]
own = ctypes.CDLL(None).syscall(438, os.pidfd_open(int(pid)), int(fd), 0)
os.dup2(own, 3, inheritable=True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "guard"}
os.execv(command[0], command)
"""


@pytest.mark.parametrize("keeper", ["systemd", "daemon"])
def test_what_was_taken_stays_denied_when_launcher_and_guard_die(shared: Shared, tmp_path: Path, keeper: str) -> None:
    """Somebody keeps the group meanwhile: who opens then waits, and is denied when the next launcher is there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(10)
        with Launcher.start(wrapper=["env", f"NOTIFY_SOCKET={tmp_path}/notify"]) as launcher:
            inside = Inside.start(launcher)
            show(inside, shared.path, "/data/x")
            while b"FDNAME=guard" not in (message := socket.recv_fds(systemd, 4096, 4))[0]:
                sync.close_all(message[1])
            (group,) = message[1]
            inside.ask("D = os.open('/data/x', os.O_PATH)")
            take(inside, "/data/x")
            until(lambda: len(guards(launcher)) == 1)
            (guard,) = guards(launcher)
            os.kill(launcher.process.pid, 9)
            os.kill(guard, 9)
            if keeper == "systemd":
                launcher._wrapper = [sys.executable, "-c", STORED, str(os.getpid()), str(group)]
            launcher.restart(kill=True)
            if keeper == "systemd":
                until(lambda: guards(launcher) != [])  # by itself
            launcher.request("hello", [group] if keeper == "daemon" else [])
            os.close(group)
            assert denied_by(launcher, inside, "D")
            until(lambda: len(guards(launcher)) == 1)


def test_nothing_is_left_of_an_agent_that_is_killed(launcher: Launcher, shared: Shared) -> None:
    descriptors = Path(f"/proc/{launcher.process.pid}/fd")
    inside = Inside.start(launcher)
    show(inside, shared.path, "/data/a", writable=True)
    show(inside, shared.path, "/data/b")
    take(inside, "/data/b")
    assert launcher.kill(inside.agent)["verified_empty"] is True
    held = [str(entry.readlink()) for entry in descriptors.iterdir() if entry.is_symlink()]
    assert not [path for path in held if str(shared.path) in path]
    assert str(shared.path) not in Path("/proc/self/mountinfo").read_text()


# --- what is refused ---


NO_PLACES = """/etc/x /usr/x /proc/x /dev/x /sys/x /home/agent/x /workspace/x /dev/shm/x /bin/x /lib64 /home /grants
/var /tmp /var/tmp / /data/../etc"""


@pytest.mark.parametrize("target", NO_PLACES.split())
def test_no_place_where_the_agent_or_the_system_has_files(inside: Inside, shared: Shared, target: str) -> None:
    before = mounts(inside)
    with pytest.raises(LauncherError):
        show(inside, shared.path, target)
    assert mounts(inside) == before
    assert "data" not in inside.ask("os.listdir('/')")


@pytest.mark.parametrize("writable", [False, True], ids=["ro", "rw"])
@pytest.mark.parametrize("target", ["/tmp/a/b", "/var/tmp/a", "/run/a", "/var/log/a", "/home/alice/a", "/grants/a"])
def test_a_place_anywhere_else(inside: Inside, shared: Shared, target: str, *, writable: bool) -> None:
    before = inside.ask("sorted(p for top in ('/', '/tmp', '/var', '/run', '/home') for p in os.listdir(top))")
    show(inside, shared.path, target, writable=writable)
    assert inside.ask(f"open('{target}/note').read()") == "from the host"
    assert bool(inside.refuses(f"os.mkdir('{target}/made')")) is not writable
    # Its place cannot be moved away or covered, sticky /tmp or not.
    assert inside.refuses(f"os.rename('{target}', '/tmp/away')") in {"EBUSY", "EROFS", "EPERM", "EACCES", "EXDEV"}
    take(inside, target)
    assert inside.refuses(f"os.lstat('{target}')") == "ENOENT"
    assert before == inside.ask("sorted(p for top in ('/', '/tmp', '/var', '/run', '/home') for p in os.listdir(top))")


@pytest.mark.parametrize(
    "planted", ["os.mkdir('/tmp/a')", "os.symlink('/etc', '/tmp/a')", "open('/tmp/a', 'w').close()"]
)
def test_nothing_goes_through_what_an_agent_made(inside: Inside, shared: Shared, planted: str) -> None:
    inside.ask(planted)
    for target in ("/tmp/a", "/tmp/a/b", "/var/tmp/a/b"):
        with pytest.raises(LauncherError, match=r"not a directory of the sandbox's own|something in this place"):
            show(inside, shared.path, target)
    assert inside.ask("os.listdir('/tmp')") == ["a"]
    assert not (Path("/etc") / "b").exists()


def test_an_agent_that_swaps_what_is_in_tmp_gains_nothing(inside: Inside, shared: Shared) -> None:
    """It races for the names that the launcher makes there; what is shown is where it should be, or not at all."""
    before = mounts(inside)
    inside.ask(
        "child = os.fork()\n"
        "if child == 0:\n"
        "    end = time.monotonic() + 2\n"
        "    while time.monotonic() < end:\n"
        "        for act in (lambda: os.symlink('/etc', '/tmp/a'), lambda: os.unlink('/tmp/a'),\n"
        "                    lambda: os.rename('/tmp/a', '/tmp/c'), lambda: os.mkdir('/tmp/a'),\n"
        "                    lambda: os.rmdir('/tmp/a'), lambda: os.unlink('/tmp/c'), lambda: os.rmdir('/tmp/c')):\n"
        "            try: act()\n"
        "            except OSError: continue\n"
        "    os._exit(0)"
    )
    shown = 0
    for _ in range(50):
        try:
            show(inside, shared.path, "/tmp/a/b")
        except LauncherError:
            continue
        shown += 1
        assert "/tmp/a/b" in mounts(inside)
        assert take(inside, "/tmp/a/b")["already"] is False
        assert "/tmp/a/b" not in mounts(inside)
    assert shown, "it was done at times, or the test shows nothing"
    inside.ask("os.waitpid(child, 0)")
    assert mounts(inside) == before


def test_nothing_below_or_above_what_is_bound(inside: Inside, shared: Shared) -> None:
    show(inside, shared.path, "/data/x", writable=True)
    for target in ("/data/x", "/data/x/sub", "/data", "/grants/data/x/sub"):
        with pytest.raises(LauncherError, match=r"is bound already|something in this place"):
            show(inside, shared.path, target)


def test_a_writable_bind_of_root_needs_the_word_of_the_policy(inside: Inside, shared: Shared) -> None:
    with pytest.raises(LauncherError, match="allow_root_owned"):
        show(inside, shared.path, "/data/x", writable=True, owner_uid=0)


def test_a_policy_that_requires_a_quota_gets_nothing_writable(launcher: Launcher, shared: Shared) -> None:
    inside = Inside.start(launcher, require=("workspace-quota",))
    with pytest.raises(LauncherError, match="the policy requires workspace-quota"):
        show(inside, shared.path, "/data/x", writable=True)
    show(inside, shared.path, "/data/x")
    launcher.kill(inside.agent)


def test_the_number_of_binds_is_limited(inside: Inside, shared: Shared) -> None:
    for number in range(BINDS_MAX):
        show(inside, shared.path, f"/data/{number}")
    with pytest.raises(LauncherError, match=f"has {BINDS_MAX} binds"):
        show(inside, shared.path, "/data/more")
    take(inside, "/data/0")
    show(inside, shared.path, "/data/more")


def test_an_agent_that_is_not_there_gets_nothing(launcher: Launcher, shared: Shared) -> None:
    inside = Inside.start(launcher)
    launcher.kill(inside.agent)
    with pytest.raises(LauncherError, match="there is no agent"):
        show(inside, shared.path, "/data/x")


# A filter that answers EINVAL to fanotify_mark, as a kernel without permission events does.
BLIND = f"""
import os, struct, sys
sys.path.insert(0, {str(ROOT)!r})
from sandbox import syscalls
syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 301), (6, 0, 0, 0x50016), (6, 0, 0, 0x7FFF0000)]
syscalls.seccomp_filter(b"".join(struct.pack("<HBBI", *item) for item in code))
os.execv(sys.argv[1], sys.argv[1:])
"""


def can_deny() -> bool:
    try:
        os.close(make_group())
    except OSError:
        return False
    return True


def test_a_kernel_that_cannot_deny_opens_is_shown_nothing(shared: Shared) -> None:
    """Nothing is given that could not be taken back; and what was given at launch is not called taken."""
    fd = os.open(shared.path, os.O_PATH)
    bind = Bind(0, "/data/y", writable=False, owner_uid=OWNER, owner_gid=OWNER, name="fs:ro:/data/y")
    with Launcher.start(wrapper=[sys.executable, "-c", BLIND] if can_deny() else []) as launcher:
        inside = Inside.start(launcher, fds=[fd], binds=(bind,))
        before = mounts(inside)
        with pytest.raises(LauncherError, match="cannot deny opens"):
            show(inside, shared.path, "/data/x")
        with pytest.raises(LauncherError, match="cannot deny opens"):
            take(inside, "/data/y")
        assert mounts(inside) == before
        assert inside.ask("open('/data/y/note').read()") == "from the host"
        assert inside.refuses("os.stat('/data/x')") == "ENOENT"
    os.close(fd)


def test_a_file_system_whose_opens_nobody_is_asked_about_is_not_shown(inside: Inside) -> None:
    fd = os.open("/proc/sys/kernel", os.O_PATH)
    bind = Bind(0, "/data/x", writable=False, owner_uid=0, owner_gid=0, without_idmap="read-only")
    with pytest.raises(LauncherError, match="cannot bind /data/x: fanotify_mark"):
        inside.launcher.request("show", [fd], agent_id=inside.agent.agent_id, bind=dataclasses.asdict(bind))
    os.close(fd)
    assert inside.refuses("os.stat('/data')") == "ENOENT"


# --- adversarial: what is planted ---


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "symlink"])
def test_what_is_no_file_is_refused_and_blocks_nobody(tmp_path: Path, kind: str) -> None:
    from supervisord.hostfiles import open_files  # noqa: PLC0415 - beside its use
    from supervisord.plan import WantedFile  # noqa: PLC0415

    path = tmp_path / "planted"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(path))
        case "device":
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        case _:
            path.symlink_to("/etc")
    began = time.monotonic()
    with pytest.raises(StockadeError, match=r"neither a directory nor|is a symbolic link"):
        open_files([WantedFile(path, path, False, "x", by_policy=False)], caller_uid=0)  # type: ignore[arg-type]
    assert time.monotonic() - began < 1


def test_a_component_that_flips_never_leads_to_etc(inside: Inside, tmp_path: Path) -> None:
    """Somebody who may write above it turns a directory into a link to /etc and back, all the time."""
    above = tmp_path / "above"
    (above / "real" / "leaf").mkdir(parents=True)
    (above / "real" / "leaf" / "mark").write_text("the right one")
    (above / "link").symlink_to("/etc")
    (tmp_path / "leaf").symlink_to("/etc")
    for each in (above / "real" / "leaf", above / "real" / "leaf" / "mark"):
        os.chown(each, OWNER, OWNER)
    (above / "way").mkdir()
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            for other in ("real", "link"):
                (above / other).rename(above / "spare")
                with_way = above / "way"
                if with_way.is_dir() and not with_way.is_symlink() and not any(with_way.iterdir()):
                    with_way.rmdir()
                (above / "spare").rename(with_way)
                with_way.rename(above / other)

    thread = threading.Thread(target=flip)
    thread.start()
    shown = refused = 0
    try:
        for number in range(50):
            for _ in range(200):
                try:
                    show(inside, above / "way" / "leaf", f"/data/{number}")
                except StockadeError:
                    refused += 1
                    continue
                shown += 1
                assert inside.ask(f"os.listdir('/data/{number}')") == ["mark"]
                take(inside, f"/data/{number}")
                break
    finally:
        stop.set()
        thread.join()
    assert shown, "it was the right one at times, or the test shows nothing"
    assert refused, "it was the wrong one at times, or the test shows nothing"


def test_set_id_files_in_it_are_inert(inside: Inside, shared: Shared) -> None:
    program = shared.path / "id"
    shutil.copy("/usr/bin/id", program)
    os.chown(program, OWNER, OWNER)
    program.chmod(0o6755)
    show(inside, shared.path, "/data/x", writable=True)
    assert inside.ask("subprocess.run(['/data/x/id', '-u'], capture_output=True, text=True).stdout") == "1000\n"
    assert inside.refuses("os.chmod('/data/x/run.sh', 0o4755)") in DENIED
    options = next(
        line.split()[5]
        for line in Path(f"/proc/{inside.agent.pid}/mountinfo").read_text().splitlines()
        if "/shared" in line
    )
    assert {"nosuid", "nodev"} <= set(options.split(","))


def test_links_in_it_lead_nowhere_on_the_host(inside: Inside, shared: Shared, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the host's")
    (shared.path / "out").symlink_to(secret)
    (shared.path / "up").symlink_to("../../secret")
    show(inside, shared.path, "/data/x")
    assert inside.refuses("open('/data/x/out')") == "ENOENT"
    assert inside.refuses("open('/data/x/up')") == "ENOENT"
    assert inside.refuses("open('/data/x/../../secret')") == "ENOENT"
