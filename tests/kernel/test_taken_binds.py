"""Files taken away from a sandbox that runs: nothing of them opens any more, whatever its processes hold."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sandbox import sync
from sandbox.plan import Bind
from tests.support.binds import DENIED, OWNER, Shared, mounts, show, take
from tests.support.inside import Inside
from tests.support.launcher import Launcher, LauncherError

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
