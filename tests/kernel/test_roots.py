"""Root file systems given as directories, also hostile ones: shown read-only, and never a way to the host."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandbox.plan import Bind, Rootfs
from tests.support.launcher import LauncherError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.launcher import Agent, Launcher

BUSYBOX = Path("/bin/busybox")
OURS = ("PATH", "/bin")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a shell and nothing else."""
    path = tmp_path / "root"
    (path / "bin").mkdir(parents=True)
    (path / "bin" / "busybox").write_bytes(BUSYBOX.read_bytes())
    (path / "bin" / "busybox").chmod(0o755)
    for name in ("sh", "cat", "ls", "touch", "readlink", "stat", "mount", "su"):
        (path / "bin" / name).symlink_to("busybox")
    path.chmod(0o755)
    return path


def run(launcher: Launcher, root: Path, script: str, **changes: object) -> Agent:
    fd = os.open(root, os.O_PATH)
    try:
        return launcher.sh(script, [fd], rootfs=Rootfs("directory", 0), env=(OURS,), **changes)
    finally:
        os.close(fd)


def usr_merged(root: Path) -> None:
    (root / "usr").mkdir()
    (root / "bin").rename(root / "usr" / "bin")
    (root / "bin").symlink_to("usr/bin")


def absolute_links(root: Path) -> None:
    (root / "usr").mkdir()
    (root / "bin").rename(root / "usr" / "bin")
    (root / "bin").symlink_to("/usr/bin")
    (root / "lib64").symlink_to("/usr/lib64")


@pytest.mark.parametrize("shape", [lambda _root: None, usr_merged, absolute_links], ids=["plain", "merged", "absolute"])
def test_a_bare_root_runs_whatever_its_shape(launcher: Launcher, root: Path, shape: Callable[[Path], None]) -> None:
    shape(root)
    agent = run(
        launcher, root, "cat /etc/hostname; test -d /proc/self && test -c /dev/null && touch /tmp/x /var/tmp/y; ls /tmp"
    )
    assert agent.stdout == "sktest\nx\ny\n", agent.stderr


def test_it_is_read_only_nosuid_and_nodev(launcher: Launcher, root: Path) -> None:
    (root / "opt" / "open").mkdir(parents=True)
    (root / "opt" / "open").chmod(0o777)
    (root / "var" / "lib" / "open").mkdir(parents=True)
    (root / "var" / "lib" / "open").chmod(0o777)
    os.mknod(root / "opt" / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    script = "touch /opt/open/x; touch /var/lib/open/x; touch /bin/x; cat /opt/null && echo read; cat /proc/self/mounts"
    agent = run(launcher, root, script)
    assert agent.stderr.count("Read-only file system") == 3
    assert "read" not in agent.stdout.splitlines()
    mounts = [line.split() for line in agent.stdout.splitlines()]
    shown = [words for words in mounts if words[1:2] in (["/opt"], ["/bin"], ["/var/lib"])]
    assert len(shown) == 3
    assert all({"ro", "nosuid", "nodev"} <= set(words[3].split(",")) for words in shown)


@pytest.mark.parametrize(
    "name", ["var", "etc", "proc", "dev", "tmp", "home", "run", "sys", "workspace", "grants", "root"]
)
def test_a_link_in_place_of_a_directory_never_leads_to_the_host(
    launcher: Launcher, root: Path, tmp_path: Path, name: str
) -> None:
    """What the sandbox makes itself would be made through it, as root of the host."""
    victim = tmp_path / "victim"
    (victim / "stockade").mkdir(parents=True)
    victim.chmod(0o777)
    (root / name).symlink_to(victim)
    before = sorted(str(path) for path in victim.rglob("*"))
    agent = run(launcher, root, f"cat /etc/hostname; ls {victim}; touch /tmp/x && echo fine; readlink /{name}")
    assert agent.stdout.startswith("sktest\n")
    assert "fine" in agent.stdout
    assert sorted(str(path) for path in victim.rglob("*")) == before
    assert str(victim) not in agent.stdout or name == "var"
    assert "No such file" in agent.stderr


@pytest.mark.parametrize("name", ["passwd", "hosts", "hostname", "resolv.conf", "shadow", "stockade", "mtab"])
def test_the_sandboxs_own_files_win_over_links_and_directories(
    launcher: Launcher, root: Path, tmp_path: Path, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (root / "etc").mkdir()
    (root / "etc" / name).symlink_to(victim)
    agent = run(launcher, root, "cat /etc/passwd /etc/hosts; cat /etc/resolv.conf /etc/shadow; ls -d /etc/stockade/.")
    assert "agent:x:1000" in agent.stdout
    assert "gateway.internal" in agent.stdout
    assert agent.stderr.count("No such file") == 2
    assert victim.read_text() == "untouched"
    os.unlink(root / "etc" / name)  # noqa: PTH108 - a link
    (root / "etc" / name).mkdir()
    assert "agent:x:1000" in run(launcher, root, "cat /etc/passwd").stdout


def test_a_link_of_the_root_is_text_that_means_something_inside_only(launcher: Launcher, root: Path) -> None:
    """The twin: a link that stays inside works."""
    (root / "up").symlink_to("../../../../../../../../usr/bin/env")
    (root / "shadow").symlink_to("/etc/shadow")
    (root / "own").symlink_to("/etc/hostname")
    agent = run(launcher, root, "cat /up; cat /shadow; cat /own")
    assert agent.stdout == "sktest\n"
    assert agent.stderr.count("No such file") == 2


@pytest.mark.parametrize("kind", ["fifo", "loop", "directory", "link", "device"])
def test_a_certificate_bundle_that_is_none_neither_blocks_nor_leaks(launcher: Launcher, root: Path, kind: str) -> None:
    place = root / "etc" / "ssl" / "certs" / "ca-certificates.crt"
    place.parent.mkdir(parents=True)
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "loop":
        place.symlink_to(place.name)
    elif kind == "directory":
        place.mkdir()
    elif kind == "link":
        place.symlink_to("/etc/machine-id")
    else:
        os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    agent = run(launcher, root, "cat /etc/stockade/ca-bundle.pem; echo end")
    assert agent.stdout.split() == ["end"]


def test_more_entries_than_the_root_has_room_for_is_a_clean_error(launcher: Launcher, root: Path) -> None:
    for number in range(5000):
        (root / f"d{number}").touch()
    with pytest.raises(LauncherError, match="show root file system"):
        run(launcher, root, "true")


def test_a_grant_below_a_link_of_the_root_is_refused(launcher: Launcher, root: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "victim").mkdir()
    (root / "opt").symlink_to(tmp_path / "victim")
    fds = [os.open(root, os.O_PATH), os.open(tmp_path / "data", os.O_PATH)]
    for target, works in (("/opt/data", False), ("/srv/data", True)):
        bind = Bind(1, target, writable=False, owner_uid=0, owner_gid=0)
        changes = {"rootfs": Rootfs("directory", 0), "binds": (bind,), "env": (OURS,)}
        if works:
            assert launcher.sh(f"ls -d {target}", fds, **changes).stdout == f"{target}\n"
        else:
            with pytest.raises(LauncherError, match=f"bind {target}"):
                launcher.sh("true", fds, **changes)
    assert list((tmp_path / "victim").iterdir()) == []
    for fd in fds:
        os.close(fd)
