"""Groups of execs that an earlier launcher made, where they could not be looked at when the agent was taken up."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from sandbox import exec_trees
from sandbox.loop import Loop
from sandbox.running import Agent

if TYPE_CHECKING:
    from pathlib import Path


class Group:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fd_for_clone(self) -> int:
        return self._fd


@pytest.mark.parametrize(("own_child", "found"), [(False, ["exec-7"]), (True, [])])
def test_what_was_left_is_never_taken_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, own_child: bool, found: list[str]
) -> None:
    (tmp_path / "exec-7").mkdir()
    (tmp_path / "exec-7" / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    plan: Any = None
    group: Any = Group(fd)
    agent = Agent(plan, {}, str(tmp_path), Loop(), group=group, own_child=own_child)

    def none_left(_parent: int, _name: str) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    if not own_child:
        with monkeypatch.context() as patched:
            patched.setattr(exec_trees, "_open", none_left)
            with pytest.raises(OSError, match="Too many open files"):
                agent.trees()
    assert list(agent.trees().of) == found
    agent.trees().close()
    os.close(fd)
