"""What people write on a command line, as values: sizes, times, pairs, workspaces. Raises WrongWord."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from stockade.client import words

if TYPE_CHECKING:
    from stockade.client.values import Workspace

_UNITS: Final = {
    "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
    "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_SIZE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([A-Za-z]+)", re.ASCII)
_WHOLE: Final = re.compile(r"[0-9]{1,19}", re.ASCII)


class WrongWord(ValueError):  # noqa: N818 - it is the user's word that is wrong
    """Its message says what was written and what may be."""


def size(text: str) -> int:
    """Bytes of `512MiB`."""
    match = _SIZE.fullmatch(text)
    if match is None or match[2] not in _UNITS:
        raise WrongWord(f"{text!r} is no size: write for example 512MiB ({' '.join(_UNITS)})")
    found = int(float(match[1]) * _UNITS[match[2]])
    if found >= 1 << 63:
        raise WrongWord(f"{text!r} is more than there can be")
    return found


def duration(text: str) -> float:
    """Seconds of `10m`, `1h30m`, `250ms`."""
    try:
        return words.duration(text)
    except ValueError as error:
        raise WrongWord(str(error)) from None


def moment(text: str, now: datetime) -> datetime:
    """A time in UTC: `2026-01-31T12:00:00Z`, or a duration before `now`."""
    if words.is_duration(text):
        return now - timedelta(seconds=duration(text))
    try:
        when = datetime.fromisoformat(text)
        return when.astimezone(UTC) if when.tzinfo else when.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise WrongWord(f"{text!r} is no time: write for example 10m (ago) or 2026-01-31T12:00:00Z") from None


def whole(text: str) -> int:
    """A whole number that is not negative, as the protos have them."""
    if not _WHOLE.fullmatch(text) or int(text) >= 1 << 63:
        raise WrongWord(f"{text!r} is no whole number from 0 on")
    return int(text)


def number(text: str) -> float:
    """A number that is one, not `nan` or `inf`."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise WrongWord(f"{text!r} is no number")
    return found


def pair(text: str) -> tuple[str, str]:
    """(key, value) of `key=value`."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise WrongWord(f"{text!r} is not of the form key=value")
    return key, value


def amount(text: str) -> tuple[str, float]:
    """(what, how much) of `tokens=20000`, `wall_clock=2h` (in seconds), `egress_bytes=100MiB` (in bytes)."""
    key, value = pair(text)
    if key in ("wall_clock", "cpu_seconds") and words.is_duration(value):
        return key, duration(value)
    if key == "egress_bytes" and _SIZE.fullmatch(value):
        return key, float(size(value))
    try:
        return key, number(value)
    except WrongWord as error:
        raise WrongWord(f"{key}: {error}") from None


def workspace(text: str) -> Workspace:
    """`DIR`, `DIR:ro`, `DIR:rw` or `DIR:overlay`."""
    try:
        return words.workspace(text)
    except ValueError as error:
        raise WrongWord(f"{text!r}: {error}") from None
