"""The options of `run` and `launch` as what the client's launch() takes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from supervisord.ctl.words import WrongWord, pair

if TYPE_CHECKING:
    from argparse import Namespace

    from stockade.client.convert import LaunchOptions

USUAL_TERMINAL: Final = (24, 80)
_AS_THEY_ARE: Final = (
    "name", "policy", "workspace", "scopes", "memory_bytes", "cpus", "pids", "owner", "purpose", "lease",
    "registered",
)  # fmt: skip


def environment(words: list[str]) -> dict[str, str]:
    """`K=V` as written, `K` alone from this process."""
    found = {}
    for word in words:
        if "=" in word:
            key, value = pair(word)
        elif word in os.environ:
            key, value = word, os.environ[word]
        else:
            raise WrongWord(f"{word!r} is not of the form K=V and is not set here either")
        found[key] = value
    return found


def terminal_size() -> tuple[int, int]:
    """Rows and columns of the terminal we are on, or the usual ones."""
    for descriptor in (0, 1, 2):
        try:
            size = os.get_terminal_size(descriptor)
        except OSError:
            continue
        if size.lines and size.columns:  # a pseudo-terminal that nobody gave a size has none
            return size.lines, size.columns
    return USUAL_TERMINAL


def launch_options(options: Namespace) -> LaunchOptions:
    """Only what was given: the rest is the policy's, or the file's."""
    given = vars(options)
    found: LaunchOptions = {}
    for name in _AS_THEY_ARE:
        if name in given:
            found[name] = given[name]
    if "labels" in given:
        found["labels"] = dict(given["labels"])
    if "budget" in given:
        found["budget"] = dict(given["budget"])
    if "env" in given:
        found["env"] = environment(given["env"])
    if options.interactive:
        found["stdin"] = True
    if options.terminal:
        found["terminal"] = terminal_size()
    return found
