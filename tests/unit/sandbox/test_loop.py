"""The launcher's event loop: what is ready in one turn, where a callback changes who is watched."""

from __future__ import annotations

import os
from functools import partial

from sandbox.loop import READ, Loop


def test_a_number_that_went_to_another_in_the_same_turn_is_not_called_for_it() -> None:
    loop = Loop()
    called: list[str] = []
    pipes = [os.pipe() for _ in range(2)]
    silent = os.pipe()

    def close_the_other(mine: int, other: int, _events: int) -> None:
        os.read(mine, 1)
        called.append("first")
        loop.forget(other)
        os.dup2(silent[0], other)  # the number is somebody's who has nothing to say
        loop.watch(other, READ, lambda _events: called.append("another"))

    for (read, write), (other, _) in zip(pipes, pipes[::-1], strict=True):
        loop.watch(read, READ, partial(close_the_other, read, other))
        os.write(write, b"x")
    loop.turn(1.0)
    assert called == ["first"]
    os.write(silent[1], b"x")
    loop.turn(1.0)
    assert called == ["first", "another"]
    for fd in (*pipes[0], *pipes[1], *silent):
        os.close(fd)
