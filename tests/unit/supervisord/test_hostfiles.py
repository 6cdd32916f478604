"""Opening host paths: no link is followed, nothing that blocks is opened, and nobody hands out what is another's."""

from __future__ import annotations

import os
import socket
from pathlib import Path, PurePosixPath

import pytest

from supervisord.errors import InvalidInput, NotFound, PermissionDenied
from supervisord.hostfiles import open_files, open_path
from supervisord.plan import WantedFile


def wanted(path: Path, *, by_policy: bool = False) -> WantedFile:
    return WantedFile(PurePosixPath(path), PurePosixPath("/x"), writable=False, why="test", by_policy=by_policy)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count


def test_the_file_itself_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    fd = open_path(PurePosixPath(tmp_path / "a" / "file"))
    try:
        assert os.fstat(fd).st_ino == (tmp_path / "a" / "file").stat().st_ino
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.read(fd, 1)  # O_PATH: a name, not the content
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("where", ["last", "middle", "dangling"])
def test_no_link_is_followed_anywhere(tmp_path: Path, where: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere" if where == "dangling" else "real")
    path = tmp_path / "link" / "file" if where == "middle" else tmp_path / "link"
    before = descriptors()
    with pytest.raises(InvalidInput, match="symbolic link"):
        open_path(PurePosixPath(path))
    assert descriptors() == before


@pytest.mark.parametrize("path", ["relative", "/a/../b", "", "."])
def test_a_path_is_absolute_and_plain(path: str) -> None:
    with pytest.raises(InvalidInput):
        open_path(PurePosixPath(path))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = descriptors()
    for missing in (tmp_path / "none", tmp_path / "none" / "deep", tmp_path / "file" / "below"):
        with pytest.raises(NotFound, match=str(tmp_path)):
            open_path(PurePosixPath(missing))
    assert descriptors() == before


def test_what_is_neither_file_nor_directory_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        before = descriptors()
        for path in (tmp_path / "fifo", tmp_path / "socket", Path("/dev/null")):
            with pytest.raises(InvalidInput, match="neither a directory nor a regular file"):
                open_files([wanted(path)], caller_uid=0)
        assert descriptors() == before


def test_a_caller_hands_out_what_is_his(tmp_path: Path) -> None:
    mine = tmp_path.stat().st_uid
    for caller in (mine, 0):
        opened, fds = open_files([wanted(tmp_path)], caller_uid=caller)
        assert (opened[0].index, opened[0].owner_uid) == (0, mine)
        for fd in fds:
            os.close(fd)
    before = descriptors()
    for stranger in (mine + 1, -1, None):
        with pytest.raises(PermissionDenied, match="owned by uid"):
            open_files([wanted(Path("/"), by_policy=True), wanted(tmp_path)], caller_uid=stranger)
        opened, fds = open_files([wanted(tmp_path, by_policy=True)], caller_uid=stranger)
        for fd in fds:
            os.close(fd)
    assert descriptors() == before


def test_a_workspace_is_a_directory_while_a_scope_may_be_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, target, good in (
        (tmp_path / "file", "/workspace", False),
        (tmp_path / "file", "/x", True),
        (tmp_path, "/workspace", True),
    ):
        file = WantedFile(PurePosixPath(path), PurePosixPath(target), writable=False, why="test", by_policy=False)
        before = descriptors()
        if good:
            os.close(open_files((file,), caller_uid=0)[1][0])
        else:
            with pytest.raises(InvalidInput, match="as the workspace: it is a file"):
                open_files((file,), caller_uid=0)
        assert descriptors() == before
