"""What callers write as words: durations such as `10m`, workspaces such as `DIR:rw`, a socket's path."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final, Literal

from stockade.client.values import Workspace

SECONDS_MAX: Final = 36500 * 86400  # what dates can be counted back by
_SECONDS: Final = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION: Final = re.compile(r"(?:[0-9]{1,9}(?:\.[0-9]{1,3})?(?:ms|[dhms]))+", re.ASCII)
_PART: Final = re.compile(r"([0-9.]+)(ms|[dhms])", re.ASCII)


def is_duration(text: str) -> bool:
    return _DURATION.fullmatch(text) is not None


def duration(text: str) -> float:
    """Seconds of `10m`, `1h30m`, `250ms`; raises ValueError."""
    if not is_duration(text):
        raise ValueError(f"{text!r} is no duration: write for example 10m or 1h30m (d h m s ms)")
    found = sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(text))
    if found > SECONDS_MAX:
        raise ValueError(f"{text!r} is longer than {SECONDS_MAX // 86400} days")
    return found


def time_span(value: float | timedelta | str) -> timedelta:
    """Seconds, a timedelta or `10m`; raises ValueError for what is no time."""
    if isinstance(value, timedelta):
        return value
    try:
        return timedelta(seconds=duration(value) if isinstance(value, str) else value)
    except OverflowError as error:
        raise ValueError(f"{value!r} seconds are no time: {error}") from error


def workspace(text: str) -> Workspace:
    """`DIR`, `DIR:ro`, `DIR:rw` or `DIR:overlay`; raises ValueError."""
    modes: tuple[Literal["ro", "rw", "overlay"], ...] = ("ro", "rw", "overlay")
    for mode in modes:
        if text.endswith(f":{mode}"):
            text = text.removesuffix(f":{mode}")
            break
    else:
        mode = "ro"
    if not text:
        raise ValueError("it names no directory: write DIR, DIR:ro, DIR:rw or DIR:overlay")
    return Workspace(text, mode)


def target(text: str) -> str:
    """What gRPC takes: a path, with `unix:` before it or not, is a socket's; all else is passed as it is."""
    return f"unix:{text}" if text.startswith("/") else text
