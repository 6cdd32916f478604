"""What somebody plants where files are shown from, or to: it leads nowhere."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from supervisord.errors import StockadeError
from tests.support.binds import DENIED, OWNER, Shared, mounts, show, take
from tests.support.launcher import LauncherError

if TYPE_CHECKING:
    from tests.support.inside import Inside


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
