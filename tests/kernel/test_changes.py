"""Reading and applying a layer of a hostile agent: made by hand, so that also what overlayfs refuses is tried."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sandbox.changes import Apply, Bounds, Change, TooMuch, Walk, digest, leads_outside

WORKER = Path(__file__).resolve().parents[2] / "sandbox" / "changes_worker.py"
OWNER = 1000
LONG_AGO = 10**18  # before every file here was made
NOT_YET = 1 << 62

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes what only overlayfs and root can")


class Site:
    """A workspace, and a layer over it."""

    def __init__(self, directory: Path) -> None:
        self.lower, self.upper = directory / "lower", directory / "upper"
        self.outside = directory / "outside"
        self.outside.write_text("not of the workspace")
        for path in (self.lower, self.upper):
            path.mkdir()
        directory.chmod(0o755)

    def give(self) -> None:
        """Make everything the owner's, as it is where people have workspaces."""
        for top in (self.lower, self.upper):
            for path in (top, *top.rglob("*")):
                os.chown(path, OWNER, OWNER, follow_symlinks=False)

    def delete(self, name: str) -> None:
        os.mknod(self.upper / name, 0o20000, os.makedev(0, 0))

    def hide(self, name: str) -> None:
        os.setxattr(self.upper / name, "user.overlay.opaque", b"y")

    def walk(self, *, since_ns: int = NOT_YET, bounds: Bounds | None = None) -> list[Change]:
        upper, lower = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (self.upper, self.lower))
        try:
            return list(Walk(upper, lower, since_ns, bounds or Bounds()).changes())
        finally:
            os.close(upper)
            os.close(lower)

    def perform(self, changes: list[Change], *, force: bool = False) -> dict[str, str]:
        upper, lower = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (self.upper, self.lower))
        try:
            apply = Apply(upper, lower, force)
            return {change.path: apply.perform(change)[0] for change in changes}
        finally:
            os.close(upper)
            os.close(lower)

    def work(self, **order: Any) -> list[dict[str, Any]]:
        """Run the worker as the daemon does."""
        self.give()
        full = {
            "op": "diff", "uid": OWNER, "gid": OWNER, "since_ns": NOT_YET, "paths": [], "patch": False, "force": False,
            "digest": "", "entries_max": 1000, "read_bytes_max": 1 << 30, "report_bytes_max": 1 << 20,
            "patch_bytes_max": 1 << 16,
        } | order  # fmt: skip
        asked = os.memfd_create("order")
        os.write(asked, json.dumps(full).encode())
        upper, lower = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (self.upper, self.lower))
        read, write = os.pipe()
        moved = {3: upper, 4: lower, 5: asked, 6: write}
        high = {target: os.dup2(fd, 200 + target) for target, fd in moved.items()}
        actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in high.items()]
        argv = [sys.executable, "-I", "-S", "-E", str(WORKER)]
        pid = os.posix_spawn(argv[0], argv, {}, file_actions=actions)
        for fd in (*moved.values(), *high.values()):
            os.close(fd)
        with os.fdopen(read, "rb") as report:
            lines = [json.loads(line) for line in report]
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        return lines


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def shown(changes: list[Change]) -> dict[str, str]:
    return {change.path: f"{change.kind} {change.type}" for change in changes}


def path_of(line: dict[str, Any]) -> bytes:
    return base64.b64decode(line["path"])


def test_added_modified_and_deleted_are_told_apart_and_the_untouched_is_left_out(site: Site) -> None:
    for name in ("changed", "gone", "same", "mode"):
        (site.lower / name).write_text("old")
    for name, text in (("changed", "new"), ("same", "old"), ("mode", "old"), ("fresh", "x")):
        (site.upper / name).write_text(text)
    (site.upper / "mode").chmod(0o755)
    site.delete("gone")
    assert shown(site.walk()) == {
        "changed": "modified file",
        "fresh": "added file",
        "gone": "deleted file",
        "mode": "modified file",
    }


def test_a_directory_made_anew_hides_what_was_in_it(site: Site) -> None:
    (site.lower / "d" / "e").mkdir(parents=True)
    (site.lower / "d" / "e" / "x").write_text("x")
    (site.lower / "d" / "y").write_text("y")
    (site.upper / "d").mkdir()
    (site.upper / "d" / "y").write_text("y")
    assert shown(site.walk()) == {}  # the twin: merged, nothing is hidden
    site.hide("d")
    assert shown(site.walk()) == {"d/e": "deleted directory"}
    assert site.perform(site.walk()) == {"d/e": "applied"}
    assert sorted(path.name for path in (site.lower / "d").iterdir()) == ["y"]


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
@pytest.mark.parametrize("before", ["file", "directory", "symlink"])
def test_everything_can_take_the_place_of_everything(site: Site, kind: str, before: str) -> None:
    def make(path: Path, what: str, text: str) -> None:
        if what == "file":
            path.write_text(text)
        elif what == "directory":
            path.mkdir()
            (path / text).write_text(text)
        else:
            path.symlink_to(text)

    make(site.lower / "it", before, "old")
    make(site.upper / "it", kind, "new")
    if (kind, before) == ("directory", "directory"):
        site.hide("it")
    changes = site.walk()
    assert set(site.perform(changes).values()) == {"applied"}
    it = site.lower / "it"
    assert it.is_symlink() == (kind == "symlink")
    if kind == "directory":
        assert [path.name for path in it.iterdir()] == ["new"]
    else:
        assert (str(it.readlink()) if kind == "symlink" else it.read_text()) == "new"
    assert site.walk() == []  # what was applied is no change any more
    assert [path.name for path in site.lower.iterdir()] == ["it"], "no temporary file is left"


def test_a_link_planted_in_the_layer_is_shown_and_made_but_never_followed(site: Site) -> None:
    (site.upper / "l").symlink_to(site.outside)
    (change,) = site.walk()
    assert change.notes == ("leads outside of the workspace",)
    assert site.perform([change]) == {"l": "applied"}
    assert (site.lower / "l").is_symlink()
    assert site.outside.read_text() == "not of the workspace"


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_of_the_workspace_that_is_a_link_leads_nowhere(site: Site, tmp_path: Path, *, force: bool) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (site.lower / "d").symlink_to(victim)
    (site.upper / "d").mkdir()
    (site.upper / "d" / "x").write_text("x")
    changes = site.walk()
    if force:
        # The link itself is what the directory replaces.
        assert site.perform(changes, force=True) == {"d": "applied", "d/x": "applied"}
        assert not (site.lower / "d").is_symlink()
    else:
        assert site.perform([change for change in changes if change.path == "d/x"]) == {"d/x": "failed"}
    assert list(victim.iterdir()) == []


def test_a_link_that_is_swapped_in_between_diff_and_apply_leads_nowhere(site: Site, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "x").write_text("kept")
    (site.lower / "d").mkdir()
    (site.lower / "d" / "x").write_text("old")
    (site.upper / "d").mkdir()
    (site.upper / "d" / "x").write_text("new")
    changes = site.walk()
    (site.lower / "d").rename(site.lower / "aside")
    (site.lower / "d").symlink_to(victim)
    assert site.perform(changes, force=True) == {"d/x": "failed"}
    assert (victim / "x").read_text() == "kept"


def test_a_deletion_removes_links_and_not_what_they_name(site: Site, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "x").write_text("kept")
    (site.lower / "d").mkdir()
    (site.lower / "d" / "l").symlink_to(victim)
    (site.lower / "f").symlink_to(site.outside)
    site.delete("d")
    site.delete("f")
    assert site.perform(site.walk()) == {"d": "applied", "f": "applied"}
    assert list(site.lower.iterdir()) == []
    assert (victim / "x").exists()
    assert site.outside.exists()


def test_a_deletion_of_what_the_workspace_never_had_is_nothing(site: Site) -> None:
    site.delete("nothing")
    (site.upper / "d").mkdir()
    os.mknod(site.upper / "d" / "neither", 0o20000, os.makedev(0, 0))
    assert shown(site.walk()) == {"d": "added directory"}


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_is_no_file_is_shown_and_neither_opened_nor_made(site: Site, kind: str) -> None:
    it = site.upper / "it"
    if kind == "fifo":
        os.mkfifo(it)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(it))
    else:
        os.mknod(it, 0o20666, os.makedev(1, 3))
    answer: list[Any] = []
    thread = threading.Thread(target=lambda: answer.append(site.perform(site.walk(), force=True)), daemon=True)
    thread.start()
    thread.join(5)
    assert answer == [{"it": "refused"}], "it blocked, or made something"
    assert list(site.lower.iterdir()) == []


def test_a_fifo_of_the_workspace_does_not_block(site: Site) -> None:
    os.mkfifo(site.lower / "it")
    (site.upper / "it").write_text("x")
    assert site.perform(site.walk()) == {"it": "applied"}
    assert (site.lower / "it").read_text() == "x"


def test_set_id_bits_do_not_reach_the_workspace(site: Site) -> None:
    (site.upper / "it").write_text("x")
    (site.upper / "it").chmod(0o6755)
    (site.upper / "d").mkdir()
    (site.upper / "d").chmod(0o7777)
    changes = site.walk()
    assert all("set-id bits are dropped" in change.notes for change in changes)
    site.perform(changes)
    assert (site.lower / "it").stat().st_mode & 0o7777 == 0o755
    assert (site.lower / "d").stat().st_mode & 0o7777 == 0o777


def test_names_of_any_bytes_come_and_go_as_they_are(site: Site) -> None:
    names = [b"new\nline", b"\x1b[2J", b"\xff\xfe", b'quo"te\\', b"-rf", b"a" * 255]
    for name in names:
        Path(os.fsdecode(os.fsencode(site.upper) + b"/" + name)).write_text("x")
    lines = site.work()
    assert sorted(path_of(line) for line in lines[:-1]) == sorted(names)
    assert site.work(op="apply")[-1]["problem"] == ""
    assert sorted(os.fsencode(path.name) for path in site.lower.iterdir()) == sorted(names)


def test_no_name_leads_up(site: Site) -> None:
    """A file system has no entry named so; a report or an order with one must not either."""
    change = Change("../outside", "modified", "file", 1, 0o644, "0" * 64)
    assert site.perform([change], force=True) == {"../outside": "failed"}
    change = Change("../fresh", "added", "directory", mode=0o755)
    assert site.perform([change], force=True) == {"../fresh": "failed"}
    assert site.outside.read_text() == "not of the workspace"
    assert not (site.lower.parent / "fresh").exists()


def test_hard_links_become_files_of_their_own(site: Site) -> None:
    (site.upper / "a").write_text("x")
    os.link(site.upper / "a", site.upper / "b")
    assert site.perform(site.walk()) == {"a": "applied", "b": "applied"}
    assert (site.lower / "a").stat().st_nlink == 1


def test_a_hard_link_out_of_the_workspace_is_replaced_and_not_written_through(site: Site) -> None:
    os.link(site.outside, site.lower / "it")
    (site.upper / "it").write_text("new")
    assert site.perform(site.walk()) == {"it": "applied"}
    assert site.outside.read_text() == "not of the workspace"


@pytest.mark.parametrize("what", ["modified", "deleted", "appeared", "below"])
def test_what_changed_in_the_workspace_since_the_launch_is_not_overwritten(site: Site, what: str) -> None:
    (site.lower / "d").mkdir()
    for name in ("modified", "deleted", "d/x"):
        (site.lower / name).write_text("at the launch")
    (site.upper / "modified").write_text("the agent's")
    (site.upper / "appeared").write_text("the agent's")
    site.delete("deleted")
    site.delete("d")
    time.sleep(0.02)
    since_ns = time.clock_gettime_ns(5)
    assert not [change for change in site.walk(since_ns=since_ns) if change.conflict]  # the twin
    time.sleep(0.02)
    (site.lower / ("d/x" if what == "below" else what)).write_text("somebody else's")
    changes = site.walk(since_ns=since_ns)
    path = "d" if what == "below" else what
    assert [change.path for change in changes if change.conflict] == [path]
    done = site.perform(changes)
    assert done.pop(path) == "conflict"
    assert set(done.values()) == {"applied"}
    assert site.perform([change for change in changes if change.path == path], force=True) == {path: "applied"}


def test_what_changes_in_the_last_moment_is_not_overwritten(site: Site) -> None:
    (site.lower / "it").write_text("old")
    (site.upper / "it").write_text("new")
    (site.upper / "fresh").write_text("new")
    changes = site.walk()
    time.sleep(0.02)
    (site.lower / "it").write_text("theirs")
    (site.lower / "fresh").write_text("theirs")
    assert site.perform(changes) == {"it": "conflict", "fresh": "conflict"}
    assert (site.lower / "it").read_text() == "theirs"


def test_a_mount_of_the_host_in_the_workspace_is_not_entered(site: Site) -> None:
    script = (
        "mount -t tmpfs none lower/m && echo kept > lower/m/x && "
        f"exec {sys.executable} -c 'from pathlib import Path; from tests.kernel.test_changes import Site; "
        's = Site.__new__(Site); s.lower, s.upper = Path("lower").resolve(), Path("upper").resolve(); '
        'print(sorted(s.perform(s.walk(), force=True).values()), open("lower/m/x").read())\''
    )
    (site.lower / "m").mkdir()
    (site.upper / "m").mkdir(mode=0o700)
    (site.upper / "m" / "x").write_text("new")
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script],
        cwd=site.lower.parent,
        env={**os.environ, "PYTHONPATH": str(WORKER.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['refused'] kept\n\n"


def test_a_tree_without_end_is_not_walked_to_its_end(site: Site) -> None:
    for number in range(30):
        (site.upper / str(number)).write_text("x")
    assert len(site.walk(bounds=Bounds(entries_max=30))) == 30
    with pytest.raises(TooMuch, match="more than 29 entries"):
        site.walk(bounds=Bounds(entries_max=29))
    lines = site.work(entries_max=29)
    assert [line.get("problem") for line in lines] == ["more than 29 entries"]
    applied = site.work(op="apply", entries_max=29)
    assert applied[-1]["problem"] == "more than 29 entries"
    assert list(site.lower.iterdir()) == [], "it is all or nothing"


def test_depth_is_bounded(site: Site) -> None:
    fd = os.open(site.upper, os.O_RDONLY)
    for _ in range(200):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    with pytest.raises(TooMuch, match="directories deep"):
        site.walk()


def test_a_huge_sparse_file_is_neither_read_nor_copied(site: Site) -> None:
    with (site.upper / "huge").open("wb") as file:
        file.truncate(1 << 40)
    (site.upper / "small").write_text("x")
    began = time.monotonic()
    changes = site.walk()
    assert time.monotonic() - began < 5
    assert site.perform(changes) == {"huge": "refused", "small": "applied"}


def test_the_report_is_bounded(site: Site) -> None:
    for number in range(100):
        (site.upper / str(number)).write_text("x")
    lines = site.work(report_bytes_max=8192)
    assert lines[-1]["problem"] == "more to tell than can be told"
    assert sum(len(json.dumps(line)) for line in lines) < 16384


def test_patches_are_of_text_and_bounded(site: Site) -> None:
    (site.lower / "a").write_text("one\ntwo\n")
    (site.upper / "a").write_text("one\n2\n")
    (site.upper / "binary").write_bytes(b"\0\1")
    (site.upper / "long").write_text("x\n" * (1 << 18))
    patches = {path_of(line): base64.b64decode(line.get("patch", "")) for line in site.work(patch=True)[:-1]}
    assert patches[b"a"] == b"--- a/a\n+++ b/a\n@@ -1,2 +1,2 @@\n one\n-two\n+2\n"
    assert patches[b"binary"] == b"(binary is not text)\n"
    assert patches[b"long"] == b"(long is too long to be compared by lines)\n"
    short = site.work(patch=True, patch_bytes_max=10)
    assert sum(len(base64.b64decode(line.get("patch", ""))) for line in short[:-1]) < 100


def test_the_worker_acts_as_the_owner_and_has_nothing_else(site: Site) -> None:
    (site.upper / "mine").write_text("x")
    (site.upper / "unreadable").write_text("x")
    (site.upper / "unreadable").chmod(0)
    (site.lower / "theirs").mkdir(mode=0o755)
    (site.upper / "theirs").mkdir(mode=0o755)
    (site.upper / "theirs" / "x").write_text("x")
    site.give()
    os.chown(site.lower / "theirs", 0, 0)
    original, site.give = site.give, lambda: None  # type: ignore[method-assign]
    lines = site.work(op="apply")
    site.give = original  # type: ignore[method-assign]
    outcomes = {path_of(line): line["outcome"] for line in lines[:-1]}
    assert outcomes == {b"mine": "applied", b"theirs/x": "failed", b"unreadable": "applied"}
    assert (site.lower / "mine").stat().st_uid == OWNER
    assert (site.lower / "unreadable").stat().st_mode & 0o777 == 0


def test_only_what_was_shown_is_applied(site: Site) -> None:
    (site.upper / "a").write_text("x")
    seen = site.work()[-1]["digest"]
    assert seen == digest(site.walk())
    (site.upper / "a").write_text("y")
    assert site.work(op="apply", digest=seen)[-1]["stale"] is True
    assert list(site.lower.iterdir()) == []
    assert site.work(op="apply", digest=site.work()[-1]["digest"])[0]["outcome"] == "applied"


def test_paths_choose_and_a_path_that_did_not_change_is_told(site: Site) -> None:
    (site.upper / "d").mkdir()
    for name in ("a", "d/b", "dd"):
        (site.upper / name).write_text("x")
    encoded = [base64.b64encode(b"d").decode()]
    assert [path_of(line) for line in site.work(op="apply", paths=encoded)[:-1]] == [b"d", b"d/b"]
    assert sorted(path.name for path in site.lower.iterdir()) == ["d"]
    missing = site.work(op="apply", paths=[base64.b64encode(b"nope").decode()])
    assert base64.b64decode(missing[-1]["missing"]) == b"nope"


@pytest.mark.parametrize(
    ("path", "target", "outside"),
    [("l", "x", False), ("l", "../x", True), ("d/l", "../x", False), ("d/l", "../../x", True), ("l", "/x", True),
     ("l", "a/../../x", True), ("l", ".", False)],
)  # fmt: skip
def test_where_a_link_leads_by_its_words(path: str, target: str, *, outside: bool) -> None:
    assert leads_outside(path, target) is outside
