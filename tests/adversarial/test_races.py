"""A name that is one thing when it is looked at and another when it is used: swaps while an agent is being launched."""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.instance import OWNER, Instance

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

RENAME_EXCHANGE = 2


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start('[gateway]\nkind = "embedded"\n') as instance:
        yield instance


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """Let two names change places all the time, each time at once (renameat2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    ending = threading.Event()

    def swap() -> None:
        while not ending.is_set():
            assert libc.renameat2(-100, bytes(one), -100, bytes(other), RENAME_EXCHANGE) == 0

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def prepared(top: Path) -> tuple[Path, Path]:
    """A directory of somebody's own, and beside it a link to /etc."""
    workspace, link = top / "given", top / "link"
    workspace.mkdir()
    (workspace / "mine").write_text("mine")
    for path in (workspace, workspace / "mine"):
        os.chown(path, OWNER, OWNER)
    link.symlink_to("/etc")
    return workspace, link


@pytest.mark.parametrize("mode", ["ro", "rw"])
def test_a_link_swapped_in_during_launch_leads_nowhere(stockade: Instance, tmp_path: Path, mode: str) -> None:
    workspace, link = prepared(tmp_path)
    seen = []
    with swapping(workspace, link):
        for _ in range(12):
            done = stockade.ctl("run", "--workspace", f"{workspace}:{mode}", "--", "ls", "/workspace")
            assert (done.code, done.out) == (0, "mine\n") or "cannot" in done.err, done
            seen.append(done.code)
    assert not (Path("/etc") / "mine").exists()
    assert len(seen) == 12


def test_a_link_swapped_in_deeper_leads_nowhere(stockade: Instance, tmp_path: Path) -> None:
    """The same with a directory on the way: what is given lies below the name that changes."""
    workspace, link = prepared(tmp_path)
    (workspace / "ssl").mkdir()  # as /etc has one
    os.chown(workspace / "ssl", OWNER, OWNER)
    with swapping(workspace, link):
        for _ in range(12):
            done = stockade.ctl("run", "--workspace", f"{workspace}/ssl:ro", "--", "ls", "/workspace")
            assert (done.code, done.out) == (0, "") or "cannot" in done.err, done


def test_who_follows_links_is_led_astray(tmp_path: Path) -> None:
    """The twin: looking and then using by name, as is commonly done, ends up in /etc."""
    workspace, link = prepared(tmp_path)
    with swapping(workspace, link):
        for _ in range(100_000):
            if not workspace.is_symlink() and (workspace / "passwd").exists():
                return
    pytest.fail("no swap was seen")
