"""Sizes (`512MiB`) and durations (`10m`, `1h30m`): text to whole bytes and seconds, and back (pure)."""

import re
from decimal import Decimal
from typing import Final

from supervisord.errors import InvalidInput
from supervisord.ids import shown

SIZE_BYTES_MAX: Final = 1 << 60
DURATION_SECONDS_MAX: Final = 10 * 366 * 86400

_TEXT_CHARACTERS_MAX: Final = 32
_BYTES_PER: Final = {
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SECONDS_PER: Final = {
    "d": Decimal(86400),
    "h": Decimal(3600),
    "m": Decimal(60),
    "s": Decimal(1),
    "ms": Decimal("0.001"),
}

SIZE_PATTERN: Final = r"^[0-9]{1,15}(\.[0-9]{1,6})?(B|KiB|MiB|GiB|TiB|kB|MB|GB|TB)$"
"""The form of a size, as in `policies/schema/policy.schema.json`; a test holds the two together."""

DURATION_PATTERN: Final = (
    r"^(?=[0-9])([0-9]{1,9}d)?([0-9]{1,9}h)?([0-9]{1,9}m(?!s))?([0-9]{1,9}(\.[0-9]{1,3})?s)?([0-9]{1,9}ms)?$"
)

_SIZE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)(B|KiB|MiB|GiB|TiB|kB|MB|GB|TB)", re.ASCII)
_DURATION: Final = re.compile(DURATION_PATTERN[1:-1], re.ASCII)
_DURATION_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|[dhms])", re.ASCII)


def parse_size(text: str) -> int:
    """The bytes of a size with a unit (`512MiB`, `1.5GiB`, `10MB`); raises InvalidInput."""
    match = _SIZE.fullmatch(text) if len(text) <= _TEXT_CHARACTERS_MAX else None
    if match is None:
        raise InvalidInput(
            f"cannot read size {shown(text)}: it is not a number and a unit",
            remedy="write for example 512MiB (units: B KiB MiB GiB TiB kB MB GB TB)",
        )
    count = Decimal(match[1]) * _BYTES_PER[match[2]]
    if count != count.to_integral_value():
        raise InvalidInput(f"cannot read size {shown(text)}: it is not a whole number of bytes", remedy="round it")
    if count > SIZE_BYTES_MAX:
        raise InvalidInput(f"cannot read size {shown(text)}: it is larger than 1048576TiB", remedy="make it smaller")
    return int(count)


def format_size(size_bytes: int) -> str:
    """The shortest exact text of a size: parse_size() of it gives the same bytes."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % _BYTES_PER[unit] == 0:
            return f"{size_bytes // _BYTES_PER[unit]}{unit}"
    return f"{size_bytes}B"


def parse_duration(text: str) -> float:
    """The seconds of a duration (`10m`, `1h30m`, `1.5s`, `250ms`); raises InvalidInput."""
    if len(text) > _TEXT_CHARACTERS_MAX or _DURATION.fullmatch(text) is None:
        raise InvalidInput(
            f"cannot read duration {shown(text)}: it is not a number and a unit",
            remedy="write for example 30s, 10m or 1h30m (units, in this order: d h m s ms)",
        )
    seconds = sum((Decimal(count) * _SECONDS_PER[unit] for count, unit in _DURATION_PART.findall(text)), Decimal(0))
    if seconds > DURATION_SECONDS_MAX:
        raise InvalidInput(f"cannot read duration {shown(text)}: it is longer than 3660d", remedy="make it shorter")
    return float(seconds)


def format_duration(seconds: float) -> str:
    """A duration as text, to the millisecond: parse_duration() of it gives the same milliseconds."""
    left = round(seconds * 1000)
    if left <= 0:
        return "0s"
    parts = []
    for unit, length in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left = divmod(left, length)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)
