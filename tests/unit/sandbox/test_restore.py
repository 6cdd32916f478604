"""What a restarted launcher does where it cannot have all of an agent at once."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from sandbox import restore, syscalls
from sandbox.running import State

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(("number", "again"), [(errno.EMFILE, 1), (errno.EBADF, 0), (errno.ESRCH, 0)])
def test_the_listener_of_an_agent_is_asked_for_until_there_are_descriptors(
    monkeypatch: pytest.MonkeyPatch, number: int, again: int
) -> None:
    dues: list[Callable[[], None]] = []
    restored: list[int] = []

    def later(_seconds: float, due: Callable[[], None]) -> None:
        dues.append(due)

    def take_up(_agent: Any, fd: int) -> int:
        restored.append(fd)
        return 1

    agent: Any = SimpleNamespace(
        plan=SimpleNamespace(listens=True),
        state=State.RUNNING,
        pidfd=7,
        watching=SimpleNamespace(restore=take_up),
        loop=SimpleNamespace(later=later),
    )

    def refuse(_pidfd: int, _number: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(syscalls, "pidfd_getfd", refuse)
    restore._take_listener(agent)
    assert (len(dues), restored) == (again, [])
    monkeypatch.setattr(syscalls, "pidfd_getfd", lambda _pidfd, _number: 9)
    for due in dues:
        due()
    assert restored == [9] * again
