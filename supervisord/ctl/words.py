"""What people write on a command line, as values: sizes, times, pairs, workspaces. Raises WrongWord."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from stockade.client.values import Workspace

_UNITS: Final = {
    "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
    "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_SIZE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([A-Za-z]+)", re.ASCII)
_SECONDS: Final = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION: Final = re.compile(r"(?:[0-9]{1,9}(?:\.[0-9]{1,3})?(?:ms|[dhms]))+", re.ASCII)
_DURATION_PART: Final = re.compile(r"([0-9.]+)(ms|[dhms])", re.ASCII)


class WrongWord(ValueError):  # noqa: N818 - it is the user's word that is wrong
    """Its message says what was written and what may be."""


def size(text: str) -> int:
    """Bytes of `512MiB`."""
    match = _SIZE.fullmatch(text)
    if match is None or match[2] not in _UNITS:
        raise WrongWord(f"{text!r} is no size: write for example 512MiB ({' '.join(_UNITS)})")
    return int(float(match[1]) * _UNITS[match[2]])


def duration(text: str) -> float:
    """Seconds of `10m`, `1h30m`, `250ms`."""
    if not _DURATION.fullmatch(text):
        raise WrongWord(f"{text!r} is no duration: write for example 10m or 1h30m (d h m s ms)")
    return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(text))


def moment(text: str, now: datetime) -> datetime:
    """A time in UTC: `2026-01-31T12:00:00Z`, or a duration before `now`."""
    if _DURATION.fullmatch(text):
        return now - timedelta(seconds=duration(text))
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise WrongWord(f"{text!r} is no time: write for example 10m (ago) or 2026-01-31T12:00:00Z") from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def pair(text: str) -> tuple[str, str]:
    """(key, value) of `key=value`."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise WrongWord(f"{text!r} is not of the form key=value")
    return key, value


def amount(text: str) -> tuple[str, float]:
    """(what, how much) of `tokens=20000`, `wall_clock=2h` (in seconds), `egress_bytes=100MiB` (in bytes)."""
    key, value = pair(text)
    if key in ("wall_clock", "cpu_seconds") and _DURATION.fullmatch(value):
        return key, duration(value)
    if key == "egress_bytes" and _SIZE.fullmatch(value):
        return key, float(size(value))
    try:
        return key, float(value)
    except ValueError:
        raise WrongWord(f"{text!r}: {value!r} is no number") from None


def workspace(text: str) -> Workspace:
    """`DIR`, `DIR:ro`, `DIR:rw` or `DIR:overlay`."""
    for mode in ("rw", "overlay"):
        if text.endswith(f":{mode}") and text != f":{mode}":
            return Workspace(text.removesuffix(f":{mode}"), mode)
    path = text.removesuffix(":ro")
    if not path:
        raise WrongWord(f"{text!r} names no directory: write DIR, DIR:ro, DIR:rw or DIR:overlay")
    return Workspace(path)
