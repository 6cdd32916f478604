"""Trees of host files: sockets in them are found, and no two agents share one that either can write to."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from supervisord import sharing
from supervisord.agents import LaunchGrant
from supervisord.errors import Conflict, InvalidInput
from supervisord.plan import WantedFile
from supervisord.sharing import check_no_sockets, check_not_shared
from tests.support.made import DESCRIPTION


def wanted(path: str, *, writable: bool = False) -> WantedFile:
    return WantedFile(PurePosixPath(path), PurePosixPath("/workspace"), writable, "workspace", by_policy=False)


@pytest.mark.parametrize(
    ("ours", "writable", "theirs", "mode", "scopes", "refused"),
    [
        ("/srv/a", True, "/srv/a", "ro", (), True),
        ("/srv/a", False, "/srv/a", "rw", (), True),
        ("/srv/a/b", True, "/srv/a", "ro", (), True),
        ("/srv", False, "/srv/a", "rw", (), True),
        ("/srv/a", True, "", "", ("fs:ro:/srv",), True),
        ("/srv/a", False, "/srv/a", "ro", (), False),
        ("/srv/a", True, "/srv/ab", "rw", (), False),
        ("/srv/a", True, "", "", ("llm:*", "fs:rw:/srv/b"), False),
    ],
)
def test_who_may_see_a_tree_with_whom(  # noqa: PLR0917 - a table
    ours: str,
    writable: bool,  # noqa: FBT001 - a parameter
    theirs: str,
    mode: str,
    scopes: tuple[str, ...],
    refused: bool,  # noqa: FBT001 - a parameter
) -> None:
    grants = tuple(LaunchGrant("gr", scope, "x") for scope in scopes)
    other = replace(DESCRIPTION, workspace=theirs, workspace_mode=mode, grants=grants)
    if refused:
        with pytest.raises(Conflict, match="reader") as caught:
            check_not_shared([wanted(ours, writable=writable)], [other], lambda _agent: ())
        assert "shared_workspace" in caught.value.remedy
    else:
        check_not_shared([wanted(ours, writable=writable)], [other], lambda _agent: ())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").write_text("")
    (tmp_path / "a" / "link").symlink_to("/run")
    os.mkfifo(tmp_path / "a" / "fifo")
    return tmp_path


def look(tree: Path) -> bool:
    fd = os.open(tree, os.O_PATH)
    before = len(list(Path("/proc/self/fd").iterdir()))
    try:
        return check_no_sockets([wanted(str(tree))], [fd])
    finally:
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        os.close(fd)


def test_a_socket_is_found_however_deep(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(tree)
    monkeypatch.chdir(tree / "a" / "b")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("svc.sock")
        with pytest.raises(InvalidInput, match=r"a/b/svc\.sock") as caught:
            look(tree)
    assert "allow_sockets" in caught.value.remedy


def test_what_is_too_much_is_said(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "ENTRIES_MAX", 3)
    assert not look(tree)
