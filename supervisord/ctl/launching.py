"""The options of `run` and `launch` as what the client's launch() takes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from supervisord.ctl.words import WrongWord, pair

if TYPE_CHECKING:
    from argparse import Namespace

    from stockade.client.convert import LaunchOptions

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
    return found
