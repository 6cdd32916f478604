"""Memory that a process shares with its parent or its children since a fork, made its own ahead of need.

Whoever first writes to a shared page copies it, at 1 to 4 us a page, and Python writes to whatever it reads: a launch
touches some hundreds.
"""

# ruff: noqa: PTH123 - pathlib costs time on the launch path

import contextlib
from collections.abc import Iterator

from sandbox import syscalls


def own() -> None:
    """Copy what this process shares; no more of it than its memory has room for (proc(5), maps; madvise(2))."""
    for start, end in _private():
        with contextlib.suppress(OSError):
            syscalls.populate(start, end - start)


def _private() -> Iterator[tuple[int, int]]:
    """Yield heap, stack and what has no name; those that a library brings along are seldom written to."""
    with open("/proc/self/maps", "rb") as maps:
        lines = maps.read().splitlines()
    for line in lines:
        words = line.split()
        if words[1] == b"rw-p" and (len(words) < 6 or words[5] in (b"[heap]", b"[stack]")):  # noqa: PLR2004 - named or not
            start, _, end = words[0].partition(b"-")
            yield int(start, 16), int(end, 16)
