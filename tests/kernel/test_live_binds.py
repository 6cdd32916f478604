"""Files shown to a sandbox that runs: where they appear, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

import pytest

from sandbox import landlock
from sandbox.guard import make_group
from sandbox.plan import BINDS_MAX, Bind
from tests.support.binds import DENIED, OWNER, Shared, mounts, show, take
from tests.support.inside import Inside
from tests.support.launcher import ROOT, Launcher, LauncherError

ROUNDS = 20
BLINK_SECONDS = 0.050


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
    # The best counts: what else the machine does is not what is measured.
    assert min(shown) < BLINK_SECONDS
    assert min(taken) < BLINK_SECONDS


def test_two_beside_each_other_leave_one_by_one(inside: Inside, shared: Shared) -> None:
    show(inside, shared.path, "/data/a")
    show(inside, shared.path / "sub", "/data/b/c")
    take(inside, "/data/a")
    assert inside.ask("sorted(os.listdir('/data'))") == ["b"]
    take(inside, "/data/b/c")
    assert inside.refuses("os.stat('/data')") == "ENOENT"


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
